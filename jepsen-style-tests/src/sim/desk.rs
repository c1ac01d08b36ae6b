//! What a leader does in one term of office: the loops of raft-node's `leader`, driven by events instead of a runtime. All their
//! decisions are the real code's: keeper, duties, desired sets, planner.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proto::v1;
use raft_node::api::requests;
use raft_node::leader::desired::desired;
use raft_node::leader::keeper::Keeper;
use raft_node::leader::settled::Settled;
use raft_node::leader::touched::Touched;
use raft_node::leader::{beats, duties, of_silence};
use scheduling::Reason;
use scheduling::plan::{Cache, Limits, plan};
use statemachine::command::{Code, Place, PlacePart};
use statemachine::record::StoredReply;
use statemachine::state::Kin;
use statemachine::{Cmd, Command, JobId, NodeId, Outcome, Reply};

use super::event::{Answer, Beat, Check, Event, Rpc, Site, Word};
use super::net::Clock;
use super::world::World;

const GATHER_US: u64 = 20_000;
const LINKS_US: u64 = 2_000;
const PLAN_US: u64 = 1_000;
const PLAN_IDLE_US: u64 = 2_000_000;
const DUTY_US: u64 = duties::PERIOD.as_micros() as u64;

/// Who waits for a command's outcome.
#[derive(Clone, Debug)]
pub enum Waiter {
    Call { from: Site, call: u64, attempt: u32, rpc: Arc<Rpc> },
    Plan { desk: u64 },
    Duty,
}

/// The leader's end of an agent's stream.
#[derive(Clone, Debug)]
pub struct Conn {
    pub agent: usize,
    pub life: u64,
    pub generation: u64,
    pub node: Option<u32>,
    last: Option<v1::Desired>,
    /// Said while no way led to the agent: the stream repeats it when one does.
    unsent: Vec<v1::leader_message::What>,
    sent_until: u64,
}

pub struct Desk {
    pub id: u64,
    pub term: u64,
    opened_ms: u64,
    opened_wall_ms: i64,
    clock_at_start_ms: u64,
    pub keeper: Keeper,
    pub conns: BTreeMap<u64, Conn>,
    /// Newest stream of each node.
    links: BTreeMap<u32, u64>,
    touched: Touched,
    links_due: bool,
    beats: Vec<Beat>,
    gathering: bool,
    round: u64,
    /// Commands on their way into the next entry.
    pub door: Vec<(Cmd, Waiter)>,
    packing: bool,
    /// By log index.
    pub waiting: BTreeMap<u64, Vec<Waiter>>,
    planner: Planner,
}

#[derive(Default)]
struct Planner {
    cache: Cache,
    limits: Limits,
    settled: Option<Settled>,
    /// Plans that wait for their outcome; 0 = none.
    proposed: usize,
    placed: usize,
    unfinished: bool,
    /// A cycle is planned for.
    serial: u64,
    due: bool,
    busy: bool,
    /// Something changed while it was busy.
    woken: bool,
    reached: Option<scheduling::order::Position>,
}

impl Desk {
    /// Since the office began, by the clock that silence is measured by.
    pub fn now_ms(&self, clock: &Clock, now: u64) -> u64 {
        let wall = || u64::try_from(clock.wall_ms(now) - self.opened_wall_ms).unwrap_or(0);
        of_silence(|| self.monotonic_ms(clock, now), wall)
    }

    fn monotonic_ms(&self, clock: &Clock, now: u64) -> u64 {
        clock.monotonic_ms(now) - self.opened_ms
    }

    pub fn cluster_ms(&self, clock: &Clock, now: u64) -> u64 {
        self.clock_at_start_ms + self.monotonic_ms(clock, now)
    }
}

