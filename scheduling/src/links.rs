//! The link facts of one machine class, decoded: islands, PCIe groups, distances. Facts only: what they are worth is
//! `bandwidth`, which GPUs to take is `choose`.

use statemachine::record::{Class, PciClass};

/// GPUs of a machine by slot, bit i = slot i.
pub type Mask = u128;

/// The slots of a mask in ascending order, which is PCI bus order.
pub fn slots(mask: Mask) -> impl Iterator<Item = u8> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let slot = rest.trailing_zeros();
        rest &= rest.wrapping_sub(1);
        (slot < Mask::BITS).then_some(slot as u8)
    })
}

/// The mask of the first `count` slots.
pub fn first(count: usize) -> Mask {
    if count >= Mask::BITS as usize { Mask::MAX } else { (1 << count) - 1 }
}

/// More NVLinks than a GPU has: an island that shows as many ends in a switch.
const MOST_LINKS_OF_A_GPU: usize = 18;

/// A class whose matrices are shorter than its GPU count reads as "no NVLink" and "other socket" where they end.
#[derive(Clone, Debug)]
pub struct Links {
    facts: Class,
    /// NVLink island of each GPU, as a mask that holds the GPU itself.
    islands: Vec<Mask>,
    /// GPUs behind the same PCIe switch: transitive closure of PIX.
    pix_groups: Vec<Mask>,
    /// GPUs behind the same tree of PCIe switches: transitive closure of PIX and PXB.
    pxb_groups: Vec<Mask>,
    /// Islands whose links end in a switch.
    switched: Mask,
}

impl Links {
    pub fn new(class: &Class) -> Self {
        let gpus = usize::from(class.gpus).min(Mask::BITS as usize);
        let mut links = Self {
            facts: class.clone(),
            islands: Vec::new(),
            pix_groups: Vec::new(),
            pxb_groups: Vec::new(),
            switched: 0,
        };
        links.islands = closure(gpus, |a, b| links.nvlinks(a, b) > 0);
        links.pix_groups = closure(gpus, |a, b| links.pci(a, b) <= PciClass::Pix);
        links.pxb_groups = closure(gpus, |a, b| links.pci(a, b) <= PciClass::Pxb);
        links.switched =
            slots(first(gpus)).filter(|gpu| links.ends_in_a_switch(links.islands[usize::from(*gpu)])).fold(0, with);
        links
    }

    pub fn facts(&self) -> &Class {
        &self.facts
    }

    pub fn gpus(&self) -> usize {
        self.islands.len()
    }

    /// Every slot of the machine.
    pub fn all(&self) -> Mask {
        first(self.gpus())
    }

    /// NVLinks between two GPUs, one direction; where the reports of the two differ, the smaller.
    pub fn nvlinks(&self, a: u8, b: u8) -> u8 {
        if a == b {
            return 0;
        }
        let read = |i: u8, j: u8| self.facts.nvlinks.get(self.cell(i, j)).copied().unwrap_or(0);
        read(a, b).min(read(b, a))
    }

    /// PCIe class of a pair, also where NVLink hides it; where the reports of the two differ, the farther.
    pub fn pci(&self, a: u8, b: u8) -> PciClass {
        if a == b {
            return PciClass::Same;
        }
        let read = |i: u8, j: u8| self.facts.pci.get(self.cell(i, j)).copied().unwrap_or(PciClass::Sys);
        read(a, b).max(read(b, a))
    }

    pub fn numa(&self, gpu: u8) -> u8 {
        self.facts.numa.get(usize::from(gpu)).copied().unwrap_or(0)
    }

    pub fn pix_group(&self, gpu: u8) -> Mask {
        self.pix_groups[usize::from(gpu)]
    }

    pub fn pxb_group(&self, gpu: u8) -> Mask {
        self.pxb_groups[usize::from(gpu)]
    }

    /// The set lies inside one island whose links end in a switch: every subset of it is equal.
    pub fn inside_one_switch(&self, set: Mask) -> bool {
        slots(set).next().is_some_and(|gpu| self.switched & bit(gpu) != 0 && set & !self.islands[usize::from(gpu)] == 0)
    }

