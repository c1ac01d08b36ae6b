//! The Raft oracle: one total order of entries, and which replica has how much of it. It keeps Raft's promises by decree (a committed
//! entry is on a majority and never changes; a leader has all of them) and leaves everything else to chance: delays, elections,
//! uncommitted entries that are lost or adopted, deposed leaders that do not know it yet.

use std::sync::Arc;

use statemachine::record::LogPosition;
use statemachine::{Cmd, Entry, State};

use super::desk::{Desk, Waiter};
use super::event::{Answer, Event, Site};
use super::net::Clock;
use super::world::World;

/// Between two rounds of the leader's heartbeats, in us.
const TICK_US: u64 = 100_000;
/// Rounds without a leader before somebody campaigns.
const PATIENCE_TICKS: std::ops::RangeInclusive<u64> = (2, 6).0..=(2, 6).1;
/// What was not acknowledged by then is sent again.
const RESEND_US: u64 = 1_500_000;
/// Digests are compared at each so many entries.
const DIGEST_EVERY: u64 = 16;

/// A committed entry; a blank one begins a term.
pub struct Logged {
    pub position: LogPosition,
    pub entry: Option<Arc<Entry>>,
}

/// Proposed and not committed.
pub struct Pending {
    pub leader: usize,
    pub term: u64,
    /// The term whose leader may commit it: a later one than its own once it was adopted.
    pub by_term: u64,
    pub ready_at: u64,
    pub entry: Option<Arc<Entry>>,
    pub waiters: Vec<Waiter>,
}

#[derive(Default)]
pub struct Raft {
    pub log: Vec<Logged>,
    pub pending: Vec<Pending>,
    pub term: u64,
    pub leader: Option<usize>,
    leaderless: u64,
    patience: u64,
    /// Digest after the entry with index (i + 1) x DIGEST_EVERY, as the first replica that got there had it.
    digests: Vec<u128>,
}

pub struct Replica {
    pub life: u64,
    pub up: bool,
    pub paused_until: u64,
    pub clock: Clock,
    pub state: State,
    pub applied: u64,
    /// Entries on its disk.
    pub received: u64,
    pub voted: u64,
    /// Elected in this term, and not in office yet.
    pub elected: Option<u64>,
    pub desk: Option<Box<Desk>>,
    pub snapshot: (State, u64),
    pub disk_us: u64,
    pub leader: Option<usize>,
    apply_due: bool,
}

impl Replica {
    pub fn new(state: State, clock: Clock) -> Self {
        Self {
            life: 0,
            up: true,
            paused_until: 0,
            clock,
            snapshot: (state.clone(), 0),
            state,
            applied: 0,
            received: 0,
            voted: 0,
            elected: None,
            desk: None,
            disk_us: 0,
            leader: None,
            apply_due: false,
        }
    }

    pub fn awake(&self, now: u64) -> bool {
        self.up && self.paused_until <= now
    }
}

impl World {
    /// Whether a majority would answer this replica as the leader of `term`.
    pub fn has_quorum(&self, replica: usize, term: u64) -> bool {
        let answering = (0..self.replicas.len()).filter(|other| self.answers(replica, *other, term)).count();
        2 * answering > self.replicas.len()
    }

    fn answers(&self, replica: usize, other: usize, term: u64) -> bool {
        let peer = &self.replicas[other];
        let linked = other == replica || self.net.linked(Site::Replica(replica), Site::Replica(other));
        linked && peer.awake(self.now) && peer.voted <= term
    }

    /// The followers that answer the leader, and whose next entry is still in its log.
    fn near(&self, leader: usize, term: u64) -> Vec<usize> {
        let last = self.committed();
        let near = |other: usize| last - self.replicas[other].applied <= 2 * self.setup.snapshot_every;
        (0..self.replicas.len())
            .filter(|other| *other != leader && near(*other) && self.answers(leader, *other, term))
            .collect()
    }

    /// Where the replicas stand, for people.
    pub fn group(&self) -> String {
        let one = |(at, replica): (usize, &Replica)| {
            let (voted, received, applied) = (replica.voted, replica.received, replica.applied);
            let state = if replica.awake(self.now) { "up" } else { "away" };
            format!("; replica {at} {state} in term {voted} has {received}, applied {applied}")
        };
        let each: String = self.replicas.iter().enumerate().map(one).collect();
        let (term, leader, committed) = (self.raft.term, self.raft.leader, self.committed());
        format!("term {term}, leader {leader:?}, {committed} entries committed{each}")
    }