impl World {
    pub fn take_office(&mut self, at: usize, term: u64) {
        let id = self.fresh();
        let now = self.now;
        let replica = &mut self.replicas[at];
        let opened_ms = replica.clock.monotonic_ms(now);
        let opened_wall_ms = replica.clock.wall_ms(now);
        let cache = std::mem::take(&mut self.planner_cache);
        replica.desk = Some(Box::new(Desk {
            id,
            term,
            opened_ms,
            opened_wall_ms,
            clock_at_start_ms: replica.state.meta.clock_ms,
            keeper: Keeper::new(&replica.state, 0),
            conns: BTreeMap::new(),
            links: BTreeMap::new(),
            touched: Touched::new(&replica.state),
            links_due: false,
            beats: Vec::new(),
            gathering: false,
            round: 0,
            door: Vec::new(),
            packing: false,
            waiting: BTreeMap::new(),
            planner: Planner { cache, limits: Limits::of_leader(), ..Planner::default() },
        }));
        replica.elected = None;
        self.audit.offices += 1;
        self.trace.note("office", at as u64, term);
        if !self.replicas[at].state.leases.is_empty() && self.audit.offices > 1 {
            self.sometimes.hit("a new leader gave running leases their grace");
        }
        self.after(0, Event::Duty { replica: at, desk: id });
        self.wake_planner(at);
    }

    pub fn desk(&mut self, at: usize, id: u64) -> Option<&mut Desk> {
        self.replicas[at].desk.as_deref_mut().filter(|desk| desk.id == id)
    }

    // ------------------------------------------------------------------------------------------------- requests

    pub fn request(&mut self, at: usize, from: Site, call: u64, attempt: u32, rpc: Arc<Rpc>) {
        if !self.replicas[at].up || !self.net.reaches(from, Site::Replica(at)) {
            return;
        }
        let waiter = Waiter::Call { from, call, attempt, rpc: rpc.clone() };
        if let Rpc::Read { job } = &*rpc {
            let check = Check::Read { from, call, attempt, job: *job };
            return self.read_any(at, check, &waiter);
        }
        if self.replicas[at].desk.is_none() {
            let hint = self.replicas[at].leader.filter(|leader| *leader != at);
            return self.answer(at, &waiter, Answer::NotLeader(hint));
        }
        let command = match &*rpc {
            Rpc::Read { .. } => return,
            Rpc::Propose { request, actor, command } => {
                let cmd = Cmd { request: Some(*request), actor: actor.clone(), body: command.clone() };
                return self.enter(at, cmd, waiter);
            }
            Rpc::Register(request) => match requests::register((**request).clone()) {
                Ok(register) => match requests::overtaken(&self.replicas[at].state, &register) {
                    Some(overtaken) => return self.answer(at, &waiter, Answer::Registered(overtaken)),
                    None => Command::RegisterNode(Box::new(register)),
                },
                Err(_) => return self.answer(at, &waiter, Answer::RegisterRefused),
            },
            Rpc::Report(request) => match requests::report(request.clone()) {
                Ok(report) => Command::Report(report),
                Err(status) => return self.violate("agents_speak", format!("a report was refused: {status}")),
            },
            Rpc::Health(request) => match requests::health_facts(request.clone()) {
                Ok(commands) => {
                    for body in commands {
                        self.enter(at, cmd_of("agent", body), Waiter::Duty);
                    }
                    return self.answer(at, &waiter, Answer::Reported(Vec::new()));
                }
                Err(status) => return self.violate("agents_speak", format!("health facts were refused: {status}")),
            },
            Rpc::Fetch(jobs) => {
                let bodies = self.bodies(at, jobs);
                return self.answer(at, &waiter, Answer::Bodies(bodies));
            }
            Rpc::KeepAlive { session } => {
                let desk = self.replicas[at].desk.as_deref();
                let received_ms = desk.map_or(0, |desk| desk.now_ms(&self.replicas[at].clock, self.now));
                let check = Check::KeepAlive { from, call, attempt, session: *session, received_ms };
                return self.check_quorum(at, check);
            }
            Rpc::Session { agent, life, generation, hello } => {
                return self.open_session(at, *agent, *life, *generation, hello.clone(), &waiter);
            }
        };
        self.enter(at, cmd_of("agent", command), waiter);
    }

    fn bodies(&self, at: usize, jobs: &[u64]) -> Vec<v1::JobBody> {
        let state = &self.replicas[at].state;
        let body = |id: &u64| {
            state.jobs.get(&JobId(*id))?;
            let body = state.body(JobId(*id))?;
            let env = body.env.clone().into_iter().collect();
            Some(v1::JobBody { job_id: *id, argv: body.argv.clone(), env, ..Default::default() })
        };
        jobs.iter().filter_map(body).collect()
    }

