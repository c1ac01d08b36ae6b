//! Does a part fit on a machine? The one answer, used by `apply` to re-check a plan and by the planner to make it.
//!
//! Counts GPUs (type, health, free), cores by NUMA domain and memory. Which of the fitting GPUs are the best is for
//! the planner.

use crate::command::PlacePart;
use crate::id::GpuTypeId;
use crate::id::Token;
use crate::record::{Alloc, GpuHealth, Node, NodeAdmin, Part, PartState};
use crate::spec::{Shape, accepts};

/// Memory of a rank that asks for none, on a machine share without GPUs, in MiB.
pub const DEFAULT_MEM_MIB: u64 = 1_024;
/// Slots of a machine: GPUs are named by the bits of a `u128`.
pub const MAX_GPUS: usize = 128;

/// Why a part does not fit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoFit {
    #[error("node is out: {0}")]
    NotReady(String),
    #[error("{0}")]
    NotAllowed(&'static str),
    #[error("GPU slot {0} is not healthy ({1:?})")]
    Unhealthy(u8, GpuHealth),
    #[error("GPU slot {0} is taken")]
    Taken(u8),
    #[error("{0}")]
    Shape(String),
    #[error("needs {needs} cores, {free} are free")]
    Cores { needs: u32, free: u32 },
    #[error("needs {needs} MiB of memory, {free} are free")]
    Memory { needs: u64, free: u64 },
}

/// What a machine has in all: of it a shape that names no cores or no memory gets its share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Total {
    pub gpus: u32,
    pub cores: u32,
    pub mem_mib: u64,
}

impl Total {
    pub fn of(node: &Node) -> Self {
        let gpus = u32::try_from(node.gpus.len()).unwrap_or(u32::MAX);
        Self { gpus, cores: cores_of(&node.cores_by_numa), mem_mib: node.mem_mib }
    }

    /// Cores and memory (MiB) that one part of `shape` takes on such a machine, all its ranks together. Where the shape
    /// names none: beside GPUs the machine's share (cores x GPUs taken / GPUs of the machine, at least one core), without
    /// GPUs one core and 1 GiB a rank.
    pub fn request(&self, shape: &Shape) -> (u32, u64) {
        let ranks = u32::from(shape.ranks_per_node);
        let gpus = shape.gpus_per_node();
        let all_gpus = u64::from(self.gpus).max(1);
        let cores = match (shape.cores_per_rank, gpus) {
            (0, 0) => ranks,
            (0, gpus) => {
                let share = u64::from(self.cores) * u64::from(gpus) / all_gpus;
                u32::try_from(share).unwrap_or(u32::MAX).max(1)
            }
            (each, _) => u32::from(each).saturating_mul(ranks),
        };
        let mem_mib = match (shape.mem_mib_per_rank, gpus) {
            (0, 0) => DEFAULT_MEM_MIB.saturating_mul(u64::from(ranks)),
            (0, gpus) => self.mem_mib.saturating_mul(u64::from(gpus)) / all_gpus,
            (each, _) => each.saturating_mul(u64::from(ranks)),
        };
        (cores, mem_mib)
    }
}

/// [`Total::request`] on this machine.
pub fn request_on(node: &Node, shape: &Shape) -> (u32, u64) {
    Total::of(node).request(shape)
}

/// GPUs that a new lease may take: free, healthy, and of a type that is accepted.
pub fn usable_gpus(node: &Node, alloc: &Alloc, types: &[GpuTypeId]) -> u128 {
    healthy_gpus(node, types) & alloc.free_gpus
}

/// The same of a machine without leases.
pub fn healthy_gpus(node: &Node, types: &[GpuTypeId]) -> u128 {
    let healthy = node
        .gpus
        .iter()
        .take(MAX_GPUS)
        .enumerate()
        .filter(|(_, gpu)| gpu.health == GpuHealth::Ok && accepts(types, gpu.gpu_type));
    healthy.fold(0, |mask, (slot, _)| mask | 1 << slot)
}

