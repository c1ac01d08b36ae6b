//! For one shape: the machines that have room for a part of it, best fit first. Kept up to date while a plan takes
//! resources away, so that the n-th job of equal shape costs a look-up, not a scan. What is kept for tasks before it in
//! the order counts as taken from the bar on.
//!
//! Machines that are alike offer the same. For a job of one machine, whichever it is, their groups are ranked; for others the
//! machines with room are listed. Which of them a gang takes is `domains`' answer.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use statemachine::domain::{Level, Path};
use statemachine::fit;
use statemachine::record::{Alloc, Node, NodeAdmin};
use statemachine::spec::Shape;
use statemachine::{GpuTypeId, NodeId, State};

use crate::cache::{Cache, Choices};
use crate::domains::{APART, Domains, along};
use crate::fleet::{self, Face, Fleet, Grouped};
use crate::machines::{Machines, want_of};

/// A machine with room, in the order of best fit, then the oldest node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seat {
    offer: Offer,
    pub node: NodeId,
}

/// How well a machine fits: the fewest free GPUs, the highest bandwidth in GB/s among those, the fewest free cores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Offer {
    gpus_free: u32,
    gbps: Reverse<u32>,
    cores_free: u32,
}

/// By the type of the GPUs; `None` for a shape without GPUs.
type Offers = Vec<(Option<GpuTypeId>, Offer)>;

pub(crate) struct Seats<'a> {
    shape: &'a Shape,
    bar: u64,
    state: &'a State,
    kind: Kind<'a>,
}

enum Kind<'a> {
    Ranked(Ranking),
    Listed(Listing<'a>),
}

/// Groups of machines, the best first.
#[derive(Default)]
struct Ranking {
    by_type: BTreeMap<Option<GpuTypeId>, BTreeSet<(Offer, usize)>>,
    /// How far `Fleet::born` was read.
    read: usize,
}

/// Machines one by one.
#[derive(Default)]
struct Listing<'a> {
    /// Those that the job may be on; absent = all.
    among: Option<BTreeSet<NodeId>>,
    by_type: BTreeMap<Option<GpuTypeId>, BTreeSet<Seat>>,
    of_node: BTreeMap<NodeId, Offers>,
    /// The same as `by_type`, for a gang.
    domains: BTreeMap<Option<GpuTypeId>, Domains<'a>>,
    /// How far `Machines::touched` was read.
    read: usize,
}

impl<'a> Seats<'a> {
    /// Looks at each group of machines once, and enters those that are listed; with the number of looks. The fleet has
    /// followed the plan.
    pub(crate) fn new(machines: &Machines<'a>, cache: &mut Cache, shape: &'a Shape, bar: u64) -> (Self, u64) {
        let among = among(machines, &mut cache.fleet, shape);
        let (choices, fleet) = (&mut cache.choices, &cache.fleet);
        let kind = match shape.nodes == 1 && among.is_none() {
            true => Kind::Ranked(Ranking { read: fleet.born().len(), ..Ranking::default() }),
            false => Kind::Listed(Listing { read: machines.touched.len(), ..Listing::default() }),
        };
        let mut seats = Self { shape, bar, state: machines.state, kind };
        let groups = fleet.alike(among.as_deref());
        let mut looks = groups.len() as u64;
        for alike in &groups {
            let offers = offers_of(machines, choices, alike.face, (shape, bar));
            match &mut seats.kind {
                Kind::Ranked(ranking) => ranking.enter(alike.number, &offers),
                Kind::Listed(listing) if !offers.is_empty() => {
                    looks += alike.nodes.len() as u64;
                    alike
                        .nodes
                        .iter()
                        .for_each(|node| listing.enter(path_for(machines.state, shape, node), node, &offers));
                }
                Kind::Listed(_) => {}
            }
        }
        if let Kind::Listed(listing) = &mut seats.kind {
            listing.among = among.map(|grouped| grouped.values().flatten().copied().collect());
        }
        (seats, looks)
    }

