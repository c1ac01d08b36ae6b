//! What a user asks for: the part of a job that never changes after its submission.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::array::Array;
use crate::domain::Topology;
use crate::id::{GpuTypeId, JobId};
use crate::selector::Selector;

/// The immutable, small half of a job, read by apply and by the planner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// Free text, 1 to 128 bytes.
    pub name: Box<str>,
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
    /// What few jobs ask for.
    pub terms: Option<Box<Terms>>,
}

/// Rare terms, apart so that a plain job that waits stays small.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Does not start before this wall time; 0 = now.
    pub begin_wall_ms: i64,
    /// Ends by this wall time, or is cancelled instead of started; 0 = none.
    pub deadline_wall_ms: i64,
    /// Starts after these jobs have ended, at most 64.
    pub after: Vec<After>,
    /// The named priority that gave the job its own; empty = none.
    pub class: String,
    /// What tells an attempt that is preempted to save its work; 0 = SIGTERM.
    pub checkpoint_signal: u8,
    /// Runs on the machines of this reservation, in its time alone; empty = on those that none sets aside.
    pub reservation: String,
    /// It stands for so many tasks.
    pub array: Option<Array>,
    /// Beside open machines: where there is room an attempt has twice the GPUs of the shape, up to so many times over.
    pub doublings: u8,
}

/// A job that another one waits for, and how it must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct After {
    pub kind: AfterKind,
    pub job: JobId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum AfterKind {
    /// SUCCEEDED.
    Ok,
    /// However it ends.
    Any,
    /// In any way but SUCCEEDED.
    NotOk,
    /// Index by index: the parent's task of the same index SUCCEEDED. Of a plain job the same as `Ok`.
    Corr,
}

impl AfterKind {
    pub fn name(self) -> &'static str {
        match self {
            AfterKind::Ok => "afterok",
            AfterKind::Any => "afterany",
            AfterKind::NotOk => "afternotok",
            AfterKind::Corr => "aftercorr",
        }
    }
}

impl JobSpec {
    pub fn begin_wall_ms(&self) -> i64 {
        self.terms.as_ref().map_or(0, |terms| terms.begin_wall_ms)
    }

    pub fn deadline_wall_ms(&self) -> i64 {
        self.terms.as_ref().map_or(0, |terms| terms.deadline_wall_ms)
    }

    pub fn after(&self) -> &[After] {
        self.terms.as_ref().map_or(&[], |terms| &terms.after)
    }

    pub fn checkpoint_signal(&self) -> u8 {
        self.terms.as_ref().map_or(0, |terms| terms.checkpoint_signal)
    }

    /// The reservation that it runs in; empty = none.
    pub fn reservation(&self) -> &str {
        self.terms.as_ref().map_or("", |terms| terms.reservation.as_str())
    }

    pub fn array(&self) -> Option<&Array> {
        self.terms.as_ref()?.array.as_ref()
    }

    /// How often the GPUs of an open shape may be doubled.
    pub fn doublings(&self) -> u8 {
        self.terms.as_ref().filter(|_| self.shape.is_open()).map_or(0, |terms| terms.doublings)
    }

    /// What of an array's spec holds for a task that starts.
    pub(crate) fn of_element(&self) -> Self {
        let terms = self.terms.as_ref().map(|terms| Terms {
            begin_wall_ms: 0,
            after: Vec::new(),
            array: None,
            class: terms.class.clone(),
            reservation: terms.reservation.clone(),
            ..**terms
        });
        let terms = terms.filter(|terms| *terms != Terms::default()).map(Box::new);
        Self {
            terms,
            name: self.name.clone(),
            shape: self.shape.clone(),
            retry: self.retry.clone(),
            labels: self.labels.clone(),
            ..*self
        }
    }

    /// How long one attempt may hold its machines: its time limit and the grace behind it; `None` = without end.
    pub fn length_ms(&self) -> Option<u64> {
        (self.limit_ms > 0).then(|| self.limit_ms.saturating_add(self.kill_grace_ms))
    }

    /// The wall time after which a start can't keep the deadline any more; without a time limit the deadline itself.
    pub fn latest_start_wall_ms(&self) -> Option<i64> {
        let deadline_ms = self.deadline_wall_ms();
        (deadline_ms != 0).then(|| deadline_ms.saturating_sub_unsigned(self.limit_ms))
    }
}

/// What the ranks of a gang need. All nodes of a gang hold equally many ranks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shape {
    /// Machines; 0 = as few as hold its GPUs in equal parts (`cut`), beside GPUs alone.
    pub nodes: u16,
    /// Processes on each machine, at least 1.
    pub ranks_per_node: u16,
    /// GPUs of each process, where it leaves its machines open as if on one; 0 = none.
    pub gpus_per_rank: u16,
    /// Acceptable GPU types in order of preference, at most 4; empty = any of whole GPUs.
    pub gpu_types: Box<[GpuTypeId]>,
    /// Machines of a gang may have GPUs of different types; otherwise all have one type.
    pub mix_types: bool,
    /// Cores of each process; 0 = the default (the machine's share beside GPUs, 1 without).
    pub cores_per_rank: u16,
    /// Memory of each process in MiB; 0 = the default (the machine's share beside GPUs, 1 GiB without).
    pub mem_mib_per_rank: u64,
    /// The least predicted collective bandwidth that is acceptable inside a machine, in MB/s; 0 = any.
    pub min_bandwidth_mbps: u32,
    /// How near to each other the machines must, or had better, be; absent = as near as there is room.
    pub topology: Option<Topology>,
    /// Which machines it may be on; absent = any.
    pub machines: Option<Box<Selector>>,
}

impl Shape {
    /// On one machine, where that is open.
    pub fn ranks(&self) -> u32 {
        u32::from(self.nodes.max(1)) * u32::from(self.ranks_per_node)
    }

    pub fn gpus_per_node(&self) -> u32 {
        u32::from(self.ranks_per_node) * u32::from(self.gpus_per_rank)
    }

    /// It may have GPUs of this type.
    pub fn accepts(&self, gpu_type: GpuTypeId) -> bool {
        accepts(&self.gpu_types, gpu_type)
    }
}

/// Whether who names these types may have GPUs of this one: none stands for all whole GPUs, and slices are for those who name them.
pub fn accepts(types: &[GpuTypeId], gpu_type: GpuTypeId) -> bool {
    if types.is_empty() { !gpu_type.is_slice() } else { types.contains(&gpu_type) }
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
    pub on_exit: Box<[u8]>,
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
