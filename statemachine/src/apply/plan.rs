//! Plan: grants leases for the placements that still hold. Each is checked whole against the state as it is after the
//! placements before it: one failing part refuses its placement, and no other.
//!
//! Per placement: TASK_GONE, ATTEMPT_MOVED, NODE_NOT_READY, EPOCH_MOVED, GPU_TAKEN, GPU_UNHEALTHY, NO_FIT, LIMIT,
//! CLAIMED (kept for another task), RESERVED (set aside in that time), QUOTA at any level of the tenants.
//! Emits the lease, the fences of its job and GPUs, and the task's state.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use planted::{Bug, planted};

use super::Ctx;
use crate::command::{Code, Place, PlacePart, Plan, Rejection, Reply};
use crate::domain::Level;
use crate::event::Change;
use crate::fit::{self, NoFit};
use crate::id::*;
use crate::record::*;
use crate::spec::{JobSpec, Shape};
use crate::state::State;
use crate::transition::{self, By};

/// Placements of one command: bounds its work and its events.
const PLACES: usize = 4_096;

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, plan: &Plan) -> Result<Reply, Rejection> {
    if plan.places.len() > PLACES {
        let detail = format!("places has {} items, the limit is {PLACES}", plan.places.len());
        return Err(Rejection::new(Code::Limit, detail));
    }
    Ok(Reply::Plan(plan.places.iter().map(|place| grant(state, ctx, place)).collect()))
}

fn grant(state: &mut State, ctx: &mut Ctx<'_>, place: &Place) -> Result<Token, Rejection> {
    let job = check_task(state, place)?;
    let masks = check_parts(state, place.task, &job.spec, &place.parts)?;
    let amounts = state.amounts_of(place.parts.iter().map(PlacePart::takes));
    // What others ended for a task is its tenant's already; the task itself was granted it then.
    let bounded =
        !state.claims.is_empty() && state.tenant_chain(job.tenant).any(|(_, tenant)| tenant.policy.is_bounded());
    let counts = bounded && !state.claims.contains(&place.task);
    let kept = if counts { state.kept_for_others(place.task) } else { BTreeMap::new() };
    if let Some(hit) = state.quota_hit(job.tenant, &amounts, &kept) {
        return Err(Rejection::new(Code::Quota, state.quota_text(&hit)));
    }
    let (ttl_ms, tenant, ranks) = (job.spec.lease_ttl_ms, job.tenant, job.spec.shape.ranks_per_node);
    let token = state.mint().ok_or_else(|| Rejection::new(Code::Limit, "fencing tokens are used up"))?;

    let born = state.next_element(place.task);
    let task = born.as_ref().map_or(place.task, |(id, _)| TaskKey::only(*id));
    let lease = Lease { task, amounts, ..build_lease(state, place, &masks, ttl_ms, ranks) };
    if born.is_some() {
        state.count_begun(ctx, place.task.job, task.job);
    }
    state.change_job(ctx, task.job, |state, ctx| {
        if let Some((id, job)) = born {
            state.insert_element(ctx, id, job);
        }
        state.touch_task(task);
        state.tasks.update(&task, |task| {
            if let Some(next) = transition::next(&task.value.phase, By::Grant { token }) {
                task.value.phase = next.phase;
                task.value.attempt = place.attempt;
            }
            match &mut task.value.fence {
                Some(fence) => {
                    fence.value = token;
                    fence.bump(ctx.rev);
                }
                none => *none = Some(Versioned::new(ctx.rev, token)),
            }
        });
        take_parts(state, token, tenant, &lease);
        fence_gpus(state, ctx, task, token, &lease);
        state.leases.insert(token, Versioned::new(ctx.rev, lease));
    });
    Ok(token)
}

fn check_task<'a>(state: &'a State, place: &Place) -> Result<&'a Job, Rejection> {
    let job = waiting_job(state, place.task)?;
    let next = state.tasks.get(&place.task).map_or(0, |task| task.value.attempt).saturating_add(1);
    if place.attempt != next {
        let detail = format!("attempt is {}, the next one is {next}", place.attempt);
        return Err(Rejection::new(Code::AttemptMoved, detail));
    }
    Ok(job)
}

