//! Users and their calls: the load of a run, and the real client's retry around each call. Users know nothing of faults; what they are
//! told is compared with what the log says.

use std::sync::Arc;

use proto::retry::{Action, Event as Tried, Retry};
use statemachine::command::{Code, CreateReservation, Machines, Outcome, Reply, SetPriority, SubmitJob};
use statemachine::domain::{Level, Topology};
use statemachine::record::{Array, PartState, StoredReply};
use statemachine::selector::Selector;
use statemachine::spec::{After, AfterKind, Body, JobSpec, Retry as JobRetry, Shape, Terms};
use statemachine::{Command, JobId, NodeId, RequestId, SessionId, State};

use super::agent::{AGENTS_PER_RACK, SLICE};
use super::event::{Answer, Event, Rpc, Site};
use super::machine::Script;
use super::net::EPOCH_MS;
use super::random::Rng;
use super::setup::Setup;
use super::world::World;

const CALL_MS: u64 = 15_000;
const TRY_MS: u64 = 5_000;
const LOCKERS: usize = 3;
/// Windows of reserved time that operators make in a run.
const WINDOWS: u64 = 6;
/// Jobs that are submitted before the named priorities exist.
const FIRST: usize = 20;

/// What a user wants at some time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wish {
    Submit(usize),
    /// The same id and body once more, long after.
    Again(usize),
    /// The same id for another job.
    OtherBody(usize),
    Cancel(usize),
    Requeue(usize),
    Hold(usize),
    Release(usize),
    Read(usize),
    Operate(Box<Command>),
    OpenSession(usize),
    Acquire(usize),
    KeepAlive(usize),
    Unlock(usize),
}

impl Wish {
    pub fn number(&self) -> u64 {
        match self {
            Wish::Submit(n) | Wish::Again(n) | Wish::OtherBody(n) | Wish::Cancel(n) | Wish::Requeue(n) => *n as u64,
            Wish::Hold(n) | Wish::Release(n) | Wish::Read(n) => *n as u64,
            Wish::OpenSession(n) | Wish::Acquire(n) | Wish::KeepAlive(n) | Wish::Unlock(n) => *n as u64,
            Wish::Operate(_) => 0,
        }
    }
}

/// Whose call it is.
#[derive(Clone, Debug)]
pub enum Owner {
    Agent { agent: usize, life: u64 },
    User { wish: Wish, floor: u64 },
}

pub struct Call {
    owner: Owner,
    rpc: Arc<Rpc>,
    retry: Retry,
    began: u64,
    attempt: u32,
    /// When the try that is under way has lasted too long, and when somebody looks.
    lost_at: u64,
    look_at: u64,
}

/// One job that somebody wants run.
pub struct Submission {
    request: RequestId,
    command: SubmitJob,
    pub job: Option<JobId>,
    pub asked: bool,
    /// The user stops asking when a call has no answer.
    pub gives_up: bool,
    cancel_request: Option<RequestId>,
}

impl Submission {
    pub fn argv(&self) -> &[String] {
        &self.command.body.argv
    }
}

#[derive(Default)]
pub struct Users {
    pub jobs: Vec<Submission>,
    sessions: Vec<Option<SessionId>>,
    /// Highest revision that was acknowledged to anybody.
    pub acknowledged: u64,
    pub lockers_stop: bool,
}

impl World {
    // --------------------------------------------------------------------------------------------------- calls

    pub fn call(&mut self, owner: Owner, rpc: Rpc, call_ms: u64, try_ms: u64) {
        let id = self.fresh();
        let servers = (0..self.replicas.len()).map(|at| at.to_string()).collect();
        let start = self.rng.below(self.replicas.len() as u64) as usize;
        let retry = Retry::new(servers, None, start, call_ms, try_ms);
        self.calls
            .insert(id, Call { owner, rpc: Arc::new(rpc), retry, began: self.now, attempt: 0, lost_at: 0, look_at: 0 });
        self.drive(id, Tried::Ready);
    }