    /// Through the door: what comes within a moment goes in one entry.
    pub fn enter(&mut self, at: usize, cmd: Cmd, waiter: Waiter) {
        let Some(desk) = self.replicas[at].desk.as_deref_mut() else { return };
        desk.door.push((cmd, waiter));
        if !desk.packing {
            desk.packing = true;
            let id = desk.id;
            let wait = self.rng.range(10, 800);
            self.after(wait, Event::Pack { replica: at, desk: id });
        }
    }

    pub fn pack(&mut self, at: usize, id: u64) {
        let Some(desk) = self.desk(at, id) else { return };
        desk.packing = false;
        let (cmds, waiters) = std::mem::take(&mut desk.door).into_iter().unzip();
        self.propose(at, cmds, waiters);
    }

    pub fn answer(&mut self, at: usize, waiter: &Waiter, answer: Answer) {
        self.send_answer(at, waiter, answer);
    }

    /// When it arrives; `None` if it does not.
    fn send_answer(&mut self, at: usize, waiter: &Waiter, answer: Answer) -> Option<u64> {
        let Waiter::Call { from, call, attempt, .. } = waiter else { return None };
        let (from, call, attempt) = (*from, *call, *attempt);
        if !self.net.reaches(Site::Replica(at), from) || self.net.loses(&mut self.rng) {
            return None;
        }
        let way = self.net.way(&mut self.rng);
        self.after(way, Event::Reply { to: from, call, attempt, answer });
        Some(self.now + way)
    }

    pub fn answer_waiters(&mut self, at: usize, waiters: Vec<Waiter>, outcomes: Vec<Outcome>) {
        for (waiter, outcome) in waiters.into_iter().zip(outcomes) {
            match &waiter {
                Waiter::Duty => {}
                Waiter::Plan { desk } => self.plan_answered(at, *desk, &outcome),
                Waiter::Call { rpc, .. } => {
                    let answer = self.reply(at, rpc, outcome);
                    self.answer(at, &waiter, answer);
                }
            }
        }
    }

    fn reply(&mut self, at: usize, rpc: &Rpc, outcome: Outcome) -> Answer {
        let now = self.now;
        let replica = &mut self.replicas[at];
        match (rpc, outcome) {
            (Rpc::Register(_), Outcome::Done(Reply::Registered { node, epoch })) => {
                Answer::Registered(requests::registered(&replica.state, node, epoch))
            }
            (Rpc::Register(request), Outcome::Rejected(no)) if no.code == Code::EpochStale => {
                let name = request.machine.as_ref().map_or("", |machine| machine.name.as_str());
                let epoch = replica.state.node_epoch(name);
                Answer::Registered(requests::registered(&replica.state, NodeId(0), epoch))
            }
            (Rpc::Register(_), _) => Answer::RegisterRefused,
            (Rpc::Report(_), Outcome::Done(Reply::Report(answers))) => {
                let word = |answer: Result<(), statemachine::Rejection>| {
                    answer.err().map(|no| no.code.name().to_owned()).unwrap_or_default()
                };
                for refused in answers.iter().filter_map(|answer| answer.as_ref().err()) {
                    self.sometimes.hit_code("a report was refused", refused.code.name());
                }
                Answer::Reported(answers.into_iter().map(word).collect())
            }
            (Rpc::Report(request), Outcome::Rejected(no)) => {
                self.sometimes.hit_code("a report was refused", no.code.name());
                Answer::Reported(vec![no.code.name().to_owned(); request.items.len()])
            }
            (_, outcome) => {
                if let (Outcome::Done(Reply::Stored(StoredReply::Session(session))), Some(desk)) =
                    (&outcome, replica.desk.as_deref_mut())
                {
                    let now_ms = desk.now_ms(&replica.clock, now);
                    desk.keeper.hear_session(*session, now_ms);
                }
                Answer::Outcome(outcome, replica.state.meta.rev.0)
            }
        }
    }

    // ---------------------------------------------------------------------------------------------- quorum checks

