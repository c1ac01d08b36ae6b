//! CPUs and memory of this machine, as the kernel tells them in /sys and /proc.
//!
//! Every reader takes the root of the tree, so that it can be tested on a recorded one. Counted is what jobs may use: online CPUs that this
//! process is allowed on, and memory up to the limit of its own cgroup.

use std::path::{Path, PathBuf};

use super::BackendError;
use super::cpulist::CpuList;
use super::machine::{Host, NumaNode};

/// Reads CPUs by NUMA node and the memory.
pub fn read(root: &Path) -> Result<Host, BackendError> {
    Ok(Host { numa: numa(root)?, memory_mib: memory_mib(root)? })
}

/// Whether the CPUs are Intel's, and the bandwidth between two sockets of them in MB/s (NCCL's constants).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpu {
    pub intel: bool,
    pub inter_socket_mbps: u32,
}

/// Which CPUs these are. An unknown one counts as the slowest known server kind.
pub fn cpu(root: &Path) -> Cpu {
    let text = std::fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
    let field = |name: &str| {
        text.lines().find_map(|line| {
            line.split_once(':').filter(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
        })
    };
    let number = |name: &str| field(name).and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
    match field("vendor_id").as_deref() {
        Some("GenuineIntel") => Cpu { intel: true, inter_socket_mbps: intel_mbps(number("model")) },
        Some("AuthenticAMD" | "HygonGenuine") => Cpu { intel: false, inter_socket_mbps: 16_000 },
        _ if field("CPU part").as_deref() == Some("0xd4f") => Cpu { intel: false, inter_socket_mbps: 40_000 }, // Grace
        _ if field("cpu").is_some_and(|name| name.starts_with("POWER9")) => {
            Cpu { intel: false, inter_socket_mbps: 32_000 }
        }
        _ => Cpu { intel: false, inter_socket_mbps: 6_000 },
    }
}

/// By model number of family 6: Emerald Rapids, Sapphire Rapids, Skylake to Ice Lake, Broadwell and older.
fn intel_mbps(model: u32) -> u32 {
    match model {
        0xcf.. => 40_000,
        0x8f.. => 22_000,
        0x55.. => 10_000,
        _ => 6_000,
    }
}

fn numa(root: &Path) -> Result<Vec<NumaNode>, BackendError> {
    let allowed = allowed(root);
    let usable = |cpus: CpuList| allowed.as_ref().map_or(cpus.clone(), |allowed| cpus.intersection(allowed));
    let mut nodes: Vec<NumaNode> = Vec::new();
    for (node, path) in node_directories(root) {
        let cpus = usable(list(&path.join("cpulist"))?);
        // Nodes of memory alone (a GPU's own, an expander's) have no CPUs.
        if !cpus.is_empty() {
            nodes.push(NumaNode { node, cores: cpus.count() as u32, cpus: cpus.to_string() });
        }
    }
    if nodes.is_empty() {
        let cpus = usable(list(&root.join("sys/devices/system/cpu/online"))?);
        nodes.push(NumaNode { node: 0, cores: cpus.count() as u32, cpus: cpus.to_string() });
    }
    Ok(nodes)
}

/// Ids and directories of the NUMA nodes, ascending by id.
pub(super) fn node_directories(root: &Path) -> Vec<(u32, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(root.join("sys/devices/system/node")) else { return Vec::new() };
    let node = |entry: std::fs::DirEntry| {
        let id = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
        Some((id, entry.path()))
    };
    let mut nodes: Vec<(u32, PathBuf)> = entries.flatten().filter_map(node).collect();
    nodes.sort();
    nodes
}

fn list(path: &Path) -> Result<CpuList, BackendError> {
    CpuList::parse(&text(path)?).map_err(|why| unreadable(path, &why))
}

fn text(path: &Path) -> Result<String, BackendError> {
    std::fs::read_to_string(path).map_err(|e| unreadable(path, &e.to_string()))
}

fn unreadable(path: &Path, why: &str) -> BackendError {
    BackendError::Call { call: "read host", reason: format!("{}: {why}", path.display()) }
}

/// The CPUs that this process may run on; `None` where the kernel does not say.
fn allowed(root: &Path) -> Option<CpuList> {
    let status = std::fs::read_to_string(root.join("proc/self/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    CpuList::parse(line).ok().filter(|cpus| !cpus.is_empty())
}

fn memory_mib(root: &Path) -> Result<u64, BackendError> {
    let path = root.join("proc/meminfo");
    let text = text(&path)?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib =
        total.and_then(|rest| rest.trim().strip_suffix("kB")).and_then(|digits| digits.trim().parse::<u64>().ok());
    let mib = kib.ok_or_else(|| unreadable(&path, "expected a line MemTotal: N kB"))? / 1_024;
    Ok(mib.min(cgroup_limit_mib(root).unwrap_or(u64::MAX)))
}

/// The limit at the root of the cgroup tree that is seen here: a container's own.
fn cgroup_limit_mib(root: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(root.join("sys/fs/cgroup/memory.max")).ok()?;
    text.trim().parse::<u64>().ok().map(|bytes| bytes >> 20)
}
