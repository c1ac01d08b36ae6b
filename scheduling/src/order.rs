//! Whose task is looked at next: the one order of everything that waits.
//!
//! Between the tenants of one parent: who stays within what is guaranteed to it goes first; then the lowest dominant
//! share by weight (DRF, Ghodsi 2011, in a tree); of equals, whose first task came first. Inside a tenant: priority, then the
//! response ratio (`line`). A tenant's own tasks stand beside the tenants below it, as one of weight 1. The policy `fifo`
//! knows no tenants and no ratio: priority, then queue position.
//!
//! A task that has aged goes before every younger one of its tenant (under `fifo`: of all), the oldest first, whatever
//! their priorities: so nobody but older ones passes it any more in there.
//!
//! A share is what is in use now plus what was used on average over the half-life, each the largest part of any
//! resource of the cluster. The order moves with every placement; whether a task starts is `plan`'s.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;

use statemachine::account::{Amounts, Usage};
use statemachine::record::{Job, Tenant};
use statemachine::settings::OrderBy;
use statemachine::spec::Shape;
use statemachine::state::QueueKey;
use statemachine::{GpuTypeId, JobId, State, TaskKey, TenantId};

use crate::line::{Line, Passed};

/// A whole in the units of a share.
const WHOLE: u128 = 1_000_000_000_000;

/// ln 2 in millionths: a constant use of 1 for ever leaves a decayed sum of half-life / ln 2.
const LN_2: u128 = 693_147;

/// How far the tenants' queues were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    passed: BTreeMap<TenantId, Passed>,
    /// Of these, and of those behind them, the ones that had aged.
    aged: BTreeSet<QueueKey>,
    /// Those for whom machines are kept, in the order; `plan`'s.
    pub(crate) reserved: Vec<QueueKey>,
}

/// The tree of tenants that have something waiting, walked task by task.
pub struct Order<'a> {
    state: &'a State,
    capacity: Amounts,
    places: BTreeMap<Place, Standing>,
    passed: Position,
    /// By tenant, its tasks by priority and ratio.
    lines: BTreeMap<TenantId, Line<'a>>,
    /// By tenant, its tasks that have aged and were not passed, the oldest first.
    aged: BTreeMap<TenantId, VecDeque<QueueKey>>,
    /// Tasks of arrays that were started, and by tenant the array whose next one goes on.
    started: BTreeMap<JobId, u32>,
    again: BTreeMap<TenantId, QueueKey>,
}

/// A place in the tree: the root, a tenant with all below it, or a tenant's own tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Root,
    Tenant(TenantId),
    Own(TenantId),
}

/// Less goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Its first task would take it over what is guaranteed to it, at every level.
    borrows: bool,
    /// In `WHOLE`ths, divided by the weight.
    share: u64,
    /// Queue position of its first task.
    seq: u64,
}

#[derive(Clone, Debug, Default)]
struct Standing {
    used: Amounts,
    past: Usage,
    weight: u32,
    /// Of what it uses and used, in `WHOLE`ths, divided by the weight.
    share: u64,
    /// The task of this place that goes first, and its rank; `None` when nothing is left.
    first: Option<(Rank, QueueKey)>,
    /// Those below that have something left, the first of them last.
    below: Vec<(Rank, Place)>,
}

impl Standing {
    /// Where one stands or would stand among those below.
    fn place_of(&self, ranked: &(Rank, Place)) -> Result<usize, usize> {
        self.below.binary_search_by(|other| ranked.cmp(other))
    }
}

impl<'a> Order<'a> {
    /// The order behind a position of the same state.
    pub fn new(state: &'a State, passed: Position) -> Self {
        Self::with_capacity(state, passed, capacity(state))
    }

    /// The same where what all machines have is known.
    pub(crate) fn with_capacity(state: &'a State, passed: Position, capacity: Amounts) -> Self {
        let (places, lines, aged) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let (started, again) = (BTreeMap::new(), BTreeMap::new());
        let mut order = Self { state, capacity, places, passed, lines, aged, started, again };
        order.places.insert(Place::Root, Standing::default());
        let below = sums_below(state);
        for tenant in waiting_tenants(state) {
            order.plant(tenant, &below);
            let aged = aged_tasks(state, tenant).into_iter().filter(|key| !order.passed.aged.contains(key)).collect();
            order.aged.insert(tenant, aged);
            let passed = order.passed.passed.get(&tenant).cloned();
            order.lines.insert(tenant, Line::new(state, tenant, passed, &order.passed.aged));
            order.rank(tenant);
        }
        order
    }

