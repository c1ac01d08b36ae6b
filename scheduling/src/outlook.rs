//! When what waits would start: a whole cycle, and then for each task that it left waiting, in the order, the earliest
//! time at which it has room if what runs and what starts before it uses its time limit. An estimate for people: only
//! the plan's own reservations are kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use statemachine::command::{Place, PlacePart};
use statemachine::spec::Shape;
use statemachine::{NodeId, State, TaskKey};

use crate::cuts::Shelf;
use crate::holding::ENDLESS_MS;
use crate::plan::{Cache, Cycle, Limits, Plan, Reservation, waiting_task};
use crate::reason::Reason;

/// When a task starts, at the latest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Start {
    /// The plan places it.
    Now,
    /// Cluster time in ms.
    At(u64),
    /// It can't be told: it waits for jobs without a time limit, or for something else than time, or behind too many.
    Unknown,
}

/// Every task that was looked at.
#[derive(Clone, Debug, Default)]
pub struct Outlook {
    /// Sorted by task.
    waiting: Vec<(TaskKey, Arc<Reason>)>,
    starts: BTreeMap<TaskKey, u64>,
    placed: BTreeSet<TaskKey>,
}

/// One task of an outlook.
#[derive(Clone, Debug, Default)]
pub(crate) struct Look {
    pub placed: Option<Place>,
    pub reason: Option<Arc<Reason>>,
    /// When and where it starts.
    pub start: Option<Reservation>,
    /// Tasks before it in the order that wait.
    pub ahead: usize,
    /// What the cycle places before it.
    pub before: Vec<Place>,
    /// What it took.
    pub steps: u64,
}

/// What bounds a look at one task.
#[derive(Clone, Copy)]
pub(crate) struct Steps {
    /// Up to its turn in the order.
    pub turn: u64,
    /// For the starts of those that wait before it, and its own.
    pub starts: u64,
}

impl Outlook {
    /// Estimates end after so many steps, and what comes later is unknown.
    pub fn new(state: &State, cache: &mut Cache, unheard: &BTreeSet<NodeId>, steps: u64) -> Self {
        let limits = Limits::default();
        let shelf = Shelf::default();
        let mut cycle = Cycle::new(state, cache, &shelf, &limits, unheard).run(&limits, None);
        let starts = cycle.estimate(steps);
        let Plan { places, mut reasons, .. } = cycle.plan;
        reasons.sort_unstable_by_key(|(task, _)| *task);
        Self {
            waiting: reasons,
            starts: starts.into_iter().map(|(task, start)| (task, start.start_ms)).collect(),
            placed: places.into_iter().map(|place| place.task).collect(),
        }
    }

    /// Why the task waits; `None` where it starts or was not looked at.
    pub fn reason(&self, task: TaskKey) -> Option<&Arc<Reason>> {
        let at = self.waiting.binary_search_by_key(&task, |(task, _)| *task).ok()?;
        Some(&self.waiting[at].1)
    }

    pub fn start(&self, task: TaskKey) -> Start {
        match self.starts.get(&task) {
            _ if self.placed.contains(&task) => Start::Now,
            Some(start) => known(*start),
            None => Start::Unknown,
        }
    }
}

pub(crate) fn known(start_ms: u64) -> Start {
    if start_ms < ENDLESS_MS { Start::At(start_ms) } else { Start::Unknown }
}

impl Look {
    /// The task's turn in a cycle, and its start, as far as they come within so many steps.
    pub(crate) fn at(
        state: &State,
        cache: &mut Cache,
        unheard: &BTreeSet<NodeId>,
        task: TaskKey,
        (steps, hasty): (Steps, bool),
    ) -> Self {
        let limits = Limits { steps: steps.turn, ..Limits::default() };
        let shelf = Shelf::default();
        let mut cycle = Cycle::new(state, cache, &shelf, &limits, unheard);
        cycle.machines.hasty = hasty;
        let mut cycle = cycle.run(&limits, Some(task));
        let mut starts = cycle.estimate(steps.starts);
        let steps = cycle.steps;
        let Plan { mut places, reasons, .. } = cycle.plan;
        let placed = places.pop_if(|place| place.task == task);
        let reason = reasons.last().filter(|(last, _)| *last == task).map(|(_, reason)| reason.clone());
        let ahead = reasons.len() - usize::from(reason.is_some());
        Self { placed, reason, start: starts.remove(&task), ahead, before: places, steps }
    }

    pub(crate) fn start(&self) -> Start {
        match &self.start {
            _ if self.placed.is_some() => Start::Now,
            Some(start) => known(start.start_ms),
            None => Start::Unknown,
        }
    }

    /// The machines that it would get.
    pub(crate) fn parts(&self) -> &[PlacePart] {
        let placed = self.placed.as_ref().map(|place| place.parts.as_slice());
        placed.or(self.start.as_ref().map(|start| start.parts.as_slice())).unwrap_or_default()
    }
}

impl Cycle<'_> {
    /// The start of each task that the cycle left waiting, in the order, until so many more steps were taken.
    fn estimate(&mut self, steps: u64) -> BTreeMap<TaskKey, Reservation> {
        let budget = self.steps.saturating_add(steps);
        let mut starts: BTreeMap<TaskKey, Reservation> =
            self.plan.reservations.iter().map(|kept| (kept.task, kept.clone())).collect();
        // What found no time finds none later: more is kept by then.
        let mut hopeless: BTreeSet<(&Shape, Option<u64>, &str)> = BTreeSet::new();
        let state = self.machines.state;
        for (task, reason) in self.plan.reasons.clone() {
            if self.steps >= budget {
                break;
            }
            if !reason.ends_with_time() || starts.contains_key(&task) {
                continue;
            }
            let Some((job, _)) = waiting_task(state, task) else { continue };
            let spec = &job.spec;
            let kind = (&spec.shape, spec.length_ms(), spec.reservation());
            if hopeless.contains(&kind) {
                continue;
            }
            let shape = self.shape_of(spec);
            match self.keep(task, (spec, shape), u64::MAX) {
                Some(start) => {
                    starts.insert(task, start);
                }
                None => {
                    hopeless.insert(kind);
                }
            }
        }
        starts
    }
}
