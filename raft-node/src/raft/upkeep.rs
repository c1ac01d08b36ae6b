//! What a replica does by itself, beside serving: purges the log, makes snapshots when the log has grown by bytes, takes caught-up learners
//! in as voters, hands leadership over when its disk is full, and notes in its identity that the group knows it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{ChangeMembers, Instant, RaftMetrics, ServerState};
use tokio::sync::{Mutex, watch};

use super::Raft;
use super::machine::Shared;
use super::settings::SNAPSHOT_BYTES;
use super::types::{Peer, TypeConfig};
use crate::identity::{Home, Identity, Stage};
use crate::peers;
use crate::runtime::blocking;

/// Between tries while another change is being committed.
const IN_PROGRESS: Duration = Duration::from_millis(20);
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

/// Changes of the membership, one at a time. Cloning shares the turn.
#[derive(Clone)]
pub struct Changes {
    raft: Raft,
    turn: Arc<Mutex<()>>,
}

/// Why a change was not made. After [`ChangeError::Late`] it may be made yet.
#[derive(Debug)]
pub enum ChangeError {
    Late,
    Raft(RaftError<TypeConfig, ClientWriteError<TypeConfig>>),
}

impl Changes {
    pub fn new(raft: Raft) -> Self {
        Self { raft, turn: Arc::default() }
    }

    /// Waits for its turn, then for the change to be committed. `retain`: voters taken out stay as learners.
    pub async fn make(&self, change: ChangeMembers<u64, Peer>, retain: bool) -> Result<(), ChangeError> {
        let made = async {
            let _turn = self.turn.lock().await;
            loop {
                match self.raft.change_membership(change.clone(), retain).await {
                    // One that an earlier leader began is still being committed.
                    Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                        ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_),
                    ))) => tokio::time::sleep(IN_PROGRESS).await,
                    made => return made.map(|_| ()).map_err(ChangeError::Raft),
                }
            }
        };
        tokio::time::timeout(CHANGE, made).await.unwrap_or(Err(ChangeError::Late))
    }

    /// While this replica leads: ends changes that an earlier leader left half-way, and makes voters of learners that have caught up.
    pub async fn look_after_members(self) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            // A change under way looks half-way too: it is its own maker's to end.
            if self.turn.try_lock().is_err() {
                continue;
            }
            let Some(voters) = next_voters(&self.raft.metrics().borrow_watched()) else { continue };
            match self.make(ChangeMembers::AddVoterIds(voters.clone()), false).await {
                Ok(()) => tracing::info!(?voters, "the membership is settled with these as voters too"),
                Err(err) => tracing::debug!(?voters, ?err, "the membership could not be settled yet"),
            }
        }
    }
}

/// Whom to make voters now: none of them ends a change left half-way.
fn next_voters(metrics: &RaftMetrics<TypeConfig>) -> Option<BTreeSet<u64>> {
    if metrics.state != ServerState::Leader || metrics.membership_config != metrics.committed_membership_config {
        return None;
    }
    if metrics.membership_config.membership().get_joint_config().len() > 1 {
        return Some(BTreeSet::new());
    }
    caught_up_learner(metrics).map(|id| BTreeSet::from([id]))
}

fn caught_up_learner(metrics: &RaftMetrics<TypeConfig>) -> Option<u64> {
    let (replication, last) = (metrics.replication.as_ref()?, metrics.last_log_index?);
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

/// Says that the disk is full when one of the two that write to it says so: the log waits for space, or the image does
/// while the log still has room in its segment.
pub async fn watch_disk(mut log: watch::Receiver<bool>, mut image: watch::Receiver<bool>, full: watch::Sender<bool>) {
    loop {
        let now = *log.borrow_and_update() || *image.borrow_and_update();
        full.send_if_modified(|known| std::mem::replace(known, now) != now);
        let goes_on = tokio::select! {
            changed = log.changed() => changed.is_ok(),
            changed = image.changed() => changed.is_ok(),
        };
        if !goes_on {
            return;
        }
    }
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

/// Notes that the group's membership names this replica, once its own log holds the entry that says so: from then on an empty
/// log is a lost one.
pub async fn note_membership(
    raft: Raft,
    home: Arc<Home>,
    identity: Identity,
    mut durable: watch::Receiver<Option<u64>>,
) {
    if identity.stage == Stage::Member {
        return;
    }
    let mut metrics = raft.metrics();
    let named = metrics
        .wait_until(|metrics| metrics.committed_membership_config.membership().get_node(&identity.replica).is_some());
    let Ok(named_at) = named.await.map(|metrics| metrics.committed_membership_config.log_id().map(|id| id.index))
    else {
        return;
    };
    if durable.wait_for(|durable| *durable >= named_at).await.is_err() {
        return;
    }
    let written = blocking(move || home.write(&Identity { stage: Stage::Member, ..identity })).await;
    match written {
        Ok(Ok(())) => {}
        Ok(Err(err)) => tracing::error!(%err, "the identity could not be brought up to date"),
        Err(err) => tracing::error!(%err, "the identity could not be brought up to date"),
    }
}

/// Notes who belongs to the group, each time that this changes.
pub async fn note_members(raft: Raft, home: Arc<Home>) {
    let mut noted = peers::noted(&home);
    let mut metrics = raft.metrics();
    loop {
        let changed = metrics.wait_until(|metrics| {
            let members = members_of(metrics);
            !members.is_empty() && members != noted
        });
        let Ok(changed) = changed.await else { return };
        noted = members_of(&changed);
        let (home, members) = (home.clone(), noted.clone());
        let written = blocking(move || peers::note(&home, &members)).await;
        if let Err(what) = written.map_err(|err| err.to_string()).and_then(|done| done.map_err(|err| err.to_string())) {
            tracing::warn!(what, "who belongs to the group was not noted");
        }
    }
}

fn members_of(metrics: &RaftMetrics<TypeConfig>) -> BTreeMap<u64, Peer> {
    metrics.committed_membership_config.membership().nodes().map(|(id, peer)| (*id, peer.clone())).collect()
}

/// Takes no part any more once this replica has failed: what it would say could differ from the others.
pub async fn stop_when_failed(raft: Raft, shared: Arc<Shared>) {
    let mut failed = shared.failed();
    if failed.wait_for(|failed| failed.is_some()).await.is_ok() && raft.shutdown().await.is_err() {
        tracing::warn!("Raft's core did not end in order");
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
