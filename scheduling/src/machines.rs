//! The machines as one plan sees them: what is free after the placements made so far, what falls free later and what is
//! kept for a waiting task.
//!
//! Whether a part fits is `statemachine::fit`'s answer, given here for the machine as the plan has left it.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use statemachine::command::PlacePart;
use statemachine::fit;
use statemachine::record::{Alloc, Node};
use statemachine::spec::{JobSpec, Shape};
use statemachine::{GpuTypeId, JobId, NodeId, State, TaskKey};

use crate::cache::Cache;
use crate::choose::Want;
use crate::fleet::Face;
use crate::holding::{self, End, Held, Holding, Kept};
use crate::windows::{self, Window};

/// Four of five jobs of real logs that wait start no sooner than if those before them used this part of their limits.
const HASTE: u64 = 10;

/// What a shape asks of the GPUs of one machine; `None` for a shape without GPUs.
pub(crate) fn want_of(shape: &Shape) -> Option<Want> {
    let gpus = shape.gpus_per_node();
    (gpus > 0).then_some(Want { gpus, several_nodes: shape.nodes > 1, min_mbps: shape.min_bandwidth_mbps })
}

/// The state's machines under an overlay of what the plan has taken.
pub(crate) struct Machines<'a> {
    pub(crate) state: &'a State,
    pub(crate) unheard: &'a BTreeSet<NodeId>,
    /// What runs is taken to end at once, not at its limit, and what starts to use `1 / HASTE` of its own.
    pub(crate) hasty: bool,
    left: BTreeMap<NodeId, Left>,
    /// Machines that lost something, in order: whoever keeps a view of them reads on from where it stopped.
    pub(crate) touched: Vec<NodeId>,
    held: Arc<Held>,
    kept: BTreeMap<NodeId, Vec<Kept>>,
    /// When what is kept for tasks begins.
    starts: BTreeSet<u64>,
    windows: Vec<Window<'a>>,
    /// When they begin.
    window_starts: BTreeSet<u64>,
    /// The window of the task that is looked at; absent = it names none.
    inside: Option<usize>,
    /// What this plan makes room for: not in the state yet.
    made_room: Vec<PlacePart>,
    /// How machines look beside what is kept there, by bar and window, until they lose more.
    faces: RefCell<BTreeMap<NodeId, Faces>>,
}

/// By bar and window.
type Faces = Vec<((u64, Option<usize>), Arc<Face>)>;

struct Left {
    alloc: Alloc,
    /// Parts that the plan has put here.
    parts: Vec<Holding>,
    /// So many of them, the first ones, take what a claim of the state kept.
    claimed: usize,
}

impl<'a> Machines<'a> {
    /// The cache has begun with this state.
    pub(crate) fn new(state: &'a State, cache: &Cache, unheard: &'a BTreeSet<NodeId>) -> Self {
        let held = cache.held.clone();
        let mut machines = Self {
            state,
            unheard,
            hasty: false,
            left: BTreeMap::new(),
            touched: Vec::new(),
            held,
            kept: BTreeMap::new(),
            starts: BTreeSet::new(),
            windows: windows::of_state(state),
            window_starts: BTreeSet::new(),
            inside: None,
            made_room: Vec::new(),
            faces: RefCell::default(),
        };
        machines.set_aside();
        machines
    }

    /// Keeps the machines of each reservation whole for its window.
    fn set_aside(&mut self) {
        for (nth, window) in self.windows.iter().enumerate() {
            self.window_starts.insert(window.from_ms);
            for id in &window.record.nodes {
                let Some(node) = self.state.nodes.get(id) else { continue };
                let part = windows::whole(*id, &node.value);
                let kept = Kept { from_ms: window.from_ms, until_ms: window.until_ms, part, window: Some(nth) };
                self.kept.entry(*id).or_default().push(kept);
                self.touched.push(*id);
            }
        }
    }

    /// What is asked from now on is asked for a task of this spec.
    pub(crate) fn look_for(&mut self, spec: &JobSpec) {
        let name = spec.reservation();
        let own = |window: &Window<'_>| window.record.name == name;
        self.inside = if name.is_empty() { None } else { self.windows.iter().position(own) };
    }

    /// The window of the task that is looked at.
    pub(crate) fn inside(&self) -> Option<usize> {
        self.inside
    }

