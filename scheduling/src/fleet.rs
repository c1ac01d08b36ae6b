//! The machines in groups: those that look alike to every request stand together, so that a shape is held against each group
//! once, not against each machine. Kept from plan to plan: between two states only the machines that changed are looked at.
//!
//! What a job says of single machines (names, labels) is not in a face: such a job is told which members it may be on. Nor is
//! what is kept for others, which binds one task and not another: a machine where something is kept stands alone.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use statemachine::account::Amounts;
use statemachine::domain::Level;
use statemachine::fit::{MAX_GPUS, Total, cores_of};
use statemachine::record::{Alloc, GpuHealth, Node, NodeAdmin, Versioned};
use statemachine::selector::Selector;
use statemachine::table::Table;
use statemachine::{ClassId, GpuTypeId, JobId, NodeId, State, TaskKey};

use crate::links::Mask;
use crate::machines::Machines;
use crate::racks::Racks;

/// Selectors whose machines are remembered; over it all are forgotten.
const SELECTORS: usize = 1_024;
/// Moves of machines that are remembered.
const ENTERED: usize = 1_024;

/// All that a request sees of a machine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Face {
    pub total: Total,
    pub class: ClassId,
    pub service: Service,
    /// It may hold no lease more.
    pub is_full: bool,
    pub cores_free: u32,
    pub mem_free_mib: u64,
    /// By type, in the order of the slots.
    pub kinds: Vec<Kind>,
    pub alone: Option<Alone>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Service {
    In,
    Out,
    /// In service, but unheard for too long.
    Silent,
}

/// A machine's GPUs of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Kind {
    pub gpu_type: GpuTypeId,
    /// There, whatever their health.
    pub present: Mask,
    /// Healthy and free.
    pub usable: Mask,
    /// Free, but not healthy.
    pub sick: u32,
}

/// A machine where something is kept, as often as that or what is planned there has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Alone {
    pub node: NodeId,
    parts: usize,
    kept: usize,
}

impl Face {
    fn of(node: &Node, alloc: &Alloc, service: Service, is_full: bool, alone: Option<Alone>) -> Self {
        let mut kinds: Vec<Kind> = Vec::new();
        for (slot, gpu) in node.gpus.iter().take(MAX_GPUS).enumerate() {
            let at = kinds.iter().position(|kind| kind.gpu_type == gpu.gpu_type).unwrap_or_else(|| {
                kinds.push(Kind { gpu_type: gpu.gpu_type, present: 0, usable: 0, sick: 0 });
                kinds.len() - 1
            });
            let (kind, bit) = (&mut kinds[at], 1 << slot);
            kind.present |= if gpu.is_present() { bit } else { 0 };
            if alloc.free_gpus & bit != 0 {
                let is_healthy = gpu.health == GpuHealth::Ok;
                kind.usable |= if is_healthy { bit } else { 0 };
                kind.sick += u32::from(!is_healthy);
            }
        }
        Self {
            total: Total::of(node),
            class: node.class,
            service,
            is_full,
            cores_free: cores_of(&alloc.cores_free),
            mem_free_mib: alloc.mem_free_mib,
            kinds,
            alone,
        }
    }

    /// Of a machine in service with so much free.
    pub fn of_free(node: &Node, alloc: &Alloc) -> Self {
        Self::of(node, alloc, Service::In, false, None)
    }

    /// In service and whole: nothing runs there, and no GPU is sick.
    fn is_idle(&self) -> bool {
        let has_all = |kind: &Kind| kind.usable == kind.present;
        self.service == Service::In && self.cores_free == self.total.cores && self.kinds.iter().all(has_all)
    }

    /// In service, for one lease more.
    pub fn has_room(&self) -> bool {
        self.service == Service::In && !self.is_full
    }

    pub fn kind(&self, gpu_type: GpuTypeId) -> Option<&Kind> {
        self.kinds.iter().find(|kind| kind.gpu_type == gpu_type)
    }
}

/// Machines of one face; may be without any while a plan is made.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    pub face: Arc<Face>,
    pub nodes: BTreeSet<NodeId>,
    /// The same by their racks.
    by_rack: BTreeMap<Option<usize>, BTreeSet<NodeId>>,
}

impl Group {
    fn enter(&mut self, rack: Option<usize>, id: NodeId) {
        self.nodes.insert(id);
        self.by_rack.entry(rack).or_default().insert(id);
    }

    fn leave(&mut self, rack: Option<usize>, id: NodeId) {
        self.nodes.remove(&id);
        if let Some(beside) = self.by_rack.get_mut(&rack) {
            beside.remove(&id);
            if beside.is_empty() {
                self.by_rack.remove(&rack);
            }
        }
    }
}