    /// A linearizable read, served by any replica behind a question to the leader.
    fn read_any(&mut self, at: usize, check: Check, waiter: &Waiter) {
        if !raft_node::read::behind_quorum_check() {
            return self.checked(at, 0, 0, check);
        }
        let leader = self.replicas[at].leader.or(self.replicas[at].desk.as_ref().map(|_| at));
        let Some(leader) = leader else { return self.answer(at, waiter, Answer::Unreachable) };
        let able = self.raft.leader == Some(leader)
            && self.net.linked(Site::Replica(at), Site::Replica(leader))
            && self.replicas[leader].awake(self.now)
            && self.replicas[leader].desk.is_some()
            && self.has_quorum(leader, self.raft.term);
        if !able {
            self.sometimes.hit("a stale leader refused a read");
            return self.answer(at, waiter, Answer::Unreachable);
        }
        let began_index = self.committed();
        let wait = 2 * self.net.way(&mut self.rng);
        self.after(wait, Event::Checked { replica: at, desk: 0, began_index, check });
    }

    fn check_quorum(&mut self, at: usize, check: Check) {
        let wait = 2 * self.net.way(&mut self.rng);
        let Some(desk) = self.replicas[at].desk.as_deref() else { return };
        let desk = desk.id;
        self.after(wait, Event::Checked { replica: at, desk, began_index: u64::MAX, check });
    }

    /// The answers of the group are in. `began_index` = MAX: they are counted now, for the leader itself.
    pub fn checked(&mut self, at: usize, id: u64, began_index: u64, check: Check) {
        if !self.replicas[at].up {
            return;
        }
        let mut index = began_index;
        if began_index == u64::MAX {
            let Some(term) = self.desk(at, id).map(|desk| desk.term) else { return };
            let skipped = matches!(check, Check::Beats(_)) && !beats::behind_quorum_check();
            if !skipped && !self.has_quorum(at, term) {
                self.sometimes.hit("heartbeats were not acknowledged for want of a quorum");
                return;
            }
            index = if skipped { 0 } else { self.committed() };
        }
        if self.replicas[at].applied < index {
            return self.after(1_000, Event::Checked { replica: at, desk: id, began_index: index, check });
        }
        match check {
            Check::Beats(beats) => self.acknowledge(at, id, beats),
            Check::Read { from, call, attempt, job } => {
                let state = &self.replicas[at].state;
                let found = state.jobs.contains(&job) || state.ended_job(job).is_some();
                let answer = Answer::Seen { revision: state.meta.rev.0, found };
                let rpc = Arc::new(Rpc::Read { job });
                self.answer(at, &Waiter::Call { from, call, attempt, rpc }, answer);
            }
            Check::KeepAlive { from, call, attempt, session, received_ms } => {
                let replica = &mut self.replicas[at];
                let Some(desk) = replica.desk.as_deref_mut().filter(|desk| desk.id == id) else { return };
                let alive = desk.keeper.session_alive(&replica.state, session);
                if alive {
                    desk.keeper.hear_session(session, received_ms);
                }
                let rpc = Arc::new(Rpc::KeepAlive { session });
                self.answer(at, &Waiter::Call { from, call, attempt, rpc }, Answer::Alive(alive));
            }
        }
    }

    // ------------------------------------------------------------------------------------------- agents' streams

    fn open_session(
        &mut self,
        at: usize,
        agent: usize,
        life: u64,
        generation: u64,
        hello: v1::AgentMessage,
        waiter: &Waiter,
    ) {
        let id = self.fresh();
        // Nothing that is said in a stream overtakes what opens it.
        let sent_until = self.send_answer(at, waiter, Answer::Opened { replica: at, conn: id }).unwrap_or(0);
        let Some(desk) = self.replicas[at].desk.as_deref_mut() else { return };
        let conn = Conn { agent, life, generation, node: None, last: None, unsent: Vec::new(), sent_until };
        desk.conns.insert(id, conn);
        self.from_agent(at, id, hello);
    }

    pub fn close(&mut self, at: usize, conn: &Conn) {
        if self.net.reaches(Site::Replica(at), Site::Agent(conn.agent)) {
            let (agent, life, generation) = (conn.agent, conn.life, conn.generation);
            let way = self.net.way(&mut self.rng) + 200_000;
            self.after(way, Event::ToAgent { agent, life, generation, word: Word::Closed });
        }
    }

