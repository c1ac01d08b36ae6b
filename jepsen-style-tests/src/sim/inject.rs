//! Faults at work: how each begins and ends. A fault that finds nothing to break (no leader to isolate, no shim to kill) does not count
//! as one that took effect.

use super::event::Event;
use super::fault::Fault;
use super::machine::Machine;
use super::net::Cut;
use super::users::Wish;
use super::world::World;
use statemachine::command::NodeOut;
use statemachine::{Command, NodeId};

/// Machines may lose so many GPUs in sum: every shape must find a place in the end.
const LOST_GPUS: u64 = 6;
/// Longer than most leases.
const MUTE_AFTER_MS: u64 = 20_000;
/// For how long an agent is heard between two cuts: one heartbeat is in it.
const LATE_WORD_MS: u64 = 3_000;

impl World {
    pub fn inject(&mut self, fault: Fault) {
        let fault = self.aimed(fault);
        if self.healed_at.is_some() || !self.begin(&fault) {
            return;
        }
        *self.took.entry(fault.kind()).or_default() += 1;
        self.trace.say(self.now, || format!("fault {fault:?}"));
        let lasts_ms = fault.lasts_ms();
        if lasts_ms > 0 {
            self.after(lasts_ms * 1_000, Event::FaultOver(fault));
        }
    }

    /// A late word matters to an agent that begins something on it.
    fn aimed(&self, fault: Fault) -> Fault {
        let Fault::LateWord { agent, by_ms, for_ms } = fault else { return fault };
        let starts_soon = |machine: &Machine| machine.agent.as_ref().is_some_and(|process| process.core.starts_soon());
        Fault::LateWord { agent: self.machines.iter().position(starts_soon).unwrap_or(agent), by_ms, for_ms }
    }

    fn lasting(&self) -> Option<usize> {
        self.raft.leader.filter(|leader| self.replicas[*leader].awake(self.now))
    }

