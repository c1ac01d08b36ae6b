//! SetTenant, RemoveTenant, SetPriority and RemovePriority: who pays, for how much, and how urgent work may be called.
//!
//! Refuse INVALID_SPEC with all that is wrong at once, TENANT_UNKNOWN, PRIORITY_UNKNOWN, CONFLICT (a name that exists,
//! or does not), NOT_EMPTY (jobs, leases or tenants below), LIMIT. They change no key.

use super::{DONE, submit};
use crate::account::{DEPTH, Policy, Tenant};
use crate::command::{Code, Rejection, Reply, SetPriority, SetTenant};
use crate::id::*;
use crate::record::*;
use crate::state::State;

const WEIGHTS: std::ops::RangeInclusive<u32> = 1..=1_000_000;
/// Named priority classes, and tenants that one may name.
const PRIORITIES: usize = 256;
const ALLOWED: usize = 1_024;

pub(super) fn set(state: &mut State, set: &SetTenant) -> Result<Reply, Rejection> {
    check_name("tenant", &set.name)?;
    let known = state.index.tenant_by_name.get(&set.name).copied();
    match (known, set.create) {
        (Some(_), true) => return Err(conflict(format!("tenant {:?} exists already", set.name))),
        (None, false) => return Err(unknown(state, &set.name)),
        _ => {}
    }
    let parent = match &set.parent {
        None => known.and_then(|id| state.tenants.get(&id)?.parent),
        Some(name) if name.is_empty() => None,
        Some(name) => Some(find(state, name)?),
    };
    let types = set.guaranteed.iter().flatten().chain(set.limit_by_type.iter().flatten());
    let types: Vec<&str> = types.map(|(name, _)| name.as_str()).collect();
    if let Some(bad) = types.iter().find(|name| !submit::is_slug(name)) {
        return Err(invalid(format!("{:?} is no GPU type", crate::lease::clip(bad))));
    }
    state.gpu_types_left(types.into_iter())?;
    check_place(state, known, parent)?;
    check_numbers(set)?;
    check_room(state, known)?;

    let id = known.unwrap_or_else(|| new_tenant(state, &set.name));
    let policy = changed(state, id, set);
    state.tenants.update(&id, |tenant| {
        tenant.parent = parent;
        tenant.policy = policy;
        tenant.used_at_change = tenant.used.clone();
    });
    state.meta.policy = state.meta.policy.saturating_add(1);
    DONE
}

pub(super) fn remove(state: &mut State, name: &str) -> Result<Reply, Rejection> {
    let id = find(state, name)?;
    if id == TenantId(0) {
        return Err(conflict(format!("tenant {name:?} is the one of jobs that name none")));
    }
    let children = state.tenants.iter().filter(|(_, tenant)| !tenant.removed && tenant.parent == Some(id)).count();
    let jobs = state.tenants.get(&id).map_or(0, |tenant| tenant.live_jobs);
    if children > 0 || jobs > 0 {
        let detail = format!("tenant {name:?} has {jobs} jobs that have not ended and {children} tenants below it");
        return Err(Rejection::new(Code::NotEmpty, detail));
    }
    state.tenants.update(&id, |tenant| tenant.removed = true);
    state.index.tenant_by_name.remove(name);
    state.meta.policy = state.meta.policy.saturating_add(1);
    DONE
}

pub(super) fn set_priority(state: &mut State, set: &SetPriority) -> Result<Reply, Rejection> {
    check_name("priority", &set.name)?;
    let known = state.priorities.contains(&set.name);
    if known && set.create {
        return Err(conflict(format!("priority {:?} exists already", set.name)));
    }
    if !known && !set.create {
        return Err(unknown_priority(&set.name));
    }
    if !known && state.priorities.len() >= PRIORITIES {
        return Err(Rejection::new(Code::Limit, format!("there are {PRIORITIES} priorities, the limit")));
    }
    if set.tenants.len() > ALLOWED {
        return Err(invalid(format!("tenants names {}, the limit is {ALLOWED}", set.tenants.len())));
    }
    let tenants = set.tenants.iter().map(|name| find(state, name)).collect::<Result<_, _>>()?;
    let class = Priority { value: set.value, tenants, preempts: set.preempts, preemptible: set.preemptible };
    state.priorities.insert(set.name.clone(), class);
    state.meta.policy = state.meta.policy.saturating_add(1);
    DONE
}

pub(super) fn remove_priority(state: &mut State, name: &str) -> Result<Reply, Rejection> {
    if state.priorities.remove(&name.to_owned()).is_none() {
        return Err(unknown_priority(name));
    }
    state.meta.policy = state.meta.policy.saturating_add(1);
    DONE
}

/// The tenant of this name.
pub(super) fn find(state: &State, name: &str) -> Result<TenantId, Rejection> {
    state.index.tenant_by_name.get(name).copied().ok_or_else(|| unknown(state, name))
}

/// The priority that a submission gets by a class that its tenant, or one above it, may use.
pub(super) fn priority_of(state: &State, class: &str, tenant: TenantId) -> Result<i32, Rejection> {
    let found = state.priorities.get(&class.to_owned()).ok_or_else(|| unknown_priority(class))?;
    let allowed = |id: TenantId| found.tenants.contains(&id);
    if !found.tenants.is_empty() && !state.tenant_chain(tenant).any(|(id, _)| allowed(id)) {
        let name = state.tenants.get(&tenant).map_or("", |tenant| tenant.name.as_str());
        let detail = format!("priority {class:?} is not for tenant {name:?}");
        return Err(Rejection::new(Code::PriorityDenied, detail));
    }
    Ok(found.value)
}

