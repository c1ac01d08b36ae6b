//! The work that goes on under faults: clients that submit jobs and wait for their ends, cancel some of them just then, and read. What
//! each asked and heard is in the history; what the jobs did themselves is in the sink's files.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::{Client, Patience, v1};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::json;
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::cluster::{Cluster, USER, shell_job};
use crate::history::{History, RETIRED};
use crate::ledger::{BEAT, Sink};
use crate::load::Ack;
use crate::network::Network;

/// Closed loops: one job each at a time.
pub const SUBMITTERS: usize = 6;
/// One read at a time each, of the replicas in turn.
pub const READERS: usize = 4;
const A_READ: Patience = Patience { call: Duration::from_secs(3), attempt: Duration::from_secs(3) };
const BETWEEN_READS: Duration = Duration::from_millis(10);
/// What a job needs to start and end, beside its beats: a cancel comes up to this after its last beat.
const AROUND_THE_END_MS: u64 = 1_500;

/// Priorities of jobs that may end others, and of those that make room.
const URGENT: &str = "urgent";
const LOW: &str = "low";
/// Tasks of one array that run at a time.
const AT_ONCE: u32 = 2;

/// Lets urgent jobs end those of low priority, at any time and as often as it comes.
pub async fn allow_preemption(client: &Client) -> Result<(), proto::Error> {
    let urgent = v1::Priority { name: URGENT.into(), value: 100, preempts: true, ..Default::default() };
    let low = v1::Priority { name: LOW.into(), preemptible: true, ..Default::default() };
    for priority in [urgent, low] {
        let create = v1::SetPriorityRequest { request_id: proto::request_id(), create: true, priority: Some(priority) };
        client.set_priority(create).await?;
    }
    let policy = v1::SetPolicyRequest {
        request_id: proto::request_id(),
        min_run_ms: Some(0),
        preemptions: Some(1_000),
        ..Default::default()
    };
    client.set_policy(policy).await.map(|_| ())
}

/// A job that was acknowledged.
#[derive(Clone, Debug)]
pub struct Accepted {
    pub ack: Ack,
    pub ranks: u32,
    /// It is an array of so many; 0 = of none.
    pub tasks: u32,
    /// A person asks for its end, at about the time of its own.
    pub cancelled: bool,
}

impl Accepted {
    /// An array's tasks, which are jobs of their own.
    pub fn each_task(&self) -> impl Iterator<Item = Self> + '_ {
        (1..=u64::from(self.tasks)).map(|nth| {
            let ack = Ack { job_id: self.ack.job_id + nth, ..self.ack.clone() };
            Self { ack, tasks: 0, ..*self }
        })
    }

    /// The id that no job had yet when this one was made.
    fn next_id(&self) -> u64 {
        self.ack.job_id + u64::from(self.tasks) + 1
    }
}

/// Clients that submit jobs and wait for their ends.
pub struct Work {
    stop: Arc<AtomicBool>,
    accepted: Arc<Mutex<Vec<Accepted>>>,
    clients: JoinSet<()>,
}

impl Work {
    pub fn start(cluster: &Cluster, sink: &Sink, history: Arc<History>, seed: u64) -> Self {
        let mut work = Self { stop: Arc::default(), accepted: Arc::default(), clients: JoinSet::new() };
        let on = cluster.network().map_or_else(tokio::runtime::Handle::current, Network::clients);
        for process in 0..SUBMITTERS {
            let submitter = Submitter {
                client: cluster.client(),
                sink: sink.clone(),
                history: history.clone(),
                process,
                rng: StdRng::seed_from_u64(seed ^ (process as u64 + 1)),
            };
            work.clients.spawn_on(submitter.work(work.stop.clone(), work.accepted.clone()), &on);
        }
        for reader in 0..READERS {
            let (stop, accepted, history) = (work.stop.clone(), work.accepted.clone(), history.clone());
            let replicas: Vec<Client> =
                (0..cluster.addresses.len()).map(|at| cluster.client_at(at).with_patience(A_READ)).collect();
            let reader = async move {
                let mut process = SUBMITTERS + reader;
                for at in (reader..).take_while(|_| !stop.load(Ordering::Relaxed)) {
                    // The newest, and sometimes the one that is perhaps being submitted now.
                    let newest = accepted.lock().await.last().cloned();
                    let job = newest.map_or(1, |job| if at % 5 == 0 { job.next_id() } else { job.ack.job_id });
                    let replica = at % replicas.len();
                    if !read(&replicas[replica], replica, job, process, &history).await {
                        process += RETIRED;
                    }
                    tokio::time::sleep(BETWEEN_READS).await;
                }
            };
            work.clients.spawn_on(reader, &on);
        }
        work
    }

    pub async fn finish(mut self) -> Vec<Accepted> {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
        std::mem::take(&mut *self.accepted.lock().await)
    }
}

