//! Predicted all-reduce bus bandwidth B(S) of a set of GPUs in one machine, in integer MB/s (10^6 bytes/s, one
//! direction): the greater of what NVLink cycles carry together and what the best single ring over all links carries.
//!
//! Floats live here alone, while a value is computed; each is rounded to whole MB/s before anything is compared. The
//! per-link constants are those of NCCL's topology search (`src/graph/topo.h`); the packing of Hamiltonian cycles and
//! the ring's resources are this project's model, calibrated on published all-reduce figures. Load of other jobs on
//! shared links is not modelled here.

use microlp::{ComparisonOp, OptimizationDirection, Problem};
use statemachine::record::{Class, PciClass};

use crate::links::{Links, Mask, bit, first, slots};

/// B of a single GPU, which has nobody to talk to.
pub const NO_COMMUNICATION: u32 = u32::MAX;

/// Machines up to this size hold the value of every set; above, a value is computed when it is asked for.
const CACHED_GPUS: usize = 8;

/// Sets up to this size are searched cycle by cycle (2,520 for 8); a larger one takes the PCIe tree's order as its ring.
const EXACT_GPUS: u32 = 8;

/// A hop over a host bridge of an Intel CPU costs a fifth more (NCCL's P2P overhead).
const INTEL_OVERHEAD: f64 = 1.2;

/// What is left of a link when the bytes are staged in host memory.
const STAGED: f64 = 0.7;

/// Bandwidths of every set of GPUs of one machine class.
#[derive(Clone, Debug)]
pub struct BandwidthTable {
    links: Links,
    /// By mask; empty on machines above `CACHED_GPUS`.
    cached: Vec<u32>,
}

impl BandwidthTable {
    pub fn new(class: &Class) -> Self {
        let links = Links::new(class);
        let sets = if links.gpus() <= CACHED_GPUS { 1 << links.gpus() } else { 0 };
        let cached = (0..sets).map(|set| predict(&links, set)).collect();
        Self { links, cached }
    }

    pub fn links(&self) -> &Links {
        &self.links
    }

    /// B(S) in MB/s; `NO_COMMUNICATION` for one GPU, 0 for none or where a link's speed is unknown.
    pub fn mbps(&self, set: Mask) -> u32 {
        let set = set & self.links.all();
        if self.cached.is_empty() { predict(&self.links, set) } else { self.cached[set as usize] }
    }

    /// Every set's value is at hand, or costs nothing to compute: all sets may be compared.
    pub fn is_cheap(&self, within: Mask) -> bool {
        !self.cached.is_empty() || self.links.inside_one_switch(within)
    }

    /// The set in the order of the ring that the prediction stands for: neighbours in it are neighbours on the best
    /// links. Starts at the lowest slot.
    pub fn ring(&self, set: Mask) -> Vec<u8> {
        let set = set & self.links.all();
        if self.links.inside_one_switch(set) || set.count_ones() <= 2 {
            return slots(set).collect();
        }
        if set.count_ones() > EXACT_GPUS {
            return tree_order(&self.links, set);
        }
        let over_nvlink = nvlink_packing(&self.links, set) >= best_ring(&self.links, set).0;
        let (mbps, ring) = if over_nvlink { best_nvlink_ring(&self.links, set) } else { best_ring(&self.links, set) };
        if mbps > 0 { ring } else { slots(set).collect() }
    }
}

fn predict(links: &Links, set: Mask) -> u32 {
    match set.count_ones() {
        0 => 0,
        1 => NO_COMMUNICATION,
        _ if links.inside_one_switch(set) => switched(links, set),
        2..=EXACT_GPUS => nvlink_packing(links, set).max(best_ring(links, set).0),
        _ => ring_mbps(links, &tree_order(links, set)),
    }
}

/// Each GPU reaches the switch with all its links.
fn switched(links: &Links, set: Mask) -> u32 {
    let mut members = slots(set);
    match (members.next(), members.next()) {
        (Some(a), Some(b)) => nvlink_mbps(links, a, b),
        _ => NO_COMMUNICATION,
    }
}

fn nvlink_mbps(links: &Links, a: u8, b: u8) -> u32 {
    u32::from(links.nvlinks(a, b)).saturating_mul(links.facts().nvlink_mbps_per_link)
}

// ----------------------------------------------------------------------------------------- cycles over NVLink alone

