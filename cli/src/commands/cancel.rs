//! `ares cancel`.

use std::process::ExitCode;

use proto::v1;

use super::wait::known;
use crate::Global;
use crate::connect::{client, runtime, user};
use crate::exit::Outcome;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<u64>,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    runtime()?.block_on(async {
        for job_id in args.jobs {
            let request = v1::CancelJobRequest { request_id: proto::request_id(), job_id, user: user() };
            client.cancel_job(request).await.map_err(|error| known(error, job_id))?;
            eprintln!("Job {job_id} is being cancelled.");
        }
        Ok(ExitCode::SUCCESS)
    })
}
