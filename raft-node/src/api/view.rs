//! A job as the wire shows it, from records in memory or from a row of history.

use proto::v1;
use scheduling::explain::Explainer;
use scheduling::predict::{gbps, network_mbps, predict};
use scheduling::tables::Tables;
use statemachine::record::*;
use statemachine::view::ShownState;
use statemachine::{GpuTypeId, JobId, RequestId, State, TaskKey, UserId};

use super::why::start_unix_ms;
use super::words;
use crate::leader::desired::gpu_uuids;

pub fn user_name(state: &State, user: UserId) -> String {
    state.user_name(user).to_owned()
}

pub fn gpu_type(state: &State, id: GpuTypeId) -> String {
    state.gpu_type_name(id).to_owned()
}

/// A job in memory; why it waits is in the planner's own words.
pub fn live(state: &State, id: JobId, reasons: &mut Explainer<'_>, tables: &Tables) -> Option<v1::Job> {
    let job = state.jobs.get(&id)?;
    let view = state.job_view(id)?;
    let task = state.tasks.get(&TaskKey::only(id)).map(|task| &task.value);
    let body = state.body(id);
    let mut shown = shown(state, id, job, body, task);
    shown.state = view.task.state.name().to_owned();
    shown.ending = view.task.ending.map(|kind| kind.name().to_owned()).unwrap_or_default();
    shown.attempt = view.task.attempt;
    let goes_on = job.value.array().is_some_and(|(array, progress)| progress.left(array) > 0);
    if goes_on || matches!(view.task.state, ShownState::Pending | ShownState::Retrying) {
        let front = state.front_task(id);
        let reason = reasons.reason_for(front);
        shown.reason = reason.as_ref().map(|reason| reason.to_string()).unwrap_or_default();
        shown.reason_code = reason.as_ref().map(|reason| reason.code().to_owned()).unwrap_or_default();
        shown.latest_start_unix_ms = start_unix_ms(state, reasons.start_of(front));
    }
    if let Some((token, lease)) = task.and_then(|task| live_lease(state, task)) {
        shown.token = token;
        shown.parts = lease.parts.iter().filter_map(|part| placed(state, part)).collect();
        shown.placement_why = why(state, lease, tables);
    }
    Some(shown)
}

/// A task of an array that has not become a job: what holds of its array, under the id that is set aside for it.
pub fn unbegun(state: &State, id: JobId, reasons: &mut Explainer<'_>, tables: &Tables) -> Option<v1::Job> {
    let (array, index) = state.unbegun_task(id)?;
    let (of, progress) = state.jobs.get(&array)?.value.array()?;
    let rest = progress.rest.filter(|_| progress.left(of) == 0);
    let mut shown = live(state, array, reasons, tables)?;
    if let Some(spec) = &mut shown.spec {
        spec.array = None;
    }
    let result = rest.map(|(outcome, cause)| v1::Result {
        outcome: words::outcome(outcome).to_owned(),
        cause: cause.map(|cause| cause.name().to_owned()).unwrap_or_default(),
        parent_id: cause.and_then(EndCause::parent).unwrap_or_default().0,
        ..Default::default()
    });
    let state = result.as_ref().map_or("PENDING", |result| &result.outcome).to_owned();
    Some(v1::Job { id: id.0, state, result, array_job_id: array.0, array_index: index, array: None, ..shown })
}

/// A job that left memory.
pub fn archived(state: &State, row: &HistoryRow) -> v1::Job {
    let mut shown = shown(state, row.id, &row.job, Some(&row.body), row.task.as_ref().map(|task| &task.value));
    let outcome = row.job.value.ended.as_ref().map(|end| words::outcome(end.outcome)).unwrap_or("PENDING");
    shown.state = outcome.to_owned();
    shown.attempt = row.task.as_ref().map(|task| task.value.attempt).unwrap_or_default();
    shown
}