    pub fn from_agent(&mut self, at: usize, id: u64, message: v1::AgentMessage) {
        let now = self.now;
        let node = message.node_id;
        let known_epoch = self.audit.epochs.get(&node).copied().unwrap_or(0);
        let replica = &mut self.replicas[at];
        let Some(desk) = replica.desk.as_deref_mut() else { return };
        let Some(conn) = desk.conns.get_mut(&id) else { return };
        let first = desk.links.get(&node) != Some(&id);
        conn.node = Some(node);
        if first {
            desk.links.insert(node, id);
        }
        let now_ms = desk.now_ms(&replica.clock, now);
        let heard = desk.keeper.hear(&replica.state, NodeId(node), message.epoch, now_ms);
        desk.beats.push(Beat { conn: id, node, epoch: message.epoch, number: message.heartbeat, known_epoch });
        let gather = !std::mem::replace(&mut desk.gathering, true);
        let desk = desk.id;
        if first {
            self.offer(at, Some(&BTreeSet::from([NodeId(node)])));
        }
        if heard {
            self.wake_planner(at);
        }
        if gather {
            self.after(GATHER_US, Event::Gather { replica: at, desk });
        }
    }

    pub fn gather(&mut self, at: usize, id: u64) {
        let Some(desk) = self.desk(at, id) else { return };
        desk.gathering = false;
        let beats = std::mem::take(&mut desk.beats);
        self.check_quorum(at, Check::Beats(beats));
    }

    fn acknowledge(&mut self, at: usize, id: u64, beats: Vec<Beat>) {
        let Some(desk) = self.desk(at, id) else { return };
        let ending = desk.keeper.ending_nodes();
        if !ending.is_empty() {
            self.offer(at, Some(&ending));
        }
        for beat in beats {
            let replica = &self.replicas[at];
            let Some(desk) = replica.desk.as_deref() else { return };
            let what = beats::answer_to(&desk.keeper, &replica.state, NodeId(beat.node), beat.epoch, beat.number);
            let acks = matches!(what, v1::leader_message::What::Ack(_));
            if acks && beat.epoch < beat.known_epoch {
                let (node, epoch, known) = (beat.node, beat.epoch, beat.known_epoch);
                let text =
                    format!("a heartbeat of node {node} in epoch {epoch} was acknowledged after epoch {known} began");
                return self.violate("epoch_grows", text);
            }
            self.say(at, beat.conn, what);
        }
    }

    /// In order and without a gap, unless the stream breaks.
    fn say(&mut self, at: usize, id: u64, what: v1::leader_message::What) {
        let lost = self.net.loses(&mut self.rng);
        let late = lost && self.rng.chance(500);
        let way = self.net.way(&mut self.rng) + if late { self.rng.range(200_000, 8_000_000) } else { 0 };
        let now = self.now;
        let Some(conn) = self.replicas[at].desk.as_deref_mut().and_then(|desk| desk.conns.get_mut(&id)) else { return };
        let (agent, life, generation) = (conn.agent, conn.life, conn.generation);
        if lost && !late {
            let conn = conn.clone();
            if let Some(desk) = self.replicas[at].desk.as_deref_mut() {
                desk.forget(id);
            }
            return self.close(at, &conn);
        }
        conn.unsent.push(what);
        if !self.net.reaches(Site::Replica(at), Site::Agent(agent)) {
            return;
        }
        let slow = self.net.slow_words_us.get(&agent).copied().unwrap_or(0);
        let arrives = (now + way + slow).max(conn.sent_until + 1);
        let said = std::mem::take(&mut conn.unsent);
        conn.sent_until = arrives + said.len() as u64 - 1;
        for (nth, what) in said.into_iter().enumerate() {
            let word = Word::Message(v1::LeaderMessage { what: Some(what) });
            self.after(arrives - now + nth as u64, Event::ToAgent { agent, life, generation, word });
        }
    }

    fn offer(&mut self, at: usize, nodes: Option<&BTreeSet<NodeId>>) {
        let replica = &mut self.replicas[at];
        let Some(desk) = replica.desk.as_deref_mut() else { return };
        let mut news = Vec::new();
        for (node, id) in
            desk.links.iter().filter(|(node, _)| nodes.is_none_or(|nodes| nodes.contains(&NodeId(**node))))
        {
            let keeper = &desk.keeper;
            let Some(set) = desired(&replica.state, NodeId(*node), |token| keeper.is_ending(token, NodeId(*node)))
            else {
                continue;
            };
            let Some(conn) = desk.conns.get_mut(id) else { continue };
            let same = conn.last.as_ref().is_some_and(|last| last.epoch == set.epoch && last.leases == set.leases);
            if !same {
                conn.last = Some(set.clone());
                news.push((*id, set));
            }
        }
        for (id, set) in news {
            self.say(at, id, v1::leader_message::What::Desired(set));
        }
    }