    fn drive(&mut self, id: u64, event: Tried) {
        let now = self.now;
        let Some(call) = self.calls.get_mut(&id) else { return };
        call.lost_at = u64::MAX;
        match call.retry.step(event, (now - call.began) / 1_000) {
            Action::GiveUp => self.call_over(id, None),
            Action::Wait { ms } => self.after(ms * 1_000, Event::CallReady { call: id }),
            Action::Call { addr, timeout_ms } => {
                call.attempt += 1;
                let (attempt, rpc, from) = (call.attempt, call.rpc.clone(), site_of(&call.owner));
                let replica = addr.parse().unwrap_or(0);
                call.lost_at = now + timeout_ms * 1_000;
                self.watch_call(id);
                self.send_request(replica, from, id, attempt, rpc);
            }
        }
    }

    fn send_request(&mut self, replica: usize, from: Site, call: u64, attempt: u32, rpc: Arc<Rpc>) {
        if !self.replicas[replica].up {
            let way = self.net.way(&mut self.rng);
            return self.after(way, Event::Reply { to: from, call, attempt, answer: Answer::Unreachable });
        }
        let twice = self.net.duplicate_permille > 0 && self.rng.chance(self.net.duplicate_permille);
        if twice {
            // A repetition by whatever stands between: it may come long after the first.
            let late = self.rng.range(10_000, 20_000_000);
            self.after(late, Event::Request { replica, from, call, attempt, rpc: rpc.clone() });
        }
        if self.net.loses(&mut self.rng) {
            return;
        }
        let way = self.net.way(&mut self.rng);
        self.after(way, Event::Request { replica, from, call, attempt, rpc });
    }

    pub fn call_ready(&mut self, id: u64) {
        self.drive(id, Tried::Ready);
    }

    /// One look at a time is planned of each call, no later than its try may last: most tries are answered, or others by then.
    fn watch_call(&mut self, id: u64) {
        let Some(call) = self.calls.get_mut(&id).filter(|call| call.look_at <= self.now || call.lost_at < call.look_at)
        else {
            return;
        };
        call.look_at = call.lost_at;
        self.queue.push(call.look_at, Event::CallTimeout { call: id });
    }

    pub fn call_timeout(&mut self, id: u64) {
        let now = self.now;
        match self.calls.get(&id) {
            Some(call) if call.lost_at <= now => self.drive(id, Tried::Lost),
            Some(call) if call.lost_at < u64::MAX => self.watch_call(id),
            _ => {}
        }
    }

    pub fn replied(&mut self, id: u64, attempt: u32, answer: Answer) {
        let Some(call) = self.calls.get_mut(&id).filter(|call| call.attempt == attempt) else { return };
        // Whatever comes of it, the timeout of this try is over.
        call.attempt += 1;
        match answer {
            Answer::NotLeader(hint) => self.drive(id, Tried::NotLeader(hint.map(|at| at.to_string()))),
            Answer::Unknown => self.drive(id, Tried::Lost),
            Answer::Unreachable => self.drive(id, Tried::Unreachable),
            answer => self.call_over(id, Some(answer)),
        }
    }

    fn call_over(&mut self, id: u64, answer: Option<Answer>) {
        let Some(call) = self.calls.remove(&id) else { return };
        match call.owner {
            Owner::Agent { agent, life } => self.agent_answered(agent, life, &call.rpc, answer),
            Owner::User { wish, floor } => self.user_answered(wish, floor, answer),
        }
    }

    // ----------------------------------------------------------------------------------------------------- load

    /// Everything that users will want, drawn before the run.
    pub fn draw_load(&mut self) {
        let mut rng = Rng::new(self.setup.seed, 3);
        let until = self.setup.busy_ms * 3 / 4;
        let mut at_ms = 500;
        for n in 0..self.setup.jobs {
            // Bursts with pauses between them.
            let wait =
                if rng.chance(800) { rng.range(0, 40) } else { rng.range(0, until * 9 / self.setup.jobs as u64) };
            at_ms = (at_ms + wait).min(until);
            self.draw_job(&mut rng, n, at_ms);
        }
        for (at_ms, priority) in [(350, PREEMPTIBLE), (400, URGENT)] {
            self.at_ms(at_ms, Wish::Operate(Box::new(Command::SetPriority(priority_of(priority)))));
        }
        for nth in 0..WINDOWS {
            let at_ms = rng.range(300, until);
            let create = self.draw_window(&mut rng, nth, at_ms);
            self.at_ms(at_ms, Wish::Operate(Box::new(Command::CreateReservation(Box::new(create)))));
        }
        for locker in 0..LOCKERS {
            self.users.sessions.push(None);
            self.at_ms(rng.range(300, 3_000), Wish::OpenSession(locker));
        }
    }

