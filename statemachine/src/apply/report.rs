//! Report: what an agent saw of its parts. Exits and releases of a live part are always recorded, also when the lease
//! was decided before; a verdict that came too late is told so. Every refusal means "do not send it again".
//!
//! Refuses NOT_FOUND (node), LIMIT (items); per item EPOCH_STALE, TOKEN_STALE, ALREADY_DECIDED, NOT_DUE (a start
//! before the barrier), INVALID_SPEC (a rank of another part, no port).

use std::collections::BTreeSet;

use planted::{Bug, planted};

use super::Ctx;
use crate::command::*;
use crate::id::*;
use crate::lease::{Ruling, decided, stale};
use crate::record::*;
use crate::state::State;

/// Items of one command: bounds its work and its events.
const ITEMS: usize = 4_096;

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, report: &Report) -> Result<Reply, Rejection> {
    if report.items.len() > ITEMS {
        let detail = format!("items has {} entries, the limit is {ITEMS}", report.items.len());
        return Err(Rejection::new(Code::Limit, detail));
    }
    if let Err(rejection) = state.node_of_epoch(report.node, report.epoch) {
        return match rejection.code {
            Code::EpochStale => Ok(Reply::Report(vec![Err(rejection); report.items.len()])),
            _ => Err(rejection),
        };
    }
    Ok(Reply::Report(report.items.iter().map(|item| one(state, ctx, report.node, report.epoch, item)).collect()))
}

fn one(state: &mut State, ctx: &mut Ctx<'_>, node: NodeId, epoch: u64, item: &ReportItem) -> Result<(), Rejection> {
    let token = match () {
        () if planted(Bug::ResultWithoutToken) => any_lease(state, node, item.token),
        () if planted(Bug::ResultByAttempt) => lease_of_same_job(state, node, item.token),
        () => item.token,
    };
    let Some(part) = live_part(state, token, node) else { return orphan_gone(state, ctx, node, item) };
    if part.epoch != epoch {
        // The agent's registration did not name it, so it can't know what became of it: the part is left to silence.
        return Err(stale(token));
    }
    check(part, &item.what)?;
    let lease = &state.leases.get(&token).ok_or_else(|| stale(token))?.value;
    if let (PartReport::Started { .. }, LeasePhase::Prepare) = (&item.what, lease.phase) {
        return Err(Rejection::new(Code::NotDue, format!("lease {token} still waits at its start barrier")));
    }
    let before = lease.verdict.as_ref().map(|verdict| verdict.kind);
    let job = lease.task.job;
    state.change_job(ctx, job, |state, ctx| {
        let late = |kind: Option<VerdictKind>| kind.map_or(Ok(()), |kind| Err(decided(token, kind)));
        match &item.what {
            PartReport::Prepared { port } => {
                advance_part(state, token, node, PartState::Prepared { port: *port });
                late(before)
            }
            PartReport::Started { port } => {
                started(state, token, node, *port);
                late(before)
            }
            PartReport::Exited { exits, released } => {
                let news = exited(state, ctx, token, node, exits);
                if *released || planted(Bug::FreedOnFirstExit) {
                    state.release_part(ctx, token, node);
                }
                late(before.filter(|_| news.iter().any(|exit| exit.cause != ExitCause::Stopped)))
            }
            PartReport::Released => {
                state.release_part(ctx, token, node);
                Ok(())
            }
            PartReport::LaunchFailed { fault, why } => launch_failed(state, ctx, token, node, *fault, why),
        }
    })
}

/// A planted bug: whatever the node holds will be meant.
fn any_lease(state: &State, node: NodeId, token: Token) -> Token {
    let held = state.allocs.get(&node).map(|alloc| alloc.leases.as_slice()).unwrap_or_default();
    if held.contains(&token) { token } else { held.first().copied().unwrap_or(token) }
}

