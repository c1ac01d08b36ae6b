//! The verbs that change jobs by their ids: `ares cancel`, `hold`, `release` and `requeue`. Each job is tried; the exit
//! code is the first failure's.

use std::process::ExitCode;

use proto::v1;

use super::array::JobRef;
use super::wait::known;
use crate::Global;
use crate::connect::{client, runtime, user};
use crate::exit::{Failure, Outcome};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Each is tried; the exit code is the first failure's
    #[arg(required = true, value_name = "JOB")]
    jobs: Vec<JobRef>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    Cancel,
    Hold,
    Release,
    Requeue,
}

impl Verb {
    /// The name of the list of jobs in JSON.
    fn done(self) -> &'static str {
        match self {
            Verb::Cancel => "cancelled",
            Verb::Hold => "held",
            Verb::Release => "released",
            Verb::Requeue => "requeued",
        }
    }

    fn tell(self, job: JobRef) {
        let what = match self {
            Verb::Cancel => "is being cancelled",
            Verb::Hold => "does not start until it is released; what runs goes on",
            Verb::Release => "may start",
            Verb::Requeue => "goes back to its place in the queue",
        };
        eprintln!("Job {job} {what}.");
    }
}

pub fn run(args: Args, verb: Verb, global: Global) -> Outcome {
    let client = client(&global)?;
    runtime()?.block_on(async {
        let mut done = Vec::new();
        let mut code = ExitCode::SUCCESS;
        for job in args.jobs {
            match steer(&client, verb, job).await {
                Ok(job_id) => {
                    verb.tell(job);
                    done.push(job_id);
                }
                Err(failure) => {
                    let reported = failure.report();
                    code = if code == ExitCode::SUCCESS { reported } else { code };
                }
            }
        }
        match global.output {
            Format::Json | Format::Jsonl => output::json(&serde_json::json!({ verb.done(): done })),
            Format::Name => done.iter().for_each(|id| println!("{id}")),
            Format::Table => {}
        }
        Ok(code)
    })
}

/// The id of the job that it was.
async fn steer(client: &proto::Client, verb: Verb, job: JobRef) -> Result<u64, Failure> {
    let job_id = job.resolve(client).await?;
    let (request_id, user) = (proto::request_id(), user());
    let steer = v1::SteerJobRequest { request_id: request_id.clone(), job_id, user: user.clone() };
    let done = match verb {
        Verb::Cancel => client.cancel_job(v1::CancelJobRequest { request_id, job_id, user }).await.map(drop),
        Verb::Hold => client.hold_job(steer).await.map(drop),
        Verb::Release => client.release_job(steer).await.map(drop),
        Verb::Requeue => client.requeue_job(steer).await.map(drop),
    };
    done.map(|()| job_id).map_err(|error| known(error, job_id))
}
