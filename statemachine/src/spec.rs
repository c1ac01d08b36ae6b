//! What a user asks for: the part of a job that never changes after its submission.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::GpuTypeId;

/// The immutable, small half of a job, read by apply and by the planner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Free text, 1 to 128 bytes.
    pub name: String,
    /// Higher goes first; jobs of one priority go in the order of submission.
    pub priority: i32,
    pub shape: Shape,
    /// Run time of one attempt in ms, from the start of its ranks; 0 = no limit.
    pub limit_ms: u64,
    /// How long an attempt outlives its agent's last acknowledged heartbeat, in ms.
    pub lease_ttl_ms: u64,
    /// SIGTERM to SIGKILL, in ms, at cancel, time limit and lease end; at most a quarter of the lease.
    pub kill_grace_ms: u64,
    pub retry: Retry,
    pub labels: BTreeMap<String, String>,
}

/// What the ranks of a gang need. All nodes of a gang hold equally many ranks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shape {
    /// Machines, at least 1.
    pub nodes: u16,
    /// Processes on each machine, at least 1.
    pub ranks_per_node: u16,
    /// GPUs of each process; 0 = none.
    pub gpus_per_rank: u16,
    /// Acceptable GPU types in order of preference, at most 4; empty = any.
    pub gpu_types: Vec<GpuTypeId>,
    /// Machines of a gang may have GPUs of different types; otherwise all have one type.
    pub mix_types: bool,
    /// Cores of each process; 0 = the default (the machine's share beside GPUs, 1 without).
    pub cores_per_rank: u16,
    /// Memory of each process in MiB; 0 = the default (the machine's share beside GPUs, 1 GiB without).
    pub mem_mib_per_rank: u64,
    /// The least predicted collective bandwidth that is acceptable inside a machine, in MB/s; 0 = any.
    pub min_bandwidth_mbps: u32,
}

impl Shape {
    pub fn ranks(&self) -> u32 {
        u32::from(self.nodes) * u32::from(self.ranks_per_node)
    }

    pub fn gpus_per_node(&self) -> u32 {
        u32::from(self.ranks_per_node) * u32::from(self.gpus_per_rank)
    }
}

/// Backoff before the n-th retry = min(initial x multiplier^(n-1), max), then +-25 % jitter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    pub max: u16,
    pub initial_ms: u64,
    /// Multiplier in thousandths; 2000 doubles.
    pub mult_milli: u32,
    pub max_ms: u64,
    /// Exit codes that are retried (128 + signal for a signal); empty = each non-zero exit and signal.
    pub on_exit: Vec<u8>,
}

/// What a rank executes: opaque to apply, kept apart from the job so that a status change rewrites no body.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Body {
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// Working directory; empty = the agent's work directory of the job.
    pub cwd: String,
}

impl Body {
    /// Bytes of user text, what the limits count.
    pub fn size(&self) -> usize {
        self.cwd.len()
            + self.argv.iter().map(String::len).sum::<usize>()
            + self.env.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>()
    }
}
