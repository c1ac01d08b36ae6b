//! The kinds of faults, and each one's strike: what is done, to whom, for how long, and whether it took effect. In which
//! order they come, and what must hold afterwards, is `nemesis`'.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use clap::ValueEnum;
use rand::RngExt;
use rand::rngs::StdRng;
use rustix::process::{Pid, Signal, kill_process};

use crate::cluster::{Cluster, SOON};
use crate::damage::{self, Damage, Outcome};
use crate::disk::Disk;
use crate::nemesis::{GPUS, LEASE, NODES, REPLICAS};
use crate::network::{CLIENTS, Link, Network};
use crate::resources;

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Fault {
    /// The leader is killed -9 and started again
    KillLeader,
    /// Any replica is killed -9 and started again
    KillReplica,
    /// All replicas are killed -9 at once and started again
    KillAll,
    /// The leader is stopped (SIGSTOP) until another leads, then goes on
    FreezeLeader,
    /// The leader ends in order (SIGTERM) and is started again
    RestartLeader,
    /// An agent is killed -9 and started again
    KillAgent,
    /// An agent and its shims are killed -9, the agent is started again
    KillAgentAndShims,
    /// The power of an agent's machine fails: agent, shims and jobs are gone, and what its disk had not synced
    AgentPowerCut,
    /// An agent is stopped (SIGSTOP) past its leases, then goes on
    FreezeAgent,
    /// The replicas are stopped in order (SIGTERM) and started again, one after the other
    RollingRestart,
    /// One replica and one agent are parted from all others
    Halves,
    /// The leader is parted from all others
    IsolateLeader,
    /// What others send to the leader is lost, what it sends arrives; or the other way round
    OneWay,
    /// The leader and one follower do not reach each other; the third reaches both
    Bridge,
    /// An agent is parted from the leader past its leases, and reaches the followers
    AgentSeesFollowers,
    /// The clients reach nobody but the leader, which is parted from all others
    ClientsSeeOldLeader,
    /// Packets among replicas wait up to 60 ms, each its own time, and overtake each other
    DelayAndReorder,
    /// Each twentieth packet of any link is lost
    Loss,
    /// 64 KiB a second between replicas
    TinyBandwidth,
    /// Each fsync of the leader takes 0.4 s longer
    SlowFsync,
    /// The leader's fsyncs fail: it must stop, and nothing it acknowledged is lost
    FailingFsync,
    /// The leader's disk is full for a while
    FullDisk,
    /// A replica is taken out of the group, alive or dead, and joins it again with an empty directory
    ReplaceReplica,
    /// Files of a replica are damaged while it is down: it must refuse them or have them from elsewhere
    DamagedFiles,
    /// A replica has no memory left but what it has, and less
    MemoryLimit,
    /// A replica can open nothing any more for a while
    DescriptorLimit,
    /// The leader's wall clock leaps by an hour and returns
    WallClock,
    /// The leader's clocks run 0.9 % too fast or too slow
    ClockRate,
}

impl Fault {
    pub fn all() -> Vec<Self> {
        Self::value_variants().to_vec()
    }

    /// As it is written on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    /// What the machine must offer for it.
    pub fn needs(self) -> Option<Need> {
        match self {
            Fault::Halves
            | Fault::IsolateLeader
            | Fault::OneWay
            | Fault::Bridge
            | Fault::AgentSeesFollowers
            | Fault::ClientsSeeOldLeader
            | Fault::DelayAndReorder
            | Fault::Loss
            | Fault::TinyBandwidth => Some(Need::Network),
            Fault::SlowFsync | Fault::FailingFsync => Some(Need::Strace),
            Fault::FullDisk | Fault::AgentPowerCut => Some(Need::Disk),
            Fault::MemoryLimit => Some(Need::MemoryGroup),
            Fault::WallClock | Fault::ClockRate => Some(Need::Clocks),
            _ => None,
        }
    }

    /// A state of the network under which the cluster still works, and under which another fault may strike.
    pub fn condition(self) -> Option<Link> {
        match self {
            Fault::DelayAndReorder => Some(Link { delay: Duration::from_millis(60), ..Link::default() }),
            Fault::Loss => Some(Link { loss: 0.05, ..Link::default() }),
            Fault::TinyBandwidth => Some(Link { rate: Some(64 << 10), ..Link::default() }),
            _ => None,
        }
    }

    /// Ends attempts whenever one runs on the machine that it strikes.
    pub fn ends_attempts(self) -> bool {
        matches!(self, Fault::KillAgentAndShims | Fault::AgentPowerCut | Fault::FreezeAgent | Fault::AgentSeesFollowers)
    }
}

