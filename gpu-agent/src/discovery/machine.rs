//! What a GPU machine is made of: the facts an agent registers.
//!
//! Plain data, filled by a backend (`nvml`, `sim`) and `host`. All bandwidths are integers in MB/s (10^6 bytes a second), one
//! direction, as large collective messages see them; what a placement makes of them is the scheduler's matter.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How two devices of a machine are joined over PCIe, NVLink left aside. Ordered from near to far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PcieClass {
    /// The device itself.
    #[serde(rename = "X")]
    Own,
    /// At most one PCIe bridge.
    #[serde(rename = "PIX")]
    Pix,
    /// Several PCIe bridges, no host bridge.
    #[serde(rename = "PXB")]
    Pxb,
    /// One PCIe host bridge.
    #[serde(rename = "PHB")]
    Phb,
    /// Several host bridges of one NUMA node.
    #[serde(rename = "NODE")]
    Node,
    /// The interconnect of NUMA nodes.
    #[serde(rename = "SYS")]
    Sys,
}

const PCIE_WORDS: [(&str, PcieClass); 6] = [
    ("X", PcieClass::Own),
    ("PIX", PcieClass::Pix),
    ("PXB", PcieClass::Pxb),
    ("PHB", PcieClass::Phb),
    ("NODE", PcieClass::Node),
    ("SYS", PcieClass::Sys),
];

impl FromStr for PcieClass {
    type Err = String;

    fn from_str(word: &str) -> Result<PcieClass, String> {
        let known = PCIE_WORDS.iter().find(|(known, _)| *known == word);
        known.map(|(_, class)| *class).ok_or_else(|| format!("expected X, PIX, PXB, PHB, NODE or SYS, found {word:?}"))
    }
}

impl fmt::Display for PcieClass {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = PCIE_WORDS.iter().find(|(_, class)| class == self).map_or("", |(word, _)| word);
        out.write_str(word)
    }
}

/// One GPU. Its identity is the UUID; the slot is its place in this machine's order of slots and stays its own while the agent runs,
/// also when another GPU vanishes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    /// `GPU-`, or `MIG-` of a slice, and a UUID, as CUDA_VISIBLE_DEVICES takes it.
    pub uuid: String,
    pub slot: u32,
    /// The maker's name, such as `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// The short type that jobs ask for, such as `h100`.
    pub gpu_type: String,
    /// What a job can use: total less what the driver reserves.
    pub memory_mib: u64,
    /// `9.0`; empty if not known.
    pub compute_capability: String,
    /// PCI address as sysfs writes it; empty for a simulated GPU.
    pub bus_id: String,
    /// The number in `/dev/nvidia<minor>`.
    pub minor: Option<u32>,
    /// Id of the NUMA node on the CPU side.
    pub numa_node: Option<u32>,
}

/// The GPUs that are there now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    pub driver: Option<String>,
    pub gpus: Vec<Gpu>,
    /// What could not be read, and why; with no GPUs, why there are none.
    pub notes: Vec<String>,
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    pub name: String,
    /// One direction, effective.
    pub mbps: u32,
    /// The bond that it is a member of.
    pub bond: Option<String>,
    /// To each GPU, in the order of the inventory.
    pub classes: Vec<PcieClass>,
}

/// How the GPUs of an inventory are joined. Every index is a position in that inventory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// NVLinks of each pair.
    pub nvlinks: Vec<Vec<u32>>,
    /// Of one NVLink.
    pub nvlink_mbps: u32,
    /// The NVLinks end in a switch: any subset of an island has the full bandwidth.
    pub switched: bool,
    /// The PCIe class of each pair, also where NVLink hides it.
    pub pcie: Vec<Vec<PcieClass>>,
    /// Of each GPU's PCIe link.
    pub pcie_mbps: Vec<u32>,
    /// Between two NUMA domains.
    pub inter_socket_mbps: u32,
    /// Intel CPUs slow down traffic that leaves a PCIe switch.
    pub intel_cpu: bool,
    /// GPUs without an NVLink between them can address each other; without it traffic is staged in host memory.
    pub p2p: bool,
    /// NUMA domain of each GPU: an index from 0, in order of first GPU; not a node id.
    pub domains: Vec<u32>,
    pub nics: Vec<Nic>,
}

impl Topology {
    /// The topology of some of the GPUs: those at the positions `kept`, ascending.
    pub fn of(&self, kept: &[usize]) -> Topology {
        fn square<T: Clone>(rows: &[Vec<T>], kept: &[usize]) -> Vec<Vec<T>> {
            kept.iter().map(|a| kept.iter().map(|b| rows[*a][*b].clone()).collect()).collect()
        }
        let domains: Vec<u32> = kept.iter().map(|gpu| self.domains[*gpu]).collect();
        let nics = self
            .nics
            .iter()
            .map(|nic| Nic { classes: kept.iter().map(|gpu| nic.classes[*gpu]).collect(), ..nic.clone() });
        Topology {
            nvlinks: square(&self.nvlinks, kept),
            pcie: square(&self.pcie, kept),
            pcie_mbps: kept.iter().map(|gpu| self.pcie_mbps[*gpu]).collect(),
            domains: renumber(&domains),
            nics: nics.collect(),
            nvlink_mbps: self.nvlink_mbps,
            switched: self.switched,
            inter_socket_mbps: self.inter_socket_mbps,
            intel_cpu: self.intel_cpu,
            p2p: self.p2p,
        }
    }
}

