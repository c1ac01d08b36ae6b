//! Power cuts under submission load: each replica on a file system of its own, which is shut down under it so that
//! everything unsynced is gone. An acknowledgement counts if it was here before a clock read just before the first
//! shutdown. After each cut: nothing acknowledged lost, votes kept, tokens go on above, request ids known, replicas equal.

use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::checks::{self, Digests};
use crate::cluster::{Cluster, SOON, Setup};
use crate::load::{Ack, Load};
use crate::verdict::Verdict;

/// A cut after fewer counted acknowledgements shows nothing.
const ACKS_BEFORE_A_CUT: usize = 100;
const CLIENTS: usize = 8;
const DISK_MIB: u64 = 512;
/// All shutdowns begin within this time, or the replicas were not cut together.
const TOGETHER: Duration = Duration::from_millis(50);
/// Submissions of each cut that are sent again.
const SENT_AGAIN: usize = 20;

#[derive(Clone, Debug)]
pub struct Plan {
    pub cuts: usize,
    /// All of them are cut at once.
    pub replicas: usize,
    pub seed: u64,
    /// A planted bug, for a binary that was built with them.
    pub planted: Option<String>,
}

/// What was promised before the newest cut.
#[derive(Default)]
struct Promised {
    acks: Vec<Ack>,
    term: u64,
    token: u64,
    digests: Digests,
}

pub async fn run(plan: &Plan) -> Verdict {
    let mut verdict = Verdict::default();
    let mut promised = Promised::default();
    let began = Instant::now();
    let mut cuts = 0;
    match start(plan).await {
        Err(error) => verdict.empty.push(format!("the cluster did not start: {error}")),
        Ok(mut cluster) => {
            let mut rng = StdRng::seed_from_u64(plan.seed);
            while cuts < plan.cuts && verdict.is_valid() {
                if let Err(error) = one_cut(&mut cluster, &mut promised, &mut rng).await {
                    verdict.empty.push(format!("cut {}: {error}", cuts + 1));
                    break;
                }
                cuts += 1;
                let after = after_power_on(&mut cluster, &mut promised).await;
                verdict.check(after.map_err(|error| format!("after cut {cuts}: {error}")));
            }
        }
    }
    verdict.figure("replicas, all cut at once", plan.replicas);
    verdict.figure("power cuts", cuts);
    verdict.figure("acknowledged before a cut", promised.acks.len());
    verdict.figure("digests compared", promised.digests.count());
    verdict.figure("highest term", promised.term);
    verdict.figure("seconds", began.elapsed().as_secs());
    verdict
}

async fn start(plan: &Plan) -> Result<Cluster, String> {
    let env = plan.planted.iter().map(|bug| ("ARES_PLANTED".to_owned(), bug.clone())).collect();
    Cluster::with(Setup { env, disk_mib: Some(DISK_MIB), ..Setup::of(plan.replicas) }).await
}

/// Load, and the end of all power in the middle of it. An error means that this cut shows nothing.
async fn one_cut(cluster: &mut Cluster, promised: &mut Promised, rng: &mut StdRng) -> Result<(), String> {
    let (_, term) = cluster.find_leader(0, SOON).await?;
    promised.term = promised.term.max(term);
    let token = checks::mint_token(&cluster.client()).await.map_err(|error| error.to_string())?;
    promised.token = promised.token.max(token);
    let load = Load::start(&cluster.client(), CLIENTS);
    let enough = load.more(ACKS_BEFORE_A_CUT + rng.random_range(5..100), Duration::from_secs(60)).await;
    tokio::time::sleep(Duration::from_micros(rng.random_range(0..20_000))).await;

    let replicas = cluster.running_replicas();
    let cuts: Vec<Instant> = std::thread::scope(|scope| {
        let cuts: Vec<_> =
            replicas.iter().map(|at| cluster.disk(*at)).map(|disk| scope.spawn(|| disk.cut_power())).collect();
        cuts.into_iter().map(|cut| cut.join().expect("it does not panic")).collect::<Result<_, _>>()
    })?;
    let (first, last) = (cuts.iter().min(), cuts.iter().max());
    let (first, last) = first.zip(last).ok_or("no replica runs")?;
    for at in &replicas {
        cluster.kill_replica(*at);
    }
    let acks = load.abandon().await;
    enough?;
    if *last - *first > TOGETHER {
        return Err(format!("the replicas were cut {:?} apart, not within {TOGETHER:?}", *last - *first));
    }
    let before = acks.into_iter().filter(|ack| ack.at < *first).collect::<Vec<_>>();
    if before.len() < ACKS_BEFORE_A_CUT {
        return Err(format!("only {} acknowledgements came before it", before.len()));
    }
    promised.acks.extend(before);
    for at in &replicas {
        cluster.disk(*at).power_on()?;
    }
    Ok(())
}

/// Starts all replicas again and looks whether every promise holds.
async fn after_power_on(cluster: &mut Cluster, promised: &mut Promised) -> Result<(), String> {
    for at in 0..cluster.addresses.len() {
        cluster.restart_replica(at);
    }
    // Votes kept: who leads now was elected above every term that was seen, for no term is voted in twice.
    // A replica that refuses what it kept has lost something too.
    let leads = cluster.find_leader(promised.term, SOON).await;
    let (_, term) = leads.map_err(|error| format!("nothing_lost: the group does not come back: {error}"))?;
    promised.term = term;
    checks::nothing_lost(cluster, &promised.acks).await?;
    let newest = promised.acks.len().saturating_sub(SENT_AGAIN);
    checks::request_once(&cluster.client(), &promised.acks[newest..]).await?;
    let token = checks::mint_token(&cluster.client()).await.map_err(|error| error.to_string())?;
    if token <= promised.token {
        return Err(format!("token_grows: token {token} was given after {} had been", promised.token));
    }
    promised.token = token;
    checks::replicas_equal(cluster, &mut promised.digests).await
}
