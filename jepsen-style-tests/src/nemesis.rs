//! Faults in random order under a load of short real jobs that write their own ledger, then the checks. A kind of fault
//! that was asked for and never took effect makes the run worthless, and so does a load that did next to nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::{Client, Patience, v1};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::checks::{self, Digests};
use crate::cluster::{Cluster, SOON, Setup, USER, shell_job};
use crate::faults::{Fault, Need, strike};
use crate::history::History;
use crate::ledger::{self, Committed, Ledger};
use crate::load::Ack;
use crate::network::{Link, Network};
use crate::reads;
use crate::verdict::Verdict;

pub(crate) const REPLICAS: usize = 3;
/// Simulated machines, so that the real one's cores don't bound the jobs.
pub(crate) const NODES: [&str; 3] = ["n1", "n2", "n3"];
pub(crate) const GPUS: &str = "sim:rtx4090x8";
/// Closed loops: one job each at a time.
const SUBMITTERS: usize = 6;
/// One read at a time each, of the replicas in turn.
const READERS: usize = 3;
const A_READ: Patience = Patience { call: Duration::from_secs(3), attempt: Duration::from_secs(3) };
/// Of each replica's file system, where they have their own.
const DISK_MIB: u64 = 256;
/// So few that each replica makes snapshots and purges its log within minutes.
const SNAPSHOT_ENTRIES: &str = "500";
/// What is added to the number of a process whose call has an unknown outcome.
const RETIRED: usize = 1_000;
/// The shortest lease, as all jobs have it; a machine that is silent this long and a margin has lost its jobs.
pub(crate) const LEASE: Duration = Duration::from_secs(10);
/// After the last fault every accepted job must end within this: a lease with its margin, a run, and a busy machine.
const DRAIN: Duration = Duration::from_secs(90);

#[derive(Clone, Debug)]
pub struct Plan {
    /// Faults begin within this time; each kind at least once, however long that takes.
    pub duration: Duration,
    pub seed: u64,
    pub faults: Vec<Fault>,
    /// Faults of processes strike while the network is in a bad state too.
    pub pairs: bool,
    /// A planted bug, for a binary that was built with them.
    pub planted: Option<String>,
    /// Replicas, agents and clients each on a machine of this network; `None`: all are on loopback.
    pub network: Option<Arc<Network>>,
    /// Where the history and the ledger are left.
    pub out: PathBuf,
}

/// The machines of a run's network.
pub fn machines() -> Vec<&'static str> {
    ["r0", "r1", "r2"].into_iter().chain(NODES).collect()
}

pub async fn run(plan: &Plan) -> Verdict {
    let mut verdict = Verdict::default();
    if let Err(error) = try_run(plan, &mut verdict).await {
        verdict.empty.push(error);
    }
    verdict
}

async fn try_run(plan: &Plan, verdict: &mut Verdict) -> Result<(), String> {
    std::fs::create_dir_all(&plan.out).map_err(|error| format!("{}: {error}", plan.out.display()))?;
    let ledger = plan.out.join("ledger");
    let _ = std::fs::remove_file(&ledger);
    let history = Arc::new(History::create(&plan.out.join("history.jsonl"))?);
    let env = plan.planted.iter().map(|bug| ("ARES_PLANTED".to_owned(), bug.clone())).collect();
    let disk_mib = plan.faults.contains(&Fault::FullDisk).then_some(DISK_MIB);
    let flags = ["--snapshot-entries", SNAPSHOT_ENTRIES].map(str::to_owned).to_vec();
    let setup = Setup { env, flags, disk_mib, network: plan.network.clone(), ..Setup::of(REPLICAS) };
    let mut cluster = Cluster::with(setup).await?;
    for name in NODES {
        cluster.agent(name, GPUS).await;
    }
    let work = Work::start(&cluster, &ledger, history.clone(), plan.seed);
    let effects = strike_in_turns(plan, &mut cluster, &history).await;
    let jobs = work.finish().await;
    let ended = judge(&cluster, &ledger, &jobs, verdict).await;
    weigh(plan, &effects, &jobs, &ended, verdict);
    history.close()?;
    judge_history(&plan.out.join("history.jsonl"), verdict);
    effects.map(|_| ())
}

