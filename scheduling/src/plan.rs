//! One planning cycle: which waiting tasks start now, and where. A pure function of the state, the silent nodes and the
//! limits; `apply` re-checks each placement and may refuse single ones.
//!
//! The order is `order`'s. A task that does not fit does not hold back the ones behind it: nothing is reserved. So a stream of small jobs can keep a large gang waiting
//! for as long as it lasts, even at a higher priority: the GPUs that fall free are too few for the gang and enough for
//! the next small job. Known, and the business of reservations once they exist; until then a drained node is the cure.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use statemachine::account::Amounts;
use statemachine::command::{self, Place};
use statemachine::record::{Phase, Task};
use statemachine::spec::Shape;
use statemachine::{NodeId, State, TaskKey, TenantId};

use crate::explain::explain;
pub use crate::machines::Cache;
use crate::machines::Machines;
use crate::order::{Order, Position};
use crate::quota::Planned;
use crate::reason::Reason;
use crate::seats::Seats;

/// Placements in one `Plan` command, as apply bounds it.
const PLACES_PER_COMMAND: usize = 4_096;

/// Bytes of one `Plan` command: an entry of the log holds 128 KiB.
const BYTES_PER_COMMAND: usize = 120 << 10;

/// What bounds one cycle, and where it begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Looks at a machine or at a task; deterministic, unlike time. A look costs some hundred nanoseconds.
    pub steps: u64,
    pub places: usize,
    /// Go on from here, where an earlier cycle over the same state ran out of steps. `None` = from the front.
    pub after: Option<Position>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { steps: 500_000, places: PLACES_PER_COMMAND, after: None }
    }
}

/// The outcome of one cycle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Log index of the state that was planned on.
    pub base_index: u64,
    /// In the order of the queue.
    pub places: Vec<Place>,
    /// Why each other task that was looked at does not start, in the order of the queue; shared by equal shapes.
    pub reasons: Vec<(TaskKey, Arc<Reason>)>,
    /// The limits were reached before the queue's end.
    pub unfinished: bool,
    /// How far the order was looked at: `Limits::after` of the next cycle when this one is unfinished and placed nothing.
    pub reached: Option<Position>,
}

impl Plan {
    /// The placements as commands within apply's bounds, in order, cut between placements.
    pub fn commands(&self) -> Vec<command::Plan> {
        let mut commands: Vec<command::Plan> = Vec::new();
        let mut bytes = 0;
        for place in &self.places {
            let more = encoded_bytes(place);
            let full =
                |last: &command::Plan| last.places.len() >= PLACES_PER_COMMAND || bytes + more > BYTES_PER_COMMAND;
            if commands.last().is_none_or(full) {
                commands.push(command::Plan { base_index: self.base_index, places: Vec::new() });
                bytes = 0;
            }
            bytes += more;
            if let Some(last) = commands.last_mut() {
                last.places.push(place.clone());
            }
        }
        commands
    }
}

/// An upper bound of what a placement takes in the log: full-width integers, 8-byte lengths.
fn encoded_bytes(place: &Place) -> usize {
    let parts = place.parts.iter().map(|part| 36 + part.gpu_order.len() + 2 * part.cores_by_numa.len());
    24 + parts.sum::<usize>()
}

/// Plans one cycle. `unheard` are the nodes that were silent too long: they get nothing new.
///
/// The same arguments give the same plan, whatever the cache holds.
pub fn plan(state: &State, cache: &mut Cache, limits: &Limits, unheard: &BTreeSet<NodeId>) -> Plan {
    cache.keep_what_holds(state);
    let mut cycle = Cycle {
        machines: Machines::new(state, unheard),
        cache,
        shapes: BTreeMap::new(),
        planned: Planned::default(),
        steps: 0,
        plan: Plan { base_index: state.meta.applied.index, ..Plan::default() },
    };
    let mut order = Order::new(state, limits.after.clone().unwrap_or_default());
    let mut looked = 0usize;
    loop {
        // At least one task a cycle, so that a budget below its cost still comes through the queue.
        let exhausted = cycle.steps >= limits.steps && looked > 0;
        if exhausted || cycle.plan.places.len() >= limits.places {
            cycle.plan.unfinished = order.has_more();
            break;
        }
        let Some(key) = order.next() else { break };
        if let Some(takes) = cycle.look_at(key.task, key.tenant) {
            order.placed(key.tenant, &takes);
        }
        looked += 1;
    }
    cycle.plan.reached = (looked > 0).then(|| order.position());
    cycle.plan
}

