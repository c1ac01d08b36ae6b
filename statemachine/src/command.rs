//! The log's vocabulary: what an entry carries, and what its commands answer.
//!
//! Enums here are append-only: a variant's number is its place, and a number is never reused. Facts that depend on a
//! replica's own configuration are decided above apply and arrive as facts.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::id::*;
use crate::record::{Body, Class, Exit, ExitCause, GpuHealth, KillStrength, StoredReply};
use crate::settings::OrderBy;
use crate::spec::{JobSpec, Retry};

/// One entry of the replicated log: time and randomness from the leader, then commands of many clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Feature level that the commands need; a replica below it stops.
    pub level: u16,
    /// The leader's cluster time; the state's clock is the running maximum.
    pub clock_ms: u64,
    /// The leader's wall time, for display and calendar rules only.
    pub wall_ms: i64,
    /// Drawn by the leader; the only randomness that apply knows.
    pub salt: u64,
    pub cmds: Vec<Cmd>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cmd {
    pub request: Option<RequestId>,
    /// Who asks, as the server knows it; interned by apply.
    pub actor: String,
    pub body: Command,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    SubmitJob(Box<SubmitJob>),
    Cancel {
        job: JobId,
    },
    Plan(Plan),
    RegisterNode(Box<RegisterNode>),
    /// Health facts and the action decided for them, above apply.
    GpuHealth(GpuHealthChange),
    Report(Report),
    /// The leader measured a silence longer than the lease allows.
    NodeSilent {
        node: NodeId,
        epoch: u64,
        tokens: Vec<Token>,
    },
    LeaseDue {
        token: Token,
        cause: DueCause,
    },
    /// An operator's word that no process of the part is alive.
    ConfirmDead {
        node: NodeId,
        token: Option<Token>,
    },
    OpenSession {
        owner: String,
        ttl_ms: u64,
    },
    EndSession {
        session: SessionId,
    },
    Acquire {
        session: SessionId,
        name: String,
    },
    Unlock {
        session: SessionId,
        name: String,
    },
    Member {
        replica: u64,
        level: u16,
    },
    Compact {
        rev: Revision,
    },
    Retain {
        bucket: u32,
    },
    /// Changes nothing: replicas keep their state as it is at this entry, so that it can be compared.
    Mark,
    /// Runs due timers and chores.
    Tick,
    /// Takes a node out of scheduling, with a reason, or back in.
    NodeAdmin {
        node: NodeId,
        out: Option<NodeOut>,
    },
    /// Keeps a job from starting until it is released.
    Hold {
        job: JobId,
    },
    Release {
        job: JobId,
    },
    /// Back to its place in the queue: a running attempt ends as PREEMPTED.
    Requeue {
        job: JobId,
    },
    SetTenant(Box<SetTenant>),
    RemoveTenant {
        name: String,
    },
    SetPriority(SetPriority),
    RemovePriority {
        name: String,
    },
    /// A cluster goes on from a backup, as a new generation.
    Restore {
        generation: u32,
    },
    SetPolicy(SetPolicy),
    Preempt(Preempt),
    /// A running attempt can be gone on from here; whoever knows its token speaks for it.
    Checkpoint {
        token: Token,
        path: String,
        step: u64,
    },
    CreateReservation(Box<CreateReservation>),
    /// Before its time, or before it has begun; what runs there runs on.
    EndReservation {
        name: String,
    },
}

/// Machines to be set aside for a window of wall time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateReservation {
    pub name: String,
    /// For nobody's jobs.
    pub maintenance: bool,
    /// Who may use it, where it is no maintenance; all empty = everybody.
    pub tenants: Vec<String>,
    pub users: Vec<String>,
    pub machines: Machines,
    /// 0 = now.
    pub start_wall_ms: i64,
    pub duration_ms: u64,
    pub requeue: bool,
    pub reason: String,
}

/// Which machines: those named, or those that match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machines {
    pub names: Vec<String>,
    /// With GPUs of this type; empty = any. Nothing that matches may stand beside names.
    pub gpu_type: String,
    pub labels: BTreeMap<String, String>,
    /// So many of those that match, free ones first; 0 = all of them.
    pub count: u32,
}

/// Running attempts end and go back to the queue, so that a task that waits can start: all of them or none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preempt {
    pub task: TaskKey,
    pub victims: Vec<Token>,
    /// What the task will take; kept for it from now on.
    pub parts: Vec<PlacePart>,
}

/// How the planner orders and protects what waits; what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetPolicy {
    pub order: Option<OrderBy>,
    pub reservations: Option<u32>,
    /// 0 = never.
    pub aged_after_ms: Option<u64>,
    pub min_run_ms: Option<u64>,
    /// 0 = nobody makes room for another one.
    pub preemptions: Option<u32>,
    pub claim_ms: Option<u64>,
    /// 0 = no turns.
    pub turn_gpu_ms: Option<u64>,
    pub turn_run_ms: Option<u64>,
    /// 0 = never.
    pub turn_wait_ms: Option<u64>,
}

