//! What a replica does by itself, beside serving: purges the log, makes snapshots when the log has grown by bytes, takes caught-up learners
//! in as voters, hands leadership over when its disk is full, and notes in its identity that the group knows it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::{ChangeMembers, Instant, RaftMetrics, ServerState};
use tokio::sync::watch;

use super::Raft;
use super::machine::Shared;
use super::settings::SNAPSHOT_BYTES;
use super::types::TypeConfig;
use crate::identity::{Home, Identity, Stage};

/// Between two looks at the learners, and at a disk that stays full.
const LOOK: Duration = Duration::from_millis(250);
/// A learner with fewer entries to come than this has caught up: a moment's load.
const CAUGHT_UP: u64 = 1_000;
/// A replica that has not answered for so long does not count as alive: three election timeouts.
pub const ALIVE: Duration = Duration::from_millis(900);
/// A change of the membership is given up after this; it may be done later all the same.
pub const CHANGE: Duration = Duration::from_secs(10);

/// Purges and snapshots as the machine's marks move, until openraft stops.
pub async fn keep_log_short(raft: Raft, shared: Arc<Shared>) {
    let mut marks = shared.marks();
    loop {
        let (purge, bytes) = {
            let marks = marks.borrow_and_update();
            (marks.purgeable(), marks.bytes_since_snapshot)
        };
        let purged = raft.data_metrics().borrow_watched().purged.map(|id| id.index);
        if let Some(upto) = purge.filter(|upto| Some(*upto) > purged)
            && let Err(err) = raft.trigger().purge_log(upto).await
        {
            tracing::debug!(%err, "the log is not purged any more");
            return;
        }
        if bytes >= SNAPSHOT_BYTES {
            shared.count_bytes_anew();
            if raft.trigger().snapshot().await.is_err() {
                return;
            }
        }
        if marks.changed().await.is_err() {
            return;
        }
    }
}

/// While this replica leads: makes voters of learners that have caught up.
pub async fn promote_learners(raft: Raft) {
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        look.tick().await;
        let ready = caught_up_learner(&raft.metrics().borrow_watched());
        let Some(id) = ready else { continue };
        let change = raft.change_membership(ChangeMembers::AddVoterIds(BTreeSet::from([id])), true);
        match tokio::time::timeout(CHANGE, change).await {
            Ok(Ok(_)) => tracing::info!(replica = id, "a learner has caught up and is a voter now"),
            Ok(Err(err)) => tracing::debug!(replica = id, %err, "a learner could not be promoted yet"),
            Err(_) => tracing::warn!(replica = id, "promoting a learner takes long"),
        }
    }
}

fn caught_up_learner(metrics: &RaftMetrics<TypeConfig>) -> Option<u64> {
    let (replication, last) = (metrics.replication.as_ref()?, metrics.last_log_index?);
    // One change at a time: the next begins when the last is committed.
    if metrics.state != ServerState::Leader || metrics.membership_config != metrics.committed_membership_config {
        return None;
    }
    metrics.membership_config.membership().learner_ids().find(|id| {
        let matched = replication.get(id).copied().flatten();
        matched.is_some_and(|matched| matched.index + CAUGHT_UP >= last) && is_alive(metrics, *id)
    })
}

/// The leader's view: whether the replica answered lately.
pub fn is_alive(metrics: &RaftMetrics<TypeConfig>, id: u64) -> bool {
    if id == metrics.id {
        return true;
    }
    let heard = metrics.heartbeat.as_ref().and_then(|heard| heard.get(&id).copied().flatten());
    heard.is_some_and(|heard| heard.elapsed() < ALIVE)
}

/// The live voter with the most of the log, this replica excepted.
pub fn successor(metrics: &RaftMetrics<TypeConfig>) -> Option<u64> {
    let replication = metrics.replication.as_ref()?;
    let others = metrics.membership_config.voter_ids().filter(|id| *id != metrics.id && is_alive(metrics, *id));
    others.max_by_key(|id| replication.get(id).copied().flatten())
}

/// Hands leadership over for as long as the disk is full: what can't be written here can be written elsewhere.
pub async fn leave_office_when_full(raft: Raft, mut full: watch::Receiver<bool>) {
    loop {
        if full.wait_for(|full| *full).await.is_err() {
            return;
        }
        let to = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            (metrics.state == ServerState::Leader).then(|| successor(&metrics)).flatten()
        };
        if let Some(to) = to {
            tracing::error!(
                to,
                "the disk is full: leadership is handed over; free space, and this replica goes on by itself"
            );
            if raft.trigger().transfer_leader(to).await.is_err() {
                return;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Notes that the group's membership names this replica: from then on an empty log is a lost one.
pub async fn note_membership(raft: Raft, home: Arc<Home>, identity: Identity) {
    if identity.stage == Stage::Member {
        return;
    }
    let mut metrics = raft.metrics();
    let named = metrics
        .wait_until(|metrics| metrics.committed_membership_config.membership().get_node(&identity.replica).is_some());
    if named.await.is_err() {
        return;
    }
    let written = tokio::task::spawn_blocking(move || home.write(&Identity { stage: Stage::Member, ..identity })).await;
    match written {
        Ok(Ok(())) => {}
        Ok(Err(err)) => tracing::error!(%err, "the identity could not be brought up to date"),
        Err(err) => tracing::error!(%err, "the identity could not be brought up to date"),
    }
}

/// Says so when openraft ends by itself: it met an error of the log or of the machine.
pub async fn report_death(raft: Raft, shared: Arc<Shared>) {
    let mut metrics = raft.metrics();
    let dead =
        metrics.wait_until(|metrics| metrics.running_state.is_err()).await.map(|metrics| metrics.running_state.clone());
    if let Ok(Err(fatal)) = dead
        && !matches!(fatal, openraft::errors::Fatal::Stopped)
    {
        shared.fail(fatal.to_string());
    }
}
