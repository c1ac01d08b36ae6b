//! One planning cycle: which waiting tasks start now, and where. A pure function of the state, the silent nodes and the
//! limits; `apply` re-checks each placement and may refuse single ones.
//!
//! The order is `order`'s. The first task of each pool that does not fit gets a reservation (EASY backfill, Lifka 1995):
//! machines with room for it at the earliest time, by the limits of what runs. Tasks behind it start where they end
//! before that time or take nothing of what is kept, so none of them delays it. A task without a time limit never ends
//! in time. Reservations are made anew in each cycle, from the same state by every planner. Who takes turns gets none for a time
//! that nobody knows.
//!
//! A reservation of time keeps its machines whole from all but its own jobs (`windows`): what would run into it starts
//! elsewhere or later, and a job that names one starts on its machines alone, in its time.
//!
//! A task that finds no room and may end others makes room (`preempt` says by whose end); reservations don't bind it. What
//! was taken for a task goes to nobody else: it starts there as soon as all of it is free.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use statemachine::account::Amounts;
use statemachine::command::{Place, PlacePart};
use statemachine::fit;
use statemachine::record::{Claim, Job, Phase, Task};
use statemachine::spec::{JobSpec, Shape};
use statemachine::state::QueueKey;
use statemachine::{GpuTypeId, NodeId, State, TaskKey, TenantId, Token};

pub use crate::cache::Cache;
use crate::cuts::{Cuts, Shelf};
use crate::explain::needs_of;
use crate::holding::ENDLESS_MS;
use crate::machines::Machines;
use crate::order::{Order, Position};
use crate::outcome::PLACES_PER_COMMAND;
pub use crate::outcome::{Plan, Reservation};
use crate::preempt::{self, Before, Open};
use crate::prospects::Prospects;
use crate::quota::Planned;
use crate::reason::Reason;
use crate::reserve::earliest;
use crate::seats::{Seats, is_seatless_still};
use crate::unplaced::Brief;
use crate::windows;

/// Tasks of one pool whose reservation is tried, beyond those that get one: each may cost a look at every machine.
const MORE_TRIES: u32 = 3;

/// Tasks for which room is made in one cycle: the next one sees what has become of them.
const PREEMPTS: usize = 16;

/// What bounds one cycle, and where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Looks at a machine or at a task; deterministic, unlike time. A look costs some hundred nanoseconds.
    pub steps: u64,
    pub places: usize,
    /// Reservations of each pool: of the tasks that accept the same types of GPUs. `None` = as the state says.
    pub reservations: Option<u32>,
    /// Go on from here, where an earlier cycle over the same state ran out of steps. `None` = from the front.
    pub after: Option<Position>,
    /// Reasons that end with time tell no more than that: who plans and tells nobody needs no numbers. Nothing else in the plan differs.
    pub in_brief: bool,
}

impl Limits {
    /// Of a leader, who tells nobody why a task waits.
    pub fn of_leader() -> Self {
        Self { in_brief: true, ..Self::default() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { steps: 500_000, places: PLACES_PER_COMMAND, reservations: None, after: None, in_brief: false }
    }
}

/// Plans one cycle. `unheard` are the nodes that were silent too long: they get nothing new.
///
/// The same arguments give the same plan, whatever the cache holds.
pub fn plan(state: &State, cache: &mut Cache, limits: &Limits, unheard: &BTreeSet<NodeId>) -> Plan {
    let shelf = Shelf::default();
    Cycle::new(state, cache, &shelf, limits, unheard).run(limits, None).plan
}

/// One cycle under way.
pub(crate) struct Cycle<'a> {
    pub machines: Machines<'a>,
    cuts: Cuts<'a>,
    pub cache: &'a mut Cache,
    /// By window, shape and bar.
    seats: BTreeMap<(Inside, &'a Shape, u64), Seats<'a>>,
    /// Shapes that failed at a bar. Resources only shrink within a cycle, and a higher bar leaves less: so they fail for
    /// all that follow at this bar or a higher one.
    pub(crate) failed: BTreeMap<Ask<'a>, (u64, Arc<Reason>)>,
    planned: Planned,
    /// What was planned and what is kept.
    promised: Planned,
    pools: BTreeMap<Pool, Tries>,
    prospects: Prospects,
    reservations: u32,
    /// What is said where no numbers are wanted.
    pub(crate) brief: Option<Brief>,
    /// Who may be ended, once somebody asks.
    open: Option<Open>,
    victims: BTreeSet<Token>,
    /// What they end for and what else was planned, beside what the state's claims keep: that counts by itself until it is granted.
    coming: Planned,
    /// The highest priority for which nobody's end made room, by window, shape, how long it runs, tenant, whether its
    /// class lets it end others, and its priority if it may take a turn.
    hopeless: BTreeMap<Asking<'a>, i32>,
    pub steps: u64,
    pub plan: Plan,
}

/// The window that a task is for, as `Machines::inside` has it.
type Inside = Option<usize>;

/// What tasks of one shape ask for. The numbers stand in front because shapes lie apart in memory, and most differ in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ask<'a> {
    inside: Inside,
    counts: [u16; 4],
    mem_mib_per_rank: u64,
    shape: &'a Shape,
}

