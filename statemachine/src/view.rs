//! What people see of the records: a task's shown state, a lease, a whole job. Typed, without texts or JSON.

use serde::{Deserialize, Serialize};

use crate::id::*;
use crate::record::*;
use crate::state::State;

/// The state's name as shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum ShownState {
    Pending,
    Starting,
    Running,
    Retrying,
    /// Its node is gone; what is left of the gang drains, then RETRYING.
    Lost,
    /// Drains, then PENDING.
    Preempted,
    Succeeded,
    Failed,
    TimedOut,
    Cancelled,
    Skipped,
}

impl ShownState {
    pub fn name(self) -> &'static str {
        match self {
            ShownState::Pending => "PENDING",
            ShownState::Starting => "STARTING",
            ShownState::Running => "RUNNING",
            ShownState::Retrying => "RETRYING",
            ShownState::Lost => "LOST",
            ShownState::Preempted => "PREEMPTED",
            ShownState::Succeeded => "SUCCEEDED",
            ShownState::Failed => "FAILED",
            ShownState::TimedOut => "TIMED_OUT",
            ShownState::Cancelled => "CANCELLED",
            ShownState::Skipped => "SKIPPED",
        }
    }

    pub fn ended(self) -> bool {
        self >= ShownState::Succeeded
    }
}

impl From<TaskOutcome> for ShownState {
    fn from(outcome: TaskOutcome) -> Self {
        match outcome {
            TaskOutcome::Failed => ShownState::Failed,
            TaskOutcome::TimedOut => ShownState::TimedOut,
            TaskOutcome::Cancelled => ShownState::Cancelled,
            TaskOutcome::Skipped => ShownState::Skipped,
            TaskOutcome::Succeeded => ShownState::Succeeded,
        }
    }
}

impl VerdictKind {
    pub fn name(self) -> &'static str {
        match self {
            VerdictKind::Succeeded => "SUCCEEDED",
            VerdictKind::Failed => "FAILED",
            VerdictKind::TimedOut => "TIMED_OUT",
            VerdictKind::Cancelled => "CANCELLED",
            VerdictKind::Lost => "LOST",
            VerdictKind::LaunchJob => "LAUNCH_FAILED",
            VerdictKind::LaunchNode => "LAUNCH_FAILED_BY_NODE",
            VerdictKind::GpuFault => "GPU_FAULT",
            VerdictKind::Preempted => "PREEMPTED",
        }
    }
}

impl Holds {
    /// The words of those that are set.
    pub fn names(self) -> Vec<&'static str> {
        let words = [
            (self.launch, "LAUNCH"),
            (self.orphan, "ORPHAN"),
            (self.user, "USER"),
            (self.begin, "BEGIN"),
            (self.after, "AFTER"),
            (self.restore, "RESTORE"),
        ];
        words.into_iter().filter(|word| word.0).map(|word| word.1).collect()
    }
}

/// What `/state/ID` shows of a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskView {
    pub state: ShownState,
    /// Attempts granted so far.
    pub attempt: u32,
    /// The live lease, or the last one of an ended task.
    pub token: Option<Token>,
    /// The verdict of a lease that still drains.
    pub ending: Option<VerdictKind>,
    /// RETRYING: when it is PENDING again, in cluster time.
    pub not_before_ms: Option<u64>,
    /// PENDING: why it may not start.
    pub holds: Holds,
    pub exit: Option<Exit>,
}

/// What `/leases/TOKEN` shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseView {
    pub task: TaskKey,
    pub attempt: u32,
    pub phase: LeasePhase,
    pub verdict: Option<VerdictKind>,
    pub master: Option<Master>,
    pub granted_ms: u64,
    pub started_ms: Option<u64>,
    pub ttl_ms: u64,
    pub parts: Vec<PartView>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartView {
    pub node: NodeId,
    pub first_rank: u32,
    pub ranks: u16,
    /// In rank order.
    pub gpus: Vec<GpuUuid>,
}

/// A job as the tables of `show` and `queue` need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobView {
    pub job: JobId,
    pub name: String,
    pub user: String,
    pub tenant: String,
    pub queue: String,
    pub priority: i32,
    pub submitted_wall_ms: i64,
    pub task: TaskView,
    /// A cancel was accepted.
    pub stopping: bool,
    /// Names of the nodes of the live or last attempt, by rank.
    pub nodes: Vec<String>,
    pub started_ms: Option<u64>,
    pub retries_used: u16,
    pub retries_max: u16,
    pub excused: u16,
    pub ended: Option<JobEnd>,
    /// What the verdict of the live lease says.
    pub verdict_text: String,
}

