//! A job that says how many GPUs it wants and not on how many machines: it is cut over them in equal parts, on the fewest
//! that could hold it. One that may have twice as many, once or several times over, has a cut for each size.
//!
//! What counts is what the machines have, busy or idle, in service or not: a job that one of them could hold waits for it
//! rather than being torn. The planner cuts anew in each cycle, so that a job that waits follows the machines that come
//! and go. Apply takes any cut into equal parts: which is the best is policy.

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::domain::Path;
use crate::fit::MAX_GPUS;
use crate::id::GpuTypeId;
use crate::record::{Gpu, Node};
use crate::settings::Settings;
use crate::spec::{JobSpec, Shape};
use crate::state::State;

/// For a count of GPUs that can't be cut: the next ones that can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Nearest {
    pub fewer: Option<Cut>,
    pub more: Option<Cut>,
}

/// So many machines with so many GPUs each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    pub nodes: u32,
    pub gpus_each: u32,
}

impl Cut {
    pub fn gpus(self) -> u32 {
        self.nodes.saturating_mul(self.gpus_each)
    }
}

/// "12 as 2 x 6", "8 on one machine".
impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.nodes {
            1 => write!(f, "{} on one machine", self.gpus_each),
            nodes => write!(f, "{} as {nodes} x {}", self.gpus(), self.gpus_each),
        }
    }
}

/// "12 as 2 x 6 or 14 as 2 x 7 would fit", or that nothing would.
impl std::fmt::Display for Nearest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.fewer, self.more) {
            (Some(fewer), Some(more)) => write!(f, "{fewer} or {more} would fit"),
            (Some(one), None) | (None, Some(one)) => write!(f, "{one} would fit"),
            (None, None) => f.write_str("nothing would fit"),
        }
    }
}

impl Shape {
    /// It says how many GPUs it wants, as if on one machine, and leaves open on how many machines.
    pub fn is_open(&self) -> bool {
        self.nodes == 0
    }

    /// Of all its machines.
    pub fn gpus(&self) -> u32 {
        u32::from(self.nodes.max(1)).saturating_mul(self.gpus_per_node())
    }

    /// The same GPUs in equal parts on so many machines; `None` where they can't be cut into so many.
    fn over(&self, nodes: u32) -> Option<Self> {
        let nodes = u16::try_from(nodes).ok().filter(|nodes| *nodes > 0)?;
        let equal = self.gpus_per_rank.is_multiple_of(nodes);
        equal.then(|| Self { nodes, gpus_per_rank: self.gpus_per_rank / nodes, ..self.clone() })
    }

    /// With twice the GPUs, so many times over.
    fn doubled(&self, times: u8) -> Option<Self> {
        let each = u32::from(self.gpus_per_rank).checked_shl(times.into())?;
        Some(Self { gpus_per_rank: u16::try_from(each).ok()?, ..self.clone() })
    }

    /// Why an open shape could be cut over no machines whatever, under these limits.
    pub(crate) fn uncuttable(&self, settings: &Settings) -> Option<String> {
        if !self.is_open() {
            return None;
        }
        let most = most_nodes(self, settings);
        let mut any = Having::default();
        any.add(MAX_GPUS, most);
        if any.fewest(self, most).is_some() {
            return None;
        }
        let (each, gpus, nearest) = (self.gpus_per_rank, self.gpus(), any.nearest(self, most));
        Some(format!(
            "shape.gpus_per_rank is {each}: {gpus} GPUs can't be cut into equal parts on at most {most} machines of at most \
             {MAX_GPUS}; {nearest}"
        ))
    }
}

impl JobSpec {
    /// The shape of so many parts that have so many GPUs in all: its own, or where that is open a cut of one of its sizes.
    pub fn shape_of(&self, parts: usize, gpus: usize) -> Option<Cow<'_, Shape>> {
        if !self.shape.is_open() {
            return Some(Cow::Borrowed(&self.shape));
        }
        let parts = u32::try_from(parts).ok()?;
        let mut sizes = (0..=self.doublings()).rev().filter_map(|times| self.shape.doubled(times));
        let size = sizes.find(|size| usize::try_from(size.gpus()) == Ok(gpus))?;
        size.over(parts).map(Cow::Owned)
    }

    /// What its GPUs may be, the least first.
    pub fn sizes(&self) -> impl Iterator<Item = u32> {
        (0..=self.doublings()).filter_map(|times| self.shape.doubled(times)).map(|size| size.gpus())
    }
}

/// Machines that one attempt may be on.
fn most_nodes(shape: &Shape, settings: &Settings) -> u32 {
    let by_ranks = settings.ranks_per_lease / u32::from(shape.ranks_per_node.max(1));
    settings.parts_per_lease.min(by_ranks)
}

