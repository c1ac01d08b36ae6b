//! `ares version`.

use std::process::ExitCode;

use proto::v1;
use serde_json::json;

use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::Outcome;
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Ask a replica for its version too
    #[arg(long)]
    replica: bool,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let ours = env!("CARGO_PKG_VERSION");
    let theirs = match args.replica {
        true => Some(runtime()?.block_on(client(&global)?.status(v1::StatusRequest {}))?.version),
        false => None,
    };
    match (global.output, theirs) {
        (Format::Json | Format::Jsonl, theirs) => output::json(&json!({ "client": ours, "replica": theirs })),
        (_, None) => println!("ares {ours}"),
        (_, Some(theirs)) => println!("ares {ours}, replica {theirs}"),
    }
    Ok(ExitCode::SUCCESS)
}