/// Judges the history and the ledger of an earlier run anew.
pub fn recheck(out: &Path) -> Verdict {
    let mut verdict = Verdict::default();
    judge_history(&out.join("history.jsonl"), &mut verdict);
    match Ledger::read(&out.join("ledger")) {
        Err(error) => verdict.empty.push(error),
        Ok(ledger) => judge_ledger(&ledger, &mut verdict),
    }
    verdict
}

/// What the network does while other faults strike, and what undoes it.
fn condition(plan: &Plan, fault: Fault, rng: &mut StdRng) -> Option<(Fault, Link)> {
    let conditions: Vec<_> = Fault::all().into_iter().filter_map(|some| Some((some, some.condition()?))).collect();
    let drawn = conditions[rng.random_range(0..conditions.len())].clone();
    (plan.pairs && fault.needs() != Some(Need::Network)).then_some(drawn)
}

// -------------------------------------------------------------------------------------------------------------- faults

/// Strikes and strikes that took effect, by kind.
type Effects = BTreeMap<Fault, (u32, u32)>;

async fn strike_in_turns(plan: &Plan, cluster: &mut Cluster, history: &History) -> Result<Effects, String> {
    let mut rng = StdRng::seed_from_u64(plan.seed);
    let mut effects = Effects::new();
    let end = Instant::now() + plan.duration;
    let mut turn = Vec::new();
    let mut first = true;
    loop {
        if turn.is_empty() {
            if !first && Instant::now() >= end {
                break;
            }
            turn = plan.faults.clone();
            turn.shuffle(&mut rng);
        }
        let Some(fault) = turn.pop().filter(|_| first || Instant::now() < end) else { break };
        first &= !turn.is_empty();
        tokio::time::sleep(Duration::from_millis(rng.random_range(500..2_000))).await;
        let under = condition(plan, fault, &mut rng);
        let name =
            under.as_ref().map_or_else(|| fault.name(), |(other, _)| format!("{}+{}", fault.name(), other.name()));
        history.add("nemesis", "invoke", &name, "", json!(null));
        if let (Some((_, link)), Some(network)) = (&under, cluster.network()) {
            let replicas: Vec<String> = (0..REPLICAS).map(|at| format!("r{at}")).collect();
            let replicas: Vec<&str> = replicas.iter().map(String::as_str).collect();
            network.set(&replicas, &replicas, link);
        }
        let struck = strike(cluster, fault, &mut rng).await.map_err(|error| format!("{name}: {error}"))?;
        history.add("nemesis", "info", &name, &struck.target, json!({ "took_effect": struck.took_effect }));
        eprintln!("{name} of {}{}", struck.target, if struck.took_effect { "" } else { ": without effect" });
        let (strikes, took) = effects.entry(fault).or_default();
        *strikes += 1;
        *took += u32::from(struck.took_effect);
        // Faults come one at a time: the group is whole again before the next.
        cluster.find_leader(0, SOON).await.map_err(|error| format!("after {name}: {error}"))?;
        if let Some(network) = cluster.network() {
            network.heal();
        }
    }
    Ok(effects)
}

// ---------------------------------------------------------------------------------------------------------------- work

/// A job that was acknowledged.
#[derive(Clone, Debug)]
struct Accepted {
    ack: Ack,
    ranks: u32,
}

/// Clients that submit jobs and wait for their ends.
struct Work {
    stop: Arc<AtomicBool>,
    accepted: Arc<Mutex<Vec<Accepted>>>,
    clients: JoinSet<()>,
}

