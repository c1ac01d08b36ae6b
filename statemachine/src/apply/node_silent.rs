//! NodeSilent: the leader heard nothing of these leases' parts for longer than their TTL and margins, so their
//! processes are dead by their own deadline. The leases are LOST; the parts are released, or Stuck where no kernel
//! promises the kill.
//!
//! Refuses NOT_FOUND (node), EPOCH_STALE (the node has registered since the silence was measured: what it named is not
//! silent), LIMIT, TOKEN_STALE when no token is left to act on.

use super::{Ctx, DONE};
use crate::command::{Code, Rejection, Reply};
use crate::id::*;
use crate::lease::{Ruling, stale};
use crate::record::*;
use crate::state::State;

pub(super) fn apply(
    state: &mut State,
    ctx: &mut Ctx<'_>,
    node: NodeId,
    epoch: u64,
    tokens: &[Token],
) -> Result<Reply, Rejection> {
    let stuck = state.node_of_epoch(node, epoch)?.kill == KillStrength::Weak;
    let limit = state.meta.settings.leases_per_node as usize;
    if tokens.len() > limit {
        return Err(Rejection::new(Code::Limit, format!("tokens has {} entries, the limit is {limit}", tokens.len())));
    }
    let silent: Vec<(Token, JobId)> =
        tokens.iter().filter_map(|token| Some((*token, job_of_part(state, *token, node)?))).collect();
    if let (Some(first), true) = (tokens.first(), silent.is_empty()) {
        return Err(stale(*first));
    }
    for (token, job) in silent {
        state.change_job(ctx, job, |state, ctx| lose(state, ctx, token, node, stuck));
    }
    DONE
}

fn job_of_part(state: &State, token: Token, node: NodeId) -> Option<JobId> {
    let lease = &state.leases.get(&token)?.value;
    let live = lease.parts.iter().any(|part| part.node == node && part.state != PartState::Released);
    live.then_some(lease.task.job)
}

fn lose(state: &mut State, ctx: &mut Ctx<'_>, token: Token, node: NodeId, stuck: bool) {
    let Some(lease) = state.leases.get(&token) else { return };
    let exited = lease.value.parts.iter().any(|part| part.node == node && part.all_exited());
    if !exited {
        let text = format!("{} was silent for longer than the lease", state.node_name(node));
        // An older verdict stands.
        let _ = state.decide(ctx, token, Ruling::new(VerdictKind::Lost, text).on(node));
    }
    if !stuck {
        return state.release_part(ctx, token, node);
    }
    state.leases.update(&token, |lease| {
        for part in lease.value.parts.iter_mut().filter(|part| part.node == node) {
            part.state = PartState::Stuck;
        }
    });
}