/// Takes `cores` from the NUMA domains in the order of `prefer`, then from the others by number. The cores of each
/// domain, or `None` when fewer are free.
pub fn take_cores(alloc: &Alloc, cores: u32, prefer: &[u8]) -> Option<Vec<u16>> {
    let mut taken = vec![0u16; alloc.cores_free.len()];
    let mut missing = cores;
    let all = prefer.iter().map(|numa| usize::from(*numa)).chain(0..alloc.cores_free.len());
    for numa in all {
        let (Some(free), Some(taken)) = (alloc.cores_free.get(numa), taken.get_mut(numa)) else { continue };
        let more = u32::from(free.saturating_sub(*taken)).min(missing);
        *taken += u16::try_from(more).unwrap_or(0);
        missing -= more;
    }
    (missing == 0).then_some(taken)
}

/// Room for some part of `shape`: enough usable GPUs of one acceptable type, cores and memory. Answers the usable
/// GPUs of the first acceptable type (in the shape's order) that has enough; 0 for a shape without GPUs.
pub fn room_for(node: &Node, alloc: &Alloc, shape: &Shape) -> Result<u128, NoFit> {
    room_beside_gpus(node, alloc, shape)?;
    let gpus = shape.gpus_per_node();
    if gpus == 0 {
        return Ok(0);
    }
    let mut most = 0;
    for gpu_type in acceptable_types(node, shape) {
        let usable = usable_gpus(node, alloc, &[gpu_type]);
        if usable.count_ones() >= gpus {
            return Ok(usable);
        }
        most = most.max(usable.count_ones());
    }
    Err(NoFit::Shape(format!("needs {gpus} GPUs of one acceptable type, {most} are usable")))
}

/// The same but for its GPUs: the machine is in service and allowed, and has the cores and the memory.
pub fn room_beside_gpus(node: &Node, alloc: &Alloc, shape: &Shape) -> Result<(), NoFit> {
    ready(node)?;
    allowed(node, shape)?;
    let (cores, mem_mib) = request_on(node, shape);
    let free = cores_of(&alloc.cores_free);
    if free < cores {
        return Err(NoFit::Cores { needs: cores, free });
    }
    if alloc.mem_free_mib < mem_mib {
        return Err(NoFit::Memory { needs: mem_mib, free: alloc.mem_free_mib });
    }
    Ok(())
}

/// The types to try on this machine, best first: the shape's, or all of whole GPUs that the machine has, by slot.
pub fn acceptable_types(node: &Node, shape: &Shape) -> Vec<GpuTypeId> {
    if !shape.gpu_types.is_empty() {
        return shape.gpu_types.to_vec();
    }
    let mut types = Vec::new();
    for gpu in &node.gpus {
        if shape.accepts(gpu.gpu_type) && !types.contains(&gpu.gpu_type) {
            types.push(gpu.gpu_type);
        }
    }
    types
}

/// The one check of a chosen part: `Ok` with the mask of its GPUs and their type.
pub fn fit(node: &Node, alloc: &Alloc, shape: &Shape, part: &PlacePart) -> Result<(u128, Option<GpuTypeId>), NoFit> {
    ready(node)?;
    allowed(node, shape)?;
    let (mask, gpu_type) = fit_gpus(node, alloc, shape, &part.gpu_order)?;
    fit_cores(node, alloc, shape, &part.cores_by_numa)?;
    let (_, mem_mib) = request_on(node, shape);
    if part.mem_mib != mem_mib {
        return Err(NoFit::Shape(format!("mem_mib is {}, must be {mem_mib}", part.mem_mib)));
    }
    if alloc.mem_free_mib < mem_mib {
        return Err(NoFit::Memory { needs: mem_mib, free: alloc.mem_free_mib });
    }
    Ok((mask, gpu_type))
}

fn ready(node: &Node) -> Result<(), NoFit> {
    match &node.admin {
        NodeAdmin::Ready => Ok(()),
        NodeAdmin::Out { reason, .. } => Err(NoFit::NotReady(reason.clone())),
    }
}

