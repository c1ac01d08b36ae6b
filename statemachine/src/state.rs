//! The replicated state: tables, derived indexes, and the ring of recent events.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet, Vector};

use crate::event::Event;
use crate::id::*;
use crate::record::*;
use crate::table::Table;

/// Everything that the replicas agree on. Cloning is O(1): readers, the planner, the image and snapshots take clones.
#[derive(Clone, Debug, Default)]
pub struct State {
    pub meta: Meta,
    pub jobs: Table<JobId, Versioned<Job>>,
    pub bodies: Table<JobId, Body>,
    pub tasks: Table<TaskKey, Versioned<Task>>,
    pub leases: Table<Token, Versioned<Lease>>,
    pub nodes: Table<NodeId, Versioned<Node>>,
    pub allocs: Table<NodeId, Alloc>,
    pub classes: Table<ClassId, Class>,
    pub tenants: Table<TenantId, Tenant>,
    pub queues: Table<QueueId, Queue>,
    pub priorities: Table<String, Priority>,
    pub claims: Table<TaskKey, Claim>,
    pub reservations: Table<ReservationId, Reservation>,
    pub sessions: Table<SessionId, Session>,
    pub locks: Table<String, Versioned<Lock>>,
    pub requests: Table<RequestId, Request>,
    /// By job id / 256.
    pub ended: Table<u64, Ended>,
    pub buckets: Table<u32, Bucket>,
    pub names: Table<NameKey, String>,
    /// Last token granted for each GPU, for `/fencing/gpu/`.
    pub gpu_tokens: Table<GpuUuid, Versioned<Token>>,
    pub index: Index,
    /// Recent events in order, at most `settings.event_ring`.
    pub events: Vector<Arc<Event>>,
    /// Jobs that left memory since the last cut of the image: readable here until the image holds them.
    pub archived: OrdMap<JobId, Arc<HistoryRow>>,
}

/// Derived from the tables, rebuilt on load, never stored or hashed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    /// Tasks that may be placed now, by tenant; in a tenant as the planner looks: priority descending, then seq.
    pub queue: OrdMap<QueueKey, ()>,
    /// PENDING tasks that may not start: their job is on hold.
    pub waiting: OrdSet<TaskKey>,
    pub timers: OrdSet<Timer>,
    /// Rules of wall time.
    pub calendar: OrdSet<Calendar>,
    /// (parent, child) of each child that waits for this parent.
    pub dependants: OrdSet<(JobId, JobId)>,
    /// Parents that ended and have children to tell.
    pub ripe: OrdSet<JobId>,
    /// Interned names by their text.
    pub names: OrdMap<(NameKind, String), u32>,
    pub node_by_name: OrdMap<String, NodeId>,
    /// Tenants that were not removed.
    pub tenant_by_name: OrdMap<String, TenantId>,
    pub class_by_facts: OrdMap<Class, ClassId>,
    /// Requests by bucket, the order in which they are forgotten.
    pub requests: OrdSet<(u32, RequestId)>,
    /// Where each GPU was last registered and not seen to vanish.
    pub gpus: OrdMap<GpuUuid, NodeId>,
    /// Attempts that run without a live lease: as long as a job has one, it is on hold.
    pub orphans: OrdSet<(JobId, NodeId, Token)>,
    /// Where something is kept for a task.
    pub claims: OrdSet<(NodeId, TaskKey)>,
    pub reservation_by_name: OrdMap<String, ReservationId>,
    /// Which reservations set a machine aside.
    pub reserved: OrdSet<(NodeId, ReservationId)>,
    /// Jobs on hold `restore`, by how long after the restore that ends.
    pub restoring: OrdSet<(u64, JobId)>,
    /// Arrays whose cancel has not reached all of their tasks.
    pub sweeping: OrdSet<JobId>,
}

/// Sorts by tenant, then by priority descending, then by queue position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct QueueKey {
    pub tenant: TenantId,
    pub queue: QueueId,
    pub priority: std::cmp::Reverse<i32>,
    pub seq: u64,
    pub task: TaskKey,
}

impl QueueKey {
    /// Not above any key of the tenant.
    pub fn first_of(tenant: TenantId) -> Self {
        let task = TaskKey { job: JobId(0), index: 0 };
        Self { tenant, queue: QueueId(0), priority: std::cmp::Reverse(i32::MAX), seq: 0, task }
    }
}

/// Something that apply does by itself when cluster time reaches `due_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timer {
    pub due_ms: u64,
    pub what: TimerKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TimerKind {
    /// RETRYING -> PENDING.
    Retry(TaskKey),
    /// A finished job leaves memory.
    Archive(JobId),
    /// What still runs on a drained node goes back to the queue.
    Evict(NodeId),
    /// What was kept for a task is free for others.
    Claim(TaskKey),
}

/// Something that apply does by itself when wall time reaches `due_wall_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Calendar {
    pub due_wall_ms: i64,
    pub what: CalendarKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CalendarKind {
    /// The job may start.
    Begin(JobId),
    /// Too late for the job to start.
    Deadline(JobId),
    ReservationBegins(ReservationId),
    ReservationEnds(ReservationId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NameKind {
    User,
    GpuType,
}
