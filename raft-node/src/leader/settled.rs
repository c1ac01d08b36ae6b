//! When another planning cycle is worth nothing: a pure memory of the last one.

use std::collections::{BTreeMap, BTreeSet};

use scheduling::plan::{Limits, Plan};
use scheduling::reason::Reason;
use statemachine::event::Change;
use statemachine::record::{Alloc, Job, Node, Versioned};
use statemachine::spec::{JobSpec, Shape};
use statemachine::table::Table;
use statemachine::{NodeId, Revision, State, TenantId};

/// A complete cycle that could place nothing: while the machines stay as they were, only a shape that it did not look
/// at can start, or one that goes before those whose reservations are in its way. So a stream of submissions that wait
/// costs a look at each, not at the whole queue.
pub struct Settled {
    nodes: Table<NodeId, Versioned<Node>>,
    allocs: Table<NodeId, Alloc>,
    unheard: BTreeSet<NodeId>,
    /// Shapes that find no room.
    waiting: BTreeSet<Shape>,
    /// Shapes that find only what is kept for another task: by tenant, the first that did.
    barred: BTreeMap<(TenantId, Shape), First>,
    /// Cluster time from which those may stand in front: the order of who waits changes with time alone.
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

impl Settled {
    /// `None` when the cycle was not complete, or placed something, or somebody makes room or could soon.
    pub fn after(plan: &Plan, limits: &Limits, state: &State, unheard: BTreeSet<NodeId>) -> Option<Self> {
        let under_way = !plan.preempts.is_empty() || plan.preempts_later || !state.claims.is_empty();
        if plan.unfinished || limits.after.is_some() || !plan.places.is_empty() || under_way {
            return None;
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
        Some(Self {
            nodes: state.nodes.clone(),
            allocs: state.allocs.clone(),
            unheard,
            waiting,
            until_ms: if barred.is_empty() { u64::MAX } else { state.meta.clock_ms.saturating_add(ORDER_KEEPS_MS) },
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
            || !state.allocs.is_same(&self.allocs)
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
