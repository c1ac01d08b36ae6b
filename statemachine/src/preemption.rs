//! Who may be ended to make room for whom, what that loses, and what is kept for whom: the law that apply enforces and
//! the planner plans by. Which victims are best is the planner's.
//!
//! A higher priority ends a lower one where the classes of both say so, also to get under a limit of its own tenant. A tenant within what is guaranteed to it ends
//! those who borrow. One whose turn it is ends those who have had theirs (`turns`). Nobody is taken below what is guaranteed to him, an attempt may run for a
//! least time, and a job makes room only so often. Nor may it end, for as long as its last attempts are remembered, the one for whom it made room: by priority it
//! could not anyway, but that one's tenant may borrow by then.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::account::QuotaHit;
use crate::command::{Code, PlacePart, Rejection};
use crate::fit::{self, cores_of};
use crate::id::*;
use crate::lease::{decided, stale};
use crate::record::*;
use crate::state::{State, Timer, TimerKind};
use crate::turns::gpus_of;

/// How much later than its grace a lease that was decided may still hold its GPUs and be counted on to free them.
const OVERDUE_MS: u64 = 10_000;

/// Work that ends with an attempt: what it did since its newest checkpoint, or since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Loss {
    pub gpu_ms: u64,
    pub core_ms: u64,
    /// How far into the attempt its newest checkpoint was recorded; `None` = it recorded none.
    checkpoint_ms: Option<u64>,
    started: bool,
}

impl Loss {
    /// What is known of an end, with what it lost.
    pub(crate) fn told(self, text: &str) -> String {
        let lost = match (self.started, self.checkpoint_ms) {
            (false, _) => "nothing was lost, it had not started".to_owned(),
            (true, None) => format!("{} GPU-s lost since its start", self.gpu_ms / 1_000),
            (true, Some(ms)) => {
                format!("{} GPU-s lost since the checkpoint {} s into the attempt", self.gpu_ms / 1_000, ms / 1_000)
            }
        };
        if text.is_empty() { lost } else { format!("{text}; {lost}") }
    }
}

/// Why a lease is not ended for a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// There is no such lease.
    Gone,
    Decided(VerdictKind),
    /// It has made room so often already.
    Budget(u32),
    /// It has not run for the least time before this cluster time.
    LeastRun {
        until_ms: u64,
    },
    NoGround,
    /// The task made room for its job.
    MadeRoomForIt,
    /// Its tenant would fall below what is guaranteed to it.
    Guarantee,
}

/// Why one may end another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ground {
    Priority,
    /// The tenant takes back what is guaranteed to it.
    Reclaim,
    /// It has had its turn.
    Turn,
}

/// What one task that waits may do to others. Victims are counted as they are chosen.
#[derive(Clone, Debug)]
pub struct Rights<'a> {
    state: &'a State,
    priority: i32,
    by_class: bool,
    /// It may take its turn from others of its priority.
    by_turn: bool,
    /// Its tenant and those above.
    chain: Vec<TenantId>,
    /// One of them, within what is guaranteed to it with what the task asks for.
    reclaims_for: Option<TenantId>,
    /// Jobs for which its last attempts ended.
    made_room_for: Vec<JobId>,
    /// What each tenant is about to lose.
    leaving: BTreeMap<TenantId, Amounts>,
}

impl<'a> Rights<'a> {
    /// `None` where it may end nobody. `asks`: what it would take; `planned`: what tenants, and those above them, get beside
    /// what the state says.
    pub fn new(state: &'a State, task: TaskKey, asks: &Amounts, planned: &BTreeMap<TenantId, Amounts>) -> Option<Self> {
        let job = &state.jobs.get(&task.job)?.value;
        let (by_class, by_turn) = (state.preempts_by_class(job), state.may_take_turn(task, job));
        let incoming = state.incoming();
        let within = |(id, tenant): &(TenantId, &Tenant)| {
            let of = |sums: &BTreeMap<TenantId, Amounts>, gpu_type| sums.get(id).map_or(0, |sum| sum.of_type(gpu_type));
            let coming = |gpu_type| of(&incoming, gpu_type).saturating_add(of(planned, gpu_type));
            let fits = |(gpu_type, count): (&GpuTypeId, &u32)| {
                let used = tenant.used.of_type(*gpu_type).saturating_add(coming(*gpu_type));
                let guaranteed = tenant.policy.guaranteed.get(gpu_type).copied().unwrap_or(0);
                used.saturating_add(*count) <= guaranteed
            };
            !asks.gpus.is_empty() && asks.gpus.iter().all(fits)
        };
        let reclaims_for = state.tenant_chain(job.tenant).find(within).map(|(id, _)| id);
        if !by_class && !by_turn && reclaims_for.is_none() {
            return None;
        }
        let chain = state.tenant_chain(job.tenant).map(|(id, _)| id).collect();
        let rows = state.tasks.get(&task).into_iter().flat_map(|task| &task.value.attempts);
        let made_room_for = rows.filter_map(|row| row.preemptor).collect();
        let (priority, leaving) = (job.spec.priority, BTreeMap::new());
        let mut rights = Self { state, priority, by_class, by_turn, chain, reclaims_for, made_room_for, leaving };
        let victims = state.claims.iter().flat_map(|(_, claim)| &claim.victims);
        victims.for_each(|victim| rights.count(*victim));
        Some(rights)
    }