/// A planted bug: an attempt that is over is taken for its successor.
fn lease_of_same_job(state: &State, node: NodeId, token: Token) -> Token {
    let held = state.allocs.get(&node).map(|alloc| alloc.leases.as_slice()).unwrap_or_default();
    let was = |lease: &Lease| {
        let task = state.tasks.get(&lease.task);
        task.is_some_and(|task| task.value.attempts.iter().any(|row| row.token == token))
    };
    let next = held.iter().copied().find(|held| state.leases.get(held).is_some_and(|lease| was(&lease.value)));
    next.unwrap_or(token)
}

/// The part of this lease on this node, unless it was released.
fn live_part(state: &State, token: Token, node: NodeId) -> Option<&Part> {
    let lease = &state.leases.get(&token)?.value;
    lease.parts.iter().find(|part| part.node == node && part.state != PartState::Released)
}

fn check(part: &Part, what: &PartReport) -> Result<(), Rejection> {
    match what {
        PartReport::Exited { exits, .. } => match exits.iter().find(|exit| !part.has_rank(exit.rank)) {
            Some(exit) => {
                let last = part.first_rank.saturating_add(u32::from(part.ranks)).saturating_sub(1);
                let detail = format!("rank is {}, this part has {} to {last}", exit.rank, part.first_rank);
                Err(Rejection::new(Code::InvalidSpec, detail))
            }
            None => Ok(()),
        },
        PartReport::Prepared { port: 0 } if part.first_rank == 0 => {
            Err(Rejection::new(Code::InvalidSpec, "port is 0, rank 0's agent must name the port it reserved"))
        }
        _ => Ok(()),
    }
}

/// An attempt without a lease is gone from the node: its GPUs are free, its job may go on.
fn orphan_gone(state: &mut State, ctx: &mut Ctx<'_>, node: NodeId, item: &ReportItem) -> Result<(), Rejection> {
    let gone = matches!(item.what, PartReport::Released | PartReport::Exited { released: true, .. });
    let orphans = state.allocs.get(&node).map(|alloc| alloc.orphans.clone()).unwrap_or_default();
    if !gone || !orphans.iter().any(|orphan| orphan.token == item.token) {
        return Err(stale(item.token));
    }
    let left = orphans.into_iter().filter(|orphan| orphan.token != item.token).collect();
    state.set_orphans(ctx, node, left);
    Ok(())
}

fn started(state: &mut State, token: Token, node: NodeId, port: u16) {
    advance_part(state, token, node, PartState::Started);
    state.leases.update(&token, |lease| {
        if port > 0 && lease.value.parts.len() == 1 && lease.value.master.is_none() {
            lease.value.master = Some(Master { node, port });
        }
    });
    if state.nodes.get(&node).is_some_and(|node| !node.value.launch_fails.is_empty()) {
        state.nodes.update(&node, |node| node.value.launch_fails.clear());
    }
}

/// Moves the part forward, and the lease when all its parts are there. The agent that reports it is of the node's
/// epoch, so the part is too.
pub(super) fn advance_part(state: &mut State, token: Token, node: NodeId, to: PartState) {
    let Some(epoch) = state.nodes.get(&node).map(|node| node.value.epoch) else { return };
    let now = state.meta.clock_ms;
    state.leases.update(&token, |lease| {
        for part in lease.value.parts.iter_mut().filter(|part| part.node == node) {
            part.epoch = epoch;
            if part.may_become(to) {
                part.state = to;
            }
        }
        lease.value.advance(now);
    });
}

/// Records exits that are news, and decides by them. The news.
pub(super) fn exited(
    state: &mut State,
    ctx: &mut Ctx<'_>,
    token: Token,
    node: NodeId,
    exits: &[ReportExit],
) -> Vec<RankExit> {
    let now = state.meta.clock_ms;
    let news = state.leases.update(&token, |lease| {
        let Some(part) = lease.value.parts.iter_mut().find(|part| part.node == node) else { return Vec::new() };
        let mut known: BTreeSet<u32> = part.exits.iter().map(|exit| exit.rank).collect();
        let fresh = exits.iter().filter(|exit| part.has_rank(exit.rank) && known.insert(exit.rank));
        let news: Vec<RankExit> =
            fresh.map(|exit| RankExit { rank: exit.rank, exit: exit.exit, cause: exit.cause }).collect();
        part.exits.extend_from_slice(&news);
        if part.all_exited() && part.may_become(PartState::Exited) {
            part.state = PartState::Exited;
        }
        lease.value.advance(now);
        news
    });
    let news = news.unwrap_or_default();
    if !news.is_empty() {
        state.decide_by_exits(ctx, token, &news, node);
    }
    news
}

