//! CreateReservation and EndReservation, and what a window's begin and end do by the calendar.
//!
//! Refuse INVALID_SPEC with all that is wrong at once, CONFLICT (a name that exists; a machine that is set aside in that
//! time), NOT_FOUND (a machine), TENANT_UNKNOWN, NO_FIT (too few machines match), LIMIT, RESERVATION_UNKNOWN. They change no
//! key; a window that sends away what runs emits what that does.

use std::collections::BTreeSet;

use super::{Ctx, DONE, submit, tenant};
use crate::command::{Code, CreateReservation, Machines, Rejection, Reply};
use crate::id::*;
use crate::lease::{Ruling, clip};
use crate::record::*;
use crate::spec::JobSpec;
use crate::state::State;

/// Reservations that have not ended.
const RESERVATIONS: usize = 1_000;
/// Machines, tenants and users that one may name.
const NAMES: usize = 20_000;
const ALLOWED: usize = 1_024;
const YEAR_MS: u64 = 366 * 24 * 3_600_000;
const LONGEST_MS: u64 = YEAR_MS;
const LEAST_MS: u64 = 1_000;
const USER_BYTES: u32 = 256;

pub(super) fn create(state: &mut State, ctx: &mut Ctx<'_>, create: &CreateReservation) -> Result<Reply, Rejection> {
    check_fields(state, create)?;
    if state.index.reservation_by_name.contains_key(&create.name) {
        return Err(Rejection::new(Code::Conflict, format!("reservation {:?} exists already", create.name)));
    }
    if state.reservations.len() >= RESERVATIONS {
        return Err(Rejection::new(Code::Limit, format!("there are {RESERVATIONS} reservations, the limit")));
    }
    let tenants: Vec<TenantId> =
        create.tenants.iter().map(|name| tenant::find(state, name)).collect::<Result<_, _>>()?;
    let start_wall_ms = if create.start_wall_ms == 0 { state.meta.wall_ms } else { create.start_wall_ms };
    let mut window = Reservation {
        name: create.name.clone(),
        whom: Whom::Maintenance,
        nodes: BTreeSet::new(),
        start_wall_ms,
        end_wall_ms: start_wall_ms.saturating_add_unsigned(create.duration_ms),
        requeue: create.requeue,
        reason: clip(&create.reason),
        begun: None,
    };
    window.nodes = choose(state, &create.machines, &window)?;
    check_apart(state, &window)?;

    if !create.maintenance {
        let users = create.users.iter().map(|name| state.intern_user(name)).collect();
        window.whom = Whom::Jobs { tenants, users };
    }
    let id = ReservationId(state.meta.next_reservation);
    state.meta.next_reservation = id.0.saturating_add(1);
    state.index.enter_reservation(id, &window);
    state.reservations.insert(id, window);
    if start_wall_ms <= state.meta.wall_ms {
        begin(state, ctx, id);
    }
    drop_claims(state, id);
    state.meta.policy = state.meta.policy.saturating_add(1);
    DONE
}

pub(super) fn end(state: &mut State, name: &str) -> Result<Reply, Rejection> {
    let id = state.reservation(name).map(|(id, _)| id).ok_or_else(|| unknown(name))?;
    remove(state, id);
    DONE
}

/// From now on nothing starts there but what it is for; what has no right to be there goes, if the reservation says so.
pub(super) fn begin(state: &mut State, ctx: &mut Ctx<'_>, id: ReservationId) {
    let Some(window) = state.reservations.get(&id).cloned() else { return };
    state.index.calendar.remove(&window.rule(id));
    let begun = Reservation { begun: Some(state.meta.token), ..window.clone() };
    state.index.calendar.insert(begun.rule(id));
    state.reservations.insert(id, begun);
    if window.requeue {
        send_away(state, ctx, &window);
    }
    drop_claims(state, id);
    state.meta.policy = state.meta.policy.saturating_add(1);
}

pub(super) fn remove(state: &mut State, id: ReservationId) {
    if let Some(window) = state.reservations.remove(&id) {
        state.index.leave_reservation(id, &window);
        state.meta.policy = state.meta.policy.saturating_add(1);
    }
}

