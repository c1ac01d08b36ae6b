//! Which of a machine's free GPUs a job gets: the highest predicted bandwidth, then the ties that keep a set close
//! together and leave the best behind for others. Values come from `bandwidth`; which machine is asked is `plan`'s.

use std::cmp::Reverse;

use crate::bandwidth::BandwidthTable;
use crate::links::{Mask, bit, first, slots, with};

/// Bandwidths are compared in whole GB/s: the model is not finer than that.
const COMPARED_MBPS: u32 = 1_000;

/// Sets that are compared one by one where each bandwidth must be computed first; above, the set is grown greedily.
const COMPARED_SETS: u64 = 128;

/// Free GPUs up to which the best pairs left behind are matched exactly; above, the best pair is taken repeatedly.
const MATCHED_GPUS: u32 = 8;

/// A question about one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Want {
    /// GPUs, at least 1.
    pub gpus: u32,
    /// The job spans machines: nearness to NICs goes before the other ties.
    pub several_nodes: bool,
    /// Least acceptable B(S) in MB/s; 0 = any.
    pub min_mbps: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    pub set: Mask,
    /// The same slots in the order of the ring: the order of the ranks.
    pub order: Vec<u8>,
    /// B(S) in MB/s.
    pub mbps: u32,
}

/// Why a machine can't give what is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// Fewer GPUs are free than wanted.
    Gpus { free: u32 },
    /// Enough are free, but the best set of them is predicted below the wanted bandwidth.
    Bandwidth { best_mbps: u32 },
}

/// The best set among the `free` slots. The same question always has the same answer.
///
/// Exact on machines of up to 8 GPUs, inside a switched island, and wherever few sets exist; on larger machines
/// without a switch the set grows from the best pair.
pub fn choose(table: &BandwidthTable, free: Mask, want: Want) -> Result<Choice, Shortage> {
    let free = free & table.links().all();
    if free.count_ones() < want.gpus || want.gpus == 0 {
        return Err(Shortage::Gpus { free: free.count_ones() });
    }
    let candidates = candidates(table, free, want);
    let mbps_of: Vec<(Mask, u32)> = candidates.into_iter().map(|set| (set, table.mbps(set))).collect();
    let acceptable: Vec<(Mask, u32)> = mbps_of.iter().copied().filter(|(_, mbps)| *mbps >= want.min_mbps).collect();
    let Some(&(set, mbps)) = best_of(table, free, want, &acceptable) else {
        return Err(Shortage::Bandwidth { best_mbps: mbps_of.iter().map(|(_, mbps)| *mbps).max().unwrap_or(0) });
    };
    Ok(Choice { set, order: table.ring(set), mbps })
}

/// The highest B of any `gpus` of the slots in MB/s, or `None` when there are not as many.
pub fn best_mbps(table: &BandwidthTable, slots: Mask, gpus: u32) -> Option<u32> {
    choose(table, slots, Want { gpus, several_nodes: false, min_mbps: 0 }).ok().map(|choice| choice.mbps)
}

/// The sets to compare, in PCI order.
fn candidates(table: &BandwidthTable, free: Mask, want: Want) -> Vec<Mask> {
    if table.is_cheap(free) || choose_count(free.count_ones(), want.gpus) <= COMPARED_SETS {
        return subsets(free, want.gpus);
    }
    // Leaving a switched island is never better than staying inside.
    let inside: Vec<Mask> = whole_islands(table, free)
        .into_iter()
        .filter(|island| island.count_ones() >= want.gpus)
        .flat_map(|island| subsets(island, want.gpus))
        .collect();
    if inside.is_empty() { vec![grown(table, free, want)] } else { inside }
}

/// The free parts of the switched islands.
fn whole_islands(table: &BandwidthTable, free: Mask) -> Vec<Mask> {
    let mut islands = Vec::new();
    let mut rest = free;
    while let Some(start) = slots(rest).next() {
        let island =
            slots(rest).filter(|gpu| table.links().inside_one_switch(bit(start) | bit(*gpu))).fold(bit(start), with);
        if table.links().inside_one_switch(island) {
            islands.push(island);
        }
        rest &= !island;
    }
    islands
}

