//! A model out of a matrix: the matrix gives the links, the file's comments may name GPU and CPU, the rest is typical.
//!
//! Typical values follow from the class of the links (an `NV18` machine has GPUs of NVLink 4 and PCIe gen 5). They are said to be such in the
//! model's source; a TOML model with `topo_file` states them instead.

use super::machine::{Host, Nic, NumaNode, PcieClass, Topology, renumber};
use super::matrix::{Class, Facts};
use super::models::{GpuFacts, Model};
use super::typical::{self, GpuModel};

/// Memory of a host beside each GPU when nothing says it, MiB.
const HOST_MIB_PER_GPU: u64 = 65_536;

/// A list with fewer CPUs for each GPU was cut by a job's cpuset; it says nothing of the machine.
const FEWEST_CPUS_PER_GPU: usize = 2;

/// Cores of a domain for each of its GPUs when nothing says it.
const CORES_PER_GPU: u32 = 8;

/// The model of a matrix. `comments` is the free text of the file.
pub(super) fn model(name: &str, shown: &str, facts: &Facts, comments: &str) -> Result<Model, String> {
    let classes = known_classes(facts)?;
    let named = typical::gpu_in(comments);
    let gpu = named.unwrap_or_else(|| typical_gpu(facts, &classes));
    let domains = domain_of_gpus(facts);
    let (intel_cpu, inter_socket_mbps) =
        typical::cpu_in(comments, &gpu).unwrap_or_else(|| typical::cpu_of(facts.locality_domains.len(), &gpu));
    let topology = Topology {
        nvlinks: links(&classes),
        nvlink_mbps: if gpu.nvlink_mbps > 0 { gpu.nvlink_mbps } else { typical_nvlink(facts) },
        switched: facts.nvswitch,
        pcie: pcie(&classes, &domains),
        pcie_mbps: vec![gpu.pcie_mbps; facts.gpus],
        inter_socket_mbps,
        intel_cpu,
        p2p: gpu.p2p,
        nics: nics(facts, gpu.pcie_mbps)?,
        domains,
    };
    let numa_nodes = numa_nodes(facts, &topology.domains);
    let host = host(facts, &topology.domains, &numa_nodes);
    let stated = if named.is_some() { "GPU as its comments name it" } else { "typical constants" };
    Ok(Model {
        name: name.to_owned(),
        source: format!("simulated: matrix {shown}, {stated}"),
        gpu: GpuFacts {
            name: gpu.name.to_owned(),
            memory_mib: gpu.memory_mib,
            compute_capability: gpu.compute_capability.to_owned(),
        },
        topology,
        slices: vec![None; facts.gpus],
        numa_nodes,
        host,
    })
}

fn known_classes(facts: &Facts) -> Result<Vec<Vec<Class>>, String> {
    let row = |(a, row): (usize, &Vec<Option<Class>>)| {
        let class = |(b, class): (usize, &Option<Class>)| {
            class.ok_or_else(|| {
                format!("the matrix lacks the rows of GPU {a} and GPU {b}: nothing says how they are joined")
            })
        };
        row.iter().enumerate().map(class).collect::<Result<Vec<_>, _>>()
    };
    facts.gpu_classes.iter().enumerate().map(row).collect()
}

fn links(classes: &[Vec<Class>]) -> Vec<Vec<u32>> {
    let links = |class: &Class| if let Class::NvLink(links) = class { *links } else { 0 };
    classes.iter().map(|row| row.iter().map(links).collect()).collect()
}

/// The PCIe class behind each pair; where NVLink hides it: NODE in one domain, else SYS.
fn pcie(classes: &[Vec<Class>], domains: &[u32]) -> Vec<Vec<PcieClass>> {
    let hidden = |a: usize, b: usize| if domains[a] == domains[b] { PcieClass::Node } else { PcieClass::Sys };
    let class = |a: usize, b: usize| pcie_class(classes[a][b]).unwrap_or_else(|| hidden(a, b));
    (0..classes.len()).map(|a| (0..classes.len()).map(|b| class(a, b)).collect()).collect()
}

fn pcie_class(class: Class) -> Option<PcieClass> {
    Some(match class {
        Class::Own => PcieClass::Own,
        Class::NvLink(_) => return None,
        Class::Pix => PcieClass::Pix,
        Class::Pxb => PcieClass::Pxb,
        Class::Phb => PcieClass::Phb,
        Class::Node => PcieClass::Node,
        Class::Sys => PcieClass::Sys,
    })
}

