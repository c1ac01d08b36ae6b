//! Arrays: one job that stands for many tasks with one spec and one body, and starts them in the order of their indexes.
//!
//! Until its turn a task is a number and nothing else. At its first grant it becomes a job of its own, whose id was set
//! aside at the submission: the n-th task of array 17 is job 17 + 1 + n. From then on it is retried, preempted, cancelled
//! and kept in history as any job is; the array counts it and ends with the last one.

use serde::{Deserialize, Serialize};

use crate::apply::Ctx;
use crate::event::Change;
use crate::id::*;
use crate::record::*;
use crate::settings::Settings;
use crate::state::State;

/// Tasks of one array, at most.
pub const TASKS: u64 = 10_000_000;
/// Ranges of one array, at most.
pub const RANGES: usize = 64;

/// Which tasks an array has, and how many of them may be under way at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Array {
    /// Inclusive, rising, apart from each other, at most [`RANGES`].
    pub ranges: Vec<(u32, u32)>,
    /// Tasks that have started and not ended, at most; 0 = as many as `Settings::array_open`.
    pub throttle: u32,
}

impl Array {
    /// Tasks; within [`TASKS`] once [`Array::wrong`] found nothing.
    pub fn tasks(&self) -> u32 {
        u32::try_from(self.count()).unwrap_or(u32::MAX)
    }

    fn count(&self) -> u64 {
        self.ranges.iter().map(|(first, last)| u64::from(last.saturating_sub(*first)) + 1).sum()
    }

    /// The index of the n-th task.
    pub fn index_of(&self, mut nth: u32) -> Option<u32> {
        for (first, last) in &self.ranges {
            let len = last - first;
            if nth <= len {
                return Some(first + nth);
            }
            nth -= len + 1;
        }
        None
    }

    /// The place of an index among the tasks.
    pub fn nth_of(&self, index: u32) -> Option<u32> {
        let mut before = 0;
        for (first, last) in &self.ranges {
            if (*first..=*last).contains(&index) {
                return Some(before + (index - first));
            }
            before += last - first + 1;
        }
        None
    }

    /// What can't be an array.
    pub fn wrong(&self) -> Option<String> {
        if self.ranges.is_empty() {
            return Some("array names no index".into());
        }
        if self.ranges.len() > RANGES {
            return Some(format!("array has {} ranges, the limit is {RANGES}", self.ranges.len()));
        }
        if let Some((first, last)) = self.ranges.iter().find(|(first, last)| last < first) {
            return Some(format!("array has the range {first}-{last}, which ends before it begins"));
        }
        if let Some(pair) = self.ranges.windows(2).find(|pair| pair[1].0 <= pair[0].1) {
            return Some(format!(
                "array has the range {}-{} behind {}-{}, must rise and name each index once",
                pair[1].0, pair[1].1, pair[0].0, pair[0].1
            ));
        }
        let count = self.count();
        (count > TASKS).then(|| format!("array has {count} tasks, the limit is {TASKS}"))
    }
}

/// What a job has to do with arrays.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ArrayRole {
    Whole(Progress),
    /// A task that has started.
    Task(Element),
}

/// How far an array has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Tasks that have become jobs: the first ones.
    pub begun: u32,
    /// Those of them that have not ended.
    pub open: u32,
    /// Ended tasks by outcome, in the order of `TaskOutcome`; `rest` among them.
    pub ended: [u32; 5],
    /// How the tasks behind `begun` ended without a start, once they have, and why.
    pub rest: Option<(TaskOutcome, Option<EndCause>)>,
    /// A cancel has still to reach the tasks from this one on.
    pub sweep: Option<JobId>,
    /// When it last came into the queue: its state does not tell.
    pub queued: Revision,
    /// Its tasks wait for those of the same index of other arrays; `None` = for none.
    pub paced: Option<Paced>,
}

/// How far the tasks of other arrays let an array's own start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paced {
    /// These arrays, as bits of the jobs that it comes after; 0 = all of its tasks are free.
    pub parents: u64,
    /// So many of the first tasks may start, or were skipped.
    pub freed: u32,
    /// A chore has to look whether there are more.
    pub due: bool,
}

