//! `ares show`: everything about one job.

use std::process::ExitCode;

use proto::v1;

use super::array::{self, JobRef};
use super::wait::known;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::Outcome;
use crate::output::{self, Format};

/// A question about one job.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of a job
    #[arg(value_name = "JOB")]
    pub job: JobRef,
    /// From the asked replica's memory, without a read index
    #[arg(long)]
    pub stale: bool,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    let read = read_mode(args.stale);
    let job = runtime()?.block_on(async {
        let job_id = args.job.resolve(&client).await?;
        client.get_job(v1::GetJobRequest { job_id, read }).await.map_err(|error| known(error, job_id))
    })?;
    match global.output {
        Format::Json | Format::Jsonl => output::json(&crate::json::job(&job)),
        Format::Name => println!("{}", job.id),
        Format::Table => print(&job),
    }
    Ok(ExitCode::SUCCESS)
}

pub fn read_mode(stale: bool) -> i32 {
    if stale { v1::ReadMode::Stale as i32 } else { v1::ReadMode::Linearizable as i32 }
}

fn print(job: &v1::Job) {
    let spec = job.spec.clone().unwrap_or_default();
    let shape = spec.shape.clone().unwrap_or_default();
    let command = spec.body.map(|body| body.argv.join(" ")).unwrap_or_default();
    let state = if job.ending.is_empty() { job.state.clone() } else { format!("{}, ending {}", job.state, job.ending) };
    let id = if job.array_job_id == 0 { job.id.to_string() } else { format!("{}, job {}", array::label(job), job.id) };
    line("Job", &format!("{id} ({})", spec.name));
    line("State", &state);
    if let Some(progress) = &job.array {
        line("Array", &array::summary(progress));
    }
    line("Reason", &job.reason);
    line("Starts by", &output::time(job.latest_start_unix_ms));
    line("Command", &command);
    line("User", &job.user);
    line("Tenant", &spec.tenant);
    let class = if spec.priority_class.is_empty() { String::new() } else { format!(" ({})", spec.priority_class) };
    line("Priority", &format!("{}{class}", spec.priority));
    line("Shape", &wished(&shape));
    line("Topology", &shape.topology);
    line("Constraint", &shape.constraint);
    line("Only on", &shape.nodelist.join(", "));
    line("Not on", &shape.exclude.join(", "));
    let labels = sorted(&spec.labels).join(", ");
    line("Labels", &labels);
    if spec.limit_ms > 0 {
        line("Limit", &output::age(spec.limit_ms as i64));
    }
    line("Reserved", &spec.reservation);
    line("Begin", &output::time(spec.begin_unix_ms));
    line("Deadline", &output::time(spec.deadline_unix_ms));
    let after: Vec<String> = spec.after.iter().map(|after| format!("{}:{}", after.kind, after.job_id)).collect();
    line("After", &after.join(", "));
    line("Submitted", &output::time(job.submitted_unix_ms));
    line("Ended", &output::time(job.ended_unix_ms));
    if job.token != 0 {
        line("Attempt", &format!("{} with token {}", job.attempt, job.token));
    }
    for part in &job.parts {
        line("Placement", &format!("{} ({})", placement(part), part.state));
    }
    for why in &job.placement_why {
        line("  because", why);
    }
    if let Some(checkpoint) = &job.checkpoint {
        let step = if checkpoint.step == 0 { String::new() } else { format!(", step {}", checkpoint.step) };
        line("Checkpoint", &format!("{} by attempt {}{step}", checkpoint.path, checkpoint.attempt));
    }
    if job.made_room > 0 {
        line("Made room", &format!("{} {}", job.made_room, if job.made_room == 1 { "time" } else { "times" }));
    }
    for attempt in &job.attempts {
        line("Tried", &tried(attempt));
    }
    if let Some(result) = &job.result {
        line("Result", &ended(result));
    }
}

/// `2 nodes x 1 rank x 8 GPUs of type h100`, `16 GPUs on as few nodes as hold them x 1 rank`.
fn wished(shape: &v1::Shape) -> String {
    let ranks = counted(shape.ranks_per_node, "rank");
    let types = match shape.gpu_types.as_slice() {
        [] => String::new(),
        types => format!(" of type {}", types.join(" or ")),
    };
    if shape.nodes == 0 {
        let least = shape.ranks_per_node * shape.gpus_per_rank;
        let gpus = match shape.ranks_per_node * shape.most_gpus_per_rank {
            0 => counted(least, "GPU"),
            most => format!("{least} to {most} GPUs"),
        };
        return format!("{gpus}{types} on as few nodes as hold them x {ranks}");
    }
    format!("{} x {ranks} x {}{types}", counted(shape.nodes, "node"), counted(shape.gpus_per_rank, "GPU"))
}

/// `SUCCEEDED by attempt 1 with token 7`, `SKIPPED: job 3 did not end as it needs`.
fn ended(result: &v1::Result) -> String {
    match (why_ended(result), result.token) {
        (Some(why), _) => format!("{}: {why}", result.outcome),
        (None, 0) => result.outcome.clone(),
        (None, token) => format!("{} by attempt {} with token {token}", result.outcome, result.attempt),
    }
}

/// What ended a job before it could start.
pub fn why_ended(result: &v1::Result) -> Option<String> {
    match result.cause.as_str() {
        "DEADLINE" => Some("it could not keep its deadline any more".to_owned()),
        "PARENT" => Some(format!("job {} did not end as it needs", result.parent_id)),
        _ => None,
    }
}

/// NAME=VALUE in the names' order.
fn sorted(labels: &std::collections::HashMap<String, String>) -> Vec<String> {
    let mut pairs: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    pairs.sort_unstable();
    pairs
}

/// `1 core`, `2 cores`.
pub fn counted(count: u32, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn line(name: &str, value: &str) {
    if !value.is_empty() {
        println!("{name:<10} {value}");
    }
}

/// `n1: ranks 0-1, GPUs 0,1, 4 cores, 8192 MiB`.
pub fn placement(part: &v1::PlacedPart) -> String {
    let ranks = match part.ranks {
        1 => format!("rank {}", part.first_rank),
        n => format!("ranks {}-{}", part.first_rank, part.first_rank + n - 1),
    };
    let gpus = part.gpu_slots.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let gpus = if gpus.is_empty() { String::new() } else { format!(", GPUs {gpus}") };
    format!("{}: {ranks}{gpus}, {}, {} MiB", part.node, counted(part.cores, "core"), part.mem_mib)
}

fn tried(attempt: &v1::Attempt) -> String {
    let exit = match &attempt.exit {
        Some(exit) if attempt.has_exit && exit.signal > 0 => format!(", signal {}", exit.signal),
        Some(exit) if attempt.has_exit => format!(", exit code {}", exit.code),
        _ => String::new(),
    };
    let text = if attempt.text.is_empty() { String::new() } else { format!(": {}", attempt.text) };
    format!(
        "attempt {} (token {}) on {}: {}{exit}{text}",
        attempt.attempt,
        attempt.token,
        attempt.nodes.join(", "),
        attempt.verdict
    )
}