struct Submitter {
    client: Client,
    sink: Sink,
    history: Arc<History>,
    process: usize,
    rng: StdRng,
}

/// What a job will do.
struct Planned {
    /// Empty: one that neither ends others nor makes room for them.
    class: &'static str,
    tasks: u32,
    beats: u32,
    nodes: u32,
    ranks_per_node: u32,
    gpus_per_rank: u32,
    cancel: bool,
}

impl Submitter {
    async fn work(mut self, stop: Arc<AtomicBool>, accepted: Arc<Mutex<Vec<Accepted>>>) {
        while !stop.load(Ordering::Relaxed) {
            let planned = self.plan();
            let Some(ack) = self.submit(&planned).await else {
                self.process += RETIRED;
                continue;
            };
            let (job, cancelled) = (ack.job_id, planned.cancel);
            let ranks = planned.nodes * planned.ranks_per_node;
            accepted.lock().await.push(Accepted { ack, ranks, tasks: planned.tasks, cancelled });
            if planned.cancel {
                let around = Duration::from_millis(self.rng.random_range(0..AROUND_THE_END_MS));
                tokio::time::sleep(BEAT * planned.beats + around).await;
                if !self.cancel(job).await {
                    self.process += RETIRED;
                }
            }
            while !stop.load(Ordering::Relaxed) && !has_ended(&self.client, job).await {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }

    /// Most jobs are short; one in three outlives a lease, one in five is a gang over two machines, one in three has two ranks on each machine, of which
    /// one ends later, one in six is cancelled, one in six is an array. Those with GPUs compete for them: one in four may end others, half make room.
    fn plan(&mut self) -> Planned {
        let cancel = self.rng.random_range(0..6) == 0;
        let long = self.rng.random_range(0..3) == 0 && !cancel;
        let beats = if long { 70 } else { self.rng.random_range(3..15) };
        let nodes = if self.rng.random_range(0..5) == 0 { 2 } else { 1 };
        let ranks_per_node = if self.rng.random_range(0..3) == 0 { 2 } else { 1 };
        let gpus_per_rank = [0, 2, 4, 4][self.rng.random_range(0..4)];
        let class = [URGENT, LOW, LOW, ""][self.rng.random_range(0..4)];
        let array = self.rng.random_range(0..6) == 0 && !long && !cancel;
        let tasks = if array { self.rng.random_range(2..6) } else { 0 };
        Planned { class, tasks, beats, nodes, ranks_per_node, gpus_per_rank, cancel }
    }

    async fn submit(&self, planned: &Planned) -> Option<Ack> {
        let mut job = shell_job(&self.sink.script(planned.beats));
        let Planned { class, tasks, nodes, ranks_per_node, gpus_per_rank, .. } = *planned;
        job.priority_class = class.to_owned();
        job.array = (tasks > 0)
            .then(|| v1::Array { ranges: vec![v1::IndexRange { first: 0, last: tasks - 1 }], throttle: AT_ONCE });
        // What machines have beside their GPUs is shared by jobs without any.
        let (cores_per_rank, mem_mib_per_rank) = (1, 64);
        job.shape = Some(v1::Shape {
            nodes,
            ranks_per_node,
            gpus_per_rank,
            cores_per_rank,
            mem_mib_per_rank,
            ..Default::default()
        });
        let request = v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job), user: USER.into() };
        let key = request.request_id.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let told = json!({
            "nodes": nodes, "ranks": ranks_per_node, "gpus": gpus_per_rank, "beats": planned.beats,
            "tasks": tasks, "class": class,
        });
        self.history.add(self.process, "invoke", "submit", &key, told);
        match self.client.submit_job(request.clone()).await {
            Ok(reply) => {
                self.history.add(self.process, "ok", "submit", &key, json!(reply.job_id));
                Some(Ack { job_id: reply.job_id, request, at: Instant::now() })
            }
            Err(error) => {
                self.history.add(self.process, "info", "submit", &key, json!(error.to_string()));
                None
            }
        }
    }

    /// Whether it was answered.
    async fn cancel(&self, job: u64) -> bool {
        let key = format!("/jobs/{job}");
        self.history.add(self.process, "invoke", "cancel", &key, json!(null));
        let cancel = v1::CancelJobRequest { request_id: proto::request_id(), job_id: job, user: USER.into() };
        match self.client.cancel_job(cancel).await {
            Ok(_) => self.history.add(self.process, "ok", "cancel", &key, json!(null)),
            // It came too late.
            Err(error) if error.reason() == "ALREADY_ENDED" => {
                self.history.add(self.process, "fail", "cancel", &key, json!(error.to_string()));
            }
            Err(error) => {
                self.history.add(self.process, "info", "cancel", &key, json!(error.to_string()));
                return false;
            }
        }
        true
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