fn allowed(node: &Node, shape: &Shape) -> Result<(), NoFit> {
    let refusal = shape.machines.as_ref().and_then(|selector| selector.refusal(node));
    refusal.map_or(Ok(()), |why| Err(NoFit::NotAllowed(why)))
}

fn fit_gpus(node: &Node, alloc: &Alloc, shape: &Shape, order: &[u8]) -> Result<(u128, Option<GpuTypeId>), NoFit> {
    let needs = shape.gpus_per_node();
    if u32::try_from(order.len()) != Ok(needs) {
        return Err(NoFit::Shape(format!("gpu_order names {} slots, must be {needs}", order.len())));
    }
    let (mut mask, mut of_type) = (0u128, None);
    for slot in order {
        let gpu = node.gpus.get(usize::from(*slot)).filter(|_| usize::from(*slot) < MAX_GPUS);
        let gpu = gpu.ok_or_else(|| NoFit::Shape(format!("gpu_order names slot {slot}, the node has none such")))?;
        let bit = 1u128 << slot;
        if mask & bit != 0 {
            return Err(NoFit::Shape(format!("gpu_order names slot {slot} twice")));
        }
        if gpu.health != GpuHealth::Ok {
            return Err(NoFit::Unhealthy(*slot, gpu.health));
        }
        if alloc.free_gpus & bit == 0 {
            return Err(NoFit::Taken(*slot));
        }
        if !shape.accepts(gpu.gpu_type) {
            return Err(NoFit::Shape(format!("GPU slot {slot} is of a type that the job does not accept")));
        }
        if of_type.replace(gpu.gpu_type).is_some_and(|other| other != gpu.gpu_type) {
            return Err(NoFit::Shape(format!("GPU slot {slot} is of another type than the slots before it")));
        }
        mask |= bit;
    }
    Ok((mask, of_type))
}

fn fit_cores(node: &Node, alloc: &Alloc, shape: &Shape, by_numa: &[u16]) -> Result<(), NoFit> {
    let (needs, _) = request_on(node, shape);
    let chosen = cores_of(by_numa);
    if chosen != needs {
        return Err(NoFit::Shape(format!("cores_by_numa sums up to {chosen}, must be {needs}")));
    }
    for (numa, cores) in by_numa.iter().enumerate() {
        let free = alloc.cores_free.get(numa).copied().unwrap_or(0);
        if *cores > free {
            return Err(NoFit::Cores { needs: u32::from(*cores), free: u32::from(free) });
        }
    }
    Ok(())
}

pub fn cores_of(by_numa: &[u16]) -> u32 {
    by_numa.iter().fold(0u32, |sum, cores| sum.saturating_add(u32::from(*cores)))
}

/// What is free on a machine, given the parts on it that are not Released. Never below zero: a machine may register
/// with less than what its running parts hold.
pub(crate) fn alloc_of<'a>(
    node: &Node,
    parts: impl Iterator<Item = (Token, &'a Part)>,
    orphans: Vec<crate::record::Orphan>,
) -> Alloc {
    let slots = node.gpus.len().min(MAX_GPUS);
    let mut alloc = Alloc {
        free_gpus: if slots == MAX_GPUS { u128::MAX } else { (1 << slots) - 1 },
        cores_free: node.cores_by_numa.clone(),
        mem_free_mib: node.mem_mib,
        ..Alloc::default()
    };
    for (token, part) in parts.filter(|(_, part)| part.state != PartState::Released) {
        alloc.take(token, part);
    }
    for orphan in orphans {
        alloc.free_gpus &= !orphan.gpus;
        alloc.orphans.push(orphan);
    }
    alloc
}

impl Alloc {
    /// Takes what a part holds. `leases` stays sorted by token.
    pub(crate) fn take(&mut self, token: Token, part: &Part) {
        self.take_share(part);
        for slot in &part.gpu_order {
            self.holders.insert(*slot, token);
        }
        if let Err(place) = self.leases.binary_search(&token) {
            self.leases.insert(place, token);
        }
    }

