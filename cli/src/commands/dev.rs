//! `ares dev`: one replica and one agent in one process tree, nothing to configure.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use proto::{Client, Identity, v1};
use raft_node::server::{self, Mode, Options, Running};
use tokio::task::JoinHandle;

use super::spec::JobArgs;
use crate::Global;
use crate::exit::{FAILURE, Failure, Outcome, UNAVAILABLE};
use crate::signals::Signals;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
EXAMPLES:
  ares dev -- python3 train.py                  runs one job here and exits with its code
  ares dev --gpus sim:hgx-h100 --gpus 2 -- env  the same on two GPUs of a simulated machine
  ares dev --gpus sim:hgx-h100 --dir ./dev      stays; in another shell: . ./dev/replica/env; ares nodes")]
pub struct Args {
    /// Keep everything here [default: a temporary directory that is removed]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Address for clients; port 0 picks a free one
    #[arg(long, default_value = "127.0.0.1:0", value_name = "HOST:PORT")]
    listen: String,
    /// Run jobs as this user (when root)
    #[arg(long, value_name = "USER")]
    run_as: Option<String>,
    #[command(flatten)]
    job: JobArgs,
}

impl Args {
    /// Without a command it stays and logs.
    pub fn is_daemon(&self) -> bool {
        !self.job.has_command()
    }
}

/// How long the two get to find each other.
const READY: Duration = Duration::from_secs(20);
/// How long jobs get to end when their directory goes away.
const JOBS_END: Duration = Duration::from_secs(15);

pub fn run(args: Args, _global: Global) -> Outcome {
    let spec = if args.job.has_command() { Some(args.job.spec(0)?) } else { None };
    let temporary = match &args.dir {
        Some(_) => None,
        None => Some(tempfile::Builder::new().prefix("ares-dev-").tempdir()?),
    };
    let dir = match (&args.dir, &temporary) {
        (Some(dir), _) => std::path::absolute(dir)?,
        (None, Some(temporary)) => temporary.path().to_owned(),
        (None, None) => unreachable!("one of the two is there"),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let dev = Dev::start(&args, &dir).await?;
        let outcome = match spec {
            Some(spec) => super::run::submit_and_stream(&dev.client, spec).await,
            None => dev.stay(&dir).await,
        };
        if temporary.is_some() {
            dev.end_jobs().await;
        }
        dev.stop().await;
        outcome
    });
    runtime.shutdown_timeout(Duration::from_secs(2));
    if let Some(temporary) = temporary {
        remove(&temporary.keep());
    }
    outcome
}

/// A thread of the replica may still be making a file while the directory goes: then it is tried again.
fn remove(dir: &Path) {
    let mut last = Ok(());
    for _ in 0..40 {
        last = std::fs::remove_dir_all(dir);
        if last.is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    if let Err(error) = last {
        eprintln!("ares: {} could not be removed: {error}.", dir.display());
    }
}

struct Dev {
    running: Running,
    client: Client,
    stop_agent: tokio::sync::oneshot::Sender<()>,
    agent: JoinHandle<Result<gpu_agent::Left, gpu_agent::Error>>,
}

impl Dev {
    async fn start(args: &Args, dir: &Path) -> Result<Self, Failure> {
        let replica_dir = dir.join("replica");
        let known = replica_dir.join("IDENTITY").exists() || replica_dir.join("addresses.json").exists();
        let options = Options {
            dir: replica_dir,
            mode: if known { Mode::Resume } else { Mode::Bootstrap },
            join_token: None,
            listen: Some(args.listen.clone()),
            peer_listen: Some("127.0.0.1:0".to_owned()),
            advertise: None,
            insecure: false,
            snapshot_entries: None,
        };
        let running = server::start(options).await.map_err(super::server::failure)?;
        let root = rustix::process::getuid().is_root();
        if root && args.run_as.is_none() {
            eprintln!("You are root: this cluster of one lets jobs run as root.");
        }
        let servers = vec![running.api_addr.clone()];
        let agent_options = gpu_agent::Options {
            gpus: args.job.machine(),
            join_token: running.join_token.clone(),
            run_as: args.run_as.clone(),
            allow_root_jobs: root,
            ..gpu_agent::Options::new(servers.clone(), dir.join("agent"))
        };
        let (stop_agent, stopped) = tokio::sync::oneshot::channel::<()>();
        let agent = tokio::spawn(gpu_agent::run(agent_options, async {
            let _ = stopped.await;
        }));
        let client = Client::new(servers, Identity::new(&running.replica.cluster().to_string(), "")?);
        let mut dev = Self { running, client, stop_agent, agent };
        dev.until_ready().await?;
        Ok(dev)
    }

    /// Until the agent is a node of the cluster.
    async fn until_ready(&mut self) -> Result<(), Failure> {
        let deadline = tokio::time::Instant::now() + READY;
        loop {
            if self.agent.is_finished() {
                let (code, why) = match (&mut self.agent).await {
                    Ok(Ok(left)) => (FAILURE, format!("it left: {left:?}")),
                    Ok(Err(error)) => (super::agent::failure_code(&error), error.to_string()),
                    Err(error) => (FAILURE, error.to_string()),
                };
                return Err(Failure::new(code, format!("the agent did not start: {why}")));
            }
            let nodes = self.client.list_nodes(v1::ListNodesRequest::default()).await;
            if nodes.is_ok_and(|reply| reply.nodes.iter().any(|node| node.state == "READY")) {
                return Ok(());
            }
            if tokio::time::Instant::now() > deadline {
                return Err(Failure::new(UNAVAILABLE, format!("the agent did not join within {} s", READY.as_secs())));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn stay(&self, dir: &Path) -> Outcome {
        let nodes = self.client.list_nodes(v1::ListNodesRequest::default()).await?.nodes;
        let gpus: usize = nodes.iter().map(|node| node.gpus.len()).sum();
        println!("Ares runs in {} with {gpus} GPU(s). In another shell:", dir.display());
        println!("  . '{}'", dir.join("replica/env").display());
        println!("  ares run -- hostname");
        if gpus == 0 {
            println!("No GPU was found here; --gpus sim:hgx-h100 simulates a machine with eight.");
        }
        Signals::listen()?.next().await;
        eprintln!("Stopping.");
        Ok(ExitCode::SUCCESS)
    }

    /// Cancels what is left and waits for its end: a process whose directory is gone must not go on.
    async fn end_jobs(&self) {
        let ending = async {
            loop {
                let jobs = self.client.list_jobs(v1::ListJobsRequest::default()).await?.jobs;
                if jobs.is_empty() {
                    return Ok::<_, proto::Error>(());
                }
                for job in jobs.into_iter().filter(|job| job.ending.is_empty()) {
                    let request =
                        v1::CancelJobRequest { request_id: proto::request_id(), job_id: job.id, user: job.user };
                    match self.client.cancel_job(request).await {
                        Err(error) if error.reason() != proto::reason::ALREADY_ENDED.name => return Err(error),
                        _ => {}
                    }
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        match tokio::time::timeout(JOBS_END, ending).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => eprintln!("Jobs may still run: {error}."),
            Err(_) => eprintln!("Jobs did not end within {} s.", JOBS_END.as_secs()),
        }
    }

    async fn stop(self) {
        let _ = self.stop_agent.send(());
        if tokio::time::timeout(Duration::from_secs(5), self.agent).await.is_err() {
            tracing::warn!("the agent did not stop in time");
        }
        self.running.stop().await;
    }
}
