//! The log's two faces: [`Log`] for the one who writes, [`LogReader`] for those who read. Owns the hand-over to the IO
//! thread; a change is visible to readers when the call returns, durable when its callback comes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;

use tokio::sync::watch;

use super::segment::EntryCursor;
use super::view::{Room, View};
use super::writer::{self, Writer};
use super::{Done, EntryId, LogError, LogState, Options, Record, Vote, recovery};

/// What the IO thread is asked to do, in this order.
///
/// The queue has no bound of its own: what waits in it is what the door and openraft's pipelines let in flight.
pub(super) enum Request {
    Append { records: Vec<Record>, generation: u64, done: Done },
    Truncate { after: Option<EntryId>, end: u64, generation: u64, done: Done },
    Purge { upto: EntryId, done: Done },
    SaveVote { vote: Vote, done: Done },
}

impl Request {
    pub(super) fn bytes(&self) -> usize {
        match self {
            Request::Append { records, .. } => records.iter().map(|record| record.data.len()).sum(),
            _ => 0,
        }
    }

    pub(super) fn refuse(self, cause: &Arc<str>) {
        match self {
            Request::Append { done, .. }
            | Request::Truncate { done, .. }
            | Request::Purge { done, .. }
            | Request::SaveVote { done, .. } => done(Err(LogError::Stopped(cause.clone()))),
        }
    }
}

/// What the handles and the IO thread share.
pub(super) struct Shared {
    view: Mutex<View>,
    stopped: OnceLock<Arc<str>>,
    pub give_up_waiting: AtomicBool,
    durable: watch::Sender<Option<u64>>,
    full: watch::Sender<bool>,
    #[cfg(any(test, feature = "simulated"))]
    pub fail_next_sync: AtomicBool,
}

impl Shared {
    fn new() -> Shared {
        Shared {
            view: Mutex::default(),
            stopped: OnceLock::new(),
            give_up_waiting: AtomicBool::new(false),
            durable: watch::Sender::new(None),
            full: watch::Sender::new(false),
            #[cfg(any(test, feature = "simulated"))]
            fail_next_sync: AtomicBool::new(false),
        }
    }

    pub(super) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().expect("no one panics while holding the view")
    }

    pub(super) fn begin(&self, view: View) {
        self.durable.send_replace(view.durable_index());
        *self.view() = view;
    }

    pub(super) fn settle(&self, end: u64, generation: u64) {
        let mut view = self.view();
        view.settle(end, generation);
        self.publish_durable(&view);
    }

    fn publish_durable(&self, view: &View) {
        let durable = view.durable_index();
        self.durable.send_if_modified(|known| std::mem::replace(known, durable) != durable);
    }

    pub(super) fn disk_full(&self, full: bool) {
        self.full.send_if_modified(|known| std::mem::replace(known, full) != full);
    }

    /// Stops the log for good. Returns the first reason.
    pub(super) fn stop(&self, error: &LogError) -> Arc<str> {
        let cause = self.stopped.get_or_init(|| {
            tracing::error!(%error, "the log stops");
            error.to_string().into()
        });
        cause.clone()
    }

    #[cfg(feature = "simulated")]
    pub(super) fn runs(&self) -> bool {
        self.stopped.get().is_none()
    }

    fn check_running(&self) -> Result<(), LogError> {
        self.stopped.get().map_or(Ok(()), |cause| Err(LogError::Stopped(cause.clone())))
    }

    pub(super) fn sync_data(&self, file: &File) -> io::Result<()> {
        #[cfg(any(test, feature = "simulated"))]
        if self.fail_next_sync.swap(false, Ordering::AcqRel) {
            return Err(io::Error::from_raw_os_error(5));
        }
        writer::sync_data(file)
    }
}

/// The writer's handle. Dropping it finishes what is queued and closes the log.
pub struct Log {
    shared: Arc<Shared>,
    /// `None` only while the log is dropped.
    queue: Option<Sender<Request>>,
    /// Held from a change of the view until its request is in the queue, so that both have one order. Not the view's own lock, on
    /// which the IO thread would wait as soon as the request woke it.
    turn: Mutex<()>,
    io_thread: Option<JoinHandle<()>>,
}

