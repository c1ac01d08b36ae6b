//! Damage at rest under load, again and again: one replica of three is killed, its files are damaged, it is started. It must refuse
//! them by name or have what it lost from elsewhere; a refused one joins again as new. Nothing acknowledged may be lost, and the
//! replicas must be equal, each time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::checks::{self, Digests};
use crate::cluster::{Cluster, SOON, Setup};
use crate::damage::{Damage, Outcome};
use crate::faults::damage_and_mend;
use crate::load::{Ack, Load};
use crate::verdict::Verdict;

const REPLICAS: usize = 3;
const CLIENTS: usize = 4;
/// Acknowledged between two times: there is something new to damage.
const ACKS_BETWEEN: usize = 60;
/// So few that there are two snapshots, and the log before them is gone, after some times.
const SNAPSHOT_ENTRIES: &str = "120";
/// Submissions of each time that are sent again.
const SENT_AGAIN: usize = 10;
/// Times without effect for each that had one: bits of an image may mean nothing.
const PATIENCE: usize = 3;

#[derive(Clone, Debug)]
pub struct Plan {
    /// Damages that took effect.
    pub times: usize,
    pub seed: u64,
    /// A planted bug, for a binary that was built with them.
    pub planted: Option<String>,
}

pub async fn run(plan: &Plan) -> Verdict {
    let mut verdict = Verdict::default();
    let began = Instant::now();
    let mut seen: BTreeMap<Damage, BTreeMap<&'static str, usize>> = BTreeMap::new();
    let (mut acks, mut digests, mut token, mut took) = (Vec::new(), Digests::default(), 0, 0);
    let flags = ["--snapshot-entries", SNAPSHOT_ENTRIES].map(str::to_owned).to_vec();
    let env = plan.planted.iter().map(|bug| ("ARES_PLANTED".to_owned(), bug.clone())).collect();
    match Cluster::with(Setup { env, flags, ..Setup::of(REPLICAS) }).await {
        Err(error) => verdict.empty.push(format!("the cluster did not start: {error}")),
        Ok(mut cluster) => {
            let mut rng = StdRng::seed_from_u64(plan.seed);
            for nth in 0..plan.times * PATIENCE {
                if took == plan.times || !verdict.is_valid() {
                    break;
                }
                let damage = Damage::ALL[nth % Damage::ALL.len()];
                match one_time(&mut cluster, damage, &mut acks, &mut rng).await {
                    Err(error) => verdict.violations.push(format!("time {}: {error}", nth + 1)),
                    Ok(outcome) => {
                        took += usize::from(!matches!(outcome, None | Some(Outcome::Unnoticed)));
                        *seen.entry(damage).or_default().entry(word(&outcome)).or_default() += 1;
                        let held = afterwards(&cluster, &acks, &mut token, &mut digests).await;
                        verdict.check(
                            held.map_err(|error| format!("after {} (time {}): {error}", damage.name(), nth + 1)),
                        );
                    }
                }
            }
        }
    }
    if took < plan.times {
        verdict.empty.push(format!("{took} of {} damages took effect", plan.times));
    }
    verdict.figure("damages that took effect", took);
    for (damage, outcomes) in &seen {
        let outcomes: Vec<String> = outcomes.iter().map(|(word, times)| format!("{times} {word}")).collect();
        verdict.figure(damage.name(), outcomes.join(", "));
    }
    verdict.figure("acknowledged", acks.len());
    verdict.figure("digests compared", digests.count());
    verdict.figure("seconds", began.elapsed().as_secs());
    verdict
}

fn word(outcome: &Option<Outcome>) -> &'static str {
    match outcome {
        Some(Outcome::Refused) => "refused by name, joined again",
        Some(Outcome::Rebuilt) => "had from elsewhere",
        Some(Outcome::Unnoticed) => "without effect",
        None => "with nothing to damage yet",
    }
}

/// Load, and one replica whose files are damaged in the middle of it.
async fn one_time(
    cluster: &mut Cluster,
    damage: Damage,
    acks: &mut Vec<Ack>,
    rng: &mut StdRng,
) -> Result<Option<Outcome>, String> {
    let load = Load::start(&cluster.client(), CLIENTS);
    load.more(ACKS_BETWEEN, Duration::from_secs(60)).await?;
    let mended = damage_and_mend(cluster, rng.random_range(0..REPLICAS), damage, rng).await;
    acks.extend(load.finish().await);
    mended
}

async fn afterwards(cluster: &Cluster, acks: &[Ack], token: &mut u64, digests: &mut Digests) -> Result<(), String> {
    cluster.try_until("a replica leads", SOON, async |cluster| cluster.leader().await.is_some()).await?;
    // Whoever was just mended may be behind for a while.
    cluster.try_settle().await?;
    checks::nothing_lost(cluster, acks).await?;
    checks::request_once(&cluster.client(), &acks[acks.len().saturating_sub(SENT_AGAIN)..]).await?;
    let minted = checks::mint_token(&cluster.client()).await.map_err(|error| error.to_string())?;
    if minted <= *token {
        return Err(format!("token_grows: token {minted} was given after {token} had been"));
    }
    *token = minted;
    checks::replicas_equal(cluster, digests).await
}
