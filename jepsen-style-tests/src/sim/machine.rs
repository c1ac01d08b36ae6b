//! The GPU machines: what is on their disks, which shims watch which processes, and how a killed process dies. Shims decide by the
//! real [`Watch`]; everything here is what the kernel and the disk would do. Which process runs where is told to the auditor.

use std::collections::BTreeMap;

use gpu_agent::agent::fence;
use gpu_agent::agent::part::Rank;
use gpu_agent::shim::control::Stop;
use gpu_agent::shim::record::{Exit, Outcome};
use gpu_agent::shim::watch::{Do, Seen, Watch};

use super::agent::AgentProcess;
use super::event::{Event, Process};
use super::net::Clock;
use super::world::World;

const SLOW_KILLS_PERMILLE: u64 = 150;

/// What a job's rank does, as its body says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Script {
    pub run_ms: u64,
    /// Each rank of a machine runs so much longer than the one before it.
    pub apart_ms: u64,
    pub code: i32,
    /// From SIGTERM to its end, and the exit code then; `None` = it does not care.
    pub on_term: Option<(u64, i32)>,
    /// Leaves a descendant that ends only when it is killed.
    pub forks: bool,
}

impl Script {
    pub fn argv(&self) -> Vec<String> {
        let (term, code) = self.on_term.map_or((String::from("-"), 0), |(ms, code)| (ms.to_string(), code));
        let (run, apart, own) = (self.run_ms.to_string(), self.apart_ms.to_string(), self.code.to_string());
        let words = [run, apart, own, term, code.to_string(), u8::from(self.forks).to_string()];
        std::iter::once("script".to_owned()).chain(words).collect()
    }

    pub fn parse(argv: &[String]) -> Option<Self> {
        let [_, run_ms, apart_ms, code, term, term_code, forks] = argv else { return None };
        Some(Self {
            run_ms: run_ms.parse().ok()?,
            apart_ms: apart_ms.parse().ok()?,
            code: code.parse().ok()?,
            on_term: term.parse().ok().map(|ms| (ms, term_code.parse().unwrap_or(0))),
            forks: forks == "1",
        })
    }
}

pub type Key = (u64, u32);

/// An attempt's directory.
#[derive(Clone, Debug)]
pub struct Kept {
    pub lease: proto::v1::DesiredLease,
    pub open: bool,
    pub port: u32,
    pub boot: u64,
    /// By local rank.
    pub exits: BTreeMap<u32, Outcome>,
}

#[derive(Clone, Debug, Default)]
pub struct Disk {
    pub fence: fence::Content,
    pub fence_lost: bool,
    pub attempts: BTreeMap<u64, Kept>,
}

pub struct Shim {
    watch: Watch,
    pub deadline: u64,
    pub stop: Option<Stop>,
    pub open: bool,
    pub started: bool,
    script: Option<Script>,
    /// The rank's own process.
    running: bool,
    descendants: bool,
    exit: Option<Exit>,
    killing: bool,
    serial: u64,
}

impl Shim {
    pub fn new(watch: Watch, deadline: u64, open: bool, script: Option<Script>) -> Self {
        Self {
            watch,
            deadline,
            stop: None,
            open,
            started: false,
            script,
            running: false,
            descendants: false,
            exit: None,
            killing: false,
            serial: 0,
        }
    }
}

pub struct Machine {
    pub name: String,
    pub clock: Clock,
    pub boot: u64,
    pub up: bool,
    pub asleep_until: u64,
    pub agent_paused_until: u64,
    /// Grows with each process of an agent.
    pub life: u64,
    pub agent: Option<Box<AgentProcess>>,
    pub disk: Disk,
    pub shims: BTreeMap<Key, Shim>,
    /// Ranks whose shim died and left processes behind, on a machine where nothing else kills them.
    pub strays: BTreeMap<Key, ()>,
    pub gpus: Vec<String>,
    pub gpu_health: Vec<&'static str>,
    /// Until then a SIGKILL takes `kill_us`.
    pub stubborn_until: u64,
    pub kill_us: u64,
    pub bad_until: u64,
}