/// The first of the candidates in the order of `Near`, then of what they leave behind.
fn best_of<'a>(table: &BandwidthTable, free: Mask, want: Want, sets: &'a [(Mask, u32)]) -> Option<&'a (Mask, u32)> {
    let nearness = |set: &(Mask, u32)| near(table, want, *set);
    let nearest = sets.iter().map(nearness).min()?;
    let mut tied = sets.iter().filter(|set| nearness(set) == nearest);
    if table.links().inside_one_switch(free) {
        return tied.next();
    }
    // min_by_key keeps the first of equals, which is the first in PCI order.
    tied.min_by_key(|(set, _)| Reverse(worth_left(table, free & !set, want.gpus)))
}

/// Bandwidth, then NIC distance for a job of several machines, NUMA domains, distances inside the set. Less is better.
type Near = (Reverse<u32>, u32, u32, u32);

fn near(table: &BandwidthTable, want: Want, (set, mbps): (Mask, u32)) -> Near {
    let links = table.links();
    let nic = if want.several_nodes { links.nic_distance(set) } else { 0 };
    (Reverse(mbps / COMPARED_MBPS), nic, links.domains(set), links.distance(set))
}

/// What the GPUs left behind are still worth, in GB/s summed over disjoint sets: pairs after a job of one or two GPUs,
/// else sets of the job's own size.
fn worth_left(table: &BandwidthTable, rest: Mask, gpus: u32) -> u64 {
    let of = gpus.max(2);
    if of == 2 && rest.count_ones() <= MATCHED_GPUS {
        return matching(table, rest);
    }
    let mut rest = rest;
    let mut worth = 0;
    while rest.count_ones() >= of && (of == 2 || table.is_cheap(rest)) {
        let sets = subsets(rest, of).into_iter().map(|set| (set, table.mbps(set)));
        let Some((set, mbps)) = sets.min_by_key(|(_, mbps)| Reverse(*mbps)) else { break };
        worth += u64::from(mbps / COMPARED_MBPS);
        rest &= !set;
    }
    worth
}

/// The greatest sum of pair bandwidths over disjoint pairs, by trying every partner of the lowest slot.
fn matching(table: &BandwidthTable, rest: Mask) -> u64 {
    let Some(lowest) = slots(rest).next() else { return 0 };
    let others = rest & !bit(lowest);
    let alone = if rest.count_ones() % 2 == 1 { matching(table, others) } else { 0 };
    slots(others)
        .map(|other| {
            let pair = u64::from(table.mbps(bit(lowest) | bit(other)) / COMPARED_MBPS);
            pair + matching(table, others & !bit(other))
        })
        .fold(alone, u64::max)
}

/// A set grown from the best pair by the GPU that keeps the most bandwidth and stays nearest.
fn grown(table: &BandwidthTable, free: Mask, want: Want) -> Mask {
    let nearest = |sets: Vec<Mask>| {
        let sets = sets.into_iter().map(|set| (set, table.mbps(set)));
        sets.min_by_key(|set| near(table, want, *set)).map_or(0, |(set, _)| set)
    };
    let mut set = nearest(subsets(free, want.gpus.min(2)));
    while set.count_ones() < want.gpus {
        set = nearest(slots(free & !set).map(|gpu| with(set, gpu)).collect());
    }
    set
}

/// All subsets of `size` slots, in lexicographic order of their slots.
pub fn subsets(of: Mask, size: u32) -> Vec<Mask> {
    let mut found = Vec::new();
    extend(of, size, 0, &mut found);
    found
}

fn extend(rest: Mask, missing: u32, chosen: Mask, found: &mut Vec<Mask>) {
    if missing == 0 {
        found.push(chosen);
        return;
    }
    for slot in slots(rest) {
        let behind = rest & !first(usize::from(slot) + 1);
        if behind.count_ones() + 1 < missing {
            break;
        }
        extend(behind, missing - 1, with(chosen, slot), found);
    }
}

/// n over k, saturating.
fn choose_count(n: u32, k: u32) -> u64 {
    (0..k.min(n - k)).fold(1u64, |count, i| count.saturating_mul(u64::from(n - i)) / u64::from(i + 1))
}
