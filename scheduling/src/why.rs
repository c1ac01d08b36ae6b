//! Why a task waits, when it starts, and the cheapest changes that would start it sooner: the planner's own answers, for
//! one task, from any replica's state. Each change is tried by planning again with it; none comes from a table of hints.

use std::collections::BTreeSet;
use std::sync::Arc;

use statemachine::account::{QuotaHit, Resource};
use statemachine::command::Place;
use statemachine::domain::Topology;
use statemachine::record::{Job, Node, NodeAdmin};
use statemachine::spec::{JobSpec, Shape};
use statemachine::state::{Kin, Waiter};
use statemachine::{GpuTypeId, JobId, NodeId, State, TaskKey, TenantId};

use crate::cache::Cache;
use crate::explain::reason_with;
use crate::holding::lease_end_ms;
use crate::order::is_aged;
use crate::outlook::{Look, Start, Steps};
use crate::plan::waiting_task;
use crate::reason::{Best, Lack, Reason};
use crate::selection::wider;

/// Looks for the answer itself, up to the task's turn and then at starts to come: some hundred ns each.
const STEPS: Steps = Steps { turn: 1_000_000, starts: 200_000 };
/// For a change that is tried, and for all of them: behind a long queue not all are tried.
const STEPS_OF_A_CHANGE: Steps = Steps { turn: 200_000, starts: 50_000 };
const STEPS_OF_CHANGES: u64 = 300_000;
/// Holders that are named, the largest first.
const HOLDERS: usize = 16;
/// Changes that are told.
const CHANGES: usize = 3;
const MINUTE_MS: u64 = 60_000;
const DAY_MS: u64 = 24 * 60 * MINUTE_MS;
/// Tenants at whose cost it is tried.
const TENANTS: usize = 8;
/// Machines out of service whose return is tried.
const RETURNS: usize = 8;

/// The three parts of the answer.
#[derive(Clone, Debug)]
pub struct Why {
    pub reason: Arc<Reason>,
    /// Who has what it waits for.
    pub holders: Vec<Holder>,
    /// If what runs ended now, and those before it were quick; `Unknown` also where time does not help.
    pub soonest: Start,
    pub latest: Start,
    /// What the interval takes for granted.
    pub assumes: Vec<String>,
    /// Where it starts, if it starts now.
    pub placed: Option<Place>,
    /// Sooner starts, the cheapest first.
    pub changes: Vec<Change>,
}

/// A part that the task waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub job: JobId,
    pub node: NodeId,
    pub gpus: u32,
    pub cores: u32,
    pub mem_mib: u64,
    /// Cluster time at which it ends at the latest; `None` = it has no time limit.
    pub ends_ms: Option<u64>,
    /// It does not run: machines are kept for it, or it starts now.
    pub waits: bool,
}

/// Something that a person could ask for instead, or do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// As it is typed: options of `ares submit`, or a command of an operator.
    pub ask: String,
    pub start: Start,
}

/// The answer for a task that waits; `None` for one that runs, has ended or is unknown. `unheard` as for `plan`.
pub fn why(state: &State, cache: &mut Cache, task: TaskKey, unheard: &BTreeSet<NodeId>) -> Option<Why> {
    let Some((Job { spec, .. }, _)) = waiting_task(state, task) else {
        let reason = Arc::new(reason_with(state, cache, task, unheard)?);
        return Some(Why::of(state, reason));
    };
    let look = Look::at(state, cache, unheard, task, (STEPS, false));
    let reason = match (&look.placed, &look.reason) {
        (Some(_), _) => Arc::new(Reason::Soon),
        (None, Some(reason)) => reason.clone(),
        // Its turn did not come within the steps.
        (None, None) => Arc::new(reason_with(state, cache, task, unheard)?),
    };
    let latest = look.start();
    let soonest = match latest {
        Start::Now => Start::Now,
        _ => Look::at(state, cache, unheard, task, (STEPS, true)).start(),
    };
    let holders = holders(state, &look, &reason);
    let changes = match latest {
        Start::Now => Vec::new(),
        _ => changes(state, cache, unheard, (task, spec), &reason, latest),
    };
    let mut assumes = assumptions(&look, &reason, &holders);
    if is_aged(state, task) && latest != Start::Now {
        let days = state.meta.settings.planning.aged_after_ms / DAY_MS;
        assumes.push(format!("it has waited for {days} days or more: only older jobs of its tenant go before it"));
    }
    Some(Why { reason, holders, soonest, latest, assumes, placed: look.placed, changes })
}