    pub fn committed(&self) -> u64 {
        self.raft.log.len() as u64
    }

    pub fn raft_tick(&mut self) {
        self.after(TICK_US, Event::RaftTick);
        let led = self.raft.leader.filter(|leader| {
            self.replicas[*leader].awake(self.now)
                && self.replicas[*leader].voted == self.raft.term
                && self.has_quorum(*leader, self.raft.term)
        });
        match led {
            Some(leader) => {
                self.raft.leaderless = 0;
                self.heartbeat(leader);
                self.commit();
            }
            None => {
                self.raft.leaderless += 1;
                if self.raft.leaderless > self.raft.patience {
                    self.elect(None);
                    self.raft.patience = self.rng.range(*PATIENCE_TICKS.start(), *PATIENCE_TICKS.end());
                    self.raft.leaderless = 0;
                }
            }
        }
    }

    /// The leader's heartbeat: who hears it follows, and catches up.
    fn heartbeat(&mut self, leader: usize) {
        let (term, last) = (self.raft.term, self.committed());
        for other in 0..self.replicas.len() {
            if other == leader || !self.answers(leader, other, term) {
                continue;
            }
            self.follow(other, leader, term);
            if self.replicas[other].received < last {
                self.catch_up(other, leader);
            }
        }
    }

    /// The replica hears of this term's leader. One who led an earlier term learns that it is over.
    fn follow(&mut self, replica: usize, leader: usize, term: u64) {
        if self.replicas[replica].voted < term {
            self.replicas[replica].voted = term;
            self.step_down(replica);
        }
        self.replicas[replica].leader = Some(leader);
    }

    /// By the log, or by a snapshot where the leader's log begins later.
    fn catch_up(&mut self, replica: usize, leader: usize) {
        let last = self.committed();
        let behind = last - self.replicas[replica].applied;
        let source = self.replicas[leader].applied;
        if behind > 2 * self.setup.snapshot_every && source > self.replicas[replica].applied {
            self.sometimes.hit("snapshot installed on a replica that was away");
            let state = self.replicas[leader].state.clone();
            let target = &mut self.replicas[replica];
            target.snapshot = (state.clone(), source);
            target.state = state;
            target.applied = source;
        }
        self.replicas[replica].received = last;
        self.apply_soon(replica);
    }

    fn apply_soon(&mut self, replica: usize) {
        if self.replicas[replica].apply_due {
            return;
        }
        self.replicas[replica].apply_due = true;
        let leads = self.replicas[replica].leader == Some(replica);
        let wait = if leads { self.rng.range(50, 1_500) } else { self.rng.tail(20_000) };
        let life = self.replicas[replica].life;
        self.after(wait, Event::Apply { replica, life });
    }

    /// Somebody with all committed entries and a majority becomes leader; `prefer` if it can.
    pub fn elect(&mut self, prefer: Option<usize>) {
        let term = self.raft.term + 1;
        let last = self.committed();
        let fit: Vec<usize> = (0..self.replicas.len())
            .filter(|at| {
                self.replicas[*at].awake(self.now)
                    && self.replicas[*at].received == last
                    && self.has_quorum(*at, term)
                    // A follower behind two others, none of which reaches it, would not win.
                    && self.net.linked(Site::Replica(*at), Site::Replica(*at))
            })
            .collect();
        if fit.is_empty() {
            return;
        }
        let winner = prefer.filter(|at| fit.contains(at)).unwrap_or_else(|| self.rng.pick(&fit));
        let before = self.raft.leader;
        self.raft.term = term;
        self.raft.leader = Some(winner);
        self.settle_pending(winner);
        for other in 0..self.replicas.len() {
            if self.answers(winner, other, term) {
                self.follow(other, winner, term);
            }
        }
        self.trace.note("elected", winner as u64, term);
        if before.is_some_and(|before| before != winner && self.replicas[before].desk.is_some()) {
            self.sometimes.hit("two leaders alive in different terms");
        }
        self.replicas[winner].elected = Some(term);
        let ready_at = self.now + self.commit_wait(winner);
        let blank = Pending { leader: winner, term, by_term: term, ready_at, entry: None, waiters: Vec::new() };
        self.raft.pending.push(blank);
        self.after(ready_at - self.now, Event::Commit);
    }

