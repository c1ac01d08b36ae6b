//! An agent's process: the real [`Core`], and around it what its shell does with files, shims and calls. Mirrors `gpu_agent::agent`'s
//! `run`, `launcher`, `attach` and `session`, without their IO.

use std::sync::Arc;

use gpu_agent::agent::core::{Action, Core, Event as Told, Launch, Listing};
use gpu_agent::agent::fence::Live;
use gpu_agent::agent::part::{Part, Rank};
use gpu_agent::shim::control::Stop;
use gpu_agent::shim::record::Outcome;
use gpu_agent::shim::watch::Watch;
use proto::v1;

use super::event::{Answer, Event, Rpc, Site, Word};
use super::machine::{Kept, Script, Shim};
use super::users::Owner;
use super::world::World;

/// Agents' calls give up after this long, a try at one replica after the second.
const CALL_MS: u64 = 15_000;
const TRY_MS: u64 = 2_000;
pub const AGENTS_PER_RACK: usize = 4;
/// The type of the slices that some machines have.
pub const SLICE: &str = "a100-1g.5gb";

pub struct AgentProcess {
    pub core: Core,
    generation: u64,
    /// The stream under way: replica and its name there.
    conn: Option<(usize, u64)>,
    sent_until: u64,
    fence_new: bool,
    max_token: u64,
    tick_at: u64,
}

impl World {
    /// The process starts, and finds what its predecessor left.
    pub fn start_agent(&mut self, agent: usize) {
        let now = self.now;
        let machine = &mut self.machines[agent];
        if machine.agent.is_some() || !machine.up {
            return;
        }
        machine.life += 1;
        let fence_new = std::mem::take(&mut machine.disk.fence_lost);
        if fence_new {
            machine.disk.fence = Default::default();
        }
        let (boot, now_ms) = (machine.boot, machine.clock.deadline_ms(now));
        let mut core = Core::new((machine.disk.fence.incarnation, machine.disk.fence.index));
        let mut tokens: Vec<u64> = machine.disk.attempts.keys().copied().collect();
        tokens.extend(machine.disk.fence.live.keys());
        tokens.sort_unstable();
        tokens.dedup();
        let mut swept = Vec::new();
        let mut attached = 0;
        for token in tokens {
            let settled = !fence_new && !machine.disk.fence.live.contains_key(&token);
            let kept = machine.disk.attempts.get(&token).cloned().or_else(|| {
                let live = machine.disk.fence.live.get(&token)?;
                let lease = v1::DesiredLease {
                    token,
                    job_id: live.job_id,
                    first_rank: live.first_rank,
                    ranks: live.ranks,
                    gpu_uuids: live.gpus.clone(),
                    ..Default::default()
                };
                Some(Kept { lease, open: false, port: 0, boot, exits: Default::default() })
            });
            let Some(kept) = kept else { continue };
            let mut part = Part::new(&kept.lease, Rank::Vanished);
            for local in 0..kept.lease.ranks {
                let shim = machine.shims.get(&(token, local)).filter(|_| kept.boot == boot);
                part.ranks[local as usize] = match (kept.exits.get(&local), shim) {
                    (Some(outcome), _) => Rank::Ended(outcome.clone()),
                    (None, Some(shim)) if shim.started => Rank::Started,
                    (None, Some(_)) => Rank::Waiting,
                    (None, None) => Rank::Vanished,
                };
                if machine.strays.remove(&(token, local)).is_some() {
                    swept.push((token, local));
                }
            }
            part.port = kept.port;
            part.open = kept.open || part.ranks.contains(&Rank::Started);
            attached += u64::from(part.is_alive());
            if !settled {
                machine.disk.fence.add(token, live(&kept.lease));
            }
            let deadline = (0..kept.lease.ranks).filter_map(|local| machine.shims.get(&(token, local)));
            let deadline = deadline.map(|shim| shim.deadline).min().unwrap_or(0);
            core.adopt(token, part, deadline, settled, now_ms);
        }
        let max_token = machine.disk.fence.max_token;
        machine.agent = Some(Box::new(AgentProcess {
            core,
            generation: 0,
            conn: None,
            sent_until: 0,
            fence_new,
            max_token,
            tick_at: u64::MAX,
        }));
        for key in swept {
            self.rank_gone(agent, key);
        }
        if attached > 0 {
            self.sometimes.hit("an agent re-attached to running ranks");
        }
        self.agent_step(agent, Told::Tick);
    }

    pub fn kill_agent(&mut self, agent: usize) {
        let machine = &mut self.machines[agent];
        machine.life += 1;
        machine.agent_paused_until = 0;
        if let Some((replica, conn)) = machine.agent.take().and_then(|process| process.conn) {
            self.hang_up(replica, conn);
        }
    }

