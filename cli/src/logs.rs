//! `ares logs`, and the streaming of `run` and `dev --`: output comes straight from the agent that has it, never through
//! Raft.

use std::process::ExitCode;
use std::time::Duration;

use proto::v1::agent_logs_client::AgentLogsClient;
use proto::{Client, v1};
use tokio_stream::StreamExt;
use tonic::Code;

use crate::Global;
use crate::commands::{JobRef, wait_known as known};
use crate::connect::{client, runtime};
use crate::exit::{Failure, NOT_FOUND, Outcome, UNAVAILABLE};
use crate::output;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Id of a job that runs or ended
    #[arg(value_name = "JOB")]
    job: JobRef,
    /// Stay until the job has ended
    #[arg(long, short = 'f')]
    follow: bool,
    /// Which process of a gang
    #[arg(long, short = 'r', default_value_t = 0, value_name = "N")]
    rank: u32,
    /// Output of this attempt [default: the newest]
    #[arg(long, value_name = "N")]
    attempt: Option<u32>,
    /// Only the last so many bytes
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "BYTES")]
    tail: u64,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    let which =
        Which { rank: args.rank, attempt: args.attempt, follow: args.follow, tail_bytes: args.tail, say_where: false };
    runtime()?.block_on(async { stream_job(&client, args.job.resolve(&client).await?, which).await })?;
    Ok(ExitCode::SUCCESS)
}

/// Which output of a job.
#[derive(Clone, Copy, Debug, Default)]
pub struct Which {
    pub rank: u32,
    pub attempt: Option<u32>,
    pub follow: bool,
    pub tail_bytes: u64,
    /// Tell on stderr where each attempt runs.
    pub say_where: bool,
}

/// How long an agent that does not answer is asked again, once nothing but its answer is missing.
const AGENT_PATIENCE: Duration = Duration::from_secs(10);
/// After so long without an answer a follower looks whether the attempt is still alive.
const AGENT_DOUBT: Duration = Duration::from_secs(1);

