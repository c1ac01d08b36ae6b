//! How many machines of each rack are idle: a job of one machine goes where the fewest are, so that others stay whole for gangs.

use std::collections::BTreeMap;

use statemachine::NodeId;
use statemachine::domain::{Level, Path};

#[derive(Clone, Debug, Default)]
pub(crate) struct Racks {
    by_path: BTreeMap<[String; Level::ALL.len()], usize>,
    of_node: BTreeMap<NodeId, usize>,
    /// Idle machines of each.
    idle: Vec<usize>,
}

impl Racks {
    /// The number of the machine's rack, if it is in one.
    pub fn of(&self, id: NodeId) -> Option<usize> {
        self.of_node.get(&id).copied()
    }

    /// Idle machines of the rack; 0 where there is none.
    pub fn idle(&self, rack: Option<usize>) -> usize {
        rack.map_or(0, |rack| self.idle[rack])
    }

    /// The machine stands in this rack, or in none. It must not count as idle.
    pub fn enter(&mut self, id: NodeId, path: Option<Path<'_>>) {
        self.of_node.remove(&id);
        let Some(path) = path else { return };
        let next = self.idle.len();
        let rack = *self.by_path.entry(path.map(str::to_owned)).or_insert(next);
        if rack == next {
            self.idle.push(0);
        }
        self.of_node.insert(id, rack);
    }

    /// One machine more is idle there, or one less.
    pub fn count(&mut self, rack: Option<usize>, is_idle: bool) {
        if let Some(rack) = rack {
            self.idle[rack] = if is_idle { self.idle[rack] + 1 } else { self.idle[rack] - 1 };
        }
    }
}