    /// On which ground it may end this lease, beside those counted so far.
    pub fn against(&self, token: Token) -> Result<Ground, Protection> {
        let state = self.state;
        let lease = &state.leases.get(&token).ok_or(Protection::Gone)?.value;
        let job = &state.jobs.get(&lease.task.job).ok_or(Protection::Gone)?.value;
        let below = || state.tenant_chain(job.tenant).take_while(|(id, _)| !self.chain.contains(id));
        let guaranteed = |gpu_type| below().any(|(_, tenant)| tenant.policy.guaranteed.contains_key(gpu_type));
        let borrows = || lease.amounts.gpus.keys().any(guaranteed);
        let equal = || job.spec.priority == self.priority && (self.chain.first() == Some(&job.tenant) || borrows());
        let by_turn = self.by_turn && equal() && state.gives_turn(lease);
        if !by_turn {
            state.may_make_room(lease)?;
        }
        let is_above = |id: TenantId| state.tenant_chain(job.tenant).any(|(other, _)| other == id);
        let by_class = self.by_class && job.spec.priority < self.priority && state.is_preemptible(job);
        let ground = match self.reclaims_for {
            _ if by_turn => Ground::Turn,
            _ if by_class => Ground::Priority,
            Some(tenant) if !is_above(tenant) => Ground::Reclaim,
            _ => return Err(Protection::NoGround),
        };
        if self.made_room_for.contains(&lease.task.job) {
            return Err(Protection::MadeRoomForIt);
        }
        let keeps = below().all(|(id, tenant)| self.keeps_guarantee(id, tenant, &lease.amounts));
        if keeps { Ok(ground) } else { Err(Protection::Guarantee) }
    }

    fn keeps_guarantee(&self, id: TenantId, tenant: &Tenant, loses: &Amounts) -> bool {
        let leaving = |gpu_type| self.leaving.get(&id).map_or(0, |amounts| amounts.of_type(gpu_type));
        loses.gpus.iter().all(|(gpu_type, count)| {
            let left = tenant.used.of_type(*gpu_type).saturating_sub(leaving(*gpu_type));
            left >= tenant.policy.guaranteed.get(gpu_type).copied().unwrap_or(0).saturating_add(*count)
                || !tenant.policy.guaranteed.contains_key(gpu_type)
        })
    }

    /// Counts a victim that was chosen.
    pub fn count(&mut self, token: Token) {
        let Some(lease) = self.state.leases.get(&token) else { return };
        let Some(job) = self.state.jobs.get(&lease.value.task.job) else { return };
        for (id, _) in self.state.tenant_chain(job.value.tenant) {
            self.leaving.entry(id).or_default().add(&lease.value.amounts);
        }
    }
}

/// What a task's tenants use once all that drains has gone and what is kept for other tasks is taken: ends within a tenant make
/// room under its limits too.
#[derive(Clone, Debug)]
pub struct Headroom<'a> {
    state: &'a State,
    /// Of the tenants in its chain that have a bound.
    used: Vec<(TenantId, Amounts)>,
}