/// What a fault needs of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Network,
    Strace,
    Disk,
    MemoryGroup,
    Clocks,
}

impl Need {
    /// Whether it is there, or why not.
    pub fn available(self) -> Result<(), String> {
        match self {
            Need::Network => Network::available(),
            Need::Disk => Disk::available(),
            Need::MemoryGroup => resources::memory_available(),
            Need::Clocks => resources::clocks_available(),
            Need::Strace => {
                let asked = Command::new("strace").arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
                asked.map(|_| ()).map_err(|error| format!("strace: {error}"))
            }
        }
    }
}

pub struct Struck {
    pub target: String,
    pub took_effect: bool,
}

/// One fault and its end. An error: the cluster did not come back as it must, or the fault could not be made.
pub async fn strike(cluster: &mut Cluster, fault: Fault, rng: &mut StdRng) -> Result<Struck, String> {
    let away = Duration::from_millis(rng.random_range(0..2_500));
    let node = NODES[rng.random_range(0..NODES.len())];
    match fault {
        Fault::KillLeader => {
            let (at, term) = cluster.find_leader(0, SOON).await?;
            cluster.kill_replica(at);
            cluster.find_leader(term, SOON).await?;
            cluster.restart_replica(at);
            Ok(Struck { target: format!("r{at}"), took_effect: true })
        }
        Fault::KillReplica => {
            let at = rng.random_range(0..REPLICAS);
            cluster.kill_replica(at);
            tokio::time::sleep(away).await;
            cluster.restart_replica(at);
            Ok(Struck { target: format!("r{at}"), took_effect: true })
        }
        Fault::KillAll => {
            let (_, term) = cluster.find_leader(0, SOON).await?;
            (0..REPLICAS).for_each(|at| cluster.kill_replica(at));
            tokio::time::sleep(away).await;
            (0..REPLICAS).for_each(|at| cluster.restart_replica(at));
            cluster.find_leader(term, SOON).await?;
            Ok(Struck { target: "all replicas".to_owned(), took_effect: true })
        }
        Fault::FreezeLeader => {
            let (at, term) = cluster.find_leader(0, SOON).await?;
            cluster.signal_replica(at, Signal::STOP);
            let next = cluster.find_leader(term, SOON).await;
            let stopped = cluster.replica(at).state() == Some('T');
            cluster.signal_replica(at, Signal::CONT);
            next?;
            Ok(Struck { target: format!("r{at}"), took_effect: stopped })
        }
        Fault::RestartLeader => {
            let (at, _) = cluster.find_leader(0, SOON).await?;
            let code = cluster.stop_replica(at)?;
            cluster.restart_replica(at);
            Ok(Struck { target: format!("r{at}"), took_effect: code == 0 })
        }
        Fault::KillAgent => {
            let epoch = epoch(cluster, node).await?;
            cluster.kill_agent(node);
            tokio::time::sleep(away).await;
            cluster.start_agent(node, GPUS);
            Ok(Struck { target: node.to_owned(), took_effect: comes_back(cluster, node, epoch).await? })
        }
        Fault::KillAgentAndShims => {
            let node = busy(cluster, node).await;
            let epoch = epoch(cluster, node).await?;
            let shims = cluster.kill_agent_and_shims(node);
            tokio::time::sleep(away).await;
            cluster.start_agent(node, GPUS);
            comes_back(cluster, node, epoch).await?;
            Ok(Struck { target: node.to_owned(), took_effect: shims > 0 })
        }
        Fault::AgentPowerCut => {
            let node = busy(cluster, node).await;
            let epoch = epoch(cluster, node).await?;
            let shims = cluster.cut_agent_power(node)?;
            tokio::time::sleep(away).await;
            cluster.start_agent(node, GPUS);
            comes_back(cluster, node, epoch).await?;
            Ok(Struck { target: node.to_owned(), took_effect: shims > 0 })
        }
        Fault::FreezeAgent => {
            cluster.signal_agent(node, Signal::STOP);
            // The lease, its drift bound and margin, and a look of the leader.
            tokio::time::sleep(LEASE + Duration::from_secs(4)).await;
            let seen = cluster.node_as_the_leader_sees_it(node).await;
            let silent = seen.is_some_and(|node| node.state == "SILENT");
            cluster.signal_agent(node, Signal::CONT);
            Ok(Struck { target: node.to_owned(), took_effect: silent })
        }
        Fault::RollingRestart => {
            let mut orderly = true;
            for at in 0..REPLICAS {
                orderly &= cluster.stop_replica(at)? == 0;
                cluster.restart_replica(at);
                cluster.find_leader(0, SOON).await?;
            }
            Ok(Struck { target: "all replicas".to_owned(), took_effect: orderly })
        }
        Fault::SlowFsync => {
            let (at, _) = cluster.find_leader(0, SOON).await?;
            let tracer = Tracer::attach(cluster.replica(at).pid(), "delay_enter=400000")?;
            tokio::time::sleep(Duration::from_secs(6)).await;
            Ok(Struck { target: format!("r{at}"), took_effect: tracer.detach()? > 0 })
        }
        Fault::FailingFsync => {
            let (at, _) = cluster.find_leader(0, SOON).await?;
            let tracer = Tracer::attach(cluster.replica(at).pid(), "error=EIO")?;
            let ended = cluster.replica_ended(at);
            let failed = tracer.detach()?;
            ended.map_err(|error| format!("a replica whose fsync failed goes on: {error}"))?;
            tokio::time::sleep(away).await;
            cluster.restart_replica(at);
            Ok(Struck { target: format!("r{at}"), took_effect: failed > 0 })
        }
        Fault::FullDisk => resources::fill_disk(cluster).await,
        Fault::ReplaceReplica => replace_replica(cluster, rng).await,
        Fault::DamagedFiles => damage_files(cluster, rng).await,
        Fault::MemoryLimit => resources::squeeze_memory(cluster, rng).await,
        Fault::DescriptorLimit => resources::exhaust_descriptors(cluster, rng).await,
        Fault::WallClock => resources::leap_wall_clock(cluster, rng).await,
        Fault::ClockRate => resources::skew_clock_rate(cluster, rng).await,
        _ => strike_links(cluster, fault, rng).await,
    }
}

