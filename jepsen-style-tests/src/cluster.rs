//! A cluster of real processes in a temporary directory: replicas, agents, and clients of them.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use gpu_agent::agent::fence::Content;
use gpu_agent::clock::boot_ms;
use proto::{Client, Identity, Patience, v1};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::disk::Disk;
use crate::ledger::FenceLeft;
use crate::network::Network;
use crate::process::{self, Place, Process};

/// How long anything may take to become true on a busy machine.
pub const SOON: Duration = Duration::from_secs(40);
/// How long the whole state may take to another replica, over a slow link too.
const WHOLE_STATE: Duration = Duration::from_secs(120);
/// Between two looks at something that must become true.
const LOOK: Duration = Duration::from_millis(20);
/// Clusters that run at once in one test program: more would starve each other.
const AT_ONCE: usize = 2;

/// What kind of cluster.
#[derive(Clone, Debug)]
pub struct Setup {
    pub replicas: usize,
    /// Flags of every start of a replica.
    pub flags: Vec<String>,
    /// Environment of every replica.
    pub env: Vec<(String, String)>,
    /// Size of a disk of each replica's own, in MiB; `None`: all share the machine's.
    pub disk_mib: Option<u64>,
    /// With machines `r0`, `r1` ... and the agents' names; `None`: all are on loopback.
    pub network: Option<Arc<Network>>,
}

impl Setup {
    pub fn of(replicas: usize) -> Self {
        Self { replicas, flags: Vec::new(), env: Vec::new(), disk_mib: None, network: None }
    }
}

/// Replicas and agents; everything ends when it is dropped.
pub struct Cluster {
    setup: Setup,
    replicas: BTreeMap<usize, Process>,
    agents: BTreeMap<String, Process>,
    /// API address of each replica, kept over restarts.
    pub addresses: Vec<String>,
    cluster_id: String,
    join_token: String,
    /// By replica; empty without disks of their own. Before `dir`, for they are mounted in it.
    disks: Vec<Disk>,
    /// By node, of those that have one.
    agent_disks: BTreeMap<String, Disk>,
    /// What power cuts left of the agents' fence files.
    pub fences_left: Vec<FenceLeft>,
    dir: TempDir,
}

impl Cluster {
    /// Starts `replicas` replicas that form one group, all voters when it returns.
    pub async fn start(replicas: usize) -> Self {
        Self::with(Setup::of(replicas)).await.unwrap_or_else(|error| panic!("{error}"))
    }

    pub async fn with(setup: Setup) -> Result<Self, String> {
        let dir = tempfile::Builder::new().prefix("ares test ").tempdir().map_err(|error| error.to_string())?;
        let replicas = setup.replicas;
        let mut cluster = Self {
            setup,
            replicas: BTreeMap::new(),
            agents: BTreeMap::new(),
            addresses: Vec::new(),
            cluster_id: String::new(),
            join_token: String::new(),
            disks: Vec::new(),
            agent_disks: BTreeMap::new(),
            fences_left: Vec::new(),
            dir,
        };
        if let Some(mib) = cluster.setup.disk_mib {
            for at in 0..replicas {
                let image = cluster.path().join(format!("r{at}.image"));
                cluster.disks.push(Disk::make(&image, &cluster.replica_dir(at), mib)?);
            }
        }
        for at in 0..replicas {
            cluster.found_or_join(at).await?;
        }
        cluster.until_voters(replicas).await?;
        Ok(cluster)
    }

    async fn until_voters(&self, voters: usize) -> Result<(), String> {
        self.try_until(&format!("{voters} replicas are voters"), SOON, async |cluster| {
            let members = cluster.members().await.unwrap_or_default();
            members.iter().filter(|member| member.voter).count() == voters
        })
        .await
    }

    /// Starts replica `at`: the first founds the group, others join through it.
    pub async fn found_or_join(&mut self, at: usize) -> Result<(), String> {
        let listen = format!("{}:0", self.host(&format!("r{at}")));
        let mut flags = vec!["--listen", &listen, "--peer-listen", &listen];
        let (first, token);
        if at == 0 {
            flags.push("--bootstrap");
        } else {
            (first, token) = (self.addresses[0].clone(), self.join_token.clone());
            flags.extend(["--join", &first, "--join-token", &token]);
        }
        self.start_replica(at, &flags, &[]);
        let env = self.env_of(at).await?;
        self.addresses.truncate(at);
        self.addresses.push(env["ARES_SERVER"].clone());
        self.cluster_id = env["ARES_CLUSTER"].clone();
        self.join_token = env["ARES_JOIN_TOKEN"].clone();
        Ok(())
    }