/// Refuses a job that names a reservation which is not there or not for it, or too small for it.
pub(super) fn check_submission(state: &State, user: &str, tenant: TenantId, spec: &JobSpec) -> Result<(), Rejection> {
    let name = spec.reservation();
    if name.is_empty() {
        return Ok(());
    }
    let (_, window) = state.reservation(name).ok_or_else(|| unknown(name))?;
    let denied = |who: String| Err(Rejection::new(Code::ReservationDenied, format!("reservation {name:?} is {who}")));
    match &window.whom {
        Whom::Maintenance => return denied("a maintenance: no job may use it".into()),
        Whom::Jobs { tenants, users } if tenants.is_empty() && users.is_empty() => {}
        Whom::Jobs { tenants, users } => {
            let of_tenant = state.tenant_chain(tenant).any(|(id, _)| tenants.contains(&id));
            let of_user = users.iter().any(|id| state.names.get(&NameKey::User(*id)).is_some_and(|name| name == user));
            if !of_tenant && !of_user {
                let tenant = state.tenants.get(&tenant).map_or("", |tenant| tenant.name.as_str());
                return denied(format!("neither for tenant {tenant:?} nor for user {:?}", clip(user)));
            }
        }
    }
    if spec.begin_wall_ms() >= window.end_wall_ms {
        let (begin, end) = (spec.begin_wall_ms(), window.end_wall_ms);
        let detail = format!("begin_wall_ms is {begin}, reservation {name:?} ends at {end}");
        return Err(Rejection::new(Code::InvalidSpec, detail));
    }
    let (needs, has) = (usize::from(spec.shape.nodes), window.nodes.len());
    if needs > has {
        let detail = format!("shape.nodes is {needs}, reservation {name:?} has {has}");
        return Err(Rejection::new(Code::NeverFits, detail));
    }
    Ok(())
}

fn check_fields(state: &State, create: &CreateReservation) -> Result<(), Rejection> {
    let mut wrong = Vec::new();
    if !submit::is_slug(&create.name) {
        wrong.push(format!("name is {:?}, must be 1 to 64 of a-z 0-9 . _ -", clip(&create.name)));
    }
    if !(LEAST_MS..=LONGEST_MS).contains(&create.duration_ms) {
        wrong.push(format!("duration_ms is {}, must be {LEAST_MS} to {LONGEST_MS}", create.duration_ms));
    }
    let now_ms = state.meta.wall_ms;
    let latest_ms = now_ms.saturating_add_unsigned(YEAR_MS);
    if create.start_wall_ms > latest_ms {
        wrong.push(format!("start_wall_ms is {}, the limit is {latest_ms}, a year from now", create.start_wall_ms));
    }
    if create.start_wall_ms != 0 && create.start_wall_ms.saturating_add_unsigned(create.duration_ms) <= now_ms {
        wrong.push(format!("start_wall_ms is {}: the window would be over, now is {now_ms}", create.start_wall_ms));
    }
    let whom = create.tenants.len().saturating_add(create.users.len());
    if whom > ALLOWED {
        wrong.push(format!("tenants and users name {whom}, the limit is {ALLOWED}"));
    }
    if create.maintenance && whom > 0 {
        wrong.push("a maintenance is for nobody: tenants and users must be empty".into());
    }
    let fits = |user: &&String| user.is_empty() || user.len() > USER_BYTES as usize;
    if let Some(user) = create.users.iter().find(fits) {
        wrong.push(format!("a user's name has {} bytes, must have 1 to {USER_BYTES}", user.len()));
    }
    let machines = &create.machines;
    let matches = !machines.gpu_type.is_empty() || !machines.labels.is_empty() || machines.count > 0;
    if !machines.names.is_empty() && matches {
        wrong.push("machines are named: gpu_type, labels and count must be empty".into());
    }
    if machines.names.len() > NAMES {
        wrong.push(format!("machines names {}, the limit is {NAMES}", machines.names.len()));
    }
    if wrong.is_empty() { Ok(()) } else { Err(Rejection::new(Code::InvalidSpec, wrong.join("; "))) }
}