/// Takes out a replica that is dead, or one that lives on for a while as no member, and lets a new one join in its place.
async fn replace_replica(cluster: &mut Cluster, rng: &mut StdRng) -> Result<Struck, String> {
    let at = rng.random_range(0..REPLICAS);
    let old = cluster.known_member(at).await?.replica_id;
    let dead = rng.random_bool(0.5);
    if dead {
        cluster.kill_replica(at);
    }
    cluster.remove_replica(at).await?;
    if !dead {
        // What a removed replica does of itself must not matter.
        tokio::time::sleep(Duration::from_secs(2)).await;
        cluster.kill_replica(at);
    }
    cluster.rejoin_replica(at).await?;
    let new = cluster.member(at).await.map(|member| member.replica_id);
    let how = if dead { "dead" } else { "alive" };
    Ok(Struck { target: format!("r{at}, {how}"), took_effect: new.is_some_and(|new| new != old) })
}

async fn damage_files(cluster: &mut Cluster, rng: &mut StdRng) -> Result<Struck, String> {
    let at = rng.random_range(0..REPLICAS);
    let damage = Damage::ALL[rng.random_range(0..Damage::ALL.len())];
    let outcome = damage_and_mend(cluster, at, damage, rng).await?;
    let took_effect = outcome.is_some_and(|outcome| outcome != Outcome::Unnoticed);
    Ok(Struck { target: format!("r{at}, {}", damage.name()), took_effect })
}

/// Damages a replica's files and starts it; one that refuses them joins again with an empty directory. `None`: there was nothing yet
/// to damage. An error: it made of it what it must not, or did not come back.
pub async fn damage_and_mend(
    cluster: &mut Cluster,
    at: usize,
    damage: Damage,
    rng: &mut StdRng,
) -> Result<Option<Outcome>, String> {
    cluster.kill_replica(at);
    let dir = cluster.replica_dir(at);
    let Ok(struck) = damage.strike(&dir, rng) else {
        cluster.restart_replica(at);
        return Ok(None);
    };
    let outcome = damage::start_and_look(cluster, at, damage, &struck).await?;
    if outcome == Outcome::Refused {
        cluster.remove_replica(at).await?;
        cluster.rejoin_replica(at).await?;
    }
    Ok(Some(outcome))
}