struct Cycle<'a> {
    machines: Machines<'a>,
    cache: &'a mut Cache,
    shapes: BTreeMap<&'a Shape, Verdict<'a>>,
    planned: Planned,
    steps: u64,
    plan: Plan,
}

/// What this cycle knows of a shape.
enum Verdict<'a> {
    Fits(Seats<'a>),
    /// It failed once; resources only shrink within a cycle, so it fails for all that follow.
    Fails(Arc<Reason>),
}

impl<'a> Cycle<'a> {
    /// What it takes, if it starts.
    fn look_at(&mut self, task: TaskKey, tenant: TenantId) -> Option<Amounts> {
        self.steps += 1;
        let state = self.machines.state;
        let (shape, record) = waiting_task(state, task)?;
        let placed = match self.planned.hit_by_shape(state, tenant, shape) {
            Some(reason) => Err(Arc::new(reason)),
            None => self.place(task, shape, record).and_then(|place| {
                self.planned.hit_by(state, tenant, &place.parts).map_or(Ok(place), |reason| Err(Arc::new(reason)))
            }),
        };
        match placed {
            Ok(place) => {
                let takes = self.planned.add(state, tenant, &place.parts);
                for part in &place.parts {
                    self.machines.take(part);
                }
                self.plan.places.push(place);
                Some(takes)
            }
            Err(reason) => {
                self.plan.reasons.push((task, reason));
                None
            }
        }
    }

    fn place(&mut self, task: TaskKey, shape: &'a Shape, record: Option<&Task>) -> Result<Place, Arc<Reason>> {
        let verdict = match self.shapes.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                self.steps += self.machines.state.nodes.len() as u64;
                new.insert(Verdict::Fits(Seats::new(&self.machines, self.cache, shape)))
            }
        };
        let seats = match verdict {
            Verdict::Fails(reason) => return Err(reason.clone()),
            Verdict::Fits(seats) => seats,
        };
        self.steps += seats.refresh(&self.machines, self.cache);
        let no_avoid = VecDeque::new();
        let picked = seats.pick(record.map_or(&no_avoid, |task| &task.avoid));
        let parts = picked.and_then(|nodes| {
            nodes.into_iter().map(|(node, gpu_type)| self.machines.part(self.cache, node, shape, gpu_type)).collect()
        });
        match parts {
            Some(parts) => Ok(Place { task, attempt: next_attempt(record), parts }),
            None => {
                self.steps += self.machines.state.nodes.len() as u64;
                let reason = Arc::new(explain(&self.machines, self.cache, shape));
                *verdict = Verdict::Fails(reason.clone());
                Err(reason)
            }
        }
    }
}

/// The shape and, if it ever left its first PENDING, the record of a task that may be placed.
pub(crate) fn waiting_task(state: &State, key: TaskKey) -> Option<(&Shape, Option<&Task>)> {
    let job = &state.jobs.get(&key.job)?.value;
    let task = state.tasks.get(&key).map(|task| &task.value);
    let pending = task.is_none_or(|task| task.phase == Phase::Pending);
    let may_start = pending && !job.holds.any() && job.stop.is_none() && job.ended.is_none();
    may_start.then_some((&job.spec.shape, task))
}

fn next_attempt(task: Option<&Task>) -> u32 {
    task.map_or(0, |task| task.attempt).saturating_add(1)
}