/// The most that directed Hamiltonian cycles over NVLink carry together, no link beyond its capacity.
///
/// Links are symmetric, so an optimum exists that uses each cycle equally both ways: it is found over undirected cycles
/// and doubled. Up to four GPUs the optimum has a closed form; above, a linear program with one column a cycle.
fn nvlink_packing(links: &Links, set: Mask) -> u32 {
    let gpus: Vec<u8> = slots(set).collect();
    let edge = |a: usize, b: usize| u64::from(nvlink_mbps(links, gpus[a], gpus[b]));
    let packed = match gpus.len() {
        2 => edge(0, 1),
        3 => 2 * edge(0, 1).min(edge(0, 2)).min(edge(1, 2)),
        4 => four_gpus(edge(0, 1).min(edge(2, 3)), edge(0, 2).min(edge(1, 3)), edge(0, 3).min(edge(1, 2))),
        5..=8 => packing_by_program(links, &gpus),
        _ => 0,
    };
    u32::try_from(packed).unwrap_or(NO_COMMUNICATION - 1)
}

/// Four vertices have three perfect matchings, and each of their three cycles is a pair of them: the packing is a
/// fractional matching of a triangle whose corners hold the matchings' capacities; by duality one of its four covers.
fn four_gpus(a: u64, b: u64, c: u64) -> u64 {
    (a + b + c).min(2 * (a + b)).min(2 * (a + c)).min(2 * (b + c))
}

fn packing_by_program(links: &Links, gpus: &[u8]) -> u64 {
    let mut program = Problem::new(OptimizationDirection::Maximize);
    let mut over_edge = vec![Vec::new(); gpus.len() * gpus.len()];
    for_each_cycle(gpus.len(), &mut |cycle| {
        if hops(cycle).any(|(a, b)| links.nvlinks(gpus[a], gpus[b]) == 0) {
            return;
        }
        let weight = program.add_var(1.0, (0.0, f64::INFINITY));
        for (a, b) in hops(cycle) {
            over_edge[a.min(b) * gpus.len() + a.max(b)].push((weight, 1.0));
        }
    });
    if over_edge.iter().all(Vec::is_empty) {
        return 0;
    }
    for (edge, weights) in over_edge.iter().enumerate().filter(|(_, weights)| !weights.is_empty()) {
        let (a, b) = (gpus[edge / gpus.len()], gpus[edge % gpus.len()]);
        program.add_constraint(weights.as_slice(), ComparisonOp::Le, f64::from(nvlink_mbps(links, a, b)));
    }
    let both_ways =
        program.solve().ok().and_then(|outcome| outcome.into_solution().ok()).map(|best| 2.0 * best.objective());
    // The solver gave up: one cycle, both ways, is a lower bound that always exists here.
    both_ways.map_or_else(|| 2 * u64::from(best_nvlink_ring_of(links, gpus).0), |mbps| mbps.round() as u64)
}

/// The single NVLink cycle whose weakest link is strongest, and that link's MB/s; 0 when there is no cycle.
fn best_nvlink_ring(links: &Links, set: Mask) -> (u32, Vec<u8>) {
    best_nvlink_ring_of(links, &slots(set).collect::<Vec<_>>())
}

fn best_nvlink_ring_of(links: &Links, gpus: &[u8]) -> (u32, Vec<u8>) {
    best_cycle(gpus, |ring| hops(ring).map(|(a, b)| nvlink_mbps(links, a as u8, b as u8)).min().unwrap_or(0))
}

// ------------------------------------------------------------------------------------------- one ring over all links

fn best_ring(links: &Links, set: Mask) -> (u32, Vec<u8>) {
    best_cycle(&slots(set).collect::<Vec<_>>(), |ring| {
        let ring: Vec<u8> = ring.iter().map(|gpu| *gpu as u8).collect();
        ring_mbps(links, &ring)
    })
}

/// The ring's slowest resource. A resource that several hops cross carries each of them in turn: 1 / sum(1 / capacity).
fn ring_mbps(links: &Links, ring: &[u8]) -> u32 {
    let facts = links.facts();
    let mut slowest = f64::INFINITY;
    let mut shared = Shared::default();
    for (position, &from) in ring.iter().enumerate() {
        let to = ring[(position + 1) % ring.len()];
        if links.nvlinks(from, to) > 0 {
            slowest = slowest.min(f64::from(nvlink_mbps(links, from, to)));
            continue;
        }
        let class = links.pci(from, to);
        let lane = f64::from(facts.pcie_mbps) * host_factor(facts, class);
        slowest = slowest.min(lane);
        for (group_of, level) in [(Links::pix_group as fn(&Links, u8) -> Mask, 0), (Links::pxb_group, 1)] {
            let (source, target) = (group_of(links, from), group_of(links, to));
            if source != target {
                shared.cross_uplink(level, true, source, lane);
                shared.cross_uplink(level, false, target, lane);
            }
        }
        let (here, there) = (links.numa(from), links.numa(to));
        if class == PciClass::Sys && here != there {
            let staged = if facts.p2p { 1.0 } else { STAGED };
            shared.add(Resource::Socket { from: here, to: there }, f64::from(facts.inter_socket_mbps) * staged);
        }
    }
    let mbps = slowest.min(shared.slowest());
    if mbps.is_finite() { (mbps.round() as u32).min(NO_COMMUNICATION - 1) } else { 0 }
}