impl Log {
    /// Opens the log in `dir`, makes it if there is none. Blocks: reads all segments, syncs. Refuses what is damaged,
    /// see [`LogError`]; a lost end that nobody was told of is cut off.
    pub fn open(dir: &Path, options: Options) -> Result<Log, LogError> {
        let recovered = recovery::open(dir, &options)?;
        let shared = Arc::new(Shared::new());
        let (queue, requests) = channel();
        let writer = Writer::new(dir.to_owned(), options, shared.clone(), requests, recovered);
        #[cfg(feature = "simulated")]
        let io_thread = {
            crate::simulated::disk::mount(dir, ByHand { writer, shared: shared.clone() });
            None
        };
        #[cfg(not(feature = "simulated"))]
        let io_thread = Some(
            std::thread::Builder::new()
                .name("ares-log".to_owned())
                .spawn(move || writer.run())
                .map_err(LogError::io("start the IO thread for", dir))?,
        );
        Ok(Log { shared, queue: Some(queue), turn: Mutex::default(), io_thread })
    }

    pub fn reader(&self) -> LogReader {
        LogReader { shared: self.shared.clone() }
    }

    /// Adds entries, which must follow on the last one. They can be read when this returns; they are durable when
    /// `done` is called. If this fails, `done` is not called and nothing was added.
    pub fn append(&self, records: Vec<Record>, done: Done) -> Result<(), LogError> {
        self.shared.check_running()?;
        let _turn = self.turn();
        let mut view = self.shared.view();
        view.check(&records)?;
        for record in &records {
            view.push(record.clone());
        }
        view.shrink();
        let generation = view.generation();
        drop(view);
        self.send(Request::Append { records, generation, done })
    }

    /// Removes the entries after `after`; all of them for `None`.
    pub fn truncate_after(&self, after: Option<EntryId>, done: Done) -> Result<(), LogError> {
        self.shared.check_running()?;
        let _turn = self.turn();
        let mut view = self.shared.view();
        let Some(end) = view.truncate(after)? else {
            done(Ok(()));
            return Ok(());
        };
        self.shared.publish_durable(&view);
        let generation = view.generation();
        drop(view);
        self.send(Request::Truncate { after, end, generation, done })
    }

    /// Removes the entries up to `upto`, which may lie behind the last one: then the log goes on after it.
    pub fn purge(&self, upto: EntryId, done: Done) -> Result<(), LogError> {
        self.shared.check_running()?;
        let _turn = self.turn();
        if !self.shared.view().purge(upto) {
            done(Ok(()));
            return Ok(());
        }
        self.send(Request::Purge { upto, done })
    }

    /// Replaces the vote. Readers see it when it is durable.
    pub fn save_vote(&self, vote: Vote, done: Done) -> Result<(), LogError> {
        self.shared.check_running()?;
        self.send(Request::SaveVote { vote, done })
    }

    /// Notes the commit point. Written with the next batch or in the next pause, never synced and waking nobody for its own sake: after a
    /// stop an older one may be found.
    pub fn save_committed(&self, committed: Option<EntryId>) -> Result<(), LogError> {
        self.shared.check_running()?;
        self.shared.view().committed = committed;
        Ok(())
    }

    /// The last index that is durable here. A cut of the image may be persisted only up to it.
    pub fn durable_index(&self) -> watch::Receiver<Option<u64>> {
        self.shared.durable.subscribe()
    }

    /// Whether the disk is full. Then appends wait, unacknowledged, and go on by themselves when there is space; a
    /// leader should hand over and refuse new writes.
    pub fn disk_full(&self) -> watch::Receiver<bool> {
        self.shared.full.subscribe()
    }

    /// Lets requests that wait for space on a full disk fail, which stops the log: for a replica that must end now.
    pub fn give_up_waiting(&self) {
        self.shared.give_up_waiting.store(true, Ordering::Release);
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().expect("no one panics while a request is made")
    }

    fn send(&self, request: Request) -> Result<(), LogError> {
        let queue = self.queue.as_ref().expect("the queue is open while the log is");
        queue.send(request).map_err(|_| LogError::Stopped("its IO thread ended".into()))
    }

    #[cfg(test)]
    pub(super) fn fail_next_sync(&self) {
        self.shared.fail_next_sync.store(true, Ordering::Release);
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.give_up_waiting();
        self.queue = None;
        if let Some(io_thread) = self.io_thread.take()
            && io_thread.join().is_err()
        {
            tracing::error!("the log's IO thread panicked");
        }
    }
}

/// The IO thread's work, for a simulated disk to do when it has come so far.
#[cfg(feature = "simulated")]
pub(crate) struct ByHand {
    writer: Writer,
    shared: Arc<Shared>,
}

#[cfg(feature = "simulated")]
impl ByHand {
    /// Makes durable what waits, and answers it; false if nothing does. After an error the log has stopped.
    pub(crate) fn step(&mut self) -> Result<bool, LogError> {
        self.writer.step()
    }

