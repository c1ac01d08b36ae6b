//! The records of the replicated state: what is kept of each thing, not how it changes (that is `apply`).

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

pub use crate::account::{Amounts, Ceiling, Policy, Tenant, Usage};
pub use crate::array::{Array, ArrayRole, Element, Paced, Progress};
use crate::command::PlacePart;
use crate::id::*;
use crate::settings::Settings;
pub use crate::spec::{Body, JobSpec};
pub use crate::turns::Had;

/// A record with the revisions that every key of the keyspace shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Versioned<T> {
    pub create_rev: Revision,
    pub mod_rev: Revision,
    pub version: u32,
    pub value: T,
}

impl<T> Versioned<T> {
    pub fn new(rev: Revision, value: T) -> Self {
        Self { create_rev: rev, mod_rev: rev, version: 1, value }
    }

    /// Counts a change that the keyspace shows; several of one revision count once.
    pub(crate) fn bump(&mut self, rev: Revision) {
        if self.mod_rev != rev {
            self.mod_rev = rev;
            self.version = self.version.saturating_add(1);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- jobs

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    pub spec: JobSpec,
    pub tenant: TenantId,
    pub user: UserId,
    pub queue: QueueId,
    pub request: Option<RequestId>,
    pub submitted_clock_ms: u64,
    pub submitted_wall_ms: i64,
    /// Place among the jobs of one priority: the revision of the submission, kept over requeues.
    pub seq: u64,
    /// Why the job must not start although nothing else forbids it.
    pub holds: Holds,
    /// What few jobs have.
    pub rare: Option<Box<Rare>>,
    pub ended: Option<Box<JobEnd>>,
    /// Which of `spec.after` are still waited for: bit n is the n-th.
    pub unmet: u64,
}

/// Apart from the job so that a plain one that waits stays small.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rare {
    /// Set once by a cancel: no task starts any more, and a way back to the queue becomes CANCELLED.
    pub stop: Option<Stop>,
    /// It is an array, or the task of one.
    pub role: Option<ArrayRole>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Holds {
    /// 20 excused attempts in a row.
    pub launch: bool,
    /// A machine reported a running attempt of this job that has no live lease.
    pub orphan: bool,
    /// A person's word, until it is released.
    pub user: bool,
    /// Its begin time has not come.
    pub begin: bool,
    /// A job that it waits for has not ended.
    pub after: bool,
    /// The cluster was restored from a backup: an attempt that the backup does not know may still run.
    pub restore: bool,
}

impl Holds {
    pub fn any(self) -> bool {
        self.launch || self.orphan || self.user || self.begin || self.after || self.restore
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    pub by: UserId,
    pub rev: Revision,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEnd {
    pub outcome: TaskOutcome,
    pub clock_ms: u64,
    pub wall_ms: i64,
}

/// How a task ended. The order is that of the job's outcome: the first that occurs among its tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum TaskOutcome {
    Failed,
    TimedOut,
    Cancelled,
    Skipped,
    Succeeded,
}

/// Exists once its index left its first PENDING, until the job ends and leaves memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    pub phase: Phase,
    /// Attempts granted so far; the n-th attempt has number n.
    pub attempt: u32,
    pub used: Used,
    /// Excused attempts since the last one that was not; at the limit the job is held.
    pub excused_in_row: u16,
    /// Nodes the next attempt would rather not use, newest last, at most 8.
    pub avoid: VecDeque<NodeId>,
    /// The newest four attempts, newest last.
    pub attempts: VecDeque<AttemptRow>,
    /// The one committed result.
    pub result: Option<TaskResult>,
    /// The last grant, for `/fencing/job/`; absent before the first one.
    pub fence: Option<Versioned<Token>>,
    /// Attempts that ended to make room for another task: the budget of preemptions counts these alone.
    pub displaced: u16,
    /// The newest one that an attempt recorded.
    pub checkpoint: Option<Box<Checkpoint>>,
    pub had: Had,
}

/// Where an attempt can go on from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// As the job named it, at most `CHECKPOINT_BYTES`; opaque here.
    pub path: String,
    /// The attempt that recorded it.
    pub attempt: u32,
    pub clock_ms: u64,
    /// The job's own count; 0 = it named none.
    pub step: u64,
}

/// What was taken from others for a task that waits: kept for it until it starts or stops waiting, or its time is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// One a machine: free already, or held by leases that drain.
    pub parts: Vec<PlacePart>,
    /// The leases that end for it.
    pub victims: Vec<Token>,
    /// What the parts add up to.
    pub amounts: Amounts,
    /// Cluster time at which it is over.
    pub until_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    Pending,
    Retrying { not_before_ms: u64 },
    Leased { token: Token },
    Ended { outcome: TaskOutcome },
}

