//! NodeSilent: the leader heard nothing of these leases' parts for longer than their TTL and margins, so their
//! processes are dead by their own deadline. The leases are LOST; the parts are released, or Stuck where no kernel
//! promises the kill.
//!
//! The epoch is the parts' own: a part whose agent has registered since is not silent. Refuses NOT_FOUND (node), and
//! EPOCH_STALE or TOKEN_STALE when no token is left to act on.

use super::{Ctx, DONE, unknown_node};
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
    let record = &state.nodes.get(&node).ok_or_else(|| unknown_node(node))?.value;
    let stuck = record.kill == KillStrength::Weak;
    let limit = state.meta.settings.leases_per_node as usize;
    if tokens.len() > limit {
        return Err(Rejection::new(Code::Limit, format!("tokens has {} entries, the limit is {limit}", tokens.len())));
    }
    let silent: Vec<Result<(Token, JobId), Rejection>> =
        tokens.iter().map(|token| find(state, *token, node, epoch)).collect();
    if let (Some(Err(first)), true) = (silent.first(), silent.iter().all(Result::is_err)) {
        return Err(first.clone());
    }
    for (token, job) in silent.into_iter().flatten() {
        state.change_job(ctx, job, |state, ctx| lose(state, ctx, token, node, stuck));
    }
    DONE
}

fn find(state: &State, token: Token, node: NodeId, epoch: u64) -> Result<(Token, JobId), Rejection> {
    let lease = &state.leases.get(&token).ok_or_else(|| stale(token))?.value;
    let part = lease.parts.iter().find(|part| part.node == node && part.state != PartState::Released);
    let part = part.ok_or_else(|| stale(token))?;
    if part.epoch != epoch {
        let detail = format!("epoch is {epoch}, the part of lease {token} is in epoch {}", part.epoch);
        return Err(Rejection::new(Code::EpochStale, detail));
    }
    Ok((token, lease.task.job))
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
