//! `ares`: the replica, the agent and the client in one binary. This file parses the command line and turns what a
//! command says into an exit code; each command is a file in `commands/`.

mod commands;
mod connect;
mod exit;
mod json;
mod logging;
mod logs;
mod output;

use clap::Parser;
use std::process::ExitCode;

use commands::Command;

/// A self-contained, Raft-replicated scheduler for GPU clusters.
#[derive(Debug, Parser)]
#[command(name = "ares", version, about, disable_help_subcommand = true, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options that every command understands.
#[derive(Debug, Clone, clap::Args)]
pub struct Global {
    /// Replicas to ask, host:port, comma-separated; any one is enough
    #[arg(long, short = 's', env = "ARES_SERVER", value_delimiter = ',', global = true, value_name = "HOST:PORT")]
    server: Vec<String>,
    /// Refuse to talk to another cluster than this one (hex id)
    #[arg(long, env = "ARES_CLUSTER", global = true, hide_env_values = true, default_value = "", value_name = "ID")]
    cluster_id: String,
    /// How long a call may take with all its retries, in seconds
    #[arg(long, env = "ARES_TIMEOUT", global = true, default_value_t = 15, value_name = "SECONDS")]
    timeout: u64,
    /// Output format
    #[arg(long, short = 'o', env = "ARES_OUTPUT", global = true, value_enum, default_value_t, value_name = "FORMAT")]
    output: output::Format,
    /// What to log to stderr (tracing filter, such as info or raft_node=debug)
    #[arg(long, env = "ARES_LOG", global = true, default_value = "", value_name = "FILTER")]
    log: String,
}

fn main() -> ExitCode {
    // The shim is started once per rank and must be cheap: it goes before everything else.
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|arg| arg == "shim") {
        return ExitCode::from(gpu_agent::shim::main(&args[2..]).clamp(0, 255) as u8);
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; the rest is exit code 2, which clap's own exit gives as well.
            error.exit()
        }
    };
    output::quiet_broken_pipe();
    logging::start(&cli.global.log, cli.command.is_daemon());
    match commands::run(cli.command, cli.global) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}