/// What does not depend on a live lease.
fn shown(state: &State, id: JobId, job: &Versioned<Job>, body: Option<&Body>, task: Option<&Task>) -> v1::Job {
    let record = &job.value;
    let mod_revision =
        state.tasks.get(&TaskKey::only(id)).map(|task| task.mod_rev).unwrap_or_default().max(job.mod_rev);
    v1::Job {
        id: id.0,
        spec: Some(spec(state, record, body)),
        user: user_name(state, record.user),
        result: result(record, task),
        attempts: task.map(|task| task.attempts.iter().map(|row| attempt(state, row)).collect()).unwrap_or_default(),
        submitted_unix_ms: record.submitted_wall_ms,
        ended_unix_ms: record.ended.as_ref().map(|end| end.wall_ms).unwrap_or_default(),
        retries_used: task.map(|task| u32::from(task.used.retries)).unwrap_or_default(),
        create_revision: job.create_rev.0,
        mod_revision: mod_revision.0,
        checkpoint: task.and_then(|task| task.checkpoint.as_deref()).map(checkpoint),
        made_room: task.map(|task| u32::from(task.displaced) + u32::from(task.had.given)).unwrap_or_default(),
        request_id: record.request.map(request_text).unwrap_or_default(),
        array_job_id: record.element().map_or(0, |element| element.array.0),
        array_index: record.element().map_or(0, |element| element.index),
        array: record.array().map(|(array, progress)| array_progress(array, progress)),
        ..Default::default()
    }
}

fn array_progress(array: &Array, progress: &Progress) -> v1::ArrayProgress {
    let [failed, timed_out, cancelled, skipped, succeeded] = progress.ended;
    let (tasks, left, open) = (array.tasks(), progress.left(array), progress.open);
    let next_index = array.index_of(progress.begun).filter(|_| left > 0).unwrap_or_default();
    v1::ArrayProgress { tasks, left, next_index, open, succeeded, failed, timed_out, cancelled, skipped }
}

fn checkpoint(it: &Checkpoint) -> v1::Checkpoint {
    v1::Checkpoint { path: it.path.clone(), attempt: it.attempt, step: it.step, clock_ms: it.clock_ms }
}

fn request_text(id: RequestId) -> String {
    uuid::Uuid::from_bytes(id.0).hyphenated().to_string()
}

/// A job that ended before its first attempt has an outcome, and perhaps no task.
fn result(job: &Job, task: Option<&Task>) -> Option<v1::Result> {
    if let Some(result) = task.and_then(|task| task.result.as_ref()) {
        return Some(v1::Result {
            outcome: words::outcome(result.outcome).to_owned(),
            token: result.token.unwrap_or_default().0,
            attempt: result.attempt,
            exit: result.exit.map(exit),
            has_exit: result.exit.is_some(),
            revision: result.rev.0,
            unix_ms: result.wall_ms,
            cause: result.cause.map(|cause| cause.name().to_owned()).unwrap_or_default(),
            parent_id: result.cause.and_then(EndCause::parent).unwrap_or_default().0,
        });
    }
    let end = job.ended.as_ref()?;
    let outcome = words::outcome(end.outcome).to_owned();
    Some(v1::Result { outcome, unix_ms: end.wall_ms, ..Default::default() })
}

fn spec(state: &State, job: &Job, body: Option<&Body>) -> v1::JobSpec {
    let spec = &job.spec;
    let shape = &spec.shape;
    v1::JobSpec {
        name: spec.name.to_string(),
        priority: spec.priority,
        shape: Some(v1::Shape {
            nodes: u32::from(shape.nodes),
            ranks_per_node: u32::from(shape.ranks_per_node),
            gpus_per_rank: u32::from(shape.gpus_per_rank),
            gpu_types: shape.gpu_types.iter().map(|id| gpu_type(state, *id)).collect(),
            cores_per_rank: u32::from(shape.cores_per_rank),
            mem_mib_per_rank: shape.mem_mib_per_rank,
            min_bandwidth_mbps: shape.min_bandwidth_mbps,
            mix_types: shape.mix_types,
            topology: shape.topology.map(|topology| topology.to_string()).unwrap_or_default(),
            constraint: shape.machines.as_ref().map(|it| it.constraint.to_string()).unwrap_or_default(),
            nodelist: shape.machines.iter().flat_map(|it| it.only.iter().cloned()).collect(),
            most_gpus_per_rank: most_gpus_per_rank(spec),
            exclude: shape.machines.iter().flat_map(|it| it.without.iter().cloned()).collect(),
        }),
        limit_ms: spec.limit_ms,
        lease_ttl_ms: spec.lease_ttl_ms,
        kill_grace_ms: spec.kill_grace_ms,
        retry: Some(v1::Retry {
            max: u32::from(spec.retry.max),
            initial_ms: spec.retry.initial_ms,
            mult_milli: spec.retry.mult_milli,
            max_ms: spec.retry.max_ms,
            on_exit: spec.retry.on_exit.iter().map(|code| u32::from(*code)).collect(),
        }),
        labels: spec.labels.clone().into_iter().collect(),
        tenant: state.tenants.get(&job.tenant).map(|tenant| tenant.name.clone()).unwrap_or_default(),
        queue: state.queues.get(&job.queue).map(|queue| queue.name.clone()).unwrap_or_default(),
        body: body.map(|body| v1::Body {
            argv: body.argv.clone(),
            env: body.env.clone().into_iter().collect(),
            cwd: body.cwd.clone(),
        }),
        hold: job.holds.user,
        priority_class: spec.terms.as_ref().map(|terms| terms.class.clone()).unwrap_or_default(),
        begin_unix_ms: spec.begin_wall_ms(),
        deadline_unix_ms: spec.deadline_wall_ms(),
        after: spec
            .after()
            .iter()
            .map(|after| v1::After { kind: words::after(after.kind).to_owned(), job_id: after.job.0 })
            .collect(),
        image: String::new(),
        checkpoint_signal: u32::from(spec.checkpoint_signal()),
        reservation: spec.reservation().to_owned(),
        array: spec.array().map(|array| v1::Array {
            ranges: array.ranges.iter().map(|(first, last)| v1::IndexRange { first: *first, last: *last }).collect(),
            throttle: array.throttle,
        }),
    }
}

