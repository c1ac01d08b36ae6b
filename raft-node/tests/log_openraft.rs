//! The log as openraft sees it: openraft's own suite for log stores, and what the suite does not ask.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use futures::{Stream, StreamExt, TryStreamExt};
use openraft::storage::{EntryResponder, RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::{OptionalSend, RaftLogReader, RaftSnapshotBuilder, StorageError};
use raft_node::log::storage::LogStore;
use raft_node::log::{Log, Options};
use raft_node::raft::types::{
    ApplyReply, Entry, EntryPayload, LeaderId, LogId, Membership, Payload, Peer, SnapshotMeta, StoredMembership,
    TypeConfig, Vote, log_id,
};

/// The least state machine that the suite accepts: what was applied last, and the membership.
#[derive(Clone, Default)]
struct Applied {
    last: Option<LogId>,
    membership: StoredMembership,
    snapshot: Option<SnapshotMeta>,
}

type Snapshot = openraft::Snapshot<LeaderId, u64, Peer, ()>;

impl RaftSnapshotBuilder<TypeConfig> for Shared {
    type SnapshotData = ();

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        let mut applied = self.0.lock().await;
        let meta = SnapshotMeta { last_log_id: applied.last, last_membership: applied.membership.clone() };
        applied.snapshot = Some(meta.clone());
        Ok(Snapshot { meta, snapshot: () })
    }
}

/// Shared, because the builder of a snapshot is a handle of its own.
#[derive(Clone, Default)]
struct Shared(Arc<tokio::sync::Mutex<Applied>>);

impl RaftStateMachine<TypeConfig> for Shared {
    type SnapshotData = ();
    type SnapshotBuilder = Shared;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.0.lock().await;
        Ok((applied.last, applied.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            let mut applied = self.0.lock().await;
            applied.last = Some(entry.log_id);
            if let EntryPayload::Membership(membership) = entry.payload {
                applied.membership = StoredMembership::new(Some(entry.log_id), membership);
            }
            if let Some(responder) = responder {
                responder.send(ApplyReply::default());
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Shared {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, _snapshot: ()) -> Result<(), io::Error> {
        let (last, membership) = (meta.last_log_id, meta.last_membership.clone());
        *self.0.lock().await = Applied { last, membership, snapshot: Some(meta.clone()) };
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        Ok(self.0.lock().await.snapshot.clone().map(|meta| Snapshot { meta, snapshot: () }))
    }
}

/// Small enough that the suite's entries are read from disk, and segments end between them.
fn options() -> Options {
    Options { segment_bytes: 400, tail_bytes: 0, reserve_bytes: 4096, ..Options::default() }
}

fn open(dir: &std::path::Path) -> LogStore {
    LogStore::new(Arc::new(Log::open(dir, options()).expect("open")))
}

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, Shared, tempfile::TempDir> for Builder {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Shared), StorageError<TypeConfig>> {
        let dir = tempfile::tempdir().expect("a directory");
        let store = open(dir.path());
        Ok((dir, store, Shared::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openrafts_suite_passes() {
    Suite::test_all(Builder).await.expect("the suite");
}

fn normal(index: u64, len: usize) -> Entry {
    Entry { log_id: log_id(2, 7, index), payload: EntryPayload::Normal(Payload(vec![index as u8; len].into())) }
}

#[tokio::test]
async fn every_kind_of_entry_and_the_vote_survive_reopening() {
    let dir = tempfile::tempdir().expect("a directory");
    let peer = |name: &str| Peer { peer_addr: format!("{name}:1"), api_addr: format!("{name}:2") };
    let nodes = BTreeMap::from([(u64::MAX, peer("a")), (2, peer("b"))]);
    let membership =
        Membership::new(vec![BTreeSet::from([u64::MAX]), BTreeSet::from([2])], nodes).expect("a membership");
    let entries = vec![
        Entry { log_id: log_id(1, u64::MAX, 0), payload: EntryPayload::Membership(membership) },
        Entry { log_id: log_id(2, 7, 1), payload: EntryPayload::Blank },
        normal(2, 0),
        normal(3, 1000),
    ];
    let vote = Vote { leader_id: LeaderId { term: 2, node_id: u64::MAX }, committed: true };
    let mut store = open(dir.path());
    store.save_vote(&vote).await.expect("save the vote");
    store.blocking_append(entries.clone()).await.expect("append");
    store.save_committed(Some(log_id(2, 7, 2))).await.expect("save committed");
    drop(store);

    let mut store = open(dir.path());
    let mut reader = store.get_log_reader().await;
    assert_eq!(reader.try_get_log_entries(..).await.expect("read"), entries);
    assert_eq!(reader.read_vote().await.expect("read"), Some(vote));
    assert_eq!(store.read_committed().await.expect("read"), Some(log_id(2, 7, 2)));
    assert_eq!(store.get_log_state().await.expect("read").last_log_id, Some(log_id(2, 7, 3)));
}

#[tokio::test]
async fn reads_for_replication_are_bounded_in_bytes_and_streams_are_whole() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut store = open(dir.path());
    let entries: Vec<_> = (0..40).map(|index| normal(index, if index == 20 { 3 << 20 } else { 100_000 })).collect();
    store.blocking_append(entries.clone()).await.expect("append");
    let mut reader = store.get_log_reader().await;
    let some = reader.limited_get_log_entries(0, 40).await.expect("read");
    assert_eq!(some.len(), 11, "about 1 MiB");
    let large = reader.limited_get_log_entries(20, 40).await.expect("read");
    assert_eq!(large.len(), 1, "at least one");
    let streamed: Vec<_> = reader.entries_stream(3..).await.map(|entry| entry.expect("read")).collect().await;
    assert_eq!(streamed, entries[3..]);
}

#[tokio::test]
async fn a_follower_gets_nothing_behind_a_gap() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut store = open(dir.path());
    let entries: Vec<_> = (0..40).map(|index| normal(index, 10)).collect();
    store.blocking_append(entries.clone()).await.expect("append");
    store.purge(entries[20].log_id).await.expect("purge");
    let mut reader = store.get_log_reader().await;
    assert_eq!(reader.limited_get_log_entries(14, 40).await.expect("read"), [], "15 to 20 are gone");
    assert_eq!(reader.limited_get_log_entries(21, 40).await.expect("read"), entries[21..]);
}

#[tokio::test]
async fn a_note_of_the_commit_point_counts_only_for_the_entry_that_it_names() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut store = open(dir.path());
    store.blocking_append((0..4).map(|index| normal(index, 10))).await.expect("append");
    let mine = normal(2, 10).log_id;
    for (noted, found) in
        [(Some(mine), Some(mine)), (Some(log_id(3, 7, 2)), None), (Some(log_id(3, 7, 9)), None), (None, None)]
    {
        store.save_committed(noted).await.expect("noted");
        assert_eq!(store.read_committed().await.expect("read"), found, "{noted:?}");
    }
}
