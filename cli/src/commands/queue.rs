//! `ares queue`: what runs and what waits, with the reason of each.

use std::process::ExitCode;

use proto::v1;

use super::show::read_mode;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::Outcome;
use crate::output::{self, Row};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
START is the latest start of a job that waits, if what runs and what goes before it uses its whole time limit; ? where that
can't be told. ares why JOB says more.")]
pub struct Args {
    /// Ended jobs too
    #[arg(long, short = 'a')]
    all: bool,
    /// At most so many jobs
    #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    /// From the asked replica's memory, without a read index
    #[arg(long)]
    stale: bool,
}

/// Jobs asked for at once.
const PAGE: u32 = 500;

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    let jobs = runtime()?.block_on(async {
        let mut jobs = Vec::new();
        let mut page = String::new();
        loop {
            let left = args.limit.saturating_sub(jobs.len() as u32);
            let request = v1::ListJobsRequest {
                read: read_mode(args.stale),
                ended: args.all,
                limit: left.min(PAGE),
                page: page.clone(),
            };
            let reply = client.list_jobs(request).await?;
            jobs.extend(reply.jobs);
            page = reply.next_page;
            if page.is_empty() || jobs.len() as u32 >= args.limit {
                return Ok::<_, proto::Error>((jobs, reply.live));
            }
        }
    });
    let (jobs, live) = jobs?;
    let shown = jobs.len();
    let heads = ["JOB", "NAME", "USER", "PRIO", "STATE", "TRY", "GPUS", "AGE", "START", "NODES / REASON"];
    output::rows(global.output, &heads, jobs.iter().map(row).collect());
    if global.output == output::Format::Table && (shown as u64) < live {
        eprintln!("{shown} of {live} jobs shown; --limit shows more.");
    }
    Ok(ExitCode::SUCCESS)
}

/// The latest start of one that waits, as far as it is known.
fn starts_by(job: &v1::Job, now: i64) -> String {
    match (job.reason_code.is_empty(), job.latest_start_unix_ms) {
        (true, _) => "-".to_owned(),
        (false, 0) => "?".to_owned(),
        (false, latest) if latest - now < 1_000 => "now".to_owned(),
        (false, latest) => output::age(latest - now),
    }
}

fn row(job: &v1::Job) -> Row {
    let spec = job.spec.clone().unwrap_or_default();
    let shape = spec.shape.unwrap_or_default();
    let least = shape.nodes.max(1) * shape.ranks_per_node * shape.gpus_per_rank;
    let has: usize = job.parts.iter().map(|part| part.gpu_slots.len()).sum();
    let gpus = match shape.ranks_per_node * shape.most_gpus_per_rank {
        0 => least.to_string(),
        _ if has > 0 => has.to_string(),
        most => format!("{least}..{most}"),
    };
    let now = jiff::Timestamp::now().as_millisecond();
    let nodes = job.parts.iter().map(|part| part.node.as_str()).collect::<Vec<_>>().join(",");
    let state = if job.ending.is_empty() { job.state.clone() } else { format!("{} ({})", job.state, job.ending) };
    Row {
        name: job.id.to_string(),
        cells: vec![
            super::array::label(job),
            spec.name,
            job.user.clone(),
            spec.priority.to_string(),
            state,
            job.attempt.to_string(),
            gpus,
            output::age(now - job.submitted_unix_ms),
            starts_by(job, now),
            if nodes.is_empty() { job.reason.clone() } else { nodes },
        ],
        json: crate::json::job(job),
    }
}
