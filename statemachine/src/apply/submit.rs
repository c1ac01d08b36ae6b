//! SubmitJob: mints the job's id and puts it in its queue.
//!
//! Refuses TENANT_UNKNOWN, QUEUE_UNKNOWN, DEPENDENCY_UNKNOWN, DEADLINE_TOO_SOON, QUOTA_PENDING, PRIORITY_UNKNOWN,
//! PRIORITY_DENIED, RESERVATION_UNKNOWN and RESERVATION_DENIED; NOT_FOUND (a machine); INVALID_SPEC with all fields at once; NEVER_FITS for what no machine under
//! the limits could hold (not: what no machine of today holds); STATE_FULL. Emits JobSubmitted and its first state.

use std::collections::{BTreeMap, BTreeSet};

use super::{Ctx, calendar, dependents, reservation, tenant};
use crate::command::{Code, Rejection, Reply, SubmitJob};
use crate::event::Change;
use crate::fit::MAX_GPUS;
use crate::id::*;
use crate::record::*;
use crate::settings::Settings;
use crate::spec::{After, Retry, Shape};
use crate::state::State;
use crate::transition::By;

/// Alternatives that a job may name, in order of preference.
const GPU_TYPES: usize = 4;
const GPU_TYPE_BYTES: usize = 64;
/// Arguments, and environment variables, of one body: bounds what empty strings cost.
const BODY_STRINGS: usize = 4_096;
/// 2^48 and above is reserved for jobs of other clusters.
const MAX_JOB: u64 = 1 << 48;
/// Longest backoff of a retry: a week.
const MAX_BACKOFF_MS: u64 = 7 * 24 * 3_600_000;
/// Longest time limit of an attempt: ten years.
pub(super) const MAX_LIMIT_MS: u64 = 10 * 365 * 24 * 3_600_000;
/// The classic signals; no process hears of SIGKILL and SIGSTOP.
const MAX_SIGNAL: u8 = 31;
const UNCATCHABLE: [u8; 2] = [9, 19];
const MULTIPLIER: std::ops::RangeInclusive<u32> = 1_000..=100_000;

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, submit: &SubmitJob) -> Result<Reply, Rejection> {
    let tenant = tenant::find(state, &submit.tenant)?;
    let queue = find_queue(state, &submit.queue)?;
    check_fields(submit, &state.meta.settings)?;
    check_shape(&submit.spec.shape, &state.meta.settings)?;
    check_machines(state, &submit.spec.shape)?;
    state.gpu_types_left(submit.gpu_types.iter().map(String::as_str))?;
    check_room(state, submit)?;
    check_pending(state, tenant)?;
    let mut spec = complete_spec(state, submit, tenant)?;
    reservation::check_submission(state, ctx.actor, tenant, &spec)?;
    calendar::check_deadline(state, &spec)?;
    let parents = dependents::judge(state, &submit.spec)?;

    let id = JobId(state.meta.next_job);
    // The tasks of an array have their ids behind its own.
    let tasks = spec.array().map_or(0, |array| u64::from(array.tasks()));
    state.meta.next_job = id.0.saturating_add(1).saturating_add(tasks);
    spec.shape.gpu_types = submit.gpu_types.iter().map(|name| state.intern_gpu_type(name)).collect();
    spec.shape.nodes = nodes_for_good(state, &spec);
    let paced = (parents.paced != 0).then_some(Paced { parents: parents.paced, freed: 0, due: true });
    let progress = Progress { paced, ..Progress::default() };
    let job = Job {
        spec,
        tenant,
        user: state.intern_user(ctx.actor),
        queue,
        request: ctx.request,
        submitted_clock_ms: state.meta.clock_ms,
        submitted_wall_ms: state.meta.wall_ms,
        seq: ctx.rev.0,
        // After a restore from a backup, machines may run attempts of jobs that are yet to be submitted again.
        holds: Holds {
            launch: false,
            orphan: state.has_orphan(id),
            user: submit.hold,
            begin: submit.spec.begin_wall_ms() > state.meta.wall_ms,
            after: parents.unmet != 0,
            restore: false,
        },
        rare: (tasks > 0).then(|| Box::new(Rare { stop: None, role: Some(ArrayRole::Whole(progress)) })),
        ended: None,
        unmet: parents.unmet,
    };
    ctx.tell(Change::JobSubmitted { job: id });
    let bytes = u64::try_from(submit.body.size()).unwrap_or(u64::MAX);
    state.change_job(ctx, id, |state, ctx| {
        state.jobs.insert(id, Versioned::new(ctx.rev, job));
        state.bodies.insert(id, submit.body.clone());
        state.tenants.update(&tenant, |tenant| {
            tenant.live_jobs = tenant.live_jobs.saturating_add(1);
            tenant.body_bytes = tenant.body_bytes.saturating_add(bytes);
        });
        if let Some(parent) = parents.failed {
            state.end_unstarted(ctx, TaskKey::only(id), By::Skip, Some(EndCause::Parent(parent)));
        }
    });
    Ok(Reply::Stored(StoredReply::Job(id)))
}

