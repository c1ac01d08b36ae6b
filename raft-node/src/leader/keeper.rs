//! The leader's memory of who was heard, and what follows from it: a pure step without clock or socket.
//!
//! **The lease inequality.** An agent counts a lease's deadline from the moment at which it *sent* the last heartbeat
//! that was acknowledged: `sent + ttl`. The leader counts from the *receipt* of the newest one, and may end the lease
//! only at `received + ttl x (1 + drift) + margin`. Sent <= received, so while clock *rates* differ by less than `drift`
//! and a process dies within `margin` of its SIGKILL, the job is dead before its GPUs can be granted again.
//!
//! Two rules close the holes that remain without any clock fault: a heartbeat is acknowledged only behind a quorum
//! check begun after its receipt (the caller's duty, see `leader::beats`), and once the end of a lease was proposed it
//! is never extended again in this term ([`Keeper::answer`]).

use std::collections::{BTreeMap, BTreeSet};

use planted::{Bug, planted};
use statemachine::command::DueCause;
use statemachine::record::{LeasePhase, PartState, VerdictKind};
use statemachine::{Command, NodeId, SessionId, State, Token};

/// Bound on the difference of clock rates, in percent of the TTL.
pub const DRIFT_PERCENT: u64 = 1;
/// From SIGKILL until no process of a rank is left, on a machine that can't be asked; in ms.
pub const KILL_MARGIN_MS: u64 = 2_000;
/// Agents send a heartbeat this often, in ms.
pub const HEARTBEAT_MS: u64 = 2_000;
/// A node unheard for three heartbeats gets nothing new.
pub const UNHEARD_MS: u64 = 3 * HEARTBEAT_MS;
/// A proposed end that is not applied yet is proposed again after this long, in ms.
const REPROPOSE_MS: u64 = 2_000;
/// Shims enforce time limits; the leader steps in when a limit and the kill grace are over by this much, in ms.
const LIMIT_SLACK_MS: u64 = 10_000;

/// What a heartbeat gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Acknowledged: these leases are extended from the heartbeat's send time.
    Extend(Vec<Token>),
    /// The epoch is not the state's.
    Reregister { superseded: bool, reason: String },
}

/// One term's memory. Times are ms of the leader's own monotonic clock unless they are called cluster time.
#[derive(Clone, Debug)]
pub struct Keeper {
    /// When the term's leader took office.
    office_ms: u64,
    heard: BTreeMap<NodeId, (u64, u64)>,
    sessions: BTreeMap<SessionId, u64>,
    /// Ends proposed and not applied yet, with the time of the last proposal.
    ending: BTreeMap<(Token, NodeId), u64>,
    /// Parts of an older epoch, which no heartbeat extends, with the time at which this term saw them first.
    unnamed: BTreeMap<(Token, NodeId), u64>,
    ending_sessions: BTreeMap<SessionId, u64>,
    /// Leases whose start or run time was found due, with the time of the last proposal.
    due: BTreeMap<Token, u64>,
}

impl Keeper {
    /// At office every agent with leases, and every session, gets a full TTL.
    pub fn new(state: &State, now_ms: u64) -> Self {
        let mut heard = BTreeMap::new();
        for (_, lease) in state.leases.iter() {
            for part in &lease.value.parts {
                heard.insert(part.node, (part.epoch, now_ms));
            }
        }
        Self {
            office_ms: now_ms,
            heard,
            sessions: state.sessions.iter().map(|(id, _)| (*id, now_ms)).collect(),
            ending: BTreeMap::new(),
            unnamed: BTreeMap::new(),
            ending_sessions: BTreeMap::new(),
            due: BTreeMap::new(),
        }
    }

    /// A heartbeat was received; one of another epoch than the state's says nothing. True when the node was unheard before:
    /// the planner may use it again.
    pub fn hear(&mut self, state: &State, node: NodeId, epoch: u64, received_ms: u64) -> bool {
        if state.nodes.get(&node).is_none_or(|record| record.value.epoch != epoch) {
            return false;
        }
        let before = self.heard.insert(node, (epoch, received_ms));
        before.is_none_or(|(known, at)| known != epoch || received_ms.saturating_sub(at) > UNHEARD_MS)
    }

    /// A session's keep-alive was received; one that is noted late takes nothing back.
    pub fn hear_session(&mut self, session: SessionId, received_ms: u64) {
        let heard_ms = self.sessions.entry(session).or_insert(received_ms);
        *heard_ms = received_ms.max(*heard_ms);
    }

