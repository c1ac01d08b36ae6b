//! A cluster of real processes in a temporary directory: replicas, agents, and a client.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::{Client, Identity, Patience, v1};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::process::Process;

/// Replicas and agents, all on loopback; everything ends when it is dropped.
pub struct Cluster {
    dir: TempDir,
    replicas: BTreeMap<usize, Process>,
    agents: BTreeMap<String, Process>,
    /// API address of each replica, kept over restarts.
    pub addresses: Vec<String>,
    cluster_id: String,
    join_token: String,
}

/// How long anything may take to become true on a busy machine.
pub const SOON: Duration = Duration::from_secs(30);

impl Cluster {
    /// Starts `replicas` replicas that form one group, all voters when it returns.
    pub async fn start(replicas: usize) -> Self {
        let dir = tempfile::Builder::new().prefix("ares test ").tempdir().expect("a temporary directory");
        let mut cluster = Self {
            dir,
            replicas: BTreeMap::new(),
            agents: BTreeMap::new(),
            addresses: Vec::new(),
            cluster_id: String::new(),
            join_token: String::new(),
        };
        for at in 0..replicas {
            cluster.found_or_join(at).await;
        }
        cluster.until("all replicas are voters", async |cluster| {
            let Ok(status) = cluster.status(0).await else { return false };
            status.members.iter().filter(|member| member.voter).count() == replicas
        })
        .await;
        cluster
    }