impl<'a> Headroom<'a> {
    /// `planned`: what tenants, and those above them, get beside what the state says; `leaving`: leases that end for others.
    pub fn new(
        state: &'a State,
        task: TaskKey,
        planned: &BTreeMap<TenantId, Amounts>,
        leaving: impl IntoIterator<Item = Token>,
    ) -> Self {
        let tenant = state.jobs.get(&task.job).map(|job| job.value.tenant).unwrap_or_default();
        let bounded = state.tenant_chain(tenant).filter(|(_, tenant)| tenant.policy.is_bounded());
        let used = bounded.map(|(id, tenant)| (id, tenant.used.clone())).collect();
        let mut headroom = Self { state, used };
        if !headroom.is_bounded() {
            return headroom;
        }
        let draining = state.leases.iter().filter(|(_, lease)| state.is_draining(&lease.value));
        let draining: Vec<Token> = draining.map(|(token, _)| *token).collect();
        draining.into_iter().chain(leaving).collect::<BTreeSet<_>>().into_iter().for_each(|token| headroom.free(token));
        let kept = state.kept_for_others(task);
        for (id, used) in &mut headroom.used {
            [planned.get(id), kept.get(id)].into_iter().flatten().for_each(|more| used.add(more));
        }
        headroom
    }

    /// Some tenant of the task's has a bound.
    pub fn is_bounded(&self) -> bool {
        !self.used.is_empty()
    }

    fn free(&mut self, token: Token) {
        let Some(lease) = self.state.leases.get(&token) else { return };
        let Some(job) = self.state.jobs.get(&lease.value.task.job) else { return };
        for (id, _) in self.state.tenant_chain(job.value.tenant) {
            if let Some((_, used)) = self.used.iter_mut().find(|(other, _)| *other == id) {
                used.take(&lease.value.amounts);
            }
        }
    }

    /// The bound that these amounts would pass once these leases have gone too.
    pub fn hit(&self, asks: &Amounts, leaving: &[Token]) -> Option<QuotaHit> {
        let mut after = Cow::Borrowed(self);
        if self.is_bounded() && !leaving.is_empty() {
            leaving.iter().for_each(|token| after.to_mut().free(*token));
        }
        after.used.iter().find_map(|(id, used)| self.state.tenants.get(id)?.hit(*id, used, asks))
    }
}

impl State {
    /// What would be lost if the lease ended now.
    pub fn loss(&self, lease: &Lease) -> Loss {
        let Some(started_ms) = lease.started_ms else { return Loss::default() };
        let checkpoint = self.tasks.get(&lease.task).and_then(|task| task.value.checkpoint.as_deref());
        let checkpoint_ms = checkpoint.filter(|it| it.attempt == lease.attempt).map(|it| it.clock_ms);
        let since_ms = checkpoint_ms.unwrap_or(started_ms).max(started_ms);
        let ms = self.meta.clock_ms.saturating_sub(since_ms);
        let gpus = u64::from(gpus_of(lease));
        let cores: u64 = lease.parts.iter().map(|part| u64::from(cores_of(&part.cores_by_numa))).sum();
        Loss {
            gpu_ms: ms.saturating_mul(gpus),
            core_ms: ms.saturating_mul(cores),
            checkpoint_ms: checkpoint_ms.map(|at| at.saturating_sub(started_ms)),
            started: true,
        }
    }

    /// It may end somebody, whoever that is: its class, a guarantee or its turn says so.
    pub fn may_preempt(&self, job: &Job) -> bool {
        let guaranteed = |(_, tenant): (TenantId, &Tenant)| !tenant.policy.guaranteed.is_empty();
        self.meta.settings.planning.preemptions > 0
            && (self.preempts_by_class(job) || self.tenant_chain(job.tenant).any(guaranteed) || self.takes_turns(job))
    }

    pub fn preempts_by_class(&self, job: &Job) -> bool {
        self.class_of(job).is_some_and(|class| class.preempts)
    }

    /// A higher priority may end it.
    pub fn is_preemptible(&self, job: &Job) -> bool {
        self.class_of(job).is_some_and(|class| class.preemptible)
    }

    fn class_of(&self, job: &Job) -> Option<&Priority> {
        self.priorities.get(&job.spec.terms.as_ref()?.class)
    }

    /// The lease may be ended for another task, as far as it alone is concerned.
    pub fn may_make_room(&self, lease: &Lease) -> Result<(), Protection> {
        if let Some(verdict) = &lease.verdict {
            return Err(Protection::Decided(verdict.kind));
        }
        let made = self.tasks.get(&lease.task).map_or(0, |task| u32::from(task.value.displaced));
        if made >= self.meta.settings.planning.preemptions {
            return Err(Protection::Budget(made));
        }
        self.protected_until_ms(lease).map_or(Ok(()), |until_ms| Err(Protection::LeastRun { until_ms }))
    }