    /// May this session still be extended in this term?
    pub fn session_alive(&self, state: &State, session: SessionId) -> bool {
        state.sessions.contains(&session) && !self.ending_sessions.contains_key(&session)
    }

    /// The answer to a heartbeat, from state applied at or after a read index that was begun after its receipt.
    pub fn answer(&self, state: &State, node: NodeId, epoch: u64) -> Answer {
        let Some(record) = state.nodes.get(&node) else {
            return Answer::Reregister { superseded: false, reason: format!("node {node} is not known here") };
        };
        let current = record.value.epoch;
        if current != epoch && !planted(Bug::EpochIgnored) {
            return Answer::Reregister {
                superseded: current > epoch && record.value.has_registered(),
                reason: format!("epoch {epoch} of node {} is over, the newest is {current}", record.value.name),
            };
        }
        let tokens = state.allocs.get(&node).map(|alloc| alloc.leases.as_slice()).unwrap_or_default();
        Answer::Extend(tokens.iter().copied().filter(|token| self.extendable(state, *token, node, epoch)).collect())
    }

    /// Was the end of this node's part proposed? Then it must not begin there any more: an agent starts a part on the word
    /// of any acknowledgement.
    pub fn is_ending(&self, token: Token, node: NodeId) -> bool {
        self.ending.contains_key(&(token, node)) && !planted(Bug::AckAfterEnd)
    }

    pub fn has_ending(&self, node: NodeId) -> bool {
        self.ending.keys().any(|(_, ending)| *ending == node)
    }

    /// Nodes of which the end of a part was proposed and is not applied yet.
    pub fn ending_nodes(&self) -> BTreeSet<NodeId> {
        self.ending.keys().map(|(_, node)| *node).collect()
    }

    fn extendable(&self, state: &State, token: Token, node: NodeId, epoch: u64) -> bool {
        let Some(lease) = state.leases.get(&token) else { return false };
        let by_silence = lease.value.verdict.as_ref().is_some_and(|verdict| verdict.kind == VerdictKind::Lost);
        let ending = self.ending.range((token, NodeId(0))..=(token, NodeId(u32::MAX))).next().is_some();
        // A part that the node's last registration did not name is left to silence: never extended again.
        let live = lease.value.parts.iter().any(|part| {
            part.node == node && part.epoch == epoch && !matches!(part.state, PartState::Released | PartState::Stuck)
        });
        live && !by_silence && (!ending || planted(Bug::AckAfterEnd))
    }

    /// Nodes that get nothing new: unheard for three heartbeats, or never heard in this term.
    pub fn unheard(&self, state: &State, now_ms: u64) -> BTreeSet<NodeId> {
        let recent = |node: &NodeId, epoch: u64| {
            self.heard.get(node).is_some_and(|(known, at)| *known == epoch && now_ms.saturating_sub(*at) <= UNHEARD_MS)
        };
        state.nodes.iter().filter(|(id, node)| !recent(id, node.value.epoch)).map(|(id, _)| *id).collect()
    }

    /// Ms since the node was last heard in this term.
    pub fn heard_ms_ago(&self, node: NodeId, now_ms: u64) -> Option<u64> {
        self.heard.get(&node).map(|(_, at)| now_ms.saturating_sub(*at))
    }

    /// The commands that are due: silences, ended sessions, start timeouts and overrun limits. What it returns counts
    /// as proposed: those leases are not extended again in this term.
    pub fn due(&mut self, state: &State, now_ms: u64, cluster_now_ms: u64) -> Vec<Command> {
        self.forget_applied(state);
        let mut commands = self.silences(state, now_ms);
        commands.extend(self.dead_sessions(state, now_ms));
        commands.extend(self.overdue(state, now_ms, cluster_now_ms));
        commands
    }

    fn forget_applied(&mut self, state: &State) {
        self.ending.retain(|(token, node), _| part_is_live(state, *token, *node));
        self.unnamed.retain(|(token, node), _| part_is_live(state, *token, *node));
        self.ending_sessions.retain(|session, _| state.sessions.contains(session));
        self.sessions.retain(|session, _| state.sessions.contains(session));
        self.due.retain(|token, _| state.leases.get(token).is_some_and(|lease| lease.value.verdict.is_none()));
    }

