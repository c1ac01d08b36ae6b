//! `ares checkpoint`: a running job tells the cluster where its next attempt can go on from.

use std::process::ExitCode;

use proto::v1;

use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::Outcome;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Inside a job nothing else has to be named: its environment has ARES_FENCING_TOKEN and ARES_SERVER. The next attempt finds \
PATH in ARES_RESTORE_FROM. A job that is preempted loses only what it did since then, so the planner ends it rather than \
one that would lose more. An attempt whose token is over is refused with exit code 5, and nothing is changed.")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// A checkpoint is complete, and safe where it is
    Done {
        /// What the next attempt shall go on from; the cluster only hands it on
        #[arg(value_name = "PATH")]
        path: String,
        /// The job's own count of what it has done
        #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
        step: u64,
        /// The token of this attempt
        #[arg(long, env = "ARES_FENCING_TOKEN", hide_env_values = true, value_name = "N")]
        #[arg(value_parser = clap::value_parser!(u64).range(1..))]
        token: u64,
    },
}

pub fn run(args: Args, global: Global) -> Outcome {
    let Verb::Done { path, step, token } = args.verb;
    let request = v1::RecordCheckpointRequest { request_id: proto::request_id(), token, path, step };
    runtime()?.block_on(client(&global)?.record_checkpoint(request))?;
    Ok(ExitCode::SUCCESS)
}