/// The machines, as they are now: those that join later are not among them.
fn choose(state: &State, machines: &Machines, window: &Reservation) -> Result<BTreeSet<NodeId>, Rejection> {
    if !machines.names.is_empty() {
        let of_name = |name: &String| {
            let known = state.index.node_by_name.get(name).copied();
            known.ok_or_else(|| Rejection::new(Code::NotFound, format!("there is no node {:?}", clip(name))))
        };
        return machines.names.iter().map(of_name).collect();
    }
    let gpu_type = state.gpu_type(&machines.gpu_type);
    let has_type =
        |node: &Node| machines.gpu_type.is_empty() || node.gpus.iter().any(|gpu| Some(gpu.gpu_type) == gpu_type);
    let has_labels = |node: &Node| machines.labels.iter().all(|(key, value)| node.labels.get(key) == Some(value));
    let all = state.nodes.iter().filter(|(_, node)| has_type(&node.value) && has_labels(&node.value));
    let mut matching: Vec<NodeId> = all.map(|(id, _)| *id).collect();
    let wanted = machines.count as usize;
    if matching.is_empty() || matching.len() < wanted {
        let detail = format!("{} machines match, the reservation needs {}", matching.len(), wanted.max(1));
        return Err(Rejection::new(Code::NoFit, detail));
    }
    if wanted > 0 {
        let clashes = |id: &NodeId| {
            let of_one = Reservation { nodes: [*id].into(), ..window.clone() };
            state.reserved_on(*id).any(|(_, other)| other.overlaps(&of_one))
        };
        matching.sort_by_cached_key(|id| (clashes(id), leases_in_the_way(state, *id, window), *id));
        matching.truncate(wanted);
    }
    Ok(matching.into_iter().collect())
}

/// Leases on the machine that may run into the window.
fn leases_in_the_way(state: &State, id: NodeId, window: &Reservation) -> usize {
    let leases = state.allocs.get(&id).map(|alloc| alloc.leases.as_slice()).unwrap_or_default();
    let in_the_way = |token: &&Token| {
        let lease = state.leases.get(token);
        let spec = lease.and_then(|lease| state.jobs.get(&lease.value.task.job)).map(|job| &job.value.spec);
        spec.is_some_and(|spec| window.is_reached_by(spec.length_ms(), state.meta.wall_ms))
    };
    leases.iter().filter(in_the_way).count()
}

fn check_apart(state: &State, window: &Reservation) -> Result<(), Rejection> {
    let clash = window.nodes.iter().find_map(|node| {
        let other = state.reserved_on(*node).map(|(_, other)| other).find(|other| other.overlaps(window))?;
        Some((*node, other))
    });
    let Some((node, other)) = clash else { return Ok(()) };
    let detail = format!(
        "node {} is set aside by {:?} from {} to {} (wall time, ms), which overlaps {} to {}",
        state.node_name(node),
        other.name,
        other.start_wall_ms,
        other.end_wall_ms,
        window.start_wall_ms,
        window.end_wall_ms
    );
    Err(Rejection::new(Code::Conflict, detail))
}

/// Each running attempt there that is not what it is for ends as PREEMPTED.
fn send_away(state: &mut State, ctx: &mut Ctx<'_>, window: &Reservation) {
    let allocs = window.nodes.iter().filter_map(|node| state.allocs.get(node));
    let tokens: BTreeSet<Token> = allocs.flat_map(|alloc| alloc.leases.iter().copied()).collect();
    for token in tokens {
        let Some(id) = state.leases.get(&token).map(|lease| lease.value.task.job) else { continue };
        if state.jobs.get(&id).is_none_or(|job| job.value.spec.reservation() == window.name) {
            continue;
        }
        let text = format!("reservation {:?} has begun", window.name);
        // A verdict reached before stands.
        state.change_job(ctx, id, |state, ctx| {
            let _ = state.decide(ctx, token, Ruling::new(VerdictKind::Preempted, text));
        });
    }
}

/// What is kept there for tasks that may not start there any more is kept for nothing.
fn drop_claims(state: &mut State, id: ReservationId) {
    let Some(window) = state.reservations.get(&id) else { return };
    let is_barred = |task: &TaskKey| {
        let spec = state.jobs.get(&task.job).map(|job| &job.value.spec);
        spec.is_some_and(|spec| {
            spec.reservation() != window.name && window.is_reached_by(spec.length_ms(), state.meta.wall_ms)
        })
    };
    let on_node = |claim: &Claim| claim.parts.iter().any(|part| window.nodes.contains(&part.node));
    let barred = state.claims.iter().filter(|(task, claim)| on_node(claim) && is_barred(task));
    let barred: Vec<TaskKey> = barred.map(|(task, _)| *task).collect();
    barred.into_iter().for_each(|task| state.drop_claim(task));
}

fn unknown(name: &str) -> Rejection {
    Rejection::new(Code::ReservationUnknown, format!("there is no reservation {:?}", clip(name)))
}