impl Work {
    fn start(cluster: &Cluster, ledger: &Path, history: Arc<History>, seed: u64) -> Self {
        let mut work = Self { stop: Arc::default(), accepted: Arc::default(), clients: JoinSet::new() };
        let on = cluster.network().map_or_else(tokio::runtime::Handle::current, Network::clients);
        for process in 0..SUBMITTERS {
            let (stop, accepted, history) = (work.stop.clone(), work.accepted.clone(), history.clone());
            let (client, ledger) = (cluster.client(), ledger.to_owned());
            let mut rng = StdRng::seed_from_u64(seed ^ (process as u64 + 1));
            let submitter = async move {
                let mut process = process;
                while !stop.load(Ordering::Relaxed) {
                    let Some(job) = submit(&client, &ledger, process, &mut rng, &history).await else {
                        // What it asked for may still happen: it is another process from now on.
                        process += RETIRED;
                        continue;
                    };
                    accepted.lock().await.push(job.clone());
                    while !stop.load(Ordering::Relaxed) && !has_ended(&client, job.ack.job_id).await {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            };
            work.clients.spawn_on(submitter, &on);
        }
        for reader in 0..READERS {
            let (stop, accepted, history) = (work.stop.clone(), work.accepted.clone(), history.clone());
            let replicas: Vec<Client> = (0..REPLICAS).map(|at| cluster.client_at(at).with_patience(A_READ)).collect();
            let reader = async move {
                let mut process = SUBMITTERS + reader;
                for at in (reader..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    let newest = accepted.lock().await.last().map_or(1, |job| job.ack.job_id);
                    if !read(&replicas[at % REPLICAS], at % REPLICAS, newest, process, &history).await {
                        process += RETIRED;
                    }
                    tokio::time::sleep(Duration::from_millis(30)).await;
                }
            };
            work.clients.spawn_on(reader, &on);
        }
        work
    }

    async fn finish(mut self) -> Vec<Accepted> {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
        std::mem::take(&mut *self.accepted.lock().await)
    }
}

/// Most jobs are short; one in three outlives a lease, one in five is a gang over two machines.
async fn submit(
    client: &Client,
    ledger: &Path,
    process: usize,
    rng: &mut StdRng,
    history: &History,
) -> Option<Accepted> {
    let beats = if rng.random_range(0..3) == 0 { 70 } else { rng.random_range(3..15) };
    let nodes = if rng.random_range(0..5) == 0 { 2 } else { 1 };
    let mut job = shell_job(&ledger::script(ledger, beats));
    job.shape = Some(v1::Shape { nodes, ..Default::default() });
    let request = v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job), user: USER.into() };
    let key = request.request_id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    history.add(process, "invoke", "submit", &key, json!({ "nodes": nodes, "beats": beats }));
    match client.submit_job(request.clone()).await {
        Ok(reply) => {
            history.add(process, "ok", "submit", &key, json!(reply.job_id));
            let ack = Ack { job_id: reply.job_id, request, at: Instant::now() };
            Some(Accepted { ack, ranks: nodes })
        }
        Err(error) => {
            history.add(process, "info", "submit", &key, json!(error.to_string()));
            None
        }
    }
}

/// A linearizable read of one key, at one replica; whether it was answered.
async fn read(client: &Client, replica: usize, job: u64, process: usize, history: &History) -> bool {
    let key = format!("/jobs/{job}");
    history.add(process, "invoke", "read", &key, json!(null));
    let read = v1::ReadMode::Linearizable as i32;
    match client.get(v1::GetRequest { key: key.clone(), keys_only: true, read, ..Default::default() }).await {
        Ok(reply) => {
            let found = !reply.kvs.is_empty();
            let value = json!({ "revision": reply.revision, "found": found, "replica": format!("r{replica}") });
            history.add(process, "ok", "read", &key, value);
            true
        }
        Err(error) => {
            history.add(process, "info", "read", &key, json!(error.to_string()));
            false
        }
    }
}

async fn has_ended(client: &Client, id: u64) -> bool {
    let job = client.get_job(v1::GetJobRequest { job_id: id, ..Default::default() }).await;
    job.is_ok_and(|job| job.result.is_some())
}

// -------------------------------------------------------------------------------------------------------------- judging

/// The jobs as they ended.
async fn judge(cluster: &Cluster, ledger: &Path, jobs: &[Accepted], verdict: &mut Verdict) -> Vec<v1::Job> {
    let ended = all_end(cluster, jobs, verdict).await;
    let acks: Vec<Ack> = jobs.iter().map(|job| job.ack.clone()).collect();
    verdict.check(checks::nothing_lost(cluster, &acks).await);
    verdict.check(checks::request_once(&cluster.client(), &acks).await);
    verdict.check(result_once(cluster).await);
    verdict.check(checks::replicas_equal(cluster, &mut Digests::default()).await);
    match Ledger::read(ledger) {
        Err(error) => verdict.empty.push(error),
        Ok(ledger) => {
            judge_ledger(&ledger, verdict);
            for (job, accepted) in ended.iter().zip(jobs) {
                verdict.check(succeeded_once(&ledger, job, accepted.ranks));
            }
        }
    }
    ended
}