    /// Distinct NUMA domains of a set.
    pub fn domains(&self, set: Mask) -> u32 {
        let mut seen = [0u64; 4];
        for gpu in slots(set) {
            let numa = self.numa(gpu);
            seen[usize::from(numa / 64)] |= 1 << (numa % 64);
        }
        seen.iter().map(|word| word.count_ones()).sum()
    }

    /// Sum of the distances of all pairs: PIX 1, PXB 2, PHB 3, NODE 4, SYS 6, through a switch 0.
    pub fn distance(&self, set: Mask) -> u32 {
        slots(set).map(|a| slots(set & !first(usize::from(a) + 1)).map(|b| self.pair_distance(a, b)).sum::<u32>()).sum()
    }

    fn pair_distance(&self, a: u8, b: u8) -> u32 {
        if self.inside_one_switch(bit(a) | bit(b)) { 0 } else { steps(self.pci(a, b)) }
    }

    /// Sum over the set of each GPU's distance to its nearest NIC; 0 on a machine without NICs.
    pub fn nic_distance(&self, set: Mask) -> u32 {
        slots(set).filter_map(|gpu| self.nearest_nic_class(gpu)).map(steps).sum()
    }

    pub fn nearest_nic_class(&self, gpu: u8) -> Option<PciClass> {
        self.facts.nics.iter().map(|nic| nic_class(&nic.class_to_gpu, gpu)).min()
    }

    /// Indexes of the NICs that are nearest to any GPU of the set, each with its best class to the set.
    pub fn nearest_nics(&self, set: Mask) -> Vec<(usize, PciClass)> {
        let mut nearest = Vec::new();
        for (index, nic) in self.facts.nics.iter().enumerate() {
            let class = slots(set)
                .map(|gpu| (gpu, nic_class(&nic.class_to_gpu, gpu)))
                .filter(|(gpu, class)| self.nearest_nic_class(*gpu) == Some(*class))
                .map(|(_, class)| class)
                .min();
            nearest.extend(class.map(|class| (index, class)));
        }
        nearest
    }

    fn cell(&self, row: u8, column: u8) -> usize {
        usize::from(row) * usize::from(self.facts.gpus) + usize::from(column)
    }

    /// Told so by the machine, or more than two GPUs with equal links everywhere that add up to more than a GPU has.
    fn ends_in_a_switch(&self, island: Mask) -> bool {
        let size = island.count_ones() as usize;
        let links = slots(island)
            .flat_map(|a| slots(island & !first(usize::from(a) + 1)).map(move |b| (a, b)))
            .map(|(a, b)| self.nvlinks(a, b));
        let (least, most) = links.fold((u8::MAX, 0), |(least, most), n| (least.min(n), most.max(n)));
        let uniform = least == most && least > 0;
        let more_than_a_gpu_has = usize::from(most) * size.saturating_sub(1) > MOST_LINKS_OF_A_GPU;
        size > 1 && uniform && (self.facts.nvswitch || size > 2 && more_than_a_gpu_has)
    }
}

pub(crate) fn bit(slot: u8) -> Mask {
    1 << slot
}

pub(crate) fn with(mask: Mask, slot: u8) -> Mask {
    mask | bit(slot)
}

fn nic_class(class_to_gpu: &[PciClass], gpu: u8) -> PciClass {
    class_to_gpu.get(usize::from(gpu)).copied().unwrap_or(PciClass::Sys)
}

fn steps(class: PciClass) -> u32 {
    match class {
        PciClass::Same => 0,
        PciClass::Pix => 1,
        PciClass::Pxb => 2,
        PciClass::Phb => 3,
        PciClass::Node => 4,
        PciClass::Sys => 6,
    }
}

/// Connected components of `joined`, as one mask a GPU.
fn closure(gpus: usize, joined: impl Fn(u8, u8) -> bool) -> Vec<Mask> {
    let all = first(gpus);
    let mut groups = vec![0; gpus];
    for start in slots(all) {
        if groups[usize::from(start)] != 0 {
            continue;
        }
        let mut group = bit(start);
        let mut edge = group;
        while edge != 0 {
            let reached = slots(all & !group)
                .filter(|candidate| slots(edge).any(|member| joined(member, *candidate)))
                .fold(0, with);
            group |= reached;
            edge = reached;
        }
        for member in slots(group) {
            groups[usize::from(member)] = group;
        }
    }
    groups
}
