//! Values of keys, as JSON: lower_snake names, enums as UPPER strings, tokens as decimal strings (they pass 2^53). A
//! field that does not apply is absent.

use serde_json::{Map, Value, json};

use crate::id::*;
use crate::record::*;
use crate::spec::{After, Shape};
use crate::state::State;
use crate::view::{LeaseView, TaskView};

/// Leaves out what is null.
fn object(fields: Value) -> String {
    let Value::Object(fields) = fields else { return fields.to_string() };
    let kept: Map<String, Value> = fields.into_iter().filter(|(_, value)| !value.is_null()).collect();
    Value::Object(kept).to_string()
}

fn exit(exit: Option<Exit>) -> Value {
    exit.map_or(Value::Null, |exit| json!({ "code": exit.code, "signal": exit.signal }))
}

fn token(token: Option<Token>) -> Value {
    token.map_or(Value::Null, |token| Value::String(token.to_string()))
}

/// The spec, and the names of the environment's variables: their contents may be secrets.
pub(super) fn job(state: &State, id: JobId, job: &Job, body: &Body) -> String {
    let (spec, shape) = (&job.spec, &job.spec.shape);
    let types: Vec<&str> = shape.gpu_types.iter().map(|kind| state.gpu_type_name(*kind)).collect();
    object(json!({
        "job_id": id.0,
        "name": spec.name,
        "user": state.user_name(job.user),
        "tenant": state.tenants.get(&job.tenant).map(|tenant| &tenant.name),
        "queue": state.queues.get(&job.queue).map(|queue| &queue.name),
        "priority": spec.priority,
        "nodes": shape.nodes,
        "ranks_per_node": shape.ranks_per_node,
        "gpus_per_rank": shape.gpus_per_rank,
        "doublings": Some(spec.doublings()).filter(|doublings| *doublings > 0),
        "gpu_types": types,
        "mix_types": shape.mix_types,
        "cores_per_rank": shape.cores_per_rank,
        "mem_mib_per_rank": shape.mem_mib_per_rank,
        "min_bandwidth_mbps": shape.min_bandwidth_mbps,
        "topology": shape.topology.map(|topology| topology.to_string()),
        "machines": machines(shape),
        "limit_ms": spec.limit_ms,
        "lease_ttl_ms": spec.lease_ttl_ms,
        "kill_grace_ms": spec.kill_grace_ms,
        "retry": {
            "max": spec.retry.max,
            "initial_ms": spec.retry.initial_ms,
            "mult_milli": spec.retry.mult_milli,
            "max_ms": spec.retry.max_ms,
            "on_exit": spec.retry.on_exit,
        },
        "labels": spec.labels,
        "begin_wall_ms": spec.terms.as_ref().map(|terms| terms.begin_wall_ms).filter(|at| *at != 0),
        "deadline_wall_ms": spec.terms.as_ref().map(|terms| terms.deadline_wall_ms).filter(|at| *at != 0),
        "after": after(spec.after()),
        "reservation": Some(spec.reservation()).filter(|name| !name.is_empty()),
        "array": spec.array().map(|array| json!({ "ranges": array.ranges, "throttle": array.throttle })),
        "array_job_id": job.element().map(|element| element.array.0),
        "array_index": job.element().map(|element| element.index),
        "argv": body.argv,
        "env_names": body.env.keys().collect::<Vec<_>>(),
        "cwd": body.cwd,
        "request_id": job.request.map(|id| id.to_string()),
        "submitted_clock_ms": job.submitted_clock_ms,
        "submitted_wall_ms": job.submitted_wall_ms,
    }))
}

/// Which machines it may be on.
fn machines(shape: &Shape) -> Value {
    shape.machines.as_ref().map_or(Value::Null, |selector| {
        json!({
            "constraint": selector.constraint.to_string(),
            "nodelist": selector.only,
            "exclude": selector.without,
        })
    })
}

fn after(parents: &[After]) -> Value {
    let parents: Vec<Value> =
        parents.iter().map(|after| json!({ "kind": after.kind.name(), "job_id": after.job.0 })).collect();
    if parents.is_empty() { Value::Null } else { Value::Array(parents) }
}

impl EndCause {
    pub fn name(self) -> &'static str {
        match self {
            EndCause::Deadline => "DEADLINE",
            EndCause::Parent(_) => "PARENT",
        }
    }

    /// The job that did not end as needed.
    pub fn parent(self) -> Option<JobId> {
        match self {
            EndCause::Parent(job) => Some(job),
            EndCause::Deadline => None,
        }
    }
}

pub(super) fn state(id: JobId, view: &TaskView) -> String {
    let holds = view.holds.names();
    object(json!({
        "job_id": id.0,
        "state": view.state.name(),
        "attempt": view.attempt,
        "token": token(view.token),
        "ending": view.ending.map(VerdictKind::name),
        "not_before_ms": view.not_before_ms,
        "holds": if holds.is_empty() { Value::Null } else { json!(holds) },
        "exit": exit(view.exit),
    }))
}