/// Of which array a job is a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Element {
    pub array: JobId,
    pub index: u32,
}

impl Progress {
    /// Tasks that may still start.
    pub fn left(&self, array: &Array) -> u32 {
        if self.rest.is_some() { 0 } else { array.tasks().saturating_sub(self.begun) }
    }

    /// Tasks that may start beside those that are under way.
    pub fn room(&self, array: &Array, settings: &Settings) -> u32 {
        let freed = self.paced.map_or(u32::MAX, |paced| paced.freed.saturating_sub(self.begun));
        array.most_open(settings).saturating_sub(self.open).min(self.left(array)).min(freed)
    }

    fn count(&mut self, outcome: TaskOutcome, tasks: u32) {
        let slot = &mut self.ended[outcome as usize];
        *slot = slot.saturating_add(tasks);
    }

    /// The array's own outcome: the first that occurs.
    fn outcome(&self) -> TaskOutcome {
        let all = TaskOutcome::ALL.into_iter();
        all.zip(self.ended).find(|(_, count)| *count > 0).map_or(TaskOutcome::Succeeded, |(outcome, _)| outcome)
    }
}

impl Array {
    /// Tasks that may be under way at a time.
    pub fn most_open(&self, settings: &Settings) -> u32 {
        if self.throttle == 0 { settings.array_open } else { self.throttle.min(settings.array_open) }
    }
}

impl TaskOutcome {
    /// In the order of a job's outcome.
    pub const ALL: [TaskOutcome; 5] = [
        TaskOutcome::Failed,
        TaskOutcome::TimedOut,
        TaskOutcome::Cancelled,
        TaskOutcome::Skipped,
        TaskOutcome::Succeeded,
    ];
}

impl Job {
    /// The cancel that was accepted.
    pub fn stop(&self) -> Option<Stop> {
        self.rare.as_ref()?.stop
    }

    /// The array that it is, and how far that has come.
    pub fn array(&self) -> Option<(&Array, &Progress)> {
        match (self.spec.array(), &self.rare.as_deref()?.role) {
            (Some(array), Some(ArrayRole::Whole(progress))) => Some((array, progress)),
            _ => None,
        }
    }

    /// The array of which it is a task.
    pub fn element(&self) -> Option<Element> {
        match &self.rare.as_deref()?.role {
            Some(ArrayRole::Task(element)) => Some(*element),
            _ => None,
        }
    }

    pub(crate) fn progress_mut(&mut self) -> Option<&mut Progress> {
        match &mut self.rare.as_deref_mut()?.role {
            Some(ArrayRole::Whole(progress)) => Some(progress),
            _ => None,
        }
    }

    /// Ids behind its own that are its tasks'.
    fn ids_of_tasks(&self) -> u64 {
        self.array().map_or(0, |(array, _)| u64::from(array.tasks()))
    }
}

impl JobId {
    /// The n-th task of this array.
    pub fn nth_task(self, nth: u32) -> Self {
        Self(self.0.saturating_add(1).saturating_add(u64::from(nth)))
    }
}

impl State {
    /// The job whose body, and whose account of it, a job shares: an array's for its tasks.
    pub fn body_id(&self, id: JobId) -> JobId {
        self.jobs.get(&id).and_then(|job| job.value.element()).map_or(id, |element| element.array)
    }

    pub fn body(&self, id: JobId) -> Option<&Body> {
        self.bodies.get(&self.body_id(id))
    }

    /// The array that a job is a task of, while both are in memory.
    pub fn array_of(&self, job: &Job) -> Option<&Job> {
        self.jobs.get(&job.element()?.array).map(|array| &array.value)
    }

    /// A cancel was accepted, of the job or of its array.
    pub fn is_stopped(&self, job: &Job) -> bool {
        job.stop().is_some() || self.array_of(job).is_some_and(|array| array.stop().is_some())
    }

    /// A person's word against its array holds its tasks, too: none of them starts (again).
    pub fn is_barred(&self, job: &Job) -> bool {
        self.is_stopped(job) || job.holds.any() || self.array_of(job).is_some_and(|array| array.holds.user)
    }