    /// Of what earlier leaders proposed, the new one has a beginning of each, and all of its own: that it commits. The rest is lost.
    fn settle_pending(&mut self, winner: usize) {
        let term = self.raft.term;
        let committed_term = self.raft.log.last().map_or(0, |last| last.position.term);
        let pending = std::mem::take(&mut self.raft.pending);
        let mut broken: Vec<usize> = Vec::new();
        let mut oldest = None;
        for mut one in pending {
            let own = one.leader == winner;
            // A log has one history: what a later leader proposed excludes the rest of an earlier one's.
            let other = oldest.is_some_and(|leader| leader != one.leader);
            // Proposed by one who did not know that he was deposed: a later term's entries stand in its place.
            let overtaken = one.term < committed_term;
            if overtaken || broken.contains(&one.leader) || other || (!own && !self.rng.chance(500)) {
                broken.push(one.leader);
                if one.entry.is_some() {
                    self.sometimes.hit("an uncommitted entry was lost");
                }
                continue;
            }
            if one.entry.is_some() && !own {
                self.sometimes.hit("an uncommitted entry was adopted by the next leader");
            }
            oldest = Some(one.leader);
            one.by_term = term;
            one.ready_at = one.ready_at.min(self.now + self.commit_wait(winner));
            self.raft.pending.push(one);
        }
    }

    fn commit_wait(&mut self, leader: usize) -> u64 {
        let network = 2 * self.net.way(&mut self.rng);
        network.min(RESEND_US) + self.rng.range(100, 1_500) + self.replicas[leader].disk_us
    }

    /// Proposes one entry of this office.
    pub fn propose(&mut self, replica: usize, cmds: Vec<Cmd>, waiters: Vec<Waiter>) {
        let wait = self.commit_wait(replica);
        let salt = self.rng.draw();
        let now = self.now;
        let at = &self.replicas[replica];
        let Some(desk) = &at.desk else { return };
        let entry = Entry {
            level: at.state.meta.level,
            clock_ms: desk.cluster_ms(&at.clock, now),
            wall_ms: at.clock.wall_ms(now),
            salt,
            cmds,
        };
        let term = desk.term;
        self.raft.pending.push(Pending {
            leader: replica,
            term,
            by_term: term,
            ready_at: now + wait,
            entry: Some(Arc::new(entry)),
            waiters,
        });
        self.after(wait, Event::Commit);
    }

    /// Commits what the newest leader has a quorum for, in order.
    pub fn commit(&mut self) {
        let term = self.raft.term;
        let Some(leader) = self.raft.leader else { return };
        let able = self.replicas[leader].awake(self.now)
            && self.replicas[leader].voted == term
            && self.has_quorum(leader, term);
        // Who needs a snapshot first would not have the entry on its disk.
        let near = self.near(leader, term);
        let able = able && 2 * (near.len() + 1) > self.replicas.len();
        if !able {
            return;
        }
        let mut at = 0;
        let mut more = false;
        while at < self.raft.pending.len() {
            if self.raft.pending[at].by_term != term {
                at += 1;
                continue;
            }
            if self.raft.pending[at].ready_at > self.now {
                break;
            }
            let one = self.raft.pending.remove(at);
            let index = self.committed() + 1;
            let position = LogPosition { term: one.term, leader: one.leader as u64, index };
            self.raft.log.push(Logged { position, entry: one.entry });
            if let Some(desk) = &mut self.replicas[leader].desk
                && desk.term == one.term
                && !one.waiters.is_empty()
            {
                desk.waiting.insert(index, one.waiters);
            }
            more = true;
        }
        if more {
            self.replicate(leader, term, &near);
        }
    }

    fn replicate(&mut self, leader: usize, term: u64, near: &[usize]) {
        let last = self.committed();
        self.replicas[leader].received = last;
        self.replicas[leader].leader = Some(leader);
        self.apply_soon(leader);
        // Who is far behind gets a snapshot with the next heartbeat.
        for other in near.iter().copied() {
            self.follow(other, leader, term);
            self.replicas[other].received = last;
            self.apply_soon(other);
        }
    }

