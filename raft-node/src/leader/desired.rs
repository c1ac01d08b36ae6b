//! What a node should be running: its desired set, rendered from applied state. Level-triggered, whole, and pure.

use proto::v1;
use statemachine::record::{Lease, LeasePhase, Node, Part, PartState, VerdictKind};
use statemachine::{NodeId, State, Token};

use crate::api::words;

/// The whole desired set of one node at the state's applied index; `None` for a node that the state does not know. `ending`:
/// parts whose end was proposed; those that have not begun are left out.
pub fn desired(state: &State, id: NodeId, ending: impl Fn(Token) -> bool) -> Option<v1::Desired> {
    let node = &state.nodes.get(&id)?.value;
    let tokens = state.allocs.get(&id).map(|alloc| alloc.leases.as_slice()).unwrap_or_default();
    let leases = tokens.iter().filter_map(|token| desired_lease(state, id, node, *token, ending(*token))).collect();
    Some(v1::Desired {
        cluster_id: words::hex(&state.meta.cluster),
        incarnation: state.meta.incarnation,
        epoch: node.epoch,
        index: state.meta.applied.index,
        leases,
    })
}

fn desired_lease(state: &State, id: NodeId, node: &Node, token: Token, ending: bool) -> Option<v1::DesiredLease> {
    let lease = &state.leases.get(&token)?.value;
    let (at, part) = lease.parts.iter().enumerate().find(|(_, part)| part.node == id)?;
    if part.state == PartState::Released || (ending && part.state == PartState::Held) {
        return None;
    }
    let job = &state.jobs.get(&lease.task.job)?.value;
    let spec = &job.spec;
    let (master_addr, master_port) = master(state, lease, node);
    Some(v1::DesiredLease {
        token: token.0,
        job_id: lease.task.job.0,
        task_index: job.element().map_or(0, |element| element.index),
        array_job_id: job.element().map_or(0, |element| element.array.0),
        attempt: lease.attempt,
        first_rank: part.first_rank,
        ranks: u32::from(part.ranks),
        world_size: lease.parts.iter().map(|part| u32::from(part.ranks)).sum(),
        node_rank: at as u32,
        nodes: lease.parts.len() as u32,
        gpu_uuids: gpu_uuids(node, part),
        gpus_per_rank: (part.gpu_order.len() / usize::from(part.ranks.max(1))) as u32,
        cores_by_numa: part.cores_by_numa.iter().map(|cores| u32::from(*cores)).collect(),
        mem_mib: part.mem_mib,
        limit_ms: spec.limit_ms,
        ttl_ms: lease.ttl_ms,
        kill_grace_ms: spec.kill_grace_ms,
        go: lease.phase >= LeasePhase::Go,
        stop: stop(lease),
        master_addr,
        master_port,
        job_name: spec.name.to_string(),
        checkpoint_signal: u32::from(spec.checkpoint_signal()),
        restore_from: restore_from(state, lease),
    })
}

/// Where the attempt can go on from: the newest checkpoint of those before it.
fn restore_from(state: &State, lease: &Lease) -> String {
    let checkpoint = state.tasks.get(&lease.task).and_then(|task| task.value.checkpoint.as_deref());
    checkpoint.filter(|it| it.attempt < lease.attempt).map_or_else(String::new, |it| it.path.clone())
}

/// A decided lease is to be ended, except that a success leaves nothing to stop.
fn stop(lease: &Lease) -> String {
    match &lease.verdict {
        Some(verdict) if verdict.kind != VerdictKind::Succeeded => verdict.kind.name().to_owned(),
        _ => String::new(),
    }
}

/// On one node its own host; over several the host and port that rank 0's agent reserved, once it has said so.
fn master(state: &State, lease: &Lease, node: &Node) -> (String, u32) {
    match &lease.master {
        Some(master) => {
            let host = state.nodes.get(&master.node).map(|node| node.value.host.clone()).unwrap_or_default();
            (host, u32::from(master.port))
        }
        None if lease.parts.len() == 1 => (node.host.clone(), 0),
        None => (String::new(), 0),
    }
}

/// In rank order.
pub fn gpu_uuids(node: &Node, part: &Part) -> Vec<String> {
    part.gpu_order.iter().filter_map(|slot| node.gpus.get(usize::from(*slot))).map(words::gpu_uuid).collect()
}
