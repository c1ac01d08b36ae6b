//! What this machine registers: the facts of discovery in the wire's shape, and what supervision needs of them (CPUs by
//! NUMA domain, the domain of each GPU).

use std::collections::BTreeMap;

use proto::v1;

/// A machine as the agent uses it.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    pub gpus: Vec<v1::GpuFacts>,
    pub links: Option<v1::MachineLinks>,
    pub cores_by_numa: Vec<u32>,
    pub mem_mib: u64,
    pub simulated: bool,
    /// Where the facts come from, for people.
    pub source: String,
    /// CPUs of each NUMA domain; empty on a simulated machine, where nothing is pinned.
    pub cpus_by_numa: Vec<Vec<u32>>,
}

impl Machine {
    pub fn numa_of_gpu(&self) -> BTreeMap<String, usize> {
        self.gpus.iter().map(|gpu| (gpu.uuid.clone(), gpu.numa as usize)).collect()
    }
}

/// What this machine has, or what the simulated one would.
pub fn discover(gpus: Option<&str>) -> Result<Machine, String> {
    if let Some(spec) = gpus {
        return Err(format!("{spec:?}: not understood"));
    }
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    Ok(Machine {
        cores_by_numa: vec![cores],
        mem_mib: 1_024,
        source: "this machine".into(),
        cpus_by_numa: vec![(0..cores).collect()],
        ..Machine::default()
    })
}