/// A node with a shim, `first` if it has one; `first` too if none has for a while.
async fn busy(cluster: &Cluster, first: &'static str) -> &'static str {
    for _ in 0..100 {
        let others = NODES.into_iter().filter(|name| *name != first);
        if let Some(node) = [first].into_iter().chain(others).find(|name| !cluster.shims(name).is_empty()) {
            return node;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    first
}

async fn epoch(cluster: &Cluster, node: &str) -> Result<u64, String> {
    Ok(cluster.node(node).await.ok_or_else(|| format!("node {node} is not known"))?.epoch)
}

/// Registered anew, and ready.
async fn comes_back(cluster: &Cluster, node: &str, epoch: u64) -> Result<bool, String> {
    let what = format!("{node} is back");
    let back = cluster.try_until(&what, SOON, async |cluster| {
        cluster.node(node).await.is_some_and(|node| node.epoch > epoch && node.state == "READY")
    });
    back.await.map(|()| true)
}

/// Breaks links for a while, and heals them.
async fn strike_links(cluster: &mut Cluster, fault: Fault, rng: &mut StdRng) -> Result<Struck, String> {
    let (leader, term) = cluster.find_leader(0, SOON).await?;
    let other = (leader + rng.random_range(1..REPLICAS)) % REPLICAS;
    let names: Vec<String> = (0..REPLICAS).map(|at| format!("r{at}")).collect();
    let replicas: Vec<&str> = names.iter().map(String::as_str).collect();
    let (its, others) = (replicas[leader], without(&replicas, replicas[leader]));
    let node = NODES[rng.random_range(0..NODES.len())];
    let everyone: Vec<&str> = replicas.iter().copied().chain(NODES).chain([CLIENTS]).collect();
    let mut target = its.to_owned();
    let mut hold = Duration::from_secs(rng.random_range(4..9));
    let network = cluster.network().ok_or("the cluster has no network of its own")?;
    network.heal();
    match fault {
        Fault::Halves => {
            let few = [replicas[rng.random_range(0..REPLICAS)], node];
            let many: Vec<&str> = everyone.iter().copied().filter(|name| !few.contains(name)).collect();
            network.set_both(&few, &many, &Link::cut());
            target = few.join(" and ");
        }
        Fault::IsolateLeader => network.set_both(&[its], &without(&everyone, its), &Link::cut()),
        Fault::OneWay if rng.random_bool(0.5) => network.set(&others, &[its], &Link::cut()),
        Fault::OneWay => network.set(&[its], &others, &Link::cut()),
        Fault::Bridge => network.set_both(&[its], &[replicas[other]], &Link::cut()),
        Fault::AgentSeesFollowers => {
            network.set_both(&[node], &[its], &Link::cut());
            hold = LEASE + Duration::from_secs(4);
            target = format!("{node} and {its}");
        }
        Fault::ClientsSeeOldLeader => {
            network.set_both(&[its], &others, &Link::cut());
            network.set_both(&[CLIENTS], &without(&everyone, its), &Link::cut());
        }
        Fault::Loss => {
            network.set(&everyone, &everyone, &fault.condition().expect("it is one"));
            target = "all".to_owned();
        }
        _ => {
            let link = fault.condition().ok_or("no fault of links")?;
            network.set(&replicas, &replicas, &link);
            target = "replicas".to_owned();
        }
    }
    tokio::time::sleep(hold).await;
    // Parted from every other replica, a leader must have lost its place to another.
    let next = match fault {
        Fault::IsolateLeader | Fault::ClientsSeeOldLeader => cluster.find_leader(term, SOON).await.map(|_| ()),
        _ => Ok(()),
    };
    let struck = cluster.network().map_or(0, Network::heal);
    next?;
    Ok(Struck { target, took_effect: struck > 0 })
}

fn without<'a>(names: &[&'a str], one: &str) -> Vec<&'a str> {
    names.iter().copied().filter(|name| *name != one).collect()
}

/// strace on a running process, that interferes with its fsyncs until it is detached.
struct Tracer {
    strace: Child,
    report: tempfile::NamedTempFile,
}

impl Tracer {
    /// `inject`: as strace's option of that name says it, for fsync and fdatasync.
    fn attach(pid: Pid, inject: &str) -> Result<Self, String> {
        let report = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
        let strace = Command::new("strace")
            .args(["-f", "-e", "trace=fsync,fdatasync", "-e", &format!("inject=fsync,fdatasync:{inject}")])
            .arg("-o")
            .arg(report.path())
            .args(["-p", &pid.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("strace: {error}"))?;
        Ok(Self { strace, report })
    }

    /// Calls that it interfered with.
    fn detach(mut self) -> Result<usize, String> {
        let _ = kill_process(Pid::from_child(&self.strace), Signal::TERM);
        self.strace.wait().map_err(|error| error.to_string())?;
        let report = std::fs::read_to_string(self.report.path()).map_err(|error| error.to_string())?;
        Ok(report.lines().filter(|line| line.contains("INJECTED") || line.contains("DELAYED")).count())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.strace), Signal::TERM);
        let _ = self.strace.wait();
    }
}
