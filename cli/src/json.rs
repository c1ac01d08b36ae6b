//! The JSON of `-o json`: a contract. Keys are lower_snake, enums UPPER, times RFC 3339 UTC, tokens decimal strings.

use proto::v1;
use serde_json::{Value, json};

use crate::output::time;

pub fn job(job: &v1::Job) -> Value {
    let spec = job.spec.clone().unwrap_or_default();
    let shape = spec.shape.unwrap_or_default();
    let mut object = json!({
        "id": job.id,
        "name": spec.name,
        "array": array(job),
        "user": job.user,
        "tenant": spec.tenant,
        "queue": spec.queue,
        "priority": spec.priority,
        "priority_class": none_if_empty(&spec.priority_class),
        "state": job.state,
        "ending": none_if_empty(&job.ending),
        "reason": none_if_empty(&job.reason),
        "reason_code": none_if_empty(&job.reason_code),
        "latest_start": none_if_empty(&time(job.latest_start_unix_ms)),
        "attempt": job.attempt,
        "token": token(job.token),
        "retries_used": job.retries_used,
        "made_room": job.made_room,
        "checkpoint": job.checkpoint.as_ref().map(checkpoint),
        "nodes": (shape.nodes > 0).then_some(shape.nodes),
        "ranks_per_node": shape.ranks_per_node,
        "gpus_per_rank": shape.gpus_per_rank,
        "most_gpus_per_rank": (shape.most_gpus_per_rank > 0).then_some(shape.most_gpus_per_rank),
        "gpu_types": shape.gpu_types,
        "limit_ms": spec.limit_ms,
        "lease_ttl_ms": spec.lease_ttl_ms,
        "reservation": none_if_empty(&spec.reservation),
        "begin": none_if_empty(&time(spec.begin_unix_ms)),
        "deadline": none_if_empty(&time(spec.deadline_unix_ms)),
        "after": spec.after.iter().map(|after| json!({ "kind": after.kind, "job": after.job_id })).collect::<Vec<_>>(),
        "labels": spec.labels,
        "command": spec.body.map(|body| body.argv),
        "request_id": none_if_empty(&job.request_id),
        "submitted": time(job.submitted_unix_ms),
        "ended": none_if_empty(&time(job.ended_unix_ms)),
        "placement": job.parts.iter().map(part).collect::<Vec<_>>(),
        "placement_why": job.placement_why,
        "result": job.result.as_ref().map(result),
        "attempts": job.attempts.iter().map(attempt).collect::<Vec<_>>(),
        "create_revision": job.create_revision,
        "mod_revision": job.mod_revision,
    });
    if let (Some(object), Value::Object(mut which)) = (object.as_object_mut(), which_machines(&shape)) {
        object.append(&mut which);
    }
    object
}

/// What the job says of the machines that it may be on.
fn which_machines(shape: &v1::Shape) -> Value {
    json!({
        "topology": none_if_empty(&shape.topology),
        "constraint": none_if_empty(&shape.constraint),
        "nodelist": shape.nodelist,
        "exclude": shape.exclude,
    })
}

/// How far an array has come; of which array a task is.
fn array(job: &v1::Job) -> Value {
    if job.array_job_id != 0 {
        return json!({ "job": job.array_job_id, "index": job.array_index });
    }
    let Some(progress) = &job.array else { return Value::Null };
    json!({
        "tasks": progress.tasks,
        "not_started": progress.left,
        "next_index": (progress.left > 0).then_some(progress.next_index),
        "under_way": progress.open,
        "succeeded": progress.succeeded,
        "failed": progress.failed,
        "timed_out": progress.timed_out,
        "cancelled": progress.cancelled,
        "skipped": progress.skipped,
    })
}

pub fn part(part: &v1::PlacedPart) -> Value {
    json!({
        "node": part.node,
        "first_rank": part.first_rank,
        "ranks": part.ranks,
        "gpus": part.gpu_slots,
        "gpu_uuids": part.gpu_uuids,
        "cores": part.cores,
        "mem_mib": part.mem_mib,
        "state": part.state,
    })
}

fn result(result: &v1::Result) -> Value {
    json!({
        "outcome": result.outcome,
        "token": token(result.token),
        "attempt": result.attempt,
        "exit": exit(result.has_exit, &result.exit),
        "revision": result.revision,
        "time": time(result.unix_ms),
        "cause": none_if_empty(&result.cause),
        "parent": (result.parent_id != 0).then_some(result.parent_id),
    })
}

fn checkpoint(it: &v1::Checkpoint) -> Value {
    json!({ "path": it.path, "attempt": it.attempt, "step": it.step, "clock_ms": it.clock_ms })
}

