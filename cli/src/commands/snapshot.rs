//! `ares cluster snapshot`: copies of the whole cluster. Save asks a running one; inspect and restore work on files alone.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use proto::v1;
use raft_node::backup::{self, BackupError, Restore};
use raft_node::replica::Peer;
use serde_json::{Value, json};

use crate::Global;
use crate::connect::{address, client_with_token, runtime};
use crate::exit::{CONFLICT, FAILURE, Failure, NOT_ALLOWED, Outcome};
use crate::output::{self, Format};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Take a copy of the running cluster: all that was acknowledged before
    Save {
        /// A directory that does not exist yet; whole or not there at all. It holds the environments of jobs: guard it
        path: PathBuf,
        /// The cluster's join token, from a replica's DIR/env
        #[arg(long, env = "ARES_JOIN_TOKEN", hide_env_values = true, default_value = "", hide_default_value = true)]
        join_token: String,
    },
    /// What a copy holds, once every checksum, the digest and all invariants are found right
    Inspect { path: PathBuf },
    /// Make of a copy the first replica of a new group, without a running cluster
    #[command(after_help = "\
The old replicas must never run again. The new group keeps the cluster's id and is a new generation of it: no token of the old
life is minted again. Jobs that had not ended wait for the span of their lease, in which what the old life started dies; agents
register anew, and what they run that the copy does not know is killed and starts again under a higher token.")]
    Restore {
        path: PathBuf,
        /// The new replica's directory: new or empty
        #[arg(long, value_name = "DIR")]
        dir: PathBuf,
        /// Where it will listen for clients and agents
        #[arg(long, default_value = "127.0.0.1:7401", value_name = "HOST:PORT")]
        listen: String,
        /// Where it will listen for other replicas
        #[arg(long, default_value = "127.0.0.1:7400", value_name = "HOST:PORT")]
        peer_listen: String,
        /// Above the copy's generation [default: minutes since 2026-01-01]
        #[arg(long, value_name = "N")]
        generation: Option<u32>,
    },
}

pub fn run(args: Args, global: &Global) -> Outcome {
    match args.verb {
        Verb::Save { path, join_token } => save(&path, &join_token, global),
        Verb::Inspect { path } => inspect(&path, global),
        Verb::Restore { path, dir, listen, peer_listen, generation } => {
            let peer = Peer { peer_addr: fixed(&peer_listen)?, api_addr: fixed(&listen)? };
            restore(&Restore { backup: &path, dir: &dir, peer, generation }, global)
        }
    }
}

/// The group's membership holds the addresses, so a port that is only known later is none.
fn fixed(listen: &str) -> Result<String, Failure> {
    let listen = address(listen)?;
    match listen.ends_with(":0") {
        true => Err(Failure::usage(format!("{listen:?} names no port")).advise("name the port that others will find")),
        false => Ok(listen),
    }
}

fn save(path: &Path, join_token: &str, global: &Global) -> Outcome {
    if join_token.is_empty() {
        return Err(Failure::new(NOT_ALLOWED, "a copy of the cluster takes its join token")
            .advise("source DIR/env of a replica, or pass the token that stands in it as --join-token"));
    }
    let client = client_with_token(global, join_token)?;
    let saved = runtime()?.block_on(async {
        let parts = client.save_snapshot(v1::SaveSnapshotRequest {}).await?;
        backup::receive(path, parts).await.map_err(failure)
    })?;
    match global.output {
        Format::Json | Format::Jsonl => {
            output::json(&json!({ "path": path, "id": saved.id.to_string(), "bytes": saved.size() }))
        }
        Format::Name => println!("{}", path.display()),
        Format::Table => println!("{}: entry {}, {} bytes", path.display(), saved.id.0.index, saved.size()),
    }
    Ok(ExitCode::SUCCESS)
}

fn inspect(path: &Path, global: &Global) -> Outcome {
    let facts = backup::inspect(path).map_err(failure)?;
    let mut report = json!(facts);
    if let Some(map) = report.as_object_mut() {
        map.remove("wall_ms");
        map.insert("time".to_owned(), json!(output::time(facts.wall_ms)));
    }
    print(&report, global.output);
    Ok(ExitCode::SUCCESS)
}

fn restore(wanted: &Restore, global: &Global) -> Outcome {
    let restored = backup::restore(wanted).map_err(failure)?;
    let report = json!({
        "cluster_id": restored.identity.cluster.to_string(),
        "replica_id": restored.identity.replica.to_string(),
        "generation": restored.generation,
        "held_jobs": restored.held_jobs,
        "nodes": restored.nodes,
        "dir": wanted.dir,
    });
    print(&report, global.output);
    if matches!(global.output, Format::Table) {
        println!("Start it with: ares server --dir {}", wanted.dir.display());
        println!(
            "Pass --join-token to keep the old join token; without it a new one is drawn, in DIR/env. Others join it with --join."
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn print(report: &Value, format: Format) {
    match format {
        Format::Json | Format::Jsonl => output::json(report),
        Format::Name => println!("{}", report["cluster_id"].as_str().unwrap_or_default()),
        Format::Table => {
            let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let rows = report.as_object().into_iter().flatten();
            output::table(&["FACT", "VALUE"], rows.map(|(name, value)| vec![name.clone(), text(value)]));
        }
    }
}

fn failure(error: BackupError) -> Failure {
    let code = match &error {
        BackupError::Exists(_) | BackupError::InUse { .. } | BackupError::Identity(_) | BackupError::Refused(_) => {
            CONFLICT
        }
        _ => FAILURE,
    };
    let advice = match &error {
        BackupError::Storage(_) | BackupError::Invalid(_) => "use another copy; this one is left as it is",
        BackupError::Broken(_) => "save again, maybe from another replica; nothing was left at the path",
        _ => "",
    };
    Failure::new(code, error.to_string()).advise(advice)
}