/// The shown state of `job`.
pub(crate) fn task_view(state: &State, job: &Job, task: Option<&Task>) -> TaskView {
    let mut view = TaskView {
        state: ShownState::Pending,
        attempt: task.map_or(0, |task| task.attempt),
        token: None,
        ending: None,
        not_before_ms: None,
        holds: Holds::default(),
        exit: None,
    };
    match task.map_or(&Phase::Pending, |task| &task.phase) {
        // An array has no task of its own: it runs while one of those that it stands for does.
        Phase::Pending if job.array().is_some_and(|(_, progress)| progress.open > 0) => {
            view.state = ShownState::Running
        }
        Phase::Pending => view.holds = job.holds,
        Phase::Retrying { not_before_ms } => {
            view.state = ShownState::Retrying;
            view.not_before_ms = Some(*not_before_ms);
        }
        Phase::Leased { token } => {
            view.token = Some(*token);
            if let Some(lease) = state.leases.get(token) {
                let verdict = lease.value.verdict.as_ref();
                view.state = match (verdict.map(|verdict| verdict.kind), lease.value.phase) {
                    (Some(VerdictKind::Lost), _) => ShownState::Lost,
                    (Some(VerdictKind::Preempted), _) => ShownState::Preempted,
                    (_, LeasePhase::Running) => ShownState::Running,
                    (_, LeasePhase::Prepare | LeasePhase::Go) => ShownState::Starting,
                };
                view.ending = verdict.map(|verdict| verdict.kind);
                view.exit = verdict.and_then(|verdict| verdict.exit);
            }
        }
        Phase::Ended { outcome } => {
            view.state = (*outcome).into();
            let result = task.and_then(|task| task.result.as_ref());
            view.token = result.and_then(|result| result.token);
            view.exit = result.and_then(|result| result.exit);
        }
    }
    view
}

impl State {
    /// The job, in memory or on its way to the image; `None` also for one that only the image has.
    pub fn job_view(&self, id: JobId) -> Option<JobView> {
        if let Some(job) = self.jobs.get(&id) {
            return Some(self.view_of(id, &job.value, self.tasks.get(&TaskKey::only(id)).map(|task| &task.value)));
        }
        self.archived.get(&id).map(|row| self.history_view(row))
    }

    /// A job that left memory.
    pub fn history_view(&self, row: &HistoryRow) -> JobView {
        self.view_of(row.id, &row.job.value, row.task.as_ref().map(|task| &task.value))
    }

    /// What `/leases/TOKEN` shows; slots are named by the UUIDs that they have now.
    pub fn lease_view(&self, lease: &Lease) -> LeaseView {
        LeaseView {
            task: lease.task,
            attempt: lease.attempt,
            phase: lease.phase,
            verdict: lease.verdict.as_ref().map(|verdict| verdict.kind),
            master: lease.master,
            granted_ms: lease.granted_ms,
            started_ms: lease.started_ms,
            ttl_ms: lease.ttl_ms,
            parts: lease
                .parts
                .iter()
                .map(|part| PartView {
                    node: part.node,
                    first_rank: part.first_rank,
                    ranks: part.ranks,
                    gpus: part.gpu_order.iter().filter_map(|slot| self.gpu_uuid(part.node, *slot)).collect(),
                })
                .collect(),
        }
    }

    pub fn user_name(&self, user: UserId) -> &str {
        self.names.get(&NameKey::User(user)).map_or("", String::as_str)
    }

    pub fn gpu_type_name(&self, gpu_type: GpuTypeId) -> &str {
        self.names.get(&NameKey::GpuType(gpu_type)).map_or("", String::as_str)
    }

    /// The epoch of the newest registration under this name; 0 = there was none.
    pub fn node_epoch(&self, name: &str) -> u64 {
        let id = self.index.node_by_name.get(name);
        id.and_then(|id| self.nodes.get(id)).map_or(0, |node| node.value.epoch)
    }

    pub fn node_name(&self, node: NodeId) -> &str {
        self.nodes.get(&node).map_or("", |node| &node.value.name)
    }

    pub(crate) fn gpu_uuid(&self, node: NodeId, slot: u8) -> Option<GpuUuid> {
        self.nodes.get(&node)?.value.gpus.get(usize::from(slot)).map(|gpu| gpu.uuid)
    }

    fn view_of(&self, id: JobId, job: &Job, task: Option<&Task>) -> JobView {
        let view = task_view(self, job, task);
        let lease = task.and_then(|task| match task.phase {
            Phase::Leased { token } => self.leases.get(&token).map(|lease| &lease.value),
            _ => None,
        });
        let last = task.and_then(|task| task.attempts.back());
        let nodes: Vec<NodeId> = match (lease, last) {
            (Some(lease), _) => lease.parts.iter().map(|part| part.node).collect(),
            (None, Some(row)) => row.nodes.clone(),
            (None, None) => Vec::new(),
        };
        JobView {
            job: id,
            name: job.spec.name.clone().into(),
            user: self.user_name(job.user).to_owned(),
            tenant: self.tenants.get(&job.tenant).map_or_else(String::new, |tenant| tenant.name.clone()),
            queue: self.queues.get(&job.queue).map_or_else(String::new, |queue| queue.name.clone()),
            priority: job.spec.priority,
            submitted_wall_ms: job.submitted_wall_ms,
            task: view,
            stopping: job.stop().is_some() && job.ended.is_none(),
            nodes: nodes.into_iter().map(|node| self.node_name(node).to_owned()).collect(),
            started_ms: lease.map_or_else(|| last.and_then(|row| row.started_ms), |lease| lease.started_ms),
            retries_used: task.map_or(0, |task| task.used.retries),
            retries_max: job.spec.retry.max,
            excused: task.map_or(0, |task| task.used.excused()),
            ended: job.ended.as_deref().cloned(),
            verdict_text: lease
                .and_then(|lease| lease.verdict.as_ref())
                .map_or_else(String::new, |verdict| verdict.text.clone()),
        }
    }
}
