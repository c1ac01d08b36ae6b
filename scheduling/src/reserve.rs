//! When a task that does not fit could start, and on which machines: the first moment at which enough of them have room
//! for its whole gang, by the time limits of what runs and by what is kept for others. What becomes of the answer (a
//! reservation that later tasks must not delay, or an estimate) is `plan`'s.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use statemachine::command::PlacePart;
use statemachine::domain::Path;
use statemachine::fit;
use statemachine::record::Node;
use statemachine::spec::Shape;
use statemachine::{GpuTypeId, NodeId};

use crate::cache::Cache;
use crate::domains::{along, domain_for};
use crate::holding::{self, Kept};
use crate::machines::Machines;
use crate::prospects::Prospects;
use crate::seats::{Seat, seats_on};

/// A start to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    pub at_ms: u64,
    /// One a machine, along their domains.
    pub parts: Vec<PlacePart>,
}

/// The shape, how long it holds its machines, and up to when those of a gang must have room.
type Asked<'a> = (&'a Shape, Option<u64>, u64);

/// Windows of reserved time before which a gang is tried to fit: each may cost a look at every machine.
const HORIZONS: usize = 4;

/// What is found so far.
#[derive(Default)]
struct Soonest<'a> {
    /// By the domain, where the gang must be in one (else all in one), and by the type of the GPUs.
    comings: BTreeMap<(Path<'a>, Option<GpuTypeId>), Coming>,
    /// The first start of these.
    first_ms: Option<u64>,
}

impl<'a> Soonest<'a> {
    fn enter(&mut self, shape: &Shape, of: (Path<'a>, Option<GpuTypeId>), time: u64, seat: Seat) {
        let needed = usize::from(shape.nodes);
        let coming = self.comings.entry(of).or_default();
        coming.enter(needed, time, seat);
        self.first_ms = self.first_ms.into_iter().chain(coming.start_ms(needed)).min();
    }

    /// A machine that has room at this time comes behind a start that is sure. Types are mixed only where no single one will do.
    fn is_late(&self, shape: &Shape, time: u64) -> bool {
        !shape.mix_types && self.first_ms.is_some_and(|first| first < time)
    }
}

/// The machines that have room soonest, by the time: as many as the gang has, and all that have it as soon as the last of these.
#[derive(Default)]
struct Coming {
    seats: BTreeMap<u64, BTreeSet<Seat>>,
    count: usize,
}

impl Coming {
    fn enter(&mut self, needed: usize, time: u64, seat: Seat) {
        self.count += usize::from(self.seats.entry(time).or_default().insert(seat));
        while let Some(last) = self.seats.last_entry()
            && self.count - last.get().len() >= needed
        {
            self.count -= last.remove().len();
        }
    }

    /// When the gang has all of its machines.
    fn start_ms(&self, needed: usize) -> Option<u64> {
        self.seats.last_key_value().filter(|_| self.count >= needed).map(|(time, _)| *time)
    }

