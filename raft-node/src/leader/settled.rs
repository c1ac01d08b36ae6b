//! When another planning cycle is worth nothing: a pure memory of the last one.

use std::collections::BTreeSet;

use scheduling::plan::{Limits, Plan};
use scheduling::reason::Reason;
use statemachine::event::Change;
use statemachine::record::{Alloc, Node, Versioned};
use statemachine::spec::Shape;
use statemachine::table::Table;
use statemachine::{NodeId, Revision, State};

/// A complete cycle that could place nothing: while the machines stay as they were, only a shape that it did not look
/// at can start. So a stream of submissions that wait costs a look at each, not at the whole queue.
pub struct Settled {
    nodes: Table<NodeId, Versioned<Node>>,
    allocs: Table<NodeId, Alloc>,
    unheard: BTreeSet<NodeId>,
    /// Shapes that find no room.
    waiting: BTreeSet<Shape>,
    seen: Revision,
    /// What operators had decided.
    policy: u64,
}

impl Settled {
    /// `None` when the cycle was not complete, or placed something.
    pub fn after(plan: &Plan, limits: &Limits, state: &State, unheard: BTreeSet<NodeId>) -> Option<Self> {
        if plan.unfinished || limits.after.is_some() || !plan.places.is_empty() {
            return None;
        }
        let mut waiting = BTreeSet::new();
        for (task, reason) in &plan.reasons {
            // The bound of one tenant says nothing about the shape.
            if matches!(**reason, Reason::Quota { .. }) {
                continue;
            }
            let shape = &state.jobs.get(&task.job)?.value.spec.shape;
            if !waiting.contains(shape) {
                waiting.insert(shape.clone());
            }
        }
        Some(Self {
            nodes: state.nodes.clone(),
            allocs: state.allocs.clone(),
            unheard,
            waiting,
            seen: state.meta.rev,
            policy: state.meta.policy,
        })
    }

    /// False as soon as a machine changed, or a shape waits that was not looked at.
    pub fn still_holds(&mut self, state: &State, unheard: &BTreeSet<NodeId>) -> bool {
        if state.meta.policy != self.policy
            || *unheard != self.unheard
            || !state.nodes.is_same(&self.nodes)
            || !state.allocs.is_same(&self.allocs)
        {
            return false;
        }
        let Ok(mut events) = state.events_since(self.seen) else { return false };
        let new_shape = events.any(|event| match &event.what {
            Change::Queued { place } => {
                state.jobs.get(&place.task.job).is_some_and(|job| !self.waiting.contains(&job.value.spec.shape))
            }
            _ => false,
        });
        self.seen = state.meta.rev;
        !new_shape
    }
}