    /// The task of a job that starts next, as plans name it: `{array, index}`, before it is a job. `nth` more are thought to
    /// have started. `None` where no more may.
    pub fn task_to_start(&self, id: JobId, nth: u32) -> Option<TaskKey> {
        let job = &self.jobs.get(&id)?.value;
        let Some((array, progress)) = job.array() else { return (nth == 0).then_some(TaskKey::only(id)) };
        if nth >= progress.room(array, &self.meta.settings) {
            return None;
        }
        let index = array.index_of(progress.begun.saturating_add(nth))?;
        Some(TaskKey { job: id, index })
    }

    /// What plans name when they speak of a waiting job.
    pub fn front_task(&self, id: JobId) -> TaskKey {
        self.task_to_start(id, 0).unwrap_or(TaskKey::only(id))
    }

    /// The array that has this id set aside for a task which has not become a job, and the task's index.
    pub fn unbegun_task(&self, id: JobId) -> Option<(JobId, u32)> {
        let (last, found) = self.jobs.range(..=id).next_back()?;
        let array_id = found.value.element().map_or(*last, |element| element.array);
        let (array, progress) = self.jobs.get(&array_id)?.value.array()?;
        let nth = u32::try_from(id.0.checked_sub(array_id.0.saturating_add(1))?).ok()?;
        let index = array.index_of(nth)?;
        (nth >= progress.begun).then_some((array_id, index))
    }

    /// The job that the next task of an array becomes; `None` for the task of a plain job.
    pub(crate) fn next_element(&self, key: TaskKey) -> Option<(JobId, Job)> {
        let array = &self.jobs.get(&key.job)?.value;
        let (_, progress) = array.array()?;
        let element = Element { array: key.job, index: key.index };
        let job = Job {
            spec: array.spec.of_element(),
            request: None,
            // It comes back into the queue before those that have not started.
            seq: array.seq.saturating_sub(1),
            rare: Some(Box::new(Rare { stop: None, role: Some(ArrayRole::Task(element)) })),
            unmet: 0,
            ..array.clone()
        };
        Some((key.job.nth_task(progress.begun), job))
    }

    /// The next task of an array becomes this job: the array counts it, and it is told.
    pub(crate) fn count_begun(&mut self, ctx: &mut Ctx<'_>, array: JobId, task: JobId) {
        self.change_job(ctx, array, |state, _| {
            state.jobs.update(&array, |job| {
                if let Some(progress) = job.value.progress_mut() {
                    progress.begun = progress.begun.saturating_add(1);
                    progress.open = progress.open.saturating_add(1);
                    let begun = progress.begun;
                    if let Some(paced) = progress.paced.as_mut().filter(|paced| paced.parents != 0) {
                        paced.due |= paced.freed <= begun;
                    }
                }
            });
        });
        ctx.tell(Change::JobSubmitted { job: task });
    }

    /// The record of a task that has become a job. Runs inside `change_job` of it.
    pub(crate) fn insert_element(&mut self, ctx: &Ctx<'_>, id: JobId, job: Job) {
        self.tenants.update(&job.tenant, |tenant| tenant.live_jobs = tenant.live_jobs.saturating_add(1));
        self.jobs.insert(id, Versioned::new(ctx.rev, job));
    }

    /// A task of an array has ended.
    pub(crate) fn count_ended(&mut self, ctx: &mut Ctx<'_>, array: JobId, outcome: TaskOutcome) {
        self.change_job(ctx, array, |state, ctx| {
            state.jobs.update(&array, |job| {
                if let Some(progress) = job.value.progress_mut() {
                    progress.open = progress.open.saturating_sub(1);
                    progress.count(outcome, 1);
                }
            });
            state.end_array(ctx, array);
        });
        self.note_ended_peer(ctx, array);
    }

    /// No more task of the array starts. Runs inside `change_job` of it.
    pub(crate) fn end_rest(&mut self, ctx: &mut Ctx<'_>, id: JobId, outcome: TaskOutcome, cause: Option<EndCause>) {
        self.jobs.update(&id, |job| {
            let left = job.value.array().map_or(0, |(array, progress)| progress.left(array));
            if let Some(progress) = job.value.progress_mut().filter(|_| left > 0) {
                progress.rest = Some((outcome, cause));
                progress.count(outcome, left);
            }
        });
        self.end_array(ctx, id);
        self.note_ended_peer(ctx, id);
    }

