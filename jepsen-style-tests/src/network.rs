//! A network of our own: a namespace for each machine, joined by a switch in this process that reads every packet from
//! one machine's TUN device and writes it to another's. What a link loses, delays or slows is decided here, by ordered
//! pair, so that nothing but `ip` and /dev/net/tun is needed. The namespaces have no names: they end with this process
//! and the processes in them, whatever ends it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use tokio::runtime::{Handle, Runtime};

/// The place of the harness itself: no fault touches its links, so that it sees the whole cluster at all times.
const HARNESS: &str = "harness";
/// The place of the clients whose histories are judged.
pub const CLIENTS: &str = "clients";
/// More than this waiting on a slow link is dropped, as a router's queue does.
const LONGEST_QUEUE: Duration = Duration::from_millis(500);
const LARGEST_PACKET: usize = 2048;

/// What happens to the packets of one ordered pair of machines.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Link {
    /// Share of packets that are lost: 1 cuts the link.
    pub loss: f64,
    /// Each packet waits its own time up to this, so that packets overtake each other.
    pub delay: Duration,
    /// Bytes a second; `None` = no bound.
    pub rate: Option<u32>,
}

impl Link {
    pub fn cut() -> Self {
        Self { loss: 1.0, ..Self::default() }
    }
}

/// One machine of the network.
#[derive(Debug)]
struct Place {
    address: Ipv4Addr,
    namespace: File,
    device: File,
}

#[derive(Debug, Default)]
struct Pair {
    link: Link,
    /// Until when a slow link is busy with what it was given.
    busy: Option<Instant>,
    /// Packets lost or held back since the last heal.
    struck: u64,
}

#[derive(Debug)]
struct Late {
    due: Instant,
    number: u64,
    to: usize,
    packet: Vec<u8>,
}