    /// How far the order was walked.
    pub fn position(self) -> Position {
        let passed = self.lines.into_iter().map(|(tenant, line)| (tenant, line.into_passed())).collect();
        Position { passed, ..self.passed }
    }

    /// Something is left.
    pub fn has_more(&self) -> bool {
        self.places.get(&Place::Root).is_some_and(|root| !root.below.is_empty())
    }

    /// A task of this job starts. Of an array the next one is at the front again.
    pub fn started(&mut self, key: QueueKey, job: &Job) {
        let array = key.task.job;
        if job.array().is_some() {
            let started = self.started.entry(array).or_default();
            *started += 1;
            if let Some(task) = self.state.task_to_start(array, *started) {
                self.again.insert(key.tenant, QueueKey { task, ..key });
            }
        }
    }

    /// A placement of a tenant's task: its share grows, and that of those above it.
    pub fn placed(&mut self, tenant: TenantId, takes: &Amounts) {
        let above = self.state.tenant_chain(tenant).map(|(id, _)| Place::Tenant(id));
        for place in std::iter::once(Place::Own(tenant)).chain(above) {
            if let Some(standing) = self.places.get_mut(&place) {
                standing.used.add(takes);
                standing.share = share(standing, &self.capacity, self.state.meta.settings.usage_half_life_ms);
            }
        }
        self.rank(tenant);
    }

    /// Adds a tenant, those above it, and the place of its own tasks.
    fn plant(&mut self, tenant: TenantId, below: &BTreeMap<TenantId, (Amounts, Usage)>) {
        let (now_ms, half_life_ms) = (self.state.meta.clock_ms, self.state.meta.settings.usage_half_life_ms);
        for (id, account) in self.state.tenant_chain(tenant) {
            let past = account.usage.at(now_ms, &account.used, half_life_ms);
            let mut standing =
                Standing { used: account.used.clone(), past, weight: account.policy.weight, ..Standing::default() };
            if id == tenant {
                let mut own = Standing { weight: 1, ..standing.clone() };
                if let Some((used, past)) = below.get(&id) {
                    own.used.take(used);
                    own.past.gpu_ms = own.past.gpu_ms.saturating_sub(past.gpu_ms);
                    own.past.core_ms = own.past.core_ms.saturating_sub(past.core_ms);
                }
                own.share = share(&own, &self.capacity, half_life_ms);
                self.places.insert(Place::Own(id), own);
            }
            standing.share = share(&standing, &self.capacity, half_life_ms);
            self.places.entry(Place::Tenant(id)).or_insert(standing);
        }
    }

    /// Ranks a tenant's own tasks and every place above them anew.
    fn rank(&mut self, tenant: TenantId) {
        let first = self.next_of(tenant);
        self.settle(Place::Own(tenant), Place::Tenant(tenant), first.map(|key| (true, key)));
        let state = self.state;
        for (id, account) in state.tenant_chain(tenant) {
            let lowest = self.places.get(&Place::Tenant(id)).and_then(|standing| standing.below.last().copied());
            let first = lowest.and_then(|(rank, place)| {
                let (_, key) = self.places.get(&place)?.first?;
                Some((rank.borrows && !self.is_guaranteed(id, account, key.task), key))
            });
            self.settle(Place::Tenant(id), account.parent.map_or(Place::Root, Place::Tenant), first);
        }
    }

    /// Gives a place its first task, and its rank beside the others below the same place.
    fn settle(&mut self, place: Place, above: Place, first: Option<(bool, QueueKey)>) {
        let order = self.state.meta.settings.planning.order;
        let aged = order == OrderBy::Fifo && first.is_some_and(|(_, key)| self.first_aged(key.tenant) == Some(key));
        let Some(standing) = self.places.get_mut(&place) else { return };
        let ranked = first.map(|(borrows, key)| {
            let rank = match order {
                OrderBy::Fair => Rank { borrows, share: standing.share, seq: key.seq },
                OrderBy::Fifo => Rank { borrows: false, share: urgency(key, aged), seq: key.seq },
            };
            (rank, key)
        });
        let before = std::mem::replace(&mut standing.first, ranked);
        let Some(above) = self.places.get_mut(&above) else { return };
        if let Some(at) = before.and_then(|(rank, _)| above.place_of(&(rank, place)).ok()) {
            above.below.remove(at);
        }
        if let Some((rank, _)) = ranked {
            let at = above.place_of(&(rank, place)).unwrap_or_else(|at| at);
            above.below.insert(at, (rank, place));
        }
    }

    fn first_aged(&self, tenant: TenantId) -> Option<QueueKey> {
        self.aged.get(&tenant)?.front().copied()
    }