    /// The machines of that window, by their ids.
    pub(crate) fn window_nodes(&self) -> Option<&'a BTreeSet<NodeId>> {
        self.inside.map(|nth| &self.windows[nth].record.nodes)
    }

    /// The times between which such a task may start.
    pub(crate) fn start_bounds(&self) -> Option<(u64, u64)> {
        self.inside.map(|nth| (self.windows[nth].from_ms, self.windows[nth].until_ms))
    }

    /// The task that is looked at may be on this machine by its own reservation.
    pub(crate) fn is_open(&self, id: NodeId) -> bool {
        self.inside.is_none_or(|nth| self.windows[nth].record.nodes.contains(&id))
    }

    /// The first window there, but its own, that a task which runs until then would run into.
    pub(crate) fn window_on(&self, id: NodeId, until_ms: u64) -> Option<Window<'a>> {
        let kept = self.kept_on(id).filter(|kept| kept.window.is_some() && kept.from_ms < until_ms);
        let first = kept.min_by_key(|kept| kept.from_ms)?;
        first.window.map(|nth| self.windows[nth])
    }

    /// Some machine is set aside from before then on.
    pub(crate) fn has_windows_before(&self, until_ms: u64) -> bool {
        self.window_starts.range(..until_ms).next().is_some()
    }

    /// When windows that have not begun begin.
    pub(crate) fn windows_ahead(&self) -> impl Iterator<Item = u64> + '_ {
        self.window_starts.range(self.state.meta.clock_ms.saturating_add(1)..).copied()
    }

    pub(crate) fn node(&self, id: NodeId) -> Option<(&'a Node, &Alloc)> {
        let node = &self.state.nodes.get(&id)?.value;
        let alloc = self.left.get(&id).map(|left| &left.alloc).or_else(|| self.state.allocs.get(&id))?;
        Some((node, alloc))
    }

    /// The machine is heard of and may hold one more lease, of a task for which nothing is kept. `fit` decides the rest.
    pub(crate) fn takes_leases(&self, id: NodeId) -> bool {
        self.takes_lease_of(id, TaskKey::only(JobId(0)))
    }

    /// The same for this task.
    pub(crate) fn takes_lease_of(&self, id: NodeId, task: TaskKey) -> bool {
        !self.unheard.contains(&id) && self.has_lease_left(id, task)
    }

    /// It may hold one more, heard of or not.
    pub(crate) fn has_lease_left(&self, id: NodeId, task: TaskKey) -> bool {
        let held = self.state.allocs.get(&id).map_or(0, |alloc| alloc.leases.len());
        self.takes_lease_beside(id, held, task)
    }

    /// It may hold one more beside so many and those that were planned there.
    pub(crate) fn takes_lease_beside(&self, id: NodeId, held: usize, task: TaskKey) -> bool {
        let planned = self.left.get(&id).map_or(0, |left| left.parts.len());
        self.state.takes_lease(id, held + planned, task)
    }

    /// Parts that the plan has put on a machine, and what is kept there for others.
    pub(crate) fn changes_on(&self, id: NodeId) -> (usize, usize) {
        let parts = self.left.get(&id).map_or(0, |left| left.parts.len());
        (parts, self.kept.get(&id).map_or(0, Vec::len))
    }

    /// What is free on a machine for a task that runs on at `bar`: without what is kept from then on or sooner.
    pub(crate) fn beside(&self, id: NodeId, bar: u64) -> Option<(&'a Node, Cow<'_, Alloc>)> {
        let (node, alloc) = self.node(id)?;
        if bar == 0 || self.kept_on(id).all(|kept| kept.from_ms > bar) {
            return Some((node, Cow::Borrowed(alloc)));
        }
        Some((node, Cow::Owned(self.free_during(id, self.state.meta.clock_ms, u64::MAX, bar)?)))
    }

    /// How a machine in service looks to a task that runs on at `bar`.
    pub(crate) fn face_beside(&self, id: NodeId, bar: u64) -> Option<Arc<Face>> {
        let asked = (bar, self.inside);
        let mut faces = self.faces.borrow_mut();
        let known = faces.entry(id).or_default();
        if let Some((_, face)) = known.iter().find(|(of, _)| *of == asked) {
            return Some(face.clone());
        }
        let (node, alloc) = self.beside(id, bar)?;
        let face = Arc::new(Face::of_free(node, &alloc));
        known.push((asked, face.clone()));
        Some(face)
    }

    /// What is free on a machine during all of [`from_ms`, `until_ms`), beside what is kept from `bar` on or sooner.
    pub(crate) fn free_during(&self, id: NodeId, from_ms: u64, until_ms: u64, bar: u64) -> Option<Alloc> {
        let (node, alloc) = self.node(id)?;
        let kept: Vec<&Kept> = self.kept_on(id).filter(|kept| kept.from_ms <= bar).collect();
        let holdings = self.holdings(id);
        let at = |time: u64| {
            let mut alloc = holding::free_of(alloc);
            for (_, holding) in holdings.iter().filter(|(end, _)| *end <= time) {
                holding.give_back(node, &mut alloc);
            }
            for kept in kept.iter().filter(|kept| (kept.from_ms..kept.until_ms).contains(&time)) {
                holding::take(&mut alloc, &kept.part);
            }
            alloc
        };
        // Between the beginnings of what is kept nothing becomes less.
        let later = kept.iter().map(|kept| kept.from_ms).filter(|start| *start > from_ms && *start < until_ms);
        let mut free = at(from_ms);
        later.for_each(|start| holding::lower(&mut free, &at(start)));
        Some(free)
    }

    /// When each part on a machine ends, in no order.
    pub(crate) fn holdings(&self, id: NodeId) -> Vec<(u64, &Holding)> {
        let leased = self.held.on(id);
        let planned = self.left.get(&id).map(|left| left.parts.as_slice()).unwrap_or_default();
        let now_ms = self.state.meta.clock_ms;
        let mut holdings = holding::with_ends(leased.clone().chain(planned), now_ms);
        if self.hasty {
            holdings.iter_mut().take(leased.len()).for_each(|(end, _)| *end = now_ms.saturating_add(1));
        }
        holdings
    }

    /// How long a task holds its machines from its start, and when one that starts now ends.
    pub(crate) fn length_of(&self, spec: &JobSpec) -> (Option<u64>, End) {
        let (length, now_ms) = (spec.length_ms(), self.state.meta.clock_ms);
        let length = if self.hasty { Some(length.map_or(1, |length| length / HASTE)) } else { length };
        let ends = |length| End::By(now_ms.saturating_add(length));
        (length, length.map_or(End::Unknown { since_ms: now_ms }, ends))
    }

    /// How long a task must have room from its start: in haste as long as it holds its machines, but into a window of reserved
    /// time its whole limit may not reach, however short it will be.
    pub(crate) fn room_ms(&self, spec: &JobSpec) -> Option<u64> {
        if self.windows.is_empty() { self.length_of(spec).0 } else { spec.length_ms() }
    }

    /// Up to when it must have room if it starts now.
    pub(crate) fn room_until(&self, spec: &JobSpec) -> u64 {
        self.room_ms(spec).map_or(u64::MAX, |length| self.state.meta.clock_ms.saturating_add(length))
    }

    /// Takes what a claim of the state keeps, before anything else is taken.
    pub(crate) fn take_claimed(&mut self, part: &PlacePart, end: End) {
        self.take(part, end);
        if let Some(left) = self.left.get_mut(&part.node) {
            left.claimed = left.parts.len();
        }
    }

    /// Takes what the plan has put on the machine, or keeps there for others, out of what is free beside the state's claims.
    pub(crate) fn take_planned(&self, id: NodeId, alloc: &mut Alloc) {
        let planned = self.left.get(&id).map(|left| &left.parts[left.claimed..]).unwrap_or_default();
        planned.iter().for_each(|holding| holding.take_from(alloc));
        self.made_room.iter().filter(|part| part.node == id).for_each(|part| holding::take(alloc, part));
    }

    /// Keeps a part from now on, for a task for which others end.
    pub(crate) fn keep_room(&mut self, part: &PlacePart, is_new: bool) {
        self.keep(self.state.meta.clock_ms, u64::MAX, part.clone());
        if is_new {
            self.made_room.push(part.clone());
        }
    }

    /// What is kept there from the task that is looked at.
    pub(crate) fn kept_on(&self, id: NodeId) -> impl Iterator<Item = &Kept> {
        let kept = self.kept.get(&id).map(Vec::as_slice).unwrap_or_default();
        kept.iter().filter(|kept| kept.window.is_none() || kept.window != self.inside)
    }

    /// The last of the beginnings of what is kept at which a task that ends at `until_ms` would still run; 0 = none.
    pub(crate) fn bar(&self, until_ms: u64) -> u64 {
        let of_windows = self.window_starts.range(..until_ms).next_back().copied().unwrap_or(0);
        self.bar_of_tasks(until_ms).max(of_windows)
    }

    /// The same of what is kept for tasks alone.
    pub(crate) fn bar_of_tasks(&self, until_ms: u64) -> u64 {
        self.starts.range(..until_ms).next_back().copied().unwrap_or(0)
    }

    /// Keeps a part for a task that waits.
    pub(crate) fn keep(&mut self, from_ms: u64, until_ms: u64, part: PlacePart) {
        self.starts.insert(from_ms);
        self.touch(part.node);
        self.kept.entry(part.node).or_default().push(Kept { from_ms, until_ms, part, window: None });
    }

    /// The part of `shape` within what is free on this machine, with GPUs of `gpu_type` where it needs some.
    pub(crate) fn part(
        &self,
        cache: &mut Cache,
        (id, node, alloc): (NodeId, &Node, &Alloc),
        shape: &Shape,
        gpu_type: Option<GpuTypeId>,
    ) -> Option<PlacePart> {
        let (cores, mem_mib) = fit::request_on(node, shape);
        let gpu_order = match (want_of(shape), gpu_type) {
            (Some(want), Some(gpu_type)) => {
                let usable = fit::usable_gpus(node, alloc, &[gpu_type]);
                cache.choices.choose(self.state, node.class, usable, want).as_ref().ok()?.order.clone()
            }
            _ => Vec::new(),
        };
        let cores_by_numa = cores_beside(node, alloc, cores, &gpu_order)?;
        let part = PlacePart { node: id, epoch: node.epoch, gpu_order, cores_by_numa, mem_mib };
        fit::fit(node, alloc, shape, &part).is_ok().then_some(part)
    }

    /// Takes what the part holds out of the overlay, until it ends.
    pub(crate) fn take(&mut self, part: &PlacePart, end: End) {
        let left = match self.left.entry(part.node) {
            Entry::Occupied(left) => left.into_mut(),
            Entry::Vacant(new) => {
                let Some(alloc) = self.state.allocs.get(&part.node) else { return };
                new.insert(Left { alloc: holding::free_of(alloc), parts: Vec::new(), claimed: 0 })
            }
        };
        left.parts.push(Holding::of_placed(part, end));
        holding::take(&mut left.alloc, part);
        self.touch(part.node);
    }

    fn touch(&mut self, id: NodeId) {
        self.touched.push(id);
        self.faces.get_mut().remove(&id);
    }
}

