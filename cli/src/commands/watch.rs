//! `ares watch`: changes of the keyspace as they happen, without a gap, through replica changes.

use std::process::ExitCode;
use std::time::Duration;

use proto::v1;
use tokio_stream::StreamExt;

use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::{Failure, Outcome, UNAVAILABLE};
use crate::output::Format;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A key, such as /state/1: ares help get lists them
    key: String,
    /// All keys that begin with KEY
    #[arg(long)]
    prefix: bool,
    /// Without the values
    #[arg(long)]
    keys_only: bool,
    /// Begin with this revision; refused when it was compacted [default: from now on]
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "REVISION")]
    from: u64,
    /// Stop after so many changes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    runtime()?.block_on(async {
        let mut from = args.from;
        let mut left = args.count.unwrap_or(u64::MAX);
        loop {
            let request = v1::WatchRequest {
                key: args.key.clone(),
                prefix: args.prefix,
                from_revision: from,
                keys_only: args.keys_only,
            };
            let mut stream = client.watch(request).await.map_err(|error| resumable(error.into(), from))?;
            loop {
                match stream.next().await {
                    Some(Ok(reply)) => {
                        for event in &reply.events {
                            print(event, args.keys_only, global.output);
                            left -= 1;
                            if left == 0 {
                                return Ok(ExitCode::SUCCESS);
                            }
                        }
                        from = reply.revision + 1;
                    }
                    // Compacted and the like are answers; a broken stream is resumed at another replica.
                    Some(Err(status)) => match proto::Error::from(proto::Failure::from(status)) {
                        refused @ proto::Error::Refused { .. } if is_final(&refused) => {
                            return Err(resumable(refused.into(), from));
                        }
                        _ => break,
                    },
                    None => break,
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
}

/// Where nothing answers any more, the way to go on later.
fn resumable(failure: Failure, from: u64) -> Failure {
    if failure.code == UNAVAILABLE && from > 0 {
        let advice = format!("{}; --from {from} goes on without a gap", failure.advice);
        return failure.advise(advice);
    }
    failure
}

fn is_final(error: &proto::Error) -> bool {
    matches!(error, proto::Error::Refused { code, .. } if *code != tonic::Code::Unavailable)
        && error.reason() != proto::reason::REVISION_NOT_LOCAL.name
}

fn print(event: &v1::KeyEvent, keys_only: bool, format: Format) {
    match format {
        Format::Json | Format::Jsonl => println!("{}", crate::json::key_event(event)),
        Format::Name => println!("{}", event.key),
        Format::Table => {
            let kind = if event.deleted { "DELETE" } else { "PUT" };
            println!("{} {kind} {}", event.mod_revision, event.key);
            if !keys_only && !event.deleted {
                println!("{}", event.value);
            }
        }
    }
}