    fn silences(&mut self, state: &State, now_ms: u64) -> Vec<Command> {
        let mut commands = Vec::new();
        for (node, alloc) in state.allocs.iter().filter(|(_, alloc)| !alloc.leases.is_empty()) {
            let Some(epoch) = state.nodes.get(node).map(|record| record.value.epoch) else { continue };
            let silent: Vec<Token> = alloc
                .leases
                .iter()
                .copied()
                // Once proposed, the end is proposed until it is applied, whatever is heard since.
                .filter(|token| self.is_ending(*token, *node) || self.is_silent(state, *token, *node, epoch, now_ms))
                .collect();
            let fresh: Vec<Token> =
                silent.into_iter().filter(|token| note(&mut self.ending, (*token, *node), now_ms)).collect();
            if !fresh.is_empty() {
                commands.push(Command::NodeSilent { node: *node, epoch, tokens: fresh });
            }
        }
        commands
    }

    /// Has the lease inequality run out for this part?
    fn is_silent(&mut self, state: &State, token: Token, node: NodeId, epoch: u64, now_ms: u64) -> bool {
        let Some(lease) = state.leases.get(&token) else { return false };
        let Some(part) = lease.value.parts.iter().find(|part| part.node == node) else { return false };
        if matches!(part.state, PartState::Released | PartState::Stuck) {
            return false;
        }
        let since_ms = if part.epoch == epoch {
            // A node that this term never heard of came with a grant after office: count from now.
            self.heard.entry(node).or_insert((epoch, now_ms)).1
        } else {
            // The node's last registration did not name it: extended by nobody since this term saw that.
            *self.unnamed.entry((token, node)).or_insert(now_ms)
        };
        let ttl_ms = lease.value.ttl_ms;
        if planted(Bug::NoMargin) {
            return now_ms > since_ms + ttl_ms;
        }
        if planted(Bug::NoGrace) && since_ms == self.office_ms {
            return true;
        }
        now_ms > since_ms + ttl_ms + ttl_ms * DRIFT_PERCENT / 100 + KILL_MARGIN_MS
    }

    fn dead_sessions(&mut self, state: &State, now_ms: u64) -> Vec<Command> {
        let mut commands = Vec::new();
        for (id, session) in state.sessions.iter() {
            let heard_ms = *self.sessions.entry(*id).or_insert(now_ms);
            let end_ms = heard_ms + session.ttl_ms + session.ttl_ms * DRIFT_PERCENT / 100;
            if now_ms > end_ms && note(&mut self.ending_sessions, *id, now_ms) {
                commands.push(Command::EndSession { session: *id });
            }
        }
        commands
    }

    fn overdue(&mut self, state: &State, now_ms: u64, cluster_now_ms: u64) -> Vec<Command> {
        let start_timeout_ms = state.meta.settings.start_timeout_ms;
        let mut commands = Vec::new();
        for (token, lease) in state.leases.iter().filter(|(_, lease)| lease.value.verdict.is_none()) {
            let lease = &lease.value;
            let cause = match (lease.phase, lease.started_ms) {
                (LeasePhase::Prepare | LeasePhase::Go, _) if cluster_now_ms > lease.granted_ms + start_timeout_ms => {
                    DueCause::StartTimeout
                }
                (LeasePhase::Running, Some(started_ms)) => {
                    let Some(job) = state.jobs.get(&lease.task.job) else { continue };
                    let spec = &job.value.spec;
                    let end_ms = started_ms + spec.limit_ms + spec.kill_grace_ms + LIMIT_SLACK_MS;
                    if spec.limit_ms == 0 || cluster_now_ms <= end_ms {
                        continue;
                    }
                    DueCause::TimeLimit
                }
                _ => continue,
            };
            if note(&mut self.due, *token, now_ms) {
                commands.push(Command::LeaseDue { token: *token, cause });
            }
        }
        commands
    }
}

fn part_is_live(state: &State, token: Token, node: NodeId) -> bool {
    state.leases.get(&token).is_some_and(|lease| {
        lease
            .value
            .parts
            .iter()
            .any(|part| part.node == node && !matches!(part.state, PartState::Released | PartState::Stuck))
    })
}

/// Remembers a proposal at `now_ms`; false while an earlier one is younger than the time to propose again.
fn note<K: Ord>(proposed: &mut BTreeMap<K, u64>, key: K, now_ms: u64) -> bool {
    match proposed.get(&key) {
        Some(at) if now_ms.saturating_sub(*at) < REPROPOSE_MS => false,
        _ => {
            proposed.insert(key, now_ms);
            true
        }
    }
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