impl World {
    /// Hands the shim what it sees and does what it decides.
    pub fn shim_step(&mut self, agent: usize, key: Key, seen: Seen) {
        let now_ms = self.machines[agent].clock.deadline_ms(self.now);
        let Some(shim) = self.machines[agent].shims.get_mut(&key) else { return };
        for what in shim.watch.step(seen, now_ms) {
            match what {
                Do::Start => self.start_rank(agent, key),
                Do::Signal(_) => self.terminate(agent, key),
                Do::KillAll => self.kill_rank(agent, key),
                Do::Record(outcome) => return self.record(agent, key, outcome),
            }
        }
        self.shim_sleeps(agent, key);
    }

    /// The control page, read again: the timer fired, or the agent woke the shim.
    pub fn shim_looks(&mut self, agent: usize, key: Key) {
        let Some(shim) = self.machines[agent].shims.get(&key) else { return };
        let seen = Seen::Page { deadline: shim.deadline, stop: shim.stop, open: shim.open };
        self.shim_step(agent, key, seen);
    }

    fn shim_sleeps(&mut self, agent: usize, key: Key) {
        let now = self.now;
        let machine = &mut self.machines[agent];
        let boot = machine.boot;
        let Some(shim) = machine.shims.get_mut(&key) else { return };
        let Some(wake) = shim.watch.next_wake() else { return };
        shim.serial += 1;
        let serial = shim.serial;
        let at = machine.clock.when_deadline(wake).max(now + 500);
        let late = self.rng.range(10, 3_000);
        self.after(at - now + late, Event::Shim { agent, boot, key, serial });
    }

    pub fn shim_wakes(&mut self, agent: usize, boot: u64, key: Key, serial: u64) {
        let machine = &self.machines[agent];
        let due = machine.boot == boot && machine.shims.get(&key).is_some_and(|shim| shim.serial == serial);
        if due {
            self.shim_looks(agent, key);
        }
    }

    fn start_rank(&mut self, agent: usize, key: Key) {
        let boot = self.machines[agent].boot;
        let Some(shim) = self.machines[agent].shims.get_mut(&key) else { return };
        shim.running = true;
        shim.descendants = shim.script.is_some_and(|script| script.forks);
        let wait = self.rng.range(800, 6_000);
        self.after(wait, Event::Process { agent, boot, key, what: Process::Runs });
        self.rank_began(agent, key);
    }

    fn terminate(&mut self, agent: usize, key: Key) {
        let boot = self.machines[agent].boot;
        let Some(shim) = self.machines[agent].shims.get(&key) else { return };
        if let Some((wait_ms, code)) = shim.script.and_then(|script| script.on_term) {
            self.after(wait_ms * 1_000 + 200, Event::Process { agent, boot, key, what: Process::Ends { code } });
        }
    }

    fn kill_rank(&mut self, agent: usize, key: Key) {
        let now = self.now;
        let machine = &mut self.machines[agent];
        let boot = machine.boot;
        let stubborn = machine.stubborn_until > now;
        let kill_us = machine.kill_us;
        let Some(shim) = machine.shims.get_mut(&key) else { return };
        if std::mem::replace(&mut shim.killing, true) {
            return;
        }
        let alive = shim.running || shim.descendants;
        let wait = match () {
            () if stubborn && alive => kill_us,
            // What holds memory or waits for a device dies late, within what the lease's margin allows for.
            () if self.rng.chance(SLOW_KILLS_PERMILLE) => self.rng.range(50_000, 1_800_000),
            () => self.rng.range(20, 15_000),
        };
        if stubborn && alive && wait > 2_000_000 {
            // Longer than the margin: here the assumption ends, and only the token protects.
            self.excuse(agent, key, u64::MAX);
            self.sometimes.hit("a process outlived its SIGKILL by more than the margin");
        }
        self.after(wait, Event::Process { agent, boot, key, what: Process::Killed });
    }

