//! `ares bench`: closed-loop load, and the check that nothing acknowledged is missing afterwards.

use std::collections::{BTreeSet, VecDeque};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use proto::{Client, Identity, Patience, v1};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::run::cancel;
use crate::Global;
use crate::connect::{address, runtime, servers};
use crate::exit::{FAILURE, Failure, Outcome};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Submissions per second: one SubmitJob an operation with a fresh request id and one outstanding per client, for a
    /// GPU type that no machine has
    Submit {
        /// All replicas: load goes to the leader, each is checked afterwards [default: --server]
        #[arg(long, value_delimiter = ',', value_name = "HOST:PORT")]
        servers: Vec<String>,
        #[arg(long, default_value_t = 64)]
        clients: usize,
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// Bytes of each job's command
        #[arg(long, default_value_t = 300)]
        bytes: usize,
        /// Jobs left waiting at most: each client cancels the oldest of its share before it submits one more
        #[arg(long, value_name = "JOBS")]
        live: Option<usize>,
        /// Leave the jobs' check on every replica out
        #[arg(long)]
        no_check: bool,
    },
    /// From the submission of a job to its RUNNING, one job after the other, on an idle cluster
    Start {
        #[arg(long, default_value_t = 50)]
        jobs: usize,
    },
}

/// Clients that share one connection.
const CLIENTS_PER_CONNECTION: usize = 32;
/// Whose jobs they are.
const USER: &str = "bench";
/// A GPU type that no machine has: jobs wait for ever and cost the planner its look.
const NO_SUCH_GPU: &str = "bench-none";

pub fn run(args: Args, global: Global) -> Outcome {
    match args.verb {
        Verb::Submit { servers, clients, seconds, bytes, live, no_check } => {
            let share = live.map(|live| live / clients.max(1));
            submit(&global, &servers, Demand { clients, seconds, bytes, share }, no_check)
        }
        Verb::Start { jobs } => start(&global, jobs),
    }
}

/// What the load is made of.
struct Demand {
    clients: usize,
    seconds: u64,
    /// Of each job's command.
    bytes: usize,
    /// Jobs that one client leaves waiting at most.
    share: Option<usize>,
}

