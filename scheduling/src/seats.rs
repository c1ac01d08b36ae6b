//! For one shape: the machines that have room for a part of it, best fit first. Kept up to date while a plan takes
//! resources away, so that the n-th job of equal shape costs a look-up, not a scan. What is kept for tasks before it in
//! the order counts as taken from the bar on. Which of them a gang takes is `domains`' answer.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use statemachine::domain::{Level, Path};
use statemachine::fit;
use statemachine::record::{Alloc, Node};
use statemachine::spec::Shape;
use statemachine::{GpuTypeId, NodeId, State};

use crate::domains::{APART, Domains, along};
use crate::machines::{Cache, Machines, want_of};

/// A machine with room, in the order of best fit: the fewest free GPUs, the highest bandwidth in GB/s among those, the
/// fewest free cores, then the oldest node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seat {
    gpus_free: u32,
    gbps: Reverse<u32>,
    cores_free: u32,
    pub node: NodeId,
}

pub(crate) struct Seats<'a> {
    shape: &'a Shape,
    bar: u64,
    /// By the type of the GPUs; `None` for a shape without GPUs.
    by_type: BTreeMap<Option<GpuTypeId>, BTreeSet<Seat>>,
    of_node: BTreeMap<NodeId, Vec<(Option<GpuTypeId>, Seat)>>,
    /// The same as `by_type`, for a gang.
    domains: BTreeMap<Option<GpuTypeId>, Domains<'a>>,
    state: &'a State,
    /// How far `Machines::touched` was read.
    read: usize,
}

impl<'a> Seats<'a> {
    /// Looks at every machine once.
    pub(crate) fn new(machines: &Machines<'a>, cache: &mut Cache, shape: &'a Shape, bar: u64) -> Self {
        let mut seats = Self {
            shape,
            bar,
            by_type: BTreeMap::new(),
            of_node: BTreeMap::new(),
            domains: BTreeMap::new(),
            state: machines.state,
            read: machines.touched.len(),
        };
        for (node, _) in machines.state.nodes.iter() {
            seats.look_at(machines, cache, *node);
        }
        seats
    }

    /// Looks again at the machines that were touched since; their number.
    pub(crate) fn refresh(&mut self, machines: &Machines<'_>, cache: &mut Cache) -> u64 {
        let touched: BTreeSet<NodeId> = machines.touched[self.read..].iter().copied().collect();
        self.read = machines.touched.len();
        for node in &touched {
            self.look_at(machines, cache, *node);
        }
        touched.len() as u64
    }

    fn look_at(&mut self, machines: &Machines<'_>, cache: &mut Cache, node: NodeId) {
        for (gpu_type, seat) in self.of_node.remove(&node).unwrap_or_default() {
            self.by_type.entry(gpu_type).or_default().remove(&seat);
            if let Some(path) = self.path_for_gang(node) {
                self.domains.entry(gpu_type).or_default().remove(path, &seat);
            }
        }
        let seats = match machines.beside(node, self.bar) {
            Some((record, alloc)) if machines.takes_leases(node) && machines.is_open(node) => {
                seats_on(machines, cache, self.shape, (node, record, &alloc))
            }
            _ => Vec::new(),
        };
        for (gpu_type, seat) in &seats {
            self.by_type.entry(*gpu_type).or_default().insert(*seat);
            if let Some(path) = self.path_for_gang(node) {
                self.domains.entry(*gpu_type).or_default().insert(path, *seat);
            }
        }
        if !seats.is_empty() {
            self.of_node.insert(node, seats);
        }
    }

