//! The real backend: GPUs through NVIDIA's management library, loaded at run time.
//!
//! No library or no driver is no failure: the machine has no GPUs and the inventory says why. All calls run on one thread behind a watchdog,
//! because a sick GPU can block any of them. One field that can't be read becomes a note and never drops a GPU. CPUs and NUMA nodes come
//! from /sys, which no cpuset cuts; classes between GPUs come from the driver. Which links count for what is in the pure functions below.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvml_wrapper::enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus, TopologyLevel};
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper::{Device, Nvml};
use tokio::sync::Notify;

use super::machine::{Gpu, Host, Inventory, PcieClass, Topology, renumber};
use super::watchdog::Guarded;
use super::{BackendError, Fault, GpuBackend, GpuProcess, HealthEvent, host, pci, typical, xid};

/// A call that takes longer has hung.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// No GPU has more NVLinks.
const MAX_LINKS: u32 = 36;

/// MIG, as the driver numbers its modes (`NVML_DEVICE_MIG_ENABLE`).
const MIG_ON: u32 = 1;

/// The remote end of a link, as the driver numbers the kinds (`nvmlIntNvLinkDeviceType_t`).
const REMOTE_IS_SWITCH: u32 = 2;

/// GPUs of this machine.
pub struct NvmlBackend {
    driver: Result<Guarded<Driver>, String>,
    root: PathBuf,
    health: Mutex<Health>,
    signal: Arc<Notify>,
}

/// Which slots are known to be empty, and what is to be told of it.
#[derive(Default)]
struct Health {
    lost: BTreeSet<u32>,
    events: Vec<HealthEvent>,
}

impl Health {
    /// Compares the GPUs that are there with all that ever were; true if there is something new to tell. Bounded by the number of slots between two
    /// drains: a slot is told again only after its GPU came back.
    fn note(&mut self, slots: &[String], present: &[Gpu]) -> bool {
        let before = self.events.len();
        for (slot, uuid) in slots.iter().enumerate() {
            let slot = slot as u32;
            if present.iter().any(|gpu| gpu.slot == slot) {
                self.lost.remove(&slot);
            } else if self.lost.insert(slot) {
                self.events.push(HealthEvent { gpu_uuid: uuid.clone(), slot, what: Fault::Lost, judgement: xid::LOST });
            }
        }
        self.events.len() > before
    }
}

/// What the driver thread owns.
struct Driver {
    nvml: Result<Nvml, String>,
    root: PathBuf,
    /// UUIDs by slot. A GPU keeps its slot when another one vanishes; one that comes anew gets the next.
    slots: Vec<String>,
}

impl NvmlBackend {
    /// Loads the library on a thread of its own. `root` is where /sys and /proc hang.
    pub fn open(root: &Path) -> NvmlBackend {
        let owned = root.to_owned();
        let make = move || Driver { nvml: Nvml::init().map_err(|e| absent(&e)), root: owned, slots: Vec::new() };
        let driver =
            Guarded::start("nvml", CALL_LIMIT, make).map_err(|e| format!("the driver thread did not start: {e}"));
        NvmlBackend { driver, root: root.to_owned(), health: Mutex::default(), signal: Arc::default() }
    }

    /// Runs a call on the driver thread; `Ok(Err(reason))` if there is no driver.
    fn call<R: Send + 'static>(
        &self,
        name: &'static str,
        f: impl FnOnce(&Nvml, &Path, &mut Vec<String>) -> Result<R, NvmlError> + Send + 'static,
    ) -> Result<Result<R, String>, BackendError> {
        let driver = match &self.driver {
            Ok(driver) => driver,
            Err(reason) => return Ok(Err(reason.clone())),
        };
        let answer = driver.call(name, |driver| match &driver.nvml {
            Ok(nvml) => Ok(f(nvml, &driver.root, &mut driver.slots)),
            Err(reason) => Err(reason.clone()),
        })?;
        match answer {
            Ok(result) => result.map(Ok).map_err(|e| BackendError::Call { call: name, reason: e.to_string() }),
            Err(reason) => Ok(Err(reason)),
        }
    }
}

