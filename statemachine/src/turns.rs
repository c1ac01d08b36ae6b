//! Turns: where nobody says how long a job will run, GPUs go round. Whose turn it is, and who gives his place for it: the law that apply
//! enforces and the planner plans by.
//!
//! Jobs without a time limit, of a class whose jobs make room, take turns with others of their priority: of their own tenant, or of one that
//! has more than is guaranteed to it. A task is young until it has had `turn_gpu_ms` of GPU time. A young one that finds no room ends attempts of those who
//! have had that, once they have run for `turn_run_ms`; for twice as long the second time that a job gives its place, and so on: one that runs for `t` ms in all gives
//! it at most `sqrt(2 t / turn_run_ms)` times. Who has waited for `turn_wait_ms` in all goes first and gives it to nobody. Under `fifo` nobody takes turns.

use serde::{Deserialize, Serialize};

use crate::id::*;
use crate::record::*;
use crate::settings::OrderBy;
use crate::state::State;

/// What a task has had of GPUs that go round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Had {
    /// GPU time of the attempts that ended, and time that they ran.
    pub gpu_ms: u64,
    pub run_ms: u64,
    /// That was a whole turn, by the policy when the last of them ended: a change of the policy moves nobody in the queue.
    pub turn: bool,
    /// Attempts that ended for another one's turn.
    pub given: u16,
}

impl State {
    /// It takes turns with others of its priority.
    pub fn takes_turns(&self, job: &Job) -> bool {
        let planning = &self.meta.settings.planning;
        job.spec.limit_ms == 0
            && planning.turn_gpu_ms > 0
            && planning.preemptions > 0
            && planning.order == OrderBy::Fair
            && job.spec.shape.gpus() > 0
            && self.is_preemptible(job)
    }

    /// It takes turns, and has not had its own: it may end others for it.
    pub fn may_take_turn(&self, task: TaskKey, job: &Job) -> bool {
        self.takes_turns(job) && self.tasks.get(&task).is_none_or(|task| !task.value.had.turn)
    }

    /// Since its submission, or since the begin that it asked for.
    pub fn in_line_ms(&self, job: &Job) -> u64 {
        let since_ms = self.meta.clock_ms.saturating_sub(job.submitted_clock_ms);
        match job.spec.begin_wall_ms() {
            0 => since_ms,
            begin_ms => since_ms.min(u64::try_from(self.meta.wall_ms.saturating_sub(begin_ms)).unwrap_or(0)),
        }
    }

    /// Cluster time from which the lease may be ended for another one's turn; `None` = not at all.
    pub fn turn_ends_ms(&self, lease: &Lease) -> Option<u64> {
        let job = &self.jobs.get(&lease.task.job)?.value;
        let started_ms = lease.started_ms.filter(|_| lease.verdict.is_none() && self.takes_turns(job))?;
        let (planning, had) = (&self.meta.settings.planning, self.tasks.get(&lease.task)?.value.had);
        if self.is_owed_first(job, had.run_ms.saturating_add(self.run_ms(lease))) {
            return None;
        }
        let left_gpu_ms = if had.turn { 0 } else { planning.turn_gpu_ms.saturating_sub(had.gpu_ms) };
        let had_in_ms = left_gpu_ms.checked_div(u64::from(gpus_of(lease)))?;
        let run_ms = planning.turn_run_ms.saturating_mul(u64::from(had.given) + 1);
        Some(started_ms.saturating_add(had_in_ms.max(run_ms)))
    }

    /// It has had its turn.
    pub(crate) fn gives_turn(&self, lease: &Lease) -> bool {
        self.turn_ends_ms(lease).is_some_and(|ends_ms| ends_ms <= self.meta.clock_ms)
    }

    /// Who takes turns, and has run for so long: all of its waiting together is so long that it goes first.
    pub fn is_owed_first(&self, job: &Job, ran_ms: u64) -> bool {
        let wait_ms = self.meta.settings.planning.turn_wait_ms;
        wait_ms > 0 && self.in_line_ms(job).saturating_sub(ran_ms) >= wait_ms
    }

    /// How long an attempt has run until now.
    pub(crate) fn run_ms(&self, lease: &Lease) -> u64 {
        lease.started_ms.map_or(0, |started_ms| self.meta.clock_ms.saturating_sub(started_ms))
    }
}

impl Had {
    /// An attempt ended that ran for so long.
    pub(crate) fn add(&mut self, run_ms: u64, gpus: u32, turn_gpu_ms: u64) {
        self.run_ms = self.run_ms.saturating_add(run_ms);
        self.gpu_ms = self.gpu_ms.saturating_add(run_ms.saturating_mul(u64::from(gpus)));
        self.turn = turn_gpu_ms > 0 && self.gpu_ms >= turn_gpu_ms;
    }
}

pub(crate) fn gpus_of(lease: &Lease) -> u32 {
    lease.parts.iter().map(|part| part.gpus.count_ones()).sum()
}