/// Machines of one group that a shape may be on, at least one.
pub(crate) struct Alike<'f> {
    /// Of the group.
    pub number: usize,
    pub face: &'f Face,
    pub nodes: Nodes<'f>,
}

/// By their ids.
#[derive(Clone, Copy)]
pub(crate) enum Nodes<'f> {
    All(&'f BTreeSet<NodeId>),
    Some(&'f [NodeId]),
}

impl<'f> Nodes<'f> {
    pub fn first(&self) -> Option<NodeId> {
        self.iter().next()
    }

    pub fn len(&self) -> usize {
        match self {
            Nodes::All(nodes) => nodes.len(),
            Nodes::Some(nodes) => nodes.len(),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = NodeId> + 'f {
        let (all, some) = match self {
            Nodes::All(nodes) => (Some(nodes.iter()), None),
            Nodes::Some(nodes) => (None, Some(nodes.iter())),
        };
        all.into_iter().flatten().chain(some.into_iter().flatten()).copied()
    }
}

/// Some machines by the number of their group.
pub(crate) type Grouped = BTreeMap<usize, Vec<NodeId>>;

/// The machines that a selector lets in, by their ids, and by group as long as none of all changes its own.
#[derive(Clone, Debug)]
pub(crate) struct Chosen {
    pub nodes: Arc<Vec<NodeId>>,
    pub grouped: Arc<Grouped>,
    at: u64,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Fleet {
    nodes: Table<NodeId, Versioned<Node>>,
    allocs: Table<NodeId, Alloc>,
    claimed: BTreeSet<NodeId>,
    unheard: BTreeSet<NodeId>,
    leases_per_node: u32,
    groups: Vec<Group>,
    /// Groups without machines since the plan began: their numbers are given anew.
    spare: Vec<usize>,
    by_face: BTreeMap<Arc<Face>, usize>,
    of_node: BTreeMap<NodeId, usize>,
    racks: Racks,
    /// Machines whose group is the plan's, not the state's.
    planned: BTreeSet<NodeId>,
    /// How far `Machines::touched` was read.
    read: usize,
    /// Groups that were without machines and got one since the plan began, in order.
    born: Vec<usize>,
    capacity: Amounts,
    /// Machines that have GPUs of the type, in service or not.
    present: BTreeMap<GpuTypeId, u32>,
    chosen: BTreeMap<Selector, Chosen>,
    /// Machines that have changed their group so far.
    moves: u64,
    /// The groups into which the last of these went, in order; `None` = it left its own for none.
    entered: VecDeque<Option<usize>>,
    /// How often one of the machines has become another, come, gone, or fallen silent.
    facts: u64,
}

impl Fleet {
    /// The machines of a state, before a plan takes anything.
    pub fn begin(&mut self, state: &State, unheard: &BTreeSet<NodeId>) {
        let mut changed = std::mem::take(&mut self.planned);
        changed.extend(self.unheard.symmetric_difference(unheard).copied());
        changed.extend(state.allocs.changed_since(&self.allocs).copied());
        let claimed: BTreeSet<NodeId> = state.index.claims.iter().map(|(node, _)| *node).collect();
        changed.extend(self.claimed.iter().chain(&claimed).copied());
        let registered: Vec<NodeId> = state.nodes.changed_since(&self.nodes).copied().collect();
        for id in &registered {
            let before = self.nodes.get_arc(id);
            let now = state.nodes.get(id).map(|row| &row.value);
            self.count(before.as_ref().map(|row| &row.value), false);
            self.count(now, true);
            self.put(*id, None);
            self.racks.enter(*id, now.and_then(|node| node.domain(Level::Rack)));
        }
        if !registered.is_empty() || self.unheard != *unheard {
            self.facts += 1;
        }
        let is_named_anew = |id: &NodeId| match (self.nodes.get(id), state.nodes.get(id)) {
            (Some(before), Some(now)) => {
                (&before.value.name, &before.value.labels) != (&now.value.name, &now.value.labels)
            }
            _ => true,
        };
        if registered.iter().any(is_named_anew) {
            self.chosen.clear();
        }
        changed.extend(registered);
        if self.leases_per_node != state.meta.settings.leases_per_node {
            changed.extend(state.nodes.iter().map(|(id, _)| *id));
        }
        self.leases_per_node = state.meta.settings.leases_per_node;
        (self.nodes, self.allocs) = (state.nodes.clone(), state.allocs.clone());
        (self.claimed, self.unheard) = (claimed, unheard.clone());
        for id in changed {
            let face = state.nodes.get(&id).map(|node| face_of(state, unheard, id, &node.value));
            self.put(id, face);
        }
        self.forget_empty();
        (self.read, self.born) = (0, Vec::new());
    }

    /// Reads what the plan took and kept since.
    pub fn follow(&mut self, machines: &Machines<'_>) {
        let touched: BTreeSet<NodeId> = machines.touched[self.read..].iter().copied().collect();
        self.read = machines.touched.len();
        for id in touched {
            self.put(id, planned_face(machines, id));
            self.planned.insert(id);
        }
    }

    fn put(&mut self, id: NodeId, face: Option<Face>) {
        let number = face.map(|face| match self.by_face.get(&face) {
            Some(number) => *number,
            None => self.new_group(Arc::new(face)),
        });
        let before = self.of_node.get(&id).copied();
        if before == number {
            return;
        }
        self.moves += 1;
        self.entered.push_back(number);
        if self.entered.len() > ENTERED {
            self.entered.pop_front();
        }
        let rack = self.racks.of(id);
        if let Some(before) = before {
            self.of_node.remove(&id);
            let group = &mut self.groups[before];
            group.leave(rack, id);
            if group.face.is_idle() {
                self.racks.count(rack, false);
            }
        }
        if let Some(number) = number {
            self.of_node.insert(id, number);
            let group = &mut self.groups[number];
            if group.nodes.is_empty() {
                self.born.push(number);
            }
            group.enter(rack, id);
            if group.face.is_idle() {
                self.racks.count(rack, true);
            }
        }
    }

    fn new_group(&mut self, face: Arc<Face>) -> usize {
        let group = Group { face: face.clone(), nodes: BTreeSet::new(), by_rack: BTreeMap::new() };
        let number = match self.spare.pop() {
            Some(number) => {
                self.groups[number] = group;
                number
            }
            None => {
                self.groups.push(group);
                self.groups.len() - 1
            }
        };
        self.by_face.insert(face, number);
        number
    }

    fn forget_empty(&mut self) {
        let groups = &self.groups;
        self.by_face.retain(|_, number| {
            let stays = !groups[*number].nodes.is_empty();
            if !stays {
                self.spare.push(*number);
            }
            stays
        });
    }

    /// Adds or takes away what a machine has.
    fn count(&mut self, node: Option<&Node>, is_new: bool) {
        let Some(node) = node else { return };
        let total = Total::of(node);
        let mut has = Amounts { gpus: BTreeMap::new(), cores: total.cores, mem_mib: total.mem_mib };
        node.gpus.iter().for_each(|gpu| *has.gpus.entry(gpu.gpu_type).or_default() += 1);
        let present: BTreeSet<GpuTypeId> =
            node.gpus.iter().filter(|gpu| gpu.is_present()).map(|gpu| gpu.gpu_type).collect();
        if is_new {
            self.capacity.add(&has);
            present.into_iter().for_each(|gpu_type| *self.present.entry(gpu_type).or_default() += 1);
            return;
        }
        self.capacity.take(&has);
        for gpu_type in present {
            if let Some(left) = self.present.get_mut(&gpu_type) {
                *left -= 1;
            }
        }
        self.present.retain(|_, machines| *machines > 0);
    }

    /// A number that changes with what the machines are, whatever they do.
    pub fn facts(&self) -> u64 {
        self.facts
    }

    /// What the machines have, in service or not.
    pub fn capacity(&self) -> &Amounts {
        &self.capacity
    }

    /// Types of which some machine has a GPU.
    pub fn present(&self) -> impl Iterator<Item = GpuTypeId> + '_ {
        self.present.keys().copied()
    }

    pub fn machines(&self) -> usize {
        self.of_node.len()
    }

    /// Groups with machines, in no order that tells anything.
    pub fn groups(&self) -> impl Iterator<Item = (usize, &Group)> {
        self.groups.iter().enumerate().filter(|(_, group)| !group.nodes.is_empty())
    }

    /// Groups with machines.
    pub fn len(&self) -> usize {
        self.groups().count()
    }

    pub fn group(&self, number: usize) -> &Group {
        &self.groups[number]
    }

    /// The first machine of the group that may be, of those in whose rack the fewest are idle, and how many these are.
    pub fn first_of(&self, number: usize, may_be: &dyn Fn(&NodeId) -> bool) -> Option<(usize, NodeId)> {
        let racks = self.groups[number].by_rack.iter();
        let first = |(rack, nodes): (&Option<usize>, &BTreeSet<NodeId>)| {
            nodes.iter().find(|node| may_be(node)).map(|node| (self.racks.idle(*rack), *node))
        };
        racks.filter_map(first).min()
    }

    /// Machines that have changed their group so far.
    pub fn moves(&self) -> u64 {
        self.moves
    }

    /// The groups with machines into which some went after so many moves; `None` = these are forgotten, or so many that a look at all
    /// groups costs no more.
    pub fn entered_since(&self, moves: u64) -> Option<Vec<usize>> {
        let most = self.entered.len().min(self.groups.len());
        let new = usize::try_from(self.moves - moves).ok().filter(|new| *new <= most)?;
        let entered = self.entered.range(self.entered.len() - new..).copied().flatten();
        let is_there = |number: &usize| !self.groups[*number].nodes.is_empty();
        let mut numbers: Vec<usize> = entered.filter(is_there).collect();
        numbers.sort_unstable();
        numbers.dedup();
        Some(numbers)
    }

    /// The group that a machine stands in now.
    pub fn of(&self, id: NodeId) -> Option<usize> {
        self.of_node.get(&id).copied()
    }

    pub fn born(&self) -> &[usize] {
        &self.born
    }

    /// The machines that the selector lets in.
    pub fn chosen(&mut self, selector: &Selector) -> Chosen {
        let known = self.chosen.get(selector);
        if let Some(known) = known.filter(|known| known.at == self.moves) {
            return known.clone();
        }
        let allowed = || {
            let nodes = self.nodes.iter().filter(|(_, node)| selector.allows(&node.value));
            Arc::new(nodes.map(|(id, _)| *id).collect::<Vec<_>>())
        };
        let nodes = known.map_or_else(allowed, |known| known.nodes.clone());
        let grouped = Arc::new(self.grouped(nodes.iter().copied()));
        let chosen = Chosen { nodes, grouped, at: self.moves };
        if self.chosen.len() >= SELECTORS {
            self.chosen.clear();
        }
        self.chosen.insert(selector.clone(), chosen.clone());
        chosen
    }

    /// Of the machines of the window that a job is for, those that it may be on; `None` = it is for no window.
    pub fn in_window(&self, machines: &Machines<'_>, chosen: Option<&Chosen>) -> Option<Grouped> {
        let is_chosen = |id: &NodeId| chosen.is_none_or(|chosen| chosen.nodes.binary_search(id).is_ok());
        machines.window_nodes().map(|nodes| self.grouped(nodes.iter().copied().filter(is_chosen)))
    }

    fn grouped(&self, nodes: impl Iterator<Item = NodeId>) -> Grouped {
        let mut grouped = Grouped::new();
        for id in nodes {
            if let Some(number) = self.of(id) {
                grouped.entry(number).or_default().push(id);
            }
        }
        grouped
    }

    /// All machines, or these.
    pub fn alike<'f>(&'f self, among: Option<&'f Grouped>) -> Vec<Alike<'f>> {
        let alike = |number: usize, nodes| Alike { number, face: &self.groups[number].face, nodes };
        match among {
            None => self.groups().map(|(number, group)| alike(number, Nodes::All(&group.nodes))).collect(),
            Some(grouped) => grouped.iter().map(|(number, nodes)| alike(*number, Nodes::Some(nodes))).collect(),
        }
    }
}

fn service_of(node: &Node, unheard: &BTreeSet<NodeId>, id: NodeId) -> Service {
    match node.admin {
        NodeAdmin::Out { .. } => Service::Out,
        NodeAdmin::Ready if unheard.contains(&id) => Service::Silent,
        NodeAdmin::Ready => Service::In,
    }
}

/// As the state has it.
fn face_of(state: &State, unheard: &BTreeSet<NodeId>, id: NodeId, node: &Node) -> Face {
    let nothing = Alloc::default();
    let alloc = state.allocs.get(&id).unwrap_or(&nothing);
    let is_full = !state.takes_lease(id, alloc.leases.len(), TaskKey::only(JobId(0)));
    Face::of(node, alloc, service_of(node, unheard, id), is_full, None)
}

/// As the plan has left it.
fn planned_face(machines: &Machines<'_>, id: NodeId) -> Option<Face> {
    let (node, alloc) = machines.node(id)?;
    let (parts, kept) = machines.changes_on(id);
    let alone = (kept > 0).then_some(Alone { node: id, parts, kept });
    let is_full = !machines.has_lease_left(id, TaskKey::only(JobId(0)));
    Some(Face::of(node, alloc, service_of(node, machines.unheard, id), is_full, alone))
}