    /// A window on a machine or two that begins at once or soon, for a maintenance or for the jobs that name it. Whether it
    /// is refused, for it overlaps another or its machines have not joined, is all one.
    fn draw_window(&self, rng: &mut Rng, nth: u64, at_ms: u64) -> CreateReservation {
        let count = rng.range(1, 2).min(self.machines.len() as u64);
        let first = rng.below(self.machines.len() as u64);
        let name_of = |at: u64| self.machines[(at % self.machines.len() as u64) as usize].name.clone();
        CreateReservation {
            name: window_name(nth),
            maintenance: nth.is_multiple_of(2),
            machines: Machines { names: (first..first + count).map(name_of).collect(), ..Machines::default() },
            start_wall_ms: if rng.chance(300) { 0 } else { EPOCH_MS + (at_ms + rng.range(0, 15_000)) as i64 },
            duration_ms: rng.range(1_000, 15_000),
            requeue: rng.chance(500),
            ..CreateReservation::default()
        }
    }

    fn draw_job(&mut self, rng: &mut Rng, n: usize, at_ms: u64) {
        let (command, endless) = draw_submission(rng, &self.setup, n);
        let limited = command.spec.limit_ms > 0;
        let request = request_id(rng, at_ms);
        self.users.jobs.push(Submission {
            request,
            command,
            job: None,
            asked: false,
            gives_up: !endless && rng.chance(200),
            cancel_request: None,
        });
        self.at_ms(at_ms, Wish::Submit(n));
        let soon = at_ms + rng.range(5, 12_000);
        if (endless && !limited) || rng.chance(150) {
            self.at_ms(soon, Wish::Cancel(n));
        }
        if rng.chance(150) {
            let late = if rng.chance(500) { rng.range(50, 20_000) } else { rng.range(350_000, 800_000) };
            self.at_ms(at_ms + late, Wish::Again(n));
        }
        if rng.chance(60) {
            self.at_ms(soon, Wish::OtherBody(n));
        }
        if rng.chance(60) {
            self.at_ms(soon, Wish::Requeue(n));
        }
        if rng.chance(40) {
            self.at_ms(soon, Wish::Hold(n));
            self.at_ms(soon + rng.range(500, 9_000), Wish::Release(n));
        }
        if rng.chance(300) {
            self.at_ms(soon, Wish::Read(n));
        }
    }

    pub fn at_ms(&mut self, ms: u64, wish: Wish) {
        self.queue.push(ms * 1_000, Event::User(wish));
    }

    pub fn wish_after(&mut self, us: u64, wish: Wish) {
        self.after(us, Event::User(wish));
    }