    async fn found_or_join(&mut self, at: usize) {
        let dir = self.replica_dir(at);
        let dir_text = dir.to_str().expect("a plain path");
        let mut args = vec!["server", "--dir", dir_text, "--listen", "127.0.0.1:0", "--peer-listen", "127.0.0.1:0"];
        let (first, token);
        if at == 0 {
            args.push("--bootstrap");
        } else {
            first = self.addresses[0].clone();
            token = self.join_token.clone();
            args.extend(["--join", &first, "--join-token", &token]);
        }
        let process = Process::start(&args, &[], &self.log(&format!("r{at}")));
        self.replicas.insert(at, process);
        let env = dir.join("env");
        wait_for(|| env.is_file(), || format!("replica {at} did not start:\n{}", self.replica_log(at)));
        let env = read_env(&env);
        self.addresses.push(env["ARES_SERVER"].clone());
        self.cluster_id = env["ARES_CLUSTER"].clone();
        self.join_token = env["ARES_JOIN_TOKEN"].clone();
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    fn replica_dir(&self, at: usize) -> PathBuf {
        self.dir.path().join(format!("r{at}"))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    pub fn replica_log(&self, at: usize) -> String {
        std::fs::read_to_string(self.log(&format!("r{at}"))).unwrap_or_default()
    }

    // ------------------------------------------------------------------------------------------------------ clients

    /// A client of all replicas.
    pub fn client(&self) -> Client {
        self.client_of(self.addresses.clone())
    }

    /// A client of one replica alone.
    pub fn client_at(&self, at: usize) -> Client {
        self.client_of(vec![self.addresses[at].clone()])
    }

    fn client_of(&self, servers: Vec<String>) -> Client {
        let identity = Identity::new(&self.cluster_id, "").expect("a hex id");
        Client::new(servers, identity)
            .with_patience(Patience { call: Duration::from_secs(20), attempt: Duration::from_secs(3) })
    }

    pub async fn status(&self, at: usize) -> Result<v1::StatusReply, proto::Error> {
        let client = self.client_at(at);
        client
            .with_patience(Patience { call: Duration::from_secs(1), attempt: Duration::from_secs(1) })
            .status(v1::StatusRequest {})
            .await
    }

    /// The replica that says it leads, and its term.
    pub async fn leader(&self) -> Option<(usize, u64)> {
        for at in self.replicas.keys() {
            if let Ok(status) = self.status(*at).await
                && status.role == "LEADER"
            {
                return Some((*at, status.term));
            }
        }
        None
    }

    pub async fn wait_for_leader(&self) -> (usize, u64) {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(leader) = self.leader().await {
                return leader;
            }
            assert!(Instant::now() < deadline, "no leader within {SOON:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    // ------------------------------------------------------------------------------------------------------- faults

    pub fn kill_replica(&mut self, at: usize) {
        self.replicas.remove(&at).expect("it runs").kill();
    }

    /// SIGTERM: hands leadership over and drains; its exit code.
    pub fn stop_replica(&mut self, at: usize) -> i32 {
        self.replicas.remove(&at).expect("it runs").terminate(Duration::from_secs(15))
    }

    /// Starts it again in its directory, without flags.
    pub fn restart_replica(&mut self, at: usize) {
        let dir = self.replica_dir(at);
        let args = ["server", "--dir", dir.to_str().expect("a plain path")];
        self.replicas.insert(at, Process::start(&args, &[], &self.log(&format!("r{at}"))));
    }

    pub fn signal_replica(&self, at: usize, signal: Signal) {
        self.replicas[&at].signal(signal);
    }

    pub fn running_replicas(&self) -> Vec<usize> {
        self.replicas.keys().copied().collect()
    }

    // ------------------------------------------------------------------------------------------------------- agents

    /// Starts (or starts again) the agent of a node and waits until the node is ready.
    pub async fn agent(&mut self, name: &str, gpus: &str) {
        self.start_agent(name, gpus);
        self.until(&format!("node {name} is ready"), async |cluster| {
            cluster.node(name).await.is_some_and(|node| node.state == "READY")
        })
        .await;
    }

    pub fn start_agent(&mut self, name: &str, gpus: &str) {
        let dir = self.dir.path().join(name);
        let servers = self.addresses.join(",");
        let mut args = vec!["agent", "--dir", dir.to_str().expect("a plain path"), "--name", name, "-s", &servers];
        args.extend(["--allow-root-jobs", "--join-token", &self.join_token]);
        if !gpus.is_empty() {
            args.extend(["--gpus", gpus]);
        }
        let process = Process::start(&args, &[], &self.log(name));
        self.agents.insert(name.to_owned(), process);
    }

    pub async fn node(&self, name: &str) -> Option<v1::Node> {
        let nodes = self.client().list_nodes(v1::ListNodesRequest::default()).await.ok()?.nodes;
        nodes.into_iter().find(|node| node.name == name)
    }

    pub fn kill_agent(&mut self, name: &str) {
        self.agents.remove(name).expect("it runs").kill();
    }

    pub fn signal_agent(&self, name: &str, signal: Signal) {
        self.agents[name].signal(signal);
    }

    pub fn agent_log(&self, name: &str) -> String {
        std::fs::read_to_string(self.log(name)).unwrap_or_default()
    }

    /// Shims of the node's attempts: `ares shim DIR` with a directory below the agent's.
    pub fn shims(&self, name: &str) -> Vec<Pid> {
        let below = format!("{}/", self.dir.path().join(name).display());
        processes(|args| args.iter().any(|arg| arg == "shim") && args.iter().any(|arg| arg.starts_with(&below)))
    }

    // --------------------------------------------------------------------------------------------------------- jobs

    /// Submits a shell command.
    pub async fn submit(&self, script: &str, change: impl FnOnce(&mut v1::JobSpec)) -> u64 {
        let mut job = v1::JobSpec {
            body: Some(v1::Body {
                argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
                ..Default::default()
            }),
            lease_ttl_ms: 10_000,
            ..Default::default()
        };
        change(&mut job);
        let request = v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job), user: "test".into() };
        self.client().submit_job(request).await.expect("the job is accepted").job_id
    }

    pub async fn job(&self, id: u64) -> v1::Job {
        self.client().get_job(v1::GetJobRequest { job_id: id, ..Default::default() }).await.expect("the job is known")
    }

    /// Waits until the job looks as wanted.
    pub async fn job_until(&self, id: u64, what: &str, within: Duration, wanted: impl Fn(&v1::Job) -> bool) -> v1::Job {
        let deadline = Instant::now() + within;
        loop {
            let job = self.job(id).await;
            if wanted(&job) {
                return job;
            }
            assert!(Instant::now() < deadline, "job {id} is not {what} within {within:?}: {job:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn job_ended(&self, id: u64, within: Duration) -> v1::Job {
        self.job_until(id, "ended", within, |job| job.result.is_some()).await
    }

    /// Waits until something holds.
    pub async fn until<F>(&self, what: &str, holds: F)
    where
        F: AsyncFn(&Self) -> bool,
    {
        let deadline = Instant::now() + SOON;
        while !holds(self).await {
            assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until all running replicas have applied the same index, and returns it.
    pub async fn settled(&self) -> u64 {
        let deadline = Instant::now() + SOON;
        loop {
            let mut indexes = Vec::new();
            for at in self.running_replicas() {
                indexes.push(self.status(at).await.map(|status| status.applied_index).unwrap_or_default());
            }
            if let [first, rest @ ..] = indexes.as_slice()
                && *first > 0
                && rest.iter().all(|index| index == first)
            {
                return *first;
            }
            assert!(Instant::now() < deadline, "the replicas do not meet: {indexes:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.agents.clear();
        self.replicas.clear();
        // Shims outlive their agents by design: here their jobs end with the test.
        let below = format!("{}/", self.dir.path().display());
        for pid in processes(|args| args.iter().any(|arg| arg.starts_with(&below))) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Runs a future to its end on a runtime of its own: the body of a test.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

/// Live processes by their command line.
pub fn processes(wanted: impl Fn(&[String]) -> bool) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for entry in entries.flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let args: Vec<String> =
            line.split(|byte| *byte == 0).map(|arg| String::from_utf8_lossy(arg).into_owned()).collect();
        if wanted(&args) {
            found.extend(Pid::from_raw(number));
        }
    }
    found
}

fn wait_for(holds: impl Fn() -> bool, what: impl Fn() -> String) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "{}", what());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `export NAME=VALUE` lines.
fn read_env(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).expect("the env file is readable");
    let pairs = text.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned())).collect()
}