    pub fn process(&mut self, agent: usize, boot: u64, key: Key, what: Process) {
        if self.machines[agent].boot != boot {
            return;
        }
        if let Some(shim) = self.machines[agent].shims.get_mut(&key) {
            match what {
                Process::Runs if shim.running => {
                    shim.started = true;
                    if let Some(script) = shim.script {
                        let ends = Event::Process { agent, boot, key, what: Process::Ends { code: script.code } };
                        let run_ms = script.run_ms + u64::from(key.1) * script.apart_ms;
                        self.after(run_ms * 1_000, ends);
                    }
                    self.shim_step(agent, key, Seen::Started);
                    self.tell_rank(agent, key, Rank::Started);
                }
                Process::Ends { code } if shim.running => {
                    let exit = Exit { code, signal: 0 };
                    shim.running = false;
                    shim.exit = Some(exit);
                    let gone = !shim.descendants;
                    self.rank_ended(agent, key, exit);
                    self.shim_step(agent, key, Seen::RankEnded(exit));
                    if gone {
                        self.all_gone(agent, key);
                    }
                }
                Process::Killed => {
                    shim.killing = false;
                    shim.descendants = false;
                    if std::mem::replace(&mut shim.running, false) {
                        let exit = Exit { code: 0, signal: 9 };
                        shim.exit = Some(exit);
                        self.rank_ended(agent, key, exit);
                        self.shim_step(agent, key, Seen::RankEnded(exit));
                    }
                    self.all_gone(agent, key);
                }
                _ => {}
            }
        } else if what == Process::Killed && self.machines[agent].strays.remove(&key).is_some() {
            self.rank_gone(agent, key);
            self.tell_rank(agent, key, Rank::Vanished);
        }
    }

    fn all_gone(&mut self, agent: usize, key: Key) {
        self.rank_gone(agent, key);
        self.shim_step(agent, key, Seen::AllGone);
    }

    /// The exit record, synced; the shim is no more.
    fn record(&mut self, agent: usize, key: Key, outcome: Outcome) {
        let machine = &mut self.machines[agent];
        machine.shims.remove(&key);
        if let Some(kept) = machine.disk.attempts.get_mut(&key.0) {
            kept.exits.insert(key.1, outcome.clone());
        }
        if machine.agent.is_none() {
            self.sometimes.hit("a shim ended its rank after the agent had died");
        }
        self.tell_rank(agent, key, Rank::Ended(outcome));
    }

    /// What the agent's watcher tells it a moment later.
    fn tell_rank(&mut self, agent: usize, key: Key, rank: Rank) {
        let machine = &self.machines[agent];
        if machine.agent.is_none() {
            return;
        }
        let life = machine.life;
        let event = Box::new(gpu_agent::agent::core::Event::Rank { token: key.0, local: key.1, rank });
        let wait = self.rng.range(50, 4_000);
        self.after(wait, Event::Agent { agent, life, event });
    }

    /// The shim dies without a record. Where its death kills the ranks, they are gone with it; else they are left behind.
    pub fn kill_shim(&mut self, agent: usize, key: Key) -> bool {
        let boot = self.machines[agent].boot;
        let Some(shim) = self.machines[agent].shims.remove(&key) else { return false };
        let alive = shim.running || shim.descendants;
        if !alive {
            self.rank_gone(agent, key);
            self.tell_rank(agent, key, Rank::Vanished);
        } else if self.setup.weak {
            self.machines[agent].strays.insert(key, ());
            if self.machines[agent].agent.is_some() {
                // The watcher sweeps until nothing is found.
                self.after(25_000, Event::Process { agent, boot, key, what: Process::Killed });
            }
        } else {
            if shim.running {
                self.rank_ended(agent, key, Exit { code: 0, signal: 9 });
            }
            self.rank_gone(agent, key);
            self.tell_rank(agent, key, Rank::Vanished);
        }
        true
    }

    /// The power fails: nothing runs any more; the disk keeps what was synced.
    pub fn cut_power(&mut self, agent: usize) {
        self.kill_agent(agent);
        let machine = &mut self.machines[agent];
        machine.boot += 1;
        machine.up = false;
        let mut keys: Vec<Key> = std::mem::take(&mut machine.shims).into_keys().collect();
        keys.extend(std::mem::take(&mut machine.strays).into_keys());
        for key in keys {
            self.rank_gone(agent, key);
        }
    }

    /// The machine slept: its boot clock counted the time, its monotonic clock did not. Processes that ran go on.
    pub fn wake_machine(&mut self, agent: usize, slept_us: u64) {
        self.machines[agent].clock.slept_us += slept_us;
        let keys: Vec<Key> = self.machines[agent].shims.keys().copied().collect();
        for key in keys {
            // The kernel's timers fire late rather than never: what is planned meanwhile is run through now.
            self.shim_sleeps(agent, key);
            self.rank_woke(agent, key);
        }
    }
}