    /// Looks again at what was touched since; the number of looks. The fleet has followed the plan.
    pub(crate) fn refresh(&mut self, machines: &Machines<'a>, cache: &mut Cache) -> u64 {
        let (choices, fleet) = (&mut cache.choices, &cache.fleet);
        let asked = (self.shape, self.bar);
        match &mut self.kind {
            Kind::Ranked(ranking) => {
                let born = &fleet.born()[ranking.read..];
                ranking.read += born.len();
                for number in born {
                    ranking.enter(*number, &offers_of(machines, choices, &fleet.group(*number).face, asked));
                }
                born.len() as u64
            }
            Kind::Listed(listing) => {
                let touched: BTreeSet<NodeId> = machines.touched[listing.read..].iter().copied().collect();
                listing.read = machines.touched.len();
                for node in &touched {
                    let path = path_for(self.state, self.shape, *node);
                    listing.leave(path, *node);
                    if listing.among.as_ref().is_none_or(|among| among.contains(node)) {
                        let face = fleet.of(*node).map(|number| &fleet.group(number).face);
                        let offers = face.map(|face| offers_of(machines, choices, face, asked));
                        listing.enter(path, *node, &offers.unwrap_or_default());
                    }
                }
                touched.len() as u64
            }
        }
    }

    /// Machines for the whole gang with the type of their GPUs, along their domains; `None` when too few have room.
    ///
    /// All get GPUs of one type where that is possible, in the shape's order of preference; a shape that accepts any
    /// gets the type whose machines are nearest to each other, then the one that fits best. Types are mixed only where the shape allows it and no single one suffices. Nodes
    /// on the list to avoid are taken only where others don't suffice.
    pub(crate) fn pick(&mut self, fleet: &Fleet, avoid: &VecDeque<NodeId>) -> Option<Vec<(NodeId, Option<GpuTypeId>)>> {
        if let Kind::Ranked(ranking) = &mut self.kind {
            ranking.forget_empty(fleet);
        }
        let of = |gpu_type: &Option<GpuTypeId>| Some((*gpu_type, self.pick_type(fleet, gpu_type, avoid)?));
        let of_one_type = if self.shape.gpus_per_node() == 0 {
            of(&None)
        } else if self.shape.gpu_types.is_empty() {
            self.types()
                .into_iter()
                .filter_map(|gpu_type| of(&gpu_type))
                .min_by_key(|(_, (spread, seats))| (*spread, fit_of(seats)))
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

    /// The types of which there may be seats.
    fn types(&self) -> Vec<Option<GpuTypeId>> {
        match &self.kind {
            Kind::Ranked(ranking) => ranking.by_type.keys().copied().collect(),
            Kind::Listed(listing) => listing.by_type.keys().copied().collect(),
        }
    }

    /// Seats of one type, and how far they are spread, as `Domains::pick` tells it.
    fn pick_type(
        &self,
        fleet: &Fleet,
        gpu_type: &Option<GpuTypeId>,
        avoid: &VecDeque<NodeId>,
    ) -> Option<(usize, Vec<Seat>)> {
        let listing = match &self.kind {
            Kind::Ranked(ranking) => return ranking.first(fleet, gpu_type, avoid).map(|seat| (APART, vec![seat])),
            Kind::Listed(listing) => listing,
        };
        let seats = listing.by_type.get(gpu_type)?;
        if self.shape.nodes > 1 && avoid.is_empty() {
            return listing.domains.get(gpu_type)?.pick(usize::from(self.shape.nodes), self.shape.topology);
        }
        self.nearest(seats.iter().map(|seat| (*seat, ())), avoid).map(|(spread, picked)| {
            let seats = picked.into_iter().map(|(seat, ())| seat);
            (spread, seats.collect())
        })
    }

    /// The best seat of each machine, whatever its type; a machine alone is never mixed.
    fn pick_mixed(&self, avoid: &VecDeque<NodeId>) -> Option<Vec<(NodeId, Option<GpuTypeId>)>> {
        let Kind::Listed(listing) = &self.kind else { return None };
        let best = listing.of_node.iter().filter_map(|(node, offers)| {
            let (gpu_type, offer) = offers.iter().min_by_key(|(_, offer)| *offer)?;
            Some((Seat { offer: *offer, node: *node }, *gpu_type))
        });
        let sorted: BTreeSet<(Seat, Option<GpuTypeId>)> = best.collect();
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

impl Ranking {
    fn enter(&mut self, number: usize, offers: &Offers) {
        for (gpu_type, offer) in offers {
            self.by_type.entry(*gpu_type).or_default().insert((*offer, number));
        }
    }

    /// Groups in front that have no machine left; one that gets a machine again is born again.
    fn forget_empty(&mut self, fleet: &Fleet) {
        for ranked in self.by_type.values_mut() {
            while ranked.first().is_some_and(|(_, number)| fleet.group(*number).nodes.is_empty()) {
                ranked.pop_first();
            }
        }
    }

    /// The best seat on a machine that is not to be avoided, else on one that is; of equal ones that in whose rack the fewest machines
    /// are idle.
    fn first(&self, fleet: &Fleet, gpu_type: &Option<GpuTypeId>, avoid: &VecDeque<NodeId>) -> Option<Seat> {
        let ranked = self.by_type.get(gpu_type)?;
        let best = |may_be: &dyn Fn(&NodeId) -> bool| {
            let mut best: Option<(Offer, usize, NodeId)> = None;
            for (offer, number) in ranked {
                if best.is_some_and(|(known, ..)| known < *offer) {
                    break;
                }
                let first = fleet.first_of(*number, may_be);
                best = best.into_iter().chain(first.map(|(idle, node)| (*offer, idle, node))).min();
            }
            best.map(|(offer, _, node)| Seat { offer, node })
        };
        best(&|node| !avoid.contains(node)).or_else(|| best(&|_| true))
    }
}

impl<'a> Listing<'a> {
    fn enter(&mut self, path: Option<Path<'a>>, node: NodeId, offers: &Offers) {
        for (gpu_type, offer) in offers {
            let seat = Seat { offer: *offer, node };
            self.by_type.entry(*gpu_type).or_default().insert(seat);
            if let Some(path) = path {
                self.domains.entry(*gpu_type).or_default().insert(path, seat);
            }
        }
        if !offers.is_empty() {
            self.of_node.insert(node, offers.clone());
        }
    }

    fn leave(&mut self, path: Option<Path<'a>>, node: NodeId) {
        for (gpu_type, offer) in self.of_node.remove(&node).unwrap_or_default() {
            let seat = Seat { offer, node };
            self.by_type.entry(gpu_type).or_default().remove(&seat);
            if let Some(path) = path {
                self.domains.entry(gpu_type).or_default().remove(path, &seat);
            }
        }
    }
}

/// Enough machines have seats for the shape beside nothing that is kept, wherever they are. The fleet has followed the plan.
pub(crate) fn has_enough(machines: &Machines<'_>, cache: &mut Cache, shape: &Shape) -> bool {
    let among = among(machines, &mut cache.fleet, shape);
    let (choices, fleet) = (&mut cache.choices, &cache.fleet);
    let mut counts: BTreeMap<Option<GpuTypeId>, usize> = BTreeMap::new();
    fleet.alike(among.as_deref()).iter().any(|alike| {
        let offers = offers_of(machines, choices, alike.face, (shape, 0));
        // Where types may be mixed, each machine counts once.
        let kinds = offers.iter().map(|(gpu_type, _)| gpu_type.filter(|_| !shape.mix_types));
        let most = if shape.mix_types { 1 } else { offers.len() };
        kinds.take(most).any(|kind| {
            let count = counts.entry(kind).or_default();
            *count += alike.nodes.len();
            *count >= usize::from(shape.nodes)
        })
    })
}

/// The shape has too few seats, as it had when that was last found: no machine that has changed since offers one. The fleet has followed the
/// plan.
pub(crate) fn is_seatless_still(machines: &Machines<'_>, cache: &mut Cache, shape: &Shape) -> bool {
    let Cache { choices, fleet, seatless, .. } = cache;
    let entered = seatless.since(shape).and_then(|moves| fleet.entered_since(moves));
    let is_seatless = entered.is_some_and(|groups| {
        let mut faces = groups.into_iter().map(|number| &fleet.group(number).face);
        faces.all(|face| offers_of(machines, choices, face, (shape, 0)).is_empty())
    });
    if is_seatless {
        seatless.note(shape, fleet.moves());
    }
    is_seatless
}

/// The machines that a shape's job may be on, where its own word or its window says which.
fn among(machines: &Machines<'_>, fleet: &mut Fleet, shape: &Shape) -> Option<Arc<Grouped>> {
    let chosen = shape.machines.as_ref().map(|selector| fleet.chosen(selector));
    let open = fleet.in_window(machines, chosen.as_ref()).map(Arc::new);
    open.or_else(|| chosen.map(|chosen| chosen.grouped))
}

/// The machine's domains, where the shape is a gang's.
fn path_for<'a>(state: &'a State, shape: &Shape, node: NodeId) -> Option<Path<'a>> {
    if shape.nodes < 2 {
        return None;
    }
    state.nodes.get(&node).map(|node| node.value.path())
}

/// How well a gang's seats fit: free GPUs left on its machines, then the lowest bandwidth. Less is better.
fn fit_of(seats: &[Seat]) -> (u32, Reverse<u32>) {
    let free = seats.iter().map(|seat| seat.offer.gpus_free).sum();
    let slowest = seats.iter().map(|seat| seat.offer.gbps.0).min().unwrap_or(0);
    (free, Reverse(slowest))
}

/// What each machine with this face offers to the shape, beside what is kept there from the bar on.
fn offers_of(machines: &Machines<'_>, choices: &mut Choices, face: &Face, (shape, bar): (&Shape, u64)) -> Offers {
    let Some(alone) = &face.alone else { return offers(machines.state, choices, face, shape) };
    let beside = if face.has_room() { machines.face_beside(alone.node, bar) } else { None };
    beside.map_or_else(Vec::new, |beside| offers(machines.state, choices, &beside, shape))
}

/// What a machine with this face offers to the shape, where it may be on it at all.
fn offers(state: &State, choices: &mut Choices, face: &Face, shape: &Shape) -> Offers {
    let (cores, mem_mib) = face.total.request(shape);
    if !face.has_room() || face.cores_free < cores || face.mem_free_mib < mem_mib {
        return Vec::new();
    }
    let cores_free = face.cores_free;
    let Some(want) = want_of(shape) else {
        // Jobs without GPUs go where they take cores from no free GPU.
        let gpus_free = face.kinds.iter().map(|kind| kind.usable.count_ones()).sum();
        return vec![(None, Offer { gpus_free, gbps: Reverse(0), cores_free })];
    };
    let offer = |kind: &fleet::Kind| {
        let gpus_free = kind.usable.count_ones();
        if gpus_free < want.gpus {
            return None;
        }
        let choice = choices.choose(state, face.class, kind.usable, want).as_ref().ok()?;
        Some((Some(kind.gpu_type), Offer { gpus_free, gbps: Reverse(choice.mbps / 1_000), cores_free }))
    };
    // In the shape's order, else in that of the slots.
    match shape.gpu_types.is_empty() {
        true => face.kinds.iter().filter(|kind| shape.accepts(kind.gpu_type)).filter_map(offer).collect(),
        false => shape.gpu_types.iter().filter_map(|gpu_type| face.kind(*gpu_type)).filter_map(offer).collect(),
    }
}

/// The same of one machine within what is free there.
fn offers_on(state: &State, choices: &mut Choices, shape: &Shape, (node, alloc): (&Node, &Alloc)) -> Offers {
    if node.admin != NodeAdmin::Ready || !shape.allows(node) {
        return Vec::new();
    }
    offers(state, choices, &Face::of_free(node, alloc), shape)
}

/// A machine's seats for the shape within what is free there, by the type of the GPUs.
pub(crate) fn seats_on(
    machines: &Machines<'_>,
    cache: &mut Cache,
    shape: &Shape,
    (id, node, alloc): (NodeId, &Node, &Alloc),
) -> Vec<(Option<GpuTypeId>, Seat)> {
    let offers = offers_on(machines.state, &mut cache.choices, shape, (node, alloc));
    offers.into_iter().map(|(gpu_type, offer)| (gpu_type, Seat { offer, node: id })).collect()
}

/// Such a machine has a seat for the shape, with GPUs of this type where it needs some.
pub(crate) fn has_seat(
    machines: &Machines<'_>,
    cache: &mut Cache,
    (shape, gpu_type): (&Shape, Option<GpuTypeId>),
    (node, alloc): (&Node, &Alloc),
) -> bool {
    if fit::room_beside_gpus(node, alloc, shape).is_err() {
        return false;
    }
    let (Some(want), Some(gpu_type)) = (want_of(shape), gpu_type) else { return true };
    let usable = fit::usable_gpus(node, alloc, &[gpu_type]);
    usable.count_ones() >= want.gpus && cache.choices.choose(machines.state, node.class, usable, want).is_ok()
}
