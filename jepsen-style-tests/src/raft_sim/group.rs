//! The simulated machines of a group: hosts on turmoil's network, each with a disk of its own, on which the real replica runs, loses its
//! power and is started again. What happens when is `drive`'s.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use raft_node::log;
use raft_node::replica::{Mode, Options, Peer, Replica};
use raft_node::simulated::{self, PORT, disk};

use super::stand_in;
use crate::sim::random::Rng;

pub const TICK: Duration = Duration::from_millis(2);
const CLUSTER: [u8; 16] = [7; 16];
/// Messages of healthy links take up to so long.
const LATENCY: Duration = Duration::from_millis(4);
/// A restarted machine is up no sooner: what still held on to its replica is gone by then.
pub const BOOT: Duration = Duration::from_millis(20);
const NO_SUCH_HOST: &str = "a host of this group";

/// The running replicas, by id. Nobody keeps a handle over an await: a replica ends with its host.
pub type Running = Rc<RefCell<BTreeMap<u64, Replica>>>;

/// What the seed decides for all replicas.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub replicas: u64,
    pub snapshot_entries: u64,
    pub segment_bytes: u64,
    pub tail_bytes: usize,
    /// Between two syncs of a healthy disk.
    pub sync_every: Duration,
}

/// One machine's disk, as the simulator handles it.
struct Disk {
    sync_every: Cell<Duration>,
    full: Cell<bool>,
    /// A sync failed, and the log has stopped.
    failed: Cell<bool>,
    /// Why the replica did not start.
    refused: RefCell<Option<String>>,
}

struct Machine {
    disk: Rc<Disk>,
    up: bool,
}

/// What a replica loses beside its power.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loss {
    pub image: bool,
    pub snapshots: bool,
}

/// Links that are not what they should be.
#[derive(Clone, Debug, PartialEq)]
pub enum Broken {
    /// Nothing passes from any of the first to any of the second.
    OneWay(Vec<u64>, Vec<u64>),
    Both(Vec<u64>, Vec<u64>),
    /// Held back until it is mended.
    Held(Vec<u64>, Vec<u64>),
    Slow(Duration),
    /// Share of messages that begin a burst of losses.
    Lossy(f64),
}

pub struct Group {
    sim: turmoil::Sim<'static>,
    root: PathBuf,
    sizes: Sizes,
    pub running: Running,
    machines: BTreeMap<u64, Machine>,
}

pub fn host(id: u64) -> String {
    format!("r{id}")
}

pub fn peer(id: u64) -> Peer {
    Peer { peer_addr: format!("{}:{PORT}", host(id)), api_addr: format!("{}:1", host(id)) }
}

impl Group {
    /// `root`: an empty directory for all disks.
    pub fn new(seed: u64, root: &Path, sizes: Sizes) -> Self {
        let sim = turmoil::Builder::new()
            .tick_duration(TICK)
            .simulation_duration(Duration::from_secs(100_000))
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(LATENCY)
            .repair_rate(0.1)
            .tcp_capacity(65_536)
            .rng_seed(seed)
            .build();
        Self { sim, root: root.to_owned(), sizes, running: Running::default(), machines: BTreeMap::new() }
    }

    /// Whoever is no replica: never parted from any.
    pub fn client(&mut self, name: &str, client: impl Future<Output = turmoil::Result> + 'static) {
        self.sim.client(name, client);
    }

    pub fn step(&mut self) -> Result<(), String> {
        stand_in::set_now(self.sim.elapsed());
        self.sim.step().map(|_| ()).map_err(|error| error.to_string())
    }

    pub fn elapsed(&self) -> Duration {
        self.sim.elapsed()
    }

    /// A new machine, whose replica founds the group or waits to be taken in.
    pub fn add(&mut self, id: u64, founds: bool) -> Result<(), String> {
        let dir = self.dir(id);
        simulated::make(&dir, CLUSTER, id, founds).map_err(|error| error.to_string())?;
        let disk = Rc::new(Disk {
            sync_every: Cell::new(self.sizes.sync_every),
            full: Cell::default(),
            failed: Cell::default(),
            refused: RefCell::default(),
        });
        let (options, running, its) = (self.options(id), self.running.clone(), disk.clone());
        self.sim.host(host(id), move || run(id, options.clone(), running.clone(), its.clone()));
        self.machines.insert(id, Machine { disk, up: true });
        Ok(())
    }

    fn dir(&self, id: u64) -> PathBuf {
        self.root.join(host(id))
    }

    fn log(&self, id: u64) -> PathBuf {
        simulated::log_dir(&self.dir(id))
    }

    fn options(&self, id: u64) -> Options {
        let Peer { peer_addr, api_addr } = peer(id);
        Options {
            peer_advertise: Some(peer_addr),
            insecure: true,
            snapshot_entries: self.sizes.snapshot_entries,
            log: log::Options {
                segment_bytes: self.sizes.segment_bytes,
                tail_bytes: self.sizes.tail_bytes,
                reserve_bytes: 4 << 10,
                mark_after: Duration::from_millis(50),
            },
            ..Options::new(self.dir(id), &format!("0.0.0.0:{PORT}"), &api_addr, Mode::Resume)
        }
    }

    fn machine(&self, id: u64) -> &Machine {
        self.machines.get(&id).expect(NO_SUCH_HOST)
    }

    pub fn ids(&self) -> Vec<u64> {
        self.machines.keys().copied().collect()
    }