impl NvmlBackend {
    fn health(&self) -> MutexGuard<'_, Health> {
        // Nothing between lock and unlock can leave it half changed.
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn absent(error: &NvmlError) -> String {
    match error {
        NvmlError::LibloadingError(why) => format!("no NVIDIA driver: its library could not be loaded ({why})"),
        other => format!("the NVIDIA driver did not start: {other}"),
    }
}

impl GpuBackend for NvmlBackend {
    fn inventory(&self) -> Result<Inventory, BackendError> {
        let read = self.call("inventory", |nvml, root, slots| Ok((inventory(nvml, root, slots)?, slots.clone())))?;
        let (inventory, slots) = match read {
            Ok(read) => read,
            Err(reason) => return Ok(Inventory { notes: vec![reason], ..Inventory::default() }),
        };
        if self.health().note(&slots, &inventory.gpus) {
            self.signal.notify_one();
        }
        Ok(inventory)
    }

    fn topology(&self) -> Result<Topology, BackendError> {
        let read = self.call("topology", topology)?;
        let no_gpus = |_| {
            let cpu = host::cpu(&self.root);
            let nics = pci::nics(&self.root, &[]);
            Topology { nics, intel_cpu: cpu.intel, inter_socket_mbps: cpu.inter_socket_mbps, ..Topology::default() }
        };
        Ok(read.unwrap_or_else(no_gpus))
    }

    fn processes(&self) -> Result<Vec<GpuProcess>, BackendError> {
        let read = self.call("processes", |nvml, _, slots| processes(nvml, slots))?;
        Ok(read.unwrap_or_default())
    }

    /// GPUs that an inventory found missing.
    fn drain_health(&self) -> Vec<HealthEvent> {
        std::mem::take(&mut self.health().events)
    }

    fn health_signal(&self) -> Arc<Notify> {
        Arc::clone(&self.signal)
    }

    fn host(&self) -> Result<Host, BackendError> {
        host::read(&self.root)
    }

    fn source(&self) -> String {
        "this machine".to_owned()
    }

    fn is_simulated(&self) -> bool {
        false
    }
}

/// A GPU, or a slice of one (a MIG instance), in its slot.
struct Found<'a> {
    slot: u32,
    uuid: String,
    device: Device<'a>,
    /// The GPU that it is a slice of.
    whole: Option<Device<'a>>,
}

impl<'a> Found<'a> {
    /// What has a place on the bus.
    fn board(&self) -> &Device<'a> {
        self.whole.as_ref().unwrap_or(&self.device)
    }

    fn is_slice(&self) -> bool {
        self.whole.is_some()
    }

    /// The driver's name of it; one that calls a slice by its GPU's name tells the profile in its attributes.
    fn name(&self) -> Result<String, NvmlError> {
        let name = self.device.name()?;
        if !self.is_slice() || name.contains(" MIG ") {
            return Ok(name);
        }
        let slice = self.device.attributes()?;
        let gb = (slice.memory_size_mb + 512) >> 10;
        Ok(format!("{name} MIG {}g.{gb}gb", slice.gpu_instance_slice_count))
    }
}

/// The devices with their UUIDs, by slot; of a GPU that is cut its slices. A device that does not tell its UUID can't be named, so it is left out with a note.
fn devices<'a>(nvml: &'a Nvml, slots: &mut Vec<String>, notes: &mut Vec<String>) -> Result<Vec<Found<'a>>, NvmlError> {
    let mut found = Vec::new();
    for index in 0..nvml.device_count()? {
        let named = nvml.device_by_index(index).and_then(|device| {
            let slices = if is_cut(&device) { Some(slices(&device)?) } else { None };
            Ok((device.uuid()?, device, slices))
        });
        match named {
            Ok((uuid, device, None)) => found.push((uuid, device, None)),
            Ok((uuid, _, Some(slices))) if slices.is_empty() => {
                notes.push(format!("{uuid}: MIG is on, and it has no instances"));
            }
            Ok((_, _, Some(slices))) => {
                found.extend(slices.into_iter().map(|(uuid, slice, whole)| (uuid, slice, Some(whole))));
            }
            Err(error) => notes.push(format!("GPU at index {index}: {error}")),
        }
    }
    let in_slot =
        |(uuid, device, whole): (String, Device<'a>, _)| Found { slot: slot_of(slots, &uuid), uuid, device, whole };
    let mut found: Vec<Found<'a>> = found.into_iter().map(in_slot).collect();
    found.sort_by_key(|found| found.slot);
    Ok(found)
}