    pub fn user(&mut self, wish: Wish) {
        let (request, command) = match &wish {
            Wish::Submit(n) | Wish::Again(n) => {
                // Two of three arrays wait, task by task, for those of an older one.
                let is_new = !self.users.jobs[*n].asked;
                let older = if is_new && n % 3 > 0 { self.users.array_before(*n) } else { None };
                let job = &mut self.users.jobs[*n];
                if matches!(wish, Wish::Again(_)) && is_new {
                    return;
                }
                if let Some((parent, ranges)) = older {
                    job.follow(parent, ranges);
                }
                job.asked = true;
                let command = Command::SubmitJob(Box::new(job.command.clone()));
                (job.request, command)
            }
            Wish::OtherBody(n) => {
                let job = &self.users.jobs[*n];
                let mut other = job.command.clone();
                other.body.argv.push("other".to_owned());
                if job.job.is_none() {
                    // Else it might be the first, and run.
                    return;
                }
                (job.request, Command::SubmitJob(Box::new(other)))
            }
            Wish::Cancel(n) => {
                let Some(job) = self.users.jobs[*n].job else {
                    // Nobody knows yet which job it became.
                    if !self.users.jobs[*n].gives_up {
                        self.wish_after(500_000, wish);
                    }
                    return;
                };
                let fresh = self.fresh_request();
                let request = *self.users.jobs[*n].cancel_request.get_or_insert(fresh);
                (request, Command::Cancel { job })
            }
            Wish::Requeue(n) | Wish::Hold(n) | Wish::Release(n) => {
                let Some(job) = self.users.jobs[*n].job else {
                    if matches!(wish, Wish::Release(_)) && !self.users.jobs[*n].gives_up {
                        self.wish_after(700_000, wish);
                    }
                    return;
                };
                let command = match wish {
                    Wish::Requeue(_) => Command::Requeue { job },
                    Wish::Hold(_) => Command::Hold { job },
                    _ => Command::Release { job },
                };
                (self.fresh_request(), command)
            }
            Wish::Read(n) => {
                let Some(job) = self.users.jobs[*n].job else { return };
                let owner = Owner::User { wish, floor: self.users.acknowledged };
                return self.call(owner, Rpc::Read { job }, CALL_MS, TRY_MS);
            }
            Wish::Operate(command) => (self.fresh_request(), (**command).clone()),
            Wish::OpenSession(n) => {
                if self.users.lockers_stop {
                    return;
                }
                let command = Command::OpenSession { owner: format!("locker {n}"), ttl_ms: 4_000 };
                (self.fresh_request(), command)
            }
            Wish::Acquire(n) | Wish::Unlock(n) => {
                let Some(session) = self.users.sessions[*n] else { return };
                let name = "lock".to_owned();
                let command = match wish {
                    Wish::Acquire(_) => Command::Acquire { session, name },
                    _ => Command::Unlock { session, name },
                };
                (self.fresh_request(), command)
            }
            Wish::KeepAlive(n) => {
                let Some(session) = self.users.sessions[*n] else { return };
                let owner = Owner::User { wish, floor: 0 };
                return self.call(owner, Rpc::KeepAlive { session }, CALL_MS, TRY_MS);
            }
        };
        let owner = Owner::User { wish, floor: self.users.acknowledged };
        self.call(owner, Rpc::Propose { request, actor: "user".to_owned(), command }, CALL_MS, TRY_MS);
    }

    fn fresh_request(&mut self) -> RequestId {
        let now_ms = self.now / 1_000;
        request_id(&mut self.rng, now_ms)
    }

    fn user_answered(&mut self, wish: Wish, floor: u64, answer: Option<Answer>) {
        if let Some(Answer::Outcome(_, revision)) = &answer {
            self.users.acknowledged = self.users.acknowledged.max(*revision);
        }
        match (wish, answer) {
            (Wish::Submit(n), None) if self.users.jobs[n].gives_up => {}
            (wish @ (Wish::Submit(_) | Wish::Cancel(_) | Wish::Release(_) | Wish::Operate(_)), None) => {
                self.wish_after(300_000, wish);
            }
            // The leader's wall clock is wrong: users come again until somebody has set it right.
            (wish, Some(Answer::Outcome(Outcome::Rejected(no), _))) if no.code == Code::RequestFromFuture => {
                self.sometimes.hit("a request id was refused as from the future");
                if let Wish::Cancel(n) = wish {
                    self.users.jobs[n].cancel_request = None;
                }
                if !matches!(wish, Wish::Again(_) | Wish::OtherBody(_)) {
                    self.wish_after(1_000_000, wish);
                }
            }
            (Wish::Submit(n) | Wish::Again(n), Some(Answer::Outcome(outcome, _))) => self.submitted(n, outcome),
            (Wish::OtherBody(n), Some(Answer::Outcome(outcome, _))) => {
                let accepted = !matches!(outcome, Outcome::Rejected(_));
                if accepted {
                    let text = format!("request {n} was answered with {outcome:?} for another body");
                    self.violate("request_once", text);
                }
            }
            (Wish::Read(n), Some(Answer::Seen { revision, found })) => {
                if revision < floor {
                    let text = format!("a read saw revision {revision} after {floor} was acknowledged");
                    self.violate("clients_linearizable", text);
                } else if !found {
                    self.violate(
                        "nothing_lost",
                        format!("job {:?} was acknowledged, a read lacks it", self.users.jobs[n].job),
                    );
                }
            }
            (Wish::OpenSession(n), answer) => self.session_opened(n, answer),
            (Wish::KeepAlive(n), answer) => self.session_kept(n, answer),
            (Wish::Acquire(n), _) => {
                let wait = self.rng.range(200_000, 6_000_000);
                self.wish_after(wait, Wish::Unlock(n));
            }
            (Wish::Unlock(n), _) => {
                let wait = self.rng.range(100_000, 2_000_000);
                self.wish_after(wait, Wish::Acquire(n));
            }
            _ => {}
        }
    }