    /// Did it take effect?
    fn begin(&mut self, fault: &Fault) -> bool {
        let now = self.now;
        match *fault {
            Fault::Loss { permille, .. } => self.net.loss_permille = permille,
            Fault::Delay { mean_ms, .. } => self.net.extra_ms = mean_ms,
            Fault::Duplicate { permille, .. } => self.net.duplicate_permille = permille,
            Fault::IsolateLeader { with, .. } => {
                let Some(leader) = self.lasting() else { return false };
                if self.replicas[leader].desk.is_none() {
                    return false;
                }
                self.net.cuts.push(Cut::Island { replicas: 1 << leader, agents: with });
            }
            Fault::Mute { replica, .. } => self.net.cuts.push(Cut::Mute(replica)),
            Fault::Halves { mask, .. } => self.net.cuts.push(Cut::Halves(mask)),
            Fault::FollowersOnly { agent, .. } => {
                let Some(replica) = self.lasting() else { return false };
                self.net.cuts.push(Cut::Hidden { agent, replica });
            }
            Fault::DeafAgent { agent, .. } => self.net.cuts.push(Cut::Deaf(agent)),
            Fault::MuteAgent { agent, .. } => self.net.cuts.push(Cut::MuteAgent(agent)),
            Fault::SlowWords { agent, by_ms, for_ms } => {
                self.net.slow_words_us.insert(agent, by_ms * 1_000);
                let mute = Fault::MuteAgent { agent, for_ms: MUTE_AFTER_MS };
                self.after(for_ms * 1_000, Event::Fault(mute));
            }
            Fault::LateWord { agent, by_ms, for_ms } => {
                self.net.cuts.push(Cut::Parted(agent));
                let slow = Fault::SlowDisk { by_ms, for_ms: LATE_WORD_MS + by_ms };
                self.after(for_ms.saturating_sub(LATE_WORD_MS) * 1_000, Event::Fault(slow));
                for again in [
                    Fault::MuteAgent { agent, for_ms: MUTE_AFTER_MS },
                    Fault::DeafAgent { agent, for_ms: MUTE_AFTER_MS },
                ] {
                    self.after((for_ms + LATE_WORD_MS) * 1_000, Event::Fault(again));
                }
            }
            Fault::UsersSeeOne { .. } => {
                let Some(replica) = self.lasting() else { return false };
                self.net.cuts.push(Cut::UsersSee(replica));
            }
            Fault::CrashReplica { replica, .. } | Fault::Outage { replica, .. } => {
                if !self.replicas[replica].up {
                    return false;
                }
                self.crash_replica(replica);
            }
            Fault::CrashLeader { .. } => {
                let Some(leader) = self.lasting() else { return false };
                if self.granted_unseen() {
                    self.sometimes.hit("a leader was lost between a grant and its receipt");
                }
                self.crash_replica(leader);
            }
            Fault::PauseReplica { replica, for_ms } => {
                return self.replicas[replica].awake(now) && self.pause_replica(replica, for_ms);
            }
            Fault::PauseLeader { for_ms } => {
                let Some(leader) = self.lasting() else { return false };
                return self.pause_replica(leader, for_ms);
            }
            Fault::Transfer => {
                let before = self.raft.leader;
                let next = before.map_or(0, |leader| (leader + 1) % self.replicas.len());
                self.elect(Some(next));
                return self.raft.leader != before;
            }
            Fault::SlowDisk { by_ms, .. } => {
                let Some(leader) = self.lasting() else { return false };
                self.replicas[leader].disk_us = by_ms * 1_000;
            }
            Fault::WallLeap { replica, by_ms } => self.replicas[replica].clock.wall_offset_ms += by_ms,
            Fault::CrashAgent { agent, .. } => {
                if self.machines[agent].agent.is_none() {
                    return false;
                }
                self.kill_agent(agent);
            }
            Fault::PauseAgent { agent, for_ms } => {
                let until = now + for_ms * 1_000;
                self.machines[agent].agent_paused_until = until;
                return self.machines[agent].agent.is_some();
            }
            Fault::Suspend { agent, for_ms } => {
                if !self.machines[agent].up || self.machines[agent].asleep_until > now {
                    return false;
                }
                let slept_us = for_ms * 1_000;
                self.machines[agent].asleep_until = now + slept_us;
                self.after(slept_us, Event::Wake { agent, slept_us });
            }
            Fault::Reboot { agent, .. } => {
                if !self.machines[agent].up || self.machines[agent].asleep_until > now {
                    return false;
                }
                self.cut_power(agent);
            }
            Fault::KillShim { agent, nth } => {
                let count = self.machines[agent].shims.len() as u64;
                let key = self.machines[agent].shims.keys().nth((nth % count.max(1)) as usize).copied();
                return key.is_some_and(|key| self.machines[agent].asleep_until <= now && self.kill_shim(agent, key));
            }
            Fault::KillAll { agent, .. } => {
                if self.machines[agent].agent.is_none() || self.machines[agent].asleep_until > now {
                    return false;
                }
                self.kill_agent_and_shims(agent);
            }
            Fault::Stubborn { agent, by_ms, for_ms } => {
                self.machines[agent].stubborn_until = now + for_ms * 1_000;
                self.machines[agent].kill_us = by_ms * 1_000;
            }
            Fault::LoseFence { agent } => {
                if self.machines[agent].agent.is_none() || self.machines[agent].asleep_until > now {
                    return false;
                }
                self.kill_agent(agent);
                self.machines[agent].disk.fence_lost = true;
                self.after(1_000_000, Event::StartAgent { agent });
            }
            Fault::LoseGpu { agent, slot } => {
                let slot = slot as usize % self.setup.gpus;
                let lost = self.took.get("lose_gpu").copied().unwrap_or(0);
                if lost >= LOST_GPUS || self.machines[agent].gpu_health[slot] != "OK" {
                    return false;
                }
                self.report_gpu(agent, slot);
            }
            Fault::BadMachine { agent, for_ms } => self.machines[agent].bad_until = now + for_ms * 1_000,
            Fault::WrongPlanner { for_ms } => self.planner_wrong_until = now + for_ms * 1_000,
            Fault::Drain { agent, evict_ms, .. } => {
                let node = self.machines[agent].agent.as_ref().map_or(0, |process| process.core.node_id());
                if node == 0 {
                    return false;
                }
                let out = Some(NodeOut { reason: "maintenance".into(), evict_in_ms: Some(evict_ms) });
                let command = Command::NodeAdmin { node: NodeId(node), out };
                self.wish_after(1, Wish::Operate(Box::new(command)));
            }
        }
        true
    }

    fn pause_replica(&mut self, replica: usize, for_ms: u64) -> bool {
        self.replicas[replica].paused_until = self.now + for_ms * 1_000;
        true
    }