    /// The next sync fails, and what it should have made durable is at the mercy of the next power cut.
    pub(crate) fn fail_next_sync(&self) {
        self.shared.fail_next_sync.store(true, Ordering::Release);
    }

    /// Says that the disk is full, or that it is not any more.
    pub(crate) fn say_full(&self, full: bool) {
        self.shared.disk_full(full);
    }

    /// The power fails: of what was written but not synced, each sector is on disk only where `kept` says so. How many bytes were lost.
    pub(crate) fn cut_power(self, kept: impl FnMut() -> bool) -> Result<u64, LogError> {
        self.writer.cut_power(kept)
    }
}

/// A reader's handle; cheap to clone, outlives the log.
#[derive(Clone)]
pub struct LogReader {
    shared: Arc<Shared>,
}

impl LogReader {
    pub fn state(&self) -> LogState {
        self.shared.view().state()
    }

    pub fn vote(&self) -> Option<Vote> {
        self.shared.view().vote
    }

    pub fn committed(&self) -> Option<EntryId> {
        self.shared.view().committed
    }

    /// The id of the entry at `index`, if that is live or the last purged one. Blocks as [`LogReader::read`] does.
    pub fn id_at(&self, index: u64) -> Result<Option<EntryId>, LogError> {
        match self.state().purged.filter(|purged| purged.index == index) {
            Some(purged) => Ok(Some(purged)),
            None => Ok(self.read(index..index + 1, 1)?.first().map(|record| record.id)),
        }
    }

    /// The live entries of `range`, in order, from its first live index on: about `max_bytes` of them, at least one if
    /// there is any. Blocks on the disk for entries that are not in RAM any more.
    pub fn read(&self, range: Range<u64>, max_bytes: usize) -> Result<Vec<Record>, LogError> {
        self.begin_read(range, max_bytes)?.finish()
    }

    /// The part of [`LogReader::read`] that does not block. The entries are those of this moment, whatever happens
    /// before the rest.
    pub fn begin_read(&self, range: Range<u64>, max_bytes: usize) -> Result<PendingRead, LogError> {
        Ok(PendingRead { found: self.shared.view().lookup(range, max_bytes)?, max_bytes })
    }
}

/// A read whose entries were found, but maybe not yet read from disk.
pub struct PendingRead {
    found: super::view::Lookup,
    max_bytes: usize,
}

impl PendingRead {
    /// Whether [`PendingRead::finish`] reads from disk.
    pub fn blocks(&self) -> bool {
        !self.found.on_disk.is_empty()
    }

    pub fn finish(self) -> Result<Vec<Record>, LogError> {
        if !self.blocks() {
            return Ok(self.found.in_ram);
        }
        let mut room = Room(self.max_bytes);
        let mut records = Vec::with_capacity(self.found.on_disk.len() + self.found.in_ram.len());
        let mut cursor = EntryCursor::default();
        for (index, segment, offset) in &self.found.on_disk {
            if !room.is_left() {
                return Ok(records);
            }
            let record = cursor.read(segment, *offset, *index)?;
            room.take(record.data.len());
            records.push(record);
        }
        records.extend(self.found.in_ram.into_iter().take_while(|record| room.take(record.data.len())));
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_failed_sync_stops_the_log_for_good() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = Log::open(dir.path(), Options::default()).expect("open");
        let (tell, told) = mpsc::channel();
        let append = |index| {
            let tell = tell.clone();
            let id = EntryId { index, term: 1, node: 1 };
            let record = Record { id, tag: 0, data: bytes::Bytes::from_static(b"entry") };
            log.append(vec![record], Box::new(move |result| tell.send(result).expect("the test waits")))
        };
        append(0).expect("append");
        told.recv().expect("an answer").expect("durable");

        log.fail_next_sync();
        append(1).expect("append");
        let error = told.recv().expect("an answer").expect_err("the sync failed").to_string();
        assert!(error.contains("cannot sync") && error.contains("000000000001.log"), "{error}");

        let error = append(2).expect_err("the log stopped");
        assert!(matches!(error, LogError::Stopped(_)), "{error}");
        let id = EntryId { index: 0, term: 1, node: 1 };
        assert!(log.purge(id, Box::new(|_| {})).is_err());
        assert!(log.truncate_after(None, Box::new(|_| {})).is_err());
        assert!(log.save_vote(Vote::default(), Box::new(|_| {})).is_err());
        assert!(log.save_committed(None).is_err());
        assert_eq!(*log.durable_index().borrow(), Some(0));
    }
}
