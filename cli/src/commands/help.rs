//! `ares help`: the topics that belong to no single command, and each command's own help.

use std::process::ExitCode;

use clap::CommandFactory;

use crate::Cli;
use crate::exit::{Failure, Outcome};

/// What every exit code means.
pub const EXIT_CODES: &str = "\
Exit codes of ares:

  0    done
  1    failure
  2    usage: a bad flag, value or request; nothing was changed
  3    not found: no such job, node, key, session or file
  4    not allowed: the join token, or the owner of a job
  5    conflict: with what is there (another cluster, an ended job, a lost quorum, a compacted revision)
  6    unavailable: no replica answers, or there is no quorum, or the cluster is over a bound
  7    timed out: no answer in time; the call may have taken effect
  130  interrupted by Ctrl-C; run and dev -- cancel their job first
  143  ended by SIGTERM, in the same way

run, wait and dev -- exit as the job did:

  0 to 255  the job's own code; of wait the first one that is not 0
  128 + N   a signal N ended the job
  124       its time limit ended it, and it left no code of its own
  130       it was cancelled, and left no code of its own
  75        the infrastructure lost it for good
  1         it could not be launched

lock run exits as its command did; lock validate exits with 5 when the token is not the holder's.
";

/// Every variable that is read or set.
pub const ENVIRONMENT: &str = "\
Variables that ares reads; a flag goes before them:

  ARES_SERVER      replicas to ask, host:port, comma-separated      --server
  ARES_CLUSTER     talk to no other cluster than this one           --cluster-id
  ARES_JOIN_TOKEN  the cluster's join token, for server and agent   --join-token
  ARES_TIMEOUT     seconds that a call may take                     --timeout
  ARES_OUTPUT      table, json, jsonl or name                       --output
  ARES_LOG         tracing filter; LOG_LEVEL where it is unset      --log
  WORKER_ID        name of an agent's machine                       --name
  ARES_MOCK_GPU    true: a mock of 4 x V100 in place of real GPUs
  NO_COLOR         no colour in logs
  USER, LOGNAME    the name that a job shows as its user's

DIR/env of a replica holds the first three, to be sourced by a shell.

Variables that a job finds:

  RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT
                        as torchrun sets them
  CUDA_VISIBLE_DEVICES  GPUs by UUID: where each rank has one, all of the machine's ranks, and the LOCAL_RANK-th is its
                        own, as under torchrun; else, or with --env ARES_GPU_BIND=rank, its own alone, from device 0 on
                        (ARES_GPU_BIND=all: always all). CUDA_DEVICE_ORDER is PCI_BUS_ID
  ARES_ARRAY_JOB_ID, ARES_TASK_INDEX
                        of a task of an array: the array, and which task of it this is
  ARES_JOB_ID, ARES_ATTEMPT, ARES_FENCING_TOKEN
                        which job and attempt this is, and the token to pass along with each write
  ARES_NODE, ARES_NODES, ARES_GPUS, ARES_LIMIT_MS, ARES_KILL_GRACE_MS
                        the machine, how many machines and GPUs the attempt has, and its bounds (0: none)
  ARES_RESTORE_FROM     the newest checkpoint of an earlier attempt, if one was recorded: ares checkpoint done
  ARES_SERVER, ARES_CLUSTER
                        where the machine's agent finds the cluster, unless the job has its own
";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// exit-codes, environment, or a command
    #[arg(value_name = "TOPIC")]
    topic: Vec<String>,
}

pub fn run(args: Args) -> Outcome {
    match args.topic.first().map(String::as_str) {
        Some("exit-codes") => print!("{EXIT_CODES}"),
        Some("environment") => print!("{ENVIRONMENT}"),
        _ => print!("{}", of_command(&args.topic)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn of_command(path: &[String]) -> Result<clap::builder::StyledStr, Failure> {
    let mut command = Cli::command();
    command.build();
    for name in path {
        command = command.find_subcommand(name).cloned().ok_or_else(|| {
            Failure::usage(format!("there is no help for {:?}", path.join(" ")))
                .advise("topics are exit-codes, environment and every command: ares help lists them")
        })?;
    }
    Ok(command.render_help())
}
