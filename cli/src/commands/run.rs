//! `ares run`: submit, stream, and exit as the job did.

use std::process::ExitCode;

use proto::{Client, v1};

use super::spec::{JobArgs, refused};
use super::wait;
use crate::Global;
use crate::connect::{client, runtime, user};
use crate::exit::{Failure, Outcome};
use crate::logs;
use crate::signals::Signals;

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

/// Streams rank 0's output until the job has ended. Ctrl-C and SIGTERM cancel the job and wait for its end; the second
/// one leaves at once.
pub async fn submit_and_stream(client: &Client, spec: v1::JobSpec) -> Outcome {
    if spec.array.is_some() {
        return Err(Failure::usage("--array: only the output of one job can be streamed")
            .advise("ares submit it; then ares wait for it, and ares logs of a task"));
    }
    let mut signals = Signals::listen()?;
    let request = v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(spec), user: user() };
    let job_id = client.submit_job(request).await.map_err(refused)?.job_id;
    eprintln!("Job {job_id} submitted.");
    let following = follow(client, job_id);
    tokio::pin!(following);
    let code = tokio::select! {
        ended = &mut following => return ended,
        code = signals.next() => code,
    };
    eprintln!("Interrupted: cancelling job {job_id}; once more leaves at once.");
    cancel(client, job_id, user()).await?;
    tokio::select! {
        ended = following => {
            ended?;
        }
        _ = signals.next() => {}
    }
    Ok(ExitCode::from(code))
}

/// What the job printed is no condition of how it ended.
async fn follow(client: &Client, job_id: u64) -> Outcome {
    let which = logs::Which { follow: true, say_where: true, ..Default::default() };
    let streamed = logs::stream_job(client, job_id, which).await;
    let job = wait::until_ended(client, job_id).await?;
    if let Err(failure) = streamed {
        eprintln!("The output of job {job_id} is incomplete: {}.", failure.message);
    }
    wait::tell(&job);
    Ok(ExitCode::from(wait::exit_code(&job)))
}

/// One that ended by itself meanwhile is as good.
pub async fn cancel(client: &Client, job_id: u64, user: String) -> Result<(), Failure> {
    let request = v1::CancelJobRequest { request_id: proto::request_id(), job_id, user };
    match client.cancel_job(request).await {
        Ok(_) => Ok(()),
        Err(error) if error.reason() == proto::reason::ALREADY_ENDED.name => Ok(()),
        Err(error) => Err(error.into()),
    }
}