    /// Those that have room last: the others are left to whoever runs longer than until then.
    fn latest(&self, needed: usize) -> impl Iterator<Item = &Seat> {
        self.seats.values().rev().flatten().take(needed)
    }
}

/// Machines, each with the type of its GPUs.
type Chosen = Vec<(NodeId, Option<GpuTypeId>)>;

/// The first start of a gang that holds its machines for `length_ms` (`None` = without end); no answer when what is kept
/// for others never ends. Adds the looks that it took to `steps`.
pub(crate) fn earliest(
    machines: &Machines<'_>,
    (cache, prospects): (&mut Cache, &mut Prospects),
    shape: &Shape,
    length_ms: Option<u64>,
    steps: &mut u64,
) -> Option<Start> {
    // A gang that ends before a window of reserved time begins need not wait for that to end.
    let gang_ms = length_ms.filter(|_| shape.nodes > 1);
    for horizon_ms in machines.windows_ahead().take(gang_ms.map_or(0, |_| HORIZONS)) {
        let start = earliest_before(machines, (cache, prospects), (shape, length_ms, horizon_ms), steps);
        let ends = |start: &Start| start.at_ms.saturating_add(gang_ms.unwrap_or(u64::MAX)) <= horizon_ms;
        if let Some(start) = start.filter(ends) {
            return Some(start);
        }
    }
    earliest_before(machines, (cache, prospects), (shape, length_ms, u64::MAX), steps)
}

/// The first start at which the machines of a gang are free up to `horizon_ms`, and a single one for as long as it takes.
fn earliest_before(
    machines: &Machines<'_>,
    (cache, prospects): (&mut Cache, &mut Prospects),
    asked: Asked<'_>,
    steps: &mut u64,
) -> Option<Start> {
    let (shape, ..) = asked;
    let mut soonest = Soonest::default();
    for (time, id) in prospects.of(machines, shape, steps) {
        if soonest.is_late(shape, *time) {
            break;
        }
        *steps += 1;
        let Some(node) = machines.state.nodes.get(id) else { continue };
        let usable = machines.is_open(*id) && shape.allows(&node.value);
        if let Some(domain) = domain_for(&node.value, shape).filter(|_| usable) {
            look_at(machines, cache, asked, (*id, domain), &mut soonest, steps);
        }
    }
    let (at_ms, mut nodes) = pick(shape, &soonest)?;
    nodes.sort_by_key(|(id, _)| along(machines.state, *id));
    let until_ms = room_until(asked, at_ms);
    let part = |(id, gpu_type): (NodeId, Option<GpuTypeId>)| {
        let (node, _) = machines.node(id)?;
        let free = machines.free_during(id, at_ms, until_ms, u64::MAX)?;
        machines.part(cache, (id, node, &free), shape, gpu_type)
    };
    let parts: Option<Vec<PlacePart>> = nodes.into_iter().map(part).collect();
    parts.map(|parts| Start { at_ms, parts })
}

/// The machines of a gang have room at different times, and it starts at the last of them: so each must have room from
/// its own time on up to the horizon. One machine alone must have it for as long as the task may run.
fn room_until((shape, length_ms, horizon_ms): Asked<'_>, at_ms: u64) -> u64 {
    length_ms.filter(|_| shape.nodes == 1).map_or(horizon_ms, |length| at_ms.saturating_add(length))
}

/// Enters the machine's first moment with room, for each type, unless enough others have theirs sooner.
fn look_at<'a>(
    machines: &Machines<'_>,
    cache: &mut Cache,
    asked: Asked<'_>,
    (id, domain): (NodeId, Path<'a>),
    soonest: &mut Soonest<'a>,
    steps: &mut u64,
) {
    let (shape, ..) = asked;
    let Some((node, alloc)) = machines.node(id) else { return };
    let types = types_on(node, shape);
    let limit = machines.state.meta.settings.leases_per_node as usize;
    let mut holdings = machines.holdings(id);
    holdings.sort_by_key(|(end, _)| *end);
    let kept: Vec<&Kept> = machines.kept_on(id).collect();
    let ends = holdings.iter().map(|(end, _)| *end).chain(kept.iter().map(|kept| kept.until_ms));
    let mut times: Vec<u64> = ends.filter(|end| *end != u64::MAX).collect();
    times.push(machines.state.meta.clock_ms);
    if let Some((from_ms, until_ms)) = machines.start_bounds() {
        times.push(from_ms);
        times.retain(|time| (from_ms..until_ms).contains(time));
    }
    times.sort_unstable();
    times.dedup();
    let (mut free, mut ended) = (holding::free_of(alloc), 0);
    let mut found: BTreeSet<Option<GpuTypeId>> = BTreeSet::new();
    let healthy = fit::healthy_gpus(node, &shape.gpu_types);
    for time in times {
        while let Some((_, holding)) = holdings.get(ended).filter(|(end, _)| *end <= time) {
            holding.give_back(node, &mut free);
            ended += 1;
        }
        if holdings.len() - ended >= limit || (free.free_gpus & healthy).count_ones() < shape.gpus_per_node() {
            continue;
        }
        if found.len() == types.len() || soonest.is_late(shape, time) {
            return;
        }
        // Beside what is kept the machine is looked at as often as something begins there.
        *steps += 1 + kept.len() as u64;
        let during = match kept.is_empty() {
            true => Some(Cow::Borrowed(&free)),
            false => machines.free_during(id, time, room_until(asked, time), u64::MAX).map(Cow::Owned),
        };
        let Some(during) = during else { return };
        for (gpu_type, seat) in seats_on(machines, cache, shape, (id, node, &during)) {
            if found.insert(gpu_type) {
                soonest.enter(shape, (domain, gpu_type), time, seat);
            }
        }
    }
}

/// The acceptable types of GPUs that the machine has.
fn types_on(node: &Node, shape: &Shape) -> Vec<Option<GpuTypeId>> {
    if shape.gpus_per_node() == 0 {
        return vec![None];
    }
    let has = |gpu_type: &GpuTypeId| node.gpus.iter().any(|gpu| gpu.gpu_type == *gpu_type);
    fit::acceptable_types(node, shape).into_iter().filter(has).map(Some).collect()
}

/// The machines of the type and domain that have enough of them first; of equal ones the most preferred type.
fn pick(shape: &Shape, soonest: &Soonest<'_>) -> Option<(u64, Chosen)> {
    let needed = usize::from(shape.nodes);
    let preference = |gpu_type: &Option<GpuTypeId>| {
        gpu_type.and_then(|gpu_type| shape.gpu_types.iter().position(|wanted| *wanted == gpu_type))
    };
    let of_one_type = soonest
        .comings
        .iter()
        .filter_map(|((_, gpu_type), coming)| Some((coming.start_ms(needed)?, preference(gpu_type), gpu_type, coming)));
    let mixed = |domain: Path<'_>| {
        let inside = soonest.comings.iter().filter(|((of, _), _)| *of == domain);
        let timed = inside.flat_map(|((_, gpu_type), coming)| coming.seats.iter().map(move |at| (at, *gpu_type)));
        let all = timed.flat_map(|((time, seats), gpu_type)| seats.iter().map(move |seat| ((*time, *seat), gpu_type)));
        let sorted: BTreeSet<((u64, Seat), Option<GpuTypeId>)> = all.collect();
        let mut nodes = BTreeMap::new();
        for ((time, seat), gpu_type) in sorted {
            if nodes.len() < needed {
                nodes.entry(seat.node).or_insert((time, gpu_type));
            }
        }
        let at_ms = nodes.values().map(|(time, _)| *time).max()?;
        let nodes: Chosen = nodes.into_iter().map(|(id, (_, gpu_type))| (id, gpu_type)).collect();
        (nodes.len() == needed).then_some((at_ms, nodes))
    };
    match of_one_type.min_by_key(|(at_ms, preference, ..)| (*at_ms, *preference)) {
        Some((at_ms, _, gpu_type, coming)) => {
            Some((at_ms, coming.latest(needed).map(|seat| (seat.node, *gpu_type)).collect()))
        }
        None if shape.mix_types => {
            let domains: BTreeSet<Path<'_>> = soonest.comings.keys().map(|(domain, _)| *domain).collect();
            domains.into_iter().filter_map(mixed).min_by_key(|(at_ms, _)| *at_ms)
        }
        None => None,
    }
}
