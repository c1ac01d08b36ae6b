//! The agent's whole behaviour as one pure step: `step(event, now) -> actions`. No socket, no file, no process, no clock:
//! `now` is ms of CLOCK_BOOTTIME. The shell (`run`) turns actions into IO and IO into events.

use std::collections::{BTreeMap, BTreeSet};

use proto::{reason, v1};

use super::lease::Keeper;
use super::part::{Part, Rank, Say};
use super::reconcile::{Step, reconcile};
use crate::shim::record::Outcome;

/// Heartbeat interval where the leader names none.
pub const HEARTBEAT_MS: u64 = 2_000;
/// A session without an acknowledgement for so many intervals is left for another replica.
const SILENT_INTERVALS: u64 = 3;
/// A failed report or fetch is tried again so soon; doubles up to the maximum.
const RETRY_FIRST_MS: u64 = 100;
const RETRY_MAX_MS: u64 = 2_000;
/// How long the end of an attempt is told at registrations after its acknowledgement (a restored cluster may have lost
/// it), and of how many.
const FINISHED_KEPT_MS: u64 = 24 * 3_600 * 1_000;
const FINISHED_KEPT: usize = 1_000;

/// What a registration says of this machine's attempts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listing {
    pub running: Vec<v1::RunningPart>,
    pub finished: Vec<v1::FinishedPart>,
    pub dead: Vec<u64>,
    /// Epoch of the newest registration known when this was written; 0 = none.
    pub after_epoch: u64,
}

/// One attempt to take up.
#[derive(Clone, Debug, PartialEq)]
pub struct Launch {
    pub lease: v1::DesiredLease,
    pub body: v1::JobBody,
    /// ms of CLOCK_BOOTTIME.
    pub deadline: u64,
    /// Start at once, else wait behind the barrier.
    pub open: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Tick,
    Registered(v1::RegisterReply),
    /// Another registration of this node came first, an own one perhaps whose answer was lost: the newest has this epoch.
    Overtaken {
        epoch: u64,
    },
    /// It is tried again after a while.
    RegisterFailed,
    Connected,
    Disconnected,
    FromLeader(v1::LeaderMessage),
    Bodies(Vec<v1::JobBody>),
    BodiesFailed,
    /// Taken up, or not: one state per rank; the port chosen for MASTER_PORT, 0 = none.
    Launched {
        token: u64,
        port: u32,
        ranks: Vec<Rank>,
    },
    Rank {
        token: u64,
        local: u32,
        rank: Rank,
    },
    /// An attempt that was left alone is known by now; `deadline`: that of its shims, 0 = none is alive.
    Found {
        token: u64,
        part: Part,
        deadline: u64,
    },
    /// One refusal per item; empty = recorded.
    Reported(Vec<String>),
    /// Nothing is known of it; `stale_epoch`: refused because another registration came after ours.
    ReportFailed {
        stale_epoch: bool,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    Register(Listing),
    /// Open a session with the leader, in place of the present one.
    Connect,
    Heartbeat {
        number: u64,
        tokens: Vec<u64>,
    },
    Fetch(Vec<u64>),
    /// One fence write for all of them. `set`: (incarnation, index) that asked for them.
    Launch {
        set: (u32, u64),
        launches: Vec<Launch>,
    },
    Extend {
        token: u64,
        deadline: u64,
    },
    Open {
        token: u64,
        master_addr: String,
        master_port: u32,
    },
    Stop {
        token: u64,
        signal: u8,
        grace_ms: u64,
    },
    Report(Vec<v1::ReportItem>),
    /// The leader has its end.
    Forget(Vec<u64>),
    /// Another process registered this node later: leave, and leave the shims alone.
    Leave(String),
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    at: u64,
    wait: u64,
}

impl Retry {
    const NOW: Retry = Retry { at: 0, wait: RETRY_FIRST_MS };