/// What the attempts were charged to; only `retries` counts against `Retry::max`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Used {
    pub retries: u16,
    pub lost: u16,
    pub launch: u16,
    pub gpu_fault: u16,
    pub preempted: u16,
    pub timeout: u16,
}

impl Used {
    /// Attempts that ended by no fault of the job.
    pub fn excused(&self) -> u16 {
        self.lost.saturating_add(self.launch).saturating_add(self.gpu_fault)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttemptRow {
    pub attempt: u32,
    pub token: Token,
    pub verdict: VerdictKind,
    pub exit: Option<Exit>,
    pub nodes: Vec<NodeId>,
    pub granted_ms: u64,
    pub started_ms: Option<u64>,
    pub ended_ms: u64,
    /// What the verdict said, for people; empty where its kind says it all.
    pub text: String,
    /// It ended to make room for this job.
    pub preemptor: Option<JobId>,
    /// PREEMPTED: GPU-milliseconds of work since its newest checkpoint, or its start.
    pub lost_gpu_ms: u64,
}

/// The committed result of a task: written once, at the close of its last lease, carrying that lease's token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskResult {
    pub outcome: TaskOutcome,
    /// Absent when the task never had a lease.
    pub token: Option<Token>,
    pub attempt: u32,
    pub exit: Option<Exit>,
    pub rev: Revision,
    pub wall_ms: i64,
    /// What ended it before it could start, where that was no person's word.
    pub cause: Option<EndCause>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum EndCause {
    /// It could not keep its deadline any more.
    Deadline,
    /// This job, which it needed, ended in another way.
    Parent(JobId),
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit code, 0 when a signal ended it.
    pub code: i32,
    /// Signal number, 0 = none.
    pub signal: u8,
}

impl Exit {
    pub fn ok(self) -> bool {
        self.code == 0 && self.signal == 0
    }

    /// What a shell would show: the code, or 128 + signal.
    pub fn shell_code(self) -> u8 {
        if self.signal > 0 { 128u8.saturating_add(self.signal) } else { (self.code & 0xff) as u8 }
    }
}

// -------------------------------------------------------------------------------------------------------- leases

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub task: TaskKey,
    pub attempt: u32,
    pub phase: LeasePhase,
    pub granted_ms: u64,
    pub go_ms: Option<u64>,
    pub started_ms: Option<u64>,
    pub ttl_ms: u64,
    pub verdict: Option<Verdict>,
    /// Where rank 0 listens; set with Go on several nodes, with Started on one.
    pub master: Option<Master>,
    /// Ordered by rank: part i holds the ranks from `first_rank` on.
    pub parts: Vec<Part>,
    /// What its tenants are charged with while it lasts.
    pub amounts: Amounts,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum LeasePhase {
    /// Several nodes: each prepares, the last one opens the barrier.
    Prepare,
    Go,
    Running,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Master {
    pub node: NodeId,
    pub port: u16,
}

/// How a lease was decided, once, by log order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub kind: VerdictKind,
    pub rev: Revision,
    pub clock_ms: u64,
    /// The exit that decided it, where one did.
    pub exit: Option<Exit>,
    /// Node to blame, where there is one.
    pub node: Option<NodeId>,
    /// The job that it makes room for.
    pub preemptor: Option<JobId>,
    /// It does so because it has had its turn.
    pub for_turn: bool,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum VerdictKind {
    Succeeded,
    Failed,
    TimedOut,
    Cancelled,
    Lost,
    /// Launch failed by the job's fault: burns a retry like a failure.
    LaunchJob,
    /// Launch failed by a node's fault, or not every part started in time: excused.
    LaunchNode,
    GpuFault,
    Preempted,
}

/// A lease's share on one node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub node: NodeId,
    /// The node's epoch at the grant, or at its last registration that named the token.
    pub epoch: u64,
    /// Slots of the node's GPUs as a mask; the ranks take them in `gpu_order`, `gpus_per_rank` each.
    pub gpus: u128,
    /// The same slots in rank order (the ring that the bandwidth model chose).
    pub gpu_order: Vec<u8>,
    pub first_rank: u32,
    pub ranks: u16,
    /// Cores taken from each NUMA node, index as in the node's capacity.
    pub cores_by_numa: Vec<u16>,
    pub mem_mib: u64,
    pub state: PartState,
    pub exits: Vec<RankExit>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PartState {
    Held,
    Prepared {
        port: u16,
    },
    Started,
    Exited,
    Released,
    /// Silent on a machine whose kernel can't promise the kill: freed only by its agent or by an operator.
    Stuck,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankExit {
    pub rank: u32,
    pub exit: Exit,
    pub cause: ExitCause,
}

/// Why a process ended, as its shim saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ExitCause {
    /// By itself.
    Own,
    /// After a stop that the lease's verdict asked for.
    Stopped,
    TimeLimit,
    LeaseEnd,
    GpuFault,
}

// --------------------------------------------------------------------------------------------------------- nodes

/// The cold half of a machine: rewritten by registration and health, not by grants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub name: String,
    /// Where the agent serves logs, `host:port`.
    pub address: String,
    /// Where ranks on other machines reach a rank here: host or IP.
    pub host: String,
    /// A random id in the agent's directory: another directory is another machine.
    pub machine_id: [u8; 16],
    pub boot_id: [u8; 16],
    /// Grows with each registration; a message of an older epoch changes nothing. The high 32 bits count restores from a backup, the low
    /// ones registrations since the last restore.
    pub epoch: u64,
    pub version: String,
    pub class: ClassId,
    pub cores_by_numa: Vec<u16>,
    pub mem_mib: u64,
    pub gpus: Vec<Gpu>,
    pub simulated: bool,
    pub kill: KillStrength,
    pub admin: NodeAdmin,
    /// Jobs whose launch failed here by the node's fault since the last good launch.
    pub launch_fails: Vec<JobId>,
    pub labels: BTreeMap<String, String>,
    pub registered_clock_ms: u64,
}

/// What makes sure that no process of a rank survives its shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum KillStrength {
    /// The shim is init of the ranks' PID namespace.
    PidNamespace,
    Cgroup,
    /// Process groups only: a silent node's parts become Stuck.
    Weak,
}

impl Node {
    /// Epochs of one life of the cluster.
    const LIFE: u64 = 1 << 32;