fn is_cut(device: &Device<'_>) -> bool {
    device.mig_mode().is_ok_and(|mode| mode.current == MIG_ON)
}

/// The slices of a GPU with their UUIDs, each with a handle of the GPU. The driver numbers those that could be and says which are.
fn slices<'a>(device: &Device<'a>) -> Result<Vec<(String, Device<'a>, Device<'a>)>, NvmlError> {
    let mut slices = Vec::new();
    for index in 0..device.mig_device_count()? {
        match device.mig_device_by_index(index) {
            Ok(slice) => {
                let whole = slice.mig_parent_device()?;
                slices.push((slice.uuid()?, slice, whole));
            }
            Err(NvmlError::NotFound) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(slices)
}

/// The slot of a UUID, a new one for a new UUID.
fn slot_of(slots: &mut Vec<String>, uuid: &str) -> u32 {
    let known = slots.iter().position(|known| known == uuid);
    let slot = known.unwrap_or_else(|| {
        slots.push(uuid.to_owned());
        slots.len() - 1
    });
    slot as u32
}

fn inventory(nvml: &Nvml, root: &Path, slots: &mut Vec<String>) -> Result<Inventory, NvmlError> {
    let mut notes = Vec::new();
    let driver = noted(nvml.sys_driver_version(), "driver version", &mut notes);
    let mut gpus = Vec::new();
    for found in devices(nvml, slots, &mut notes)? {
        let (device, board, uuid) = (&found.device, found.board(), &found.uuid);
        let field = |what: &str| format!("{uuid}, {what}");
        let name = noted(found.name(), &field("name"), &mut notes).unwrap_or_default();
        let memory = noted(device.memory_info(), &field("memory"), &mut notes);
        let capability = noted(board.cuda_compute_capability(), &field("compute capability"), &mut notes);
        let bus_id =
            noted(board.pci_info(), &field("PCI address"), &mut notes).and_then(|info| pci::bus_id(&info.bus_id));
        let numa_node = bus_id.as_deref().and_then(|bus| pci::device(root, bus)).and_then(|device| device.numa_node);
        gpus.push(Gpu {
            slot: found.slot,
            gpu_type: typical::type_slug(&name),
            name,
            memory_mib: memory.map_or(0, |memory| memory.total.saturating_sub(memory.reserved) >> 20),
            compute_capability: capability.map_or_else(String::new, |c| format!("{}.{}", c.major, c.minor)),
            minor: noted(board.minor_number(), &field("minor number"), &mut notes),
            bus_id: bus_id.unwrap_or_default(),
            numa_node,
            uuid: found.uuid,
        });
    }
    if gpus.is_empty() && notes.is_empty() {
        notes.push("the NVIDIA driver finds no GPU".to_owned());
    }
    Ok(Inventory { driver, gpus, notes })
}

fn noted<T>(result: Result<T, NvmlError>, what: &str, notes: &mut Vec<String>) -> Option<T> {
    result.map_err(|error| notes.push(format!("{what}: {error}"))).ok()
}

fn topology(nvml: &Nvml, root: &Path, slots: &mut Vec<String>) -> Result<Topology, NvmlError> {
    let devices = devices(nvml, slots, &mut Vec::new())?;
    let bus_ids: Vec<Option<String>> =
        devices.iter().map(|d| d.board().pci_info().ok().and_then(|info| pci::bus_id(&info.bus_id))).collect();
    let tree: Vec<Option<pci::Device>> =
        bus_ids.iter().map(|bus| bus.as_deref().and_then(|bus| pci::device(root, bus))).collect();
    let ends = devices.iter().map(|d| if d.is_slice() { Vec::new() } else { link_ends(nvml, &d.device, root) });
    let ends: Vec<Vec<LinkEnd>> = ends.collect();
    let (nvlinks, switched) = count_links(&bus_ids, &ends);
    let capability = devices
        .first()
        .and_then(|d| d.board().cuda_compute_capability().ok())
        .map(|c| format!("{}.{}", c.major, c.minor));
    let cpu = host::cpu(root);
    Ok(Topology {
        nvlink_mbps: if nvlinks.iter().flatten().any(|links| *links > 0) {
            typical::nvlink_mbps(&capability.unwrap_or_default())
        } else {
            0
        },
        p2p: peer_access(&devices, &nvlinks),
        pcie: pcie_classes(nvml, &devices, &tree, root)?,
        pcie_mbps: devices.iter().map(|d| pcie_mbps(d.board())).collect(),
        inter_socket_mbps: cpu.inter_socket_mbps,
        intel_cpu: cpu.intel,
        domains: renumber(
            &tree.iter().map(|device| device.as_ref().and_then(|device| device.numa_node)).collect::<Vec<_>>(),
        ),
        nics: pci::nics(root, &tree),
        nvlinks,
        switched,
    })
}

/// The generation that the GPU can do (the current one sinks when it is idle) and the width that it has now. A GPU that tells neither counts as
/// generation 3 x16.
fn pcie_mbps(device: &Device<'_>) -> u32 {
    let width = device.current_pcie_link_width().or_else(|_| device.max_pcie_link_width()).unwrap_or(16);
    typical::pcie_mbps(device.max_pcie_link_gen().unwrap_or(3), width)
}

/// The driver's classes; where it does not say, those of the PCIe tree. Slices of one GPU are behind one switch.
fn pcie_classes(
    nvml: &Nvml,
    devices: &[Found<'_>],
    tree: &[Option<pci::Device>],
    root: &Path,
) -> Result<Vec<Vec<PcieClass>>, NvmlError> {
    let nodes = host::node_directories(root).len();
    let mut classes = vec![vec![PcieClass::Own; devices.len()]; devices.len()];
    for a in 0..devices.len() {
        for b in a + 1..devices.len() {
            let (one, uuid) = (devices[a].board(), devices[b].board().uuid()?);
            let is_same = devices[a].is_slice() && one.uuid()? == uuid;
            // The wrapper takes the other device by value; a second handle of the same device is no second device.
            let class = match (one.topology_common_ancestor(nvml.device_by_uuid(uuid)?), &tree[a], &tree[b]) {
                _ if is_same => PcieClass::Pix,
                (Ok(level), _, _) => class_of(level),
                (Err(_), Some(one), Some(other)) => pci::class(one, other, nodes),
                (Err(_), _, _) => PcieClass::Sys,
            };
            classes[a][b] = class;
            classes[b][a] = class;
        }
    }
    Ok(classes)
}

fn class_of(level: TopologyLevel) -> PcieClass {
    match level {
        // Two GPUs of one board share a switch on it.
        TopologyLevel::Internal | TopologyLevel::Single => PcieClass::Pix,
        TopologyLevel::Multiple => PcieClass::Pxb,
        TopologyLevel::HostBridge => PcieClass::Phb,
        TopologyLevel::Node => PcieClass::Node,
        TopologyLevel::System => PcieClass::Sys,
    }
}

/// Do all pairs without an NVLink reach each other's memory? With NVLinks everywhere: do all pairs? Slices never do.
fn peer_access(devices: &[Found<'_>], nvlinks: &[Vec<u32>]) -> bool {
    if devices.iter().any(Found::is_slice) {
        return false;
    }
    let ok = |a: usize, b: usize| {
        let status = |kind| matches!(devices[a].device.p2p_status(&devices[b].device, kind), Ok(P2pStatus::Ok));
        status(P2pCapabilitiesIndex::Read) && status(P2pCapabilitiesIndex::Write)
    };
    let pairs: Vec<(usize, usize)> =
        (0..devices.len()).flat_map(|a| (a + 1..devices.len()).map(move |b| (a, b))).collect();
    let unlinked: Vec<(usize, usize)> = pairs.iter().copied().filter(|(a, b)| nvlinks[*a][*b] == 0).collect();
    let judged = if unlinked.is_empty() { pairs } else { unlinked };
    judged.into_iter().all(|(a, b)| ok(a, b))
}

/// Where an active NVLink ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEnd {
    Switch,
    /// Another device, by bus address.
    Device(String),
}

fn link_ends(nvml: &Nvml, device: &Device<'_>, root: &Path) -> Vec<LinkEnd> {
    let mut ends = Vec::new();
    for number in 0..MAX_LINKS {
        let link = device.link_wrapper_for(number);
        match link.is_active() {
            Ok(true) => {}
            Ok(false) => continue,
            // Past the last link, or a GPU without any.
            Err(_) => break,
        }
        let remote = link.remote_pci_info().ok().and_then(|info| pci::bus_id(&info.bus_id));
        let switch = is_switch(nvml, device, number).unwrap_or(false)
            || remote.as_deref().is_some_and(|bus| is_switch_class(root, bus));
        match (switch, remote) {
            (true, _) => ends.push(LinkEnd::Switch),
            (false, Some(bus)) => ends.push(LinkEnd::Device(bus)),
            (false, None) => {}
        }
    }
    ends
}

/// The kind of the remote end, asked directly: the wrapper's own `remote_device_type` drops the answer (0.13.0).
fn is_switch(nvml: &Nvml, device: &Device<'_>, link: u32) -> Option<bool> {
    let ask = nvml_sym(nvml.lib().nvmlDeviceGetNvLinkRemoteDeviceType.as_ref()).ok()?;
    let mut kind = u32::MAX;
    // SAFETY: the handle is of a live device of this `Nvml`, and `kind` outlives the call, which writes one u32.
    let result = unsafe { nvml_try(ask(device.handle(), link, &mut kind)) };
    result.ok().map(|()| kind == REMOTE_IS_SWITCH)
}

/// PCI class 0680, "other bridge": an NVSwitch. A GPU is 0302 or 0300.
fn is_switch_class(root: &Path, bus: &str) -> bool {
    let class = std::fs::read_to_string(root.join("sys/bus/pci/devices").join(bus).join("class"));
    class.is_ok_and(|class| class.trim().starts_with("0x0680"))
}

/// NVLinks of each pair, and whether they go through a switch. Through a switch a pair has as many links as the poorer of the two. A link that
/// ends at a device that is no GPU here (a CPU, a bridge) joins no pair.
pub fn count_links(bus_ids: &[Option<String>], ends: &[Vec<LinkEnd>]) -> (Vec<Vec<u32>>, bool) {
    let to_switch: Vec<u32> =
        ends.iter().map(|ends| ends.iter().filter(|end| **end == LinkEnd::Switch).count() as u32).collect();
    let direct = |a: usize, b: usize| {
        let ends_at = |end: &&LinkEnd| matches!(end, LinkEnd::Device(bus) if Some(bus) == bus_ids[b].as_ref());
        ends[a].iter().filter(ends_at).count() as u32
    };
    let links = |a: usize, b: usize| match a == b {
        true => 0,
        // Both ends of a direct link report it; a link that only one reports is up on both.
        false => direct(a, b).max(direct(b, a)) + to_switch[a].min(to_switch[b]),
    };
    let matrix = (0..ends.len()).map(|a| (0..ends.len()).map(|b| links(a, b)).collect()).collect();
    (matrix, to_switch.iter().any(|links| *links > 0))
}

fn processes(nvml: &Nvml, slots: &mut Vec<String>) -> Result<Vec<GpuProcess>, NvmlError> {
    let mut found = Vec::new();
    for gpu in devices(nvml, slots, &mut Vec::new())? {
        for process in gpu.device.running_compute_processes()? {
            let memory_mib = match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes >> 20),
                UsedGpuMemory::Unavailable => None,
            };
            found.push(GpuProcess { gpu_uuid: gpu.uuid.clone(), pid: process.pid, memory_mib });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bus(n: u32) -> Option<String> {
        Some(format!("0000:{n:02x}:00.0"))
    }

    fn to(n: u32) -> LinkEnd {
        LinkEnd::Device(bus(n).unwrap())
    }

    #[test]
    fn direct_links_are_counted_by_pair() {
        let ends = [vec![to(2), to(2), to(3)], vec![to(1), to(1)], vec![to(1), to(9)]];
        let (links, switched) = count_links(&[bus(1), bus(2), bus(3)], &ends);
        assert_eq!(links, [[0, 2, 1], [2, 0, 0], [1, 0, 0]]);
        assert!(!switched);
    }

    #[test]
    fn links_to_a_switch_join_every_pair() {
        let ends = [vec![LinkEnd::Switch; 18], vec![LinkEnd::Switch; 17], vec![]];
        let (links, switched) = count_links(&[bus(1), bus(2), None], &ends);
        assert_eq!(links, [[0, 17, 0], [17, 0, 0], [0, 0, 0]]);
        assert!(switched);
    }

    #[test]
    fn a_gpu_keeps_its_slot_when_another_vanishes() {
        let mut slots = Vec::new();
        let all: Vec<u32> = ["a", "b", "c"].iter().map(|uuid| slot_of(&mut slots, uuid)).collect();
        assert_eq!(all, [0, 1, 2]);
        assert_eq!(slot_of(&mut slots, "c"), 2);
        assert_eq!(slot_of(&mut slots, "d"), 3);
    }

    #[test]
    fn a_gpu_that_vanishes_is_told_once_and_again_after_it_came_back() {
        let slots: Vec<String> = ["GPU-a", "GPU-b"].map(str::to_owned).to_vec();
        let gpu = |slot: u32| Gpu {
            uuid: slots[slot as usize].clone(),
            slot,
            name: String::new(),
            gpu_type: String::new(),
            memory_mib: 0,
            compute_capability: String::new(),
            bus_id: String::new(),
            minor: None,
            numa_node: None,
        };
        let mut health = Health::default();
        assert!(!health.note(&slots, &[gpu(0), gpu(1)]));
        assert!(health.note(&slots, &[gpu(0)]));
        assert!(!health.note(&slots, &[gpu(0)]));
        assert_eq!(
            health.events.iter().map(|event| (event.slot, event.gpu_uuid.as_str())).collect::<Vec<_>>(),
            [(1, "GPU-b")]
        );
        assert!(!health.note(&slots, &[gpu(0), gpu(1)]));
        assert!(health.note(&slots, &[gpu(1)]));
    }

    /// Without a driver there are no GPUs and a reason; with one, every GPU has a UUID. Either way nothing fails.
    #[test]
    fn a_machine_without_a_driver_has_no_gpus_and_says_why() {
        let backend = NvmlBackend::open(Path::new("/"));
        let inventory = backend.inventory().unwrap();
        if inventory.gpus.is_empty() {
            assert!(!inventory.notes.is_empty());
            assert!(backend.topology().unwrap().nvlinks.is_empty());
            assert!(backend.processes().unwrap().is_empty());
        } else {
            assert!(inventory.gpus.iter().all(|gpu| gpu.uuid.starts_with("GPU-") || gpu.uuid.starts_with("MIG-")));
            assert_eq!(backend.topology().unwrap().nvlinks.len(), inventory.gpus.len());
        }
        assert!(!backend.host().unwrap().numa.is_empty());
    }
}