/// Writes the output to stdout; with `follow` until the job has ended, over all its attempts from now on.
pub async fn stream_job(client: &Client, job_id: u64, which: Which) -> Result<(), Failure> {
    let mut last_token = 0;
    let mut last_reason = String::new();
    loop {
        let mut updates =
            client.watch_job(v1::WatchJobRequest { job_id }).await.map_err(|error| known(error, job_id))?;
        while let Some(Ok(job)) = updates.next().await {
            check_rank(&job, which.rank)?;
            let waits = !job.reason.is_empty() && !job.reason.starts_with("fits");
            if which.say_where && waits && job.reason != last_reason {
                eprintln!("Job {job_id} waits: {}.", job.reason.trim_end_matches('.'));
                last_reason = job.reason.clone();
            }
            let ended = job.result.is_some();
            if let Some(source) = source(client, &job, which).await?
                && source.token != last_token
            {
                last_token = source.token;
                if which.say_where {
                    job.parts.iter().for_each(|part| eprintln!("  {}", crate::commands::placement(part)));
                }
                copy(client, job_id, source, which, ended).await?;
            } else if !which.follow && last_token == 0 {
                return Err(Failure::new(NOT_FOUND, format!("job {job_id} has no output: it is {}", job.state))
                    .advise(if ended { "it never started" } else { "-f waits for it" }));
            }
            if ended || !which.follow {
                return Ok(());
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// One attempt's output of one rank.
struct Source {
    token: u64,
    node: String,
    address: String,
}

fn check_rank(job: &v1::Job, rank: u32) -> Result<(), Failure> {
    let shape = job.spec.as_ref().and_then(|spec| spec.shape.clone()).unwrap_or_default();
    // Where the cluster chose the machines there are as many as an attempt had.
    let held = job.attempts.iter().map(|attempt| attempt.nodes.len()).chain([job.parts.len()]).max().unwrap_or(0);
    let nodes = if shape.nodes == 0 { held.max(1) as u32 } else { shape.nodes };
    let ranks = nodes * shape.ranks_per_node.max(1);
    if rank < ranks {
        return Ok(());
    }
    Err(Failure::new(NOT_FOUND, format!("job {} has {ranks} rank(s), there is no rank {rank}", job.id)))
}

/// Where the output is; `None` while nothing was started.
async fn source(client: &Client, job: &v1::Job, which: Which) -> Result<Option<Source>, Failure> {
    let live = which.attempt.is_none_or(|attempt| attempt == job.attempt) && job.token != 0;
    if live
        && let Some(part) =
            job.parts.iter().find(|part| (part.first_rank..part.first_rank + part.ranks).contains(&which.rank))
    {
        return Ok(Some(Source { token: job.token, node: part.node.clone(), address: part.address.clone() }));
    }
    let past = match which.attempt {
        Some(number) => job.attempts.iter().find(|attempt| attempt.attempt == number),
        None => job.attempts.last().filter(|_| job.result.is_some() || !which.follow),
    };
    let Some(past) = past else {
        return match which.attempt {
            Some(number) if number != job.attempt => {
                Err(Failure::new(NOT_FOUND, format!("attempt {number} of job {} is not kept", job.id)))
            }
            _ => Ok(None),
        };
    };
    let shape = job.spec.as_ref().and_then(|spec| spec.shape.clone()).unwrap_or_default();
    let at = (which.rank / shape.ranks_per_node.max(1)) as usize;
    let Some(node) = past.nodes.get(at) else { return Ok(None) };
    let nodes = client.list_nodes(v1::ListNodesRequest::default()).await?.nodes;
    let address = nodes.into_iter().find(|candidate| candidate.name == *node).map(|node| node.address);
    let address = address
        .ok_or_else(|| Failure::new(NOT_FOUND, format!("node {node}, which has the output, is no longer known")))?;
    Ok(Some(Source { token: past.token, node: node.clone(), address }))
}

/// Copies one attempt's output, going on at the same byte when the agent restarts. A follower waits for a silent agent
/// as long as the attempt is alive, and leaves the attempt for the next one.
async fn copy(client: &Client, job_id: u64, mut source: Source, which: Which, ended: bool) -> Result<(), Failure> {
    let (mut ended, mut said) = (ended, false);
    let mut offset = 0;
    let mut tail_bytes = which.tail_bytes;
    let mut unheard_since = tokio::time::Instant::now();
    loop {
        let request = v1::ReadLogRequest {
            token: source.token,
            rank: which.rank,
            offset,
            follow: which.follow && !ended,
            tail_bytes,
        };
        let failure = match read(client, &source, request, &mut offset).await {
            Ok(true) => return Ok(()),
            Ok(false) if !which.follow || ended => return Ok(()),
            Ok(false) => None,
            Err(status) => Some(status),
        };
        if offset > 0 {
            tail_bytes = 0;
        }
        if failure.is_none() {
            unheard_since = tokio::time::Instant::now();
        }
        let unheard = unheard_since.elapsed();
        if unheard > AGENT_DOUBT && which.follow && !ended {
            let job = client.get_job(v1::GetJobRequest { job_id, ..Default::default() }).await;
            let job = job.map_err(|error| known(error, job_id))?;
            if job.result.is_some() {
                ended = true;
                unheard_since = tokio::time::Instant::now();
            } else if job.token != source.token {
                eprintln!("The rest of this attempt's output is missing: {}.", gone(&source, failure).message);
                return Ok(());
            } else if !said {
                said = true;
                eprintln!("The agent of {} does not answer; its output follows when it is back.", source.node);
            }
            // An agent that was started again may listen elsewhere.
            if let Some(now) = self::source(client, &job, which).await?.filter(|now| now.token == source.token) {
                source = now;
            }
            tokio::time::sleep(Duration::from_millis(400)).await;
        } else if unheard > AGENT_PATIENCE {
            return Err(gone(&source, failure));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Reads one stream to its end; true when the rank has ended and all was read.
async fn read(
    client: &Client,
    source: &Source,
    request: v1::ReadLogRequest,
    offset: &mut u64,
) -> Result<bool, tonic::Status> {
    let transport =
        client.transport(&source.address).map_err(|error| tonic::Status::invalid_argument(error.to_string()))?;
    let mut chunks = AgentLogsClient::new(transport).read_log(request).await?.into_inner();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        output::raw(&chunk.data);
        *offset = chunk.offset + chunk.data.len() as u64;
        if chunk.end {
            return Ok(true);
        }
    }
    Ok(false)
}

fn gone(source: &Source, status: Option<tonic::Status>) -> Failure {
    let detail = status.as_ref().map(tonic::Status::message).unwrap_or_default();
    match status.as_ref().map(tonic::Status::code) {
        Some(Code::NotFound) => Failure::new(NOT_FOUND, format!("node {} has no such output: {detail}", source.node))
            .advise("an agent keeps the output of its last attempts only"),
        _ => Failure::new(
            UNAVAILABLE,
            format!("the agent of node {} ({}) does not answer: {detail}", source.node, source.address),
        )
        .advise("look at it with ares nodes; the output is in its directory"),
    }
}
