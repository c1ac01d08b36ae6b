//! One run: the whole cluster in virtual time. Takes the events one by one and hands each to who it concerns; the same seed gives the
//! same run, to the last event.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use scheduling::plan::Cache;
use scheduling::tables::Tables;
use statemachine::State;
use statemachine::settings::{Planning, Settings};

use super::audit::Audit;
use super::event::{Event, Queue, Site};
use super::fault::Timed;
use super::machine::Machine;
use super::net::{Clock, Net};
use super::raft::{Raft, Replica};
use super::random::Rng;
use super::setup::Setup;
use super::sometimes::Sometimes;
use super::trace::Trace;
use super::users::{Call, Users};

/// How long after the faults everything must have come to its end.
const LIVENESS_US: u64 = 400_000_000;
/// After the faults: a leader, and a write accepted.
const LEADER_US: u64 = 5_000_000;
/// The least run before a job gives its place to another one's turn, in ms of cluster time.
pub(super) const TURN_RUN_MS: u64 = 2_000;
/// Events of one moment without an end in sight are a loop.
const EVENTS: u64 = 60_000_000;

/// An invariant that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub invariant: String,
    pub detail: String,
    /// In ms from the beginning.
    pub at_ms: u64,
}

/// What links carry follows from the class of a machine: the seeds of one process share it.
static TABLES: LazyLock<Tables> = LazyLock::new(Tables::default);

pub struct World {
    pub setup: Setup,
    pub rng: Rng,
    /// True time in us.
    pub now: u64,
    pub queue: Queue,
    pub net: Net,
    pub raft: Raft,
    pub replicas: Vec<Replica>,
    pub machines: Vec<Machine>,
    pub calls: BTreeMap<u64, Call>,
    pub users: Users,
    pub audit: Audit,
    pub sometimes: Sometimes,
    pub trace: Trace,
    /// Faults that took effect, by kind.
    pub took: BTreeMap<&'static str, u64>,
    pub failure: Option<Failure>,
    /// Breaches of other invariants don't end the run, `liveness` aside; empty = any does.
    pub looked_for: &'static [&'static str],
    /// The first of those that ended nothing.
    pub passed_over: Option<Failure>,
    pub healed_at: Option<u64>,
    pub planner_wrong_until: u64,
    /// Of the last office that ended.
    pub planner_cache: Cache,
    pub events: u64,
    ids: u64,
}

impl World {
    pub fn new(setup: Setup, faults: &[Timed], trace: Trace) -> Self {
        let mut rng = Rng::new(setup.seed, 4);
        let settings = Settings {
            request_keep_ms: setup.request_keep_ms,
            request_keep_least_ms: setup.request_keep_ms.min(900_000),
            start_timeout_ms: 15_000,
            // Turns as short as the jobs are.
            planning: Planning { turn_gpu_ms: 6_000, turn_run_ms: TURN_RUN_MS, ..Planning::default() },
            ..Settings::default()
        };
        let state = State::new([7; 16], settings);
        let replicas =
            (0..setup.replicas).map(|_| Replica::new(state.clone(), Clock::new(&mut rng, setup.drift_ppm))).collect();
        let machines = (0..setup.agents).map(|at| machine(at, &setup, &mut rng)).collect();
        let net = Net { way_us: setup.way_us, ..Net::default() };
        let mut world = Self {
            setup,
            rng,
            now: 0,
            queue: Queue::default(),
            net,
            raft: Raft::default(),
            replicas,
            machines,
            calls: BTreeMap::new(),
            users: Users::default(),
            audit: Audit::default(),
            sometimes: Sometimes::default(),
            trace,
            took: BTreeMap::new(),
            failure: None,
            looked_for: &[],
            passed_over: None,
            healed_at: None,
            planner_wrong_until: 0,
            planner_cache: Cache::with(&TABLES),
            events: 0,
            ids: 0,
        };
        world.after(0, Event::RaftTick);
        for agent in 0..world.setup.agents {
            let wait = world.rng.range(0, 400_000);
            world.after(wait, Event::StartAgent { agent });
        }
        for timed in faults {
            world.queue.push(timed.at_ms * 1_000, Event::Fault(timed.fault.clone()));
        }
        world.draw_load();
        world
    }