/// The job of a task that may start.
pub(super) fn waiting_job(state: &State, key: TaskKey) -> Result<&Job, Rejection> {
    let gone = |why: &str| Rejection::new(Code::TaskGone, format!("job {}: {why}", key.job));
    let job = &state.jobs.get(&key.job).ok_or_else(|| gone("unknown or ended"))?.value;
    if job.ended.is_some() || state.is_stopped(job) {
        return Err(gone("was cancelled or has ended"));
    }
    if state.is_barred(job) {
        return Err(gone("is on hold"));
    }
    match state.task_to_start(key.job, 0) {
        Some(next) if next == key => {}
        Some(TaskKey { index: 0, .. }) if job.array().is_none() => return Err(gone("has one task, of index 0")),
        Some(next) => return Err(gone(&format!("its next task is {}, not {}", next.index, key.index))),
        None => return Err(gone("starts no more of its tasks now")),
    }
    if let Some((_, progress)) = job.array() {
        if state.has_orphan(key.job.nth_task(progress.begun)) {
            return Err(gone("an attempt of its next task runs without a lease"));
        }
        if u64::try_from(state.jobs.len()).unwrap_or(u64::MAX) >= state.meta.settings.live_jobs {
            return Err(gone("no more jobs fit into memory"));
        }
    }
    if state.tasks.get(&key).is_some_and(|task| task.value.phase != Phase::Pending) {
        return Err(gone("is not PENDING"));
    }
    Ok(job)
}

impl PlacePart {
    /// What `State::amounts_of` asks of a part.
    pub fn takes(&self) -> (NodeId, &[u8], &[u16], u64) {
        (self.node, &self.gpu_order, &self.cores_by_numa, self.mem_mib)
    }
}

/// The GPU masks of the parts, in order.
pub(super) fn check_parts(
    state: &State,
    task: TaskKey,
    spec: &JobSpec,
    parts: &[PlacePart],
) -> Result<Vec<u128>, Rejection> {
    let shape = cut_for(spec, parts)?;
    check_gang(state, &shape, parts, |part| {
        state.may_use(spec, part.node)?;
        check_part(state, task, &shape, part)
    })
}

/// The shape that the job has in these parts.
pub(super) fn cut_for<'a>(spec: &'a JobSpec, parts: &[PlacePart]) -> Result<Cow<'a, Shape>, Rejection> {
    let gpus = parts.iter().fold(0usize, |sum, part| sum.saturating_add(part.gpu_order.len()));
    spec.shape_of(parts.len(), gpus).ok_or_else(|| {
        let sizes: Vec<String> = spec.sizes().map(|size| size.to_string()).collect();
        let (parts, sizes) = (parts.len(), sizes.join(" or "));
        let detail = format!("the placement has {gpus} GPUs in {parts} parts, must have {sizes} in equal ones");
        Rejection::new(Code::NoFit, detail)
    })
}

/// Each part by itself, then what makes them one gang.
pub(super) fn check_gang(
    state: &State,
    shape: &Shape,
    parts: &[PlacePart],
    check_part: impl Fn(&PlacePart) -> Result<(u128, Option<GpuTypeId>), Rejection>,
) -> Result<Vec<u128>, Rejection> {
    if parts.len() != usize::from(shape.nodes) {
        let detail = format!("the placement has {} parts, the gang needs {}", parts.len(), shape.nodes);
        return Err(Rejection::new(Code::NoFit, detail));
    }
    let (mut nodes, mut of_type, mut masks) = (BTreeSet::new(), None, Vec::with_capacity(parts.len()));
    for part in parts {
        if !nodes.insert(part.node) {
            return Err(Rejection::new(Code::NoFit, format!("node {} is named twice", part.node)));
        }
        let (mask, gpu_type) = check_part(part)?;
        let first = *of_type.get_or_insert(gpu_type);
        if gpu_type != first && !shape.mix_types {
            return Err(Rejection::new(Code::NoFit, "the parts' GPUs are of different types"));
        }
        masks.push(mask);
    }
    if !state.are_near_enough(shape, nodes.iter().copied()) {
        let names: Vec<&str> = nodes.iter().map(|node| state.node_name(*node)).collect();
        let level = shape.required_level().map_or("", Level::name);
        let detail = format!("the gang requires one {level}: nodes {} are not in one", names.join(", "));
        return Err(Rejection::new(Code::NoFit, detail));
    }
    Ok(masks)
}

