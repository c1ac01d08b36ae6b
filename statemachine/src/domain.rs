//! The levels of the network, named by labels of the machines, and how near to each other a gang wants its own.
//!
//! Two machines are in one domain of a level when they carry its label and agree on it and on those outside it. A label
//! that a machine lacks says nothing: it is in no domain of that level.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::id::NodeId;
use crate::record::Node;
use crate::spec::Shape;
use crate::state::State;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Level {
    Block,
    Rack,
    Switch,
}

impl Level {
    /// Outermost first.
    pub const ALL: [Level; 3] = [Level::Block, Level::Rack, Level::Switch];

    /// The label that names a machine's domain.
    pub fn name(self) -> &'static str {
        match self {
            Level::Block => "block",
            Level::Rack => "rack",
            Level::Switch => "switch",
        }
    }
}

/// A machine's domain at each level; empty = its labels name none.
pub type Path<'a> = [&'a str; Level::ALL.len()];

/// The path as far as this level, which names a domain there.
pub fn down_to(path: Path<'_>, level: Level) -> Path<'_> {
    let mut domain = path;
    domain[level as usize + 1..].fill("");
    domain
}

impl Node {
    pub fn path(&self) -> Path<'_> {
        Level::ALL.map(|level| self.labels.get(level.name()).map_or("", String::as_str))
    }

    /// The domain of this level that it is in.
    pub fn domain(&self, level: Level) -> Option<Path<'_>> {
        let path = self.path();
        (!path[level as usize].is_empty()).then(|| down_to(path, level))
    }
}

/// What a job says of the machines of its gang.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Topology {
    pub level: Level,
    /// All in one domain of the level, or nowhere; otherwise in one where one has room.
    pub required: bool,
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.level.name(), if self.required { "require" } else { "prefer" })
    }
}

impl FromStr for Topology {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(':').and_then(|(level, how)| {
            let level = Level::ALL.into_iter().find(|known| known.name() == level)?;
            let required = [("require", true), ("prefer", false)].into_iter().find(|(word, _)| *word == how)?.1;
            Some(Self { level, required })
        });
        parts.ok_or_else(|| {
            let levels = Level::ALL.map(Level::name).join(", ");
            format!("{text:?}; LEVEL:require or LEVEL:prefer, where LEVEL is one of {levels}")
        })
    }
}

impl Shape {
    /// The level in one domain of which all its machines must be: a machine alone always is.
    pub fn required_level(&self) -> Option<Level> {
        self.topology.filter(|topology| topology.required && self.nodes > 1).map(|topology| topology.level)
    }
}

impl State {
    /// These machines are as near to each other as the shape requires.
    pub fn are_near_enough(&self, shape: &Shape, nodes: impl IntoIterator<Item = NodeId>) -> bool {
        let Some(level) = shape.required_level() else { return true };
        let mut domains = nodes.into_iter().map(|id| self.nodes.get(&id)?.value.domain(level));
        domains.next().flatten().is_some_and(|first| domains.all(|other| other == Some(first)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topology_is_read_as_it_is_written() {
        for level in Level::ALL {
            for required in [false, true] {
                let topology = Topology { level, required };
                assert_eq!(topology.to_string().parse(), Ok(topology));
            }
        }
        for wrong in ["", "rack", "rack:", "rack:required", "row:prefer", ":require", "rack:require:x"] {
            let told = wrong.parse::<Topology>().unwrap_err();
            assert!(told.contains(&format!("{wrong:?}")) && told.contains("block, rack, switch"), "{told}");
        }
    }
}