    /// Until everything has come to its end, or something is wrong.
    pub fn run(&mut self) {
        while self.failure.is_none() && !self.audit.over {
            let Some((at, event)) = self.queue.pop() else { break };
            self.now = self.now.max(at);
            self.events += 1;
            if self.events > EVENTS {
                return self.violate("liveness", "the run does not come to an end".into());
            }
            if self.healed_at.is_none() && self.now >= self.setup.safety_ms * 1_000 {
                self.heal();
            }
            if let Some(until) = self.deferred_until(&event) {
                self.queue.push(until, event);
                continue;
            }
            let (word, a, b) = event.mark();
            self.trace.event(self.now, word, a, b);
            self.dispatch(event);
        }
        if self.failure.is_none() {
            self.audit_end();
        }
    }

    fn deferred_until(&self, event: &Event) -> Option<u64> {
        let asleep = event.machine().map_or(0, |agent| self.machines[agent].asleep_until);
        let paused = match event.site() {
            Some(Site::Replica(at)) => self.replicas[at].paused_until,
            Some(Site::Agent(at)) => self.machines[at].agent_paused_until,
            _ => 0,
        };
        // Who is let go when the faults are over does at once what was due.
        let over = self.healed_at.map_or(self.setup.safety_ms * 1_000, |_| u64::MAX);
        let until = asleep.max(paused.min(over));
        (until > self.now).then_some(until)
    }

    fn dispatch(&mut self, event: Event) {
        match event {
            Event::Fault(fault) => self.inject(fault),
            Event::FaultOver(fault) => self.lift(&fault),
            Event::Request { replica, from, call, attempt, rpc } => self.request(replica, from, call, attempt, rpc),
            Event::Reply { call, attempt, answer, .. } => self.replied(call, attempt, answer),
            Event::CallReady { call } => self.call_ready(call),
            Event::CallTimeout { call } => self.call_timeout(call),
            Event::RaftTick => {
                self.raft_tick();
                self.look_for_the_end();
            }
            Event::Commit => self.commit(),
            Event::Apply { replica, life } => {
                if self.replicas[replica].life == life && self.replicas[replica].up {
                    self.apply(replica);
                }
            }
            Event::Pack { replica, desk } => self.pack(replica, desk),
            Event::FromAgent { replica, conn, message } => self.from_agent(replica, conn, message),
            Event::ToAgent { agent, life, generation, word } => self.to_agent(agent, life, generation, word),
            Event::Gather { replica, desk } => self.gather(replica, desk),
            Event::Checked { replica, desk, began_index, check } => self.checked(replica, desk, began_index, check),
            Event::Duty { replica, desk } => self.duty(replica, desk),
            Event::Links { replica, desk } => self.links(replica, desk),
            Event::Plan { replica, desk, serial } => self.plan(replica, desk, serial),
            Event::Planned { replica, desk, plans, unfinished } => self.planned(replica, desk, plans, unfinished),
            Event::AgentTick { agent, life, at } => self.agent_tick(agent, life, at),
            Event::Agent { agent, life, event } => self.agent_event(agent, life, *event),
            Event::StartAgent { agent } => self.start_agent(agent),
            Event::Fence { agent, life, set, launches } => self.fence(agent, life, set, launches),
            Event::Spawn { agent, life, launches } => self.spawn(agent, life, launches),
            Event::Shim { agent, boot, key, serial } => self.shim_wakes(agent, boot, key, serial),
            Event::Process { agent, boot, key, what } => self.process(agent, boot, key, what),
            Event::Judge { agent, key } => self.judge_again(agent, key),
            Event::Wake { agent, slept_us } => self.wake_machine(agent, slept_us),
            Event::User(wish) => self.user(wish),
        }
    }