    pub fn wake_links(&mut self, at: usize) {
        let Some(desk) = self.replicas[at].desk.as_deref_mut() else { return };
        if !std::mem::replace(&mut desk.links_due, true) {
            let id = desk.id;
            self.after(LINKS_US, Event::Links { replica: at, desk: id });
        }
    }

    pub fn links(&mut self, at: usize, id: u64) {
        let replica = &mut self.replicas[at];
        let Some(desk) = replica.desk.as_deref_mut().filter(|desk| desk.id == id) else { return };
        desk.links_due = false;
        match desk.touched.follow(&replica.state) {
            Some(nodes) if nodes.is_empty() => {}
            nodes => self.offer(at, nodes.as_ref()),
        }
    }

    /// Its office is over. Whatever a planner's cache holds, the plan is the same: so the next one goes on with this one's.
    pub fn leave_office(&mut self, at: usize) -> Option<Box<Desk>> {
        let mut desk = self.replicas[at].desk.take()?;
        self.planner_cache = std::mem::take(&mut desk.planner.cache);
        Some(desk)
    }

    // ------------------------------------------------------------------------------------------ duties and planner

    pub fn duty(&mut self, at: usize, id: u64) {
        let now = self.now;
        let replica = &mut self.replicas[at];
        let Some(desk) = replica.desk.as_deref_mut().filter(|desk| desk.id == id) else { return };
        let now_ms = desk.now_ms(&replica.clock, now);
        let cluster_ms = desk.cluster_ms(&replica.clock, now);
        let commands = duties::due(&replica.state, &mut desk.keeper, desk.round, now_ms, cluster_ms);
        desk.round += 1;
        for body in commands {
            self.enter(at, cmd_of(duties::ACTOR, body), Waiter::Duty);
        }
        self.after(DUTY_US, Event::Duty { replica: at, desk: id });
    }

    /// A planning cycle soon, unless one is under way.
    pub fn wake_planner(&mut self, at: usize) {
        let Some(desk) = self.replicas[at].desk.as_deref_mut() else { return };
        if desk.planner.busy {
            desk.planner.woken = true;
        } else if !desk.planner.due {
            self.plan_after(at, PLAN_US);
        }
    }

    fn plan_after(&mut self, at: usize, wait: u64) {
        let Some(desk) = self.replicas[at].desk.as_deref_mut() else { return };
        desk.planner.serial += 1;
        desk.planner.due = wait < PLAN_IDLE_US;
        let (id, serial) = (desk.id, desk.planner.serial);
        self.after(wait, Event::Plan { replica: at, desk: id, serial });
    }

    pub fn plan(&mut self, at: usize, id: u64, serial: u64) {
        let now = self.now;
        let replica = &mut self.replicas[at];
        let Some(desk) = replica.desk.as_deref_mut().filter(|desk| desk.id == id) else { return };
        if desk.planner.serial != serial || desk.planner.busy {
            return;
        }
        desk.planner.due = false;
        if replica.state.index.queue.is_empty() {
            return;
        }
        let unheard = desk.keeper.unheard(&replica.state, desk.now_ms(&replica.clock, now));
        let planner = &mut desk.planner;
        if planner.settled.as_mut().is_some_and(|settled| settled.still_holds(&replica.state, &unheard)) {
            return self.plan_after(at, PLAN_IDLE_US);
        }
        let made = plan(&replica.state, &mut planner.cache, &planner.limits, &unheard);
        let apart = made.reasons.iter().any(|(_, reason)| matches!(**reason, Reason::Topology { .. }));
        let set_aside = made.reasons.iter().any(|(_, reason)| matches!(**reason, Reason::SetAside { .. }));
        planner.settled = Settled::after(&made, &planner.limits, &replica.state, unheard);
        planner.reached = made.reached.clone();
        planner.busy = true;
        planner.woken = false;
        for gang in made.places.iter().filter(|place| place.parts.len() > 1) {
            let node = |part: &PlacePart| replica.state.nodes.get(&part.node);
            let racks: BTreeSet<_> =
                gang.parts.iter().filter_map(node).map(|node| node.value.labels.get("rack")).collect();
            self.sometimes.hit(match racks.len() {
                1 => "a gang was planned whole into one rack",
                _ => "a gang was planned over several racks",
            });
        }
        let queued = |place: &Place| replica.state.jobs.get(&place.task.job).map(|job| &job.value);
        let in_turn: Vec<&Place> =
            made.places.iter().filter(|place| !replica.state.claims.contains(&place.task)).collect();
        let overtakes = in_turn.windows(2).any(|pair| match (queued(pair[0]), queued(pair[1])) {
            (Some(one), Some(other)) => {
                Kin::of(one, None).level() == Kin::of(other, None).level() && one.seq > other.seq
            }
            _ => false,
        });
        if overtakes {
            self.sometimes.hit("a younger job stood before an older one by its ratio");
        }
        let unfinished = made.unfinished;
        let mut placements = made.commands();
        if self.planner_wrong_until > now {
            placements.iter_mut().flat_map(|plan| &mut plan.places).for_each(|place| self.misplace(at, place));
        }
        let preempts = made.preempts.into_iter().map(Command::Preempt);
        let plans = placements.into_iter().map(Command::Plan).chain(preempts).collect();
        if apart {
            self.sometimes.hit("a gang waited for a rack");
        }
        if set_aside {
            self.sometimes.hit("a job waited for the end of a window");
        }
        // A plan takes its time: it meets the state as it has become since.
        let wait = self.rng.tail(1_500);
        self.after(wait, Event::Planned { replica: at, desk: id, plans, unfinished });
    }