impl<'a> Ask<'a> {
    pub(crate) fn new(inside: Inside, shape: &'a Shape) -> Self {
        let counts = [shape.cores_per_rank, shape.gpus_per_rank, shape.ranks_per_node, shape.nodes];
        Self { inside, counts, mem_mib_per_rank: shape.mem_mib_per_rank, shape }
    }
}

/// Tasks for whom the same ends make room. Without reservations of time it is all one how long they run.
type Asking<'a> = (Inside, &'a Shape, Option<u64>, TenantId, bool, Option<i32>);

/// The tasks that wait for the same machines: by window, without GPUs, or by the types that they accept.
type Pool = (Inside, bool, Vec<GpuTypeId>);

#[derive(Clone, Copy, Default)]
struct Tries {
    made: u32,
    failed: u32,
}

impl<'a> Cycle<'a> {
    pub(crate) fn new(
        state: &'a State,
        cache: &'a mut Cache,
        shelf: &'a Shelf,
        limits: &Limits,
        unheard: &'a BTreeSet<NodeId>,
    ) -> Cycle<'a> {
        cache.begin(state, unheard);
        Cycle {
            machines: Machines::new(state, cache, unheard),
            cuts: Cuts::on(shelf),
            cache,
            seats: BTreeMap::new(),
            failed: BTreeMap::new(),
            planned: Planned::default(),
            promised: Planned::default(),
            pools: BTreeMap::new(),
            prospects: Prospects::default(),
            reservations: limits.reservations.unwrap_or(state.meta.settings.planning.reservations),
            brief: limits.in_brief.then(Brief::new),
            open: None,
            victims: BTreeSet::new(),
            coming: Planned::default(),
            hopeless: BTreeMap::new(),
            steps: 0,
            plan: Plan { base_index: state.meta.applied.index, ..Plan::default() },
        }
    }

    /// Looks at the tasks in their order, `last` being the last one if it is met.
    pub(crate) fn run(mut self, limits: &Limits, last: Option<TaskKey>) -> Self {
        let state = self.machines.state;
        let from = limits.after.clone().unwrap_or_default();
        let mut reserved: Vec<QueueKey> = Vec::new();
        let mut order = Order::with_capacity(state, from.clone(), self.cache.fleet.capacity().clone());
        self.serve_claims(&mut order);
        // Those behind go on beside what an earlier cycle kept for those in front.
        let mut again = from.reserved.into_iter();
        let mut looked = 0usize;
        loop {
            // At least one task a cycle, so that a budget below its cost still comes through the queue.
            let exhausted = self.steps >= limits.steps && looked > 0;
            if exhausted || self.plan.places.len() >= limits.places {
                self.plan.unfinished = order.has_more();
                break;
            }
            let front = again.next();
            looked += usize::from(front.is_none());
            let still_waits = |key: QueueKey| (key, waiting_task(state, key.task).map(|(job, _)| job));
            let Some((key, job)) = front.map(still_waits).or_else(|| order.next_job()) else { break };
            let kept = self.plan.reservations.len();
            self.steps += 1;
            if let Some((job, takes)) = job.and_then(|job| Some((job, self.look_at(key.task, job)?))) {
                order.started(key, job);
                order.placed(key.tenant, &takes);
            }
            if self.plan.reservations.len() > kept {
                reserved.push(key);
            }
            if last == Some(key.task) {
                self.plan.unfinished = order.has_more();
                break;
            }
        }
        self.plan.steps = self.steps;
        let mut reached = order.position();
        reached.reserved = reserved;
        self.plan.reached = (looked > 0).then_some(reached);
        self
    }

    /// What it takes, if it starts. Who is in line waits, so that the task's own record is not looked at before it could be placed.
    fn look_at(&mut self, task: TaskKey, job: &'a Job) -> Option<Amounts> {
        let state = self.machines.state;
        let (tenant, spec) = (job.tenant, &job.spec);
        if state.claims.contains(&task) {
            return None;
        }
        self.machines.look_for(spec);
        let sizes = self.cuts.sizes_of((state, &mut self.cache.cutting), spec, &mut self.steps);
        // The largest that fits starts; who finds no room waits for the least that it takes.
        let (shape, larger) = sizes.split_last()?;
        if let Some(reason) = windows::not_yet(state, spec) {
            if reason.ends_with_time() && self.may_reserve(shape) {
                self.reserve(task, tenant, (spec, shape));
            }
            self.plan.reasons.push((task, Arc::new(reason)));
            return None;
        }
        let (_, end) = self.machines.length_of(spec);
        let until_ms = self.machines.room_until(spec);
        let bar = self.machines.bar(until_ms);
        let mut placed_as = |size: &'a Shape| {
            if let Some(reason) = self.planned.hit_by_shape(state, tenant, size) {
                return Some(Err(Arc::new(reason)));
            }
            let failed = self.failed.get(&Ask::new(self.machines.inside(), size));
            if let Some((_, reason)) = failed.filter(|(failed, _)| *failed <= bar) {
                return Some(Err(reason.clone()));
            }
            let record = waiting_task(state, task)?.1;
            Some(self.place(task, (spec, size), record, bar).and_then(|place| {
                // What is kept for a task must be free for its tenant too by then.
                let charged = if self.machines.bar_of_tasks(until_ms) == 0 { &self.planned } else { &self.promised };
                charged.hit_by(state, tenant, &place.parts).map_or(Ok(place), |reason| Err(Arc::new(reason)))
            }))
        };
        let grown = larger.iter().find_map(|size| placed_as(size)?.ok());
        let placed = grown.map_or_else(|| placed_as(shape), |place| Some(Ok(place)))?;
        match placed {
            Ok(place) => {
                let takes = self.planned.add(state, tenant, &place.parts);
                self.promised.add(state, tenant, &place.parts);
                self.coming.add(state, tenant, &place.parts);
                for part in &place.parts {
                    self.machines.take(part, end);
                }
                self.plan.places.push(place);
                Some(takes)
            }
            Err(reason) => {
                let making = reason.ends_for_room().then(|| self.make_room(task, job, shape)).flatten();
                let reason = match making {
                    Some(made) => Arc::new(made),
                    None => {
                        if reason.ends_with_time() && self.may_reserve(shape) {
                            self.reserve(task, tenant, (spec, shape));
                        }
                        self.cuts.told(state, spec, reason)
                    }
                };
                self.plan.reasons.push((task, reason));
                None
            }
        }
    }

    fn place(
        &mut self,
        task: TaskKey,
        (spec, shape): (&'a JobSpec, &'a Shape),
        record: Option<&Task>,
        bar: u64,
    ) -> Result<Place, Arc<Reason>> {
        let inside = self.machines.inside();
        self.cache.fleet.follow(&self.machines);
        let is_remembered = self.is_remembered(shape);
        let (seats, looks, is_new) = match self.seats.entry((inside, shape, bar)) {
            Entry::Occupied(known) => {
                let seats = known.into_mut();
                let looks = seats.refresh(&self.machines, self.cache);
                (seats, looks, false)
            }
            Entry::Vacant(_) if is_remembered && is_seatless_still(&self.machines, self.cache, shape) => {
                self.steps += self.few_looks(shape);
                return Err(self.seatless((spec, shape), bar, Some(0)));
            }
            Entry::Vacant(new) => {
                let (seats, looks) = Seats::new(&self.machines, self.cache, shape, bar);
                (new.insert(seats), looks, true)
            }
        };
        let no_avoid = VecDeque::new();
        let picked = seats.pick(&self.cache.fleet, record.map_or(&no_avoid, |task| &task.avoid));
        self.steps += if is_remembered && is_new && picked.is_none() { self.few_looks(shape) } else { looks };
        let part = |(id, gpu_type): (NodeId, Option<GpuTypeId>)| {
            let (node, alloc) = self.machines.beside(id, bar)?;
            self.machines.part(self.cache, (id, node, &alloc), shape, gpu_type)
        };
        let full_from = picked.is_none().then_some(bar);
        let parts: Option<Vec<PlacePart>> = picked.and_then(|nodes| nodes.into_iter().map(part).collect());
        match parts {
            Some(parts) => Ok(Place { task, attempt: next_attempt(record), parts }),
            None => Err(self.seatless((spec, shape), bar, full_from)),
        }
    }

    /// Starts each task for which others ended, once all that is kept for it is free; until then it is kept.
    fn serve_claims(&mut self, order: &mut Order<'_>) {
        let state = self.machines.state;
        for (task, claim) in state.claims.iter() {
            self.steps += 1 + claim.parts.len() as u64;
            let Some((job, record)) = waiting_task(state, *task) else { continue };
            let (tenant, spec) = (job.tenant, &job.spec);
            let parts = self.free_parts(*task, claim, spec);
            match parts.filter(|parts| self.planned.hit_by(state, tenant, parts).is_none()) {
                Some(parts) => {
                    let (_, end) = self.machines.length_of(spec);
                    order.placed(tenant, &self.planned.add(state, tenant, &parts));
                    self.promised.add(state, tenant, &parts);
                    parts.iter().for_each(|part| self.machines.take_claimed(part, end));
                    self.plan.places.push(Place { task: *task, attempt: next_attempt(record), parts });
                }
                None => {
                    claim.parts.iter().for_each(|part| self.machines.keep_room(part, false));
                    self.promised.add(state, tenant, &claim.parts);
                    let (start_ms, parts) = (state.meta.clock_ms, claim.parts.clone());
                    self.plan.reservations.push(Reservation { task: *task, start_ms, parts });
                }
            }
        }
    }

    /// What is kept for a task, if all of it is free.
    fn free_parts(&self, task: TaskKey, claim: &Claim, spec: &JobSpec) -> Option<Vec<PlacePart>> {
        let state = self.machines.state;
        let gpus = claim.parts.iter().map(|part| part.gpu_order.len()).sum();
        let shape = spec.shape_of(claim.parts.len(), gpus)?;
        let part = |part: &PlacePart| {
            let node = &state.nodes.get(&part.node)?.value;
            let free = state.free_beside_claims(part.node, state.allocs.get(&part.node)?, task);
            let part = PlacePart { epoch: node.epoch, ..part.clone() };
            let may = self.machines.takes_lease_of(part.node, task) && state.may_use(spec, part.node).is_ok();
            let fits = may && fit::fit(node, &free, &shape, &part).is_ok();
            fits.then_some(part)
        };
        if !state.are_near_enough(&shape, claim.parts.iter().map(|part| part.node)) {
            return None;
        }
        claim.parts.iter().map(part).collect()
    }

    /// Ends others for the task, where that suffices and is its right: what it then waits for.
    fn make_room(&mut self, task: TaskKey, job: &'a Job, shape: &'a Shape) -> Option<Reason> {
        let state = self.machines.state;
        let (tenant, spec) = (job.tenant, &job.spec);
        if !state.may_preempt(job) || self.plan.preempts.len() >= PREEMPTS {
            return None;
        }
        let length_ms = if state.reservations.is_empty() { None } else { spec.length_ms() };
        let turn_at = state.may_take_turn(task, job).then_some(spec.priority);
        let equal = (self.machines.inside(), shape, length_ms, tenant, state.preempts_by_class(job), turn_at);
        if self.hopeless.get(&equal).is_some_and(|highest| spec.priority <= *highest) {
            return None;
        }
        let open = self.open.get_or_insert_with(|| Open::of(state, &mut self.steps));
        self.plan.preempts_from = open.next_ms;
        let before = Before { victims: &self.victims, coming: self.coming.by_tenant() };
        let asked = (task, spec, shape);
        let made = preempt::make_room(&self.machines, self.cache, (open, before), asked, &mut self.steps);
        let Some(made) = made else {
            self.hopeless.insert(equal, spec.priority);
            return None;
        };
        self.victims.extend(&made.victims);
        self.promised.add(state, tenant, &made.parts);
        self.coming.add(state, tenant, &made.parts);
        made.parts.iter().for_each(|part| self.machines.keep_room(part, true));
        let victims = u32::try_from(made.victims.len()).unwrap_or(u32::MAX);
        self.plan.preempts.push(made);
        Some(Reason::Preempting { needs: needs_of(state, shape), victims })
    }

    /// The shape in which the job waits: the least that it takes.
    pub(crate) fn shape_of(&mut self, spec: &'a JobSpec) -> &'a Shape {
        let known = (self.machines.state, &mut self.cache.cutting);
        let sizes = self.cuts.sizes_of(known, spec, &mut self.steps);
        sizes.last().unwrap_or(&spec.shape)
    }

    /// Its pool has a reservation left.
    fn may_reserve(&self, shape: &Shape) -> bool {
        let tries = self.pools.get(&pool_of(self.machines.inside(), shape)).copied().unwrap_or_default();
        tries.made < self.reservations && tries.failed < MORE_TRIES
    }

    /// Keeps machines for the task, if a start can be told.
    fn reserve(&mut self, task: TaskKey, tenant: TenantId, (spec, shape): (&JobSpec, &Shape)) {
        // What who takes turns kept for a time that nobody knows would stay idle while others could have their turns there.
        let state = self.machines.state;
        let takes_turns = state.jobs.get(&task.job).is_some_and(|job| state.takes_turns(&job.value));
        let made = self.keep(task, (spec, shape), if takes_turns { ENDLESS_MS } else { u64::MAX });
        let tries = self.pools.entry(pool_of(self.machines.inside(), shape)).or_default();
        match made {
            Some(reservation) => {
                tries.made += 1;
                self.promised.add(self.machines.state, tenant, &reservation.parts);
                self.plan.reservations.push(reservation);
            }
            None => tries.failed += 1,
        }
    }

    /// The task's start, with its machines kept from then on, if it is before this time.
    pub(crate) fn keep(
        &mut self,
        task: TaskKey,
        (spec, shape): (&JobSpec, &Shape),
        before_ms: u64,
    ) -> Option<Reservation> {
        self.machines.look_for(spec);
        let (length_ms, _) = self.machines.length_of(spec);
        let room_ms = self.machines.room_ms(spec);
        let known = (&mut *self.cache, &mut self.prospects);
        let start = earliest(&self.machines, known, shape, room_ms, &mut self.steps)?;
        if start.at_ms >= before_ms {
            return None;
        }
        let until_ms = length_ms.map_or(u64::MAX, |length| start.at_ms.saturating_add(length));
        for part in &start.parts {
            self.machines.keep(start.at_ms, until_ms, part.clone());
        }
        Some(Reservation { task, start_ms: start.at_ms, parts: start.parts })
    }
}

fn pool_of(inside: Inside, shape: &Shape) -> Pool {
    let mut types = shape.gpu_types.to_vec();
    types.sort_unstable();
    (inside, shape.gpus_per_node() == 0, types)
}

/// The job and, if it ever left its first PENDING, the record of a task that may be placed.
pub(crate) fn waiting_task(state: &State, key: TaskKey) -> Option<(&Job, Option<&Task>)> {
    let job = &state.jobs.get(&key.job)?.value;
    let task = state.tasks.get(&key).map(|task| &task.value);
    let pending = task.is_none_or(|task| task.phase == Phase::Pending);
    let may_start = pending && !state.is_barred(job) && job.ended.is_none();
    may_start.then_some((job, task))
}

fn next_attempt(task: Option<&Task>) -> u32 {
    task.map_or(0, |task| task.attempt).saturating_add(1)
}
