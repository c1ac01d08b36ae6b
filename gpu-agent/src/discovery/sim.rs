//! The simulated backend: a model that answers like a driver and fails on command.
//!
//! No thread, no file, no clock: ten thousand simulated GPUs are ten thousand records. The commands come from `control` or from a test.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use tokio::sync::Notify;
use uuid::Uuid;

use super::machine::{Gpu, Host, Inventory, Topology};
use super::models::{Model, Slice};
use super::{BackendError, Fault, GpuBackend, GpuProcess, HealthEvent, typical, xid};

/// Health events that wait for the agent; over it a command is refused.
const MAX_EVENTS: usize = 1_024;

/// What a simulated GPU can be told to do.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Verb {
    /// The driver reports an error on the GPU in slot `gpu`.
    Xid { gpu: u32, code: u32, pid: Option<u32> },
    /// The GPU in slot `gpu` vanishes: the enumeration is one shorter, other slots keep their numbers.
    Lost { gpu: u32 },
}

/// Why a command was not carried out; nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VerbError {
    #[error("gpu: expected a slot below {slots}, found {gpu}")]
    NoSuchGpu { gpu: u32, slots: usize },
    #[error("gpu: {gpu} is already lost")]
    AlreadyLost { gpu: u32 },
    #[error("{MAX_EVENTS} health events wait to be read; try again")]
    Full,
}

#[derive(Debug, Default)]
struct State {
    lost: BTreeSet<usize>,
    events: VecDeque<HealthEvent>,
}

/// A simulated machine.
#[derive(Debug)]
pub struct SimBackend {
    model: Model,
    /// All GPUs of the model by slot, lost ones too.
    gpus: Vec<Gpu>,
    state: Mutex<State>,
    signal: Arc<Notify>,
}

impl SimBackend {
    /// A machine of this model. Its UUIDs follow from seed, machine name and slot.
    pub fn new(model: Model, machine: &str, seed: u64) -> SimBackend {
        let gpu = |(slot, slice): (usize, &Option<Slice>)| Gpu {
            uuid: gpu_uuid(seed, machine, slot as u32, slice.is_some()),
            slot: slot as u32,
            gpu_type: typical::type_slug(&name_of(&model, slice)),
            name: name_of(&model, slice),
            memory_mib: slice.as_ref().map_or(model.gpu.memory_mib, |slice| slice.memory_mib),
            compute_capability: model.gpu.compute_capability.clone(),
            bus_id: String::new(),
            minor: Some(slot as u32),
            numa_node: model.numa_nodes.get(slot).copied(),
        };
        let gpus = model.slices.iter().enumerate().map(gpu).collect();
        SimBackend { model, gpus, state: Mutex::default(), signal: Arc::default() }
    }

    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Carries out one command.
    pub fn act(&self, verb: &Verb) -> Result<(), VerbError> {
        let mut state = self.state();
        let slot = match verb {
            Verb::Xid { gpu, .. } | Verb::Lost { gpu } => *gpu,
        };
        let gpu = self.gpus.get(slot as usize).ok_or(VerbError::NoSuchGpu { gpu: slot, slots: self.gpus.len() })?;
        if state.lost.contains(&(slot as usize)) {
            return Err(VerbError::AlreadyLost { gpu: slot });
        }
        if state.events.len() >= MAX_EVENTS {
            return Err(VerbError::Full);
        }
        let (what, judgement) = match verb {
            Verb::Xid { code, pid, .. } => (Fault::Xid { code: *code, pid: *pid }, xid::judge(*code)),
            Verb::Lost { .. } => {
                state.lost.insert(slot as usize);
                (Fault::Lost, xid::LOST)
            }
        };
        state.events.push_back(HealthEvent { gpu_uuid: gpu.uuid.clone(), slot, what, judgement });
        drop(state);
        self.signal.notify_one();
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing between lock and unlock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Slots of the GPUs that are there.
    fn present(&self) -> Vec<usize> {
        let state = self.state();
        (0..self.gpus.len()).filter(|slot| !state.lost.contains(slot)).collect()
    }
}

impl GpuBackend for SimBackend {
    fn inventory(&self) -> Result<Inventory, BackendError> {
        let gpus = self.present().into_iter().map(|slot| self.gpus[slot].clone()).collect();
        Ok(Inventory { driver: None, gpus, notes: Vec::new() })
    }

    fn topology(&self) -> Result<Topology, BackendError> {
        Ok(self.model.topology.of(&self.present()))
    }

    /// Nothing computes on a simulated GPU.
    fn processes(&self) -> Result<Vec<GpuProcess>, BackendError> {
        Ok(Vec::new())
    }

    fn drain_health(&self) -> Vec<HealthEvent> {
        self.state().events.drain(..).collect()
    }

    fn health_signal(&self) -> Arc<Notify> {
        Arc::clone(&self.signal)
    }

    fn host(&self) -> Result<Host, BackendError> {
        Ok(self.model.host.clone())
    }

    fn source(&self) -> String {
        self.model.source.clone()
    }

    fn is_simulated(&self) -> bool {
        true
    }
}

/// As the driver names a GPU and a slice of it.
fn name_of(model: &Model, slice: &Option<Slice>) -> String {
    slice.as_ref().map_or_else(|| model.gpu.name.clone(), |slice| format!("{} MIG {}", model.gpu.name, slice.profile))
}

/// The UUID of a simulated GPU: version 8 (our own), a 128-bit FNV-1a of seed, machine and slot.
fn gpu_uuid(seed: u64, machine: &str, slot: u32, is_slice: bool) -> String {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    let parts = [&slot.to_le_bytes()[..], &seed.to_le_bytes(), machine.as_bytes()];
    let hash =
        parts.iter().copied().flatten().fold(OFFSET, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(PRIME));
    let uuid = uuid::Builder::from_custom_bytes(hash.to_be_bytes()).into_uuid();
    format!("{}-{}", if is_slice { "MIG" } else { "GPU" }, Uuid::hyphenated(uuid))
}