fn attempt(attempt: &v1::Attempt) -> Value {
    json!({
        "attempt": attempt.attempt,
        "token": token(attempt.token),
        "verdict": attempt.verdict,
        "exit": exit(attempt.has_exit, &attempt.exit),
        "nodes": attempt.nodes,
        "granted_clock_ms": attempt.granted_clock_ms,
        "started_clock_ms": attempt.started_clock_ms,
        "ended_clock_ms": attempt.ended_clock_ms,
        "text": none_if_empty(&attempt.text),
        "preemptor": (attempt.preemptor_id != 0).then_some(attempt.preemptor_id),
        "lost_gpu_ms": attempt.lost_gpu_ms,
    })
}

fn exit(has: bool, exit: &Option<v1::Exit>) -> Value {
    match exit {
        Some(exit) if has => json!({ "code": exit.code, "signal": exit.signal }),
        _ => Value::Null,
    }
}

pub fn node(node: &v1::Node) -> Value {
    json!({
        "id": node.id,
        "name": node.name,
        "state": node.state,
        "reason": none_if_empty(&node.reason),
        "address": node.address,
        "epoch": node.epoch,
        "version": node.version,
        "simulated": node.simulated,
        "kill": node.kill,
        "cores": node.cores,
        "cores_free": node.cores_free,
        "cores_by_numa": node.cores_by_numa,
        "mem_mib": node.mem_mib,
        "mem_free_mib": node.mem_free_mib,
        "heard_ms_ago": node.heard_ms_ago,
        "evict_in_ms": node.evict_in_ms,
        "leases": node.leases,
        "windows": node.windows.iter().map(window).collect::<Vec<_>>(),
        "labels": node.labels,
        "gpus": node.gpus.iter().map(gpu).collect::<Vec<_>>(),
    })
}

fn window(window: &v1::NodeWindow) -> Value {
    json!({
        "reservation": window.reservation,
        "maintenance": window.maintenance,
        "start": time(window.start_unix_ms),
        "end": time(window.end_unix_ms),
        "begun": window.begun,
    })
}

fn gpu(gpu: &v1::Gpu) -> Value {
    json!({
        "slot": gpu.slot,
        "uuid": gpu.uuid,
        "type": gpu.r#type,
        "mem_mib": gpu.mem_mib,
        "numa": gpu.numa,
        "health": gpu.health,
        "reason": none_if_empty(&gpu.reason),
        "token": token(gpu.token),
        "job": (gpu.job_id != 0).then_some(gpu.job_id),
    })
}

pub fn status(addr: &str, status: &v1::StatusReply) -> Value {
    json!({
        "address": addr,
        "replica_id": status.replica_id.to_string(),
        "cluster_id": status.cluster_id,
        "version": status.version,
        "role": status.role,
        "term": status.term,
        "leader_id": status.leader_id.to_string(),
        "leader": none_if_empty(&status.leader_addr),
        "last_log_index": status.last_log_index,
        "committed_index": status.committed_index,
        "applied_index": status.applied_index,
        "snapshot_index": status.snapshot_index,
        "purged_index": status.purged_index,
        "image_index": status.image_index,
        "image_refusals": status.image_refusals,
        "revision": status.revision,
        "cluster_clock_ms": status.cluster_clock_ms,
        "members": status.members.iter().map(member).collect::<Vec<_>>(),
        "live_jobs": status.live_jobs,
        "pending_tasks": status.pending_tasks,
        "leases": status.leases,
        "nodes": status.nodes,
        "disk_full": status.disk_full,
        "digest": none_if_empty(&status.digest),
        "digest_index": status.digest_index,
    })
}

pub fn member(member: &v1::Member) -> Value {
    json!({
        "replica_id": member.replica_id.to_string(),
        "peer": member.peer_addr,
        "api": member.api_addr,
        "voter": member.voter,
        "matched_index": member.matched_index,
    })
}

/// A key with its value as JSON, not as text in JSON.
pub fn key_value(kv: &v1::KeyValue, keys_only: bool) -> Value {
    let mut value = json!({
        "key": kv.key,
        "create_revision": kv.create_revision,
        "mod_revision": kv.mod_revision,
        "version": kv.version,
    });
    if !keys_only && let Some(map) = value.as_object_mut() {
        map.insert("value".to_owned(), parsed(&kv.value));
    }
    value
}

pub fn key_event(event: &v1::KeyEvent) -> Value {
    json!({
        "key": event.key,
        "type": if event.deleted { "DELETE" } else { "PUT" },
        "value": parsed(&event.value),
        "mod_revision": event.mod_revision,
    })
}

fn parsed(text: &str) -> Value {
    if text.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
    }
}

pub fn token(token: u64) -> Value {
    if token == 0 { Value::Null } else { Value::String(token.to_string()) }
}

fn none_if_empty(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { Value::String(text.to_owned()) }
}
