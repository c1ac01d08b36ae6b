//! Machines by the levels of the network: which domain a gang goes to, and the order of its ranks.
//!
//! A machine's domains are its labels `block`, `rack` and `switch`, outermost first; a label that it lacks says nothing, and
//! machines without any lie side by side as if there were no levels. A gang goes to the smallest domain that holds it: the
//! innermost level at which one does, and there the domain with the fewest machines that have room, so that emptier ones
//! stay whole. One that no domain holds fills as few as it can. Which seats a machine offers is `seats`'.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use statemachine::record::Node;
use statemachine::{NodeId, State};

use crate::seats::Seat;

/// The labels that name a machine's domains, outermost first.
pub const LEVELS: [&str; 3] = ["block", "rack", "switch"];

/// A machine's domain at each level; empty = its labels name none.
pub(crate) type Path<'a> = [&'a str; LEVELS.len()];

pub(crate) fn path_of(node: &Node) -> Path<'_> {
    LEVELS.map(|level| node.labels.get(level).map_or("", String::as_str))
}

/// Where a machine stands among those that its gang's ranks go along: neighbours in a domain follow each other.
pub(crate) fn along(state: &State, id: NodeId) -> (Path<'_>, NodeId) {
    (state.nodes.get(&id).map_or([""; LEVELS.len()], |node| path_of(&node.value)), id)
}

/// The seats of one type by domain, with what each domain has room for counted as seats come and go.
#[derive(Debug, Default)]
pub(crate) struct Domains<'a> {
    seats: BTreeMap<Path<'a>, BTreeSet<Seat>>,
    counts: BTreeMap<(usize, Path<'a>), usize>,
    /// By level and count: the first one that is large enough is the one that fits best.
    sizes: BTreeSet<(usize, usize, Path<'a>)>,
}

impl<'a> Domains<'a> {
    pub(crate) fn insert(&mut self, path: Path<'a>, seat: Seat) {
        if self.seats.entry(path).or_default().insert(seat) {
            self.recount(path, |count| count + 1);
        }
    }

    pub(crate) fn remove(&mut self, path: Path<'a>, seat: &Seat) {
        let Some(seats) = self.seats.get_mut(&path).filter(|seats| seats.contains(seat)) else { return };
        seats.remove(seat);
        if seats.is_empty() {
            self.seats.remove(&path);
        }
        self.recount(path, |count| count - 1);
    }

    /// Of each level at which the path names a domain.
    fn recount(&mut self, path: Path<'a>, change: impl Fn(usize) -> usize) {
        for level in (0..LEVELS.len()).filter(|level| !path[*level].is_empty()) {
            let domain = down_to(path, level);
            let before = self.counts.remove(&(level, domain)).unwrap_or(0);
            self.sizes.remove(&(level, before, domain));
            let after = change(before);
            if after > 0 {
                self.counts.insert((level, domain), after);
                self.sizes.insert((level, after, domain));
            }
        }
    }

    /// So many seats, as near to each other as they can be, and how near: 0 = in one innermost domain, `LEVELS.len()` = in
    /// none. `None` when there are not as many.
    pub(crate) fn pick(&self, needed: usize) -> Option<(usize, Vec<Seat>)> {
        for level in (0..LEVELS.len()).rev() {
            let large = self.sizes.range((level, needed, [""; LEVELS.len()])..);
            let Some((_, _, domain)) = large.take_while(|(at, ..)| *at == level).next() else { continue };
            let inside = self.seats.range(*domain..).take_while(|(path, _)| down_to(**path, level) == *domain);
            let inside: Vec<Leaf<'_>> = inside.map(|(path, seats)| (*path, seats)).collect();
            return Some((LEVELS.len() - 1 - level, fill(&inside, level + 1, needed)));
        }
        let all: Vec<Leaf<'_>> = self.seats.iter().map(|(path, seats)| (*path, seats)).collect();
        (room_in(&all) >= needed).then(|| (LEVELS.len(), fill(&all, 0, needed)))
    }
}

/// The machines of one path.
type Leaf<'a> = (Path<'a>, &'a BTreeSet<Seat>);

fn down_to(path: Path<'_>, level: usize) -> Path<'_> {
    let mut domain = path;
    domain[level + 1..].fill("");
    domain
}

fn room_in(leaves: &[Leaf<'_>]) -> usize {
    leaves.iter().map(|(_, seats)| seats.len()).sum()
}

/// `needed` of the seats, which are at least as many, in as few domains of this level and those below as can be: the
/// largest whole, what is left in the one that it fits best.
fn fill(leaves: &[Leaf<'_>], level: usize, needed: usize) -> Vec<Seat> {
    if leaves.len() < 2 || level == LEVELS.len() {
        return leaves.iter().flat_map(|(_, seats)| seats.iter().copied()).take(needed).collect();
    }
    let mut groups: Vec<&[Leaf<'_>]> = leaves.chunk_by(|a, b| a.0[level] == b.0[level]).collect();
    let is_named = |group: &&[Leaf<'_>]| group.iter().all(|(path, _)| !path[level].is_empty());
    let (mut picked, mut missing) = (Vec::with_capacity(needed), needed);
    while missing > 0 && !groups.is_empty() {
        let numbered = || groups.iter().enumerate();
        // Machines without a domain at this level are near nobody there: they come last.
        let best = numbered().filter(|(_, group)| is_named(group) && room_in(group) >= missing);
        let best = best.min_by_key(|(_, group)| room_in(group));
        let largest = || numbered().min_by_key(|(_, group)| (!is_named(group), Reverse(room_in(group))));
        let Some(at) = best.or_else(largest).map(|(at, _)| at) else { break };
        let group = groups.remove(at);
        let taken = missing.min(room_in(group));
        picked.extend(fill(group, level + 1, taken));
        missing -= taken;
    }
    picked
}
