//! Taking attempts up: fence file first, synced once for the whole batch, then directories and shims. One thread, so that
//! the fence file has one writer and a slow disk stops no heartbeat.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};

use proto::v1;
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedSender;

use super::attempts::{Attempts, Kept};
use super::core::{Event, Launch};
use super::cores::Cores;
use super::environment;
use super::fence::{Fence, Live, Refusal};
use super::part::Rank;
use super::ports::Ports;
use super::shims::{SWEEP, Shims};
use crate::shim::contain;
use crate::shim::control::Control;
use crate::shim::record::{self, Containment, Outcome, Spec, User};

pub enum Order {
    Launch {
        set: (u32, u64),
        launches: Vec<Launch>,
    },
    /// The leader has their ends.
    Forget(Vec<u64>),
    /// Write the fence file, then answer: the agent leaves.
    Finish(mpsc::Sender<()>),
}

/// How ranks run on this machine.
pub struct Setup {
    pub node_name: String,
    pub host: String,
    /// Comma-separated.
    pub servers: String,
    pub cluster: String,
    pub boot: String,
    pub user: Option<User>,
    /// Why no job may start here at all; `None` = they may.
    pub refusal: Option<String>,
    pub shim: Vec<OsString>,
    pub containment: Containment,
    /// NUMA domain of each GPU, by UUID.
    pub numa_of_gpu: BTreeMap<String, usize>,
    /// Ended attempts whose directories are kept.
    pub keep: usize,
}

pub struct Launcher {
    pub setup: Setup,
    pub fence: Fence,
    pub attempts: Attempts,
    pub shims: Shims,
    pub cores: Cores,
    pub ports: Arc<Mutex<Ports>>,
    pub events: UnboundedSender<Event>,
    pub runtime: Handle,
    /// Ports of attempts that are not forgotten yet.
    pub ports_of: BTreeMap<u64, u32>,
}

/// Why an attempt was not taken up.
struct Fault {
    node: bool,
    why: String,
}

impl Fault {
    fn node(what: &str) -> impl Fn(io::Error) -> Fault {
        move |error| Fault { node: true, why: format!("{what}: {error}") }
    }
}

impl Launcher {
    /// Until the agent leaves.
    pub fn run(mut self, orders: mpsc::Receiver<Order>) {
        while let Ok(order) = orders.recv() {
            match order {
                Order::Launch { set, launches } => self.launch(set, launches),
                Order::Forget(tokens) => self.forget(&tokens),
                Order::Finish(done) => {
                    if let Err(error) = self.fence.save() {
                        tracing::warn!(%error, "the fence file");
                    }
                    let _ = done.send(());
                    return;
                }
            }
        }
    }

    fn launch(&mut self, set: (u32, u64), launches: Vec<Launch>) {
        let before = self.fence.content.clone();
        let mut taken = Vec::new();
        for launch in launches {
            match self.check(&launch) {
                Ok(()) => {
                    self.fence.add(launch.lease.token, live(&launch.lease));
                    taken.push(launch);
                }
                Err(fault) => self.failed(&launch.lease, fault),
            }
        }
        (self.fence.content.incarnation, self.fence.content.index) = set;
        if taken.is_empty() {
            return;
        }
        if let Err(error) = self.fence.save() {
            self.fence.content = before;
            for launch in taken {
                self.failed(&launch.lease, Fault::node("fence file")(io::Error::new(error.kind(), error.to_string())));
            }
            return;
        }
        for launch in taken {
            if let Err(fault) = self.start(&launch) {
                self.cores.give_back(launch.lease.token);
                self.failed(&launch.lease, fault);
            }
        }
    }

    fn check(&self, launch: &Launch) -> Result<(), Fault> {
        if let Some(why) = &self.setup.refusal {
            return Err(Fault { node: true, why: why.clone() });
        }
        if let Some(why) = environment::fault(&launch.body) {
            return Err(Fault { node: false, why });
        }
        let lease = &launch.lease;
        if self.attempts.dir(lease.token).exists() {
            return Err(Fault { node: true, why: Refusal::StartedBefore { token: lease.token }.to_string() });
        }
        self.fence.check(lease.token, &lease.gpu_uuids).map_err(|why| Fault { node: true, why: why.to_string() })
    }

    fn start(&mut self, launch: &Launch) -> Result<(), Fault> {
        let lease = &launch.lease;
        let token = lease.token;
        let port = self.port(launch)?;
        let near: Vec<Option<usize>> = (0..lease.ranks).map(|local| self.nearest(lease, local)).collect();
        let cpus = self.cores.take(token, &lease.cores_by_numa, &near);

        let grace_ms = lease.kill_grace_ms.min(lease.ttl_ms / 4);
        let mut kept = Kept::of(lease, grace_ms, launch.open, &self.setup.boot, self.setup.containment.clone());
        kept.port = port;
        kept.cpus = cpus.iter().flatten().copied().collect();
        self.attempts.make(token, &kept, self.setup.user.as_ref()).map_err(Fault::node("attempt's directory"))?;
        let mut children = Vec::new();
        for local in 0..lease.ranks {
            let started = self.start_rank(launch, local, port, grace_ms, cpus[local as usize].clone());
            children.push((lease.first_rank + local, started));
        }
        self.ports_of.insert(token, port);
        self.await_shims(token, port, children);
        Ok(())
    }