    /// The machine's domains, where the shape is a gang's.
    fn path_for_gang(&self, node: NodeId) -> Option<Path<'a>> {
        if self.shape.nodes < 2 {
            return None;
        }
        self.state.nodes.get(&node).map(|node| node.value.path())
    }

    /// Machines for the whole gang with the type of their GPUs, along their domains; `None` when too few have room.
    ///
    /// All get GPUs of one type where that is possible, in the shape's order of preference; a shape that accepts any
    /// gets the type whose machines are nearest to each other, then the one that fits best. Types are mixed only where the shape allows it and no single one suffices. Nodes
    /// on the list to avoid are taken only where others don't suffice.
    pub(crate) fn pick(&self, avoid: &VecDeque<NodeId>) -> Option<Vec<(NodeId, Option<GpuTypeId>)>> {
        let of = |gpu_type: &Option<GpuTypeId>| Some((*gpu_type, self.pick_type(gpu_type, avoid)?));
        let of_one_type = if self.shape.gpus_per_node() == 0 {
            of(&None)
        } else if self.shape.gpu_types.is_empty() {
            self.by_type.keys().filter_map(of).min_by_key(|(_, (spread, seats))| (*spread, fit_of(seats)))
        } else {
            self.shape.gpu_types.iter().find_map(|gpu_type| of(&Some(*gpu_type)))
        };
        let mut nodes: Vec<(NodeId, Option<GpuTypeId>)> = match of_one_type {
            Some((gpu_type, (_, seats))) => seats.into_iter().map(|seat| (seat.node, gpu_type)).collect(),
            None if self.shape.mix_types => self.pick_mixed(avoid)?,
            None => return None,
        };
        nodes.sort_by_key(|(id, _)| along(self.state, *id));
        Some(nodes)
    }

    /// Seats of one type, and how far they are spread, as `Domains::pick` tells it.
    fn pick_type(&self, gpu_type: &Option<GpuTypeId>, avoid: &VecDeque<NodeId>) -> Option<(usize, Vec<Seat>)> {
        let seats = self.by_type.get(gpu_type)?;
        if self.shape.nodes > 1 && avoid.is_empty() {
            return self.domains.get(gpu_type)?.pick(usize::from(self.shape.nodes), self.shape.topology);
        }
        self.nearest(seats.iter().map(|seat| (*seat, ())), avoid).map(|(spread, picked)| {
            let seats = picked.into_iter().map(|(seat, ())| seat);
            (spread, seats.collect())
        })
    }

    /// The best seat of each machine, whatever its type.
    fn pick_mixed(&self, avoid: &VecDeque<NodeId>) -> Option<Vec<(NodeId, Option<GpuTypeId>)>> {
        let best = self.of_node.values().filter_map(|seats| seats.iter().min_by_key(|(_, seat)| *seat));
        let sorted: BTreeSet<(Seat, Option<GpuTypeId>)> = best.map(|(gpu_type, seat)| (*seat, *gpu_type)).collect();
        let (_, picked) = self.nearest(sorted.iter().copied(), avoid)?;
        Some(picked.into_iter().map(|(seat, gpu_type)| (seat.node, gpu_type)).collect())
    }

    /// A gang's seats among these, as near to each other as they can be without those to avoid; the first ones where
    /// some of these are needed, or for a single machine.
    fn nearest<T: Copy>(
        &self,
        seats: impl Iterator<Item = (Seat, T)> + Clone,
        avoid: &VecDeque<NodeId>,
    ) -> Option<(usize, Vec<(Seat, T)>)> {
        if self.shape.nodes > 1 {
            let liked: BTreeMap<Seat, T> = seats.clone().filter(|(seat, _)| !avoid.contains(&seat.node)).collect();
            let mut domains = Domains::default();
            for seat in liked.keys() {
                domains.insert(along(self.state, seat.node).0, *seat);
            }
            if let Some((spread, picked)) = domains.pick(usize::from(self.shape.nodes), self.shape.topology) {
                return Some((spread, picked.into_iter().map(|seat| (seat, liked[&seat])).collect()));
            }
        }
        let picked = match self.shape.required_level() {
            Some(level) => self.first_inside(level, seats, avoid),
            None => self.first(seats, avoid),
        };
        picked.map(|picked| (APART, picked))
    }

    /// Seats of the domain in which the fewest of those to avoid are needed; of such the one with the fewest machines.
    fn first_inside<T: Copy>(
        &self,
        level: Level,
        seats: impl Iterator<Item = (Seat, T)>,
        avoid: &VecDeque<NodeId>,
    ) -> Option<Vec<(Seat, T)>> {
        let mut inside: BTreeMap<Path<'_>, Vec<(Seat, T)>> = BTreeMap::new();
        for (seat, what) in seats {
            if let Some(domain) = self.state.nodes.get(&seat.node).and_then(|node| node.value.domain(level)) {
                inside.entry(domain).or_default().push((seat, what));
            }
        }
        let picked =
            inside.into_values().filter_map(|seats| Some((seats.len(), self.first(seats.into_iter(), avoid)?)));
        let avoided = |seats: &[(Seat, T)]| seats.iter().filter(|(seat, _)| avoid.contains(&seat.node)).count();
        picked.min_by_key(|(size, seats)| (avoided(seats), *size)).map(|(_, seats)| seats)
    }

    /// As many seats as the gang has machines, from the front; those to avoid come last.
    fn first<T>(&self, seats: impl Iterator<Item = (Seat, T)>, avoid: &VecDeque<NodeId>) -> Option<Vec<(Seat, T)>> {
        let needed = usize::from(self.shape.nodes);
        let (mut picked, mut avoided) = (Vec::with_capacity(needed), Vec::new());
        for (seat, what) in seats {
            if picked.len() == needed {
                break;
            }
            if avoid.contains(&seat.node) { avoided.push((seat, what)) } else { picked.push((seat, what)) }
        }
        picked.extend(avoided.into_iter().take(needed - picked.len()));
        (picked.len() == needed).then_some(picked)
    }
}

/// How well a gang's seats fit: free GPUs left on its machines, then the lowest bandwidth. Less is better.
fn fit_of(seats: &[Seat]) -> (u32, Reverse<u32>) {
    let free = seats.iter().map(|seat| seat.gpus_free).sum();
    let slowest = seats.iter().map(|seat| seat.gbps.0).min().unwrap_or(0);
    (free, Reverse(slowest))
}

/// A machine's seats for the shape within what is free there, by the type of the GPUs.
pub(crate) fn seats_on(
    machines: &Machines<'_>,
    cache: &mut Cache,
    shape: &Shape,
    (id, node, alloc): (NodeId, &Node, &Alloc),
) -> Vec<(Option<GpuTypeId>, Seat)> {
    if fit::room_for(node, alloc, shape).is_err() {
        return Vec::new();
    }
    let cores_free = fit::cores_of(&alloc.cores_free);
    let Some(want) = want_of(shape) else {
        // Jobs without GPUs go where they take cores from no free GPU.
        let gpus_free = fit::usable_gpus(node, alloc, &[]).count_ones();
        return vec![(None, Seat { gpus_free, gbps: Reverse(0), cores_free, node: id })];
    };
    let mut seats = Vec::new();
    for gpu_type in fit::acceptable_types(node, shape) {
        let usable = fit::usable_gpus(node, alloc, &[gpu_type]);
        if let Ok(choice) = cache.choose(machines.state, node.class, usable, want) {
            let seat =
                Seat { gpus_free: usable.count_ones(), gbps: Reverse(choice.mbps / 1_000), cores_free, node: id };
            seats.push((Some(gpu_type), seat));
        }
    }
    seats
}