    fn failed(&mut self, now: u64) {
        self.at = now + self.wait;
        self.wait = (self.wait * 2).min(RETRY_MAX_MS);
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Registration {
    /// Wanted; the request goes out when the retry is due.
    Due,
    Asked(Listing),
    Done,
}

struct Finished {
    exits: Vec<v1::RankExit>,
    at: u64,
}

pub struct Core {
    registration: Registration,
    register_retry: Retry,
    /// Epoch of the newest registration of this node that is known here; 0 = none is.
    newest_epoch: u64,
    node_id: u32,
    epoch: u64,
    cluster_id: String,
    heartbeat_ms: u64,
    keeper: Keeper,
    connected: bool,
    next_beat: u64,
    last_beat: u64,
    /// When the session was opened, or last acknowledged something.
    heard: u64,
    /// Highest (incarnation, index) accepted.
    seen: (u32, u64),
    desired: Option<Vec<v1::DesiredLease>>,
    parts: BTreeMap<u64, Part>,
    finished: BTreeMap<u64, Finished>,
    /// Attempts of which something may be alive that can't be killed or read: never taken up, and not told as gone until
    /// they are [`Event::Found`].
    left_alone: BTreeSet<u64>,
    bodies: BTreeMap<u64, v1::JobBody>,
    fetching: Vec<u64>,
    fetch_retry: Retry,
    reporting: Vec<(u64, Say)>,
    /// In which epoch that was said.
    reporting_epoch: u64,
    report_retry: Retry,
    /// A start waits for a fresh acknowledgement.
    beat_first: bool,
    over: bool,
}

impl Core {
    /// `seen`: the highest desired set that the fence file knows.
    pub fn new(seen: (u32, u64)) -> Self {
        Self {
            registration: Registration::Due,
            register_retry: Retry::NOW,
            newest_epoch: 0,
            node_id: 0,
            epoch: 0,
            cluster_id: String::new(),
            heartbeat_ms: HEARTBEAT_MS,
            keeper: Keeper::default(),
            connected: false,
            next_beat: 0,
            last_beat: 0,
            heard: 0,
            seen,
            desired: None,
            parts: BTreeMap::new(),
            finished: BTreeMap::new(),
            left_alone: BTreeSet::new(),
            bodies: BTreeMap::new(),
            fetching: Vec::new(),
            fetch_retry: Retry::NOW,
            reporting: Vec::new(),
            reporting_epoch: 0,
            report_retry: Retry::NOW,
            beat_first: false,
            over: false,
        }
    }

    /// An attempt found on disk when the agent started. `settled`: the leader has its end.
    pub fn adopt(&mut self, token: u64, part: Part, deadline: u64, settled: bool, now: u64) {
        if settled {
            self.finish(token, part.exits(), now);
        } else {
            self.keeper.adopt(token, part.ttl_ms, deadline);
            self.parts.insert(token, part);
        }
    }

    /// An attempt found on disk of which something may still be alive: the leader must not hear that its part is free.
    pub fn leave_alone(&mut self, token: u64) {
        self.left_alone.insert(token);
    }

    pub fn node_id(&self) -> u32 {
        self.node_id
    }

    /// 0 = not registered yet.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    pub fn seen_index(&self) -> u64 {
        self.seen.1
    }

    /// Whether the attempt is known here, started or about to be.
    pub fn knows(&self, token: u64) -> bool {
        let wanted = self.desired.iter().flatten().any(|lease| lease.token == token);
        wanted || self.parts.contains_key(&token)
    }

    /// Whether something is to start here and has not been taken up.
    pub fn starts_soon(&self) -> bool {
        self.desired.iter().flatten().any(|lease| self.is_to_start(lease))
    }

    fn is_to_start(&self, lease: &v1::DesiredLease) -> bool {
        lease.stop.is_empty() && !self.parts.contains_key(&lease.token) && !self.is_closed(lease.token)
    }

    pub fn step(&mut self, event: Event, now: u64) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.over {
            return actions;
        }
        self.take(event, now, &mut actions);
        if self.over {
            return actions;
        }
        self.settle(now, &mut actions);
        self.register_if_due(now, &mut actions);
        if self.registration == Registration::Done {
            self.reconcile(now, &mut actions);
            self.fetch(now, &mut actions);
            self.beat_if_due(now, &mut actions);
            self.report(now, &mut actions);
        }
        actions
    }

    /// When a [`Event::Tick`] is due at the latest.
    pub fn next_wake(&self, now: u64) -> u64 {
        let mut wake = now + 60_000;
        match &self.registration {
            Registration::Due => wake = wake.min(self.register_retry.at),
            Registration::Asked(_) => {}
            Registration::Done => {
                if self.connected {
                    wake = wake.min(self.next_beat);
                }
                if self.reporting.is_empty() && self.parts.values().any(|part| !part.due().is_empty()) {
                    wake = wake.min(self.report_retry.at);
                }
                if self.fetching.is_empty() && self.fetch_retry.at > now {
                    wake = wake.min(self.fetch_retry.at);
                }
            }
        }
        wake.max(now + 1)
    }

