//! What a machine has: its GPUs, how they are joined, its NUMA nodes, CPUs, memory and network cards.
//!
//! ```text
//! Selection (--gpus, ARES_MOCK_GPU)  ->  open  ->  GpuBackend: nvml (real) or sim (a model)  ->  Machine, which the agent registers
//! ```
//! * `machine`: the facts, plain data; bandwidths in MB/s, one direction.
//! * `matrix`: reader of `nvidia-smi topo -m` text, also behind `ares topology --file`.
//! * `models`, `from_matrix`, `typical`: simulated machines, by name or from a file.
//! * `sim`, `control`: the simulated backend and the socket that makes it fail on command.
//! * `nvml`, `watchdog`: the real one; all driver calls on one thread, none trusted to return.
//! * `pci`, `host`, `cpulist`: what the kernel says in /sys and /proc, needed with GPUs or without.
//! * `xid`: what follows from an error number of the driver.
//!
//! Predicts no bandwidth and places nothing: the scheduler does. No clock here: the agent stamps what it reports.

mod from_matrix;

pub mod control;
pub mod cpulist;
pub mod host;
pub mod machine;
pub mod matrix;
pub mod models;
pub mod nvml;
pub mod pci;
pub mod sim;
pub mod typical;
pub mod watchdog;
pub mod xid;

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::Notify;

pub use machine::{Host, Inventory, Machine, Topology};
pub use models::{Model, ModelError, Selection};
pub use sim::SimBackend;

/// Why a backend could not answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    #[error("the GPU driver has not answered {call} for {seconds} s")]
    Unresponsive { call: &'static str, seconds: u64 },
    #[error("{call}: {reason}")]
    Call { call: &'static str, reason: String },
}

/// A process that computes on a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GpuProcess {
    pub gpu_uuid: String,
    /// As the driver's PID namespace numbers it.
    pub pid: u32,
    /// `None` where the driver does not say.
    pub memory_mib: Option<u64>,
}

/// Something happened to a GPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HealthEvent {
    pub gpu_uuid: String,
    pub slot: u32,
    pub what: Fault,
    pub judgement: xid::Judgement,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "fault")]
pub enum Fault {
    /// The driver reported an error; `pid` where it names a process.
    Xid { code: u32, pid: Option<u32> },
    /// The GPU is no longer there.
    Lost,
}

/// Access to the GPUs of one machine. Calls may block for as long as the watchdog allows (30 s): not for an async thread.
pub trait GpuBackend: Send + Sync {
    fn inventory(&self) -> Result<Inventory, BackendError>;

    /// How the GPUs of the inventory are joined, in its order.
    fn topology(&self) -> Result<Topology, BackendError>;

    /// Processes that compute on any GPU, whoever started them.
    fn processes(&self) -> Result<Vec<GpuProcess>, BackendError>;

    /// Takes the health events since the last call, oldest first. Never blocks.
    fn drain_health(&self) -> Vec<HealthEvent>;

    /// Notified when there are health events to drain.
    fn health_signal(&self) -> Arc<Notify>;

    /// CPUs and memory of the machine.
    fn host(&self) -> Result<Host, BackendError>;

    /// Where the facts come from, for people.
    fn source(&self) -> String;

    fn is_simulated(&self) -> bool;
}

/// Everything that an agent registers, in one consistent reading.
pub fn survey(backend: &dyn GpuBackend) -> Result<Machine, BackendError> {
    // A GPU that vanishes between the two calls would leave matrices of another size: read again then.
    for _ in 0..3 {
        let (inventory, topology) = (backend.inventory()?, backend.topology()?);
        if inventory.gpus.len() == topology.nvlinks.len() {
            let host = backend.host()?;
            return Ok(Machine {
                simulated: backend.is_simulated(),
                source: backend.source(),
                inventory,
                topology,
                host,
            });
        }
    }
    Err(BackendError::Call { call: "topology", reason: "GPUs came and went during three readings".to_owned() })
}

/// A backend, and the handle to make it fail if it is simulated.
pub struct Opened {
    pub backend: Arc<dyn GpuBackend>,
    pub simulated: Option<Arc<SimBackend>>,
}

/// Opens what was selected. `machine` and `seed` name a simulated machine: its GPUs keep their UUIDs over restarts with the same two. Does not
/// fail for want of a driver: the machine then has no GPUs, and its inventory says why.
pub fn open(selection: &Selection, machine: &str, seed: u64) -> Result<Opened, ModelError> {
    let model = match selection {
        Selection::Real => {
            return Ok(Opened { backend: Arc::new(nvml::NvmlBackend::open(Path::new("/"))), simulated: None });
        }
        Selection::Named(name) => Model::named(name)?,
        Selection::File(path) => Model::file(path)?,
        Selection::Mock => Model::mock()?,
    };
    let sim = Arc::new(SimBackend::new(model, machine, seed));
    Ok(Opened { backend: Arc::<SimBackend>::clone(&sim), simulated: Some(sim) })
}
