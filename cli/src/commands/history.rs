//! `ares history export`: a cluster's events in a file, for `ares verify --history`.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use proto::v1;
use serde_json::json;
use tokio_stream::StreamExt;

use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::{FAILURE, Failure, Outcome, USAGE};
use crate::json;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Write the events of the keyspace up to now into a file, for ares verify --history
    Export {
        /// Must not exist yet; whole or not there at all
        file: PathBuf,
        /// Begin with this revision; refused when it was compacted
        #[arg(long, default_value_t = 1, value_name = "REVISION", value_parser = clap::value_parser!(u64).range(1..))]
        from: u64,
    },
}

pub fn run(args: Args, global: Global) -> Outcome {
    let Verb::Export { file, from } = args.verb;
    if file.exists() {
        return Err(Failure::new(USAGE, format!("{} exists already", file.display())).advise("name another file"));
    }
    let client = client(&global)?;
    let events = runtime()?.block_on(export(&client, &file, from))?;
    eprintln!("{events} events in {}", file.display());
    Ok(ExitCode::SUCCESS)
}

/// Streams the events into a file aside, which gets its name when it is whole and durable.
async fn export(client: &proto::Client, file: &Path, from: u64) -> Result<u64, Failure> {
    let probe =
        v1::GetRequest { key: "/jobs/".to_owned(), prefix: true, keys_only: true, limit: 1, ..Default::default() };
    let to = client.get(probe).await?.revision;
    let status = client.status(v1::StatusRequest {}).await?;
    let mut aside = file.as_os_str().to_owned();
    aside.push(".unfinished");
    let aside = PathBuf::from(aside);
    let mut out = BufWriter::new(File::create(&aside)?);
    let header = evidence::Header {
        ares_history: evidence::FORMAT,
        cluster_id: status.cluster_id,
        generation: status.incarnation,
        from,
        to,
        from_the_beginning: from == 1 && status.incarnation == 0,
    };
    writeln!(out, "{}", json!(header))?;
    let written = write_events(client, &mut out, from, to).await;
    let finished = written.and_then(|events| {
        out.flush()?;
        out.get_ref().sync_all()?;
        fs::rename(&aside, file)?;
        Ok(events)
    });
    if finished.is_err() {
        // The error to tell is the first one.
        let _ = fs::remove_file(&aside);
    }
    finished
}

async fn write_events(client: &proto::Client, out: &mut impl Write, from: u64, to: u64) -> Result<u64, Failure> {
    let mut events = 0;
    if from > to {
        return Ok(events);
    }
    let request = v1::WatchRequest { key: "/".to_owned(), prefix: true, from_revision: from, keys_only: false };
    let mut stream = client.watch(request).await?;
    loop {
        match stream.next().await {
            Some(Ok(reply)) => {
                for event in reply.events.iter().filter(|_| reply.revision <= to) {
                    writeln!(out, "{}", json::key_event(event))?;
                    events += 1;
                }
                if reply.revision >= to {
                    return Ok(events);
                }
            }
            Some(Err(status)) => return Err(proto::Error::from(proto::Failure::from(status)).into()),
            None => return Err(Failure::new(FAILURE, "the replica ended the stream").advise("export again")),
        }
    }
}