    fn take(&mut self, event: Event, now: u64, actions: &mut Vec<Action>) {
        match event {
            Event::Tick => {}
            Event::Registered(reply) => self.registered(reply, now, actions),
            Event::Overtaken { epoch } => {
                self.registration = Registration::Due;
                self.newest_epoch = epoch;
            }
            Event::RegisterFailed => {
                self.registration = Registration::Due;
                self.register_retry.failed(now);
            }
            Event::Connected => {
                self.connected = true;
                // An older set may hold what was ended since: the session begins with the leader's present one.
                self.desired = None;
                self.heard = now;
                self.next_beat = now;
            }
            Event::Disconnected => {
                self.connected = false;
                if self.registration == Registration::Done {
                    actions.push(Action::Connect);
                }
            }
            Event::FromLeader(message) => self.hear(message, now, actions),
            Event::Bodies(bodies) => {
                let missing = bodies.len() < self.fetching.len();
                self.fetching.clear();
                self.fetch_retry = Retry::NOW;
                if missing {
                    self.fetch_retry.failed(now);
                }
                self.bodies.extend(bodies.into_iter().map(|body| (body.job_id, body)));
            }
            Event::BodiesFailed => {
                self.fetching.clear();
                self.fetch_retry.failed(now);
            }
            Event::Launched { token, port, ranks } => {
                if let Some(part) = self.parts.get_mut(&token) {
                    part.port = port;
                    // A rank can end before the launch of its whole part is told: that stands.
                    let launching = part.ranks.iter_mut().zip(ranks).filter(|(known, _)| known.is_alive());
                    launching.for_each(|(known, rank)| *known = rank);
                }
            }
            Event::Rank { token, local, rank } => {
                let known = self.parts.get_mut(&token).and_then(|part| part.ranks.get_mut(local as usize));
                // What has ended does not start again, whatever comes late.
                if let Some(known) = known.filter(|known| known.is_alive()) {
                    *known = rank;
                }
            }
            Event::Found { token, part, deadline } => {
                if self.left_alone.remove(&token) {
                    self.adopt(token, part, deadline, false, now);
                    // It was in no list of the last registration.
                    self.want_registration();
                }
            }
            Event::Reported(refusals) => self.reported(refusals, now),
            Event::ReportFailed { stale_epoch } => {
                self.reporting.clear();
                self.report_retry.failed(now);
                if stale_epoch {
                    self.want_registration();
                }
            }
        }
    }

    fn registered(&mut self, reply: v1::RegisterReply, now: u64, actions: &mut Vec<Action>) {
        let Registration::Asked(listing) = std::mem::replace(&mut self.registration, Registration::Done) else {
            return;
        };
        if reply.incarnation < self.seen.0 {
            self.over = true;
            let known = self.seen.0;
            let text = format!("the cluster's incarnation {} is older than {known}, known here", reply.incarnation);
            actions.push(Action::Leave(text));
            return;
        }
        self.register_retry = Retry::NOW;
        self.node_id = reply.node_id;
        self.epoch = reply.epoch;
        self.newest_epoch = reply.epoch;
        self.cluster_id = reply.cluster_id;
        self.heartbeat_ms = if reply.heartbeat_ms == 0 { HEARTBEAT_MS } else { reply.heartbeat_ms };
        self.keeper.new_epoch();
        let mut told = listing.dead;
        told.retain(|token| self.parts.remove(token).is_some());
        for token in &told {
            // Remembered, so that a set that still has it does not start it again.
            self.finish(*token, Vec::new(), now);
        }
        for finished in listing.finished {
            if let Some(part) = self.parts.remove(&finished.token) {
                self.finish(finished.token, part.exits(), now);
                told.push(finished.token);
            }
        }
        for token in &told {
            self.keeper.release(*token);
        }
        actions.push(Action::Forget(told));
        self.connected = false;
        actions.push(Action::Connect);
    }

