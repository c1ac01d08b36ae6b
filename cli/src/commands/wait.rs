//! `ares wait`: until jobs have ended, and what their end means as an exit code.

use std::process::ExitCode;
use std::time::Duration;

use proto::{Client, Error, v1};
use tokio_stream::StreamExt;

use super::array::JobRef;
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::{FAILURE, Failure, LOST, NOT_FOUND, OUT_OF_TIME, Outcome, TIMED_OUT};
use crate::{json, output};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Jobs to wait for; the exit code is the first one's that is not 0
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<JobRef>,
    /// Give up after this time, such as 10m
    #[arg(long, value_name = "TIME")]
    patience: Option<String>,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    let patience = args.patience.as_deref().map(|text| super::spec::duration_ms("--patience", text)).transpose()?;
    runtime()?.block_on(async {
        let all = wait_for_all(&client, &args.jobs, global.output);
        match patience {
            None => all.await,
            Some(ms) => {
                tokio::time::timeout(Duration::from_millis(ms), all).await.unwrap_or_else(|_| Err(late(&args.jobs, ms)))
            }
        }
    })
}

fn late(jobs: &[JobRef], ms: u64) -> Failure {
    let jobs = jobs.iter().map(JobRef::to_string).collect::<Vec<_>>().join(", ");
    Failure::new(TIMED_OUT, format!("not ended within {ms} ms: job {jobs}")).advise("ares queue says where they are")
}

async fn wait_for_all(client: &Client, jobs: &[JobRef], format: output::Format) -> Outcome {
    let mut code = 0;
    let mut ended = Vec::new();
    for job in jobs {
        let job = until_ended(client, job.resolve(client).await?).await?;
        match format {
            output::Format::Json => ended.push(json::job(&job)),
            output::Format::Jsonl => println!("{}", json::job(&job)),
            _ => tell(&job),
        }
        if code == 0 {
            code = exit_code(&job);
        }
    }
    if format == output::Format::Json {
        output::json(&serde_json::Value::Array(ended));
    }
    Ok(ExitCode::from(code))
}

/// Follows the job through leader changes until it has ended.
pub async fn until_ended(client: &Client, job_id: u64) -> Result<v1::Job, Failure> {
    loop {
        let mut stream =
            client.watch_job(v1::WatchJobRequest { job_id }).await.map_err(|error| known(error, job_id))?;
        while let Some(Ok(job)) = stream.next().await {
            if job.result.is_some() {
                return Ok(job);
            }
        }
        // The replica went away, or its stream was cut: another one goes on.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A refusal for an unknown id names the id.
pub fn known(error: Error, job_id: u64) -> Failure {
    if error.reason() == proto::reason::NOT_FOUND.name {
        return Failure::new(NOT_FOUND, format!("there is no job {job_id}")).advise("ares queue --all lists them");
    }
    error.into()
}

/// One line on stderr about how it ended.
pub fn tell(job: &v1::Job) {
    let Some(result) = &job.result else { return };
    let exit = match &result.exit {
        Some(exit) if result.has_exit && exit.signal > 0 => format!(", signal {}", exit.signal),
        Some(exit) if result.has_exit => format!(", exit code {}", exit.code),
        _ => String::new(),
    };
    if let Some(why) = super::show::why_ended(result) {
        eprintln!("Job {} {}: {why}.", job.id, result.outcome);
        return;
    }
    if let Some(progress) = &job.array {
        eprintln!("Array {} {}: {}.", job.id, result.outcome, super::array::summary(progress));
        return;
    }
    let text = job.attempts.last().map(|attempt| attempt.text.as_str()).filter(|text| !text.is_empty());
    let why = text.filter(|_| result.outcome != "SUCCEEDED").map(|text| format!(": {text}")).unwrap_or_default();
    eprintln!("Job {} {} (attempt {}, token {}{exit}){why}.", job.id, result.outcome, result.attempt, result.token);
}

/// The job's own code; 128 + signal; 75 when the infrastructure lost it.
pub fn exit_code(job: &v1::Job) -> u8 {
    let Some(result) = &job.result else { return FAILURE };
    match (result.outcome.as_str(), &result.exit) {
        ("SUCCEEDED", _) => 0,
        (_, Some(exit)) if result.has_exit && exit.signal > 0 => 128u8.saturating_add(exit.signal as u8),
        (_, Some(exit)) if result.has_exit && exit.code & 0xff != 0 => (exit.code & 0xff) as u8,
        ("TIMED_OUT", _) => OUT_OF_TIME,
        ("CANCELLED", _) => crate::exit::INTERRUPTED,
        _ if job.attempts.last().is_some_and(|attempt| attempt.verdict == "LOST") => LOST,
        _ => FAILURE,
    }
}