    /// The refusal to end a lease.
    pub(crate) fn refusal(&self, token: Token, protection: Protection) -> Rejection {
        let Some(lease) = self.leases.get(&token) else { return stale(token) };
        let (planning, job) = (&self.meta.settings.planning, lease.value.task.job);
        let why = match protection {
            Protection::Gone => return stale(token),
            Protection::Decided(kind) => return decided(token, kind),
            Protection::Budget(made) => {
                format!("job {job} has made room {made} times, the limit is {}", planning.preemptions)
            }
            Protection::LeastRun { until_ms } => format!(
                "job {job} makes room at {until_ms} ms, the clock is {} ms: min_run_ms is {}",
                self.meta.clock_ms, planning.min_run_ms
            ),
            Protection::NoGround => {
                format!("job {job}: neither its priority nor a guarantee nor a turn lets this task end it")
            }
            Protection::MadeRoomForIt => format!("job {job}: this task made room for it"),
            Protection::Guarantee => format!("job {job}: its tenant would fall below what is guaranteed to it"),
        };
        Rejection::new(Code::VictimProtected, why)
    }

    /// Until when its attempt has not run for the least time.
    pub fn protected_until_ms(&self, lease: &Lease) -> Option<u64> {
        let since_ms = lease.started_ms.unwrap_or(lease.granted_ms);
        let until_ms = since_ms.saturating_add(self.meta.settings.planning.min_run_ms);
        (until_ms > self.meta.clock_ms).then_some(until_ms)
    }

    // -------------------------------------------------------------------------------------------------------- claims

    /// What claims will give to each tenant and to those above it.
    fn incoming(&self) -> BTreeMap<TenantId, Amounts> {
        self.claims_of(|_| true)
    }

    /// The same of the claims of all tasks but this one.
    pub fn kept_for_others(&self, task: TaskKey) -> BTreeMap<TenantId, Amounts> {
        self.claims_of(|other| other != task)
    }

    fn claims_of(&self, whose: impl Fn(TaskKey) -> bool) -> BTreeMap<TenantId, Amounts> {
        let mut incoming: BTreeMap<TenantId, Amounts> = BTreeMap::new();
        for (task, claim) in self.claims.iter().filter(|(task, _)| whose(**task)) {
            let Some(job) = self.jobs.get(&task.job) else { continue };
            for (id, _) in self.tenant_chain(job.value.tenant) {
                incoming.entry(id).or_default().add(&claim.amounts);
            }
        }
        incoming
    }