    fn hear(&mut self, message: v1::LeaderMessage, now: u64, actions: &mut Vec<Action>) {
        use v1::leader_message::What;
        match message.what {
            Some(What::Ack(ack)) if ack.epoch == self.epoch && ack.incarnation >= self.seen.0 => {
                self.heard = now;
                self.beat_first = false;
                let moved = self.keeper.acked(ack.heartbeat, &ack.tokens, now);
                actions.extend(moved.into_iter().map(|(token, deadline)| Action::Extend { token, deadline }));
            }
            Some(What::Desired(set)) => self.desired(set),
            // While our own registration is under way, the later one may be ours, its answer still to come.
            Some(What::Reregister(why)) if why.superseded && self.registration == Registration::Done => {
                self.over = true;
                actions.push(Action::Leave(why.reason));
            }
            Some(What::Reregister(_)) => self.want_registration(),
            _ => {}
        }
    }

    fn desired(&mut self, set: v1::Desired) {
        let newer = (set.incarnation, set.index) >= self.seen;
        let ours = set.epoch == self.epoch && set.cluster_id == self.cluster_id;
        if newer && ours && self.registration == Registration::Done {
            self.seen = (set.incarnation, set.index);
            self.bodies.retain(|job, _| set.leases.iter().any(|lease| lease.job_id == *job));
            self.desired = Some(set.leases);
        }
    }

    fn reported(&mut self, refusals: Vec<String>, now: u64) {
        let asked = std::mem::take(&mut self.reporting);
        if refusals.len() != asked.len() {
            self.report_retry.failed(now);
            return;
        }
        self.report_retry = Retry::NOW;
        // The listing that is under way, or the one that came after, has the part as it was before: it is said again after it.
        if matches!(self.registration, Registration::Asked(_)) || self.reporting_epoch != self.epoch {
            return;
        }
        let stale = reason::EPOCH_STALE.name;
        for ((token, say), refusal) in asked.iter().zip(&refusals) {
            if refusal == stale {
                self.want_registration();
            } else if let Some(part) = self.parts.get_mut(token) {
                part.answered(say);
            }
        }
    }

    /// Attempts whose end the leader knows leave the list of live ones.
    fn settle(&mut self, now: u64, actions: &mut Vec<Action>) {
        let settled: Vec<u64> =
            self.parts.iter().filter(|(_, part)| part.is_settled()).map(|(token, _)| *token).collect();
        for token in &settled {
            if let Some(part) = self.parts.remove(token) {
                self.finish(*token, part.exits(), now);
            }
            self.keeper.release(*token);
        }
        if !settled.is_empty() {
            actions.push(Action::Forget(settled));
        }
        if self.registration == Registration::Done && self.parts.values().any(Part::is_dead) {
            self.want_registration();
        }
    }

    fn finish(&mut self, token: u64, exits: Vec<v1::RankExit>, now: u64) {
        self.finished.insert(token, Finished { exits, at: now });
        while self.finished.len() > FINISHED_KEPT {
            self.finished.pop_first();
        }
    }

    /// Never to be taken up, or declined, again.
    fn is_closed(&self, token: u64) -> bool {
        self.finished.contains_key(&token) || self.left_alone.contains(&token)
    }

    fn want_registration(&mut self) {
        if self.registration == Registration::Done {
            self.registration = Registration::Due;
        }
    }

    fn register_if_due(&mut self, now: u64, actions: &mut Vec<Action>) {
        // While shims are being started it is not known what runs.
        let launching = self.parts.values().any(|part| part.ranks.contains(&Rank::Launching));
        if self.registration == Registration::Due && now >= self.register_retry.at && !launching {
            let listing = self.listing(now);
            self.registration = Registration::Asked(listing.clone());
            actions.push(Action::Register(listing));
        }
    }

    fn listing(&self, now: u64) -> Listing {
        let mut listing = Listing { after_epoch: self.newest_epoch, ..Listing::default() };
        for (token, part) in &self.parts {
            let never = part.ranks.iter().all(|rank| matches!(rank, Rank::Ended(Outcome::NeverStarted)));
            // A failed launch is in no list of ends: the part is kept, and the report that says why comes after.
            if part.is_alive() || (part.failure().is_some() && !part.is_dead()) {
                listing.running.push(v1::RunningPart {
                    token: *token,
                    job_id: part.job_id,
                    gpu_uuids: part.gpus.clone(),
                    started: part.has_started(),
                });
            } else if part.is_dead() || never {
                listing.dead.push(*token);
            } else {
                listing.finished.push(v1::FinishedPart { token: *token, exits: part.exits() });
            }
        }
        let recent = self.finished.iter().filter(|(_, end)| end.at + FINISHED_KEPT_MS > now && !end.exits.is_empty());
        listing
            .finished
            .extend(recent.map(|(token, end)| v1::FinishedPart { token: *token, exits: end.exits.clone() }));
        listing
    }

