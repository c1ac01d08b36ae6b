//! Calendar rules, the only ones that follow wall time: a job's begin time, the last moment at which it may start, and
//! the windows of reservations. A begin that was reached is noted, so a wall clock that goes back takes nothing back.

use super::{Ctx, reservation};
use crate::command::{Code, Rejection};
use crate::id::TaskKey;
use crate::record::*;
use crate::spec::JobSpec;
use crate::state::{CalendarKind, State};
use crate::transition::By;

/// Refuses a deadline that the job could not keep if it started as early as it may.
pub(super) fn check_deadline(state: &State, spec: &JobSpec) -> Result<(), Rejection> {
    let Some(latest_ms) = spec.latest_start_wall_ms() else { return Ok(()) };
    let window = state.reservation(spec.reservation()).filter(|(_, window)| window.begun.is_none());
    let begins_ms = window.map_or(0, |(_, window)| window.start_wall_ms);
    let earliest_ms = state.meta.wall_ms.max(spec.begin_wall_ms()).max(begins_ms);
    if latest_ms >= earliest_ms {
        return Ok(());
    }
    let detail = format!(
        "deadline_wall_ms is {}; the job starts at {earliest_ms} at the earliest and may run {} ms",
        spec.deadline_wall_ms(),
        spec.limit_ms
    );
    Err(Rejection::new(Code::DeadlineTooSoon, detail))
}

/// The rules due by the entry's wall time, oldest first, at most `limit`.
pub(super) fn fire(state: &mut State, ctx: &mut Ctx<'_>, limit: u32) {
    for _ in 0..limit {
        let Some(rule) = state.index.calendar.get_min().copied() else { return };
        if rule.due_wall_ms > state.meta.wall_ms {
            return;
        }
        match rule.what {
            CalendarKind::Begin(job) => state.change_job(ctx, job, |state, _| {
                state.jobs.update(&job, |job| job.value.holds.begin = false);
            }),
            CalendarKind::Deadline(job) => state.change_job(ctx, job, |state, ctx| {
                state.end_unstarted(ctx, TaskKey::only(job), By::Cancel, Some(EndCause::Deadline));
            }),
            CalendarKind::ReservationBegins(id) => reservation::begin(state, ctx, id),
            CalendarKind::ReservationEnds(id) => reservation::remove(state, id),
        }
    }
}