    /// The parts that are kept on a node for other tasks than this one.
    fn claimed(&self, node: NodeId, task: TaskKey) -> impl Iterator<Item = (&Claim, &PlacePart)> + '_ {
        let first = (node, TaskKey { job: JobId(0), index: 0 });
        let here = self.index.claims.range(first..).take_while(move |(of, _)| *of == node);
        let others = here.filter(move |(_, other)| *other != task);
        others.filter_map(move |(_, other)| {
            let claim = self.claims.get(other)?;
            Some((claim, claim.parts.iter().find(|part| part.node == node)?))
        })
    }

    /// A machine that holds so many leases may get one more for this task: what is kept there for others will be leases too.
    pub fn takes_lease(&self, node: NodeId, held: usize, task: TaskKey) -> bool {
        held + self.claimed(node, task).count() < self.meta.settings.leases_per_node as usize
    }

    /// Of what is free on a node (`alloc`), what is not kept for another task. What the victims of the others still hold is
    /// not free yet, and is theirs once it is.
    pub fn free_beside_claims<'a>(&'a self, node: NodeId, alloc: &'a Alloc, task: TaskKey) -> Cow<'a, Alloc> {
        let mut kept = Alloc { cores_free: vec![0; alloc.cores_free.len()], ..Alloc::default() };
        let mut draining: Vec<Token> = Vec::new();
        for (claim, part) in self.claimed(node, task) {
            kept.free_gpus |= mask_of(part);
            for (sum, cores) in kept.cores_free.iter_mut().zip(&part.cores_by_numa) {
                *sum = sum.saturating_add(*cores);
            }
            kept.mem_free_mib = kept.mem_free_mib.saturating_add(part.mem_mib);
            draining.extend(&claim.victims);
        }
        if kept.free_gpus == 0 && kept.mem_free_mib == 0 && cores_of(&kept.cores_free) == 0 {
            return Cow::Borrowed(alloc);
        }
        let leases = draining.iter().filter_map(|token| self.leases.get(token));
        let held = leases.flat_map(|lease| &lease.value.parts);
        for part in held.filter(|part| part.node == node && part.state != PartState::Released) {
            for (sum, cores) in kept.cores_free.iter_mut().zip(&part.cores_by_numa) {
                *sum = sum.saturating_sub(*cores);
            }
            kept.mem_free_mib = kept.mem_free_mib.saturating_sub(part.mem_mib);
        }
        let mut free = alloc.clone();
        free.free_gpus &= !kept.free_gpus;
        for (free, kept) in free.cores_free.iter_mut().zip(&kept.cores_free) {
            *free = free.saturating_sub(*kept);
        }
        free.mem_free_mib = free.mem_free_mib.saturating_sub(kept.mem_free_mib);
        Cow::Owned(free)
    }

    /// It was decided, and its grace is over soon: what it holds can be counted on.
    fn is_draining(&self, lease: &Lease) -> bool {
        let grace_ms = self.jobs.get(&lease.task.job).map_or(0, |job| job.value.spec.kill_grace_ms);
        let by_ms = |verdict: &Verdict| verdict.clock_ms.saturating_add(grace_ms).saturating_add(OVERDUE_MS);
        let in_time = lease.verdict.as_ref().is_some_and(|verdict| self.meta.clock_ms <= by_ms(verdict));
        in_time && lease.parts.iter().all(|part| part.state != PartState::Stuck)
    }

    /// What a node will have free for the task once these leases and all that drain have gone, with the leases that stay; who holds which
    /// GPU is not told.
    pub fn free_after(&self, node: NodeId, leaving: &[Token], task: TaskKey) -> Option<Alloc> {
        let now = self.allocs.get(&node)?;
        let mut alloc = fit::alloc_of(&self.nodes.get(&node)?.value, [].into_iter(), now.orphans.clone());
        for token in now.leases.iter().filter(|token| !leaving.contains(token)) {
            let Some(lease) = self.leases.get(token).filter(|lease| !self.is_draining(&lease.value)) else { continue };
            let here = |part: &&Part| part.node == node && part.state != PartState::Released;
            if let Some(part) = lease.value.parts.iter().find(here) {
                alloc.take_share(part);
                alloc.leases.push(*token);
            }
        }
        for (_, part) in self.claimed(node, task) {
            alloc.free_gpus &= !mask_of(part);
            for (free, cores) in alloc.cores_free.iter_mut().zip(&part.cores_by_numa) {
                *free = free.saturating_sub(*cores);
            }
            alloc.mem_free_mib = alloc.mem_free_mib.saturating_sub(part.mem_mib);
        }
        Some(alloc)
    }

    pub(crate) fn keep_claim(&mut self, task: TaskKey, claim: Claim) {
        self.index.timers.insert(claim.timer(task));
        self.index.claims.extend(claim.parts.iter().map(|part| (part.node, task)));
        self.claims.insert(task, claim);
    }

    /// What was kept for a job that does not wait any more, or for a task of an array that has become another job.
    pub(crate) fn drop_claims_of(&mut self, job: JobId) {
        let kept = self.claims.range(TaskKey::only(job)..=TaskKey { job, index: u32::MAX });
        let kept: Vec<TaskKey> = kept.map(|(task, _)| *task).collect();
        kept.into_iter().for_each(|task| self.drop_claim(task));
    }

    /// What was kept for the task is anybody's again.
    pub(crate) fn drop_claim(&mut self, task: TaskKey) {
        let Some(claim) = self.claims.remove(&task) else { return };
        self.index.timers.remove(&claim.timer(task));
        for part in &claim.parts {
            self.index.claims.remove(&(part.node, task));
        }
    }
}

impl Claim {
    pub(crate) fn timer(&self, task: TaskKey) -> Timer {
        Timer { due_ms: self.until_ms, what: TimerKind::Claim(task) }
    }
}

/// The part's GPUs as the mask of their slots.
pub(crate) fn mask_of(part: &PlacePart) -> u128 {
    part.gpu_order.iter().filter(|slot| **slot < 128).fold(0, |mask, slot| mask | 1 << slot)
}
