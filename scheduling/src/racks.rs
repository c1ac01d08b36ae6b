//! How many machines of each rack are idle: a job of one machine goes where the fewest are, so that others stay whole for gangs.

use std::collections::{BTreeMap, BTreeSet};

use statemachine::NodeId;
use statemachine::domain::{Level, Path};

#[derive(Clone, Debug, Default)]
pub(crate) struct Racks {
    by_path: BTreeMap<[String; Level::ALL.len()], usize>,
    of_node: BTreeMap<NodeId, usize>,
    racks: Vec<Rack>,
}

#[derive(Clone, Debug, Default)]
struct Rack {
    machines: BTreeSet<NodeId>,
    idle: BTreeSet<NodeId>,
}

/// A rack whose count has changed.
pub(crate) struct Recount {
    pub machines: Vec<NodeId>,
    pub before: usize,
    pub now: usize,
}

impl Racks {
    /// Idle machines in the rack of this one; 0 for one that is in none.
    pub fn idle_beside(&self, id: NodeId) -> usize {
        self.of_node.get(&id).map_or(0, |rack| self.racks[*rack].idle.len())
    }

    /// The machine stands in this rack, or in none. It must not count as idle.
    pub fn enter(&mut self, id: NodeId, path: Option<Path<'_>>) {
        if let Some(rack) = self.of_node.remove(&id) {
            self.racks[rack].machines.remove(&id);
        }
        let Some(path) = path else { return };
        let next = self.racks.len();
        let rack = *self.by_path.entry(path.map(str::to_owned)).or_insert(next);
        if rack == next {
            self.racks.push(Rack::default());
        }
        self.of_node.insert(id, rack);
        self.racks[rack].machines.insert(id);
    }

    /// Counts the machine as idle or not, where it is in a rack.
    pub fn count(&mut self, id: NodeId, is_idle: bool) -> Option<Recount> {
        let rack = &mut self.racks[*self.of_node.get(&id)?];
        let before = rack.idle.len();
        let changed = if is_idle { rack.idle.insert(id) } else { rack.idle.remove(&id) };
        changed.then(|| Recount { machines: rack.machines.iter().copied().collect(), before, now: rack.idle.len() })
    }
}