fn launch_failed(
    state: &mut State,
    ctx: &mut Ctx<'_>,
    token: Token,
    node: NodeId,
    fault: LaunchFault,
    why: &str,
) -> Result<(), Rejection> {
    let kind = match fault {
        LaunchFault::Job => VerdictKind::LaunchJob,
        LaunchFault::Node => VerdictKind::LaunchNode,
    };
    state.decide(ctx, token, Ruling::new(kind, why).on(node))?;
    if fault == LaunchFault::Node {
        state.blame_launch(ctx, token, node);
    }
    Ok(())
}

impl State {
    /// Counts a launch that failed by the node's fault; those of `node_launch_fails` different jobs take it out.
    pub(crate) fn blame_launch(&mut self, ctx: &mut Ctx<'_>, token: Token, node: NodeId) {
        // An array is one job: it can't take a machine out by itself.
        let Some(job) = self.leases.get(&token).map(|lease| self.body_id(lease.value.task.job)) else { return };
        let limit = usize::from(self.meta.settings.node_launch_fails);
        let out = self.nodes.update(&node, |node| {
            let node = &mut node.value;
            if node.launch_fails.contains(&job) || node.launch_fails.len() >= limit {
                return false;
            }
            node.launch_fails.push(job);
            if node.launch_fails.len() < limit || node.admin != NodeAdmin::Ready {
                return false;
            }
            let jobs: Vec<String> = node.launch_fails.iter().map(ToString::to_string).collect();
            let reason = format!("launches of {limit} different jobs failed by its fault: {}", jobs.join(", "));
            node.admin = NodeAdmin::Out { reason, evict_ms: None };
            true
        });
        if out == Some(true) {
            self.show_node(ctx, node);
        }
    }
}

impl Part {
    pub(crate) fn has_rank(&self, rank: u32) -> bool {
        rank >= self.first_rank && rank - self.first_rank < u32::from(self.ranks)
    }

    /// Reports move a part forward only; a stuck part is alive again when its agent speaks of it.
    fn may_become(&self, to: PartState) -> bool {
        match (self.state, to) {
            (PartState::Held, PartState::Prepared { .. } | PartState::Started | PartState::Exited)
            | (PartState::Prepared { .. }, PartState::Started | PartState::Exited)
            | (PartState::Started, PartState::Exited)
            | (PartState::Stuck, PartState::Started | PartState::Exited) => true,
            (PartState::Prepared { port: old }, PartState::Prepared { port: new }) => old != new,
            _ => false,
        }
    }

    fn started(&self) -> bool {
        matches!(self.state, PartState::Started | PartState::Exited) || self.all_exited()
    }
}

impl Lease {
    /// The last prepared part opens the barrier; the last started one makes the gang RUNNING.
    fn advance(&mut self, now_ms: u64) {
        if self.verdict.is_some() {
            return;
        }
        if self.phase == LeasePhase::Prepare
            && self.parts.iter().all(|part| part.started() || matches!(part.state, PartState::Prepared { .. }))
        {
            self.phase = LeasePhase::Go;
            self.go_ms = Some(now_ms);
            self.master = self.parts.first().and_then(|part| match part.state {
                PartState::Prepared { port } => Some(Master { node: part.node, port }),
                _ => None,
            });
        }
        if self.phase == LeasePhase::Go && self.parts.iter().all(Part::started) {
            self.phase = LeasePhase::Running;
            self.started_ms = Some(now_ms);
        }
    }
}