    /// What a replica wrote for clients and agents when it became a member.
    async fn env_of(&self, at: usize) -> Result<BTreeMap<String, String>, String> {
        let env = self.replica_dir(at).join("env");
        self.try_until("its env file is there", SOON, async |_| env.is_file())
            .await
            .map_err(|error| format!("replica {at} did not start: {error}\n{}", self.replica_log(at)))?;
        Ok(read_env(&env))
    }

    /// Takes a replica out of the group, alive or dead: whoever starts it again as it was is no member.
    pub async fn remove_replica(&self, at: usize) -> Result<(), String> {
        let member = self.known_member(at).await?;
        let deadline = Instant::now() + SOON;
        // Refused while the leader has not heard the others for a moment: asked again, as an operator would.
        loop {
            let out = v1::ReplicaRequest { replica_id: member.replica_id };
            match self.client().remove_replica(out).await {
                Ok(_) => break,
                Err(error) if Instant::now() >= deadline => {
                    return Err(format!("replica {at} can't be removed: {error}"));
                }
                Err(_) => tokio::time::sleep(10 * LOOK).await,
            }
        }
        let gone = self.try_until("the removed replica is no member", SOON, async |cluster| {
            let members = cluster.members().await;
            members.is_some_and(|all| all.iter().all(|one| one.replica_id != member.replica_id))
        });
        gone.await
    }

    /// Empties the directory of a removed replica that does not run, and lets it join as a new one at its old addresses, until it
    /// votes.
    pub async fn rejoin_replica(&mut self, at: usize) -> Result<(), String> {
        let dir = self.replica_dir(at);
        let wrong = |error: std::io::Error| format!("{}: {error}", dir.display());
        let places = std::fs::read(dir.join("addresses.json")).map_err(wrong)?;
        let places: BTreeMap<String, String> = serde_json::from_slice(&places).map_err(|error| error.to_string())?;
        // It may be a file system of its own, which stays.
        for entry in std::fs::read_dir(&dir).map_err(wrong)? {
            let path = entry.map_err(wrong)?.path();
            if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.map_err(wrong)?;
        }
        let others: Vec<&str> =
            (0..self.addresses.len()).filter(|other| *other != at).map(|other| &*self.addresses[other]).collect();
        let (others, token) = (others.join(","), self.join_token.clone());
        let (api, peer) = (places["api"].as_str(), places["peer"].as_str());
        let flags = ["--listen", api, "--peer-listen", peer, "--join", &others, "--join-token", &token];
        self.start_replica(at, &flags, &[]);
        self.env_of(at).await?;
        let votes = self.try_until("the new replica is a voter", WHOLE_STATE, async |cluster| {
            cluster.member(at).await.is_some_and(|member| member.voter)
        });
        votes
            .await
            .map_err(|error| format!("{error}; the log of replica {at} ends with\n{}", tail(&self.replica_log(at))))
    }

    /// The group as its leader sees it.
    pub async fn members(&self) -> Option<Vec<v1::Member>> {
        let (leader, _) = self.leader().await?;
        Some(self.status(leader).await.ok()?.members)
    }

    /// A replica as the leader sees it; `None`: it is no member.
    pub async fn member(&self, at: usize) -> Option<v1::Member> {
        self.members().await?.into_iter().find(|member| member.api_addr == self.addresses[at])
    }

    /// The same of one that is a member: while the group has no leader, nobody tells.
    pub async fn known_member(&self, at: usize) -> Result<v1::Member, String> {
        self.try_until("there is a leader", SOON, async |cluster| cluster.members().await.is_some()).await?;
        self.member(at).await.ok_or_else(|| format!("no member is at {}", self.addresses[at]))
    }

