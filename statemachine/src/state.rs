//! The replicated state: tables, derived indexes, and the ring of recent events.

use std::sync::Arc;

use imbl::{OrdMap, OrdSet, Vector};

use crate::event::Event;
use crate::id::*;
use crate::record::*;
use crate::runs::Runs;
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
    pub runs: Table<UserId, Runs>,
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
    /// The same tasks, by what the planner knows to be alike.
    pub kins: OrdSet<Waiter>,
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
    /// Users of whom run times are known, by when the newest was learned.
    pub learned: OrdSet<(u64, UserId)>,
    /// Arrays whose cancel has not reached all of their tasks.
    pub sweeping: OrdSet<JobId>,
    /// Arrays, and those whose tasks wait for theirs.
    pub paced: OrdSet<(JobId, JobId)>,
    /// Of the latter, the ones at which a chore has to look.
    pub pacing: OrdSet<JobId>,
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

pub(crate) const HOUR_MS: u64 = 3_600_000;

/// What waits of one user with one time limit at one priority: jobs of which nothing but their turn tells one from the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kin {
    pub tenant: TenantId,
    pub queue: QueueId,
    pub priority: std::cmp::Reverse<i32>,
    pub user: UserId,
    /// 0 = none.
    pub limit_ms: u64,
    /// The begin that it asked for, which has come; 0 = none.
    pub begin_wall_ms: i64,
    /// Of those who have no limit and have had their turn, the hour of cluster time since which they would have waited without their runs, from 1;
    /// 0 = of all others.
    pub turn_hour: u64,
}

impl Kin {
    /// `task`: its record, if it ever left its first PENDING.
    pub fn of(job: &Job, task: Option<&Task>) -> Self {
        let had = task.map(|task| task.had).filter(|had| had.turn && job.spec.limit_ms == 0);
        Self {
            tenant: job.tenant,
            queue: job.queue,
            priority: std::cmp::Reverse(job.spec.priority),
            user: job.user,
            limit_ms: job.spec.limit_ms,
            begin_wall_ms: job.spec.begin_wall_ms(),
            turn_hour: had.map_or(0, |had| 1 + job.submitted_clock_ms.saturating_add(had.run_ms) / HOUR_MS),
        }
    }

    /// Not above any kin of the tenant.
    pub fn first_of(tenant: TenantId) -> Self {
        let priority = std::cmp::Reverse(i32::MAX);
        Self {
            tenant,
            queue: QueueId(0),
            priority,
            user: UserId(0),
            limit_ms: 0,
            begin_wall_ms: i64::MIN,
            turn_hour: 0,
        }
    }

    /// Not above any kin of the same queue and priority.
    pub fn level(self) -> Self {
        Self { queue: self.queue, priority: self.priority, ..Self::first_of(self.tenant) }
    }

    /// The level behind this one; `None` behind the tenant's last.
    pub fn next_level(self) -> Option<Self> {
        let first = Self::first_of(self.tenant);
        match self.priority.0.checked_sub(1) {
            Some(priority) => Some(Self { queue: self.queue, priority: std::cmp::Reverse(priority), ..first }),
            None => Some(Self { queue: QueueId(self.queue.0.checked_add(1)?), ..first }),
        }
    }
}

/// A task among its kin, which stand in the order of submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Waiter {
    pub kin: Kin,
    pub seq: u64,
    pub job: JobId,
}

impl Waiter {
    /// Not above any of the kin.
    pub fn first_of(kin: Kin) -> Self {
        Self { kin, seq: 0, job: JobId(0) }
    }

    /// Not below any of the kin.
    pub fn last_of(kin: Kin) -> Self {
        Self { kin, seq: u64::MAX, job: JobId(u64::MAX) }
    }

    /// The same task in `Index::queue`.
    pub fn key(&self) -> QueueKey {
        let Kin { tenant, queue, priority, .. } = self.kin;
        QueueKey { tenant, queue, priority, seq: self.seq, task: TaskKey::only(self.job) }
    }
}

impl Index {
    /// The task is in line.
    pub fn enqueue(&mut self, waiter: Waiter) {
        self.queue.insert(waiter.key(), ());
        self.kins.insert(waiter);
    }

    pub fn dequeue(&mut self, waiter: &Waiter) {
        self.queue.remove(&waiter.key());
        self.kins.remove(waiter);
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
