//! The leader's clockwork: once in a while it asks the keeper what is due and proposes it. Expiry is always a command in
//! the log, proposed only when due.

use std::sync::Arc;
use std::time::Duration;

use statemachine::{Cmd, Command, Revision, State};

use super::Desk;
use super::keeper::Keeper;
use crate::door::wall_ms;

/// How often the clockwork runs.
pub const PERIOD: Duration = Duration::from_millis(100);
/// Keeper's rounds among them: silences and limits are seconds, not milliseconds.
const KEEPER_EVERY: u64 = 5;
/// Housekeeping rounds: compaction and retention.
const HOUSEKEEPING_EVERY: u64 = 100;
/// The name that the log shows for the leader's own commands.
pub const ACTOR: &str = "ares";

pub(super) async fn run(desk: Arc<Desk>) {
    let mut ticker = tokio::time::interval(PERIOD);
    ticker.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for round in 0u64.. {
        ticker.tick().await;
        let state = desk.replica.state();
        let (now_ms, cluster_now_ms) = (desk.now_ms(), desk.office.clock_ms());
        let mut commands = due(&state, &mut desk.keeper(), round, now_ms, cluster_now_ms);
        commands.extend(calendar_due(&state, wall_ms()).filter(|tick| !commands.contains(tick)));
        propose(&desk, commands).await;
    }
}

/// The commands that are due in this round of the term, counted from 0. `now_ms`: the term's own monotonic clock.
pub fn due(state: &State, keeper: &mut Keeper, round: u64, now_ms: u64, cluster_now_ms: u64) -> Vec<Command> {
    let mut commands = Vec::new();
    if state.next_due_ms().is_some_and(|due| due <= cluster_now_ms) {
        commands.push(Command::Tick);
    }
    if round.is_multiple_of(KEEPER_EVERY) {
        commands.extend(keeper.due(state, now_ms, cluster_now_ms));
    }
    if round % HOUSEKEEPING_EVERY == HOUSEKEEPING_EVERY - 1 {
        commands.extend(housekeeping(state));
    }
    commands
}

/// The entry that brings a begin time or a deadline, once this machine's wall clock has come to it.
pub fn calendar_due(state: &State, wall_now_ms: i64) -> Option<Command> {
    state.next_due_wall_ms().filter(|due| *due <= wall_now_ms).map(|_| Command::Tick)
}

/// Moves the floor of watches behind the ring of events, and drops history that is older than its time.
fn housekeeping(state: &State) -> Vec<Command> {
    let ring = u64::from(state.meta.settings.event_ring);
    let floor = state.meta.rev.0.saturating_sub(ring);
    let mut commands = Vec::new();
    if floor > state.meta.compacted_rev.0 + ring / 4 {
        commands.push(Command::Compact { rev: Revision(floor) });
    }
    const HOUR_MS: u64 = 3_600_000;
    let oldest_kept = state.meta.clock_ms.saturating_sub(state.meta.settings.history_keep_ms) / HOUR_MS;
    if let Some((bucket, _)) = state.buckets.iter().next().filter(|(bucket, _)| u64::from(**bucket) < oldest_kept) {
        commands.push(Command::Retain { bucket: *bucket });
    }
    commands
}

/// Through the one door, all at once. What fails is due again in a later round.
async fn propose(desk: &Desk, commands: Vec<Command>) {
    let proposals = commands.into_iter().map(|body| {
        let what = format!("{body:?}");
        let cmd = Cmd { request: None, actor: ACTOR.to_owned(), body };
        async move { (what, desk.replica.propose_in(cmd, desk.office.term).await) }
    });
    for (what, answer) in futures::future::join_all(proposals).await {
        match answer {
            Ok((statemachine::Outcome::Rejected(rejection), _)) => {
                tracing::debug!(
                    what,
                    code = rejection.code.name(),
                    detail = rejection.detail,
                    "a due command was refused"
                )
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(what, %error, "a due command was not committed"),
        }
    }
}