    /// Ends the array if none of its tasks is left.
    fn end_array(&mut self, ctx: &mut Ctx<'_>, id: JobId) {
        let Some((array, progress)) = self.jobs.get(&id).and_then(|job| job.value.array()) else { return };
        if progress.open > 0 || progress.left(array) > 0 {
            return;
        }
        let outcome = progress.outcome();
        let cause = progress.rest.and_then(|(_, cause)| cause);
        self.touch_task(TaskKey::only(id));
        self.tasks.update(&TaskKey::only(id), |task| task.value.phase = Phase::Ended { outcome });
        let (rev, wall_ms) = (ctx.rev, self.meta.wall_ms);
        let result = TaskResult { outcome, token: None, attempt: 0, exit: None, rev, wall_ms, cause };
        self.end_task(ctx, TaskKey::only(id), result);
    }

    /// The array came into the queue.
    pub(crate) fn note_queued(&mut self, id: JobId, rev: Revision) {
        self.jobs.update(&id, |job| job.value.progress_mut().map(|progress| progress.queued = rev));
    }

    /// The tasks under way are to be cancelled, by a chore. Runs inside `change_job` of the array.
    pub(crate) fn begin_sweep(&mut self, id: JobId) {
        self.jobs.update(&id, |job| {
            if let Some(progress) = job.value.progress_mut().filter(|progress| progress.open > 0) {
                progress.sweep = Some(id.nth_task(0));
            }
        });
    }

    /// Takes the next task that a cancel of its array has to reach: `None` once there is none, and the sweep is over.
    pub(crate) fn sweep(&mut self, ctx: &mut Ctx<'_>, array: JobId) -> Option<JobId> {
        let job = &self.jobs.get(&array)?.value;
        let from = job.array()?.1.sweep?;
        let last = JobId(array.0.saturating_add(job.ids_of_tasks()));
        let found = self.jobs.range(from..=last).find(|(_, job)| job.value.ended.is_none()).map(|(id, _)| *id);
        self.change_job(ctx, array, |state, _| {
            state.jobs.update(&array, |job| {
                if let Some(progress) = job.value.progress_mut() {
                    progress.sweep = found.map(|id| JobId(id.0.saturating_add(1)));
                }
            });
        });
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(ranges: &[(u32, u32)]) -> Array {
        Array { ranges: ranges.to_vec(), throttle: 0 }
    }

    #[test]
    fn indexes_and_places_are_each_others_inverse() {
        let array = array(&[(3, 5), (9, 9), (4_294_967_290, u32::MAX)]);
        assert_eq!((array.tasks(), array.wrong()), (10, None));
        for nth in 0..array.tasks() {
            let index = array.index_of(nth).expect("a task");
            assert_eq!(array.nth_of(index), Some(nth));
        }
        assert_eq!((array.index_of(10), array.nth_of(6), array.nth_of(0)), (None, None, None));
    }

    #[test]
    fn what_is_no_array_is_told() {
        let wrong = |ranges: &[(u32, u32)]| array(ranges).wrong().unwrap_or_default();
        assert_eq!(wrong(&[]), "array names no index");
        assert_eq!(wrong(&[(2, 1)]), "array has the range 2-1, which ends before it begins");
        assert_eq!(wrong(&[(1, 1), (1, 1)]), "array has the range 1-1 behind 1-1, must rise and name each index once");
        assert_eq!(wrong(&[(0, 5), (5, 9)]), "array has the range 5-9 behind 0-5, must rise and name each index once");
        assert_eq!(wrong(&[(0, 10_000_000)]), "array has 10000001 tasks, the limit is 10000000");
        assert_eq!(wrong(&[(0, u32::MAX)]), "array has 4294967296 tasks, the limit is 10000000");
        assert_eq!(array(&[(0, 9_999_999)]).wrong(), None);
        let many: Vec<(u32, u32)> = (0..65).map(|at| (2 * at, 2 * at)).collect();
        assert_eq!(wrong(&many), "array has 65 ranges, the limit is 64");
    }
}