fn submit(global: &Global, named: &[String], demand: Demand, no_check: bool) -> Outcome {
    let named = match named.is_empty() {
        true => servers(global)?,
        false => named.iter().map(|server| address(server)).collect::<Result<_, _>>()?,
    };
    if demand.clients == 0 || demand.seconds == 0 {
        return Err(Failure::usage("--clients and --seconds are at least 1"));
    }
    if demand.share == Some(0) {
        return Err(Failure::usage(format!(
            "--live is at least --clients, {}: each client has a job of its own",
            demand.clients
        )));
    }
    runtime()?.block_on(async {
        let load = submit_load(global, &named, &demand).await?;
        let mut report = load.report(&demand);
        let mut missing = 0;
        if !no_check {
            let checked = check(global, &named, &load.acknowledged).await?;
            missing = checked.iter().map(|(_, missing)| missing).sum();
            report["missing"] =
                checked.into_iter().map(|(server, missing)| (server, json!(missing))).collect::<Value>();
        }
        match global.output {
            Format::Json | Format::Jsonl => output::json(&report),
            _ => print(&report),
        }
        if missing > 0 {
            return Err(Failure::new(FAILURE, format!("{missing} acknowledged jobs are missing")));
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// An acknowledgement: the job, and when it came, in us since the load began.
type Acknowledged = (u64, u64);

struct Load {
    acknowledged: Vec<Acknowledged>,
    cancelled: usize,
    latency_us: Histogram<u64>,
    errors: u64,
    first_error: Option<String>,
    took: Duration,
    cpu: Duration,
}

impl Load {
    fn report(&self, demand: &Demand) -> Value {
        let ms = |quantile: f64| self.latency_us.value_at_quantile(quantile) as f64 / 1_000.0;
        let seconds = self.took.as_secs_f64();
        let mut report = json!({
            "clients": demand.clients,
            "seconds": seconds,
            "acknowledged": self.acknowledged.len(),
            "ops_per_s": (self.acknowledged.len() as f64 / seconds).round(),
            "p50_ms": ms(0.5),
            "p99_ms": ms(0.99),
            "p999_ms": ms(0.999),
            "max_ms": self.latency_us.max() as f64 / 1_000.0,
            "longest_gap_ms": self.longest_gap_us() as f64 / 1_000.0,
            "errors": self.errors,
            "first_error": self.first_error,
            "cpu": (self.cpu.as_secs_f64() / seconds * 100.0).round() / 100.0,
        });
        if demand.share.is_some() {
            report["cancelled"] = json!(self.cancelled);
        }
        report
    }
}

impl Load {
    /// The longest time in which no client got an acknowledgement: what a killed leader costs.
    fn longest_gap_us(&self) -> u64 {
        let mut times: Vec<u64> = self.acknowledged.iter().map(|(_, at_us)| *at_us).collect();
        times.sort_unstable();
        times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }
}

fn print(report: &Value) {
    if let Some(map) = report.as_object() {
        output::table(&["FIGURE", "VALUE"], map.iter().map(|(name, value)| vec![name.clone(), value.to_string()]));
    }
}

async fn submit_load(global: &Global, servers: &[String], demand: &Demand) -> Result<Load, Failure> {
    let clients = demand.clients;
    let stop = Arc::new(AtomicBool::new(false));
    let request =
        v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job(demand.bytes)), user: USER.to_owned() };
    let connections = clients.div_ceil(CLIENTS_PER_CONNECTION);
    let connections: Vec<Client> = (0..connections).map(|_| fresh_client(global, servers)).collect::<Result<_, _>>()?;
    for client in &connections {
        // Connects, and learns who leads.
        client.validate(v1::ValidateRequest { name: "bench".to_owned(), token: 0 }).await?;
    }
    let mut workers = JoinSet::new();
    let cpu_before = cpu_time();
    let began = Instant::now();
    for at in 0..clients {
        let client = connections[at % connections.len()].clone();
        workers.spawn(closed_loop(client, request.clone(), demand.share, stop.clone(), began));
    }
    tokio::time::sleep(Duration::from_secs(demand.seconds)).await;
    stop.store(true, Ordering::Relaxed);
    let mut load = Load {
        acknowledged: Vec::new(),
        cancelled: 0,
        latency_us: histogram(),
        errors: 0,
        first_error: None,
        took: began.elapsed(),
        cpu: Duration::ZERO,
    };
    while let Some(worker) = workers.join_next().await {
        let worker = worker.map_err(|error| Failure::new(FAILURE, format!("a client stopped: {error}")))?;
        load.acknowledged.extend(worker.acknowledged);
        load.cancelled += worker.cancelled;
        load.errors += worker.errors;
        load.first_error = load.first_error.or(worker.first_error);
        // The bounds are the same, so adding can't fail.
        let _ = load.latency_us.add(worker.latency_us);
    }
    load.took = began.elapsed();
    load.cpu = cpu_time().saturating_sub(cpu_before);
    Ok(load)
}

fn job(bytes: usize) -> v1::JobSpec {
    v1::JobSpec {
        name: "bench".to_owned(),
        shape: Some(v1::Shape { gpus_per_rank: 1, gpu_types: vec![NO_SUCH_GPU.to_owned()], ..Default::default() }),
        body: Some(v1::Body { argv: vec!["x".repeat(bytes)], ..Default::default() }),
        ..Default::default()
    }
}

fn fresh_client(global: &Global, servers: &[String]) -> Result<Client, Failure> {
    let client = Client::new(servers.to_vec(), Identity::new(&global.cluster_id, "")?);
    Ok(client.with_patience(Patience { call: Duration::from_secs(10), attempt: Duration::from_secs(5) }))
}

/// 1 us to 60 s, three digits.
fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).unwrap_or_else(|_| unreachable!("the bounds are valid"))
}

struct Worker {
    acknowledged: Vec<Acknowledged>,
    cancelled: usize,
    latency_us: Histogram<u64>,
    errors: u64,
    first_error: Option<String>,
}

async fn closed_loop(
    client: Client,
    mut request: v1::SubmitJobRequest,
    share: Option<usize>,
    stop: Arc<AtomicBool>,
    load_began: Instant,
) -> Worker {
    let mut worker =
        Worker { acknowledged: Vec::new(), cancelled: 0, latency_us: histogram(), errors: 0, first_error: None };
    let mut waiting = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        if share.is_some_and(|share| waiting.len() >= share)
            && let Some(job) = waiting.pop_front()
        {
            worker.cancel(&client, job).await;
        }
        request.request_id = proto::request_id();
        let began = Instant::now();
        match client.submit_job(&request).await {
            Ok(reply) => {
                if share.is_some() {
                    waiting.push_back(reply.job_id);
                }
                worker.acknowledged.push((reply.job_id, load_began.elapsed().as_micros() as u64));
                worker.latency_us.saturating_record(began.elapsed().as_micros() as u64);
            }
            Err(error) => worker.note(error.to_string()),
        }
    }
    worker
}