    fn reconcile(&mut self, now: u64, actions: &mut Vec<Action>) {
        let Some(desired) = self.desired.take() else { return };
        let mut launches = Vec::new();
        for step in reconcile(&desired, &self.parts, |token| self.is_closed(token)) {
            let lease = |token: u64| desired.iter().find(|lease| lease.token == token);
            match step {
                Step::Launch { token, open } => launches.extend(lease(token).and_then(|l| self.launch(l, open, now))),
                Step::Open { token } => {
                    if let (Some(lease), Some(part)) = (lease(token), self.parts.get_mut(&token)) {
                        part.open = true;
                        actions.push(Action::Open {
                            token,
                            master_addr: lease.master_addr.clone(),
                            master_port: lease.master_port,
                        });
                    }
                }
                Step::Stop { token, signal, grace_ms } => {
                    if let Some(part) = self.parts.get_mut(&token) {
                        part.stopping = true;
                        actions.push(Action::Stop { token, signal, grace_ms });
                    }
                }
                Step::Decline { token } => {
                    if let Some(lease) = lease(token) {
                        self.parts.insert(token, Part::new(lease, Rank::Ended(Outcome::NeverStarted)));
                    }
                }
            }
        }
        self.desired = Some(desired);
        if !launches.is_empty() {
            actions.push(Action::Launch { set: self.seen, launches });
        }
    }

    /// Needs the job's body, and a deadline that leaves more than the kill grace.
    fn launch(&mut self, lease: &v1::DesiredLease, open: bool, now: u64) -> Option<Launch> {
        let body = self.bodies.get(&lease.job_id)?.clone();
        let mut part = Part::new(lease, Rank::Launching);
        let Some(deadline) = self.keeper.hold(lease.token, lease.ttl_ms, part.grace_ms, now) else {
            self.beat_first = true;
            return None;
        };
        part.open = open;
        self.parts.insert(lease.token, part);
        Some(Launch { lease: lease.clone(), body, deadline, open })
    }

    fn fetch(&mut self, now: u64, actions: &mut Vec<Action>) {
        if !self.fetching.is_empty() || now < self.fetch_retry.at {
            return;
        }
        let unknown = |lease: &&v1::DesiredLease| self.is_to_start(lease) && !self.bodies.contains_key(&lease.job_id);
        let mut jobs: Vec<u64> = self.desired.iter().flatten().filter(unknown).map(|lease| lease.job_id).collect();
        jobs.sort_unstable();
        jobs.dedup();
        if !jobs.is_empty() {
            self.fetching = jobs.clone();
            actions.push(Action::Fetch(jobs));
        }
    }

    fn beat_if_due(&mut self, now: u64, actions: &mut Vec<Action>) {
        if !self.connected {
            return;
        }
        if now.saturating_sub(self.heard) > SILENT_INTERVALS * self.heartbeat_ms {
            self.connected = false;
            actions.push(Action::Connect);
            return;
        }
        // One that is under way answers a waiting start as well.
        let urgent = self.beat_first && now >= self.last_beat + RETRY_FIRST_MS;
        if now >= self.next_beat || urgent {
            self.next_beat = now + self.heartbeat_ms;
            self.last_beat = now;
            let tokens = self.parts.iter().filter(|(_, part)| part.is_alive()).map(|(token, _)| *token).collect();
            actions.push(Action::Heartbeat { number: self.keeper.beat(now), tokens });
        }
    }

    fn report(&mut self, now: u64, actions: &mut Vec<Action>) {
        if !self.reporting.is_empty() || now < self.report_retry.at {
            return;
        }
        let due = |(token, part): (&u64, &Part)| part.due().into_iter().map(|say| (*token, say)).collect::<Vec<_>>();
        self.reporting = self.parts.iter().flat_map(due).collect();
        if !self.reporting.is_empty() {
            self.reporting_epoch = self.epoch;
            let items = self.reporting.iter().map(|(token, say)| self.parts[token].item(*token, say)).collect();
            actions.push(Action::Report(items));
        }
    }
}
