//! NodeAdmin: takes a node out of scheduling, with a reason, or back in. Refuses NOT_FOUND. What runs there runs on.

use super::{Ctx, DONE, unknown_node};
use crate::command::{Rejection, Reply};
use crate::id::NodeId;
use crate::lease::clip;
use crate::record::NodeAdmin;
use crate::state::State;

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, id: NodeId, out: Option<&str>) -> Result<Reply, Rejection> {
    let node = &state.nodes.get(&id).ok_or_else(|| unknown_node(id))?.value;
    let admin = match out {
        Some(reason) => NodeAdmin::Out { reason: clip(reason) },
        None => NodeAdmin::Ready,
    };
    if node.admin == admin && node.launch_fails.is_empty() {
        return DONE;
    }
    state.nodes.update(&id, |node| {
        if admin == NodeAdmin::Ready {
            node.value.launch_fails.clear();
        }
        node.value.admin = admin;
    });
    state.show_node(ctx, id);
    DONE
}
