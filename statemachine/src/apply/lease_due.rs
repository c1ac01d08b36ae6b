//! LeaseDue: a lease did not start in time, or ran longer than its limit. The leader proposes it; whether it is due is
//! checked here, in cluster time.
//!
//! Refuses TOKEN_STALE, ALREADY_DECIDED, NOT_DUE. A start timeout names the nodes that hold the gang up.

use super::{Ctx, DONE};
use crate::command::{Code, DueCause, Rejection, Reply};
use crate::id::*;
use crate::lease::{Ruling, decided, stale};
use crate::record::*;
use crate::state::State;

/// Culprits that the verdict names and that are counted: a gang of thousands is not a list to read.
const CULPRITS: usize = 16;

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, token: Token, cause: DueCause) -> Result<Reply, Rejection> {
    let lease = &state.leases.get(&token).ok_or_else(|| stale(token))?.value;
    if let Some(verdict) = &lease.verdict {
        return Err(decided(token, verdict.kind));
    }
    check_due(state, token, lease, cause)?;
    let (job, culprits) = (lease.task.job, culprits(lease));
    state.change_job(ctx, job, |state, ctx| match cause {
        DueCause::TimeLimit => {
            let _ = state.decide(ctx, token, Ruling::new(VerdictKind::TimedOut, "reached its time limit"));
        }
        DueCause::StartTimeout => start_timeout(state, ctx, token, &culprits),
    });
    DONE
}

fn check_due(state: &State, token: Token, lease: &Lease, cause: DueCause) -> Result<(), Rejection> {
    let now = state.meta.clock_ms;
    let due_ms = match cause {
        DueCause::StartTimeout if lease.phase != LeasePhase::Running => {
            Some(lease.granted_ms.saturating_add(state.meta.settings.start_timeout_ms))
        }
        DueCause::StartTimeout => None,
        DueCause::TimeLimit => state.jobs.get(&lease.task.job).and_then(|job| match job.value.spec.limit_ms {
            0 => None,
            limit_ms => lease.started_ms.map(|started| started.saturating_add(limit_ms)),
        }),
    };
    match due_ms {
        Some(due_ms) if due_ms <= now => Ok(()),
        Some(due_ms) => {
            Err(Rejection::new(Code::NotDue, format!("lease {token} is due at {due_ms} ms, the clock is {now} ms")))
        }
        None => Err(Rejection::new(Code::NotDue, format!("lease {token} has nothing of the kind due"))),
    }
}

/// The parts that the others wait for.
fn culprits(lease: &Lease) -> Vec<NodeId> {
    let waits_for = |part: &&Part| match (lease.phase, part.state) {
        (_, PartState::Held) => true,
        (LeasePhase::Prepare, _) => false,
        (_, PartState::Prepared { .. }) => true,
        _ => false,
    };
    lease.parts.iter().filter(waits_for).take(CULPRITS).map(|part| part.node).collect()
}

fn start_timeout(state: &mut State, ctx: &mut Ctx<'_>, token: Token, culprits: &[NodeId]) {
    let names: Vec<&str> = culprits.iter().map(|node| state.node_name(*node)).collect();
    let text = format!("not started in time: {}", names.join(", "));
    let mut ruling = Ruling::new(VerdictKind::LaunchNode, text);
    ruling.node = culprits.first().copied();
    let _ = state.decide(ctx, token, ruling);
    for node in culprits {
        state.blame_launch(ctx, token, *node);
    }
}