    fn submitted(&mut self, n: usize, outcome: Outcome) {
        match outcome {
            Outcome::Done(Reply::Stored(StoredReply::Job(job))) | Outcome::Replayed(StoredReply::Job(job)) => {
                let known = self.users.jobs[n].job.replace(job);
                if known.is_some_and(|known| known != job) {
                    self.violate("request_once", format!("request {n} was job {known:?}, and now job {job}"));
                }
            }
            Outcome::Rejected(no) if no.code == Code::RequestExpired => {
                self.sometimes.hit("a request id was refused as too old");
                if self.users.jobs[n].job.is_none() && !self.users.jobs[n].gives_up {
                    self.users.jobs[n].request = self.fresh_request();
                    self.wish_after(500_000, Wish::Submit(n));
                }
            }
            // Its window may be yet to come, as long as operators make some.
            Outcome::Rejected(no) if no.code == Code::ReservationUnknown => {
                if self.healed_at.is_some() {
                    self.users.jobs[n].gives_up = true;
                } else if self.users.jobs[n].job.is_none() && !self.users.jobs[n].gives_up {
                    self.wish_after(2_000_000, Wish::Submit(n));
                }
            }
            other => self.violate("request_once", format!("submission {n} was answered with {other:?}")),
        }
    }

    fn session_opened(&mut self, n: usize, answer: Option<Answer>) {
        if let Some(Answer::Outcome(Outcome::Done(Reply::Stored(StoredReply::Session(session))), _)) = answer {
            self.users.sessions[n] = Some(session);
            self.wish_after(50_000, Wish::Acquire(n));
            self.wish_after(1_200_000, Wish::KeepAlive(n));
        } else {
            self.wish_after(1_000_000, Wish::OpenSession(n));
        }
    }

    /// Alive, or begun anew; now and then a user is silent for longer than its session lives.
    fn session_kept(&mut self, n: usize, answer: Option<Answer>) {
        if self.users.lockers_stop {
            return;
        }
        if matches!(answer, Some(Answer::Alive(false))) {
            self.users.sessions[n] = None;
            return self.wish_after(100_000, Wish::OpenSession(n));
        }
        let wait = if self.rng.chance(80) { 6_000_000 } else { 1_200_000 };
        self.wish_after(wait, Wish::KeepAlive(n));
    }

    /// Operators clean up after the faults: nodes go back in, jobs held for their machines' sake go on, and of parts that nobody could
    /// say the end of they look at the machine, and say it.
    pub fn operators_clean_up(&mut self) {
        let Some(leader) = self.raft.leader else { return };
        let state = &self.replicas[leader].state;
        let out = |node: &statemachine::record::Node| node.admin != statemachine::record::NodeAdmin::Ready;
        let mut commands: Vec<Command> = state
            .nodes
            .iter()
            .filter(|(_, node)| out(&node.value))
            .map(|(id, _)| Command::NodeAdmin { node: NodeId(id.0), out: None })
            .collect();
        let held = state
            .jobs
            .iter()
            .filter(|(_, job)| job.value.ended.is_none() && (job.value.holds.launch || job.value.holds.user));
        commands.extend(held.map(|(id, _)| Command::Release { job: *id }));
        commands.extend(self.found_dead(state));
        commands.extend(ended_windows(state));
        for command in commands {
            self.wish_after(1_000, Wish::Operate(Box::new(command)));
        }
    }

    /// Stuck parts of which truly no process is left.
    fn found_dead(&self, state: &State) -> Vec<Command> {
        let mut dead = Vec::new();
        for (token, lease) in state.leases.iter() {
            for part in lease.value.parts.iter().filter(|part| part.state == PartState::Stuck) {
                let name = state.nodes.get(&part.node).map(|node| &node.value.name);
                let agent = self.machines.iter().position(|machine| Some(&machine.name) == name);
                if agent.is_some_and(|agent| self.nothing_runs(agent, token.0)) {
                    dead.push(Command::ConfirmDead { node: part.node, token: Some(*token) });
                }
            }
        }
        dead
    }