/// What of the PCIe link a hop of this class gets.
fn host_factor(facts: &Class, class: PciClass) -> f64 {
    if !facts.p2p {
        return STAGED;
    }
    match class {
        PciClass::Phb | PciClass::Node | PciClass::Sys if facts.intel_cpu => 1.0 / INTEL_OVERHEAD,
        _ => 1.0,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Resource {
    /// A PCIe switch's link to the host; `level` 0 = PIX group, 1 = PXB group, named by its lowest slot.
    Uplink {
        level: u8,
        up: bool,
        group: u32,
    },
    Socket {
        from: u8,
        to: u8,
    },
}

/// Time that one byte needs on each shared resource, summed over the hops that cross it.
#[derive(Default)]
struct Shared {
    loads: Vec<(Resource, f64)>,
}

impl Shared {
    fn cross_uplink(&mut self, level: u8, up: bool, group: Mask, mbps: f64) {
        if group.count_ones() > 1 {
            self.add(Resource::Uplink { level, up, group: group.trailing_zeros() }, mbps);
        }
    }

    fn add(&mut self, resource: Resource, mbps: f64) {
        match self.loads.iter_mut().find(|(known, _)| *known == resource) {
            Some((_, load)) => *load += 1.0 / mbps,
            None => self.loads.push((resource, 1.0 / mbps)),
        }
    }

    fn slowest(&self) -> f64 {
        self.loads.iter().map(|(_, load)| 1.0 / load).fold(f64::INFINITY, f64::min)
    }
}

/// Depth-first order of the PCIe tree: visits each uplink once per direction, which is optimal on a tree.
fn tree_order(links: &Links, set: Mask) -> Vec<u8> {
    let mut order: Vec<u8> = slots(set).collect();
    order.sort_by_key(|&gpu| {
        (links.numa(gpu), links.pxb_group(gpu).trailing_zeros(), links.pix_group(gpu).trailing_zeros(), gpu)
    });
    order
}

// ------------------------------------------------------------------------------------------------------------ cycles

/// The cycle over `gpus` with the highest worth, the lexicographically first among equals, written from the lowest GPU.
fn best_cycle(gpus: &[u8], worth: impl Fn(&[usize]) -> u32) -> (u32, Vec<u8>) {
    let mut best = (0, Vec::new());
    let mut named = vec![0; gpus.len()];
    for_each_cycle(gpus.len(), &mut |cycle| {
        for (name, index) in named.iter_mut().zip(cycle) {
            *name = usize::from(gpus[*index]);
        }
        let found = worth(&named);
        if found > best.0 {
            best = (found, named.iter().map(|gpu| *gpu as u8).collect());
        }
    });
    best
}

/// Calls `visit` with each undirected Hamiltonian cycle of `n` vertices once, in lexicographic order.
fn for_each_cycle(n: usize, visit: &mut impl FnMut(&[usize])) {
    let mut cycle = vec![0];
    extend_cycle(n, &mut cycle, first(n) & !bit(0), visit);
}

fn extend_cycle(n: usize, cycle: &mut Vec<usize>, rest: Mask, visit: &mut impl FnMut(&[usize])) {
    if rest == 0 {
        // Of a cycle and its reverse only the one whose second vertex is the smaller neighbour of the first.
        if n <= 3 && cycle.is_sorted() || n > 3 && cycle[1] < cycle[n - 1] {
            visit(cycle);
        }
        return;
    }
    for vertex in slots(rest) {
        cycle.push(usize::from(vertex));
        extend_cycle(n, cycle, rest & !bit(vertex), visit);
        cycle.pop();
    }
}

/// The hops of a cycle, the one back to its start included.
fn hops(cycle: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    cycle.iter().enumerate().map(|(position, from)| (*from, cycle[(position + 1) % cycle.len()]))
}