    /// The leader's end learns that the stream is over, now or never.
    fn hang_up(&mut self, replica: usize, conn: u64) {
        if self.rng.chance(700)
            && let Some(desk) = self.replicas[replica].desk.as_deref_mut()
        {
            desk.forget(conn);
        }
    }

    pub fn agent_tick(&mut self, agent: usize, life: u64, at: u64) {
        let machine = &self.machines[agent];
        if machine.life == life && machine.agent.as_ref().is_some_and(|process| process.tick_at == at) {
            self.agent_step(agent, Told::Tick);
        }
    }

    pub fn agent_event(&mut self, agent: usize, life: u64, event: Told) {
        if self.machines[agent].life == life {
            self.agent_step(agent, event);
        }
    }

    pub fn to_agent(&mut self, agent: usize, life: u64, generation: u64, word: Word) {
        let machine = &mut self.machines[agent];
        let Some(process) = machine.agent.as_deref_mut() else { return };
        if machine.life != life || process.generation != generation {
            return;
        }
        match word {
            Word::Message(message) => self.agent_step(agent, Told::FromLeader(message)),
            Word::Closed => {
                process.conn = None;
                self.agent_step(agent, Told::Disconnected);
            }
        }
    }

    pub fn agent_step(&mut self, agent: usize, event: Told) {
        let now = self.now;
        let machine = &mut self.machines[agent];
        let now_ms = machine.clock.deadline_ms(now);
        let Some(process) = machine.agent.as_deref_mut() else { return };
        let actions = process.core.step(event, now_ms);
        let wake_ms = process.core.next_wake(now_ms);
        let at = machine.clock.when_deadline(wake_ms).max(now + 1_000);
        if at < process.tick_at || process.tick_at <= now {
            process.tick_at = at;
            let life = machine.life;
            self.after(at - now, Event::AgentTick { agent, life, at });
        }
        for action in actions {
            self.act(agent, action);
        }
    }

    fn act(&mut self, agent: usize, action: Action) {
        let life = self.machines[agent].life;
        let machine = &mut self.machines[agent];
        let Some(process) = machine.agent.as_deref_mut() else { return };
        match action {
            Action::Register(listing) => self.register(agent, listing),
            Action::Connect => {
                process.generation += 1;
                let old = process.conn.take();
                let generation = process.generation;
                let hello = message(process, 0, Vec::new());
                if let Some((replica, conn)) = old {
                    self.hang_up(replica, conn);
                }
                self.agent_call(agent, Rpc::Session { agent, life, generation, hello });
            }
            Action::Heartbeat { number, tokens } => {
                let Some((replica, conn)) = process.conn else { return };
                let message = message(process, number, tokens);
                self.send_beat(agent, replica, conn, message);
            }
            Action::Fetch(jobs) => self.agent_call(agent, Rpc::Fetch(jobs)),
            Action::Launch { set, launches } => {
                let newest = launches.iter().map(|launch| launch.lease.token).max().unwrap_or(0);
                process.max_token = process.max_token.max(newest);
                let wait = self.rng.tail(3_000);
                self.after(wait, Event::Fence { agent, life, set, launches });
            }
            Action::Extend { token, deadline } => {
                for (_, shim) in machine.shims.range_mut((token, 0)..=(token, u32::MAX)) {
                    // Now and then in the last moment: a lease is extended while its rank is told to end.
                    shim.deadline = shim.deadline.max(deadline);
                }
            }
            Action::Open { token, .. } => {
                let keys: Vec<_> = machine.shims.range((token, 0)..=(token, u32::MAX)).map(|(key, _)| *key).collect();
                if let Some(kept) = machine.disk.attempts.get_mut(&token) {
                    kept.open = true;
                }
                for key in keys {
                    if let Some(shim) = self.machines[agent].shims.get_mut(&key) {
                        shim.open = true;
                    }
                    self.shim_looks(agent, key);
                }
            }
            Action::Stop { token, signal, grace_ms } => {
                let keys: Vec<_> = machine.shims.range((token, 0)..=(token, u32::MAX)).map(|(key, _)| *key).collect();
                for key in keys {
                    if let Some(shim) = self.machines[agent].shims.get_mut(&key) {
                        shim.stop = Some(Stop { signal, grace_ms });
                    }
                    self.shim_looks(agent, key);
                }
            }
            Action::Report(items) => {
                let (node_id, epoch) = (process.core.node_id(), process.core.epoch());
                self.agent_call(agent, Rpc::Report(v1::ReportRequest { node_id, epoch, items }));
            }
            Action::Forget(tokens) => {
                for token in tokens {
                    machine.disk.fence.forget(token);
                }
            }
            Action::Leave(_) => {
                self.sometimes.hit("a superseded agent left");
                self.kill_agent(agent);
                // What keeps services alive starts it again.
                self.after(1_000_000, Event::StartAgent { agent });
            }
        }
    }