    /// The same, without a word of who holds it.
    pub(crate) fn take_share(&mut self, part: &Part) {
        self.free_gpus &= !part.gpus;
        for (free, cores) in self.cores_free.iter_mut().zip(&part.cores_by_numa) {
            *free = free.saturating_sub(*cores);
        }
        self.mem_free_mib = self.mem_free_mib.saturating_sub(part.mem_mib);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::*;
    use crate::record::*;

    fn node(gpus: usize, cores_by_numa: Vec<u16>, mem_mib: u64) -> Node {
        let gpu = |slot: usize| Gpu {
            uuid: GpuUuid([u8::try_from(slot).unwrap(); 16]),
            gpu_type: GpuTypeId(u16::try_from(slot / 4).unwrap()),
            mem_mib: 80_000,
            numa: 0,
            health: if slot == 1 { GpuHealth::Quarantined } else { GpuHealth::Ok },
            reason: String::new(),
            xid: 0,
        };
        Node {
            name: "n".into(),
            address: String::new(),
            host: String::new(),
            machine_id: [0; 16],
            boot_id: [0; 16],
            epoch: 1,
            version: String::new(),
            class: ClassId(1),
            cores_by_numa,
            mem_mib,
            gpus: (0..gpus).map(gpu).collect(),
            simulated: true,
            kill: KillStrength::Cgroup,
            admin: NodeAdmin::Ready,
            launch_fails: Vec::new(),
            labels: Default::default(),
            registered_clock_ms: 0,
        }
    }

    fn shape(ranks_per_node: u16, gpus_per_rank: u16) -> Shape {
        Shape {
            nodes: 1,
            ranks_per_node,
            gpus_per_rank,
            gpu_types: [].into(),
            cores_per_rank: 0,
            mem_mib_per_rank: 0,
            mix_types: false,
            min_bandwidth_mbps: 0,
            topology: None,
            machines: None,
        }
    }

    #[test]
    fn a_part_beside_gpus_gets_the_machines_share() {
        let node = node(8, vec![48, 48], 2_000_000);
        assert_eq!(request_on(&node, &shape(1, 1)), (12, 250_000));
        assert_eq!(request_on(&node, &shape(2, 4)), (96, 2_000_000));
        assert_eq!(request_on(&node, &shape(3, 0)), (3, 3_072));
        let asked = Shape { cores_per_rank: 5, mem_mib_per_rank: 100, ..shape(2, 1) };
        assert_eq!(request_on(&node, &asked), (10, 200));
    }

    #[test]
    fn a_small_machine_still_gives_one_core() {
        assert_eq!(request_on(&node(8, vec![2], 4_000), &shape(1, 1)), (1, 500));
    }

    #[test]
    fn cores_come_from_the_preferred_domain_first() {
        let alloc = Alloc { cores_free: vec![4, 4, 4], ..Alloc::default() };
        assert_eq!(take_cores(&alloc, 6, &[2]), Some(vec![2, 0, 4]));
        assert_eq!(take_cores(&alloc, 13, &[]), None);
        assert_eq!(take_cores(&alloc, 3, &[9, 1, 1]), Some(vec![0, 3, 0]));
    }

    #[test]
    fn room_is_of_one_type_and_of_healthy_gpus() {
        let node = node(8, vec![16], 64_000);
        let alloc = alloc_of(&node, std::iter::empty(), Vec::new());
        assert_eq!(room_for(&node, &alloc, &shape(1, 3)), Ok(0b0000_1101));
        assert_eq!(room_for(&node, &alloc, &shape(1, 4)), Ok(0b1111_0000));
        assert!(matches!(room_for(&node, &alloc, &shape(1, 5)), Err(NoFit::Shape(_))));
        let wants = Shape { gpu_types: [GpuTypeId(1), GpuTypeId(0)].into(), ..shape(1, 2) };
        assert_eq!(room_for(&node, &alloc, &wants), Ok(0b1111_0000));
        let greedy = Shape { cores_per_rank: 17, ..shape(1, 0) };
        assert_eq!(room_for(&node, &alloc, &greedy), Err(NoFit::Cores { needs: 17, free: 16 }));
    }
}
