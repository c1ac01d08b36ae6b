//! Whose desired set may have changed: a pure reader of the events.

use std::collections::{BTreeMap, BTreeSet};

use statemachine::event::Change;
use statemachine::{NodeId, Revision, State, Token};

/// Follows the events, and knows where each live lease is: the event of a closed lease names only its token.
pub struct Touched {
    seen: Revision,
    nodes: BTreeMap<Token, Vec<NodeId>>,
}

impl Touched {
    pub fn new(state: &State) -> Self {
        let nodes = state
            .leases
            .iter()
            .map(|(token, lease)| (*token, lease.value.parts.iter().map(|part| part.node).collect()));
        Self { seen: state.meta.rev, nodes: nodes.collect() }
    }

    /// Nodes whose desired set may have changed since the last call; `None` = any may have.
    pub fn follow(&mut self, state: &State) -> Option<BTreeSet<NodeId>> {
        let Ok(events) = state.events_since(self.seen) else {
            *self = Self::new(state);
            return None;
        };
        let mut touched = BTreeSet::new();
        for event in events {
            match &event.what {
                Change::LeaseShown { token, lease } => {
                    let nodes: Vec<NodeId> = lease.parts.iter().map(|part| part.node).collect();
                    touched.extend(nodes.iter().copied());
                    self.nodes.insert(*token, nodes);
                }
                Change::LeaseClosed { token } => touched.extend(self.nodes.remove(token).unwrap_or_default()),
                // Another epoch or host is another desired set.
                Change::NodeShown { node, .. } => {
                    touched.insert(*node);
                }
                _ => {}
            }
        }
        self.seen = state.meta.rev;
        Some(touched)
    }
}
