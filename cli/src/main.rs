//! `ares`: the replica, the agent and the client in one binary. This file parses the command line and turns what a
//! command says into an exit code; each command is a file in `commands/`.

mod commands;
mod connect;
mod exit;
mod json;
mod logging;
mod logs;
mod output;
mod signals;

/// Half of a busy replica's cost was the C library's allocator; this one is made for many threads.
#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

use clap::Parser;
use std::process::ExitCode;

use commands::Command;

/// A self-contained, Raft-replicated scheduler for GPU clusters.
#[derive(Debug, Parser)]
#[command(name = "ares", bin_name = "ares", version, disable_help_subcommand = true, max_term_width = 100)]
#[command(after_help = "ares help exit-codes, environment or a COMMAND says more.")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options that every command understands.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Replicas to ask, host:port, comma-separated; any one is enough [default: 127.0.0.1:7401]
    #[arg(long, short = 's', env = "ARES_SERVER", value_delimiter = ',', global = true, value_name = "HOST:PORT")]
    #[arg(hide_env_values = true)]
    server: Vec<String>,
    /// Refuse to talk to another cluster than this one (32 hex digits)
    #[arg(long, env = "ARES_CLUSTER", global = true, value_name = "ID", default_value = "")]
    #[arg(hide_env_values = true, hide_default_value = true)]
    cluster_id: String,
    /// How long a call may take with all its retries
    #[arg(long, env = "ARES_TIMEOUT", global = true, default_value_t = 15, value_name = "SECONDS")]
    #[arg(hide_env_values = true, allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// table for people, json, jsonl (a document a line), or name (ids and keys alone); simulate also html
    #[arg(
        long = "output",
        short = 'o',
        env = "ARES_OUTPUT",
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    #[arg(id = "output", hide_env_values = true, hide_possible_values = true)]
    asked: output::Asked,
    /// `asked`, of a command that draws no pages.
    #[arg(skip)]
    output: output::Format,
    /// What to log to stderr: a tracing filter, such as info or raft_node=debug
    #[arg(long, env = "ARES_LOG", global = true, value_name = "FILTER", default_value = "")]
    #[arg(hide_env_values = true, hide_default_value = true)]
    log: String,
}

/// Chooses the bug that ARES_PLANTED names, in builds that can hold one.
#[cfg(feature = "planted")]
fn plant() {
    let named = std::env::var("ARES_PLANTED").unwrap_or_default();
    planted::choose(planted::Bug::ALL.iter().copied().find(|bug| bug.name() == named));
}

fn main() -> ExitCode {
    #[cfg(feature = "planted")]
    plant();
    // The shim is started once per rank and must be cheap: it goes before everything else.
    let args: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if args.get(1).is_some_and(|arg| arg == "shim") {
        return ExitCode::from(gpu_agent::shim::main(&args[2..]).clamp(0, 255) as u8);
    }
    let mut cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are no errors; the rest is exit code 2.
        Err(error) => {
            if forgot_dashes(&error, &args) {
                let _ = error.print();
                eprintln!("ares: the command of a job goes behind --, such as: ares run -- python3 train.py");
                return ExitCode::from(exit::USAGE);
            }
            error.exit()
        }
    };
    match cli.global.asked.format() {
        Some(format) => cli.global.output = format,
        None if cli.command.draws_pages() => {}
        None => return exit::Failure::usage("only ares simulate has -o html").advise(output::FORMATS).report(),
    }
    output::quiet_broken_pipe();
    logging::start(&cli.global.log, cli.command.is_daemon());
    match commands::run(cli.command, cli.global) {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

/// The likeliest slip: `ares run python3 train.py`.
fn forgot_dashes(error: &clap::Error, args: &[std::ffi::OsString]) -> bool {
    let takes_command = ["submit", "run", "dev"];
    error.kind() == clap::error::ErrorKind::UnknownArgument
        && args.iter().any(|arg| takes_command.iter().any(|verb| arg == verb))
        && !args.iter().any(|arg| arg == "--")
}