    /// The cluster was restored: every epoch of before is over, and no agent has registered yet.
    pub(crate) fn begin_life(&mut self) {
        self.epoch = (self.epoch / Self::LIFE + 1).saturating_mul(Self::LIFE);
    }

    /// An agent has registered since the last restore: one with an older epoch is not the newest.
    pub fn has_registered(&self) -> bool {
        !self.epoch.is_multiple_of(Self::LIFE)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeAdmin {
    Ready,
    /// Gets nothing new; the text says why and who.
    Out {
        reason: String,
        /// What still runs there at this cluster time goes back to the queue; absent = it runs on, or has gone.
        evict_ms: Option<u64>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gpu {
    pub uuid: GpuUuid,
    pub gpu_type: GpuTypeId,
    pub mem_mib: u32,
    /// Index into the node's `cores_by_numa`.
    pub numa: u8,
    pub health: GpuHealth,
    pub reason: String,
    pub xid: u16,
}

impl Gpu {
    /// It is in the machine, whatever its health.
    pub fn is_present(&self) -> bool {
        self.health != GpuHealth::Gone
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum GpuHealth {
    Ok,
    /// No new lease; running work may end.
    DrainWhenIdle,
    Quarantined,
    Dirty,
    Unresponsive,
    /// Its UUID vanished; the slot stays until a re-registration without leases on it.
    Gone,
}

/// The hot half of a machine: the only node record that a grant rewrites.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alloc {
    /// Slots in no lease; health is not counted here.
    pub free_gpus: u128,
    pub cores_free: Vec<u16>,
    pub mem_free_mib: u64,
    /// Holder of each taken slot.
    pub holders: BTreeMap<u8, Token>,
    /// Tokens with a part here that is not Released.
    pub leases: Vec<Token>,
    /// Running there without a live lease: their slots stay taken until the agent has killed them.
    pub orphans: Vec<Orphan>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orphan {
    pub token: Token,
    pub job: JobId,
    pub gpus: u128,
}

/// The link facts of a machine, shared by equal machines. Bandwidths are integer MB/s (10^6 bytes/s), one direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Class {
    /// GPUs; the matrices below are row-major `gpus x gpus`.
    pub gpus: u8,
    /// NVLinks between each pair; 0 = none.
    pub nvlinks: Vec<u8>,
    /// PCIe class of each pair, also where NVLink hides it.
    pub pci: Vec<PciClass>,
    pub nvlink_mbps_per_link: u32,
    /// The NVLinks end in a switch: every subset is equal.
    pub nvswitch: bool,
    pub pcie_mbps: u32,
    pub inter_socket_mbps: u32,
    pub intel_cpu: bool,
    /// Peers can reach each other's memory without staging in host memory.
    pub p2p: bool,
    /// NUMA domain of each GPU, as index 0..
    pub numa: Vec<u8>,
    pub nics: Vec<Nic>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PciClass {
    #[default]
    Same,
    Pix,
    Pxb,
    Phb,
    Node,
    Sys,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Nic {
    pub name: String,
    pub mbps: u32,
    /// Class to each GPU.
    pub class_to_gpu: Vec<PciClass>,
}

// -------------------------------------------------------------------------------------------- tenants and clients

/// A named priority: its value, who may use it, and what it may do to others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Priority {
    pub value: i32,
    /// They and the tenants below them; empty = everybody.
    pub tenants: Vec<TenantId>,
    /// Its jobs may take the place of preemptible ones of a lower priority.
    pub preempts: bool,
    pub preemptible: bool,
}

/// Machines set aside for a window of wall time: nothing that may run into it starts there but what it is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// A slug; only one reservation that has not ended has it.
    pub name: String,
    pub whom: Whom,
    /// Fixed when it was made; never empty.
    pub nodes: BTreeSet<NodeId>,
    pub start_wall_ms: i64,
    /// It is removed then.
    pub end_wall_ms: i64,
    /// What still runs there when it begins goes back to the queue; otherwise it runs on.
    pub requeue: bool,
    /// For people; may be empty.
    pub reason: String,
    /// The last token that was minted before it began; absent = it has not begun. A wall clock that goes back ends nothing.
    pub begun: Option<Token>,
}

/// What a reservation is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Whom {
    /// Nobody's jobs.
    Maintenance,
    /// Jobs that name it: of these tenants and those below them, and of these users; everybody's where both are empty.
    Jobs { tenants: Vec<TenantId>, users: Vec<UserId> },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Queue {
    pub name: String,
    pub tenant: TenantId,
}

/// A client's life sign; keep-alives stay in the leader's memory, its end is a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Session {
    pub owner: String,
    pub ttl_ms: u64,
    pub opened_clock_ms: u64,
    /// Names of locks that it holds or waits for.
    pub locks: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    pub holder: Option<Holder>,
    pub waiters: VecDeque<SessionId>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub session: SessionId,
    pub token: Token,
}

/// What a request id already did. Recorded only with an accepted effect, in the same command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Digest of the command's body: the same id with another body is refused.
    pub body: u128,
    pub reply: StoredReply,
    /// Five-minute bucket of cluster time in which the id may be forgotten from `request_keep_ms` on.
    pub bucket: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StoredReply {
    Done,
    Job(JobId),
    Session(SessionId),
    /// Granted with the token, or queued.
    Lock(Option<Token>),
}

// ------------------------------------------------------------------------------------------------ history and meta

/// Outcomes of 256 consecutive jobs: answers "did job 17 succeed" and finds its history row without a disk read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// (job id modulo 256) -> (outcome, archive bucket), for jobs that left memory.
    pub jobs: BTreeMap<u8, (TaskOutcome, u32)>,
}

/// An hour of history: dropped whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bucket {
    pub rows: u64,
    pub bytes: u64,
    /// Wrapping sum of the rows' hashes, so that dropping or comparing a bucket reads nothing.
    pub sum: u128,
    pub highest_job: JobId,
    pub newest_wall_ms: i64,
}

/// A job that ended and left memory, as it is kept on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryRow {
    pub id: JobId,
    pub job: Versioned<Job>,
    pub body: Body,
    pub task: Option<Versioned<Task>>,
    pub bucket: u32,
}

/// Position in the replicated log; the leader's id is part of it (several leaders may share a term).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LogPosition {
    pub term: u64,
    pub leader: u64,
    pub index: u64,
}

/// The one record that every entry touches.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    pub cluster: [u8; 16],
    /// Grows by a restore from a backup: the generation of the tokens that are minted.
    pub incarnation: u32,
    pub applied: LogPosition,
    /// The consensus layer's membership and the position of its entry, opaque here.
    pub membership: Vec<u8>,
    pub clock_ms: u64,
    pub wall_ms: i64,
    pub rev: Revision,
    /// Revisions at or below it can't be watched any more.
    pub compacted_rev: Revision,
    pub next_job: u64,
    pub next_node: u32,
    pub next_class: u32,
    pub next_user: u32,
    pub next_gpu_type: u16,
    pub next_session: u64,
    pub next_tenant: u32,
    pub next_reservation: u64,
    /// Grows with each change of what operators decide: tenants, priorities, reservations.
    pub policy: u64,
    /// The last token minted.
    pub token: Token,
    pub level: u16,
    pub settings: Settings,
    /// Level of each replica's binary, by replica id.
    pub members: BTreeMap<u64, u16>,
    /// Wall time up to which request ids may have been forgotten: an unknown id that is older is refused. Starts at
    /// the smallest number, that is with nothing forgotten.
    pub request_horizon_wall_ms: i64,
    /// Dropped buckets of history whose jobs still stand in `ended`, each with the next chunk to clear.
    pub retiring: BTreeMap<u32, u64>,
    /// Cluster time of the last restore from a backup.
    pub restored_ms: Option<u64>,
}

/// What a name is interned as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum NameKey {
    User(UserId),
    GpuType(GpuTypeId),
}