    fn send_beat(&mut self, agent: usize, replica: usize, conn: u64, message: v1::AgentMessage) {
        let now = self.now;
        let lost = self.net.loses(&mut self.rng);
        let late = if lost { self.rng.range(200_000, 10_000_000) } else { 0 };
        let way = self.net.way(&mut self.rng) + late;
        if !self.net.reaches(Site::Agent(agent), Site::Replica(replica)) {
            return;
        }
        let Some(process) = self.machines[agent].agent.as_deref_mut() else { return };
        let arrives = (now + way).max(process.sent_until + 1);
        process.sent_until = arrives;
        self.after(arrives - now, Event::FromAgent { replica, conn, message });
    }

    fn register(&mut self, agent: usize, listing: Listing) {
        let machine = &self.machines[agent];
        let Some(process) = machine.agent.as_deref() else { return };
        let request = v1::RegisterRequest {
            machine: Some(self.facts(agent)),
            max_token: process.max_token,
            fence_new: process.fence_new,
            running: listing.running,
            finished: listing.finished,
            dead: listing.dead,
            after_epoch: listing.after_epoch,
        };
        self.agent_call(agent, Rpc::Register(Box::new(request)));
    }

    fn agent_call(&mut self, agent: usize, rpc: Rpc) {
        let life = self.machines[agent].life;
        self.call(Owner::Agent { agent, life }, rpc, CALL_MS, TRY_MS);
    }

    /// A call of this agent has its answer, or none.
    pub fn agent_answered(&mut self, agent: usize, life: u64, rpc: &Arc<Rpc>, answer: Option<Answer>) {
        let machine = &mut self.machines[agent];
        let Some(process) = machine.agent.as_deref_mut() else { return };
        if machine.life != life {
            return;
        }
        let event = match (&**rpc, answer) {
            (Rpc::Register(_), Some(Answer::Registered(reply))) if reply.node_id == 0 => {
                self.sometimes.hit("a registration was overtaken by another");
                Told::Overtaken { epoch: reply.epoch }
            }
            (Rpc::Register(_), Some(Answer::Registered(reply))) => Told::Registered(reply),
            (Rpc::Register(_), _) => Told::RegisterFailed,
            (Rpc::Report(_), Some(Answer::Reported(refusals))) => Told::Reported(refusals),
            (Rpc::Report(_), _) => Told::ReportFailed { stale_epoch: false },
            (Rpc::Fetch(_), Some(Answer::Bodies(bodies))) => Told::Bodies(bodies),
            (Rpc::Fetch(_), _) => Told::BodiesFailed,
            (Rpc::Session { generation, .. }, answer) => {
                if *generation != process.generation {
                    return;
                }
                match answer {
                    Some(Answer::Opened { replica, conn }) => {
                        process.conn = Some((replica, conn));
                        process.sent_until = 0;
                        Told::Connected
                    }
                    _ => {
                        let generation = *generation;
                        let word = Word::Closed;
                        return self.after(200_000, Event::ToAgent { agent, life, generation, word });
                    }
                }
            }
            _ => return,
        };
        self.agent_step(agent, event);
    }

    // ------------------------------------------------------------------------------------------------- launcher

    /// The fence file first, synced once for all.
    pub fn fence(&mut self, agent: usize, life: u64, set: (u32, u64), launches: Vec<Launch>) {
        let now = self.now;
        let machine = &mut self.machines[agent];
        if machine.life != life {
            return;
        }
        let bad = machine.bad_until > now;
        let mut taken = Vec::new();
        let mut failed = Vec::new();
        for launch in launches {
            let lease = &launch.lease;
            let fine = !machine.disk.attempts.contains_key(&lease.token)
                && machine.disk.fence.check(lease.token, &lease.gpu_uuids).is_ok();
            if fine && !bad {
                machine.disk.fence.add(lease.token, live(lease));
                taken.push(launch);
            } else {
                failed.push((launch, true));
            }
        }
        (machine.disk.fence.incarnation, machine.disk.fence.index) = set;
        for (launch, node_fault) in failed {
            let why = "the simulated machine refuses".to_owned();
            let rank = Rank::Ended(Outcome::LaunchFailed { node_fault, why });
            self.launched(agent, life, &launch, 0, vec![rank; launch.lease.ranks as usize]);
        }
        if !taken.is_empty() {
            let wait = self.rng.tail(2_000);
            self.after(wait, Event::Spawn { agent, life, launches: taken });
        }
    }

    fn launched(&mut self, agent: usize, life: u64, launch: &Launch, port: u32, ranks: Vec<Rank>) {
        let wait = self.rng.range(300, 5_000);
        let event = Box::new(Told::Launched { token: launch.lease.token, port, ranks });
        self.after(wait, Event::Agent { agent, life, event });
    }

