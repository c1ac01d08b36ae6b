//! `ares run`: submit, stream, and exit as the job did.

use std::process::ExitCode;

use proto::{Client, v1};

use super::spec::JobArgs;
use super::wait;
use crate::Global;
use crate::connect::{client, runtime, user};
use crate::exit::{Failure, INTERRUPTED, Outcome};
use crate::logs;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    job: JobArgs,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let spec = args.job.cluster_spec(0)?;
    let client = client(&global)?;
    runtime()?.block_on(submit_and_stream(&client, spec))
}

/// Streams rank 0's output until the job has ended; Ctrl-C cancels the job.
pub async fn submit_and_stream(client: &Client, spec: v1::JobSpec) -> Outcome {
    let request = v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(spec), user: user() };
    let job_id = client.submit_job(request).await?.job_id;
    eprintln!("Job {job_id} submitted.");
    tokio::select! {
        ended = follow(client, job_id) => ended,
        interrupted = tokio::signal::ctrl_c() => {
            interrupted?;
            eprintln!("Interrupted: cancelling job {job_id}.");
            cancel(client, job_id).await?;
            Ok(ExitCode::from(INTERRUPTED))
        }
    }
}

async fn follow(client: &Client, job_id: u64) -> Outcome {
    logs::stream_job(client, job_id, logs::Which { rank: 0, follow: true, say_where: true, ..Default::default() }).await?;
    let job = wait::until_ended(client, job_id).await?;
    wait::tell(&job);
    Ok(ExitCode::from(wait::exit_code(&job)))
}

async fn cancel(client: &Client, job_id: u64) -> Result<(), Failure> {
    let request = v1::CancelJobRequest { request_id: proto::request_id(), job_id, user: user() };
    match client.cancel_job(request).await {
        Ok(_) => Ok(()),
        Err(error) if error.reason() == proto::reason::ALREADY_ENDED.name => Ok(()),
        Err(error) => Err(error.into()),
    }
}