fn check_part(
    state: &State,
    task: TaskKey,
    shape: &Shape,
    part: &PlacePart,
) -> Result<(u128, Option<GpuTypeId>), Rejection> {
    let missing = || Rejection::new(Code::NodeNotReady, format!("there is no node {}", part.node));
    let node = &state.nodes.get(&part.node).ok_or_else(missing)?.value;
    let alloc = state.allocs.get(&part.node).ok_or_else(missing)?;
    check_epoch(node, part)?;
    check_lease(state, node, (part.node, alloc), task)?;
    if planted(Bug::TrustedPlan) {
        let empty = fit::alloc_of(node, std::iter::empty(), Vec::new());
        return fit::fit(node, &empty, shape, part).map_err(|why| Rejection::new(Code::NoFit, why.to_string()));
    }
    let fits = fit::fit(node, alloc, shape, part).map_err(|why| no_fit(node, &why))?;
    // What is free may be kept for others.
    if let Cow::Owned(beside) = state.free_beside_claims(part.node, alloc, task) {
        fit::fit(node, &beside, shape, part).map_err(|why| {
            Rejection::new(Code::Claimed, format!("node {}: what is free is kept for another task: {why}", node.name))
        })?;
    }
    Ok(fits)
}

/// The machine may hold one more lease.
pub(super) fn check_lease(
    state: &State,
    node: &Node,
    (id, alloc): (NodeId, &Alloc),
    task: TaskKey,
) -> Result<(), Rejection> {
    if state.takes_lease(id, alloc.leases.len(), task) {
        return Ok(());
    }
    let (held, limit) = (alloc.leases.len(), state.meta.settings.leases_per_node);
    let detail = format!("node {}: holds {held} leases, or is kept for more; the limit is {limit}", node.name);
    Err(Rejection::new(Code::Limit, detail))
}

pub(super) fn check_epoch(node: &Node, part: &PlacePart) -> Result<(), Rejection> {
    if node.epoch == part.epoch {
        return Ok(());
    }
    let detail = format!("node {}: epoch is {}, not {}", node.name, node.epoch, part.epoch);
    Err(Rejection::new(Code::EpochMoved, detail))
}

pub(super) fn no_fit(node: &Node, why: &NoFit) -> Rejection {
    let code = match why {
        NoFit::NotReady(_) => Code::NodeNotReady,
        NoFit::Unhealthy(..) => Code::GpuUnhealthy,
        NoFit::Taken(_) => Code::GpuTaken,
        NoFit::NotAllowed(_) | NoFit::Shape(_) | NoFit::Cores { .. } | NoFit::Memory { .. } => Code::NoFit,
    };
    Rejection::new(code, format!("node {}: {why}", node.name))
}

/// One machine starts at once; several wait at the barrier until each is prepared.
fn build_lease(state: &State, place: &Place, masks: &[u128], ttl_ms: u64, ranks: u16) -> Lease {
    let alone = place.parts.len() == 1;
    let now = state.meta.clock_ms;
    let parts = place.parts.iter().zip(masks).enumerate().map(|(nth, (part, mask))| Part {
        node: part.node,
        epoch: part.epoch,
        gpus: *mask,
        gpu_order: part.gpu_order.clone(),
        first_rank: u32::try_from(nth).unwrap_or(u32::MAX).saturating_mul(u32::from(ranks)),
        ranks,
        cores_by_numa: part.cores_by_numa.clone(),
        mem_mib: part.mem_mib,
        state: PartState::Held,
        exits: Vec::new(),
    });
    Lease {
        task: place.task,
        attempt: place.attempt,
        phase: if alone { LeasePhase::Go } else { LeasePhase::Prepare },
        granted_ms: now,
        go_ms: alone.then_some(now),
        started_ms: None,
        ttl_ms,
        verdict: None,
        master: None,
        parts: parts.collect(),
        amounts: Amounts::default(),
    }
}

fn take_parts(state: &mut State, token: Token, tenant: TenantId, lease: &Lease) {
    for part in &lease.parts {
        state.allocs.update(&part.node, |alloc| alloc.take(token, part));
    }
    state.charge(tenant, lease);
}

fn fence_gpus(state: &mut State, ctx: &mut Ctx<'_>, task: TaskKey, token: Token, lease: &Lease) {
    let slots = lease.parts.iter().flat_map(|part| part.gpu_order.iter().map(|slot| (part.node, *slot)));
    let gpus: Vec<GpuUuid> = slots.filter_map(|(node, slot)| state.gpu_uuid(node, slot)).collect();
    for gpu in &gpus {
        let raised = state.gpu_tokens.update(gpu, |fence| {
            fence.value = token;
            fence.bump(ctx.rev);
        });
        if raised.is_none() {
            state.gpu_tokens.insert(*gpu, Versioned::new(ctx.rev, token));
        }
    }
    ctx.tell(Change::JobFenced { task, token });
    if !gpus.is_empty() {
        ctx.tell(Change::GpusFenced { token, gpus });
    }
}
