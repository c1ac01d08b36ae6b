//! `ares agent`: the worker agent of a GPU machine.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::Global;
use crate::connect::{cluster_id, servers};
use crate::exit::{CONFLICT, FAILURE, Failure, Outcome, USAGE};
use crate::signals::Signals;
use gpu_agent::Left;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
GPUS:
  Real NVIDIA GPUs are found by themselves. --gpus sim:NAME simulates a machine: hgx-h100, dgx1-v100, a100-bridged,
  rtx4090x8; --gpus sim:./matrix.txt reads an nvidia-smi topo -m matrix. ARES_MOCK_GPU=true is 4 x V100.")]
pub struct Args {
    /// Where the agent keeps its identity, fence file and the output of jobs
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Name of this machine [default: the host name]
    #[arg(long, env = "WORKER_ID")]
    name: Option<String>,
    /// Simulate GPUs: sim:NAME or sim:FILE
    #[arg(long, value_name = "sim:NAME")]
    gpus: Option<String>,
    /// The cluster's join token
    #[arg(long, env = "ARES_JOIN_TOKEN", hide_env_values = true, default_value = "")]
    join_token: String,
    /// Address of the log service; port 0 picks a free one
    #[arg(long, default_value = "127.0.0.1:0", value_name = "HOST:PORT")]
    listen: String,
    /// Host under which clients and other machines reach this one [default: the host of --listen]
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// Labels of the machine, NAME=VALUE; `block`, `rack` and `switch` say where it stands in the network, and gangs are kept together
    /// by them
    #[arg(long = "label", value_name = "NAME=VALUE")]
    labels: Vec<String>,
    /// Run jobs as this user (the agent must be root)
    #[arg(long, value_name = "USER")]
    run_as: Option<String>,
    /// Let jobs run as root when the agent is root and no --run-as is given
    #[arg(long)]
    allow_root_jobs: bool,
    /// Listen beyond loopback without TLS
    #[arg(long)]
    insecure: bool,
}

pub fn run(args: Args, global: Global) -> Outcome {
    let labels = args
        .labels
        .iter()
        .map(|label| match label.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(Failure::usage(format!("--label {label:?} has no value; write NAME=VALUE"))),
        })
        .collect::<Result<_, _>>()?;
    let listen = args.listen.parse().map_err(|_| {
        Failure::usage(format!("--listen {:?} is no socket address", args.listen)).advise("write such as 127.0.0.1:0")
    })?;
    let options = gpu_agent::Options {
        name: args.name,
        listen,
        advertise: args.advertise,
        gpus: args.gpus,
        labels,
        join_token: args.join_token,
        cluster: cluster_id(&global)?.to_owned(),
        run_as: args.run_as,
        allow_root_jobs: args.allow_root_jobs,
        insecure: args.insecure,
        ..gpu_agent::Options::new(servers(&global)?, args.dir)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let left = runtime.block_on(async {
        let mut signals = Signals::listen()?;
        let stop = async move {
            signals.next().await;
        };
        gpu_agent::run(options, stop).await.map_err(failure)
    })?;
    match left {
        Left::Stopped => Ok(ExitCode::SUCCESS),
        Left::Superseded(reason) => Err(Failure::new(CONFLICT, format!("this agent was superseded: {reason}"))
            .advise("its jobs go on; another agent with this directory's identity has taken over")),
    }
}

/// The exit code of an agent that could not work.
pub fn failure_code(error: &gpu_agent::Error) -> u8 {
    use gpu_agent::Error;
    use gpu_agent::agent::identity;
    match error {
        Error::Refused(refusal) => Failure::from(refusal.clone()).code,
        Error::Exposed(_) | Error::Rights(_) | Error::Gpus(_) => USAGE,
        Error::Identity(identity::Error::InUse(_) | identity::Error::OtherCluster { .. }) => CONFLICT,
        _ => FAILURE,
    }
}

/// Why the agent could not work, with what to do.
fn failure(error: gpu_agent::Error) -> Failure {
    let (code, text) = (failure_code(&error), error.to_string());
    match error {
        gpu_agent::Error::Refused(refusal) => Failure { message: text, ..Failure::from(refusal) },
        _ => Failure::new(code, text),
    }
}
