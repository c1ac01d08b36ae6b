//! What this machine registers: the facts of discovery in the wire's shape, and what supervision needs of them (CPUs by
//! NUMA domain, the domain of each GPU).

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use proto::v1;

use super::Error;
use super::identity::Identity;
use crate::discovery::cpulist::CpuList;
use crate::discovery::machine::{Machine as Facts, PcieClass};
use crate::discovery::{self, GpuBackend, Selection, SimBackend, Topology};

/// A machine as the agent uses it.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    pub gpus: Vec<v1::GpuFacts>,
    pub links: v1::MachineLinks,
    pub cores_by_numa: Vec<u32>,
    pub mem_mib: u64,
    pub simulated: bool,
    /// Where the facts come from, for people.
    pub source: String,
    /// What could not be read, and why.
    pub notes: Vec<String>,
    /// CPUs of each NUMA domain; empty on a simulated machine, where nothing is pinned.
    pub cpus_by_numa: Vec<Vec<u32>>,
}

/// This machine's GPUs, or those of the simulated one that `gpus` names. A simulated machine is the same one over
/// restarts with the same directory, and can be told to fail through a socket there.
pub async fn discover(
    gpus: Option<&str>,
    name: &str,
    identity: &Identity,
) -> Result<(Machine, Arc<dyn GpuBackend>), Error> {
    let mock = std::env::var("ARES_MOCK_GPU").ok();
    let selection = Selection::parse(gpus, mock.as_deref()).map_err(|error| Error::Gpus(error.to_string()))?;
    let (name, machine) = (name.to_owned(), identity.machine);
    let opened = tokio::task::spawn_blocking(move || {
        let seed = machine.iter().take(8).fold(0, |seed, byte| seed << 8 | u64::from(*byte));
        let opened = discovery::open(&selection, &name, seed).map_err(|error| error.to_string())?;
        let facts = discovery::survey(opened.backend.as_ref()).map_err(|error| error.to_string())?;
        Ok::<_, String>((opened, facts))
    });
    let joined = opened.await.map_err(|error| Error::Gpus(error.to_string()))?;
    let (opened, facts) = joined.map_err(Error::Gpus)?;
    if let Some(sim) = opened.simulated {
        take_commands(&identity.dir, sim).map_err(Error::io("the simulated machine's socket"))?;
    }
    Ok((Machine::of(&facts), opened.backend))
}

fn take_commands(dir: &Path, sim: Arc<SimBackend>) -> std::io::Result<()> {
    let listener = discovery::control::bind(dir)?;
    tokio::spawn(async move {
        if let Err(error) = discovery::control::serve(listener, sim).await {
            tracing::warn!(%error, "the simulated machine takes no more commands");
        }
    });
    Ok(())
}

impl Machine {
    fn of(facts: &Facts) -> Self {
        let domain = |node: Option<u32>| facts.host.numa.iter().position(|numa| Some(numa.node) == node).unwrap_or(0);
        let gpus = facts.inventory.gpus.iter().map(|gpu| v1::GpuFacts {
            uuid: gpu.uuid.clone(),
            r#type: gpu.gpu_type.clone(),
            mem_mib: u32::try_from(gpu.memory_mib).unwrap_or(u32::MAX),
            numa: domain(gpu.numa_node) as u32,
            health: "OK".into(),
            reason: String::new(),
        });
        let cpus = |text: &str| CpuList::parse(text).map(|list| list.ids().collect()).unwrap_or_default();
        Self {
            gpus: gpus.collect(),
            links: links(&facts.topology),
            cores_by_numa: facts.host.numa.iter().map(|numa| numa.cores).collect(),
            mem_mib: facts.host.memory_mib,
            simulated: facts.simulated,
            source: facts.source.clone(),
            notes: facts.inventory.notes.clone(),
            cpus_by_numa: if facts.simulated {
                Vec::new()
            } else {
                facts.host.numa.iter().map(|numa| cpus(&numa.cpus)).collect()
            },
        }
    }

    pub fn numa_of_gpu(&self) -> BTreeMap<String, usize> {
        self.gpus.iter().map(|gpu| (gpu.uuid.clone(), gpu.numa as usize)).collect()
    }
}

fn links(topology: &Topology) -> v1::MachineLinks {
    let class = |class: &PcieClass| match class {
        PcieClass::Own => v1::PciClass::Same as i32,
        PcieClass::Pix => v1::PciClass::Pix as i32,
        PcieClass::Pxb => v1::PciClass::Pxb as i32,
        PcieClass::Phb => v1::PciClass::Phb as i32,
        PcieClass::Node => v1::PciClass::Node as i32,
        PcieClass::Sys => v1::PciClass::Sys as i32,
    };
    let nics = topology.nics.iter().map(|nic| v1::Nic {
        name: nic.name.clone(),
        mbps: nic.mbps,
        class_to_gpu: nic.classes.iter().map(class).collect(),
    });
    v1::MachineLinks {
        gpus: topology.nvlinks.len() as u32,
        nvlinks: topology.nvlinks.iter().flatten().copied().collect(),
        pci: topology.pcie.iter().flatten().map(class).collect(),
        nvlink_mbps_per_link: topology.nvlink_mbps,
        nvswitch: topology.switched,
        pcie_mbps: topology.pcie_mbps.iter().copied().min().unwrap_or(0),
        inter_socket_mbps: topology.inter_socket_mbps,
        intel_cpu: topology.intel_cpu,
        p2p: topology.p2p,
        numa: topology.domains.clone(),
        nics: nics.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_machine_is_registered_whole_and_pins_nothing() {
        let selection = Selection::parse(Some("sim:hgx-h100"), None).unwrap();
        let opened = discovery::open(&selection, "n1", 7).unwrap();
        let machine = Machine::of(&discovery::survey(opened.backend.as_ref()).unwrap());
        assert!(machine.simulated && machine.cpus_by_numa.is_empty());
        assert_eq!((machine.gpus.len(), machine.links.gpus), (8, 8));
        assert_eq!((machine.links.nvlinks.len(), machine.links.pci.len(), machine.links.numa.len()), (64, 64, 8));
        assert!(machine.links.nvswitch && machine.links.nvlink_mbps_per_link > 0);
        assert!(machine.mem_mib > 0 && machine.cores_by_numa.iter().all(|cores| *cores > 0));
        let domains = machine.cores_by_numa.len() as u32;
        assert!(machine.gpus.iter().all(|gpu| gpu.uuid.starts_with("GPU-") && gpu.numa < domains));
    }
}
