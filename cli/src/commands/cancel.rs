//! `ares cancel`.

use std::process::ExitCode;

use proto::v1;

use super::wait::known;
use crate::Global;
use crate::connect::{client, runtime, user};
use crate::exit::Outcome;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Each is tried; the exit code is the first failure's
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<u64>,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    runtime()?.block_on(async {
        let mut cancelled = Vec::new();
        let mut code = ExitCode::SUCCESS;
        for job_id in args.jobs {
            let request = v1::CancelJobRequest { request_id: proto::request_id(), job_id, user: user() };
            match client.cancel_job(request).await {
                Ok(_) => {
                    eprintln!("Job {job_id} is being cancelled.");
                    cancelled.push(job_id);
                }
                Err(error) => {
                    let reported = known(error, job_id).report();
                    code = if code == ExitCode::SUCCESS { reported } else { code };
                }
            }
        }
        match global.output {
            Format::Json | Format::Jsonl => output::json(&serde_json::json!({ "cancelled": cancelled })),
            Format::Name => cancelled.iter().for_each(|id| println!("{id}")),
            Format::Table => {}
        }
        Ok(code)
    })
}