impl Why {
    /// Something else than the planner has the next word: time itself, or somebody.
    fn of(state: &State, reason: Arc<Reason>) -> Self {
        let soonest = match *reason {
            Reason::BeginTime { in_ms } | Reason::Backoff { in_ms, .. } => {
                Start::At(state.meta.clock_ms.saturating_add(in_ms))
            }
            _ => Start::Unknown,
        };
        Self {
            reason,
            holders: Vec::new(),
            soonest,
            latest: Start::Unknown,
            assumes: Vec::new(),
            placed: None,
            changes: Vec::new(),
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- holders

/// The parts that must end before its start; where none can be told, those in its way on the machine that comes nearest,
/// or those of the tenant whose limit binds.
fn holders(state: &State, look: &Look, reason: &Reason) -> Vec<Holder> {
    if look.placed.is_some() {
        return Vec::new();
    }
    let mut holders: Vec<Holder> = match (reason, nearest(reason)) {
        (Reason::Quota { hit, .. }, _) => of_tenant(state, hit),
        (_, nearest) => {
            let named = nearest.and_then(|best| state.index.node_by_name.get(&best.node)).copied();
            let of_start: Vec<NodeId> = look.parts().iter().map(|part| part.node).collect();
            let nodes = if of_start.is_empty() { named.into_iter().collect() } else { of_start };
            let start_ms = look.start.as_ref().map_or(u64::MAX, |start| start.start_ms);
            let running = nodes.iter().flat_map(|node| on_node(state, *node));
            let mut found: Vec<Holder> =
                running.filter(|holder| holder.ends_ms.is_none_or(|end| end <= start_ms)).collect();
            found.extend(look.before.iter().flat_map(starting).filter(|holder| nodes.contains(&holder.node)));
            found
        }
    };
    if let Reason::Reserved { job, .. } = reason {
        holders.retain(|holder| holder.waits);
        holders.push(Holder { job: *job, node: NodeId(0), gpus: 0, cores: 0, mem_mib: 0, ends_ms: None, waits: true });
    }
    holders.sort_by_key(|holder| (std::cmp::Reverse(holder.gpus), holder.job, holder.node));
    holders.truncate(HOLDERS);
    holders
}

fn nearest(reason: &Reason) -> Option<&Best> {
    match reason {
        Reason::GpusBusy { best, .. }
        | Reason::CoresBusy { best, .. }
        | Reason::MemBusy { best, .. }
        | Reason::Bandwidth { best, .. } => Some(best),
        _ => None,
    }
}

fn on_node(state: &State, node: NodeId) -> Vec<Holder> {
    let tokens = state.allocs.get(&node).map(|alloc| alloc.leases.as_slice()).unwrap_or_default();
    let leases = tokens.iter().filter_map(|token| state.leases.get(token));
    leases.flat_map(|lease| of_lease(state, &lease.value)).filter(|holder| holder.node == node).collect()
}

fn of_lease(state: &State, lease: &statemachine::record::Lease) -> Vec<Holder> {
    let ends_ms = lease_end_ms(state, lease);
    let part = |part: &statemachine::record::Part| Holder {
        job: lease.task.job,
        node: part.node,
        gpus: part.gpus.count_ones(),
        cores: statemachine::fit::cores_of(&part.cores_by_numa),
        mem_mib: part.mem_mib,
        ends_ms,
        waits: false,
    };
    lease.parts.iter().map(part).collect()
}

/// What the plan starts before it.
fn starting(place: &Place) -> impl Iterator<Item = Holder> + '_ {
    place.parts.iter().map(|part| Holder {
        job: place.task.job,
        node: part.node,
        gpus: part.gpu_order.len() as u32,
        cores: statemachine::fit::cores_of(&part.cores_by_numa),
        mem_mib: part.mem_mib,
        ends_ms: None,
        waits: true,
    })
}

fn of_tenant(state: &State, hit: &QuotaHit) -> Vec<Holder> {
    let belongs = |job: JobId| {
        let tenant = state.jobs.get(&job).map(|job| job.value.tenant);
        tenant.is_some_and(|tenant| state.tenant_chain(tenant).any(|(id, _)| id == hit.tenant))
    };
    let leases = state.leases.iter().filter(|(_, lease)| belongs(lease.value.task.job));
    leases.flat_map(|(_, lease)| of_lease(state, &lease.value)).collect()
}

// ------------------------------------------------------------------------------------------------------- assumptions

fn assumptions(look: &Look, reason: &Reason, holders: &[Holder]) -> Vec<String> {
    let mut assumes = Vec::new();
    if look.placed.is_some() || look.start.is_none() {
        return assumes;
    }
    assumes.push("soonest: all that runs ends now; latest: it uses its whole time limit".to_owned());
    match look.ahead + look.before.len() {
        0 => {}
        1 => assumes.push("1 job before it starts first, and uses a tenth to all of its time limit".to_owned()),
        ahead => {
            assumes.push(format!("{ahead} jobs before it start first, and use a tenth to all of their time limits"));
        }
    }
    let endless = holders.iter().filter(|holder| holder.ends_ms.is_none() && !holder.waits).count();
    if endless > 0 {
        assumes.push(format!("no latest start can be told: {endless} of its holders have no time limit"));
    }
    if reason.ends_with_time() {
        assumes.push("no machine goes, and nobody gets a place before it".to_owned());
    }
    assumes
}

// ----------------------------------------------------------------------------------------------------------- changes

/// What a change changes: a larger one of the same kind is told only where it starts the job sooner still.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Limit,
    Type,
    Topology,
    /// Which machines it may be on.
    Allowed,
    Request,
    Spread,
    Machines,
    Gpus,
    Return,
    Tenant,
    Quota,
}

/// A state in which something else is asked for, and how one asks.
struct Instead {
    kind: Kind,
    ask: String,
    state: State,
}

/// The changes that start it now, or sooner than `latest`; what costs a person least goes first.
fn changes(
    state: &State,
    cache: &mut Cache,
    unheard: &BTreeSet<NodeId>,
    (task, spec): (TaskKey, &JobSpec),
    reason: &Reason,
    latest: Start,
) -> Vec<Change> {
    let mut found: Vec<Change> = Vec::new();
    let mut best: Vec<(Kind, Start)> = Vec::new();
    let mut steps = 0;
    for instead in alternatives(state, task, spec, reason) {
        let of_kind = best.iter().filter(|(kind, _)| *kind == instead.kind).map(|(_, start)| *start);
        let to_beat = of_kind.min().unwrap_or(latest);
        if to_beat == Start::Now {
            continue;
        }
        let look = Look::at(&instead.state, cache, unheard, task, (STEPS_OF_A_CHANGE, false));
        let start = look.start();
        steps += look.steps;
        if start < to_beat {
            best.push((instead.kind, start));
            found.push(Change { ask: instead.ask, start });
        }
        if steps >= STEPS_OF_CHANGES || found.iter().filter(|change| change.start == Start::Now).count() >= CHANGES {
            break;
        }
    }
    // Those that start it now first; among equals the order of their cost stays.
    found.sort_by_key(|change| change.start);
    found.truncate(CHANGES);
    found
}

/// What is tried, cheapest first: the job does the same in less time, elsewhere, slower, and then less.
fn alternatives(state: &State, task: TaskKey, spec: &JobSpec, reason: &Reason) -> Vec<Instead> {
    let mut all = Vec::new();
    let mut with = |kind: Kind, ask: String, change: &dyn Fn(&mut JobSpec)| {
        let mut state = state.clone();
        state.jobs.update(&task.job, |job| change(&mut job.value.spec));
        all.push(Instead { kind, ask, state });
    };
    let shape = &*state.cut_of(spec);
    if let Reason::Reserved { fits_ms: Some(ms), .. } | Reason::SetAside { fits_ms: Some(ms), .. } = reason
        && *ms >= 1_000
    {
        // Some time passes until it is typed.
        let grain_ms = if *ms < MINUTE_MS {
            1_000
        } else if *ms < 10 * MINUTE_MS {
            10_000
        } else {
            MINUTE_MS
        };
        let limit_ms = ms / grain_ms * grain_ms;
        with(Kind::Limit, format!("--time-limit {}s", limit_ms / 1_000), &move |spec| spec.limit_ms = limit_ms);
    }
    for (gpu_type, name) in other_types(state, shape) {
        with(Kind::Type, format!("--gpu-type {name}"), &move |spec| spec.shape.gpu_types = [gpu_type].into());
    }
    if shape.nodes > 1 && !shape.mix_types && shape.gpus_per_node() > 0 {
        with(Kind::Type, "--mix-types".to_owned(), &|spec| spec.shape.mix_types = true);
    }
    if let Some(topology) = shape.topology.filter(|_| shape.required_level().is_some()) {
        let preferred = Topology { required: false, ..topology };
        let ask = format!("--topology {preferred}");
        with(Kind::Topology, ask, &move |spec| spec.shape.topology = Some(preferred));
    }
    for (ask, machines) in wider(shape) {
        with(Kind::Allowed, ask, &move |spec| spec.shape.machines = machines.clone());
    }
    for (ask, smaller) in smaller_requests(shape, reason) {
        with(Kind::Request, ask, &move |spec| spec.shape = smaller.clone());
    }
    for (kind, other) in other_shapes(shape, reason) {
        with(kind, flags(shape, &other), &move |spec| spec.shape = other.clone());
    }
    all.extend(returns(state));
    all.extend(other_tenants(state, task, reason));
    all.extend(raised_limit(state, reason));
    all
}

/// The types that are there and not accepted yet.
fn other_types(state: &State, shape: &Shape) -> Vec<(GpuTypeId, String)> {
    if shape.gpu_types.is_empty() || shape.gpus_per_node() == 0 {
        return Vec::new();
    }
    let gpus = state.nodes.iter().flat_map(|(_, node)| &node.value.gpus).filter(|gpu| gpu.is_present());
    let types: BTreeSet<GpuTypeId> = gpus.map(|gpu| gpu.gpu_type).collect();
    // A rank sees one slice.
    let may_be = |gpu_type: &GpuTypeId| shape.gpus_per_rank == 1 || !gpu_type.is_slice();
    let others = types.into_iter().filter(|gpu_type| !shape.gpu_types.contains(gpu_type) && may_be(gpu_type));
    others.take(4).map(|gpu_type| (gpu_type, state.gpu_type_name(gpu_type).to_owned())).collect()
}

/// Fewer cores, less memory, slower links: as much as the nearest machine has.
fn smaller_requests(shape: &Shape, reason: &Reason) -> Vec<(String, Shape)> {
    let ranks = u64::from(shape.ranks_per_node.max(1));
    let (cores, mem_mib, mbps) = match reason {
        Reason::CoresBusy { best, .. } | Reason::Never { lack: Lack::Cores(best), .. } => (best.has / ranks, 0, 0),
        Reason::MemBusy { best, .. } | Reason::Never { lack: Lack::Memory(best), .. } => (0, best.has / ranks, 0),
        Reason::Bandwidth { best, .. } | Reason::Never { lack: Lack::Bandwidth(best), .. } => (0, 0, best.has),
        _ => (0, 0, 0),
    };
    let mut smaller = Vec::new();
    if cores > 0 {
        let each = u16::try_from(cores).unwrap_or(u16::MAX);
        smaller.push((format!("--cores {each}"), Shape { cores_per_rank: each, ..shape.clone() }));
    }
    if mem_mib > 0 {
        smaller.push((format!("--mem {mem_mib}MiB"), Shape { mem_mib_per_rank: mem_mib, ..shape.clone() }));
    }
    if mbps > 0 && shape.min_bandwidth_mbps > 0 {
        let least = u32::try_from(mbps).unwrap_or(u32::MAX);
        smaller.push((format!("--min-bandwidth {least}MB/s"), Shape { min_bandwidth_mbps: least, ..shape.clone() }));
    }
    smaller
}

/// As many GPUs on more machines; then fewer machines; then fewer GPUs.
fn other_shapes(shape: &Shape, reason: &Reason) -> Vec<(Kind, Shape)> {
    let (gpus, mut shapes) = (shape.gpus_per_node(), Vec::new());
    if gpus == 0 {
        return shapes;
    }
    if let Reason::Never { lack: Lack::Cut(nearest), .. } = reason {
        let open = Shape { nodes: 0, ..shape.clone() };
        let cuts = nearest.fewer.into_iter().chain(nearest.more);
        shapes.extend(cuts.filter_map(|cut| with_gpus(&open, cut.gpus())).map(|shape| (Kind::Gpus, shape)));
    }
    shapes.extend([2, 4].into_iter().filter_map(|parts| spread(shape, parts)).map(|shape| (Kind::Spread, shape)));
    let (ready, room) = match reason {
        Reason::GpusBusy { ready, best, .. } => (*ready, best.has),
        Reason::Topology { rooms, .. } => (rooms.first().map_or(0, |(_, ready)| *ready), 0),
        Reason::Never { lack: Lack::Gpus(best), .. } => (0, best.has),
        Reason::Never { lack: Lack::Machines { able } | Lack::Domain { able, .. }, .. } => (*able, 0),
        _ => (0, 0),
    };
    let fewer = |counts: [u64; 4], of: u64| {
        let below: BTreeSet<u64> = counts.into_iter().filter(|count| (1..of).contains(count)).collect();
        below.into_iter().rev()
    };
    let machines = u64::from(shape.nodes);
    let counts = fewer([ready.into(), machines / 2, machines / 4, 1], machines);
    let fewer_machines = counts.filter_map(|nodes| Some(Shape { nodes: u16::try_from(nodes).ok()?, ..shape.clone() }));
    shapes.extend(fewer_machines.map(|shape| (Kind::Machines, shape)));
    let all = u64::from(gpus);
    let counts = fewer([room, all / 2, all / 4, 1], all);
    let fewer_gpus = counts.filter_map(|count| with_gpus(shape, u32::try_from(count).ok()?));
    shapes.extend(fewer_gpus.map(|shape| (Kind::Gpus, shape)));
    shapes
}

/// As many GPUs on so many times the machines, with as many processes where they can be parted.
fn spread(shape: &Shape, parts: u16) -> Option<Shape> {
    let nodes = shape.nodes.checked_mul(parts)?;
    if shape.ranks_per_node.is_multiple_of(parts) {
        return Some(Shape { nodes, ranks_per_node: shape.ranks_per_node / parts, ..shape.clone() });
    }
    let alone = shape.ranks_per_node == 1 && shape.gpus_per_rank.is_multiple_of(parts);
    alone.then(|| Shape { nodes, gpus_per_rank: shape.gpus_per_rank / parts, ..shape.clone() })
}

/// The shape with so many GPUs on each machine: the same processes with fewer each, or fewer processes.
fn with_gpus(shape: &Shape, gpus: u32) -> Option<Shape> {
    let ranks = u32::from(shape.ranks_per_node);
    let (ranks, each) = match gpus {
        0 => return None,
        gpus if ranks == 1 || gpus.is_multiple_of(ranks) => (ranks, gpus / ranks),
        gpus if gpus.is_multiple_of(shape.gpus_per_rank.into()) => {
            (gpus / u32::from(shape.gpus_per_rank), u32::from(shape.gpus_per_rank))
        }
        _ => return None,
    };
    let (ranks_per_node, gpus_per_rank) = (u16::try_from(ranks).ok()?, u16::try_from(each).ok()?);
    Some(Shape { ranks_per_node, gpus_per_rank, ..shape.clone() })
}

/// How one asks for the machines of a shape.
fn flags(before: &Shape, shape: &Shape) -> String {
    let gpus = shape.gpus_per_node();
    let mut text = match shape.nodes {
        0 | 1 => format!("--gpus {gpus}"),
        nodes => format!("--nodes {nodes} --gpus-per-node {gpus}"),
    };
    if shape.ranks_per_node > 1 || before.ranks_per_node > 1 {
        text.push_str(&format!(" --ranks-per-node {}", shape.ranks_per_node));
    }
    text
}

/// A machine that comes back into service.
fn returns(state: &State) -> impl Iterator<Item = Instead> + '_ {
    let out = |node: &Node| node.admin != NodeAdmin::Ready;
    let nodes = state.nodes.iter().filter(move |(_, node)| out(&node.value)).take(RETURNS);
    nodes.map(|(id, node)| {
        let mut back = state.clone();
        back.nodes.update(id, |node| node.value.admin = NodeAdmin::Ready);
        Instead { kind: Kind::Return, ask: format!("ares node resume {}", node.value.name), state: back }
    })
}

