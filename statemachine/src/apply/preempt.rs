//! Preempt: running attempts end as PREEMPTED and go back to their old places in the queue, and what they held is kept
//! for the task that they made room for, until it starts or stops waiting, or the time of its claim is over.
//!
//! All or nothing. Refuses LIMIT, TASK_GONE, CONFLICT (room is being made for it already), TOKEN_STALE,
//! ALREADY_DECIDED, VICTIM_PROTECTED (no right to end it, its budget or least run time, or it could be spared), QUOTA, and
//! what Plan refuses parts with. No retry is burnt, and the jobs keep their ids.

use std::collections::{BTreeMap, BTreeSet};

use super::{Ctx, DONE, plan};
use crate::command::{Code, PlacePart, Preempt, Rejection, Reply};
use crate::fit;
use crate::id::*;
use crate::lease::{Ruling, stale};
use crate::preemption::{Ground, Headroom, Rights};
use crate::record::*;
use crate::spec::{JobSpec, Shape};
use crate::state::State;

/// Leases that end by one command: bounds its work and its events.
const VICTIMS: usize = 1_024;
/// Tasks for which something is kept at a time.
const CLAIMS: usize = 1_000;

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, preempt: &Preempt) -> Result<Reply, Rejection> {
    let task = preempt.task;
    check_counts(state, preempt)?;
    let job = plan::waiting_job(state, task)?;
    check_room(state, preempt, &job.spec)?;
    let amounts = state.amounts_of(preempt.parts.iter().map(PlacePart::takes));
    let headroom = Headroom::new(state, task, &BTreeMap::new(), []);
    if let Some(hit) = headroom.hit(&amounts, &preempt.victims) {
        return Err(Rejection::new(Code::Quota, state.quota_text(&hit)));
    }
    let grounds = check_rights(state, preempt, &amounts)?;
    let shape = plan::cut_for(&job.spec, &preempt.parts)?;
    check_need(state, preempt, &shape, |leaving| headroom.hit(&amounts, leaving).is_none())?;

    let (priority, tenant) = (job.spec.priority, state.tenants.get(&job.tenant).map_or("", |tenant| &tenant.name));
    let told = |ground: Ground, victim: &Job| match ground {
        Ground::Priority => {
            format!("made room for job {}, of priority {priority} over {}", task.job, victim.spec.priority)
        }
        Ground::Reclaim => format!("made room for job {}: tenant {tenant:?} takes what is guaranteed to it", task.job),
        Ground::Turn => format!("made room for job {}, whose turn it is", task.job),
    };
    let mut endings = Vec::new();
    let mut grace_ms = 0;
    for (token, ground) in preempt.victims.iter().zip(grounds) {
        let id = state.leases.get(token).ok_or_else(|| stale(*token))?.value.task.job;
        let victim = &state.jobs.get(&id).ok_or_else(|| stale(*token))?.value;
        grace_ms = grace_ms.max(victim.spec.kill_grace_ms);
        endings.push((*token, id, ground, told(ground, victim)));
    }
    let until_ms = state.meta.clock_ms.saturating_add(grace_ms).saturating_add(state.meta.settings.planning.claim_ms);
    let (parts, victims) = (preempt.parts.clone(), preempt.victims.clone());
    state.keep_claim(task, Claim { parts, victims, amounts, until_ms });
    for (token, id, ground, text) in endings {
        state.change_job(ctx, id, |state, ctx| {
            let ruling = Ruling::new(VerdictKind::Preempted, text).making_room_for(task.job, ground == Ground::Turn);
            state.decide(ctx, token, ruling)
        })?;
    }
    DONE
}

fn check_counts(state: &State, preempt: &Preempt) -> Result<(), Rejection> {
    let limit = |detail: String| Err(Rejection::new(Code::Limit, detail));
    let victims = preempt.victims.len();
    if !(1..=VICTIMS).contains(&victims) {
        return limit(format!("victims has {victims} items, must have 1 to {VICTIMS}"));
    }
    if preempt.victims.iter().collect::<BTreeSet<_>>().len() < victims {
        return Err(Rejection::new(Code::InvalidSpec, "victims names a lease twice"));
    }
    if state.claims.contains(&preempt.task) {
        let detail = format!("room is being made for job {} already", preempt.task.job);
        return Err(Rejection::new(Code::Conflict, detail));
    }
    if state.claims.len() >= CLAIMS {
        return limit(format!("room is being made for {CLAIMS} tasks, the limit"));
    }
    Ok(())
}

/// The parts fit once the victims, and all that was decided before, have drained.
fn check_room(state: &State, preempt: &Preempt, spec: &JobSpec) -> Result<(), Rejection> {
    let shape = plan::cut_for(spec, &preempt.parts)?;
    plan::check_gang(state, &shape, &preempt.parts, |part| {
        state.may_use(spec, part.node)?;
        fits_without(state, preempt.task, &preempt.victims, &shape, part)
    })?;
    Ok(())
}

fn fits_without(
    state: &State,
    task: TaskKey,
    leaving: &[Token],
    shape: &Shape,
    part: &PlacePart,
) -> Result<(u128, Option<GpuTypeId>), Rejection> {
    let missing = || Rejection::new(Code::NodeNotReady, format!("there is no node {}", part.node));
    let node = &state.nodes.get(&part.node).ok_or_else(missing)?.value;
    plan::check_epoch(node, part)?;
    let alloc = state.free_after(part.node, leaving, task).ok_or_else(missing)?;
    plan::check_lease(state, node, (part.node, &alloc), task)?;
    fit::fit(node, &alloc, shape, part).map_err(|why| plan::no_fit(node, &why))
}

/// On which ground each victim is ended.
fn check_rights(state: &State, preempt: &Preempt, amounts: &Amounts) -> Result<Vec<Ground>, Rejection> {
    let nobody = || {
        let detail = format!(
            "job {} may end no other: neither its priority nor a guarantee nor a turn says so",
            preempt.task.job
        );
        Rejection::new(Code::VictimProtected, detail)
    };
    let mut rights = Rights::new(state, preempt.task, amounts, &BTreeMap::new()).ok_or_else(nobody)?;
    let mut grounds = Vec::with_capacity(preempt.victims.len());
    for victim in &preempt.victims {
        grounds.push(rights.against(*victim).map_err(|why| state.refusal(*victim, why))?);
        rights.count(*victim);
    }
    Ok(grounds)
}

/// None of them could be spared: without its end some part has no room, or the tenant no headroom.
fn check_need(
    state: &State,
    preempt: &Preempt,
    shape: &Shape,
    has_headroom: impl Fn(&[Token]) -> bool,
) -> Result<(), Rejection> {
    for victim in &preempt.victims {
        let lease = &state.leases.get(victim).ok_or_else(|| stale(*victim))?.value;
        let others: Vec<Token> = preempt.victims.iter().filter(|other| *other != victim).copied().collect();
        let shared = preempt.parts.iter().filter(|part| lease.parts.iter().any(|held| held.node == part.node));
        let fits = |part: &PlacePart| fits_without(state, preempt.task, &others, shape, part).is_ok();
        if shared.into_iter().all(fits) && has_headroom(&others) {
            let detail = format!("job {} could be spared: the parts have room beside it", lease.task.job);
            return Err(Rejection::new(Code::VictimProtected, detail));
        }
    }
    Ok(())
}