/// 0 = it takes as many as it says.
fn most_gpus_per_rank(spec: &JobSpec) -> u32 {
    let least = u32::from(spec.shape.gpus_per_rank);
    if spec.doublings() == 0 { 0 } else { least.checked_shl(spec.doublings().into()).unwrap_or(least) }
}

fn attempt(state: &State, row: &AttemptRow) -> v1::Attempt {
    v1::Attempt {
        attempt: row.attempt,
        token: row.token.0,
        verdict: row.verdict.name().to_owned(),
        exit: row.exit.map(exit),
        has_exit: row.exit.is_some(),
        nodes: row.nodes.iter().map(|node| state.node_name(*node).to_owned()).collect(),
        granted_clock_ms: row.granted_ms,
        started_clock_ms: row.started_ms.unwrap_or_default(),
        ended_clock_ms: row.ended_ms,
        text: row.text.clone(),
        preemptor_id: row.preemptor.unwrap_or_default().0,
        lost_gpu_ms: row.lost_gpu_ms,
    }
}

fn exit(exit: Exit) -> v1::Exit {
    v1::Exit { code: exit.code, signal: u32::from(exit.signal) }
}

fn live_lease<'a>(state: &'a State, task: &Task) -> Option<(u64, &'a Lease)> {
    let Phase::Leased { token } = task.phase else { return None };
    Some((token.0, &state.leases.get(&token)?.value))
}

fn placed(state: &State, part: &Part) -> Option<v1::PlacedPart> {
    let node = &state.nodes.get(&part.node)?.value;
    Some(v1::PlacedPart {
        node_id: part.node.0,
        node: node.name.clone(),
        address: node.address.clone(),
        gpu_uuids: gpu_uuids(node, part),
        gpu_slots: part.gpu_order.iter().map(|slot| u32::from(*slot)).collect(),
        first_rank: part.first_rank,
        ranks: u32::from(part.ranks),
        cores: part.cores_by_numa.iter().map(|cores| u32::from(*cores)).sum(),
        mem_mib: part.mem_mib,
        state: words::part_state(part.state).to_owned(),
    })
}

/// One line a part with GPUs: what the choice is worth, by the same model that made it.
fn why(state: &State, lease: &Lease, tables: &Tables) -> Vec<String> {
    let line = |part: &Part| {
        let node = &state.nodes.get(&part.node)?.value;
        if part.gpus == 0 {
            return None;
        }
        let table = tables.of(state.classes.get(&node.class)?);
        let text = predict(&table, part.gpus).text;
        let network = match (lease.parts.len(), network_mbps(&table, part.gpus)) {
            (1, _) | (_, 0) => String::new(),
            (_, mbps) => format!("; {} to the other machines", gbps(mbps)),
        };
        Some(format!("{}: {text}{network}", node.name))
    };
    lease.parts.iter().filter_map(line).collect()
}
