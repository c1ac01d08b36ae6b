//! When another planning cycle is worth nothing: a pure memory of the last one.

use std::collections::{BTreeMap, BTreeSet};

use scheduling::plan::{Limits, Plan};
use scheduling::reason::Reason;
use statemachine::command::PlacePart;
use statemachine::event::Change;
use statemachine::record::{Alloc, Claim, Job, Node, Versioned};
use statemachine::spec::{JobSpec, Shape};
use statemachine::table::Table;
use statemachine::{NodeId, Revision, State, TaskKey, TenantId};

/// A complete cycle: while the machines stay as it left them, only a shape that it did not look at can start, or one that
/// goes before those whose reservations are in its way. So a stream of submissions that wait costs a look at each, not
/// at the whole queue, and a cycle that placed something no second one.
pub struct Settled {
    nodes: Table<NodeId, Versioned<Node>>,
    allocs: Table<NodeId, Alloc>,
    /// What is kept for those for whom others end.
    claims: Table<TaskKey, Claim>,
    /// What is left on the machines on which the cycle placed something, until that is seen in the state.
    left: BTreeMap<NodeId, Left>,
    unheard: BTreeSet<NodeId>,
    /// Shapes that find no room.
    waiting: BTreeSet<Shape>,
    /// Shapes that find only what is kept for another task: by tenant, the first that did.
    barred: BTreeMap<(TenantId, Shape), First>,
    /// Cluster time from which one of these may stand in front, for the order of who waits changes with time alone, or somebody may
    /// be ended who has not run for long enough yet.
    until_ms: u64,
    seen: Revision,
    /// What operators had decided.
    policy: u64,
}

/// How long the order of who waits counts as unchanged.
const ORDER_KEEPS_MS: u64 = 10_000;

/// Who comes behind it in its tenant's queue and asks for no less time starts no sooner.
struct First {
    priority: i32,
    /// `u64::MAX` without a limit.
    length_ms: u64,
}

impl First {
    fn of(spec: &JobSpec) -> Self {
        let length_ms = if spec.limit_ms == 0 { u64::MAX } else { spec.limit_ms.saturating_add(spec.kill_grace_ms) };
        Self { priority: spec.priority, length_ms }
    }
}

/// What is free on a machine, and how many leases it holds.
#[derive(PartialEq, Eq)]
struct Left {
    gpus: u128,
    cores: Vec<u16>,
    mem_mib: u64,
    leases: usize,
}

impl Left {
    fn of(alloc: &Alloc) -> Self {
        let (cores, leases) = (alloc.cores_free.clone(), alloc.leases.len());
        Self { gpus: alloc.free_gpus, cores, mem_mib: alloc.mem_free_mib, leases }
    }

    fn take(&mut self, part: &PlacePart) {
        self.gpus &= !part.gpu_order.iter().fold(0, |mask, slot| mask | 1 << slot);
        for (free, taken) in self.cores.iter_mut().zip(&part.cores_by_numa) {
            *free = free.saturating_sub(*taken);
        }
        self.mem_mib = self.mem_mib.saturating_sub(part.mem_mib);
        self.leases += 1;
    }
}

impl Settled {
    /// `None` when the cycle was not complete, or somebody is to make room.
    pub fn after(plan: &Plan, limits: &Limits, state: &State, unheard: BTreeSet<NodeId>) -> Option<Self> {
        if plan.unfinished || limits.after.is_some() || !plan.preempts.is_empty() {
            return None;
        }
        let mut left = BTreeMap::new();
        for part in plan.places.iter().flat_map(|place| &place.parts) {
            let before = Left::of(state.allocs.get(&part.node)?);
            left.entry(part.node).or_insert(before).take(part);
        }
        let (mut waiting, mut barred) = (BTreeSet::new(), BTreeMap::new());
        for (task, reason) in &plan.reasons {
            let job = &state.jobs.get(&task.job)?.value;
            match **reason {
                // The bound of one tenant says nothing about the shape, nor does a window that a shorter one avoids.
                Reason::Quota { .. } | Reason::SetAside { .. } => {}
                _ if !job.spec.reservation().is_empty() => {}
                Reason::Reserved { .. } => {
                    let key = (job.tenant, job.spec.shape.clone());
                    barred.entry(key).or_insert_with(|| First::of(&job.spec));
                }
                _ if waiting.contains(&job.spec.shape) => {}
                _ => {
                    waiting.insert(job.spec.shape.clone());
                }
            }
        }
        let order_keeps = (!barred.is_empty()).then(|| state.meta.clock_ms.saturating_add(ORDER_KEEPS_MS));
        Some(Self {
            nodes: state.nodes.clone(),
            allocs: state.allocs.clone(),
            claims: state.claims.clone(),
            left,
            unheard,
            waiting,
            until_ms: order_keeps.into_iter().chain(plan.preempts_from).min().unwrap_or(u64::MAX),
            barred,
            seen: state.meta.rev,
            policy: state.meta.policy,
        })
    }

    /// False as soon as a machine changed, or a shape waits that was not looked at, or others may stand in front.
    pub fn still_holds(&mut self, state: &State, unheard: &BTreeSet<NodeId>) -> bool {
        if state.meta.policy != self.policy
            || state.meta.clock_ms >= self.until_ms
            || *unheard != self.unheard
            || !state.nodes.is_same(&self.nodes)
            || !state.claims.is_same(&self.claims)
            || !self.has_left(&state.allocs)
        {
            return false;
        }
        let Ok(mut events) = state.events_since(self.seen) else { return false };
        let may_start = events.any(|event| match &event.what {
            Change::Queued { place } => state
                .jobs
                .get(&place.task.job)
                .is_some_and(|job| !self.knows(&job.value) || state.may_preempt(&job.value)),
            // Whose reservation it was may have gone.
            Change::Dequeued { .. } => !self.barred.is_empty(),
            _ => false,
        });
        self.seen = state.meta.rev;
        !may_start
    }

    /// The machines hold what they held and what the cycle placed, and nothing else.
    fn has_left(&mut self, now: &Table<NodeId, Alloc>) -> bool {
        if now.is_same(&self.allocs) {
            return self.left.is_empty();
        }
        let is_left = |(node, left): (&NodeId, &Left)| now.get(node).is_some_and(|alloc| Left::of(alloc) == *left);
        let as_left =
            now.changed_since(&self.allocs).all(|node| self.left.contains_key(node)) && self.left.iter().all(is_left);
        if as_left {
            self.allocs = now.clone();
            self.left.clear();
        }
        as_left
    }

    /// The job can't start where the ones that were looked at could not.
    fn knows(&self, job: &Job) -> bool {
        if !job.spec.reservation().is_empty() {
            return false;
        }
        let shape = &job.spec.shape;
        let behind = |first: &First| {
            let own = First::of(&job.spec);
            own.priority <= first.priority && own.length_ms >= first.length_ms
        };
        self.waiting.contains(shape) || self.barred.get(&(job.tenant, shape.clone())).is_some_and(behind)
    }
}

#[cfg(test)]
#[path = "settled_tests.rs"]
mod tests;