    fn next_of(&self, tenant: TenantId) -> Option<QueueKey> {
        if let Some(again) = self.again.get(&tenant) {
            return Some(*again);
        }
        if let Some(aged) = self.first_aged(tenant) {
            return Some(aged);
        }
        self.lines.get(&tenant)?.first()
    }

    /// The task's GPUs are within what is guaranteed to the tenant, whichever acceptable type has room.
    fn is_guaranteed(&self, id: TenantId, account: &Tenant, task: TaskKey) -> bool {
        if account.policy.guaranteed.is_empty() {
            return false;
        }
        let Some(shape) = shape_of(self.state, task) else { return false };
        let gpus = shape.gpus();
        let used = self.places.get(&Place::Tenant(id)).map_or(&account.used, |standing| &standing.used);
        gpus > 0
            && account.policy.guaranteed.iter().any(|(gpu_type, guaranteed)| {
                shape.accepts(*gpu_type) && used.of_type(*gpu_type).saturating_add(gpus) <= *guaranteed
            })
    }
}

impl Iterator for Order<'_> {
    type Item = QueueKey;

    fn next(&mut self) -> Option<QueueKey> {
        self.next_job().map(|(key, _)| key)
    }
}

impl<'a> Order<'a> {
    /// The next task with its job.
    pub(crate) fn next_job(&mut self) -> Option<(QueueKey, Option<&'a Job>)> {
        let (_, lowest) = self.places.get(&Place::Root)?.below.last()?;
        let (_, key) = self.places.get(lowest)?.first?;
        let state = self.state;
        let look_up = || state.jobs.get(&key.task.job).map(|job| &job.value);
        if self.again.remove(&key.tenant).is_some() {
            self.rank(key.tenant);
            return Some((key, look_up()));
        }
        let line = self.lines.get_mut(&key.tenant)?;
        let job = match self.aged.get_mut(&key.tenant).filter(|aged| aged.front() == Some(&key)) {
            Some(aged) => {
                aged.pop_front();
                self.passed.aged.insert(key);
                line.leave(key, &self.passed.aged);
                look_up()
            }
            None => line.pass(&self.passed.aged),
        };
        self.rank(key.tenant);
        // The queue has an array once, whatever its next task.
        let is_array = job.is_some_and(|job| job.array().is_some());
        let task = is_array.then(|| state.task_to_start(key.task.job, 0)).flatten().unwrap_or(key.task);
        Some((QueueKey { task, ..key }, job))
    }
}

/// Everything that waits, in the order in which it would start if each started when its turn came.
pub fn queue(state: &State) -> impl Iterator<Item = QueueKey> + '_ {
    let mut order = Order::new(state, Position::default());
    let most = order.capacity.gpus.iter().max_by_key(|(_, count)| **count).map(|(gpu_type, _)| *gpu_type);
    std::iter::from_fn(move || {
        let key = order.next()?;
        let takes = shape_of(state, key.task).map(|shape| wants(shape, most)).unwrap_or_default();
        order.placed(key.tenant, &takes);
        Some(key)
    })
}

/// Tasks of one tenant that count as aged at a time, and priorities among which they are looked for, the lowest first:
/// what is behind them has its turn when these have started.
const AGED: usize = 64;
const AGED_PRIORITIES: usize = 64;

/// The tenant's tasks that have aged, the oldest first.
fn aged_tasks(state: &State, tenant: TenantId) -> Vec<QueueKey> {
    if state.meta.settings.planning.aged_after_ms == 0 {
        return Vec::new();
    }
    let mut aged = Vec::new();
    let mut below = Bound::Excluded(QueueKey::first_of(TenantId(tenant.0.saturating_add(1))));
    for _ in 0..AGED_PRIORITIES {
        let last = state.index.queue.range((Bound::Included(QueueKey::first_of(tenant)), below)).next_back();
        let Some((last, ())) = last else { break };
        // Of one priority the oldest stands first.
        let first = QueueKey { seq: 0, task: TaskKey { job: JobId(0), index: 0 }, ..*last };
        let equal = state.index.queue.range(first..=*last).map(|(key, ())| *key);
        aged.extend(equal.take_while(|key| is_old(state, key.task)).filter(|key| is_aged(state, key.task)).take(AGED));
        below = Bound::Excluded(first);
    }
    aged.sort_unstable_by_key(|key| key.seq);
    aged.truncate(AGED);
    aged
}

/// It was submitted so long ago that it goes before younger ones, and could have started since then.
pub fn is_aged(state: &State, task: TaskKey) -> bool {
    let aged_after_ms = state.meta.settings.planning.aged_after_ms;
    let begin_ms = state.jobs.get(&task.job).map_or(0, |job| job.value.spec.begin_wall_ms());
    is_old(state, task) && state.meta.wall_ms >= begin_ms.saturating_add_unsigned(aged_after_ms)
}

