//! The planning loop: wakes when something changed that could start a job, plans on an O(1) snapshot, and proposes the
//! plan. Policy never runs inside apply: a slow plan can't stall the log, and apply re-checks every placement.

use std::sync::Arc;
use std::time::{Duration, Instant};

use scheduling::plan::{Cache, Limits, plan};
use statemachine::command::Preempt;
use statemachine::{Cmd, Command};
use tokio::sync::watch;

use super::duties::ACTOR;
use super::settled::Settled;
use super::{Desk, Kept};
use crate::replica::Applied;

/// Changes within this time are one cycle.
const COALESCE: Duration = Duration::from_millis(1);
/// Share of a core that planning may take when changes never stop: it rests three times as long as the last cycle took.
const REST: u32 = 3;
/// A cycle that placed nothing, though nothing changed, is worth another look after this time: a node may have gone silent.
const IDLE: Duration = Duration::from_secs(2);

pub(super) async fn run(desk: Arc<Desk>, kept: Kept) {
    let mut applied = desk.replica.applied();
    let take = move || kept.lock().map(|mut cache| std::mem::take(&mut *cache)).unwrap_or_default();
    let mut cache = tokio::task::spawn_blocking(take).await.unwrap_or_default();
    let mut limits = Limits::of_leader();
    let mut settled: Option<Settled> = None;
    loop {
        // Before the look is taken: what is applied after it wakes the loop again.
        applied.mark_unchanged();
        match look(&desk, &mut settled) {
            Look::Empty => {
                if applied.changed().await.is_err() {
                    return;
                }
                tokio::time::sleep(COALESCE).await;
                continue;
            }
            Look::Settled => {
                if !changed(&desk, &mut applied).await {
                    return;
                }
                tokio::time::sleep(COALESCE).await;
                continue;
            }
            Look::Plan => {}
        }
        let state = desk.replica.state();
        let unheard = desk.unheard(&state);
        let began = Instant::now();
        let within = limits.clone();
        let planned = tokio::task::spawn_blocking(move || {
            let plan = plan(&state, &mut cache, &within, &unheard);
            let settled = Settled::after(&plan, &within, &state, unheard);
            (plan, cache, settled)
        })
        .await;
        let took = began.elapsed();
        let Ok((plan, kept, nothing_more)) = planned else {
            tracing::error!("the planner panicked; it begins anew with an empty cache");
            cache = Cache::default();
            tokio::time::sleep(IDLE).await;
            continue;
        };
        cache = kept;
        settled = nothing_more;
        let unfinished = plan.unfinished;
        // What is free is given out first: that a victim is needed was found beside it.
        let placed = propose(&desk, plan.commands()).await + preempt(&desk, plan.preempts).await;
        // A cycle that ran out of steps goes on behind its last look; one that placed something begins anew in front.
        limits.after = if unfinished && placed == 0 { plan.reached } else { None };
        if placed == 0 && !unfinished && !changed(&desk, &mut applied).await {
            return;
        }
        tokio::time::sleep(COALESCE.max(took * REST)).await;
    }
}

/// What there is to do.
enum Look {
    /// Nothing waits.
    Empty,
    /// Nothing that waits could start.
    Settled,
    Plan,
}

/// Without a clone of the state: under a stream of submissions it is taken after nearly each entry.
fn look(desk: &Desk, settled: &mut Option<Settled>) -> Look {
    let (now_ms, keeper) = (desk.now_ms(), desk.keeper());
    desk.replica.look(|state| {
        if state.index.queue.is_empty() {
            return Look::Empty;
        }
        let holds = settled.as_mut().is_some_and(|settled| settled.still_holds(state, &keeper.unheard(state, now_ms)));
        if holds { Look::Settled } else { Look::Plan }
    })
}

/// Waits for something that may matter; false when the replica stops.
async fn changed(desk: &Desk, applied: &mut watch::Receiver<Applied>) -> bool {
    tokio::select! {
        changed = applied.changed() => changed.is_ok(),
        () = desk.heard.notified() => true,
        () = tokio::time::sleep(IDLE) => true,
    }
}

/// Ends those who make room for others; for how many tasks apply accepted it.
async fn preempt(desk: &Desk, preempts: Vec<Preempt>) -> usize {
    let mut made = 0;
    for preempt in preempts {
        let cmd = Cmd { request: None, actor: ACTOR.to_owned(), body: Command::Preempt(preempt) };
        match desk.replica.propose_in(cmd, desk.office.term).await {
            Ok((statemachine::Outcome::Rejected(refusal), _)) => {
                tracing::debug!(code = refusal.code.name(), detail = refusal.detail, "a preemption was refused");
            }
            Ok(_) => made += 1,
            Err(error) => tracing::debug!(%error, "a preemption was not committed"),
        }
    }
    made
}

/// Proposes the commands one after the other; the number of placements that apply accepted.
async fn propose(desk: &Desk, plans: Vec<statemachine::command::Plan>) -> usize {
    let mut placed = 0;
    for plan in plans {
        let cmd = Cmd { request: None, actor: ACTOR.to_owned(), body: Command::Plan(plan) };
        match desk.replica.propose_in(cmd, desk.office.term).await {
            Ok((statemachine::Outcome::Done(statemachine::Reply::Plan(answers)), _)) => {
                for refusal in answers.iter().filter_map(|answer| answer.as_ref().err()) {
                    tracing::debug!(code = refusal.code.name(), detail = refusal.detail, "a placement was refused");
                }
                placed += answers.iter().filter(|answer| answer.is_ok()).count();
            }
            Ok((other, _)) => tracing::warn!(?other, "an unexpected answer to a plan"),
            Err(error) => tracing::debug!(%error, "a plan was not committed"),
        }
    }
    placed
}
