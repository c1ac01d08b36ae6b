//! Faults in random order under a load of short real jobs that write their own ledger, then the checks. A kind of fault
//! that was asked for and never took effect makes the run worthless, and so does a load that did next to nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::{Client, v1};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde_json::json;

use crate::checks::{self, Digests};
use crate::cluster::{Cluster, SOON, Setup};
use crate::faults::{Fault, Need, strike};
use crate::history::History;
use crate::ledger::{Committed, Ledger, Sink};
use crate::load::Ack;
use crate::lockers::{self, Lockers};
use crate::models::{self, Searched};
use crate::network::{Link, Network};
use crate::reads;
use crate::verdict::Verdict;
use crate::watchers::{self, Watchers};
use crate::work::{self, Accepted, READERS, SUBMITTERS, Work};

pub(crate) const REPLICAS: usize = 3;
/// Simulated machines, so that the real one's cores don't bound the jobs.
pub(crate) const NODES: [&str; 3] = ["n1", "n2", "n3"];
pub(crate) const GPUS: &str = "sim:rtx4090x8";
/// Where the clients of locks leave their files, and the first number of their processes.
const LOCKS: &str = "locks";
const LOCKERS_FROM: usize = SUBMITTERS + READERS;
/// Of each replica's and each agent's file system, where they have their own.
const DISK_MIB: u64 = 256;
/// So few that each replica makes snapshots and purges its log within minutes.
const SNAPSHOT_ENTRIES: &str = "500";
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
    let sink = Sink::empty(&plan.out)?;
    let history = Arc::new(History::create(&plan.out.join("history.jsonl"))?);
    let env = plan.planted.iter().map(|bug| ("ARES_PLANTED".to_owned(), bug.clone())).collect();
    let disk_mib = plan.faults.contains(&Fault::FullDisk).then_some(DISK_MIB);
    let flags = ["--snapshot-entries", SNAPSHOT_ENTRIES].map(str::to_owned).to_vec();
    let setup = Setup { env, flags, disk_mib, network: plan.network.clone(), ..Setup::of(REPLICAS) };
    let mut cluster = Cluster::with(setup).await?;
    if plan.faults.contains(&Fault::AgentPowerCut) {
        NODES.iter().try_for_each(|name| cluster.give_disk(name, DISK_MIB))?;
    }
    for name in NODES {
        cluster.agent(name, GPUS).await;
    }
    work::allow_preemption(&cluster.client()).await.map_err(|error| error.to_string())?;
    let on = cluster.network().map_or_else(tokio::runtime::Handle::current, Network::clients);
    let replicas: Vec<Client> = (0..REPLICAS).map(|at| cluster.client_at(at)).collect();
    let watchers = Watchers::start(&replicas, &on);
    let lockers = Lockers::start(&[cluster.client()], &plan.out.join(LOCKS), &history, LOCKERS_FROM, &on)?;
    let work = Work::start(&cluster, &sink, history.clone(), plan.seed);
    let effects = strike_in_turns(plan, &mut cluster, &history).await;
    lockers.finish().await;
    let jobs = work.finish().await;
    sink.keep(&cluster.fences_left)?;
    let ended = judge(&cluster, &sink, &jobs, verdict).await;
    watchers.finish(&cluster, &plan.out, verdict).await;
    lockers::judge(&plan.out.join(LOCKS), verdict);
    weigh(plan, &effects, &jobs, &ended, verdict);
    history.close()?;
    judge_history(&plan.out.join("history.jsonl"), verdict);
    effects.map(|_| ())
}