    fn nothing_runs(&self, agent: usize, token: u64) -> bool {
        let machine = &self.machines[agent];
        let shims = machine.shims.range((token, 0)..=(token, u32::MAX)).next();
        machine.asleep_until <= self.now && shims.is_none() && !self.audit.runs(agent, token)
    }
}

/// Windows that are left, and jobs whose windows have ended: nothing else ends these.
fn ended_windows(state: &State) -> Vec<Command> {
    let windows = state.reservations.iter().map(|(_, window)| Command::EndReservation { name: window.name.clone() });
    let waits = |job: &statemachine::record::Job| job.ended.is_none() && !job.spec.reservation().is_empty();
    let jobs = state.jobs.iter().filter(|(_, job)| waits(&job.value));
    windows.chain(jobs.map(|(id, _)| Command::Cancel { job: *id })).collect()
}

fn window_name(nth: u64) -> String {
    format!("window-{nth}")
}

fn site_of(owner: &Owner) -> Site {
    match owner {
        Owner::Agent { agent, .. } => Site::Agent(*agent),
        Owner::User { wish, .. } => Site::User((wish.number() % 3) as usize),
    }
}

impl Users {
    /// The newest array before the n-th job that was accepted, with its indexes.
    fn array_before(&self, n: usize) -> Option<(JobId, Vec<(u32, u32)>)> {
        let older = self.jobs[..n].iter().rev();
        older.filter_map(|older| Some((older.job?, older.command.spec.array()?.ranges.clone()))).next()
    }
}

impl Submission {
    /// If it is an array it has these indexes, and each task waits for the one of its index.
    fn follow(&mut self, parent: JobId, ranges: Vec<(u32, u32)>) {
        let Some(terms) = self.command.spec.terms.as_mut() else { return };
        let Some(array) = terms.array.as_mut() else { return };
        array.ranges = ranges;
        terms.after = vec![After { kind: AfterKind::Corr, job: parent }];
    }
}

/// A UUIDv7 of this time: the users' clocks are right, the replicas' may have leapt.
fn request_id(rng: &mut Rng, at_ms: u64) -> RequestId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&((EPOCH_MS as u64 + at_ms) << 16).to_be_bytes());
    bytes[8..].copy_from_slice(&rng.draw().to_be_bytes());
    let low = rng.draw();
    bytes[6] = 0x70 | (low & 0xf) as u8;
    bytes[7] = (low >> 8) as u8;
    RequestId(bytes)
}

/// A priority whose jobs make room for those of another one.
const PREEMPTIBLE: &str = "preemptible";
const URGENT: &str = "urgent";

fn priority_of(name: &str) -> SetPriority {
    let urgent = name == URGENT;
    let (create, tenants) = (true, Vec::new());
    let value = if urgent { 100 } else { 0 };
    SetPriority { name: name.to_owned(), create, value, tenants, preempts: urgent, preemptible: !urgent }
}

/// What a job says of its machines, if it does: always so that a gang has racks left, and a single one some machines. Whether
/// those that it names have joined is all one.
fn draw_machines(rng: &mut Rng, setup: &Setup, nodes: u16) -> Option<Box<Selector>> {
    if !rng.chance(200) || setup.agents <= 2 * AGENTS_PER_RACK {
        return None;
    }
    let racks = setup.agents.div_ceil(AGENTS_PER_RACK) as u64;
    let (rack, first) = (rng.below(racks), rng.below(setup.agents as u64));
    let names = |count: u64| (first..first + count).map(|at| format!("n{}", at % setup.agents as u64)).collect();
    let by_labels = |text: String| Selector { constraint: text.parse().unwrap_or_default(), ..Selector::default() };
    let selector = match rng.below(4) {
        _ if nodes > 1 => by_labels(format!("rack!=r{rack}")),
        0 => by_labels(format!("rack!=r{rack}")),
        1 => by_labels(format!("rack=r{rack}|rack=r{}", (rack + 1) % racks)),
        2 => Selector { only: names(6), ..Selector::default() },
        _ => Selector { without: names(3), ..Selector::default() },
    };
    Some(Box::new(selector))
}