fn is_old(state: &State, task: TaskKey) -> bool {
    let aged_after_ms = state.meta.settings.planning.aged_after_ms;
    let submitted_ms = state.jobs.get(&task.job).map(|job| job.value.submitted_clock_ms);
    aged_after_ms > 0 && submitted_ms.is_some_and(|at_ms| state.meta.clock_ms >= at_ms.saturating_add(aged_after_ms))
}

/// Less goes first: what has aged, then by priority.
fn urgency(key: QueueKey, aged: bool) -> u64 {
    let behind = i64::from(i32::MAX) - i64::from(key.priority.0);
    if aged { 0 } else { behind.unsigned_abs() + 1 }
}

/// What a gang would take before its machines are known: the first type it accepts, or the cluster's commonest.
fn wants(shape: &Shape, most: Option<GpuTypeId>) -> Amounts {
    let gpus = shape.gpus();
    let gpu_type = shape.gpu_types.first().copied().or(most).filter(|_| gpus > 0);
    Amounts {
        gpus: gpu_type.map(|gpu_type| (gpu_type, gpus)).into_iter().collect(),
        cores: shape.ranks().saturating_mul(u32::from(shape.cores_per_rank)),
        mem_mib: u64::from(shape.ranks()).saturating_mul(shape.mem_mib_per_rank),
    }
}

fn shape_of(state: &State, task: TaskKey) -> Option<&Shape> {
    state.jobs.get(&task.job).map(|job| &job.value.spec.shape)
}

/// What the machines have, in service or not: the order must not jump with each drained one.
fn capacity(state: &State) -> Amounts {
    let mut sum = Amounts::default();
    for (_, node) in state.nodes.iter() {
        for gpu in &node.value.gpus {
            *sum.gpus.entry(gpu.gpu_type).or_default() += 1;
        }
        sum.cores = sum.cores.saturating_add(node.value.cores_by_numa.iter().map(|cores| u32::from(*cores)).sum());
        sum.mem_mib = sum.mem_mib.saturating_add(node.value.mem_mib);
    }
    sum
}

/// Of each tenant, what the tenants right below it use and have used.
fn sums_below(state: &State) -> BTreeMap<TenantId, (Amounts, Usage)> {
    let (now_ms, half_life_ms) = (state.meta.clock_ms, state.meta.settings.usage_half_life_ms);
    let mut sums: BTreeMap<TenantId, (Amounts, Usage)> = BTreeMap::new();
    for (_, tenant) in state.tenants.iter() {
        let Some(parent) = tenant.parent else { continue };
        let (used, past) = sums.entry(parent).or_default();
        let own = tenant.usage.at(now_ms, &tenant.used, half_life_ms);
        used.add(&tenant.used);
        past.gpu_ms = past.gpu_ms.saturating_add(own.gpu_ms);
        past.core_ms = past.core_ms.saturating_add(own.core_ms);
    }
    sums
}

/// The tenants with something in the queue: one step of the index each.
fn waiting_tenants(state: &State) -> impl Iterator<Item = TenantId> + '_ {
    let mut from = Some(TenantId(0));
    std::iter::from_fn(move || {
        let (key, ()) = state.index.queue.range(QueueKey::first_of(from?)..).next()?;
        from = key.tenant.0.checked_add(1).map(TenantId);
        Some(key.tenant)
    })
}

/// The dominant share now plus that of the past, by weight, in `WHOLE`ths.
fn share(standing: &Standing, capacity: &Amounts, half_life_ms: u64) -> u64 {
    let part = |used: u128, all: u64| if all == 0 { 0 } else { used / u128::from(all) };
    let (used, past) = (&standing.used, &standing.past);
    let of_type = used
        .gpus
        .iter()
        .map(|(gpu_type, count)| part(u128::from(*count) * WHOLE, u64::from(capacity.of_type(*gpu_type))));
    let cores = part(u128::from(used.cores) * WHOLE, u64::from(capacity.cores));
    let memory = part(u128::from(used.mem_mib) * WHOLE, capacity.mem_mib);
    let now = of_type.chain([cores, memory]).max().unwrap_or(0);
    let average = |sum_ms: u64| u128::from(sum_ms) * LN_2 * (WHOLE / 1_000_000) / u128::from(half_life_ms.max(1));
    let before =
        part(average(past.gpu_ms), capacity.all_gpus()).max(part(average(past.core_ms), u64::from(capacity.cores)));
    u64::try_from((now + before) / u128::from(standing.weight.max(1))).unwrap_or(u64::MAX)
}