fn judge_ledger(ledger: &Ledger, verdict: &mut Verdict) {
    verdict.figure("attempts in the ledger", ledger.attempts());
    verdict.check(ledger.one_attempt_alive());
    verdict.check(ledger.token_grows());
}

fn judge_history(history: &Path, verdict: &mut Verdict) {
    match reads::load(history) {
        Err(error) => verdict.empty.push(error),
        Ok(events) => match reads::in_real_time(&events) {
            Err(violation) => verdict.violations.push(violation),
            Ok(sums) => {
                let shown = format!("{} ok, {} unknown, {} linearizable reads", sums.ok, sums.unknown, sums.reads);
                verdict.figure("operations", shown);
                if sums.reads == 0 {
                    verdict.empty.push("no read was answered".to_owned());
                }
            }
        },
    }
}

/// Waits for the end of all jobs; one that does not end is a violation and tells its reason.
async fn all_end(cluster: &Cluster, jobs: &[Accepted], verdict: &mut Verdict) -> Vec<v1::Job> {
    let deadline = Instant::now() + DRAIN;
    let mut ended = Vec::new();
    for accepted in jobs {
        loop {
            let id = accepted.ack.job_id;
            let job = cluster.client().get_job(v1::GetJobRequest { job_id: id, ..Default::default() }).await;
            match job {
                Ok(job) if job.result.is_some() => {
                    ended.push(job);
                    break;
                }
                other if Instant::now() >= deadline => {
                    verdict
                        .violations
                        .push(format!("liveness: job {id} has not ended {DRAIN:?} after the last fault: {other:?}"));
                    return ended;
                }
                _ => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }
    ended
}

/// Jobs that exit 0 succeed in the end, whatever was done to their attempts.
fn succeeded_once(ledger: &Ledger, job: &v1::Job, ranks: u32) -> Result<(), String> {
    let result = job.result.as_ref().ok_or_else(|| format!("result_once: job {} has no result", job.id))?;
    if result.outcome != "SUCCEEDED" {
        return Err(format!("job {} ended as {}, not SUCCEEDED: {:?}", job.id, result.outcome, job.attempts));
    }
    ledger.committed_ran(job.id, ranks, Committed { attempt: result.attempt, token: result.token })
}

/// `result_once`: each result was written once and never changed: its key has one version.
async fn result_once(cluster: &Cluster) -> Result<(), String> {
    let found = checks::keys(&cluster.client(), "/results/", false, v1::ReadMode::Linearizable).await?;
    for (key, shown) in &found.pairs {
        let mut revisions = shown.split(' ');
        if revisions.next() != revisions.next() {
            return Err(format!("result_once: {key} was written more than once: {shown}"));
        }
    }
    Ok(())
}

/// Whether the run is evidence at all.
fn weigh(plan: &Plan, effects: &Result<Effects, String>, jobs: &[Accepted], ended: &[v1::Job], verdict: &mut Verdict) {
    let Ok(effects) = effects else { return };
    for fault in &plan.faults {
        let (strikes, took) = effects.get(fault).copied().unwrap_or_default();
        verdict.figure(fault.name(), format!("{took} of {strikes} took effect"));
        if took == 0 {
            verdict.empty.push(format!("{} never took effect", fault.name()));
        }
    }
    let again = ended.iter().filter(|job| job.attempts.len() > 1).count();
    verdict.figure("jobs accepted and ended", format!("{} and {}", jobs.len(), ended.len()));
    verdict.figure("jobs of more than one attempt", again);
    if again == 0 && plan.faults.iter().any(|fault| fault.ends_attempts()) {
        verdict.empty.push("no attempt was ever lost".to_owned());
    }
    if jobs.len() < SUBMITTERS {
        verdict.empty.push(format!("only {} jobs were accepted", jobs.len()));
    }
}