/// An open shape becomes one machine where one that is there could hold it, or there is nothing to cut; else it stays open,
/// for each plan to cut.
fn nodes_for_good(state: &State, spec: &JobSpec) -> u16 {
    let is_whole = || spec.shape.gpus_per_rank == 1 || state.fewest_nodes(spec) == Some(1);
    if spec.shape.is_open() && spec.doublings() == 0 && is_whole() { 1 } else { spec.shape.nodes }
}

/// The machines that it names have joined at some time.
fn check_machines(state: &State, shape: &Shape) -> Result<(), Rejection> {
    let Some(selector) = &shape.machines else { return Ok(()) };
    let names = selector.only.iter().map(|name| ("nodelist", name));
    let mut names = names.chain(selector.without.iter().map(|name| ("exclude", name)));
    names.find(|(_, name)| !state.index.node_by_name.contains_key(*name)).map_or(Ok(()), |(field, name)| {
        let detail = format!("shape.{field} names {:?}, there is no such node", crate::lease::clip(name));
        Err(Rejection::new(Code::NotFound, detail))
    })
}

/// Every tenant has one queue, `default`, until queues can be made.
fn find_queue(state: &State, name: &str) -> Result<QueueId, Rejection> {
    let mut queues = state.queues.iter();
    queues.find(|(_, queue)| queue.name == name).map(|(id, _)| *id).ok_or_else(|| {
        Rejection::new(Code::QueueUnknown, format!("queue {name:?} does not exist in this tenant, known: default"))
    })
}

/// The tenant may have only so many jobs that wait.
fn check_pending(state: &State, tenant: TenantId) -> Result<(), Rejection> {
    for (_, tenant) in state.tenant_chain(tenant).take(1) {
        let pending = tenant.live_jobs.saturating_sub(tenant.leases);
        let limit = tenant.policy.max_pending;
        if limit > 0 && pending >= limit {
            let detail = format!("tenant {:?} has {pending} jobs that wait, its limit is {limit}", tenant.name);
            return Err(Rejection::new(Code::QuotaPending, detail));
        }
    }
    Ok(())
}

/// The spec as it is kept: its tenant's time limit where it names none, and the value of its priority class.
fn complete_spec(state: &State, submit: &SubmitJob, tenant: TenantId) -> Result<JobSpec, Rejection> {
    let mut spec = submit.spec.clone();
    spec.limit_ms = time_limit(state, spec.limit_ms, tenant)?;
    if !submit.priority_class.is_empty() {
        if spec.priority != 0 {
            let detail = format!("priority is {}, must be 0 beside priority_class", spec.priority);
            return Err(Rejection::new(Code::InvalidSpec, detail));
        }
        spec.priority = tenant::priority_of(state, &submit.priority_class, tenant)?;
        spec.terms.get_or_insert_default().class = submit.priority_class.clone();
    }
    Ok(spec)
}