/// Judges the history and the ledger of an earlier run anew.
pub fn recheck(out: &Path) -> Verdict {
    let mut verdict = Verdict::default();
    judge_history(&out.join("history.jsonl"), &mut verdict);
    match Sink::of(out).read() {
        Err(error) => verdict.empty.push(error),
        Ok(ledger) => judge_ledger(&ledger, &mut verdict),
    }
    lockers::judge(&out.join(LOCKS), &mut verdict);
    watchers::judge(out, &mut verdict);
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
        let struck = strike(cluster, fault, &mut rng).await;
        if let (Err(_), Some(network)) = (&struck, cluster.network()) {
            // What is judged yet needs whole links.
            network.heal();
        }
        let struck = struck.map_err(|error| format!("{name}: {error}"))?;
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

// -------------------------------------------------------------------------------------------------------------- judging

/// The jobs, and the tasks of arrays, as they ended.
async fn judge(cluster: &Cluster, sink: &Sink, jobs: &[Accepted], verdict: &mut Verdict) -> Vec<v1::Job> {
    let acks: Vec<Ack> = jobs.iter().map(|job| job.ack.clone()).collect();
    let tasks: Vec<Accepted> = jobs.iter().flat_map(Accepted::each_task).collect();
    let jobs = [jobs, &tasks].concat();
    let ended = all_end(cluster, &jobs, verdict).await;
    verdict.check(checks::nothing_lost(cluster, &acks).await);
    verdict.check(checks::request_once(&cluster.client(), &acks).await);
    verdict.check(result_once(cluster).await);
    verdict.check(checks::replicas_equal(cluster, &mut Digests::default()).await);
    match sink.read() {
        Err(error) => verdict.empty.push(error),
        Ok(ledger) => {
            judge_ledger(&ledger, verdict);
            for (job, accepted) in ended.iter().zip(&jobs) {
                verdict.check(ended_once(&ledger, job, accepted));
            }
        }
    }
    ended
}

fn judge_ledger(ledger: &Ledger, verdict: &mut Verdict) {
    verdict.figure("attempts in the ledger", ledger.attempts());
    verdict.figure("fenced effects", ledger.effects());
    verdict.check(ledger.one_attempt_alive());
    verdict.check(ledger.token_grows());
    verdict.check(ledger.effects_fenced());
    verdict.check(ledger.gpu_in_one_lease());
    verdict.check(ledger.fence_kept());
    verdict.figure("power cuts of agents' disks", ledger.power_cuts());
    verdict.figure("GPUs in use", ledger.gpus());
    if ledger.effects() == 0 {
        verdict.empty.push("no job wrote behind its fence".to_owned());
    }
}

fn judge_history(history: &Path, verdict: &mut Verdict) {
    match reads::load(history) {
        Err(error) => verdict.empty.push(error),
        Ok(events) => {
            match reads::in_real_time(&events) {
                Err(violation) => verdict.violations.push(violation),
                Ok(sums) => {
                    verdict.figure("operations answered", sums.ok);
                    verdict.figure("operations of unknown outcome", sums.unknown);
                    verdict.figure("linearizable reads", sums.reads);
                    if sums.reads == 0 {
                        verdict.empty.push("no read was answered".to_owned());
                    }
                }
            }
            match models::linearizable(&events) {
                Err(violation) => verdict.violations.push(violation),
                Ok(searched) => {
                    let Searched { objects, calls, given_up } = searched;
                    verdict.figure("orders found", format!("{calls} calls on {objects} jobs and locks"));
                    if given_up > 0 {
                        verdict.empty.push(format!("no verdict on {given_up} of {objects} jobs and locks"));
                    }
                }
            }
        }
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

/// Jobs that exit 0 succeed in the end, whatever was done to their attempts, unless a person cancelled them before; an array does with
/// all its tasks.
fn ended_once(ledger: &Ledger, job: &v1::Job, accepted: &Accepted) -> Result<(), String> {
    let result = job.result.as_ref().ok_or_else(|| format!("result_once: job {} has no result", job.id))?;
    if accepted.tasks > 0 {
        let succeeded = job.array.as_ref().map_or(0, |array| array.succeeded);
        let whole = result.outcome == "SUCCEEDED" && succeeded == accepted.tasks;
        let broken = || format!("result_once: {succeeded} of {} tasks of array {}: {job:?}", accepted.tasks, job.id);
        return if whole { Ok(()) } else { Err(broken()) };
    }
    match result.outcome.as_str() {
        "SUCCEEDED" => {
            let committed = Committed { attempt: result.attempt, token: result.token };
            ledger.committed_ran(job.id, accepted.ranks, committed)
        }
        "CANCELLED" if accepted.cancelled => ledger.last_attempt(job.id).map_or(Ok(()), |last| {
            let after = || {
                format!("result_once: job {} was cancelled in attempt {}, attempt {last} ran", job.id, result.attempt)
            };
            if last <= result.attempt.max(job.attempt) { Ok(()) } else { Err(after()) }
        }),
        other => Err(format!("result_once: job {} ended as {other}: {:?}", job.id, job.attempts)),
    }
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
            verdict.idle.push(fault.name().to_owned());
        }
    }
    let again = ended.iter().filter(|job| job.attempts.len() > 1).count();
    let tasks: u32 = jobs.iter().map(|job| job.tasks).sum();
    verdict.figure("jobs accepted", format!("{}, with {tasks} tasks of arrays; {} ended", jobs.len(), ended.len()));
    verdict.figure("jobs of more than one attempt", again);
    verdict.figure("attempts that made room", ended.iter().map(|job| job.made_room).sum::<u32>());
    let outcomes = |wanted: &str| {
        ended.iter().filter_map(|job| job.result.as_ref()).filter(|result| result.outcome == wanted).count()
    };
    let asked = jobs.iter().filter(|job| job.cancelled).count();
    verdict.figure("cancels that raced an end", format!("{asked}, {} of them won", outcomes("CANCELLED")));
    if again == 0 && plan.faults.iter().any(|fault| fault.ends_attempts()) {
        verdict.empty.push("no attempt was ever lost".to_owned());
    }
    if jobs.len() < SUBMITTERS {
        verdict.empty.push(format!("only {} jobs were accepted", jobs.len()));
    }
}