/// Out of scheduling.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeOut {
    pub reason: String,
    /// What still runs there after so many ms of cluster time goes back to the queue; absent = it runs on.
    pub evict_in_ms: Option<u64>,
}

/// A tenant as it shall be; what is absent stays, or begins at its default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetTenant {
    pub name: String,
    /// It must not exist yet; otherwise it must.
    pub create: bool,
    /// Empty = a top one.
    pub parent: Option<String>,
    pub weight: Option<u32>,
    /// GPUs by type slug; the whole map.
    pub guaranteed: Option<BTreeMap<String, u32>>,
    pub limit_by_type: Option<BTreeMap<String, u32>>,
    /// The inner `None` lifts the limit.
    pub limit_gpus: Option<Option<u32>>,
    pub limit_cores: Option<Option<u32>>,
    pub limit_mem_mib: Option<Option<u64>>,
    pub may_borrow: Option<bool>,
    /// 0 = none.
    pub default_limit_ms: Option<u64>,
    /// 0 = none.
    pub max_limit_ms: Option<u64>,
    /// 0 = no limit.
    pub max_pending: Option<u64>,
}

/// A named priority as it shall be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetPriority {
    pub name: String,
    pub create: bool,
    pub value: i32,
    /// Empty = everybody.
    pub tenants: Vec<String>,
    pub preempts: bool,
    pub preemptible: bool,
}

/// The spec as a client names things; apply interns tenant, queue and GPU types.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubmitJob {
    pub tenant: String,
    pub queue: String,
    /// GPU types by slug; the spec's own `gpu_types` is empty and filled by apply.
    pub gpu_types: Vec<String>,
    pub spec: JobSpec,
    pub body: Body,
    /// Waits until it is released.
    pub hold: bool,
    /// A named priority, which gives the spec's its value; empty = none.
    pub priority_class: String,
}

