//! GpuHealth: facts about one GPU, and the action decided for them above apply.
//!
//! Refuses NOT_FOUND (node, slot), EPOCH_STALE. `end_lease` gives the lease on it the verdict GPU_FAULT. Emits the node.

use super::{Ctx, DONE};
use crate::command::{Code, GpuHealthChange, Rejection, Reply};
use crate::lease::{Ruling, clip};
use crate::record::*;
use crate::state::State;

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, change: &GpuHealthChange) -> Result<Reply, Rejection> {
    let node = state.node_of_epoch(change.node, change.epoch)?;
    let slot = usize::from(change.slot);
    let Some(gpu) = node.gpus.get(slot) else {
        let detail = format!("slot is {}, node {} has {}", change.slot, node.name, node.gpus.len());
        return Err(Rejection::new(Code::NotFound, detail));
    };
    let (uuid, was_gone) = (gpu.uuid, gpu.health == GpuHealth::Gone);
    if was_gone && state.index.gpus.get(&uuid).is_some_and(|other| *other != change.node) {
        let detail = format!("slot is {}, its GPU is registered by another node now", change.slot);
        return Err(Rejection::new(Code::NotFound, detail));
    }

    state.nodes.update(&change.node, |node| {
        if let Some(gpu) = node.value.gpus.get_mut(slot) {
            gpu.health = change.health;
            gpu.xid = change.xid;
            gpu.reason = clip(&change.reason);
        }
    });
    if change.health == GpuHealth::Gone {
        state.index.gpus.remove(&uuid);
    } else {
        state.index.gpus.insert(uuid, change.node);
    }
    if change.end_lease {
        end_lease(state, ctx, change);
    }
    state.show_node(ctx, change.node);
    DONE
}

fn end_lease(state: &mut State, ctx: &mut Ctx<'_>, change: &GpuHealthChange) {
    let Some(alloc) = state.allocs.get(&change.node) else { return };
    let Some(token) = alloc.holders.get(&change.slot).copied() else { return };
    let Some(job) = state.leases.get(&token).map(|lease| lease.value.task.job) else { return };
    let ruling = Ruling::new(VerdictKind::GpuFault, format!("GPU slot {}: {}", change.slot, change.reason));
    state.change_job(ctx, job, |state, ctx| {
        // A verdict reached before stands.
        let _ = state.decide(ctx, token, ruling.on(change.node));
    });
}
