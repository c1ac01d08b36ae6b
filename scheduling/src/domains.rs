//! Machines by the levels of the network: which domain a gang goes to, and the order of its ranks.
//!
//! Machines without labels lie side by side as if there were no levels (`statemachine::domain` says what a domain is). A gang
//! goes to the smallest domain that holds it: the innermost level at which one does, or first of all the level that it prefers,
//! and there the domain with the fewest machines that have room, so that emptier ones stay whole. One that no domain holds
//! fills as few as it can, unless it requires one. Which seats a machine offers is `seats`'.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use statemachine::domain::{Level, Path, Topology, down_to};
use statemachine::record::Node;
use statemachine::spec::Shape;
use statemachine::{NodeId, State};

use crate::seats::Seat;

/// The path of machines without labels, before all others.
pub(crate) const NOWHERE: Path<'static> = [""; Level::ALL.len()];

/// The domain in which a gang of this shape would be with this machine, where it must be in one; else all are in one. `None`:
/// the machine is in no such domain.
pub(crate) fn domain_for<'a>(node: &'a Node, shape: &Shape) -> Option<Path<'a>> {
    shape.required_level().map_or(Some(NOWHERE), |level| node.domain(level))
}

/// Where a machine stands among those that its gang's ranks go along: neighbours in a domain follow each other.
pub(crate) fn along(state: &State, id: NodeId) -> (Path<'_>, NodeId) {
    (state.nodes.get(&id).map_or(NOWHERE, |node| node.value.path()), id)
}

/// The seats of one type by domain, with what each domain has room for counted as seats come and go.
#[derive(Debug, Default)]
pub(crate) struct Domains<'a> {
    seats: BTreeMap<Path<'a>, BTreeSet<Seat>>,
    counts: BTreeMap<(Level, Path<'a>), usize>,
    /// By level and count: the first one that is large enough is the one that fits best.
    sizes: BTreeSet<(Level, usize, Path<'a>)>,
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
        for level in Level::ALL.into_iter().filter(|level| !path[*level as usize].is_empty()) {
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

    /// So many seats, as near to each other as they can be or the job wants them, and how near: 0 = in one of the best
    /// domains, `APART` = in none. `None` when there are not as many.
    pub(crate) fn pick(&self, needed: usize, wanted: Option<Topology>) -> Option<(usize, Vec<Seat>)> {
        // A switch outside all racks is in no rack.
        let required = wanted.filter(|topology| topology.required).map(|topology| topology.level as usize);
        let has_required = |path: &Path<'_>| required.is_none_or(|level| !path[level].is_empty());
        for (spread, level) in levels(wanted).enumerate() {
            let large = self.sizes.range((level, needed, NOWHERE)..);
            let mut large = large.take_while(|(at, ..)| *at == level);
            let Some((_, _, domain)) = large.find(|(.., path)| has_required(path)) else { continue };
            let inside = self.seats.range(*domain..).take_while(|(path, _)| down_to(**path, level) == *domain);
            let inside: Vec<Leaf<'_>> = inside.map(|(path, seats)| (*path, seats)).collect();
            return Some((spread, fill(&inside, level as usize + 1, needed)));
        }
        if required.is_some() {
            return None;
        }
        let all: Vec<Leaf<'_>> = self.seats.iter().map(|(path, seats)| (*path, seats)).collect();
        (room_in(&all) >= needed).then(|| (APART, fill(&all, 0, needed)))
    }
}

/// How near the seats of no one domain are, as `Domains::pick` tells it.
pub(crate) const APART: usize = Level::ALL.len();

/// The levels at which a domain will do, the best first.
fn levels(wanted: Option<Topology>) -> impl Iterator<Item = Level> {
    let will_do = move |level: &Level| wanted.is_none_or(|it| !it.required || *level >= it.level);
    let preferred = wanted.filter(|it| !it.required).map(|it| it.level);
    let others = Level::ALL.into_iter().rev().filter(move |level| will_do(level) && preferred != Some(*level));
    preferred.into_iter().chain(others)
}

/// The machines of one path.
type Leaf<'a> = (Path<'a>, &'a BTreeSet<Seat>);

fn room_in(leaves: &[Leaf<'_>]) -> usize {
    leaves.iter().map(|(_, seats)| seats.len()).sum()
}

/// `needed` of the seats, which are at least as many, in as few domains of this level and those below as can be: the
/// largest whole, what is left in the one that it fits best.
fn fill(leaves: &[Leaf<'_>], level: usize, needed: usize) -> Vec<Seat> {
    if leaves.len() < 2 || level == Level::ALL.len() {
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
