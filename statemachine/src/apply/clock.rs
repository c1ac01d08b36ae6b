//! What happens by itself: timers that are due (end of a backoff, an ended job leaves memory), and chores that work
//! off in small steps what a command did at once (forgotten request ids, dropped history). Bounded per entry; the
//! leader proposes a `Tick` while something is due.

use super::{Ctx, calendar, cancel, dependents, node_admin, peers, requests, restore, retain};
use crate::id::*;
use crate::record::*;
use crate::state::{HOUR_MS, State, TimerKind};
use crate::storage;
use crate::transition::{self, By};

/// The bucket of history in which a job that is archived now is kept.
pub(super) fn archive_bucket(clock_ms: u64) -> u32 {
    u32::try_from(clock_ms / HOUR_MS).unwrap_or(u32::MAX)
}

pub(super) fn next_due_ms(state: &State) -> Option<u64> {
    let timer = state.index.timers.get_min().map(|timer| timer.due_ms);
    let index = &state.index;
    let told = index.ripe.is_empty() && index.sweeping.is_empty() && index.pacing.is_empty();
    let idle = state.meta.retiring.is_empty() && told;
    let chore = if idle { requests::next_due_ms(state) } else { Some(state.meta.clock_ms) };
    [timer, chore, restore::next_due_ms(state)].into_iter().flatten().min()
}

/// The timers due by now, oldest first; all of one entry are one revision.
pub(super) fn fire_timers(state: &mut State, salt: u64) {
    let mut ctx = Ctx::new(state, salt, "", None);
    for _ in 0..state.meta.settings.timers_per_entry {
        let Some(timer) = state.index.timers.get_min().copied() else { break };
        if timer.due_ms > state.meta.clock_ms {
            break;
        }
        match timer.what {
            TimerKind::Retry(task) => end_backoff(state, &mut ctx, task),
            TimerKind::Archive(job) => archive(state, &mut ctx, job),
            TimerKind::Evict(node) => node_admin::evict(state, &mut ctx, node),
            TimerKind::Claim(task) => state.drop_claim(task),
        }
        // A timer that found nothing to do must not come back.
        state.index.timers.remove(&timer);
    }
    calendar::fire(state, &mut ctx, state.meta.settings.timers_per_entry);
    restore::end_holds(state, &mut ctx, state.meta.settings.timers_per_entry);
    state.finish(ctx);
}

/// At most `chore_steps` steps an entry, in a fixed order.
pub(super) fn run_chores(state: &mut State, salt: u64) {
    let steps = state.meta.settings.chore_steps;
    let left = cancel::sweep(state, salt, steps);
    let left = dependents::resolve(state, salt, left);
    let left = peers::look(state, salt, left);
    let left = requests::forget_old(state, left);
    retain::clear_dropped(state, left);
}

fn end_backoff(state: &mut State, ctx: &mut Ctx<'_>, task: TaskKey) {
    state.change_job(ctx, task.job, |state, _| {
        state.tasks.update(&task, |task| {
            if let Some(next) = transition::next(&task.value.phase, By::BackoffOver) {
                task.value.phase = next.phase;
            }
        });
    });
}

/// Moves an ended job with its body and task from memory to history. The keyspace shows it as before.
fn archive(state: &mut State, ctx: &mut Ctx<'_>, id: JobId) {
    state.change_job(ctx, id, |state, _| {
        let Some(job) = state.jobs.get(&id).cloned() else { return };
        let Some(outcome) = job.value.ended.as_ref().map(|end| end.outcome) else { return };
        let body = state.body(id).cloned().unwrap_or_default();
        state.jobs.remove(&id);
        let task = state.tasks.remove(&TaskKey::only(id)).map(|task| (*task).clone());
        // The task of an array has no body of its own.
        let bytes = state.bodies.remove(&id).map_or(0, |body| u64::try_from(body.size()).unwrap_or(u64::MAX));
        state.tenants.update(&job.value.tenant, |tenant| tenant.body_bytes = tenant.body_bytes.saturating_sub(bytes));
        let bucket = archive_bucket(state.meta.clock_ms);
        let newest_wall_ms = state.meta.wall_ms;
        let row = HistoryRow { id, job, body, task, bucket };
        let mut sum = state.buckets.get(&bucket).copied().unwrap_or_default();
        sum.add(&row, newest_wall_ms);
        state.buckets.insert(bucket, sum);
        let (chunk, place) = ended_place(id);
        let mut ended = state.ended.get(&chunk).cloned().unwrap_or_default();
        ended.jobs.insert(place, (outcome, bucket));
        state.ended.insert(chunk, ended);
        state.archived.insert(id, std::sync::Arc::new(row));
    });
}

/// Where `ended` keeps a job: chunk, and place in the chunk.
pub(crate) fn ended_place(job: JobId) -> (u64, u8) {
    (job.0 >> 8, (job.0 & 0xff) as u8)
}

impl Bucket {
    /// Counts a row of this bucket.
    pub fn add(&mut self, row: &HistoryRow, wall_ms: i64) {
        let (hash, bytes) = storage::weigh(row);
        self.rows = self.rows.saturating_add(1);
        self.bytes = self.bytes.saturating_add(bytes);
        self.sum = self.sum.wrapping_add(hash);
        self.highest_job = self.highest_job.max(row.id);
        self.newest_wall_ms = self.newest_wall_ms.max(wall_ms);
    }
}

impl State {
    /// How a job ended that left memory, and the bucket of its history row. `None` once retention dropped the bucket.
    pub fn ended_job(&self, job: JobId) -> Option<(TaskOutcome, u32)> {
        let (chunk, place) = ended_place(job);
        let found = *self.ended.get(&chunk)?.jobs.get(&place)?;
        (!self.meta.retiring.contains_key(&found.1)).then_some(found)
    }
}
