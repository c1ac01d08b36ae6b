//! `ares server`: a scheduler replica.

use std::path::PathBuf;
use std::process::ExitCode;

use raft_node::server::{self, Mode, Options};

use crate::Global;
use crate::connect::address;
use crate::exit::{CONFLICT, FAILURE, Failure, NOT_ALLOWED, Outcome};

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The first replica of a cluster is started once with --bootstrap, others with --join and the address of any replica; after
that the directory says where a replica belongs, and neither flag is needed. DIR/env holds what clients and agents need.")]
pub struct Args {
    /// Where this replica keeps its log, image and identity
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Found a new cluster; refused when the directory belongs to one
    #[arg(long, conflicts_with = "join")]
    bootstrap: bool,
    /// Join the cluster of these replicas, host:port
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT")]
    join: Vec<String>,
    /// The cluster's join token, from the first replica's DIR/env
    #[arg(long, env = "ARES_JOIN_TOKEN", hide_env_values = true)]
    join_token: Option<String>,
    /// Address for clients and agents; port 0 picks a free one [default: the last one, at first 127.0.0.1:7401]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Address for the other replicas [default: the last one, at first 127.0.0.1:7400]
    #[arg(long, value_name = "HOST:PORT")]
    peer_listen: Option<String>,
    /// Host under which others reach this replica [default: the host of --listen]
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// Listen beyond loopback without TLS
    #[arg(long)]
    insecure: bool,
    /// Make a snapshot after so many entries of log: lets tests purge a short log
    #[arg(long, hide = true, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    snapshot_entries: Option<u64>,
}

pub fn run(args: Args, _global: Global) -> Outcome {
    if !args.join.is_empty() && args.join_token.as_ref().is_none_or(|token| token.is_empty()) {
        return Err(Failure::new(NOT_ALLOWED, "joining a cluster takes its join token")
            .advise("source DIR/env of the first replica, or pass the token that stands in it as --join-token"));
    }
    for listen in args.listen.iter().chain(&args.peer_listen) {
        address(listen)?;
    }
    let options = Options {
        dir: args.dir,
        mode: match (args.bootstrap, args.join.is_empty()) {
            (true, _) => Mode::Bootstrap,
            (false, false) => Mode::Join(args.join.iter().map(|server| address(server)).collect::<Result<_, _>>()?),
            (false, true) => Mode::Resume,
        },
        join_token: args.join_token,
        listen: args.listen,
        peer_listen: args.peer_listen,
        advertise: args.advertise,
        insecure: args.insecure,
        snapshot_entries: args.snapshot_entries,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(api_threads()).enable_all().build()?;
    runtime.block_on(async {
        let running = server::start(options).await.map_err(failure)?;
        println!("{}", running.greeting());
        running.until_signal().await.map_err(failure)?;
        Ok(ExitCode::SUCCESS)
    })
}

/// Half of the cores are the APIs': Raft, the log and the image have threads of their own.
fn api_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 2).clamp(1, 8))
}

/// Why the replica does not run, with what to do.
pub fn failure(error: server::ServerError) -> Failure {
    use raft_node::identity::IdentityError;
    use raft_node::replica::StartError;
    use server::ServerError::Start;
    let code = match &error {
        // The call to join was refused, or nobody answered it: as with any other call.
        Start(StartError::Join { source, .. }) => Failure::from(source.clone()).code,
        Start(StartError::Identity(IdentityError::Io { .. } | IdentityError::Damaged { .. })) => FAILURE,
        Start(StartError::Identity(_)) => CONFLICT,
        _ => FAILURE,
    };
    let advice = error.advice();
    Failure::new(code, error.to_string()).advise(advice)
}
