//! Parents and children: a job may wait for others to end. A child names existing jobs, so its id is higher than its
//! parents' and a cycle can't be written down.
//!
//! A parent's end makes it *ripe*; a chore then tells its children, one a step: a child whose last parent is met may
//! start, one whose parent can't end as it needs any more is SKIPPED, and is a parent that ended itself.

use super::{Ctx, peers};
use crate::command::{Code, Rejection};
use crate::id::*;
use crate::record::*;
use crate::spec::{After, AfterKind, JobSpec};
use crate::state::State;
use crate::transition::By;

/// Parents of one job: the bits of its mask.
pub(super) const PARENTS: usize = 64;

/// What a parent means for one of its children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judged {
    /// It has not ended.
    Open,
    Met,
    Never,
}

/// The parents that a new job still waits for, as bits, and one that will never end as needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Parents {
    pub unmet: u64,
    pub failed: Option<JobId>,
    /// Arrays for whose tasks those of the new one wait, each for one: `peers` judges them.
    pub paced: u64,
}

/// Judges the parents of a new job; refuses one that is not known.
pub(super) fn judge(state: &State, spec: &JobSpec) -> Result<Parents, Rejection> {
    let mut parents = Parents { paced: peers::of_new(state, spec)?, ..Parents::default() };
    for (bit, after) in spec.after().iter().enumerate() {
        if parents.paced & (1 << bit) != 0 {
            continue;
        }
        match judge_one(state, after) {
            Some(Judged::Open) => parents.unmet |= 1 << bit,
            Some(Judged::Met) => {}
            Some(Judged::Never) => parents.failed = parents.failed.or(Some(after.job)),
            None => {
                let detail = format!("after[{bit}] names job {}, which does not exist", after.job);
                return Err(Rejection::new(Code::DependencyUnknown, detail));
            }
        }
    }
    Ok(parents)
}

/// `None` for a job that nobody knows (any more).
fn judge_one(state: &State, after: &After) -> Option<Judged> {
    let outcome = match state.jobs.get(&after.job) {
        Some(job) => match &job.value.ended {
            Some(end) => end.outcome,
            None => return Some(Judged::Open),
        },
        None => state.ended_job(after.job)?.0,
    };
    let succeeded = outcome == TaskOutcome::Succeeded;
    let met = match after.kind {
        AfterKind::Any => true,
        AfterKind::Ok | AfterKind::Corr => succeeded,
        AfterKind::NotOk => !succeeded,
    };
    Some(if met { Judged::Met } else { Judged::Never })
}

/// Tells the children of ended parents, at most `steps` of them; the steps that are left.
pub(super) fn resolve(state: &mut State, salt: u64, steps: u32) -> u32 {
    let mut left = steps;
    if state.index.ripe.is_empty() {
        return left;
    }
    let mut ctx = Ctx::new(state, salt, "", None);
    while let (true, Some((parent, child))) = (left > 0, next_pair(state)) {
        left -= 1;
        tell_child(state, &mut ctx, parent, child);
    }
    state.finish(ctx);
    left
}

fn next_pair(state: &State) -> Option<(JobId, JobId)> {
    let parent = *state.index.ripe.get_min()?;
    state.index.dependants.range((parent, JobId(0))..).next().copied().filter(|pair| pair.0 == parent)
}

/// A parent of this child ended: its bits are cleared, or the child is SKIPPED.
fn tell_child(state: &mut State, ctx: &mut Ctx<'_>, parent: JobId, child: JobId) {
    let Some(job) = state.jobs.get(&child) else { return };
    let named = job.value.spec.after().iter().enumerate().filter(|(_, after)| after.job == parent);
    let mut met = 0u64;
    let mut never = false;
    for (bit, after) in named {
        met |= 1 << bit;
        never |= judge_one(state, after) == Some(Judged::Never);
    }
    state.change_job(ctx, child, |state, ctx| {
        state.jobs.update(&child, |job| {
            job.value.unmet &= !met;
            job.value.holds.after = job.value.unmet != 0;
        });
        if never {
            state.end_unstarted(ctx, TaskKey::only(child), By::Skip, Some(EndCause::Parent(parent)));
        }
    });
}

impl Job {
    /// The jobs that it still waits for.
    pub fn waits_for(&self) -> impl Iterator<Item = &After> + '_ {
        let open = |(bit, _): &(usize, &After)| self.ended.is_none() && self.unmet & (1 << bit) != 0;
        self.spec.after().iter().enumerate().filter(open).map(|(_, after)| after)
    }
}