/// A job of any kind, and whether it ends only when it is told to.
fn draw_submission(rng: &mut Rng, setup: &Setup, n: usize) -> (SubmitJob, bool) {
    let endless = rng.chance(120);
    let script = Script {
        run_ms: match rng.below(10) {
            _ if endless => 100_000_000,
            0 => rng.range(1, 50),
            1..=6 => rng.range(200, 8_000),
            _ => rng.range(8_000, 30_000),
        },
        apart_ms: rng.pick(&[0, 0, 0, 1_500]),
        code: if rng.chance(200) { rng.pick(&[1, 2, 137]) } else { 0 },
        on_term: rng.chance(700).then(|| (rng.range(5, 4_000), rng.pick(&[143, 0]))),
        forks: rng.chance(150),
    };
    // The first are there before the classes are: those come a moment later.
    let classes = ["", "", PREEMPTIBLE, PREEMPTIBLE, PREEMPTIBLE, URGENT];
    let priority_class = if n < FIRST { String::new() } else { rng.pick(&classes).to_owned() };
    let nodes = rng.pick(&[1, 1, 1, 1, 1, 1, 1, 2, 2, 3]);
    let ttl_ms = rng.pick(&setup.ttls_ms);
    let argv = if rng.chance(20) && !endless { vec!["missing".to_owned()] } else { script.argv() };
    // Those of odd numbers are for jobs.
    let inside = rng.chance(120) && n >= FIRST && nodes == 1;
    let reservation = window_name(rng.below(WINDOWS / 2) * 2 + 1);
    // Some stand for a few short tasks: one after the other, each with all its retries, they still end in time.
    let short = nodes == 1 && script.run_ms <= 3_000;
    let tasks = if rng.chance(50) && short { rng.range(2, 9) as u32 } else { 0 };
    let array = Array { ranges: vec![(3, 3), (7, 6 + tasks)], throttle: rng.pick(&[0, 1, 3]) };
    // Some have more GPUs than any machine, and leave open on how many they are.
    let is_open = nodes == 1 && !inside && rng.chance(80);
    let ranks_per_node = rng.pick(&[1, 1, 2]);
    let gpus_per_rank = if is_open { (setup.gpus as u16 + 2) / ranks_per_node } else { rng.pick(&[0, 1, 1, 1, 2]) };
    let terms = Terms {
        reservation: if inside { reservation } else { String::new() },
        array: (tasks > 0).then_some(array),
        doublings: if is_open { rng.pick(&[0, 0, 1]) } else { 0 },
        ..Terms::default()
    };
    let terms = (terms != Terms::default()).then(|| Box::new(terms));
    let spec = JobSpec {
        name: format!("job-{n}").into(),
        priority: if priority_class.is_empty() { rng.pick(&[0, 0, 0, 5]) } else { 0 },
        shape: Shape {
            nodes: if is_open { 0 } else { nodes },
            ranks_per_node,
            gpus_per_rank,
            gpu_types: [].into(),
            mix_types: false,
            cores_per_rank: 0,
            mem_mib_per_rank: 0,
            min_bandwidth_mbps: 0,
            topology: (nodes > 1 && rng.chance(600))
                .then(|| Topology { level: Level::Rack, required: rng.chance(700) }),
            machines: if n < FIRST { None } else { draw_machines(rng, setup, nodes) },
        },
        limit_ms: if rng.chance(250) { rng.range(1_000, 12_000) } else { 0 },
        lease_ttl_ms: ttl_ms,
        kill_grace_ms: rng.range(100, ttl_ms / 4),
        retry: JobRetry {
            max: rng.below(4) as u16,
            initial_ms: rng.range(100, 1_000),
            mult_milli: 2_000,
            max_ms: 2_000,
            on_exit: [].into(),
        },
        labels: Default::default(),
        terms,
    };
    let body = Body { argv, env: Default::default(), cwd: String::new() };
    // Of a GPU for each rank, on any machine, some take slices.
    let free = nodes == 1 && !is_open && !inside && spec.shape.machines.is_none();
    let sliced = free && gpus_per_rank == 1 && rng.chance(200);
    let command = SubmitJob {
        tenant: "default".into(),
        queue: "default".into(),
        gpu_types: sliced.then(|| SLICE.to_owned()).into_iter().collect(),
        spec,
        body,
        hold: false,
        priority_class,
    };
    (command, endless)
}
