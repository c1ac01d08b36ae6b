//! What can happen, and the queue of what will, in virtual time. Times are microseconds of true time from the beginning of the run.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::sync::Arc;

use gpu_agent::agent::core::{self, Launch};
use proto::v1;
use statemachine::{Command, JobId, Outcome, RequestId, SessionId};

use super::fault::Fault;

/// Who sends and receives: replicas, agents, users.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    Replica(usize),
    Agent(usize),
    User(usize),
}

/// A call to a replica, as any of them could get it.
#[derive(Clone, Debug)]
pub enum Rpc {
    Propose {
        request: RequestId,
        actor: String,
        command: Command,
    },
    Read {
        job: JobId,
    },
    KeepAlive {
        session: SessionId,
    },
    Register(Box<v1::RegisterRequest>),
    Report(v1::ReportRequest),
    Health(v1::ReportHealthRequest),
    Fetch(Vec<u64>),
    /// Opens an agent's stream; `hello` is its first message.
    Session {
        agent: usize,
        life: u64,
        generation: u64,
        hello: v1::AgentMessage,
    },
}

/// What a replica answers.
#[derive(Clone, Debug)]
pub enum Answer {
    NotLeader(Option<usize>),
    /// It may have taken effect.
    Unknown,
    /// The connection was reset before the request was read.
    Unreachable,
    Outcome(Outcome, u64),
    Registered(v1::RegisterReply),
    RegisterRefused,
    Reported(Vec<String>),
    Refused,
    Bodies(Vec<v1::JobBody>),
    Opened {
        replica: usize,
        conn: u64,
    },
    /// Revision of the state that was read, and whether the job is there.
    Seen {
        revision: u64,
        found: bool,
    },
    Alive(bool),
}

/// A wait for a quorum, and what it is for.
#[derive(Debug)]
pub enum Check {
    Beats(Vec<Beat>),
    Read { from: Site, call: u64, attempt: u32, job: JobId },
    KeepAlive { from: Site, call: u64, attempt: u32, session: SessionId, received_ms: u64 },
}

/// One heartbeat as the leader has it; `known_epoch`: the newest that was committed when it came.
#[derive(Clone, Debug)]
pub struct Beat {
    pub conn: u64,
    pub node: u32,
    pub epoch: u64,
    pub number: u64,
    pub known_epoch: u64,
}

/// What the leader's end of a stream says.
#[derive(Clone, Debug)]
pub enum Word {
    Message(v1::LeaderMessage),
    Closed,
}

#[derive(Debug)]
pub enum Event {
    Fault(Fault),
    FaultOver(Fault),
    Request {
        replica: usize,
        from: Site,
        call: u64,
        attempt: u32,
        rpc: Arc<Rpc>,
    },
    Reply {
        to: Site,
        call: u64,
        attempt: u32,
        answer: Answer,
    },
    CallReady {
        call: u64,
    },
    CallTimeout {
        call: u64,
    },
    RaftTick,
    Commit,
    Apply {
        replica: usize,
        life: u64,
    },
    Pack {
        replica: usize,
        desk: u64,
    },
    FromAgent {
        replica: usize,
        conn: u64,
        message: v1::AgentMessage,
    },
    ToAgent {
        agent: usize,
        life: u64,
        generation: u64,
        word: Word,
    },
    Gather {
        replica: usize,
        desk: u64,
    },
    Checked {
        replica: usize,
        desk: u64,
        began_index: u64,
        check: Check,
    },
    Duty {
        replica: usize,
        desk: u64,
    },
    Links {
        replica: usize,
        desk: u64,
    },
    Plan {
        replica: usize,
        desk: u64,
        serial: u64,
    },
    Planned {
        replica: usize,
        desk: u64,
        /// Placements, then who ends for whom.
        plans: Vec<statemachine::Command>,
        unfinished: bool,
    },
    AgentTick {
        agent: usize,
        life: u64,
        at: u64,
    },
    Agent {
        agent: usize,
        life: u64,
        event: Box<core::Event>,
    },
    StartAgent {
        agent: usize,
    },
    Fence {
        agent: usize,
        life: u64,
        set: (u32, u64),
        launches: Vec<Launch>,
    },
    Spawn {
        agent: usize,
        life: u64,
        launches: Vec<Launch>,
    },
    Shim {
        agent: usize,
        boot: u64,
        key: (u64, u32),
        serial: u64,
    },
    Process {
        agent: usize,
        boot: u64,
        key: (u64, u32),
        what: Process,
    },
    /// A process that survived its machine's sleep, or a late SIGKILL, must be gone by now.
    Judge {
        agent: usize,
        key: (u64, u32),
    },
    Wake {
        agent: usize,
        slept_us: u64,
    },
    User(super::users::Wish),
}