/// Placements computed at one log index. Apply re-checks each against the state as it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub base_index: u64,
    pub places: Vec<Place>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub task: TaskKey,
    /// The number that the attempt will have.
    pub attempt: u32,
    pub parts: Vec<PlacePart>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacePart {
    pub node: NodeId,
    pub epoch: u64,
    /// Slots in rank order.
    pub gpu_order: Vec<u8>,
    pub cores_by_numa: Vec<u16>,
    pub mem_mib: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterNode {
    pub name: String,
    pub address: String,
    pub host: String,
    pub machine_id: [u8; 16],
    pub boot_id: [u8; 16],
    pub version: String,
    pub class: Class,
    pub cores_by_numa: Vec<u16>,
    pub mem_mib: u64,
    pub gpus: Vec<GpuFacts>,
    pub simulated: bool,
    pub kill: KillStrength,
    pub labels: BTreeMap<String, String>,
    /// The highest token in the agent's fence file: the counter is lifted above it.
    pub max_token: Token,
    /// The fence file was made anew within the same boot: silence must decide about unknown parts.
    pub fence_new: bool,
    /// Shim alive.
    pub running: Vec<RunningPart>,
    /// Ended, exits kept until acknowledged.
    pub finished: Vec<FinishedPart>,
    /// In the fence file, with neither shim nor exit status, processes seen gone.
    pub dead: Vec<Token>,
    /// Epoch of the node's newest registration when the agent wrote this one; 0 = there was none. With another one since then
    /// it comes late, and what it lists is no longer so.
    pub after_epoch: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuFacts {
    pub uuid: GpuUuid,
    pub gpu_type: String,
    pub mem_mib: u32,
    pub numa: u8,
    pub health: GpuHealth,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningPart {
    pub token: Token,
    pub job: JobId,
    pub gpus: Vec<GpuUuid>,
    /// All ranks of the part were started.
    pub started: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinishedPart {
    pub token: Token,
    pub exits: Vec<ReportExit>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuHealthChange {
    pub node: NodeId,
    pub epoch: u64,
    pub slot: u8,
    pub health: GpuHealth,
    pub xid: u16,
    pub reason: String,
    /// End the lease on this GPU as GPU_FAULT: the job is requeued without a burnt retry.
    pub end_lease: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub node: NodeId,
    pub epoch: u64,
    pub items: Vec<ReportItem>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportItem {
    pub token: Token,
    pub what: PartReport,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PartReport {
    /// Ready at the barrier; rank 0's agent names the port it reserved, others 0.
    Prepared {
        port: u16,
    },
    /// All ranks of the part run; on one node with the port that the agent picked.
    Started {
        port: u16,
    },
    /// Ranks that ended; with `released` when no process of the part is left and the GPUs are clean.
    Exited {
        exits: Vec<ReportExit>,
        released: bool,
    },
    /// No process of the part is left (after a stop, or nothing was ever started).
    Released,
    LaunchFailed {
        fault: LaunchFault,
        why: String,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportExit {
    pub rank: u32,
    pub exit: Exit,
    pub cause: ExitCause,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LaunchFault {
    /// Command, directory, user not found; bad environment.
    Job,
    /// Disk, cgroup, dirty GPU, shim.
    Node,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DueCause {
    StartTimeout,
    TimeLimit,
}

// -------------------------------------------------------------------------------------------------------- answers

/// The answer to one command, in the order of the entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    Done(Reply),
    /// The request id was answered before: the same reply, no new effect.
    Replayed(StoredReply),
    Rejected(Rejection),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Stored(StoredReply),
    Registered {
        node: NodeId,
        epoch: u64,
    },
    /// One per placement, in order.
    Plan(Vec<Result<Token, Rejection>>),
    /// One per report item, in order. A refusal means "do not send it again".
    Report(Vec<Result<(), Rejection>>),
}

/// An expected, deterministic refusal: the same on every replica, nothing changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejection {
    pub code: Code,
    /// Names the field, the value and the limit.
    pub detail: String,
}

/// The stable reasons of refusal; in UPPER_SNAKE on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Code {
    RequestMismatch,
    RequestExpired,
    RequestFromFuture,
    RequestsFull,
    TenantUnknown,
    QueueUnknown,
    NeverFits,
    InvalidSpec,
    StateFull,
    NotFound,
    AlreadyEnded,
    NotOwner,
    TaskGone,
    AttemptMoved,
    NodeNotReady,
    EpochMoved,
    GpuTaken,
    GpuUnhealthy,
    NoFit,
    Quota,
    IdentityConflict,
    Limit,
    EpochStale,
    TokenStale,
    AlreadyDecided,
    NotDue,
    NotStuck,
    SessionUnknown,
    LockNotHeld,
    FutureRevision,
    LevelTooOld,
    DependencyUnknown,
    DeadlineTooSoon,
    GenerationStale,
    Conflict,
    NotEmpty,
    QuotaPending,
    PriorityUnknown,
    PriorityDenied,
    Claimed,
    VictimProtected,
    Reserved,
    ReservationUnknown,
    ReservationDenied,
}

impl Code {
    /// The name on the wire, in REST problems and in the command line.
    pub fn name(self) -> &'static str {
        match self {
            Code::RequestMismatch => "REQUEST_MISMATCH",
            Code::RequestExpired => "REQUEST_EXPIRED",
            Code::RequestFromFuture => "REQUEST_FROM_FUTURE",
            Code::RequestsFull => "REQUESTS_FULL",
            Code::TenantUnknown => "TENANT_UNKNOWN",
            Code::QueueUnknown => "QUEUE_UNKNOWN",
            Code::NeverFits => "NEVER_FITS",
            Code::InvalidSpec => "INVALID_SPEC",
            Code::StateFull => "STATE_FULL",
            Code::NotFound => "NOT_FOUND",
            Code::AlreadyEnded => "ALREADY_ENDED",
            Code::NotOwner => "NOT_OWNER",
            Code::TaskGone => "TASK_GONE",
            Code::AttemptMoved => "ATTEMPT_MOVED",
            Code::NodeNotReady => "NODE_NOT_READY",
            Code::EpochMoved => "EPOCH_MOVED",
            Code::GpuTaken => "GPU_TAKEN",
            Code::GpuUnhealthy => "GPU_UNHEALTHY",
            Code::NoFit => "NO_FIT",
            Code::Quota => "QUOTA",
            Code::IdentityConflict => "IDENTITY_CONFLICT",
            Code::Limit => "LIMIT",
            Code::EpochStale => "EPOCH_STALE",
            Code::TokenStale => "TOKEN_STALE",
            Code::AlreadyDecided => "ALREADY_DECIDED",
            Code::NotDue => "NOT_DUE",
            Code::NotStuck => "NOT_STUCK",
            Code::SessionUnknown => "SESSION_UNKNOWN",
            Code::LockNotHeld => "LOCK_NOT_HELD",
            Code::FutureRevision => "FUTURE_REVISION",
            Code::LevelTooOld => "LEVEL_TOO_OLD",
            Code::DependencyUnknown => "DEPENDENCY_UNKNOWN",
            Code::DeadlineTooSoon => "DEADLINE_TOO_SOON",
            Code::Conflict => "CONFLICT",
            Code::NotEmpty => "NOT_EMPTY",
            Code::QuotaPending => "QUOTA_PENDING",
            Code::PriorityUnknown => "PRIORITY_UNKNOWN",
            Code::PriorityDenied => "PRIORITY_DENIED",
            Code::Claimed => "CLAIMED",
            Code::VictimProtected => "VICTIM_PROTECTED",
            Code::Reserved => "RESERVED",
            Code::ReservationUnknown => "RESERVATION_UNKNOWN",
            Code::ReservationDenied => "RESERVATION_DENIED",
            Code::GenerationStale => "GENERATION_STALE",
        }
    }
}

/// Backoff default of `ares submit`; `run`, `dev` and Slurm names use none.
pub fn default_retry() -> Retry {
    Retry { max: 3, initial_ms: 1_000, mult_milli: 2_000, max_ms: 300_000, on_exit: [].into() }
}