impl PartialEq for Late {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Late {}

impl PartialOrd for Late {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Late {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

#[derive(Debug)]
struct Switch {
    places: Vec<Place>,
    pairs: Mutex<BTreeMap<(usize, usize), Pair>>,
    late: Mutex<BinaryHeap<Reverse<Late>>>,
    woken: Condvar,
    stop: AtomicBool,
}

/// Machines by name, and what their links do.
#[derive(Debug)]
pub struct Network {
    names: Vec<String>,
    switch: Arc<Switch>,
    clients: Option<Runtime>,
}

impl Network {
    /// A network of these machines, of the clients, and of the calling thread, which leaves the machine's own network for
    /// it, as do the threads that it starts later. Root alone can make one.
    pub fn make(machines: &[&str], seed: u64) -> Result<Arc<Self>, String> {
        let names: Vec<String> = machines.iter().chain(&[CLIENTS, HARNESS]).map(|name| (*name).to_owned()).collect();
        let mut places = Vec::new();
        for (at, name) in names.iter().enumerate() {
            let made = if name == HARNESS {
                Place::make(at)
            } else {
                std::thread::spawn(move || Place::make(at)).join().expect("it does not panic")
            };
            places.push(made.map_err(|error| format!("the network of {name} can't be made: {error}"))?);
        }
        let switch = Arc::new(Switch {
            places,
            pairs: Mutex::default(),
            late: Mutex::default(),
            woken: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        for at in 0..names.len() {
            let (switch, rng) = (switch.clone(), StdRng::seed_from_u64(seed ^ at as u64));
            std::thread::spawn(move || switch.carry_from(at, rng));
        }
        let late = switch.clone();
        std::thread::spawn(move || late.deliver_late());
        let mut network = Self { names, switch, clients: None };
        network.clients = Some(network.runtime_of_clients()?);
        Ok(Arc::new(network))
    }

    /// Whether [`Network::make`] works here, and why not.
    pub fn available() -> Result<(), String> {
        std::thread::spawn(|| Place::make(0).map(|_| ())).join().expect("it does not panic")
    }

    fn runtime_of_clients(&self) -> Result<Runtime, String> {
        let namespace =
            self.switch.places[self.at(CLIENTS)].namespace.try_clone().map_err(|error| error.to_string())?;
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .on_thread_start(move || enter(&namespace).expect("the namespace can be entered"))
            .enable_all()
            .build()
            .map_err(|error| error.to_string())
    }

    /// What is spawned here runs on the clients' machine.
    pub fn clients(&self) -> Handle {
        self.clients.as_ref().expect("it ends with the network").handle().clone()
    }

    pub fn address(&self, name: &str) -> Ipv4Addr {
        self.switch.places[self.at(name)].address
    }

    /// Starts a process on a machine of the network.
    pub fn spawn(&self, name: &str, command: &mut Command) -> std::io::Result<std::process::Child> {
        let namespace = &self.switch.places[self.at(name)].namespace;
        std::thread::scope(|scope| {
            let spawned = scope.spawn(|| {
                enter(namespace)?;
                command.spawn()
            });
            spawned.join().expect("it does not panic")
        })
    }

    /// What happens to packets from each of `from` to each of `to` from now on.
    pub fn set(&self, from: &[&str], to: &[&str], link: &Link) {
        let mut pairs = self.switch.pairs();
        for (from, to) in from.iter().flat_map(|from| to.iter().map(move |to| (from, to))) {
            if from != to {
                pairs.entry((self.at(from), self.at(to))).or_default().link = link.clone();
            }
        }
    }

    /// The same in both directions.
    pub fn set_both(&self, some: &[&str], others: &[&str], link: &Link) {
        self.set(some, others, link);
        self.set(others, some, link);
    }

    /// All links are whole again. Packets that were lost or held back since the last time.
    pub fn heal(&self) -> u64 {
        std::mem::take(&mut *self.switch.pairs()).values().map(|pair| pair.struck).sum()
    }

    fn at(&self, name: &str) -> usize {
        self.names.iter().position(|known| known == name).unwrap_or_else(|| panic!("no machine {name}"))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.switch.stop.store(true, Ordering::Relaxed);
        self.switch.woken.notify_all();
        if let Some(clients) = self.clients.take() {
            clients.shutdown_background();
        }
    }
}

impl Place {
    /// Moves the calling thread into a namespace of its own that has one device, ares0, at 10.77.0.`at + 1`.
    fn make(at: usize) -> Result<Self, String> {
        // SAFETY: descriptors and memory stay shared; the network alone is parted.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(|error| format!("no namespace: {error}"))?;
        let device = tun().map_err(|error| format!("/dev/net/tun: {error}"))?;
        let address = Ipv4Addr::new(10, 77, 0, u8::try_from(at + 1).map_err(|_| "at most 254 machines")?);
        for args in
            ["link set lo up".to_owned(), format!("address add {address}/24 dev ares0"), "link set ares0 up".to_owned()]
        {
            let done = Command::new("ip").args(args.split(' ')).output().map_err(|error| format!("ip: {error}"))?;
            if !done.status.success() {
                return Err(format!("ip {args}: {}", String::from_utf8_lossy(&done.stderr).trim()));
            }
        }
        let namespace = File::open("/proc/thread-self/ns/net").map_err(|error| error.to_string())?;
        Ok(Self { address, namespace, device })
    }
}

fn tun() -> std::io::Result<File> {
    /// `TUNSETIFF`, which takes a `struct ifreq`: the name in 16 bytes, then the flags.
    const SET_INTERFACE: rustix::ioctl::Opcode = 0x4004_54ca;
    /// `IFF_TUN | IFF_NO_PI`: whole IP packets and nothing else.
    const FLAGS: u16 = 0x1001;
    let device = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0_u8; 40];
    request[..5].copy_from_slice(b"ares0");
    request[16..18].copy_from_slice(&FLAGS.to_ne_bytes());
    // SAFETY: the request reads one `struct ifreq` of 40 bytes.
    unsafe { rustix::ioctl::ioctl(&device, rustix::ioctl::Setter::<SET_INTERFACE, [u8; 40]>::new(request)) }?;
    Ok(device)
}

fn enter(namespace: &File) -> std::io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

impl Switch {
    fn pairs(&self) -> MutexGuard<'_, BTreeMap<(usize, usize), Pair>> {
        self.pairs.lock().expect("nobody panics with it")
    }

    fn carry_from(&self, from: usize, mut rng: StdRng) {
        let device = &self.places[from].device;
        let look = rustix::time::Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
        let mut buffer = [0; LARGEST_PACKET];
        let mut number = (from as u64) << 48;
        while !self.stop.load(Ordering::Relaxed) {
            // An interruption or a time without packets: look whether to go on.
            if !matches!(poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&look)), Ok(ready) if ready > 0) {
                continue;
            }
            let mut reader = device;
            let Ok(length) = reader.read(&mut buffer) else { continue };
            let packet = &buffer[..length];
            let Some(to) = self.target(packet) else { continue };
            match self.fate(from, to, length, &mut rng) {
                Fate::Lost => {}
                Fate::Now => self.deliver(to, packet),
                Fate::Later(due) => {
                    number += 1;
                    let late = Late { due, number, to, packet: packet.to_vec() };
                    self.late.lock().expect("nobody panics with it").push(Reverse(late));
                    self.woken.notify_one();
                }
            }
        }
    }

    /// Whose address an IPv4 packet goes to; others (IPv6 neighbours' talk) go nowhere.
    fn target(&self, packet: &[u8]) -> Option<usize> {
        let target: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
        (packet[0] >> 4 == 4).then(|| self.places.iter().position(|place| place.address.octets() == target))?
    }

