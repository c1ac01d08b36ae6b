//! The adapter between the engine and openraft: ids, votes and entries in its types, callbacks in its form. No logic of
//! its own, but for what a batch of entries may weigh.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use bytes::Bytes;
use futures::Stream;
use futures::stream;
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};
use tokio::sync::oneshot;

use super::{Done, EntryId, Log, LogError, LogReader, Record};
use crate::raft::types::{Entry, EntryPayload, LeaderId, LogId, Payload, TypeConfig, Vote};
use crate::runtime::blocking;

/// Bytes of entries in one append to a follower, and in one step of apply: well below a message's limit, enough to fill
/// a link.
const BATCH_BYTES: usize = 1 << 20;

/// What lies in a record's data; its tag.
const BLANK: u8 = 0;
const NORMAL: u8 = 1;
const MEMBERSHIP: u8 = 2;

/// openraft's log store. Clones share one log.
#[derive(Clone)]
pub struct LogStore {
    log: Arc<Log>,
}

impl LogStore {
    pub fn new(log: Arc<Log>) -> LogStore {
        LogStore { log }
    }
}

/// openraft's handle for reading; each replication and the apply loop has one.
#[derive(Clone)]
pub struct EntryReader {
    log: LogReader,
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = EntryReader;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let state = self.log.reader().state();
        Ok(LogState { last_purged_log_id: state.purged.map(to_log_id), last_log_id: state.last.map(to_log_id) })
    }

    async fn get_log_reader(&mut self) -> EntryReader {
        EntryReader { log: self.log.reader() }
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let vote = super::Vote { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed };
        let (done, durable) = oneshot::channel();
        self.log.save_vote(vote, Box::new(move |result| drop(done.send(result))))?;
        durable.await.map_err(|_| LogError::Stopped("its IO thread ended".into()))??;
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        Ok(self.log.save_committed(committed.map(to_id))?)
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        let reader = self.log.reader();
        let (state, committed) = (reader.state(), reader.committed());
        // The note is not written together with what it speaks of. After a crash the log may end before it, or hold entries there that it
        // should have lost: openraft would apply them as committed. What was purged is committed for sure.
        let is_here = committed.map(|id| reader.id_at(id.index)).transpose()?.flatten() == committed;
        Ok(if is_here { committed } else { state.purged }.map(to_log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let records = entries.into_iter().map(to_record).collect::<Result<_, _>>()?;
        Ok(self.log.append(records, Box::new(move |result| callback.io_completed(result.map_err(io::Error::from))))?)
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        Ok(self.log.truncate_after(last_log_id.map(to_id), unawaited())?)
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        Ok(self.log.purge(to_id(log_id), unawaited())?)
    }
}

impl RaftLogReader<TypeConfig> for EntryReader {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.read(half_open(range), usize::MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.log.vote().map(|vote| Vote {
            leader_id: LeaderId { term: vote.term, node_id: vote.node },
            committed: vote.committed,
        }))
    }

    /// For a follower. Nothing where the beginning was purged meanwhile: openraft would send the rest as if it came right after what
    /// the follower has, and leave a gap in its log. The network ends such a stream.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        let entries = self.read(start..end, BATCH_BYTES).await?;
        let is_gap = entries.first().is_some_and(|first| first.log_id.index > start);
        Ok(if is_gap { Vec::new() } else { entries })
    }

    /// In steps, so that applying a long log after a restart does not hold all of it in memory.
    async fn entries_stream<RB>(&mut self, range: RB) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let steps = stream::try_unfold((self.clone(), half_open(range)), |(mut reader, range)| async move {
            let entries = reader.read(range.clone(), BATCH_BYTES).await?;
            let Some(last) = entries.last() else { return Ok(None) };
            let rest = last.log_id.index + 1..range.end;
            let entries = stream::iter(entries.into_iter().map(Ok::<_, io::Error>));
            Ok::<_, io::Error>(Some((entries, (reader, rest))))
        });
        Box::pin(futures::TryStreamExt::try_flatten(steps))
    }
}

impl EntryReader {
    async fn read(&mut self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Entry>, io::Error> {
        let pending = self.log.begin_read(range, max_bytes)?;
        let records = match pending.blocks() {
            false => pending.finish()?,
            true => blocking(move || pending.finish()).await.map_err(io::Error::other)??,
        };
        records.into_iter().map(to_entry).collect()
    }
}

/// A truncation or a purge is in order by its place in the queue; nobody waits for it. A failure stops the log, which
/// the next call tells.
fn unawaited() -> Done {
    Box::new(|_| {})
}

fn half_open(range: impl RangeBounds<u64>) -> Range<u64> {
    let start = match range.start_bound() {
        Bound::Included(at) => *at,
        Bound::Excluded(at) => at + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(at) => at + 1,
        Bound::Excluded(at) => *at,
        Bound::Unbounded => u64::MAX,
    };
    start..end
}

pub fn to_id(id: LogId) -> EntryId {
    EntryId { index: id.index, term: id.leader_id.term, node: id.leader_id.node_id }
}

fn to_log_id(id: EntryId) -> LogId {
    LogId { leader_id: LeaderId { term: id.term, node_id: id.node }, index: id.index }
}

fn to_record(entry: Entry) -> Result<Record, io::Error> {
    let (tag, data) = match entry.payload {
        EntryPayload::Blank => (BLANK, Bytes::new()),
        EntryPayload::Normal(Payload(data)) => (NORMAL, data),
        EntryPayload::Membership(membership) => (MEMBERSHIP, serde_json::to_vec(&membership)?.into()),
    };
    Ok(Record { id: to_id(entry.log_id), tag, data })
}

fn to_entry(record: Record) -> Result<Entry, io::Error> {
    let payload = match record.tag {
        BLANK => EntryPayload::Blank,
        NORMAL => EntryPayload::Normal(Payload(record.data)),
        MEMBERSHIP => EntryPayload::Membership(serde_json::from_slice(&record.data)?),
        tag => {
            let what = format!("entry {} has kind {tag}, which this program does not know", record.id.index);
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
    };
    Ok(Entry { log_id: to_log_id(record.id), payload })
}