    /// Every other gang is sent to machines that know nothing of it.
    fn misplace(&mut self, at: usize, place: &mut Place) {
        if self.rng.chance(500) {
            return;
        }
        let nodes = &self.replicas[at].state.nodes;
        let all: Vec<(NodeId, u64)> = nodes.iter().map(|(id, node)| (*id, node.value.epoch)).collect();
        for part in &mut place.parts {
            (part.node, part.epoch) = self.rng.pick(&all);
        }
    }

    pub fn planned(&mut self, at: usize, id: u64, plans: Vec<Command>, unfinished: bool) {
        let Some(desk) = self.desk(at, id) else { return };
        desk.planner.proposed = plans.len();
        desk.planner.placed = 0;
        desk.planner.unfinished = unfinished;
        if plans.is_empty() {
            return self.plan_over(at);
        }
        for plan in plans {
            self.enter(at, cmd_of(duties::ACTOR, plan), Waiter::Plan { desk: id });
        }
    }

    fn plan_answered(&mut self, at: usize, id: u64, outcome: &Outcome) {
        let placed = match outcome {
            Outcome::Done(Reply::Plan(answers)) => {
                for refused in answers.iter().filter_map(|answer| answer.as_ref().err()) {
                    self.sometimes.hit_code("a placement was refused", refused.code.name());
                }
                answers.iter().filter(|answer| answer.is_ok()).count()
            }
            Outcome::Done(_) => {
                self.sometimes.hit("a running attempt made room for an urgent job");
                1
            }
            Outcome::Rejected(refused) => {
                self.sometimes.hit_code("a preemption was refused", refused.code.name());
                0
            }
            Outcome::Replayed(_) => return,
        };
        let Some(desk) = self.desk(at, id) else { return };
        desk.planner.placed += placed;
        desk.planner.proposed -= 1;
        if desk.planner.proposed == 0 {
            self.plan_over(at);
        }
    }

    fn plan_over(&mut self, at: usize) {
        let Some(desk) = self.replicas[at].desk.as_deref_mut() else { return };
        let planner = &mut desk.planner;
        planner.busy = false;
        planner.limits.after = if planner.unfinished && planner.placed == 0 { planner.reached.take() } else { None };
        let idle = planner.placed == 0 && !planner.unfinished && !planner.woken;
        self.plan_after(at, if idle { PLAN_IDLE_US } else { PLAN_US });
    }
}

impl Desk {
    pub fn forget(&mut self, id: u64) {
        let Some(conn) = self.conns.remove(&id) else { return };
        if let Some(node) = conn.node.filter(|node| self.links.get(node) == Some(&id)) {
            self.links.remove(&node);
        }
    }
}

fn cmd_of(actor: &str, body: Command) -> Cmd {
    Cmd { request: None, actor: actor.to_owned(), body }
}