/// At another tenant's cost, where its own limit binds.
fn other_tenants<'a>(state: &'a State, task: TaskKey, reason: &Reason) -> impl Iterator<Item = Instead> + 'a {
    let binds = matches!(reason, Reason::Quota { .. });
    let own = state.jobs.get(&task.job).map(|job| &job.value);
    let record = state.tasks.get(&task).map(|record| &record.value);
    let own = own.map(|job| Waiter { kin: Kin::of(job, record), seq: job.seq, job: task.job });
    let differs = move |id: TenantId| own.is_some_and(|own| own.kin.tenant != id);
    let others = state.tenants.iter().filter(move |(id, tenant)| binds && differs(**id) && !tenant.removed);
    others.take(TENANTS).map(move |(id, tenant)| {
        let mut other = state.clone();
        if let Some(own) = own {
            other.index.dequeue(&own);
            other.index.enqueue(Waiter { kin: Kin { tenant: *id, ..own.kin }, ..own });
        }
        other.jobs.update(&task.job, |job| job.value.tenant = *id);
        Instead { kind: Kind::Tenant, ask: format!("--tenant {}", tenant.name), state: other }
    })
}

/// The limit that binds, raised by what is missing.
fn raised_limit(state: &State, reason: &Reason) -> Option<Instead> {
    let Reason::Quota { hit, .. } = reason else { return None };
    let wanted = hit.used.saturating_add(hit.asks);
    let name = &state.tenants.get(&hit.tenant)?.name;
    let count = u32::try_from(wanted).ok()?;
    let mut raised = state.clone();
    let option = raised.tenants.update(&hit.tenant, |tenant| match hit.what {
        Resource::Gpus => {
            tenant.policy.limit.gpus = Some(count);
            format!("--limit-gpus {count}")
        }
        Resource::GpusOf(gpu_type) => {
            tenant.policy.limit.by_type.insert(gpu_type, count);
            tenant.policy.may_borrow = true;
            format!("--limit-types {}:{count} --may-borrow true", state.gpu_type_name(gpu_type))
        }
        Resource::Cores => {
            tenant.policy.limit.cores = Some(count);
            format!("--limit-cores {count}")
        }
        Resource::MemMib => {
            tenant.policy.limit.mem_mib = Some(wanted);
            format!("--limit-mem {wanted}MiB")
        }
    })?;
    Some(Instead { kind: Kind::Quota, ask: format!("ares tenant set {name} {option}"), state: raised })
}