/// Cores from the NUMA domains of the GPUs, in proportion to the GPUs in each; what is missing there comes from the
/// others. Without GPUs from one domain if one has enough, the fullest such.
fn cores_beside(node: &Node, alloc: &Alloc, cores: u32, gpu_order: &[u8]) -> Option<Vec<u16>> {
    if gpu_order.is_empty() {
        let mut domains: Vec<u8> = (0..alloc.cores_free.len()).filter_map(|numa| u8::try_from(numa).ok()).collect();
        let free = |numa: &u8| u32::from(alloc.cores_free[usize::from(*numa)]);
        // Enough and least first, then most first.
        domains.sort_by_key(|numa| if free(numa) >= cores { (0, free(numa)) } else { (1, u32::MAX - free(numa)) });
        return fit::take_cores(alloc, cores, &domains);
    }
    let numa_of = |slot: &u8| node.gpus.get(usize::from(*slot)).map_or(0, |gpu| gpu.numa);
    let mut taken = vec![0u16; alloc.cores_free.len()];
    let mut given = 0;
    for (position, slot) in gpu_order.iter().enumerate() {
        // Cumulative shares: they add up to `cores` whatever the rounding.
        let share =
            cores * (position as u32 + 1) / gpu_order.len() as u32 - cores * position as u32 / gpu_order.len() as u32;
        let numa = usize::from(numa_of(slot));
        let (Some(free), Some(taken)) = (alloc.cores_free.get(numa), taken.get_mut(numa)) else { continue };
        let more = u32::from(free.saturating_sub(*taken)).min(share);
        *taken += more as u16;
        given += more;
    }
    let rest = Alloc {
        cores_free: alloc.cores_free.iter().zip(&taken).map(|(free, taken)| free - taken).collect(),
        ..Alloc::default()
    };
    let beside: Vec<u8> = gpu_order.iter().map(numa_of).collect();
    let more = fit::take_cores(&rest, cores - given, &beside)?;
    Some(taken.into_iter().zip(more).map(|(taken, more)| taken + more).collect())
}
