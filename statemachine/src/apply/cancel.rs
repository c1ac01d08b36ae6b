//! Cancel: sets the job's `stop` for good. A waiting task ends at once; a running one gets the verdict CANCELLED and
//! drains. A verdict reached before stands, but leads no more back to the queue. Of an array the tasks that have not started
//! are cancelled at once, and the others by a chore: none of them starts again meanwhile.
//!
//! Refuses NOT_FOUND, ALREADY_ENDED, NOT_OWNER. A second cancel is accepted and changes nothing.

use super::{Ctx, DONE, owned};
use crate::command::{Rejection, Reply};
use crate::id::*;
use crate::lease::Ruling;
use crate::record::*;
use crate::state::State;
use crate::transition::{self, By};

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, id: JobId) -> Result<Reply, Rejection> {
    let job = owned::live_job(state, ctx, id)?;
    if job.stop().is_some() {
        return DONE;
    }
    state.change_job(ctx, id, |state, ctx| {
        let by = state.intern_user(ctx.actor);
        let stop = Stop { by, rev: ctx.rev };
        state.jobs.update(&id, |job| job.value.rare.get_or_insert_default().stop = Some(stop));
        state.begin_sweep(id);
        stop_task(state, ctx, id, ctx.actor);
    });
    DONE
}

/// Cancels tasks of cancelled arrays, at most `steps` of them; the steps that are left.
pub(super) fn sweep(state: &mut State, salt: u64, steps: u32) -> u32 {
    let mut left = steps;
    if state.index.sweeping.is_empty() {
        return left;
    }
    let mut ctx = Ctx::new(state, salt, "", None);
    while let (true, Some(array)) = (left > 0, state.index.sweeping.get_min().copied()) {
        left -= 1;
        let Some(id) = state.sweep(&mut ctx, array) else { continue };
        let Some(stop) = state.jobs.get(&array).and_then(|array| array.value.stop()) else { continue };
        let by = state.user_name(stop.by).to_owned();
        state.change_job(&mut ctx, id, |state, ctx| {
            state.jobs.update(&id, |job| job.value.rare.get_or_insert_default().stop.get_or_insert(stop).rev);
            stop_task(state, ctx, id, &by);
        });
    }
    state.finish(ctx);
    left
}

fn stop_task(state: &mut State, ctx: &mut Ctx<'_>, id: JobId, by: &str) {
    let task = TaskKey::only(id);
    if let Some(Phase::Leased { token }) = state.tasks.get(&task).map(|task| task.value.phase.clone()) {
        // A verdict that stands already decides; `stop` still forbids the way back to the queue.
        let _ = state.decide(ctx, token, Ruling::new(VerdictKind::Cancelled, format!("cancelled by {by}")));
        return;
    }
    state.end_unstarted(ctx, task, By::Cancel, None);
}

impl State {
    /// Ends a task that has no lease: for good, with a result that no attempt committed. Of an array, all that have not started.
    pub(crate) fn end_unstarted(&mut self, ctx: &mut Ctx<'_>, key: TaskKey, by: By, cause: Option<EndCause>) {
        if self.jobs.get(&key.job).is_some_and(|job| job.value.array().is_some()) {
            if let Some(Phase::Ended { outcome }) = transition::next(&Phase::Pending, by).map(|next| next.phase) {
                self.end_rest(ctx, key.job, outcome, cause);
            }
            return;
        }
        self.touch_task(key);
        let next = self.tasks.get(&key).and_then(|task| transition::next(&task.value.phase, by));
        let Some(Phase::Ended { outcome }) = next.map(|next| next.phase) else { return };
        let attempt = self.tasks.update(&key, |task| {
            task.value.phase = Phase::Ended { outcome };
            task.value.attempt
        });
        let result = TaskResult {
            outcome,
            token: None,
            attempt: attempt.unwrap_or(0),
            exit: None,
            rev: ctx.rev,
            wall_ms: self.meta.wall_ms,
            cause,
        };
        self.end_task(ctx, key, result);
    }

    /// Gives the task its record, if it has none yet; it goes on from the job's revisions.
    pub(crate) fn touch_task(&mut self, key: TaskKey) {
        if self.tasks.contains(&key) {
            return;
        }
        if let Some(job) = self.jobs.get(&key.job) {
            let task = Versioned {
                create_rev: job.create_rev,
                mod_rev: job.mod_rev,
                version: job.version,
                value: Task::untouched(),
            };
            self.tasks.insert(key, task);
        }
    }
}