    /// Lets this replica lead, which it does when it returns.
    pub async fn let_lead(&mut self, at: usize) -> Result<(), String> {
        let deadline = Instant::now() + SOON;
        loop {
            if self.find_leader(0, SOON).await?.0 == at {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "replica {at} does not take the lead; its log ends with\n{}",
                    tail(&self.replica_log(at))
                ));
            }
            // Refused while it lags, or lost with the leader: asked again.
            if let Some(member) = self.member(at).await {
                let _ = self.client().transfer_leader(v1::ReplicaRequest { replica_id: member.replica_id }).await;
            }
            tokio::time::sleep(10 * LOOK).await;
        }
    }

    fn start_replica(&mut self, at: usize, flags: &[&str], env: &[(String, String)]) {
        let dir = self.replica_dir(at);
        let mut args = vec!["server", "--dir", dir.to_str().expect("a plain path")];
        args.extend(flags);
        args.extend(self.setup.flags.iter().map(String::as_str));
        let process = self.start_on(&format!("r{at}"), args, env);
        self.replicas.insert(at, process);
    }

    /// Starts `ares` on the machine of this name, if the cluster has a network.
    fn start_on(&self, name: &str, mut args: Vec<&str>, env: &[(String, String)]) -> Process {
        let network = self.setup.network.as_deref().map(|network| (network, name));
        if network.is_some() {
            args.push("--insecure");
        }
        let others = self.agent_disks.iter().filter(|(node, _)| *node != name).map(|(_, disk)| disk);
        let hidden = match self.agent_disks.contains_key(name) {
            true => others.chain(&self.disks).map(Disk::mounted_at).collect(),
            false => Vec::new(),
        };
        Process::start(&Place { network, hidden }, &args, &[&self.setup.env, env].concat(), &self.log(name))
    }

    fn host(&self, name: &str) -> Ipv4Addr {
        self.setup.network.as_ref().map_or_else(own_loopback, |network| network.address(name))
    }

    pub fn network(&self) -> Option<&Network> {
        self.setup.network.as_deref()
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn replica_dir(&self, at: usize) -> PathBuf {
        self.dir.path().join(format!("r{at}"))
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.log"))
    }

    pub fn replica_log(&self, at: usize) -> String {
        std::fs::read_to_string(self.log(&format!("r{at}"))).unwrap_or_default()
    }

    pub fn disk(&self, at: usize) -> &Disk {
        &self.disks[at]
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

    /// A client of all replicas that asks this one first.
    pub fn client_from(&self, at: usize) -> Client {
        let mut servers = self.addresses.clone();
        servers.rotate_left(at);
        self.client_of(servers)
    }

    fn client_of(&self, servers: Vec<String>) -> Client {
        let identity = Identity::new(&self.cluster_id, "").expect("a hex id");
        Client::new(servers, identity)
            .with_patience(Patience { call: Duration::from_secs(30), attempt: Duration::from_secs(5) })
    }

    /// Runs a command of the command line against all replicas: exit code, and both outputs as text.
    pub fn ares(&self, args: &[&str]) -> (i32, String, String) {
        let servers = self.addresses.join(",");
        let output = process::run(&[args, &["-s", &servers]].concat(), SOON);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
    }

    pub async fn status(&self, at: usize) -> Result<v1::StatusReply, proto::Error> {
        let client = self.client_at(at);
        client
            .with_patience(Patience { call: Duration::from_secs(2), attempt: Duration::from_secs(2) })
            .status(v1::StatusRequest {})
            .await
    }

    /// The replica that says it leads, and its term; of several the one with the highest.
    pub async fn leader(&self) -> Option<(usize, u64)> {
        let mut found = None;
        for at in self.replicas.keys() {
            if let Ok(status) = self.status(*at).await
                && status.role == "LEADER"
                && found.is_none_or(|(_, term)| term < status.term)
            {
                found = Some((*at, status.term));
            }
        }
        found
    }

    pub async fn wait_for_leader(&mut self) -> (usize, u64) {
        self.find_leader(0, SOON).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Waits for a leader of a higher term than `above`; an error also when a replica ends by itself meanwhile.
    pub async fn find_leader(&mut self, above: u64, within: Duration) -> Result<(usize, u64), String> {
        let deadline = Instant::now() + within;
        loop {
            if let Some((at, process)) =
                self.replicas.iter_mut().find_map(|(at, process)| (!process.is_running()).then_some((at, process)))
            {
                return Err(format!("replica {at} ended by itself; its log ends with:\n{}", tail(&process.log_text())));
            }
            if let Some(leader) = self.leader().await.filter(|(_, term)| *term > above) {
                return Ok(leader);
            }
            if Instant::now() >= deadline {
                let logs =
                    self.replicas.iter().map(|(at, process)| format!("replica {at}:\n{}", tail(&process.log_text())));
                let logs = logs.collect::<Vec<_>>().join("\n");
                return Err(format!("no leader of a term above {above} within {within:?}; the logs end with\n{logs}"));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    // ------------------------------------------------------------------------------------------------------- faults

    pub fn kill_replica(&mut self, at: usize) {
        self.replicas.remove(&at).expect("it runs").kill();
    }

    /// SIGTERM: hands leadership over and drains; its exit code.
    pub fn stop_replica(&mut self, at: usize) -> Result<i32, String> {
        self.replicas.remove(&at).expect("it runs").terminate(SOON)
    }

    /// Waits until a replica ends by itself: its exit code.
    pub fn replica_ended(&mut self, at: usize) -> Result<i32, String> {
        self.replicas.remove(&at).expect("it runs").ended(SOON)
    }

    /// Starts it again in its directory, as it was.
    pub fn restart_replica(&mut self, at: usize) {
        self.start_replica(at, &[], &[]);
    }

    /// The same with something more in its environment, this once.
    pub fn restart_replica_with(&mut self, at: usize, env: &[(String, String)]) {
        self.start_replica(at, &[], env);
    }

    /// Starts it again if it has ended by itself; whether it had.
    pub fn revive_replica(&mut self, at: usize) -> bool {
        let ended = self.replicas.get_mut(&at).is_none_or(|process| !process.is_running());
        if ended {
            self.restart_replica(at);
        }
        ended
    }

    /// Waits until a replica that was just started serves, or has ended: its exit code.
    pub async fn serves_or_ends(&mut self, at: usize, within: Duration) -> Result<Option<i32>, String> {
        let deadline = Instant::now() + within;
        loop {
            if self.status(at).await.is_ok() {
                return Ok(None);
            }
            if !self.replica_runs(at) {
                return self.replica_ended(at).map(Some);
            }
            if Instant::now() >= deadline {
                return Err(format!(
                    "replica {at} neither serves nor ends; its log ends with\n{}",
                    tail(&self.replica_log(at))
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Starts it again and waits until it ends by itself, as one that must not run does: its exit code, and what it
    /// printed since.
    pub fn restart_and_end(&mut self, at: usize) -> Result<(i32, String), String> {
        let before = self.replica_log(at).len();
        self.start_replica(at, &[], &[]);
        let code = self.replicas.remove(&at).expect("it was started").ended(SOON)?;
        Ok((code, self.replica_log(at)[before..].to_owned()))
    }

    pub fn signal_replica(&self, at: usize, signal: Signal) {
        self.replicas[&at].signal(signal);
    }

    /// Whether its process is there, and was not killed here.
    pub fn replica_runs(&mut self, at: usize) -> bool {
        self.replicas.get_mut(&at).is_some_and(Process::is_running)
    }

    pub fn replica(&self, at: usize) -> &Process {
        &self.replicas[&at]
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
        let listen = format!("{}:0", self.host(name));
        args.extend(["--allow-root-jobs", "--join-token", &self.join_token, "--listen", &listen]);
        if !gpus.is_empty() {
            args.extend(["--gpus", gpus]);
        }
        let process = self.start_on(name, args, &[]);
        self.agents.insert(name.to_owned(), process);
    }

    /// Gives a node a disk of its own, before any agent starts: no job of another node may see it, or hold on to it.
    pub fn give_disk(&mut self, name: &str, mib: u64) -> Result<(), String> {
        let disk = Disk::make(&self.path().join(format!("{name}.image")), &self.path().join(name), mib)?;
        self.agent_disks.insert(name.to_owned(), disk);
        Ok(())
    }

    /// Cuts the power of a node with a disk of its own: its agent, shims and jobs are gone, and what was not synced. How many shims
    /// there were.
    pub fn cut_agent_power(&mut self, name: &str) -> Result<usize, String> {
        // In the steps of 10 ms in which jobs read it from /proc/uptime.
        let cut_ms = boot_ms() / 10 * 10;
        self.agent_disks.get(name).ok_or_else(|| format!("{name} has no disk of its own"))?.cut_power()?;
        let shims = self.kill_agent_and_shims(name);
        self.agent_disks[name].power_on()?;
        let fence = std::fs::read_to_string(self.path().join(name).join("fence")).unwrap_or_default();
        let content = fence.split_once('\n').and_then(|(_, json)| serde_json::from_str::<Content>(json).ok());
        let max_token = content.map_or(0, |content| content.max_token);
        self.fences_left.push(FenceLeft { node: name.to_owned(), cut_ms, max_token });
        Ok(shims)
    }

    pub async fn node(&self, name: &str) -> Option<v1::Node> {
        let nodes = self.client().list_nodes(v1::ListNodesRequest::default()).await.ok()?.nodes;
        nodes.into_iter().find(|node| node.name == name)
    }

    /// The leader's view of a node: it alone knows who is silent.
    pub async fn node_as_the_leader_sees_it(&self, name: &str) -> Option<v1::Node> {
        let (leader, _) = self.leader().await?;
        let nodes = self.client_at(leader).list_nodes(v1::ListNodesRequest::default()).await.ok()?.nodes;
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

    /// Kills a node's agent and all its shims; how many shims there were.
    pub fn kill_agent_and_shims(&mut self, name: &str) -> usize {
        self.kill_agent(name);
        let shims = self.shims(name);
        for pid in &shims {
            let _ = kill_process(*pid, Signal::KILL);
        }
        shims.len()
    }

    // --------------------------------------------------------------------------------------------------------- jobs

    /// Submits a shell command.
    pub async fn submit(&self, script: &str, change: impl FnOnce(&mut v1::JobSpec)) -> u64 {
        let mut job = shell_job(script);
        change(&mut job);
        let request = v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(job), user: USER.into() };
        self.client().submit_job(request).await.expect("the job is accepted").job_id
    }

    pub async fn cancel(&self, id: u64) {
        let cancel = v1::CancelJobRequest { request_id: proto::request_id(), job_id: id, user: USER.into() };
        self.client().cancel_job(cancel).await.expect("the cancel is accepted");
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
            tokio::time::sleep(LOOK).await;
        }
    }

    pub async fn job_running(&self, id: u64) -> v1::Job {
        self.job_until(id, "running", SOON, |job| job.state == "RUNNING").await
    }

    pub async fn job_ended(&self, id: u64, within: Duration) -> v1::Job {
        self.job_until(id, "ended", within, |job| job.result.is_some()).await
    }

    // ------------------------------------------------------------------------------------------------------- waiting

    /// Waits until something holds.
    pub async fn until<F>(&self, what: &str, holds: F)
    where
        F: AsyncFn(&Self) -> bool,
    {
        self.try_until(what, SOON, holds).await.unwrap_or_else(|error| panic!("{error}"));
    }

    pub async fn try_until<F>(&self, what: &str, within: Duration, holds: F) -> Result<(), String>
    where
        F: AsyncFn(&Self) -> bool,
    {
        let deadline = Instant::now() + within;
        while !holds(self).await {
            if Instant::now() >= deadline {
                return Err(format!("not within {within:?}: {what}"));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Waits until all running replicas have applied the same index, and nothing moves any more.
    pub async fn try_settle(&self) -> Result<(), String> {
        let deadline = Instant::now() + SOON;
        let mut before = Vec::new();
        loop {
            let mut indexes = Vec::new();
            for at in self.running_replicas() {
                indexes.push(self.status(at).await.map(|status| status.applied_index).unwrap_or_default());
            }
            let met = indexes.first().is_some_and(|first| *first > 0 && indexes.iter().all(|index| index == first));
            if met && indexes == before {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!("the replicas do not meet within {SOON:?}: they applied up to {indexes:?}"));
            }
            before = indexes;
            tokio::time::sleep(10 * LOOK).await;
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

/// Whose jobs these are.
pub const USER: &str = "test";

/// A job of one process without GPUs, with the shortest lease.
pub fn shell_job(script: &str) -> v1::JobSpec {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    v1::JobSpec { body: Some(v1::Body { argv, ..Default::default() }), lease_ttl_ms: 10_000, ..Default::default() }
}

/// Runs a future to its end on a runtime of its own: the body of a test. Waits for its turn.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let _turn = Turn::take();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("a runtime").block_on(future)
}

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

/// One of [`AT_ONCE`] places; given back also when the test fails.
struct Turn;

impl Turn {
    fn take() -> Self {
        let running = RUNNING.lock().expect("nobody panics with it");
        *ENDED.wait_while(running, |running| *running >= AT_ONCE).expect("nobody panics with it") += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *RUNNING.lock().expect("nobody panics with it") -= 1;
        ENDED.notify_one();
    }
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

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}

/// Connections come from 127.0.0.1, where one of them may have a replica's port when it comes back to it.
fn own_loopback() -> Ipv4Addr {
    let [_, _, high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, high, low, 2)
}

/// `export NAME=VALUE` lines.
fn read_env(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).expect("the env file is readable");
    let pairs = text.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
    pairs.map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned())).collect()
}