    pub fn is_up(&self, id: u64) -> bool {
        self.machine(id).up
    }

    /// Machines that are up, their replicas running or about to.
    pub fn up(&self) -> Vec<u64> {
        self.machines.iter().filter(|(_, machine)| machine.up).map(|(id, _)| *id).collect()
    }

    /// Ends a replica at once. `kept`: whether an unsynced sector is on disk afterwards. How many bytes were lost.
    pub fn crash(&mut self, id: u64, kept: impl FnMut() -> bool) -> Result<u64, String> {
        self.running.borrow_mut().remove(&id);
        self.sim.crash(host(id));
        let machine = self.machines.get_mut(&id).expect(NO_SUCH_HOST);
        machine.up = false;
        machine.disk.failed.set(false);
        disk::cut_power(&self.log(id), kept).map_err(|error| error.to_string())
    }

    /// Of a machine that is down.
    pub fn lose(&self, id: u64, loss: Loss) -> io::Result<()> {
        let gone = |name: &str| match std::fs::remove_dir_all(self.dir(id).join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        if loss.image {
            gone("image")?;
        }
        if loss.snapshots {
            gone("snapshots")?;
        }
        Ok(())
    }

    pub fn restart(&mut self, id: u64) {
        self.machines.get_mut(&id).expect(NO_SUCH_HOST).up = true;
        self.sim.bounce(host(id));
    }

    pub fn sync_every(&self, id: u64, every: Option<Duration>) {
        self.machine(id).disk.sync_every.set(every.unwrap_or(self.sizes.sync_every));
    }

    pub fn fill_disk(&self, id: u64, full: bool) {
        self.machine(id).disk.full.set(full);
        disk::say_full(&self.log(id), full);
    }

    pub fn fail_next_sync(&self, id: u64) {
        disk::fail_next_sync(&self.log(id));
    }

    /// Whose log stopped after a sync that failed.
    pub fn failed_disks(&self) -> Vec<u64> {
        self.machines.iter().filter(|(_, machine)| machine.disk.failed.get()).map(|(id, _)| *id).collect()
    }

    /// The first replica that refused to start, and why.
    pub fn refused(&self) -> Option<(u64, String)> {
        self.machines.iter().find_map(|(id, machine)| Some((*id, machine.disk.refused.borrow().clone()?)))
    }

    /// All links as they should be, but for these.
    pub fn set_links(&mut self, broken: &[Broken]) {
        let ids = self.ids();
        for a in &ids {
            for b in ids.iter().filter(|b| *b > a) {
                let (a, b) = (host(*a), host(*b));
                self.sim.release(a.as_str(), b.as_str());
                self.sim.repair(a.as_str(), b.as_str());
                self.sim.set_link_max_message_latency(a.as_str(), b.as_str(), LATENCY);
                self.sim.set_link_fail_rate(a.as_str(), b.as_str(), 0.0);
            }
        }
        for broken in broken {
            self.break_links(&ids, broken);
        }
    }

    fn break_links(&mut self, ids: &[u64], broken: &Broken) {
        let sim = &mut self.sim;
        match broken {
            Broken::OneWay(from, to) => pairs(from, to, |a, b| sim.partition_oneway(a, b)),
            Broken::Both(some, others) => pairs(some, others, |a, b| sim.partition(a, b)),
            Broken::Held(some, others) => pairs(some, others, |a, b| sim.hold(a, b)),
            Broken::Slow(most) => pairs(ids, ids, |a, b| sim.set_link_max_message_latency(a, b, *most)),
            Broken::Lossy(rate) => pairs(ids, ids, |a, b| sim.set_link_fail_rate(a, b, *rate)),
        }
    }
}

fn pairs(some: &[u64], others: &[u64], mut each: impl FnMut(&str, &str)) {
    for a in some {
        for b in others.iter().filter(|b| *b != a) {
            each(&host(*a), &host(*b));
        }
    }
}

/// The others of `ids`.
pub fn but(ids: &[u64], some: &[u64]) -> Vec<u64> {
    let some: BTreeSet<u64> = some.iter().copied().collect();
    ids.iter().copied().filter(|id| !some.contains(id)).collect()
}

impl Sizes {
    pub fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed, 1);
        Self {
            replicas: if rng.chance(700) { 3 } else { 5 },
            snapshot_entries: rng.range(60, 400),
            segment_bytes: rng.range(8, 64) << 10,
            tail_bytes: rng.range(4, 256) as usize * 1_024,
            sync_every: Duration::from_millis(rng.range(2, 16)),
        }
    }
}

/// What a machine does while it has power: the replica, and its disk's work.
async fn run(id: u64, options: Options, running: Running, disk: Rc<Disk>) -> turmoil::Result {
    let log = simulated::log_dir(&options.dir);
    let its_disk = disk.clone();
    tokio::task::spawn_local(async move {
        loop {
            tokio::time::sleep(its_disk.sync_every.get()).await;
            // On a full disk nothing is written, so nothing is answered.
            if !its_disk.full.get() && disk::work(&log).is_err() {
                its_disk.failed.set(true);
            }
        }
    });
    let (replica, _kept) = match simulated::start(options).await {
        Ok(started) => started,
        Err(error) => {
            disk.refused.replace(Some(error.to_string()));
            return std::future::pending().await;
        }
    };
    running.borrow_mut().insert(id, replica);
    std::future::pending().await
}