/// The job's own time limit, or else the nearest default of its tenants within the longest that they allow, or that itself.
fn time_limit(state: &State, own_ms: u64, tenant: TenantId) -> Result<u64, Rejection> {
    let longest = state.tenant_chain(tenant).map(|(_, tenant)| (tenant.policy.max_limit_ms, tenant));
    let longest = longest.filter(|(ms, _)| *ms > 0).min_by_key(|(ms, _)| *ms);
    if own_ms == 0 {
        let mut defaults = state.tenant_chain(tenant).map(|(_, tenant)| tenant.policy.default_limit_ms);
        let default_ms = defaults.find(|ms| *ms > 0);
        let longest_ms = longest.map(|(ms, _)| ms);
        return Ok(default_ms.into_iter().chain(longest_ms).min().unwrap_or(0));
    }
    match longest.filter(|(ms, _)| own_ms > *ms) {
        None => Ok(own_ms),
        Some((ms, tenant)) => {
            let detail = format!("limit_ms is {own_ms}, the limit of tenant {:?} is {ms}", tenant.name);
            Err(Rejection::new(Code::InvalidSpec, detail))
        }
    }
}

fn check_room(state: &State, submit: &SubmitJob) -> Result<(), Rejection> {
    let body = submit.body.size();
    let settings = &state.meta.settings;
    let full = |detail: String| Err(Rejection::new(Code::StateFull, detail));
    let jobs = u64::try_from(state.jobs.len()).unwrap_or(u64::MAX);
    if jobs >= settings.live_jobs {
        return full(format!("{jobs} jobs are in memory, the limit is {}", settings.live_jobs));
    }
    let held = state.tenants.iter().fold(0u64, |sum, (_, tenant)| sum.saturating_add(tenant.body_bytes));
    if held.saturating_add(u64::try_from(body).unwrap_or(u64::MAX)) > settings.bodies_bytes {
        let limit = settings.bodies_bytes;
        return full(format!("the bodies in memory hold {held} bytes, {body} more would pass the limit of {limit}"));
    }
    let tasks = submit.spec.array().map_or(0, |array| u64::from(array.tasks()));
    if state.meta.next_job.saturating_add(tasks) >= MAX_JOB {
        return full(format!("job ids are used up at {MAX_JOB}"));
    }
    Ok(())
}

/// All that is wrong with the fields, in one refusal.
fn check_fields(submit: &SubmitJob, settings: &Settings) -> Result<(), Rejection> {
    let mut wrong = Wrong::default();
    let spec = &submit.spec;
    wrong.text("name", &spec.name, settings.name_bytes);
    check_gpu_types(&mut wrong, submit);
    check_slices(&mut wrong, submit);
    check_counts(&mut wrong, &spec.shape);
    if let Some(machines) = spec.shape.machines.as_ref().and_then(|selector| selector.wrong(spec.shape.nodes)) {
        wrong.push(machines);
    }
    let (least, most) = (settings.lease_ttl_min_ms, settings.lease_ttl_max_ms);
    if !(least..=most).contains(&spec.lease_ttl_ms) {
        wrong.push(format!("lease_ttl_ms is {}, must be {least} to {most}", spec.lease_ttl_ms));
    }
    if spec.kill_grace_ms > spec.lease_ttl_ms / 4 {
        let limit = spec.lease_ttl_ms / 4;
        wrong.push(format!("kill_grace_ms is {}, the limit is {limit}, a quarter of the lease", spec.kill_grace_ms));
    }
    let signal = spec.checkpoint_signal();
    if signal > MAX_SIGNAL || UNCATCHABLE.contains(&signal) {
        wrong.push(format!("checkpoint_signal is {signal}, must be 1 to {MAX_SIGNAL} and none of {UNCATCHABLE:?}"));
    }
    if spec.limit_ms > MAX_LIMIT_MS {
        wrong.push(format!("limit_ms is {}, the limit is {MAX_LIMIT_MS}; 0 is no limit", spec.limit_ms));
    }
    check_retry(&mut wrong, &spec.retry);
    check_labels(&mut wrong, &spec.labels, settings);
    check_parents(&mut wrong, spec.after());
    check_sizes(&mut wrong, spec);
    if let Some(array) = spec.array().and_then(Array::wrong) {
        wrong.push(array);
    }
    check_body(&mut wrong, &submit.body, settings);
    wrong.done()
}

