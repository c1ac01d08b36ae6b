//! Tasks of arrays that wait for the tasks of the same index of other arrays (`aftercorr`).
//!
//! An array frees its tasks in their order: the next one once its peers in all such parents have SUCCEEDED. One of which a
//! peer ended otherwise becomes a job in its turn, and is SKIPPED. What ends, or begins, only notes that there is something to look at;
//! a chore looks, one task a step.

use super::Ctx;
use crate::command::{Code, Rejection};
use crate::id::*;
use crate::record::*;
use crate::spec::{AfterKind, JobSpec};
use crate::state::State;
use crate::transition::By;

/// What is to be done with the next task that is not free.
enum Next {
    /// There is none.
    Over,
    Free,
    /// A peer has not ended, or tasks before it have not begun.
    Wait,
    Skip(JobId),
}

/// The parents of a new array for whose tasks its own wait, as bits; refuses one that has other indexes.
pub(super) fn of_new(state: &State, spec: &JobSpec) -> Result<u64, Rejection> {
    let mut parents = 0;
    let Some(own) = spec.array() else { return Ok(0) };
    for (bit, after) in spec.after().iter().enumerate().filter(|(_, after)| after.kind == AfterKind::Corr) {
        let Some((array, _)) = state.jobs.get(&after.job).and_then(|job| job.value.array()) else { continue };
        if array.ranges != own.ranges {
            let detail = format!(
                "after[{bit}] names array {} of {} tasks, must have the same indexes as this one of {}",
                after.job,
                array.tasks(),
                own.tasks()
            );
            return Err(Rejection::new(Code::InvalidSpec, detail));
        }
        parents |= 1 << bit;
    }
    Ok(parents)
}

/// Looks at arrays whose tasks wait for others, at most `steps` of these; the steps that are left.
pub(super) fn look(state: &mut State, salt: u64, steps: u32) -> u32 {
    let mut left = steps;
    if state.index.pacing.is_empty() {
        return left;
    }
    let mut ctx = Ctx::new(state, salt, "", None);
    while let (true, Some(array)) = (left > 0, state.index.pacing.get_min().copied()) {
        left -= 1;
        let next = next_of(state, array);
        if let Next::Skip(peer) = next {
            skip(state, &mut ctx, array, peer);
        }
        state.change_job(&mut ctx, array, |state, _| {
            state.jobs.update(&array, |job| {
                let Some(paced) = job.value.progress_mut().and_then(|progress| progress.paced.as_mut()) else { return };
                match next {
                    Next::Free | Next::Skip(_) => paced.freed = paced.freed.saturating_add(1),
                    Next::Wait => paced.due = false,
                    Next::Over => *paced = Paced { parents: 0, due: false, ..*paced },
                }
            });
        });
    }
    state.finish(ctx);
    left
}

fn next_of(state: &State, id: JobId) -> Next {
    let Some(job) = state.jobs.get(&id).map(|job| &job.value) else { return Next::Wait };
    let Some((array, progress)) = job.array() else { return Next::Wait };
    let freed = progress.paced.map(|paced| paced.freed).filter(|_| progress.left(array) > 0);
    let Some(nth) = freed.filter(|nth| *nth < array.tasks()) else { return Next::Over };
    let mut failed = None;
    for parent in job.peers() {
        match state.outcome_of_task(parent, nth) {
            None => return Next::Wait,
            Some(TaskOutcome::Succeeded) => {}
            Some(_) => failed = failed.or(Some(parent.nth_task(nth))),
        }
    }
    match failed {
        None => Next::Free,
        Some(peer) if nth == progress.begun => Next::Skip(peer),
        Some(_) => Next::Wait,
    }
}

/// The next task becomes a job that has ended.
fn skip(state: &mut State, ctx: &mut Ctx<'_>, array: JobId, peer: JobId) {
    let next = state.jobs.get(&array).and_then(|job| {
        let (array, progress) = job.value.array()?;
        array.index_of(progress.begun)
    });
    let key = next.map(|index| TaskKey { job: array, index });
    let Some((id, job)) = key.and_then(|key| state.next_element(key)) else { return };
    state.count_begun(ctx, array, id);
    state.change_job(ctx, id, |state, ctx| {
        state.insert_element(ctx, id, job);
        state.end_unstarted(ctx, TaskKey::only(id), By::Skip, Some(EndCause::Parent(peer)));
    });
}

impl Job {
    /// The arrays for whose tasks of the same index its own still wait.
    pub fn peers(&self) -> impl Iterator<Item = JobId> + '_ {
        let parents = self.array().and_then(|(_, progress)| progress.paced).map_or(0, |paced| paced.parents);
        let parents = if self.ended.is_some() { 0 } else { parents };
        let named = self.spec.after().iter().enumerate();
        named.filter(move |(bit, _)| parents & (1 << bit) != 0).map(|(_, after)| after.job)
    }
}

impl Progress {
    /// Tasks of other arrays leave no more of its own free.
    pub fn waits_for_peers(&self) -> bool {
        self.paced.is_some_and(|paced| paced.parents != 0 && paced.freed <= self.begun)
    }
}

impl State {
    /// How the n-th task of an array ended; `None` while it has not.
    fn outcome_of_task(&self, array: JobId, nth: u32) -> Option<TaskOutcome> {
        let id = array.nth_task(nth);
        if let Some(job) = self.jobs.get(&id) {
            return job.value.ended.as_ref().map(|end| end.outcome);
        }
        if let Some((outcome, _)) = self.ended_job(id) {
            return Some(outcome);
        }
        // It never was a job, or nobody knows of it any more.
        match self.jobs.get(&array).and_then(|job| job.value.array()) {
            Some((_, Progress { rest: None, begun, .. })) if nth >= *begun => None,
            Some((_, Progress { rest: Some((outcome, _)), .. })) => Some(*outcome),
            _ => Some(TaskOutcome::Skipped),
        }
    }

    /// A task of this array has ended: those whose tasks wait for it are to be looked at.
    pub(crate) fn note_ended_peer(&mut self, ctx: &mut Ctx<'_>, parent: JobId) {
        let children = self.index.paced.range((parent, JobId(0))..=(parent, JobId(u64::MAX)));
        let children: Vec<JobId> = children.map(|(_, child)| *child).collect();
        for child in children {
            self.change_job(ctx, child, |state, _| {
                state.jobs.update(&child, |job| {
                    if let Some(paced) = job.value.progress_mut().and_then(|progress| progress.paced.as_mut()) {
                        paced.due = true;
                    }
                });
            });
        }
    }
}
