//! Hold, Release and Requeue: a person keeps a job from starting, lets it start again, or sends it back to its place
//! in the queue.
//!
//! All refuse NOT_FOUND, ALREADY_ENDED, NOT_OWNER. A held job that runs goes on; the hold waits for its way back to the
//! queue. Release ends a person's hold, the one that too many excused attempts brought, with their count begun anew, and
//! the one of a restore (by the word that nothing of the job is left); the hold for an orphan ends by itself. Requeue ends a running attempt as PREEMPTED (ALREADY_DECIDED when it
//! was decided before) and cuts a backoff short; it refuses an array (CONFLICT). A held array starts no task, and none of its
//! tasks starts again. Each accepts what is already so and changes nothing.

use super::{Ctx, DONE, owned};
use crate::command::{Code, Rejection, Reply};
use crate::id::*;
use crate::lease::Ruling;
use crate::record::*;
use crate::state::State;
use crate::transition::{self, By};

pub(super) fn hold(state: &mut State, ctx: &mut Ctx<'_>, id: JobId) -> Result<Reply, Rejection> {
    if !owned::live_job(state, ctx, id)?.holds.user {
        state.change_job(ctx, id, |state, _| state.jobs.update(&id, |job| job.value.holds.user = true));
    }
    DONE
}

pub(super) fn release(state: &mut State, ctx: &mut Ctx<'_>, id: JobId) -> Result<Reply, Rejection> {
    let holds = owned::live_job(state, ctx, id)?.holds;
    if holds.user || holds.launch || holds.restore {
        state.change_job(ctx, id, |state, _| {
            state.jobs.update(&id, |job| {
                job.value.holds.user = false;
                job.value.holds.launch = false;
                job.value.holds.restore = false;
            });
            state.tasks.update(&TaskKey::only(id), |task| task.value.excused_in_row = 0);
        });
    }
    DONE
}

pub(super) fn requeue(state: &mut State, ctx: &mut Ctx<'_>, id: JobId) -> Result<Reply, Rejection> {
    if owned::live_job(state, ctx, id)?.array().is_some() {
        let detail = format!("job {id} is an array: requeue those of its tasks that run");
        return Err(Rejection::new(Code::Conflict, detail));
    }
    let task = TaskKey::only(id);
    match state.tasks.get(&task).map(|task| task.value.phase.clone()) {
        Some(Phase::Leased { token }) => state.change_job(ctx, id, |state, ctx| {
            let ruling = Ruling::new(VerdictKind::Preempted, format!("requeued by {}", ctx.actor));
            state.decide(ctx, token, ruling)
        })?,
        Some(phase @ Phase::Retrying { .. }) => state.change_job(ctx, id, |state, _| {
            if let Some(next) = transition::next(&phase, By::BackoffOver) {
                state.tasks.update(&task, |task| task.value.phase = next.phase);
            }
        }),
        Some(Phase::Pending | Phase::Ended { .. }) | None => {}
    }
    DONE
}