fn check_gpu_types(wrong: &mut Wrong, submit: &SubmitJob) {
    if !submit.spec.shape.gpu_types.is_empty() {
        wrong.push("shape.gpu_types is filled by the state machine, must be empty".into());
    }
    if submit.gpu_types.len() > GPU_TYPES {
        wrong.push(format!("gpu_types names {} types, the limit is {GPU_TYPES}", submit.gpu_types.len()));
    }
    for (place, name) in submit.gpu_types.iter().enumerate().take(GPU_TYPES) {
        if !is_slug(name) {
            wrong.push(format!(
                "gpu_types[{place}] is {:?}, must be 1 to {GPU_TYPE_BYTES} of a-z 0-9 . _ -",
                crate::lease::clip(name)
            ));
        }
        if submit.gpu_types[..place].contains(name) {
            wrong.push(format!("gpu_types names {:?} twice", crate::lease::clip(name)));
        }
    }
}

/// A process sees one slice of a GPU, whatever it is given.
fn check_slices(wrong: &mut Wrong, submit: &SubmitJob) {
    let (shape, doublings) = (&submit.spec.shape, submit.spec.doublings());
    let Some(slice) = submit.gpu_types.iter().find(|name| is_slice_name(name)) else { return };
    if shape.gpus_per_rank > 1 || doublings > 0 {
        let most = u64::from(shape.gpus_per_rank) << doublings.min(16);
        wrong.push(format!(
            "shape.gpus_per_rank is {most}, must be 1 with gpu_types {slice}: a process sees one slice of a GPU; ask for more ranks"
        ));
    }
}

/// A GPU type's name: what nodes register and jobs ask for.
pub(super) fn is_slug(name: &str) -> bool {
    (1..=GPU_TYPE_BYTES).contains(&name.len())
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
}

fn check_counts(wrong: &mut Wrong, shape: &Shape) {
    if shape.is_open() && shape.gpus_per_rank == 0 {
        wrong.push("shape.nodes is 0, must be at least 1 without GPUs".into());
    }
    if shape.ranks_per_node == 0 {
        wrong.push("shape.ranks_per_node is 0, must be at least 1".into());
    }
}

/// More GPUs than the least: of open machines alone, and as many as can be counted.
fn check_sizes(wrong: &mut Wrong, spec: &JobSpec) {
    let doublings = spec.terms.as_ref().map_or(0, |terms| terms.doublings);
    if doublings == 0 {
        return;
    }
    if !spec.shape.is_open() {
        let nodes = spec.shape.nodes;
        wrong.push(format!("doublings is {doublings}, must be 0 where shape.nodes is not 0, it is {nodes}"));
    } else if spec.sizes().count() <= usize::from(doublings) {
        let (each, most) = (spec.shape.gpus_per_rank, u16::MAX);
        wrong.push(format!("doublings is {doublings}: {each} GPUs of a rank doubled as often are more than {most}"));
    }
}

fn check_retry(wrong: &mut Wrong, retry: &Retry) {
    if retry.max_ms > MAX_BACKOFF_MS {
        wrong.push(format!("retry.max_ms is {}, the limit is {MAX_BACKOFF_MS}", retry.max_ms));
    }
    if retry.initial_ms > retry.max_ms {
        wrong.push(format!("retry.initial_ms is {}, the limit is retry.max_ms = {}", retry.initial_ms, retry.max_ms));
    }
    if !MULTIPLIER.contains(&retry.mult_milli) {
        let (least, most) = (MULTIPLIER.start(), MULTIPLIER.end());
        wrong.push(format!("retry.mult_milli is {}, must be {least} to {most}", retry.mult_milli));
    }
    if retry.on_exit.len() > 255 {
        wrong.push(format!("retry.on_exit names {} codes, the limit is 255", retry.on_exit.len()));
    }
    if retry.on_exit.contains(&0) {
        wrong.push("retry.on_exit names 0, success is never retried".into());
    }
}

