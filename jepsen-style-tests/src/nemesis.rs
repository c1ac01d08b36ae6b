//! Faults in random order under a load of short real jobs that write their own ledger, then the checks. A kind of fault
//! that was asked for and never took effect makes the run worthless, and so does a load that did next to nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::{Client, v1};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use serde_json::json;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::checks::{self, Digests};
use crate::cluster::{Cluster, SOON, USER, shell_job};
use crate::history::History;
use crate::ledger::{self, Committed, Ledger};
use crate::load::Ack;
use crate::verdict::Verdict;

const REPLICAS: usize = 3;
/// Simulated machines, so that the real one's cores don't bound the jobs.
const NODES: [&str; 3] = ["n1", "n2", "n3"];
const GPUS: &str = "sim:rtx4090x8";
/// Closed loops: one job each at a time.
const CLIENTS: usize = 6;
/// The shortest lease, as all jobs have it; a machine that is silent this long and a margin has lost its jobs.
const LEASE: Duration = Duration::from_secs(10);
/// After the last fault every accepted job must end within this: a lease with its margin, a run, and a busy machine.
const DRAIN: Duration = Duration::from_secs(90);

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Fault {
    /// The leader is killed -9 and started again
    KillLeader,
    /// Any replica is killed -9 and started again
    KillReplica,
    /// All replicas are killed -9 at once and started again
    KillAll,
    /// The leader is stopped (SIGSTOP) until another leads, then goes on
    FreezeLeader,
    /// The leader ends in order (SIGTERM) and is started again
    RestartLeader,
    /// An agent is killed -9 and started again
    KillAgent,
    /// An agent and its shims are killed -9, the agent is started again
    KillAgentAndShims,
    /// An agent is stopped (SIGSTOP) past its leases, then goes on
    FreezeAgent,
}

impl Fault {
    pub const ALL: [Fault; 8] = [
        Fault::KillLeader,
        Fault::KillReplica,
        Fault::KillAll,
        Fault::FreezeLeader,
        Fault::RestartLeader,
        Fault::KillAgent,
        Fault::KillAgentAndShims,
        Fault::FreezeAgent,
    ];

    /// Ends attempts whenever one runs on the machine that it strikes.
    fn ends_attempts(self) -> bool {
        matches!(self, Fault::KillAgentAndShims | Fault::FreezeAgent)
    }
}

#[derive(Clone, Debug)]
pub struct Plan {
    /// Faults begin within this time; each kind at least once, however long that takes.
    pub duration: Duration,
    pub seed: u64,
    pub faults: Vec<Fault>,
    /// Where the history and the ledger are left.
    pub out: PathBuf,
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
    let mut cluster = Cluster::with(crate::cluster::Setup::of(REPLICAS)).await?;
    for name in NODES {
        cluster.agent(name, GPUS).await;
    }
    let work = Work::start(&cluster, &ledger, history.clone(), plan.seed);
    let effects = strike_in_turns(plan, &mut cluster, &history).await;
    let jobs = work.finish().await;
    let ended = judge(&cluster, &ledger, &jobs, verdict).await;
    weigh(plan, &effects, &jobs, &ended, verdict);
    verdict.figure("history events", history.close()?);
    effects.map(|_| ())
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
        history.add("nemesis", "invoke", &format!("{fault:?}"), "", json!(null));
        let struck = strike(cluster, fault, &mut rng).await.map_err(|error| format!("{fault:?}: {error}"))?;
        history.add(
            "nemesis",
            "info",
            &format!("{fault:?}"),
            &struck.target,
            json!({ "took_effect": struck.took_effect }),
        );
        eprintln!("{fault:?} of {}{}", struck.target, if struck.took_effect { "" } else { ": without effect" });
        let (strikes, took) = effects.entry(fault).or_default();
        *strikes += 1;
        *took += u32::from(struck.took_effect);
        // Faults come one at a time: the group is whole again before the next.
        cluster.find_leader(0, SOON).await.map_err(|error| format!("after {fault:?}: {error}"))?;
    }
    Ok(effects)
}

struct Struck {
    target: String,
    took_effect: bool,
}

