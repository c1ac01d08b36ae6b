//! The job that a person's command means: one that has not ended and is the person's own.
//!
//! Refuses NOT_FOUND, CONFLICT (the task of an array that has not started), ALREADY_ENDED, NOT_OWNER.

use super::Ctx;
use crate::command::{Code, Rejection};
use crate::id::JobId;
use crate::record::{Job, TaskOutcome};
use crate::state::State;

pub(super) fn live_job<'a>(state: &'a State, ctx: &Ctx<'_>, id: JobId) -> Result<&'a Job, Rejection> {
    let ended = |outcome: TaskOutcome| {
        let name = crate::view::ShownState::from(outcome).name();
        Rejection::new(Code::AlreadyEnded, format!("job {id} has ended: {name}"))
    };
    let job = match state.jobs.get(&id) {
        Some(job) => &job.value,
        None => {
            if let Some((array, index)) = state.unbegun_task(id) {
                let detail = format!("task {index} of array {array} has not started: the array alone can be changed");
                return Err(Rejection::new(Code::Conflict, detail));
            }
            let unknown = || Rejection::new(Code::NotFound, format!("there is no job {id}"));
            return Err(state.ended_job(id).map_or_else(unknown, |(outcome, _)| ended(outcome)));
        }
    };
    match &job.ended {
        Some(end) => Err(ended(end.outcome)),
        None => check_owner(state, ctx, job).map(|()| job),
    }
}

/// The leader's own commands have no actor, and no owner to respect.
fn check_owner(state: &State, ctx: &Ctx<'_>, job: &Job) -> Result<(), Rejection> {
    let owner = state.user_name(job.user);
    if ctx.actor.is_empty() || owner.is_empty() || ctx.actor == owner {
        return Ok(());
    }
    Err(Rejection::new(Code::NotOwner, format!("the job is {owner}'s, not {}'s", ctx.actor)))
}
