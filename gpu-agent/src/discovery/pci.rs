//! The PCIe tree and the network cards, as the kernel shows them under /sys.
//!
//! The real path of a device is its chain of bridges; what two chains share is their class. Every reader takes the root of the tree, so that it
//! can be tested on a recorded one.

use std::path::{Path, PathBuf};

use super::host;
use super::machine::{Nic, PcieClass};
use super::typical;

/// A PCI device and its way to the CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// From the host bridge (`pci0000:17`) down to the device itself.
    pub chain: Vec<String>,
    /// NUMA node; `None` where the kernel does not know (-1).
    pub numa_node: Option<u32>,
}

/// A PCI address as sysfs writes it (`0000:3b:00.0`), from that or from NVML's form (`00000000:3B:00.0`).
pub fn bus_id(text: &str) -> Option<String> {
    let mut parts = text.trim().rsplit(':');
    let (device, function) = parts.next()?.split_once('.')?;
    let bus = parts.next()?;
    let domain = parts.next().unwrap_or("0");
    if parts.next().is_some() {
        return None;
    }
    let hex = |text: &str| u32::from_str_radix(text, 16).ok().filter(|_| !text.starts_with('+'));
    let (domain, bus, device, function) = (hex(domain)?, hex(bus)?, hex(device)?, hex(function)?);
    (bus < 256 && device < 32 && function < 8).then(|| format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

/// The device at a bus address, if the kernel has it.
pub fn device(root: &Path, bus_id: &str) -> Option<Device> {
    device_at(root, &root.join("sys/bus/pci/devices").join(bus_id))
}

/// The device behind a directory or link under /sys; `None` if it is no PCI device.
fn device_at(root: &Path, path: &Path) -> Option<Device> {
    let devices = root.join("sys/devices").canonicalize().ok()?;
    let real = path.canonicalize().ok()?;
    let inside = real.strip_prefix(&devices).ok()?;
    let chain: Vec<String> = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    // Some platforms put the host bridge below a device of their own.
    let bridge = chain.iter().position(|part| part.starts_with("pci"))?;
    // A virtio network card is a child of its PCI function.
    let last = chain.iter().rposition(|part| bus_id(part).is_some())?;
    let function: PathBuf = std::iter::once(devices.clone()).chain(chain[..=last].iter().map(PathBuf::from)).collect();
    let numa_node = read(&function.join("numa_node")).and_then(|text| text.parse::<u32>().ok());
    (last > bridge).then(|| Device { chain: chain[bridge..=last].to_vec(), numa_node })
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The class of two devices. `nodes` is the number of NUMA nodes, which decides where the kernel knows no node.
pub fn class(a: &Device, b: &Device, nodes: usize) -> PcieClass {
    if a.chain == b.chain {
        return PcieClass::Own;
    }
    let shared = a.chain.iter().zip(&b.chain).take_while(|(a, b)| a == b).count();
    match shared {
        0 if same_node(a, b, nodes) => PcieClass::Node,
        0 => PcieClass::Sys,
        1 => PcieClass::Phb,
        // Under one switch each has at most its own port and itself left.
        _ if a.chain.len() - shared <= 2 && b.chain.len() - shared <= 2 => PcieClass::Pix,
        _ => PcieClass::Pxb,
    }
}

fn same_node(a: &Device, b: &Device, nodes: usize) -> bool {
    match (a.numa_node, b.numa_node) {
        (Some(a), Some(b)) => a == b,
        _ => nodes <= 1,
    }
}

/// The network cards that are up: RDMA devices, then Ethernet interfaces of other cards. Virtual functions are left out; so is a card whose
/// speed the kernel does not know. `gpus` are the GPUs' devices; one that sysfs does not show is SYS from everything.
pub fn nics(root: &Path, gpus: &[Option<Device>]) -> Vec<Nic> {
    let nodes = host::node_directories(root).len();
    let classes = |nic: &Device| {
        gpus.iter().map(|gpu| gpu.as_ref().map_or(PcieClass::Sys, |gpu| class(gpu, nic, nodes))).collect()
    };
    let mut found: Vec<(Device, Nic)> = Vec::new();
    for path in entries(&root.join("sys/class/infiniband")) {
        let (Some(device), Some(name), Some(gbit)) = (physical(root, &path), file_name(&path), active_gbit(&path))
        else {
            continue;
        };
        let nic = Nic { name, mbps: typical::nic_mbps(gbit), bond: None, classes: classes(&device) };
        found.push((device, nic));
    }
    let rdma = found.len();
    for path in entries(&root.join("sys/class/net")) {
        let (Some(device), Some(name), Some(gbit)) = (physical(root, &path), file_name(&path), interface_gbit(&path))
        else {
            continue;
        };
        if let Some((_, nic)) = found[..rdma].iter_mut().find(|(known, _)| known.chain == device.chain) {
            nic.bond = nic.bond.take().or_else(|| bond(&path));
            continue;
        }
        let nic = Nic { name, mbps: typical::nic_mbps(gbit), bond: bond(&path), classes: classes(&device) };
        found.push((device, nic));
    }
    found.into_iter().map(|(_, nic)| nic).collect()
}

/// Paths in a directory, by name; none if it is not there.
fn entries(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn file_name(path: &Path) -> Option<String> {
    path.file_name().map(|name| name.to_string_lossy().into_owned())
}

/// The PCI device of a card, unless it is a virtual function.
fn physical(root: &Path, class_entry: &Path) -> Option<Device> {
    let link = class_entry.join("device");
    (!link.join("physfn").exists()).then(|| device_at(root, &link)).flatten()
}

/// Gb/s of an RDMA device's active ports together; `None` if none is active.
fn active_gbit(hca: &Path) -> Option<u32> {
    let rate = |port: &PathBuf| {
        let active = read(&port.join("state"))?.contains("ACTIVE");
        let gbit = read(&port.join("rate"))?.split_whitespace().next()?.parse::<f32>().ok()?;
        (active && gbit >= 1.0).then_some(gbit as u32)
    };
    let rates: Vec<u32> = entries(&hca.join("ports")).iter().filter_map(rate).collect();
    (!rates.is_empty()).then(|| rates.iter().sum())
}

/// Gb/s of an Ethernet interface that is up and knows its speed (in Mb/s).
fn interface_gbit(interface: &Path) -> Option<u32> {
    let up = read(&interface.join("operstate"))? == "up";
    let mbit = read(&interface.join("speed"))?.parse::<u32>().ok()?;
    (up && mbit >= 1_000).then_some(mbit / 1_000)
}

fn bond(interface: &Path) -> Option<String> {
    let master = interface.join("master").canonicalize().ok()?;
    master.join("bonding").is_dir().then(|| file_name(&master)).flatten()
}