    /// Rank 0's machine chooses, once the barrier is known to be its own or before it says Prepared.
    fn port(&self, launch: &Launch) -> Result<u32, Fault> {
        let lease = &launch.lease;
        if lease.first_rank != 0 {
            return Ok(if launch.open { lease.master_port } else { 0 });
        }
        if launch.open && lease.nodes > 1 {
            return Ok(lease.master_port);
        }
        let mut ports = self.ports.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let taken = |port: u16| self.ports_of.values().any(|other| *other == u32::from(port));
        let port = ports.choose(lease.token, taken, !launch.open);
        let busy = || Fault { node: true, why: "every port of the range for MASTER_PORT is busy".into() };
        port.map(u32::from).ok_or_else(busy)
    }

    fn nearest(&self, lease: &v1::DesiredLease, local: u32) -> Option<usize> {
        let first = environment::gpus(lease, local).into_iter().next()?;
        self.setup.numa_of_gpu.get(&first).copied()
    }

    fn start_rank(
        &self,
        launch: &Launch,
        local: u32,
        port: u32,
        grace_ms: u64,
        cpus: Vec<u32>,
    ) -> Result<Child, Fault> {
        let (lease, body, setup) = (&launch.lease, &launch.body, &self.setup);
        let token = lease.token;
        let rank = lease.first_rank + local;
        let inherited = |name: &str| std::env::var(name).ok();
        let attempt_dir = self.attempts.dir(token).display().to_string();
        let machine = environment::Machine {
            name: &setup.node_name,
            host: &setup.host,
            user: setup.user.as_ref(),
            servers: &setup.servers,
            cluster: &setup.cluster,
            attempt_dir: &attempt_dir,
            inherited: &inherited,
        };
        let known_port = if launch.open { port } else { 0 };
        let own_cwd = body.cwd.is_empty();
        let spec = Spec {
            argv: body.argv.clone(),
            env: environment::of_rank(&machine, lease, body, local, known_port),
            cwd: if own_cwd { self.attempts.work(token) } else { PathBuf::from(&body.cwd) },
            own_cwd,
            user: setup.user.clone(),
            cpus,
            grace_ms,
            limit_ms: lease.limit_ms,
            containment: setup.containment.of_rank(token, rank),
        };
        let (dir, lock) = self.attempts.make_rank(token, rank).map_err(Fault::node("rank's directory"))?;
        spec.write(&dir).map_err(Fault::node("shim's order"))?;
        Control::create(&dir.join(record::CONTROL), launch.deadline, launch.open)
            .map_err(Fault::node("control page"))?;
        let mut command = Command::new(&setup.shim[0]);
        command.args(&setup.shim[1..]).arg(&dir);
        // The lock is passed on held: from here to the shim's end there is no moment at which nobody has it.
        command.stdin(Stdio::from(lock)).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().map_err(Fault::node("starting the shim"))
    }

    /// Each shim's first process ends when its rank runs, waits at the barrier, or failed.
    fn await_shims(&self, token: u64, port: u32, children: Vec<(u32, Result<Child, Fault>)>) {
        let (shims, events, runtime) = (self.shims.clone(), self.events.clone(), self.runtime.clone());
        let (attempts, containment) = (self.attempts.clone(), self.setup.containment.clone());
        self.runtime.spawn_blocking(move || {
            let _inside = runtime.enter();
            let mut ranks = Vec::new();
            for (local, (number, child)) in children.into_iter().enumerate() {
                let dir = attempts.rank_dir(token, number);
                let contained = containment.of_rank(token, number);
                let rank = match child {
                    Ok(mut child) => {
                        let ended = child.wait();
                        let attached = shims.attach((token, local as u32), &dir, contained);
                        attached.map_err(Fault::node("shim")).map(|rank| match rank {
                            Rank::Vanished => {
                                // It may have started its rank before it died: only a process seen dead is dead.
                                while !contain::sweep(&containment.of_rank(token, number), &attempts.dir(token)) {
                                    std::thread::sleep(SWEEP);
                                }
                                failure(Fault { node: true, why: format!("the shim ended: {ended:?}") })
                            }
                            rank => rank,
                        })
                    }
                    Err(fault) => Err(fault),
                };
                ranks.push(rank.unwrap_or_else(failure));
            }
            let _ = events.send(Event::Launched { token, port, ranks });
        });
    }

    fn failed(&self, lease: &v1::DesiredLease, fault: Fault) {
        let ranks = vec![failure(fault); lease.ranks as usize];
        let _ = self.events.send(Event::Launched { token: lease.token, port: 0, ranks });
    }

    /// On disk with the next start: until then the leader would only be told again. Oldest directories go.
    fn forget(&mut self, tokens: &[u64]) {
        for token in tokens {
            self.fence.forget(*token);
            self.cores.give_back(*token);
            self.ports_of.remove(token);
            self.ports.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).free(*token);
        }
        if let Err(error) = self.prune() {
            tracing::warn!(%error, "removing old attempts");
        }
    }

    fn prune(&mut self) -> io::Result<()> {
        let mut ended = self.attempts.tokens()?;
        ended.retain(|token| !self.fence.content.live.contains_key(token));
        if ended.len() <= self.setup.keep + self.setup.keep / 8 {
            return Ok(());
        }
        let old = &ended[..ended.len() - self.setup.keep];
        let floor = old.last().copied().unwrap_or(0);
        self.fence.content.floor = self.fence.content.floor.max(floor);
        self.fence.save()?;
        for token in old {
            self.attempts.remove(*token)?;
        }
        Ok(())
    }
}

fn failure(fault: Fault) -> Rank {
    Rank::Ended(Outcome::LaunchFailed { node_fault: fault.node, why: fault.why })
}

fn live(lease: &v1::DesiredLease) -> Live {
    Live { job_id: lease.job_id, first_rank: lease.first_rank, ranks: lease.ranks, gpus: lease.gpu_uuids.clone() }
}
