//! The way back from a replica's directory to its log and state, at the start: what the directory gives alone, and else what the other
//! replicas give. The parts are their owners': `log`, `statemachine::storage` and `raft::fetch`; here is their order.

use std::collections::BTreeMap;
use std::sync::Arc;

use proto::v1;
use statemachine::record::LogPosition;
use statemachine::storage::{self, LogBounds, Recovered, Source};
use tokio::sync::oneshot;

use crate::identity::{Home, Identity, LOG_DIR, Stage};
use crate::log::storage::to_id;
use crate::log::{EntryId, Log, LogError};
use crate::peers;
use crate::raft::fetch;
use crate::raft::machine::Shared;
use crate::raft::network::Pool;
use crate::replica::{Mode, Options, Peer, StartError, group, internal};
use crate::runtime::blocking;

/// Log and vote first, then image and snapshots, then the other replicas: the order of the recovery.
pub async fn recover(
    options: &Options,
    home: &Home,
    identity: Identity,
    pool: &Pool,
) -> Result<(Arc<Log>, Arc<Shared>), StartError> {
    let (log, mut recovered) = recover_alone(options, identity).await?;
    if recovered.source == Source::NeedsLeaderSnapshot {
        let Some(purged) = log.reader().state().purged.map(to_position) else {
            return Err(internal("recover the state")("a whole log needs no snapshot".to_owned()));
        };
        drop(recovered);
        let others = others_of(options, home, identity).await;
        recovered = fetch::from_others(fetch::Lost { dir: &options.dir, purged, others }, pool).await?;
    }
    tracing::info!(source = %recovered.source, applied = recovered.state.meta.applied.index, "the state is recovered");
    let dir = options.dir.clone();
    let shared = blocking(move || Shared::new(&dir, identity.cluster.0, recovered)).await;
    let shared = shared.map_err(|err| internal("recover")(err.to_string()))?;
    let shared = shared.map_err(|err| internal("recover the state")(err.to_string()))?;
    if let Some(start) = shared.start() {
        drop_conflicting_tail(&log, to_id(start)).await?;
    }
    Ok((log, Arc::new(shared)))
}

/// What the directory alone gives.
async fn recover_alone(options: &Options, identity: Identity) -> Result<(Arc<Log>, Recovered), StartError> {
    let (dir, log_options) = (options.dir.clone(), options.log.clone());
    let work = move || {
        let log = Log::open(&dir.join(LOG_DIR), log_options)?;
        let state = log.reader().state();
        if identity.stage == Stage::Member && state.last.is_none() {
            return Err(StartError::LogLost { dir: dir.join(LOG_DIR), replica: identity.replica });
        }
        let bounds = LogBounds { purged: state.purged.map(to_position), last: state.last.map(to_position) };
        Ok((Arc::new(log), storage::open(&dir, bounds)?))
    };
    blocking(work).await.map_err(|err| internal("recover")(err.to_string()))?
}

/// Removes what the group decided otherwise: the log from `decided` on, where it has another entry there. A snapshot of another replica can
/// be on the disk before the removal that its installation began with is; and what is fetched knows nothing of this log.
async fn drop_conflicting_tail(log: &Log, decided: EntryId) -> Result<(), LogError> {
    let reader = log.reader();
    let mine = reader.id_at(decided.index)?;
    if mine.is_none_or(|mine| mine == decided) {
        return Ok(());
    }
    tracing::warn!(?decided, ?mine, last = ?reader.state().last, "the end of the log is another leader's: it is removed");
    let before = decided.index.checked_sub(1).map(|index| reader.id_at(index)).transpose()?.flatten();
    let (done, durable) = oneshot::channel();
    log.truncate_after(before, Box::new(move |result| drop(done.send(result))))?;
    durable.await.map_err(|_| LogError::Stopped("its IO thread ended".into()))?
}

/// Who may have what this replica lost: the members that it noted, and those that the replica behind `--join` knows of.
async fn others_of(options: &Options, home: &Home, identity: Identity) -> BTreeMap<u64, Peer> {
    let mut others = peers::noted(home);
    if let Mode::Join { addr, token } = &options.mode {
        let asked = async {
            let client = group(addr, &identity.cluster.to_string(), token)?;
            let status = client.status(v1::StatusRequest {}).await;
            status.map_err(|source| StartError::Join { addr: addr.clone(), source })
        };
        match asked.await {
            Ok(status) => others.extend(
                status
                    .members
                    .into_iter()
                    .map(|member| (member.replica_id, Peer { peer_addr: member.peer_addr, api_addr: member.api_addr })),
            ),
            Err(err) => tracing::warn!(%err, "the group's members are not known from there"),
        }
    }
    others.remove(&identity.replica);
    others
}

fn to_position(id: EntryId) -> LogPosition {
    LogPosition { term: id.term, leader: id.node, index: id.index }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Record;

    fn id(term: u64, index: u64) -> EntryId {
        EntryId { index, term, node: 1 }
    }

    async fn last_after(purged: Option<u64>, applied: EntryId) -> Option<EntryId> {
        let dir = tempfile::tempdir().expect("a directory");
        let log = Log::open(dir.path(), crate::log::Options::default()).expect("a log");
        let records = (0..6).map(|index| Record { id: id(2, index), tag: 1, data: Default::default() }).collect();
        log.append(records, Box::new(drop)).expect("appended");
        if let Some(index) = purged {
            log.purge(id(2, index), Box::new(drop)).expect("purged");
        }
        drop_conflicting_tail(&log, applied).await.expect("it can be written");
        log.reader().state().last
    }

    #[tokio::test]
    async fn what_a_snapshot_shows_to_be_another_leaders_goes_from_the_log() {
        let whole = Some(id(2, 5));
        assert_eq!(last_after(None, id(2, 3)).await, whole, "the log goes on from there");
        assert_eq!(last_after(None, id(3, 6)).await, whole, "it ends before: openraft leaves it behind");
        assert_eq!(last_after(Some(4), id(2, 3)).await, whole, "it begins after");
        assert_eq!(last_after(None, id(3, 3)).await, Some(id(2, 2)));
        assert_eq!(last_after(None, id(3, 0)).await, None);
        assert_eq!(last_after(Some(2), id(3, 3)).await, Some(id(2, 2)), "of the purged one its id is known");
    }
}