fn check_labels(wrong: &mut Wrong, labels: &BTreeMap<String, String>, settings: &Settings) {
    if labels.len() > settings.labels as usize {
        wrong.push(format!("labels has {} entries, the limit is {}", labels.len(), settings.labels));
        return;
    }
    for (key, value) in labels {
        wrong.text("a label's key", key, settings.label_bytes);
        if value.len() > settings.label_bytes as usize {
            let (key, limit) = (crate::lease::clip(key), settings.label_bytes);
            wrong.push(format!("label {key:?} has a value of {} bytes, the limit is {limit}", value.len()));
        }
    }
}

fn check_parents(wrong: &mut Wrong, after: &[After]) {
    if after.len() > dependents::PARENTS {
        wrong.push(format!("after names {} jobs, the limit is {}", after.len(), dependents::PARENTS));
        return;
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = after.iter().find(|after| !seen.insert(**after)) {
        wrong.push(format!("after names {}:{} twice", twice.kind.name(), twice.job));
    }
}

fn check_body(wrong: &mut Wrong, body: &Body, settings: &Settings) {
    if body.argv.first().is_none_or(String::is_empty) {
        wrong.push("argv is empty, must name a program".into());
    }
    for (field, len) in [("argv", body.argv.len()), ("env", body.env.len())] {
        if len > BODY_STRINGS {
            wrong.push(format!("{field} has {len} entries, the limit is {BODY_STRINGS}"));
        }
    }
    let size = u64::try_from(body.size()).unwrap_or(u64::MAX);
    if size > settings.body_bytes {
        wrong.push(format!("argv, env and cwd hold {size} bytes, the limit is {}", settings.body_bytes));
        return;
    }
    let nul = |text: &String| text.contains('\0');
    if body.argv.iter().any(nul) || body.env.iter().any(|(key, value)| nul(key) || nul(value)) || nul(&body.cwd) {
        wrong.push("argv, env or cwd has a NUL byte, no process can take one".into());
    }
    if let Some(key) = body.env.keys().find(|key| key.is_empty() || key.contains('=')) {
        let key = crate::lease::clip(key);
        wrong.push(format!("env has the name {key:?}, must be non-empty and without '='"));
    }
}

fn check_shape(shape: &Shape, settings: &Settings) -> Result<(), Rejection> {
    let never = |detail: String| Err(Rejection::new(Code::NeverFits, detail));
    if let Some(detail) = shape.uncuttable(settings) {
        return never(detail);
    }
    if u32::from(shape.nodes) > settings.parts_per_lease {
        return never(format!("shape.nodes is {}, the limit is {}", shape.nodes, settings.parts_per_lease));
    }
    if shape.ranks() > settings.ranks_per_lease {
        return never(format!("the gang has {} ranks, the limit is {}", shape.ranks(), settings.ranks_per_lease));
    }
    if !shape.is_open() && shape.gpus_per_node() as usize > MAX_GPUS {
        return never(format!("a machine would need {} GPUs, the limit is {MAX_GPUS}", shape.gpus_per_node()));
    }
    let cores = u32::from(shape.cores_per_rank) * u32::from(shape.ranks_per_node);
    if cores > u32::from(u16::MAX) {
        return never(format!("a machine would need {cores} cores, the limit is {}", u16::MAX));
    }
    Ok(())
}

/// Collects what is wrong.
#[derive(Default)]
struct Wrong(Vec<String>);

impl Wrong {
    fn push(&mut self, what: String) {
        self.0.push(what);
    }

    fn text(&mut self, field: &str, text: &str, limit: u32) {
        if text.is_empty() || text.len() > limit as usize {
            self.push(format!("{field} has {} bytes, must have 1 to {limit}", text.len()));
        }
        if text.chars().any(char::is_control) {
            self.push(format!("{field} has a control character"));
        }
    }

    fn done(self) -> Result<(), Rejection> {
        if self.0.is_empty() { Ok(()) } else { Err(Rejection::new(Code::InvalidSpec, self.0.join("; "))) }
    }
}