fn domain_of_gpus(facts: &Facts) -> Vec<u32> {
    let domain = |gpu: &str| facts.locality_domains.iter().position(|domain| domain.iter().any(|member| member == gpu));
    renumber(&facts.gpu_names().map(domain).collect::<Vec<_>>())
}

/// Node ids as printed (the first of a range); without them the domain stands for the node.
fn numa_nodes(facts: &Facts, domains: &[u32]) -> Vec<u32> {
    let printed = |gpu: &str| facts.numa_affinity.get(gpu).and_then(|text| text.as_deref()).and_then(first_id);
    let nodes: Option<Vec<u32>> = facts.gpu_names().map(printed).collect();
    nodes.unwrap_or_else(|| domains.to_vec())
}

fn first_id(list: &str) -> Option<u32> {
    super::cpulist::CpuList::parse(list).ok()?.ids().next()
}

/// Cores as the CPU lists show them, unless a cpuset cut them.
fn host(facts: &Facts, domains: &[u32], numa_nodes: &[u32]) -> Host {
    let counts: Vec<usize> = facts.cpu_affinity_count.0.iter().map(|(_, count)| *count).collect();
    let mut numa: Vec<NumaNode> = Vec::new();
    for domain in 0..domains.iter().max().map_or(0, |last| last + 1) {
        let gpus: Vec<usize> = (0..domains.len()).filter(|gpu| domains[*gpu] == domain).collect();
        let shown = gpus.iter().map(|gpu| counts[*gpu]).max().unwrap_or(0);
        let whole = shown >= gpus.len() * FEWEST_CPUS_PER_GPU;
        let cores = if whole { shown as u32 } else { gpus.len() as u32 * CORES_PER_GPU };
        let node = gpus.first().map_or(domain, |gpu| numa_nodes[*gpu]);
        match numa.iter_mut().find(|known| known.node == node) {
            Some(known) => known.cores += cores,
            None => numa.push(NumaNode { node, cores, cpus: String::new() }),
        }
    }
    numa.sort_by_key(|node| node.node);
    Host { numa, memory_mib: facts.gpus as u64 * HOST_MIB_PER_GPU }
}

fn nics(facts: &Facts, pcie_mbps: u32) -> Result<Vec<Nic>, String> {
    let nic = |nic: &super::matrix::NicColumn| {
        let class = |gpu: &str| {
            let class = facts.gpu_nic_classes.get(gpu).and_then(|nics| nics.get(nic.name())).copied().flatten();
            class
                .and_then(pcie_class)
                .ok_or_else(|| format!("the matrix does not say how {gpu} reaches {}", nic.name()))
        };
        // An old card (mlx4) is FDR; others go with the machine's PCIe generation: EDR, HDR, NDR.
        let mbps = if nic.name().starts_with("mlx4") { typical::nic_mbps(50) } else { pcie_mbps };
        let classes = facts.gpu_names().map(class).collect::<Result<Vec<_>, _>>()?;
        Ok(Nic { name: nic.name().to_owned(), mbps, bond: None, classes })
    };
    facts.nics.iter().map(nic).collect()
}

/// A GPU nobody named: what machines with such links have.
fn typical_gpu(facts: &Facts, classes: &[Vec<Class>]) -> GpuModel {
    let most = facts.nvlink_pairs.iter().map(|(_, _, links)| *links).max().unwrap_or(0);
    let switches = classes.iter().flatten().any(|class| matches!(class, Class::Pix | Class::Pxb));
    GpuModel {
        name: "NVIDIA GPU",
        memory_mib: 24_576,
        compute_capability: "",
        nvlink_mbps: typical_nvlink(facts),
        pcie_mbps: match most {
            0 => 24_000,
            13.. => 48_000,
            1 | 2 if !pairs_only(facts) => 12_000,
            6 if facts.nvswitch => 12_000,
            _ => 24_000,
        },
        // Peer access is the rule with NVLink or under PCIe switches, and the exception on consumer boards.
        p2p: most > 0 || switches,
    }
}

/// Effective MB/s of one NVLink by the number of links: 13 and more are NVLink 4, a bridged pair of few links is a GeForce or RTX bridge.
fn typical_nvlink(facts: &Facts) -> u32 {
    let most = facts.nvlink_pairs.iter().map(|(_, _, links)| *links).max().unwrap_or(0);
    match most {
        0 => 0,
        13.. => 20_600,
        1..=4 if pairs_only(facts) => 12_000,
        _ => 20_000,
    }
}

fn pairs_only(facts: &Facts) -> bool {
    facts.nvlink_islands.iter().all(|island| island.len() == 2)
}