impl State {
    /// The shape that an open one has at least on the machines of today: on the fewest of which there are enough. Where it
    /// can't be cut, on one machine, which never holds it. Any other shape is as it is.
    pub fn cut_of<'a>(&self, spec: &'a JobSpec) -> Cow<'a, Shape> {
        if !spec.shape.is_open() {
            return Cow::Borrowed(&spec.shape);
        }
        let uncut = || Shape { nodes: 1, ..spec.shape.clone() };
        Cow::Owned(self.fewest_nodes(spec).and_then(|nodes| spec.shape.over(nodes)).unwrap_or_else(uncut))
    }

    /// The cuts of an open shape in all its sizes, the largest first; the last one is `cut_of`'s. Larger ones that can't be cut are
    /// left out.
    pub fn cuts(&self, spec: &JobSpec) -> Vec<Shape> {
        let groups = self.groups(spec);
        let cut = |size: &Shape| fewest(&groups, size).and_then(|nodes| size.over(nodes));
        let larger = (1..=spec.doublings()).rev().filter_map(|times| spec.shape.doubled(times));
        let mut cuts: Vec<Shape> = larger.filter_map(|size| cut(&size)).collect();
        cuts.push(cut(&spec.shape).unwrap_or_else(|| Shape { nodes: 1, ..spec.shape.clone() }));
        cuts
    }

    /// Over how many machines an open shape is cut at least; `None` where it can't be.
    pub fn fewest_nodes(&self, spec: &JobSpec) -> Option<u32> {
        fewest(&self.groups(spec), &spec.shape)
    }

    /// For an open shape that can't be cut: what could be.
    pub fn nearest_cuts(&self, spec: &JobSpec) -> Nearest {
        let groups = self.groups(spec);
        let nearest: Vec<Nearest> = groups.iter().map(|(most, having)| having.nearest(&spec.shape, *most)).collect();
        Nearest {
            fewer: best_below(nearest.iter().filter_map(|cuts| cuts.fewer)),
            more: best_above(nearest.iter().filter_map(|cuts| cuts.more)),
        }
    }

    /// The machines that can be in one gang: of one type of GPUs unless it may mix them, and in one domain where it must be;
    /// how many of each it may have.
    fn groups(&self, spec: &JobSpec) -> Vec<(u32, Having)> {
        let shape = &spec.shape;
        let most = most_nodes(shape, &self.meta.settings);
        let window = self.reservation(spec.reservation()).map(|(_, window)| &window.nodes);
        let level = shape.topology.filter(|topology| topology.required).map(|topology| topology.level);
        let mut groups: BTreeMap<(Option<Path<'_>>, Option<GpuTypeId>), Having> = BTreeMap::new();
        for (id, node) in self.nodes.iter() {
            if window.is_some_and(|nodes| !nodes.contains(id)) || !shape.allows(&node.value) {
                continue;
            }
            let domain = level.and_then(|level| node.value.domain(level));
            for (gpu_type, gpus) in counts_on(&node.value, shape) {
                groups.entry((domain, gpu_type)).or_default().add(gpus, 1);
            }
        }
        // One that is in no domain holds the job alone, or not at all.
        let may_have = |domain: Option<Path<'_>>| if level.is_some() && domain.is_none() { 1 } else { most };
        groups.into_iter().map(|((domain, _), having)| (may_have(domain), having)).collect()
    }
}

/// Over how many machines of one group the shape is cut at least.
fn fewest(groups: &[(u32, Having)], shape: &Shape) -> Option<u32> {
    groups.iter().filter_map(|(most, having)| having.fewest(shape, *most)).min()
}

/// The GPUs that a machine has of each acceptable type; of the one that it has most of, where they may be mixed.
fn counts_on(node: &Node, shape: &Shape) -> Vec<(Option<GpuTypeId>, usize)> {
    let accepted = |gpu: &&Gpu| shape.accepts(gpu.gpu_type);
    let mut counts: BTreeMap<GpuTypeId, usize> = BTreeMap::new();
    for gpu in node.gpus.iter().take(MAX_GPUS).filter(|gpu| gpu.is_present()).filter(accepted) {
        *counts.entry(gpu.gpu_type).or_default() += 1;
    }
    if shape.mix_types {
        return counts.into_values().max().map(|most| (None, most)).into_iter().collect();
    }
    counts.into_iter().map(|(gpu_type, count)| (Some(gpu_type), count)).collect()
}

/// How many machines have so many GPUs or more, by their number.
struct Having([u32; MAX_GPUS + 1]);

impl Default for Having {
    fn default() -> Self {
        Self([0; MAX_GPUS + 1])
    }
}

impl Having {
    fn add(&mut self, gpus: usize, machines: u32) {
        self.0.iter_mut().take(gpus.saturating_add(1)).for_each(|count| *count = count.saturating_add(machines));
    }

    /// The parts that so many ranks share evenly, with the machines that have as much: the largest first.
    fn parts(&self, shape: &Shape) -> impl Iterator<Item = (u32, u32)> {
        let ranks = u32::from(shape.ranks_per_node.max(1));
        let parts = (0u32..).zip(self.0).skip(1).filter(move |(part, _)| part.is_multiple_of(ranks));
        parts.collect::<Vec<_>>().into_iter().rev()
    }

    /// The fewest machines over which the shape is cut in equal parts, at most so many.
    fn fewest(&self, shape: &Shape, most: u32) -> Option<u32> {
        let gpus = shape.gpus();
        let mut equal = self.parts(shape).filter(|(part, _)| gpus.is_multiple_of(*part));
        equal.find_map(|(part, machines)| Some(gpus / part).filter(|nodes| *nodes <= machines.min(most)))
    }

    /// The next counts of GPUs that could be cut, on the fewest machines each.
    fn nearest(&self, shape: &Shape, most: u32) -> Nearest {
        let gpus = shape.gpus();
        let fewer = self.parts(shape).filter_map(|(gpus_each, machines)| {
            let nodes = (gpus.saturating_sub(1) / gpus_each).min(machines).min(most);
            (nodes > 0).then_some(Cut { nodes, gpus_each })
        });
        let more = self.parts(shape).filter_map(|(gpus_each, machines)| {
            let nodes = (gpus / gpus_each).saturating_add(1);
            (nodes <= machines.min(most)).then_some(Cut { nodes, gpus_each })
        });
        Nearest { fewer: best_below(fewer), more: best_above(more) }
    }
}

fn best_below(cuts: impl Iterator<Item = Cut>) -> Option<Cut> {
    cuts.max_by_key(|cut| (cut.gpus(), cut.gpus_each))
}

fn best_above(cuts: impl Iterator<Item = Cut>) -> Option<Cut> {
    cuts.min_by_key(|cut| (cut.gpus(), cut.nodes))
}