    /// Then directories and shims.
    pub fn spawn(&mut self, agent: usize, life: u64, launches: Vec<Launch>) {
        if self.machines[agent].life != life {
            return;
        }
        for launch in launches {
            let lease = launch.lease.clone();
            let machine = &mut self.machines[agent];
            let port =
                if launch.open && lease.nodes > 1 { lease.master_port } else { 20_000 + (lease.token % 10_000) as u32 };
            let kept =
                Kept { lease: lease.clone(), open: launch.open, port, boot: machine.boot, exits: Default::default() };
            machine.disk.attempts.insert(lease.token, kept);
            let grace_ms = lease.kill_grace_ms.min(lease.ttl_ms / 4);
            let script = Script::parse(&launch.body.argv);
            if script.is_none() {
                let why = "no such command".to_owned();
                let rank = Rank::Ended(Outcome::LaunchFailed { node_fault: false, why });
                let ranks = vec![rank; lease.ranks as usize];
                self.launched(agent, life, &launch, port, ranks);
                continue;
            }
            for local in 0..lease.ranks {
                let watch = Watch::new(grace_ms, lease.limit_ms);
                let shim = Shim::new(watch, launch.deadline, launch.open, script);
                self.machines[agent].shims.insert((lease.token, local), shim);
                self.rank_taken_up(agent, (lease.token, local), &lease);
            }
            for local in 0..lease.ranks {
                self.shim_looks(agent, (lease.token, local));
            }
            let rank = if launch.open { Rank::Started } else { Rank::Waiting };
            self.launched(agent, life, &launch, port, vec![rank; lease.ranks as usize]);
        }
    }

    /// Agent and shims die together; what they leave behind nobody sweeps until the agent is back.
    pub fn kill_agent_and_shims(&mut self, agent: usize) {
        self.kill_agent(agent);
        let keys: Vec<_> = self.machines[agent].shims.keys().copied().collect();
        for key in keys {
            self.kill_shim(agent, key);
        }
    }

    /// The driver's word on a GPU.
    pub fn report_gpu(&mut self, agent: usize, slot: usize) {
        let machine = &mut self.machines[agent];
        machine.gpu_health[slot] = "QUARANTINED";
        let Some(process) = machine.agent.as_deref() else { return };
        let fact = v1::GpuHealthFact {
            slot: slot as u32,
            gpu_uuid: machine.gpus[slot].clone(),
            health: "QUARANTINED".into(),
            xid: 79,
            reason: "fell off the bus".into(),
            end_lease: true,
        };
        let request =
            v1::ReportHealthRequest { node_id: process.core.node_id(), epoch: process.core.epoch(), facts: vec![fact] };
        self.agent_call(agent, Rpc::Health(request));
    }

    fn facts(&self, agent: usize) -> v1::MachineFacts {
        let machine = &self.machines[agent];
        let count = machine.gpus.len();
        let gpu = |(slot, uuid): (usize, &String)| v1::GpuFacts {
            uuid: uuid.clone(),
            r#type: if uuid.starts_with("MIG-") { SLICE } else { "a100" }.into(),
            mem_mib: 40_960,
            numa: (slot >= count / 2) as u32,
            health: machine.gpu_health[slot].to_owned(),
            reason: String::new(),
        };
        v1::MachineFacts {
            name: machine.name.clone(),
            address: "127.0.0.1:1".into(),
            host: machine.name.clone(),
            machine_id: vec![agent as u8 + 1; 16].into(),
            boot_id: vec![machine.boot as u8; 16].into(),
            version: "0".into(),
            gpus: machine.gpus.iter().enumerate().map(gpu).collect(),
            links: Some(v1::MachineLinks {
                gpus: count as u32,
                nvlinks: vec![0; count * count],
                pci: vec![v1::PciClass::Sys as i32; count * count],
                numa: (0..count).map(|slot| (slot >= count / 2) as u32).collect(),
                pcie_mbps: 25_000,
                inter_socket_mbps: 20_000,
                ..Default::default()
            }),
            cores_by_numa: vec![32, 32],
            mem_mib: 512 << 10,
            simulated: true,
            kill: if self.setup.weak { "weak" } else { "pidns" }.into(),
            labels: [("rack".to_owned(), format!("r{}", agent / AGENTS_PER_RACK))].into(),
        }
    }
}

fn message(process: &AgentProcess, heartbeat: u64, tokens: Vec<u64>) -> v1::AgentMessage {
    v1::AgentMessage {
        node_id: process.core.node_id(),
        epoch: process.core.epoch(),
        heartbeat,
        cluster_id: process.core.cluster_id().to_owned(),
        tokens,
        desired_index: process.core.seen_index(),
    }
}

fn live(lease: &v1::DesiredLease) -> Live {
    Live { job_id: lease.job_id, first_rank: lease.first_rank, ranks: lease.ranks, gpus: lease.gpu_uuids.clone() }
}
