//! NodeAdmin: takes a node out of scheduling, with a reason, or back in. What runs there runs on, or goes back to the
//! queue after a time that the command names: then each lease that still has a part there ends as PREEMPTED.
//!
//! Refuses NOT_FOUND; INVALID_SPEC (a time beyond the limit). Emits the node.

use super::{Ctx, DONE, unknown_node};
use crate::command::{Code, NodeOut, Rejection, Reply};
use crate::id::*;
use crate::lease::{Ruling, clip};
use crate::record::*;
use crate::state::{State, Timer, TimerKind};

/// Longest time until what runs on a drained node is sent away: a month.
const EVICT_MS: u64 = 31 * 24 * 3_600_000;

pub(super) fn apply(
    state: &mut State,
    ctx: &mut Ctx<'_>,
    id: NodeId,
    out: Option<&NodeOut>,
) -> Result<Reply, Rejection> {
    let node = &state.nodes.get(&id).ok_or_else(|| unknown_node(id))?.value;
    if let Some(ms) = out.and_then(|out| out.evict_in_ms).filter(|ms| *ms > EVICT_MS) {
        return Err(Rejection::new(Code::InvalidSpec, format!("evict_in_ms is {ms}, the limit is {EVICT_MS}")));
    }
    let now_ms = state.meta.clock_ms;
    let admin = match out {
        Some(out) => {
            NodeAdmin::Out { reason: clip(&out.reason), evict_ms: out.evict_in_ms.map(|ms| now_ms.saturating_add(ms)) }
        }
        None => NodeAdmin::Ready,
    };
    if node.admin == admin && node.launch_fails.is_empty() {
        return DONE;
    }
    state.set_admin(id, admin);
    if out.is_none() {
        state.nodes.update(&id, |node| node.value.launch_fails.clear());
    }
    state.show_node(ctx, id);
    DONE
}

/// The time of a drained node is over: what still runs there goes back to the queue.
pub(super) fn evict(state: &mut State, ctx: &mut Ctx<'_>, id: NodeId) {
    let Some(NodeAdmin::Out { reason, .. }) = state.nodes.get(&id).map(|node| node.value.admin.clone()) else { return };
    let tokens = state.allocs.get(&id).map(|alloc| alloc.leases.clone()).unwrap_or_default();
    for token in tokens {
        let Some(job) = state.leases.get(&token).map(|lease| lease.value.task.job) else { continue };
        let text = format!("{} is out of service: {reason}", state.node_name(id));
        // A verdict reached before stands.
        state.change_job(ctx, job, |state, ctx| {
            let _ = state.decide(ctx, token, Ruling::new(VerdictKind::Preempted, text));
        });
    }
    state.set_admin(id, NodeAdmin::Out { reason, evict_ms: None });
    state.show_node(ctx, id);
}

impl NodeAdmin {
    pub(crate) fn timer(&self, node: NodeId) -> Option<Timer> {
        match self {
            NodeAdmin::Out { evict_ms: Some(due_ms), .. } => {
                Some(Timer { due_ms: *due_ms, what: TimerKind::Evict(node) })
            }
            NodeAdmin::Out { evict_ms: None, .. } | NodeAdmin::Ready => None,
        }
    }
}

impl State {
    /// Writes the node's place in scheduling, and keeps its timer in step.
    pub(crate) fn set_admin(&mut self, id: NodeId, admin: NodeAdmin) {
        let new = admin.timer(id);
        let old = self.nodes.update(&id, |node| std::mem::replace(&mut node.value.admin, admin));
        if let Some(old) = old.and_then(|admin| admin.timer(id)) {
            self.index.timers.remove(&old);
        }
        if let Some(new) = new {
            self.index.timers.insert(new);
        }
    }
}