    /// A lease was granted of which no agent has started anything.
    fn granted_unseen(&self) -> bool {
        let Some(leader) = self.raft.leader else { return false };
        let held = |lease: &statemachine::record::Lease| {
            lease.parts.iter().all(|part| part.state == statemachine::record::PartState::Held)
        };
        self.replicas[leader].state.leases.iter().any(|(_, lease)| held(&lease.value))
    }

    pub fn lift(&mut self, fault: &Fault) {
        match *fault {
            Fault::Loss { .. } => self.net.loss_permille = 0,
            Fault::Delay { .. } => self.net.extra_ms = 0,
            Fault::Duplicate { .. } => self.net.duplicate_permille = 0,
            Fault::IsolateLeader { .. } => self.uncut(|cut| matches!(cut, Cut::Island { .. })),
            Fault::Mute { replica, .. } => self.uncut(|cut| *cut == Cut::Mute(replica)),
            Fault::Halves { mask, .. } => self.uncut(|cut| *cut == Cut::Halves(mask)),
            Fault::FollowersOnly { agent, .. } => {
                self.uncut(|cut| matches!(cut, Cut::Hidden { agent: hidden, .. } if *hidden == agent));
            }
            Fault::DeafAgent { agent, .. } => self.uncut(|cut| *cut == Cut::Deaf(agent)),
            Fault::MuteAgent { agent, .. } => self.uncut(|cut| *cut == Cut::MuteAgent(agent)),
            Fault::SlowWords { agent, .. } => {
                self.net.slow_words_us.remove(&agent);
            }
            Fault::LateWord { agent, .. } => self.uncut(|cut| *cut == Cut::Parted(agent)),
            Fault::UsersSeeOne { .. } => self.uncut(|cut| matches!(cut, Cut::UsersSee(_))),
            Fault::CrashReplica { replica, .. } | Fault::Outage { replica, .. } => self.restart_replica(replica),
            Fault::CrashLeader { .. } => {
                // Only one replica at a time is away by this fault.
                if let Some(down) = (0..self.replicas.len()).find(|at| !self.replicas[*at].up) {
                    self.restart_replica(down);
                }
            }
            Fault::SlowDisk { .. } => self.replicas.iter_mut().for_each(|replica| replica.disk_us = 0),
            Fault::CrashAgent { agent, .. } | Fault::KillAll { agent, .. } => self.start_agent(agent),
            Fault::Reboot { agent, .. } => {
                self.machines[agent].up = true;
                self.start_agent(agent);
            }
            Fault::Drain { agent, .. } => {
                let node = self.machines[agent].agent.as_ref().map_or(0, |process| process.core.node_id());
                if node > 0 {
                    let command = Command::NodeAdmin { node: NodeId(node), out: None };
                    self.wish_after(1, Wish::Operate(Box::new(command)));
                }
            }
            _ => {}
        }
    }

    fn uncut(&mut self, lifted: impl Fn(&Cut) -> bool) {
        if let Some(at) = self.net.cuts.iter().position(lifted) {
            self.net.cuts.remove(at);
        }
    }

    /// The faults are over. In half of the runs a minority of the replicas stays away.
    pub fn heal(&mut self) {
        self.healed_at = Some(self.now);
        self.planner_wrong_until = 0;
        self.net.cuts.clear();
        self.net.slow_words_us.clear();
        (self.net.loss_permille, self.net.duplicate_permille, self.net.extra_ms) = (0, 0, 0);
        let away = self.setup.stays_broken.then_some(self.setup.seed as usize % self.replicas.len());
        for at in 0..self.replicas.len() {
            self.replicas[at].paused_until = self.replicas[at].paused_until.min(self.now);
            self.replicas[at].disk_us = 0;
            // Somebody sets the clocks right.
            self.replicas[at].clock.wall_offset_ms = 0;
            if Some(at) == away && self.replicas[at].received < self.committed() {
                self.crash_replica(at);
            } else {
                self.restart_replica(at);
            }
        }
        for agent in 0..self.machines.len() {
            let machine = &mut self.machines[agent];
            machine.up = true;
            machine.agent_paused_until = 0;
            machine.bad_until = 0;
            machine.stubborn_until = 0;
            // A machine that sleeps wakes by itself.
            let wait = machine.asleep_until.saturating_sub(self.now) + 1;
            self.after(wait, Event::StartAgent { agent });
        }
        self.trace.say(self.now, || "the faults are over".to_owned());
    }
}