/// One fault and its end. An error: the cluster did not come back as it must, or the fault could not be made.
async fn strike(cluster: &mut Cluster, fault: Fault, rng: &mut StdRng) -> Result<Struck, String> {
    let away = Duration::from_millis(rng.random_range(0..2_500));
    let node = NODES[rng.random_range(0..NODES.len())];
    match fault {
        Fault::KillLeader => {
            let (at, term) = cluster.find_leader(0, SOON).await?;
            cluster.kill_replica(at);
            cluster.find_leader(term, SOON).await?;
            cluster.restart_replica(at);
            Ok(Struck { target: format!("r{at}"), took_effect: true })
        }
        Fault::KillReplica => {
            let at = rng.random_range(0..REPLICAS);
            cluster.kill_replica(at);
            tokio::time::sleep(away).await;
            cluster.restart_replica(at);
            Ok(Struck { target: format!("r{at}"), took_effect: true })
        }
        Fault::KillAll => {
            let (_, term) = cluster.find_leader(0, SOON).await?;
            (0..REPLICAS).for_each(|at| cluster.kill_replica(at));
            tokio::time::sleep(away).await;
            (0..REPLICAS).for_each(|at| cluster.restart_replica(at));
            cluster.find_leader(term, SOON).await?;
            Ok(Struck { target: "all replicas".to_owned(), took_effect: true })
        }
        Fault::FreezeLeader => {
            let (at, term) = cluster.find_leader(0, SOON).await?;
            cluster.signal_replica(at, Signal::STOP);
            let next = cluster.find_leader(term, SOON).await;
            let stopped = cluster.replica(at).state() == Some('T');
            cluster.signal_replica(at, Signal::CONT);
            next?;
            Ok(Struck { target: format!("r{at}"), took_effect: stopped })
        }
        Fault::RestartLeader => {
            let (at, _) = cluster.find_leader(0, SOON).await?;
            let code = cluster.stop_replica(at)?;
            cluster.restart_replica(at);
            Ok(Struck { target: format!("r{at}"), took_effect: code == 0 })
        }
        Fault::KillAgent => {
            let epoch = epoch(cluster, node).await?;
            cluster.kill_agent(node);
            tokio::time::sleep(away).await;
            cluster.start_agent(node, GPUS);
            Ok(Struck { target: node.to_owned(), took_effect: comes_back(cluster, node, epoch).await? })
        }
        Fault::KillAgentAndShims => {
            let node = busy(cluster, node).await;
            let epoch = epoch(cluster, node).await?;
            let shims = cluster.kill_agent_and_shims(node);
            tokio::time::sleep(away).await;
            cluster.start_agent(node, GPUS);
            comes_back(cluster, node, epoch).await?;
            Ok(Struck { target: node.to_owned(), took_effect: shims > 0 })
        }
        Fault::FreezeAgent => {
            cluster.signal_agent(node, Signal::STOP);
            // The lease, its drift bound and margin, and a look of the leader.
            tokio::time::sleep(LEASE + Duration::from_secs(4)).await;
            let seen = cluster.node_as_the_leader_sees_it(node).await;
            let silent = seen.is_some_and(|node| node.state == "SILENT");
            cluster.signal_agent(node, Signal::CONT);
            Ok(Struck { target: node.to_owned(), took_effect: silent })
        }
    }
}

/// A node with a shim, `first` if it has one; `first` too if none has for a while.
async fn busy(cluster: &Cluster, first: &'static str) -> &'static str {
    for _ in 0..100 {
        let others = NODES.into_iter().filter(|name| *name != first);
        if let Some(node) = [first].into_iter().chain(others).find(|name| !cluster.shims(name).is_empty()) {
            return node;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    first
}

async fn epoch(cluster: &Cluster, node: &str) -> Result<u64, String> {
    Ok(cluster.node(node).await.ok_or_else(|| format!("node {node} is not known"))?.epoch)
}

/// Registered anew, and ready.
async fn comes_back(cluster: &Cluster, node: &str, epoch: u64) -> Result<bool, String> {
    let what = format!("{node} is back");
    let back = cluster.try_until(&what, SOON, async |cluster| {
        cluster.node(node).await.is_some_and(|node| node.epoch > epoch && node.state == "READY")
    });
    back.await.map(|()| true)
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
        for process in 0..CLIENTS {
            let (stop, accepted, history) = (work.stop.clone(), work.accepted.clone(), history.clone());
            let (client, ledger) = (cluster.client(), ledger.to_owned());
            let mut rng = StdRng::seed_from_u64(seed ^ (process as u64 + 1));
            work.clients.spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let Some(job) = submit(&client, &ledger, process, &mut rng, &history).await else { continue };
                    accepted.lock().await.push(job.clone());
                    while !stop.load(Ordering::Relaxed) && !has_ended(&client, job.ack.job_id).await {
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                }
            });
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
            verdict.figure("attempts in the ledger", ledger.attempts());
            verdict.check(ledger.one_attempt_alive());
            verdict.check(ledger.token_grows());
            for (job, accepted) in ended.iter().zip(jobs) {
                verdict.check(succeeded_once(&ledger, job, accepted.ranks));
            }
        }
    }
    ended
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
        verdict.figure(format!("{fault:?}"), format!("{took} of {strikes} took effect"));
        if took == 0 {
            verdict.empty.push(format!("{fault:?} never took effect"));
        }
    }
    let again = ended.iter().filter(|job| job.attempts.len() > 1).count();
    verdict.figure("jobs accepted and ended", format!("{} and {}", jobs.len(), ended.len()));
    verdict.figure("jobs of more than one attempt", again);
    if again == 0 && plan.faults.iter().any(|fault| fault.ends_attempts()) {
        verdict.empty.push("no attempt was ever lost".to_owned());
    }
    if jobs.len() < CLIENTS {
        verdict.empty.push(format!("only {} jobs were accepted", jobs.len()));
    }
}