/// What happens to a rank's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// It became its command.
    Runs,
    /// It ends by itself, or after a SIGTERM.
    Ends { code: i32 },
    /// SIGKILL takes effect.
    Killed,
}

impl Event {
    /// Where it happens: what is paused gets it later.
    pub fn site(&self) -> Option<Site> {
        match self {
            Event::Request { replica, .. }
            | Event::Apply { replica, .. }
            | Event::Pack { replica, .. }
            | Event::FromAgent { replica, .. }
            | Event::Gather { replica, .. }
            | Event::Checked { replica, .. }
            | Event::Duty { replica, .. }
            | Event::Links { replica, .. }
            | Event::Plan { replica, .. }
            | Event::Planned { replica, .. } => Some(Site::Replica(*replica)),
            Event::ToAgent { agent, .. }
            | Event::AgentTick { agent, .. }
            | Event::Agent { agent, .. }
            | Event::StartAgent { agent }
            | Event::Fence { agent, .. }
            | Event::Spawn { agent, .. } => Some(Site::Agent(*agent)),
            Event::Reply { to, .. } => Some(*to),
            _ => None,
        }
    }

    /// The machine whose sleep it waits for.
    pub fn machine(&self) -> Option<usize> {
        match self {
            Event::Shim { agent, .. } | Event::Process { agent, .. } => Some(*agent),
            _ => match self.site() {
                Some(Site::Agent(agent)) => Some(agent),
                _ => None,
            },
        }
    }

    /// For the trace: a word, and two numbers.
    pub fn mark(&self) -> (&'static str, u64, u64) {
        match self {
            Event::Fault(_) => ("fault", 0, 0),
            Event::FaultOver(_) => ("fault over", 0, 0),
            Event::Request { replica, call, .. } => ("request", *replica as u64, *call),
            Event::Reply { call, attempt, .. } => ("reply", *call, u64::from(*attempt)),
            Event::CallReady { call } => ("call again", *call, 0),
            Event::CallTimeout { call } => ("call timeout", *call, 0),
            Event::RaftTick => ("raft", 0, 0),
            Event::Commit => ("commit", 0, 0),
            Event::Apply { replica, .. } => ("apply", *replica as u64, 0),
            Event::Pack { replica, desk } => ("pack", *replica as u64, *desk),
            Event::FromAgent { replica, message, .. } => ("beat", *replica as u64, u64::from(message.node_id)),
            Event::ToAgent { agent, generation, .. } => ("to agent", *agent as u64, *generation),
            Event::Gather { replica, desk } => ("gather", *replica as u64, *desk),
            Event::Checked { replica, desk, .. } => ("checked", *replica as u64, *desk),
            Event::Duty { replica, desk } => ("duty", *replica as u64, *desk),
            Event::Links { replica, desk } => ("links", *replica as u64, *desk),
            Event::Plan { replica, desk, .. } => ("plan", *replica as u64, *desk),
            Event::Planned { replica, plans, .. } => ("planned", *replica as u64, plans.len() as u64),
            Event::AgentTick { agent, at, .. } => ("agent tick", *agent as u64, *at),
            Event::Agent { agent, .. } => ("agent", *agent as u64, 0),
            Event::StartAgent { agent } => ("agent starts", *agent as u64, 0),
            Event::Fence { agent, launches, .. } => ("fence", *agent as u64, launches.len() as u64),
            Event::Spawn { agent, launches, .. } => ("spawn", *agent as u64, launches.len() as u64),
            Event::Shim { agent, key, .. } => ("shim", *agent as u64, key.0),
            Event::Process { agent, key, .. } => ("process", *agent as u64, key.0),
            Event::Judge { agent, key } => ("judge", *agent as u64, key.0),
            Event::Wake { agent, .. } => ("wake", *agent as u64, 0),
            Event::User(wish) => ("user", wish.number(), 0),
        }
    }
}

struct Due {
    at: u64,
    serial: u64,
    /// Where its event is: the heap moves what it holds.
    place: usize,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.serial == other.serial
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    /// The earliest is the greatest; of one moment, the one that was planned first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.serial).cmp(&(self.at, self.serial))
    }
}

/// Events by their time.
#[derive(Default)]
pub struct Queue {
    heap: BinaryHeap<Due>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    serial: u64,
}

impl Queue {
    pub fn push(&mut self, at: u64, event: Event) {
        self.serial += 1;
        let place = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[place] = Some(event);
        self.heap.push(Due { at, serial: self.serial, place });
    }

    pub fn pop(&mut self) -> Option<(u64, Event)> {
        let Due { at, place, .. } = self.heap.pop()?;
        self.free.push(place);
        Some((at, self.events[place].take()?))
    }
}