impl Worker {
    async fn cancel(&mut self, client: &Client, job_id: u64) {
        match cancel(client, job_id, USER.to_owned()).await {
            Ok(()) => self.cancelled += 1,
            Err(failure) => self.note(failure.message),
        }
    }

    fn note(&mut self, error: String) {
        self.errors += 1;
        self.first_error.get_or_insert(error);
    }
}

/// Acknowledged ids that a replica's own read does not have, by replica.
async fn check(
    global: &Global,
    servers: &[String],
    acknowledged: &[Acknowledged],
) -> Result<Vec<(String, usize)>, Failure> {
    let mut checked = Vec::new();
    for server in servers {
        let client = fresh_client(global, std::slice::from_ref(server))?;
        let found = all_jobs(&client).await?;
        checked.push((server.clone(), acknowledged.iter().filter(|(id, _)| !found.contains(id)).count()));
    }
    Ok(checked)
}

async fn all_jobs(client: &Client) -> Result<BTreeSet<u64>, Failure> {
    let mut found = BTreeSet::new();
    let mut after = String::new();
    loop {
        let request = v1::GetRequest {
            key: "/jobs/".to_owned(),
            prefix: true,
            keys_only: true,
            limit: 10_000,
            after: after.clone(),
            ..Default::default()
        };
        let reply = client.get(request).await?;
        found.extend(reply.kvs.iter().filter_map(|kv| kv.key.strip_prefix("/jobs/")?.parse::<u64>().ok()));
        match reply.kvs.last() {
            Some(last) if reply.more => after = last.key.clone(),
            _ => return Ok(found),
        }
    }
}

/// Submits `true` again and again, and watches for its RUNNING: the time includes the report that it runs.
fn start(global: &Global, jobs: usize) -> Outcome {
    let named = servers(global)?;
    let latency_us = runtime()?.block_on(async {
        let client = fresh_client(global, &named)?;
        let watch = v1::WatchRequest { key: "/state/".to_owned(), prefix: true, ..Default::default() };
        let mut states = client.watch(watch).await?;
        let mut latency_us = histogram();
        for _ in 0..jobs {
            let began = Instant::now();
            let body = v1::Body { argv: vec!["true".to_owned()], ..Default::default() };
            let job = v1::JobSpec { name: "bench".to_owned(), body: Some(body), ..Default::default() };
            let request =
                v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job), user: USER.to_owned() };
            let id = client.submit_job(request).await?.job_id;
            wait_for_start(&mut states, &format!("/state/{id}")).await?;
            latency_us.saturating_record(began.elapsed().as_micros() as u64);
        }
        Ok::<_, Failure>(latency_us)
    })?;
    let ms = |quantile: f64| latency_us.value_at_quantile(quantile) as f64 / 1_000.0;
    let report = json!({ "jobs": jobs, "p50_ms": ms(0.5), "p99_ms": ms(0.99), "max_ms": ms(1.0) });
    match global.output {
        Format::Json | Format::Jsonl => output::json(&report),
        _ => print(&report),
    }
    Ok(ExitCode::SUCCESS)
}

async fn wait_for_start(states: &mut tonic::Streaming<v1::WatchReply>, key: &str) -> Result<(), Failure> {
    use tokio_stream::StreamExt;
    let patience = Duration::from_secs(30);
    let running = |event: &v1::KeyEvent| {
        let state = serde_json::from_str::<Value>(&event.value).unwrap_or_default();
        let word = state["state"].as_str().unwrap_or_default();
        event.key == key && !matches!(word, "PENDING" | "STARTING")
    };
    loop {
        match tokio::time::timeout(patience, states.next()).await {
            Ok(Some(Ok(reply))) if reply.events.iter().any(running) => return Ok(()),
            Ok(Some(Ok(_))) => {}
            Ok(Some(Err(status))) => return Err(proto::Error::from(proto::Failure::from(status)).into()),
            Ok(None) => return Err(Failure::new(FAILURE, "the watch ended")),
            Err(_) => return Err(Failure::new(FAILURE, format!("no job ran within {} s", patience.as_secs()))),
        }
    }
}

/// User and system time of this process.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