    /// Liveness: once the faults are over, everything comes to its end in bounded time.
    fn look_for_the_end(&mut self) {
        let Some(healed) = self.healed_at else { return };
        let since = self.now - healed;
        let leads = self.raft.leader.is_some_and(|leader| self.replicas[leader].desk.is_some());
        if since > LEADER_US && since < LEADER_US + 200_000 && !leads {
            let text = format!("no leader {} s after the faults: {}", LEADER_US / 1_000_000, self.group());
            return self.violate("liveness", text);
        }
        if since % 10_000_000 < 100_000 {
            self.operators_clean_up();
        }
        let wanted = self.users.jobs.iter().any(|job| job.asked && job.job.is_none() && !job.gives_up);
        let running = self.audit.jobs.values().filter(|ended| !**ended).count();
        let settled = self.replicas.iter().all(|replica| !replica.up || replica.applied == self.raft.log.len() as u64);
        if running == 0 && !wanted && self.calls.is_empty() {
            self.users.lockers_stop = true;
        }
        if running == 0 && self.users.lockers_stop && settled && since > LEADER_US {
            self.audit.over = true;
        } else if since > LIVENESS_US {
            let stuck = self.audit.jobs.iter().find(|(_, ended)| !**ended).map(|(job, _)| *job);
            let text = match stuck.and_then(|job| Some((job, self.replicas[self.raft.leader?].state.job_view(job)?))) {
                Some((job, view)) => {
                    let argv = self.users.jobs.iter().find(|one| one.job == Some(job)).map(|one| one.argv());
                    format!("{running} jobs have not ended, as job {job} {argv:?}: {view:?}")
                }
                None => format!("{running} jobs have not ended; submissions without an answer: {wanted}"),
            };
            self.violate("liveness", text);
        }
    }

    // --------------------------------------------------------------------------------------------------- helpers

    pub fn after(&mut self, wait_us: u64, event: Event) {
        self.queue.push(self.now + wait_us, event);
    }

    /// A name that nothing else has.
    pub fn fresh(&mut self) -> u64 {
        self.ids += 1;
        self.ids
    }

    pub fn violate(&mut self, invariant: &str, detail: String) {
        let ends = self.looked_for.is_empty() || self.looked_for.contains(&invariant) || invariant == "liveness";
        let place = if ends { &mut self.failure } else { &mut self.passed_over };
        place.get_or_insert_with(|| Failure { invariant: invariant.to_owned(), detail, at_ms: self.now / 1_000 });
    }
}

/// One in so many machines has a GPU in slices, so many of them.
const CUT_MACHINES: usize = 5;
const SLICES: usize = 4;

fn machine(at: usize, setup: &Setup, rng: &mut Rng) -> Machine {
    // Beside the GPUs that every machine has, some have another one in slices.
    let slices = if at.is_multiple_of(CUT_MACHINES) { SLICES } else { 0 };
    let gpu = |slot: usize| {
        let kind = if slot < setup.gpus { "GPU" } else { "MIG" };
        format!("{kind}-{at:08x}-0000-0000-0000-{slot:012x}")
    };
    Machine {
        name: format!("n{at}"),
        clock: Clock::new(rng, setup.drift_ppm),
        boot: 1,
        up: true,
        asleep_until: 0,
        agent_paused_until: 0,
        life: 0,
        agent: None,
        disk: Default::default(),
        shims: BTreeMap::new(),
        strays: BTreeMap::new(),
        gpus: (0..setup.gpus + slices).map(gpu).collect(),
        gpu_health: vec!["OK"; setup.gpus + slices],
        stubborn_until: 0,
        kill_us: 0,
        bad_until: 0,
    }
}