    fn fate(&self, from: usize, to: usize, bytes: usize, rng: &mut StdRng) -> Fate {
        let mut pairs = self.pairs();
        let Some(pair) = pairs.get_mut(&(from, to)) else { return Fate::Now };
        let fate = pair.fate(bytes, Instant::now(), rng);
        pair.struck += u64::from(!matches!(fate, Fate::Now));
        fate
    }

    fn deliver(&self, to: usize, packet: &[u8]) {
        let mut device = &self.places[to].device;
        // A machine that takes no more has lost the packet, as on any network.
        let _ = device.write(packet);
    }

    fn deliver_late(&self) {
        let mut late = self.late.lock().expect("nobody panics with it");
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            let due = late.peek().map(|next| next.0.due);
            if due.is_some_and(|due| due <= now) {
                let Reverse(next) = late.pop().expect("there is one");
                drop(late);
                self.deliver(next.to, &next.packet);
                late = self.late.lock().expect("nobody panics with it");
                continue;
            }
            let wait = due.map_or(Duration::from_millis(200), |due| due - now);
            late = self.woken.wait_timeout(late, wait).expect("nobody panics with it").0;
        }
    }
}

#[derive(Debug, PartialEq)]
enum Fate {
    Lost,
    Now,
    Later(Instant),
}

impl Pair {
    fn fate(&mut self, bytes: usize, now: Instant, rng: &mut StdRng) -> Fate {
        if self.link.loss > 0.0 && rng.random_range(0.0..1.0) < self.link.loss {
            return Fate::Lost;
        }
        let mut due = now;
        if let Some(rate) = self.link.rate {
            let start = self.busy.unwrap_or(now).max(now);
            if start - now > LONGEST_QUEUE {
                return Fate::Lost;
            }
            due = start + Duration::from_secs_f64(bytes as f64 / f64::from(rate));
            self.busy = Some(due);
        }
        due += self.link.delay.mul_f64(rng.random_range(0.0..1.0));
        if due > now { Fate::Later(due) } else { Fate::Now }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fates(link: Link, packets: usize) -> Vec<Fate> {
        let (mut pair, now, mut rng) = (Pair { link, ..Pair::default() }, Instant::now(), StdRng::seed_from_u64(1));
        (0..packets).map(|_| pair.fate(1_000, now, &mut rng)).collect()
    }

    #[test]
    fn a_link_does_what_it_is_told() {
        assert!(fates(Link::default(), 100).iter().all(|fate| *fate == Fate::Now));
        assert!(fates(Link::cut(), 100).iter().all(|fate| *fate == Fate::Lost));
        let lost = fates(Link { loss: 0.1, ..Link::default() }, 1_000).iter().filter(|f| **f == Fate::Lost).count();
        assert!((60..140).contains(&lost), "{lost} of 1000");
        let delayed = fates(Link { delay: Duration::from_millis(50), ..Link::default() }, 100);
        let overtaken = delayed.windows(2).filter(|two| matches!(two, [Fate::Later(a), Fate::Later(b)] if b < a));
        assert!(overtaken.count() > 20);
    }

    #[test]
    fn a_slow_link_queues_and_then_drops() {
        let sent = fates(Link { rate: Some(10_000), ..Link::default() }, 20);
        let lost = sent.iter().filter(|fate| **fate == Fate::Lost).count();
        // 0.1 s each: six begin within the queue's half second.
        assert_eq!((sent.len() - lost, lost), (6, 14));
    }

    #[test]
    fn packets_pass_until_the_link_is_cut() {
        if let Err(why) = Network::available() {
            eprintln!("SKIPPED: no network can be made here: {why}");
            return;
        }
        let network = Network::make(&["a"], 1).expect("it was available");
        let addresses = [network.address("a"), network.address(CLIENTS)];
        let bind = |at: usize| async move { tokio::net::UdpSocket::bind((addresses[at], 7000)).await };
        let there = network.clients().block_on(async { network.clients().spawn(bind(1)).await });
        let there = there.expect("it does not panic").expect("the clients' address");
        let from = Command::new("bash")
            .args(["-c", &format!("for i in 1 2 3; do echo hi > /dev/udp/{}/7000; sleep 0.1; done", addresses[1])])
            .status();
        assert!(from.is_ok_and(|status| status.success()), "the harness is on the network");
        let receive = async {
            let mut buffer = [0; 16];
            tokio::time::timeout(Duration::from_secs(2), there.recv_from(&mut buffer)).await.map(|got| got.is_ok())
        };
        assert_eq!(network.clients().block_on(receive), Ok(true));
        network.set(&["a"], &[CLIENTS], &Link::cut());
        let mut send = Command::new("bash");
        send.args(["-c", &format!("for i in 1 2 3; do echo cut > /dev/udp/{}/7000; done", addresses[1])]);
        let mut sent = network.spawn("a", &mut send).expect("bash starts");
        assert!(sent.wait().is_ok_and(|status| status.success()));
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(network.heal(), 3);
    }
}