impl Topology {
    /// With some of the GPUs in slices: of each device the position of its GPU, and whether it is a slice of that. Slices have no NVLinks and
    /// reach no other device's memory.
    pub fn cut(&self, devices: &[(usize, bool)]) -> Topology {
        let positions: Vec<usize> = devices.iter().map(|(gpu, _)| *gpu).collect();
        let mut cut = self.of(&positions);
        for (a, (gpu, is_slice)) in devices.iter().enumerate() {
            for (b, (other, other_is_slice)) in devices.iter().enumerate().filter(|(b, _)| *b != a) {
                if *is_slice || *other_is_slice {
                    cut.nvlinks[a][b] = 0;
                }
                if gpu == other {
                    cut.pcie[a][b] = PcieClass::Pix;
                }
            }
        }
        cut.switched &= cut.nvlinks.iter().flatten().any(|links| *links > 0);
        cut.p2p &= devices.iter().all(|(_, is_slice)| !is_slice);
        cut
    }
}

/// Numbers any keys from 0 in order of first appearance.
pub(crate) fn renumber<K: PartialEq>(keys: &[K]) -> Vec<u32> {
    let mut seen: Vec<&K> = Vec::new();
    let mut number = |key| match seen.iter().position(|known| *known == key) {
        Some(at) => at as u32,
        None => {
            seen.push(key);
            seen.len() as u32 - 1
        }
    };
    keys.iter().map(&mut number).collect()
}

/// The CPUs of one NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaNode {
    /// The kernel's node id: a key, not an index.
    pub node: u32,
    /// Logical CPUs that jobs may use.
    pub cores: u32,
    /// Which they are (`0-23,48-71`); empty on a simulated machine, where nothing is pinned.
    pub cpus: String,
}

/// The machine around the GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    pub numa: Vec<NumaNode>,
    pub memory_mib: u64,
}

/// Everything that an agent registers about its machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub simulated: bool,
    /// Where the facts come from, for people: the driver, a model, a file.
    pub source: String,
    pub inventory: Inventory,
    pub topology: Topology,
    pub host: Host,
}

impl Machine {
    /// Where a GPU's NUMA node stands in `host.numa`; 0 where the node is not known.
    pub fn numa_index(&self, gpu: &Gpu) -> usize {
        gpu.numa_node.and_then(|node| self.host.numa.iter().position(|known| known.node == node)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subset_keeps_its_links_and_numbers_its_domains_anew() {
        let whole = Topology {
            nvlinks: vec![vec![0, 2, 1], vec![2, 0, 4], vec![1, 4, 0]],
            pcie: vec![vec![PcieClass::Own; 3]; 3],
            pcie_mbps: vec![1, 2, 3],
            domains: vec![0, 1, 1],
            nics: vec![Nic {
                name: "n".into(),
                mbps: 1,
                bond: None,
                classes: vec![PcieClass::Pix, PcieClass::Node, PcieClass::Sys],
            }],
            ..Topology::default()
        };
        let part = whole.of(&[1, 2]);
        assert_eq!(part.nvlinks, [[0, 4], [4, 0]]);
        assert_eq!(part.domains, [0, 0]);
        assert_eq!(part.pcie_mbps, [2, 3]);
        assert_eq!(part.nics[0].classes, [PcieClass::Node, PcieClass::Sys]);
    }

    #[test]
    fn slices_have_no_links_and_are_near_each_other() {
        let far = |a: usize, b: usize| if a == b { PcieClass::Own } else { PcieClass::Sys };
        let whole = Topology {
            nvlinks: vec![vec![0, 4, 4], vec![4, 0, 4], vec![4, 4, 0]],
            switched: true,
            p2p: true,
            pcie: (0..3).map(|a| (0..3).map(|b| far(a, b)).collect()).collect(),
            pcie_mbps: vec![1, 2, 3],
            domains: vec![0, 1, 1],
            ..Topology::default()
        };
        let cut = whole.cut(&[(0, false), (1, true), (1, true), (2, false)]);
        assert_eq!(cut.nvlinks, [[0, 0, 0, 4], [0; 4], [0; 4], [4, 0, 0, 0]]);
        assert_eq!((cut.pcie[1][2], cut.pcie[1][1], cut.pcie[0][1]), (PcieClass::Pix, PcieClass::Own, PcieClass::Sys));
        assert_eq!((cut.domains, cut.pcie_mbps), (vec![0, 1, 1, 1], vec![1, 2, 2, 3]));
        assert!(cut.switched && !cut.p2p);
        assert!(!whole.cut(&[(0, true), (1, true)]).switched);
    }

    #[test]
    fn classes_are_read_as_they_are_shown() {
        for (word, class) in PCIE_WORDS {
            assert_eq!(word.parse::<PcieClass>(), Ok(class));
            assert_eq!(class.to_string(), word);
            assert_eq!(serde_json::to_value(class).unwrap(), word);
        }
        assert!("NV4".parse::<PcieClass>().is_err());
    }
}
