//! `ares bench`: closed-loop load, and the check that nothing acknowledged is missing afterwards.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use proto::{Client, Identity, Patience, v1};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::Global;
use crate::connect::{address, servers};
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
        /// Leave the jobs' check on every replica out
        #[arg(long)]
        no_check: bool,
    },
}

/// Clients that share one connection.
const CLIENTS_PER_CONNECTION: usize = 32;
/// A GPU type that no machine has: jobs wait for ever and cost the planner its look.
const NO_SUCH_GPU: &str = "bench-none";

pub fn run(args: Args, global: Global) -> Outcome {
    let Verb::Submit { servers: named, clients, seconds, bytes, no_check } = args.verb;
    let named = match named.is_empty() {
        true => servers(&global)?,
        false => named.iter().map(|server| address(server)).collect::<Result<_, _>>()?,
    };
    if clients == 0 || seconds == 0 {
        return Err(Failure::usage("--clients and --seconds are at least 1"));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let load = submit_load(&global, &named, clients, Duration::from_secs(seconds), bytes).await?;
        let mut report = load.report(clients);
        let mut missing = 0;
        if !no_check {
            let checked = check(&global, &named, &load.acknowledged).await?;
            missing = checked.iter().map(|(_, missing)| missing).sum();
            report["missing"] = checked.into_iter().map(|(server, missing)| (server, json!(missing))).collect::<Value>();
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

struct Load {
    acknowledged: Vec<u64>,
    latency_us: Histogram<u64>,
    errors: u64,
    first_error: Option<String>,
    took: Duration,
    cpu: Duration,
}

impl Load {
    fn report(&self, clients: usize) -> Value {
        let ms = |quantile: f64| self.latency_us.value_at_quantile(quantile) as f64 / 1_000.0;
        let seconds = self.took.as_secs_f64();
        json!({
            "clients": clients,
            "seconds": seconds,
            "acknowledged": self.acknowledged.len(),
            "ops_per_s": (self.acknowledged.len() as f64 / seconds).round(),
            "p50_ms": ms(0.5),
            "p99_ms": ms(0.99),
            "p999_ms": ms(0.999),
            "max_ms": self.latency_us.max() as f64 / 1_000.0,
            "errors": self.errors,
            "first_error": self.first_error,
            "cpu": (self.cpu.as_secs_f64() / seconds * 100.0).round() / 100.0,
        })
    }
}

fn print(report: &Value) {
    if let Some(map) = report.as_object() {
        output::table(&["FIGURE", "VALUE"], map.iter().map(|(name, value)| vec![name.clone(), value.to_string()]));
    }
}

async fn submit_load(
    global: &Global,
    servers: &[String],
    clients: usize,
    duration: Duration,
    bytes: usize,
) -> Result<Load, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let request = v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job(bytes)), user: "bench".to_owned() };
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
        workers.spawn(closed_loop(connections[at % connections.len()].clone(), request.clone(), stop.clone()));
    }
    tokio::time::sleep(duration).await;
    stop.store(true, Ordering::Relaxed);
    let mut load = Load {
        acknowledged: Vec::new(),
        latency_us: histogram(),
        errors: 0,
        first_error: None,
        took: began.elapsed(),
        cpu: Duration::ZERO,
    };
    while let Some(worker) = workers.join_next().await {
        let worker = worker.map_err(|error| Failure::new(FAILURE, format!("a client stopped: {error}")))?;
        load.acknowledged.extend(worker.acknowledged);
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
    acknowledged: Vec<u64>,
    latency_us: Histogram<u64>,
    errors: u64,
    first_error: Option<String>,
}

async fn closed_loop(client: Client, mut request: v1::SubmitJobRequest, stop: Arc<AtomicBool>) -> Worker {
    let mut worker = Worker { acknowledged: Vec::new(), latency_us: histogram(), errors: 0, first_error: None };
    while !stop.load(Ordering::Relaxed) {
        request.request_id = proto::request_id();
        let began = Instant::now();
        match client.submit_job(request.clone()).await {
            Ok(reply) => {
                worker.acknowledged.push(reply.job_id);
                worker.latency_us.saturating_record(began.elapsed().as_micros() as u64);
            }
            Err(error) => {
                worker.errors += 1;
                worker.first_error.get_or_insert(error.to_string());
            }
        }
    }
    worker
}

/// Acknowledged ids that a replica's own read does not have, by replica.
async fn check(global: &Global, servers: &[String], acknowledged: &[u64]) -> Result<Vec<(String, usize)>, Failure> {
    let mut checked = Vec::new();
    for server in servers {
        let client = fresh_client(global, std::slice::from_ref(server))?;
        let found = all_jobs(&client).await?;
        checked.push((server.clone(), acknowledged.iter().filter(|id| !found.contains(id)).count()));
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

/// User and system time of this process.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