pub(super) fn lease(state: &State, name: Token, view: &LeaseView) -> String {
    let parts = view.parts.iter().map(|part| {
        json!({
            "node": state.node_name(part.node),
            "first_rank": part.first_rank,
            "ranks": part.ranks,
            "gpus": part.gpus.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    });
    let phase = match view.phase {
        LeasePhase::Prepare => "PREPARE",
        LeasePhase::Go => "GO",
        LeasePhase::Running => "RUNNING",
    };
    let master = view.master.map(|master| json!({ "node": state.node_name(master.node), "port": master.port }));
    object(json!({
        "token": name.to_string(),
        "job_id": view.task.job.0,
        "attempt": view.attempt,
        "phase": phase,
        "verdict": view.verdict.map(VerdictKind::name),
        "master": master,
        "granted_ms": view.granted_ms,
        "started_ms": view.started_ms,
        "ttl_ms": view.ttl_ms,
        "parts": parts.collect::<Vec<_>>(),
    }))
}

pub(super) fn job_fence(id: JobId, last: Token) -> String {
    object(json!({ "job_id": id.0, "token": last.to_string() }))
}

pub(super) fn gpu_fence(gpu: GpuUuid, last: Token) -> String {
    object(json!({ "gpu": gpu.to_string(), "token": last.to_string() }))
}

pub(super) fn result(id: JobId, result: &TaskResult) -> String {
    object(json!({
        "job_id": id.0,
        "outcome": crate::view::ShownState::from(result.outcome).name(),
        "token": token(result.token),
        "attempt": result.attempt,
        "exit": exit(result.exit),
        "wall_ms": result.wall_ms,
        "cause": result.cause.map(EndCause::name),
        "parent": result.cause.and_then(EndCause::parent).map(|job| job.0),
    }))
}

pub(super) fn retry(id: JobId, attempt: u32, not_before_ms: u64) -> String {
    object(json!({ "job_id": id.0, "attempt": attempt, "not_before_ms": not_before_ms }))
}

pub(super) fn queue(id: JobId) -> String {
    object(json!({ "job_id": id.0 }))
}

pub(super) fn lock(name: &str, holder: Option<Holder>, waiters: usize) -> String {
    let holder = holder.map(|holder| json!({ "session": holder.session.0, "token": holder.token.to_string() }));
    object(json!({ "name": name, "holder": holder, "waiters": waiters }))
}

pub(super) fn node(state: &State, id: NodeId, node: &Node) -> String {
    let gpus = node.gpus.iter().enumerate().map(|(slot, gpu)| {
        json!({
            "slot": slot,
            "uuid": gpu.uuid.to_string(),
            "type": state.gpu_type_name(gpu.gpu_type),
            "mem_mib": gpu.mem_mib,
            "numa": gpu.numa,
            "health": gpu.health.name(),
            "reason": gpu.reason,
            "xid": gpu.xid,
        })
    });
    let (admin, reason) = match &node.admin {
        NodeAdmin::Ready => ("READY", None),
        NodeAdmin::Out { reason, .. } => ("OUT", Some(reason)),
    };
    let kill = match node.kill {
        KillStrength::PidNamespace => "PID_NAMESPACE",
        KillStrength::Cgroup => "CGROUP",
        KillStrength::Weak => "WEAK",
    };
    object(json!({
        "node_id": id.0,
        "name": node.name,
        "address": node.address,
        "host": node.host,
        "epoch": node.epoch,
        "version": node.version,
        "class": node.class.0,
        "cores_by_numa": node.cores_by_numa,
        "mem_mib": node.mem_mib,
        "simulated": node.simulated,
        "kill": kill,
        "admin": admin,
        "reason": reason,
        "labels": node.labels,
        "gpus": gpus.collect::<Vec<_>>(),
    }))
}

impl GpuHealth {
    const ALL: [GpuHealth; 6] = [
        GpuHealth::Ok,
        GpuHealth::DrainWhenIdle,
        GpuHealth::Quarantined,
        GpuHealth::Dirty,
        GpuHealth::Unresponsive,
        GpuHealth::Gone,
    ];

    /// Reads what [`GpuHealth::name`] wrote.
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|health| health.name() == word)
    }

    pub fn name(self) -> &'static str {
        match self {
            GpuHealth::Ok => "OK",
            GpuHealth::DrainWhenIdle => "DRAIN_WHEN_IDLE",
            GpuHealth::Quarantined => "QUARANTINED",
            GpuHealth::Dirty => "DIRTY",
            GpuHealth::Unresponsive => "UNRESPONSIVE",
            GpuHealth::Gone => "GONE",
        }
    }
}