    /// Applies what the replica has.
    pub fn apply(&mut self, at: usize) {
        self.replicas[at].apply_due = false;
        let upto = self.replicas[at].received.min(self.committed());
        while self.replicas[at].applied < upto && self.failure.is_none() {
            self.apply_one(at);
        }
        if self.replicas[at].desk.is_some() {
            self.wake_links(at);
            self.wake_planner(at);
        }
    }

    pub fn apply_one(&mut self, at: usize) {
        let index = self.replicas[at].applied + 1;
        let logged = &self.raft.log[index as usize - 1];
        let (position, entry) = (logged.position, logged.entry.clone());
        let replica = &mut self.replicas[at];
        let seen = replica.state.meta.rev;
        let outcomes = match &entry {
            Some(entry) => replica.state.apply(entry).unwrap_or_default(),
            None => Vec::new(),
        };
        replica.state.set_applied(position);
        replica.applied = index;
        if index.is_multiple_of(DIGEST_EVERY) {
            self.compare_digest(at, index);
        }
        if index.is_multiple_of(self.setup.snapshot_every) {
            let replica = &mut self.replicas[at];
            replica.snapshot = (replica.state.clone(), index);
        }
        if index > self.audit.applied {
            if let Some(entry) = entry.as_deref() {
                self.trace.say(self.now, || format!("entry {index} term {} {entry:?} -> {outcomes:?}", position.term));
            }
            self.audit_entry(at, index, seen, entry.as_deref(), &outcomes);
        }
        if entry.is_none() && position.leader == at as u64 && self.replicas[at].elected == Some(position.term) {
            self.take_office(at, position.term);
        }
        let waiters = self.replicas[at].desk.as_mut().and_then(|desk| desk.waiting.remove(&index));
        if let Some(waiters) = waiters {
            self.answer_waiters(at, waiters, outcomes);
        }
    }

    fn compare_digest(&mut self, at: usize, index: u64) {
        let digest = self.replicas[at].state.digest();
        let place = (index / DIGEST_EVERY - 1) as usize;
        match self.raft.digests.get(place) {
            Some(known) if *known != digest => {
                self.violate("replicas_equal", format!("replica {at} has another digest at index {index}"));
            }
            Some(_) => {}
            None => {
                // An entry is applied somewhere first; what a snapshot jumped over, nobody compares there.
                self.raft.digests.resize(place + 1, digest);
                self.trace.note("digest", index, digest as u64);
            }
        }
    }

    /// The replica no longer leads, if it did: callers and agents are told.
    pub fn step_down(&mut self, at: usize) {
        self.replicas[at].elected = None;
        let Some(desk) = self.leave_office(at) else { return };
        let mut waiters: Vec<Waiter> = desk.door.into_iter().map(|(_, waiter)| waiter).collect();
        waiters.extend(desk.waiting.into_values().flatten());
        for pending in self.raft.pending.iter_mut().filter(|pending| pending.leader == at && pending.term == desk.term)
        {
            waiters.append(&mut pending.waiters);
        }
        for waiter in waiters {
            let answer =
                if self.rng.chance(500) { Answer::Unknown } else { Answer::NotLeader(self.replicas[at].leader) };
            self.answer(at, &waiter, answer);
        }
        for (_, conn) in desk.conns {
            self.close(at, &conn);
        }
    }

    pub fn crash_replica(&mut self, at: usize) {
        let replica = &mut self.replicas[at];
        replica.up = false;
        replica.life += 1;
        replica.elected = None;
        // It may be back before anybody missed it, but not as the leader of that term.
        self.raft.leader = self.raft.leader.filter(|leader| *leader != at);
        let Some(desk) = self.leave_office(at) else { return };
        // The kernel resets its connections; callers learn nothing of their requests.
        for (_, conn) in desk.conns {
            self.close(at, &conn);
        }
    }

    /// From its snapshot and its log: what it had must come out again.
    pub fn restart_replica(&mut self, at: usize) {
        let replica = &mut self.replicas[at];
        if replica.up {
            return;
        }
        replica.up = true;
        replica.apply_due = false;
        (replica.state, replica.applied) = (replica.snapshot.0.clone(), replica.snapshot.1);
        replica.leader = None;
        self.sometimes.hit("a replica was restarted and replayed its log");
        let upto = self.replicas[at].received;
        while self.replicas[at].applied < upto && self.failure.is_none() {
            self.apply_one(at);
        }
    }
}
