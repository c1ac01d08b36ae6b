//! Restore: the first command of a cluster that goes on from a backup. What the old life did behind the backup is not
//! known, only that it may have happened, and that parts of it may still run.
//!
//! | what the old life may have done since | so |
//! |---|---|
//! | minted tokens | the generation, their high bits, is above the backup's: no old token is ever minted again |
//! | given out ids of jobs and sessions, and revisions | their counters jump further than an old life comes |
//! | started other attempts of the jobs that it had | each live job is on hold `restore` for its lease's whole span |
//! | registered agents again | epochs jump: every agent must register anew and list what runs |
//! | started work on machines | a machine takes no work until its agent has registered |
//! | given locks to others | every session ends: a lock is had again with a token of the new generation |
//!
//! A lease of the backup stays: its agent says whether it runs, ended or is dead, or falls silent. A running attempt
//! that the backup does not know is an orphan, and is killed (`register`).
//!
//! The hold ends with time, or by a person's `Release`; it does not end when all machines of the backup are back, for a
//! machine that joined after the backup may run an attempt too.
//!
//! Refuses GENERATION_STALE, LIMIT. Not bounded in its work: it runs once, before there are clients.

use super::{Ctx, DONE, session};
use crate::command::{Code, Rejection, Reply};
use crate::id::*;
use crate::record::*;
use crate::state::State;

/// How far the counters jump. Nobody submits so many jobs, or makes so many changes, between a backup and its restore.
const JOBS: u64 = 1 << 32;
const SESSIONS: u64 = 1 << 32;
const REVISIONS: u64 = 1 << 32;
/// Job ids are below this: the bits above are reserved.
const JOB_END: u64 = 1 << 48;
/// As the leader measures silence: a process is dead when its lease's time, the clocks' drift and the kill are over.
const DRIFT_PERCENT: u64 = 1;
const KILL_MARGIN_MS: u64 = 2_000;
/// Why a machine takes no work.
const UNHEARD: &str = "its agent has not registered since the restore from a backup";

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, generation: u32) -> Result<Reply, Rejection> {
    check_generation(state, generation)?;
    let next_job = state.meta.next_job.saturating_add(JOBS);
    if next_job >= JOB_END {
        return Err(Rejection::new(Code::Limit, format!("job ids would go on from {next_job}, they end at {JOB_END}")));
    }
    begin_generation(state, ctx, generation, next_job);
    hold_live_jobs(state, ctx);
    distrust_nodes(state, ctx);
    end_sessions(state, ctx)?;
    end_watches(state, ctx);
    DONE
}

fn check_generation(state: &State, generation: u32) -> Result<(), Rejection> {
    let known = state.generation();
    if generation <= known {
        let detail = format!("generation is {generation}, the backup is of generation {known}: it must be above");
        return Err(Rejection::new(Code::GenerationStale, detail));
    }
    if generation > Token::GENERATION_MAX {
        let detail = format!("generation is {generation}, the limit is {}", Token::GENERATION_MAX);
        return Err(Rejection::new(Code::Limit, detail));
    }
    Ok(())
}

fn begin_generation(state: &mut State, ctx: &mut Ctx<'_>, generation: u32, next_job: u64) {
    let meta = &mut state.meta;
    ctx.rev = Revision(meta.rev.0.saturating_add(REVISIONS));
    meta.rev = ctx.rev;
    meta.incarnation = generation;
    meta.token = Token::first_of(generation);
    meta.next_job = next_job;
    meta.next_session = meta.next_session.saturating_add(SESSIONS);
    meta.restored_ms = Some(meta.clock_ms);
}

fn hold_live_jobs(state: &mut State, ctx: &mut Ctx<'_>) {
    let live: Vec<JobId> = state.jobs.iter().filter(|(_, job)| job.value.ended.is_none()).map(|(id, _)| *id).collect();
    for id in live {
        state.change_job(ctx, id, |state, _| {
            state.jobs.update(&id, |job| job.value.holds.restore = true);
        });
    }
}

fn distrust_nodes(state: &mut State, ctx: &mut Ctx<'_>) {
    let nodes: Vec<NodeId> = state.nodes.iter().map(|(id, _)| *id).collect();
    for id in nodes {
        state.nodes.update(&id, |node| node.value.begin_life());
        if state.nodes.get(&id).is_some_and(|node| node.value.admin == NodeAdmin::Ready) {
            state.set_admin(id, NodeAdmin::Out { reason: UNHEARD.into(), evict_ms: None });
        }
        state.show_node(ctx, id);
    }
}

fn end_sessions(state: &mut State, ctx: &mut Ctx<'_>) -> Result<(), Rejection> {
    let sessions: Vec<SessionId> = state.sessions.iter().map(|(id, _)| *id).collect();
    for id in sessions {
        session::end(state, ctx, id)?;
    }
    Ok(())
}

/// Nobody can watch from one life into the next: a watch is told that its revisions are compacted, and lists again.
fn end_watches(state: &mut State, ctx: &mut Ctx<'_>) {
    ctx.changes.clear();
    state.events.clear();
    state.meta.compacted_rev = ctx.rev;
}

/// The place of a machine in scheduling once its agent has registered.
pub(super) fn heard(admin: NodeAdmin) -> NodeAdmin {
    match admin {
        NodeAdmin::Out { reason, evict_ms: None } if reason == UNHEARD => NodeAdmin::Ready,
        other => other,
    }
}

/// Cluster time at which the first hold `restore` ends.
pub(super) fn next_due_ms(state: &State) -> Option<u64> {
    let (span_ms, _) = state.index.restoring.get_min()?;
    Some(state.meta.restored_ms.unwrap_or(0).saturating_add(*span_ms))
}

/// Ends the holds whose time is over, at most `limit`.
pub(super) fn end_holds(state: &mut State, ctx: &mut Ctx<'_>, limit: u32) {
    for _ in 0..limit {
        let due = next_due_ms(state).is_some_and(|due_ms| due_ms <= state.meta.clock_ms);
        let Some((_, id)) = state.index.restoring.get_min().copied().filter(|_| due) else { return };
        state.change_job(ctx, id, |state, _| {
            state.jobs.update(&id, |job| job.value.holds.restore = false);
        });
    }
}

/// How long after the restore an attempt of the job that nobody knows of may still be alive.
pub(crate) fn span_ms(job: &Job) -> u64 {
    let ttl_ms = job.spec.lease_ttl_ms;
    ttl_ms.saturating_add(ttl_ms.saturating_mul(DRIFT_PERCENT) / 100).saturating_add(KILL_MARGIN_MS)
}

impl State {
    /// Which life of the cluster this is: 0 until a first restore.
    pub fn generation(&self) -> u32 {
        self.meta.incarnation.max(self.meta.token.generation())
    }
}
