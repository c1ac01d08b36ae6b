//! ConfirmDead: an operator's word that no process of a part is alive on a node, for one token or all of them.
//!
//! Releases parts that are Stuck or Held; refuses NOT_FOUND (node), NOT_STUCK when there is none.

use super::{Ctx, DONE, unknown_node};
use crate::command::{Code, Rejection, Reply};
use crate::id::*;
use crate::record::PartState;
use crate::state::State;

pub(super) fn apply(
    state: &mut State,
    ctx: &mut Ctx<'_>,
    node: NodeId,
    token: Option<Token>,
) -> Result<Reply, Rejection> {
    let alloc = state.allocs.get(&node).ok_or_else(|| unknown_node(node))?;
    let named = alloc.leases.iter().copied().filter(|held| token.is_none_or(|token| token == *held));
    let stuck: Vec<(Token, JobId)> = named
        .filter_map(|token| {
            let lease = &state.leases.get(&token)?.value;
            let part = lease.parts.iter().find(|part| part.node == node)?;
            matches!(part.state, PartState::Stuck | PartState::Held).then_some((token, lease.task.job))
        })
        .collect();
    if stuck.is_empty() {
        let detail = format!("node {} has no such part that is stuck", state.node_name(node));
        return Err(Rejection::new(Code::NotStuck, detail));
    }
    for (token, job) in stuck {
        state.change_job(ctx, job, |state, ctx| state.release_part(ctx, token, node));
    }
    DONE
}