fn unknown(state: &State, name: &str) -> Rejection {
    let known: Vec<&str> = state.index.tenant_by_name.keys().take(8).map(String::as_str).collect();
    Rejection::new(Code::TenantUnknown, format!("tenant {name:?} does not exist, known: {}", known.join(", ")))
}

fn unknown_priority(name: &str) -> Rejection {
    Rejection::new(Code::PriorityUnknown, format!("priority {name:?} does not exist"))
}

fn conflict(detail: String) -> Rejection {
    Rejection::new(Code::Conflict, detail)
}

fn invalid(detail: String) -> Rejection {
    Rejection::new(Code::InvalidSpec, detail)
}

fn check_name(what: &str, name: &str) -> Result<(), Rejection> {
    if submit::is_slug(name) {
        return Ok(());
    }
    Err(invalid(format!("{what} {:?} must be 1 to 64 of a-z 0-9 . _ -", crate::lease::clip(name))))
}

/// No tenant stands below itself, none too deep, and none moves with leases that those above it count.
fn check_place(state: &State, known: Option<TenantId>, parent: Option<TenantId>) -> Result<(), Rejection> {
    let above: Vec<TenantId> = parent.map_or(Vec::new(), |id| state.tenant_chain(id).map(|(id, _)| id).collect());
    let Some(id) = known else {
        return check_depth(above.len() + 1);
    };
    if above.contains(&id) {
        return Err(conflict("parent stands below the tenant itself".into()));
    }
    let moved = state.tenants.get(&id).is_some_and(|tenant| tenant.parent != parent);
    let uses = state.tenants.get(&id).is_some_and(|tenant| tenant.used != Default::default());
    if moved && uses {
        let detail = "the tenant has running jobs: it moves once they have ended";
        return Err(Rejection::new(Code::NotEmpty, detail));
    }
    check_depth(above.len() + height(state, id))
}

fn check_depth(depth: usize) -> Result<(), Rejection> {
    if depth <= DEPTH {
        return Ok(());
    }
    Err(Rejection::new(Code::Limit, format!("the tree of tenants would be {depth} deep, the limit is {DEPTH}")))
}

/// Levels of the tree that hangs at this tenant, itself included.
fn height(state: &State, id: TenantId) -> usize {
    let depth_below = |other: TenantId| {
        let chain: Vec<TenantId> = state.tenant_chain(other).map(|(id, _)| id).collect();
        chain.iter().position(|above| *above == id).map_or(0, |place| place + 1)
    };
    let live = state.tenants.iter().filter(|(_, tenant)| !tenant.removed);
    live.map(|(other, _)| depth_below(*other)).max().unwrap_or(1)
}

fn check_numbers(set: &SetTenant) -> Result<(), Rejection> {
    let mut wrong = Vec::new();
    if let Some(weight) = set.weight.filter(|weight| !WEIGHTS.contains(weight)) {
        wrong.push(format!("weight is {weight}, must be {} to {}", WEIGHTS.start(), WEIGHTS.end()));
    }
    for (field, ms) in [("default_limit_ms", set.default_limit_ms), ("max_limit_ms", set.max_limit_ms)] {
        if let Some(ms) = ms.filter(|ms| *ms > submit::MAX_LIMIT_MS) {
            wrong.push(format!("{field} is {ms}, the limit is {}", submit::MAX_LIMIT_MS));
        }
    }
    if wrong.is_empty() { Ok(()) } else { Err(invalid(wrong.join("; "))) }
}

fn check_room(state: &State, known: Option<TenantId>) -> Result<(), Rejection> {
    let limit = state.meta.settings.tenants as usize;
    if known.is_none() && state.tenants.len() >= limit {
        let detail = format!("there are {} tenants, removed ones included; the limit is {limit}", state.tenants.len());
        return Err(Rejection::new(Code::Limit, detail));
    }
    Ok(())
}

fn new_tenant(state: &mut State, name: &str) -> TenantId {
    let id = TenantId(state.meta.next_tenant);
    state.meta.next_tenant = id.0.saturating_add(1);
    let now_ms = state.meta.clock_ms;
    let usage = crate::account::Usage { at_ms: now_ms, decayed_ms: now_ms, ..Default::default() };
    state.tenants.insert(id, Tenant { name: name.to_owned(), usage, ..Tenant::default() });
    state.index.tenant_by_name.insert(name.to_owned(), id);
    id
}

/// The tenant's policy with what the command names.
fn changed(state: &mut State, id: TenantId, set: &SetTenant) -> Policy {
    let mut policy = state.tenants.get(&id).map(|tenant| tenant.policy.clone()).unwrap_or_default();
    let mut by_type = |named: &std::collections::BTreeMap<String, u32>| {
        named.iter().map(|(name, count)| (state.intern_gpu_type(name), *count)).collect()
    };
    if let Some(guaranteed) = &set.guaranteed {
        policy.guaranteed = by_type(guaranteed);
    }
    if let Some(limit) = &set.limit_by_type {
        policy.limit.by_type = by_type(limit);
    }
    policy.limit.gpus = set.limit_gpus.unwrap_or(policy.limit.gpus);
    policy.limit.cores = set.limit_cores.unwrap_or(policy.limit.cores);
    policy.limit.mem_mib = set.limit_mem_mib.unwrap_or(policy.limit.mem_mib);
    policy.weight = set.weight.unwrap_or(policy.weight);
    policy.may_borrow = set.may_borrow.unwrap_or(policy.may_borrow);
    policy.default_limit_ms = set.default_limit_ms.unwrap_or(policy.default_limit_ms);
    policy.max_limit_ms = set.max_limit_ms.unwrap_or(policy.max_limit_ms);
    policy.max_pending = set.max_pending.unwrap_or(policy.max_pending);
    policy
}
