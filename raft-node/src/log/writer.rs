//! The IO thread: one queue, in order; takes what is there, writes it, syncs once, then answers. Owns the disk while
//! the log is open; leaves what readers see to the view.
//!
//! Order of syncs. Append: write, sync, answer. Vote: all before it is synced first. A new segment: sync the old one,
//! take the next (the spare file, or a new one), write its base frame, sync it, sync the directory, only then append. Purge: its frame is synced
//! before the first segment is removed.
//!
//! A full disk is waited out: nothing is acknowledged, nothing later overtakes. Any other error, a failed sync above
//! all (the kernel may have dropped the data and will not say so twice), stops the log for good.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use planted::{Bug, planted};

use super::engine::{Request, Shared};
use super::frame::{Base, Frame, Kind};
use super::recovery::Recovered;
use super::reserve::Reserve;
use super::segment::{Segment, sync_dir};
use super::space::is_full;
use super::spare::Spare;
use super::view::Place;
use super::vote::VoteFiles;
use super::witness::{Known, Witness};
use super::{Done, EntryId, LogError, Options, Record, Vote};

/// Frames gathered before a write.
const BUFFER_BYTES: usize = 1 << 20;
/// Data taken from the queue before a sync, so that the first in it do not wait for ever.
const BATCH_BYTES: usize = 16 << 20;
/// Bytes a second that the log may grow by for a spare segment to be of use: beyond, the disk is busy with the data, and
/// zeros ahead would double it.
const SPARE_PACE: u64 = 32 << 20;
/// How often a full disk is tried again.
const RETRY: Duration = Duration::from_millis(200);

pub(super) struct Writer {
    dir: PathBuf,
    options: Options,
    shared: Arc<Shared>,
    queue: Receiver<Request>,
    votes: VoteFiles,
    witness: Witness,
    reserve: Reserve,
    next_reserve_try: Instant,
    spare: Spare,
    /// Closed segments, oldest first.
    closed: VecDeque<Segment>,
    current: Segment,
    current_since: Instant,
    /// Offset in the current segment below which everything is durable.
    synced: u64,
    /// Encoded frames that belong at the current segment's end.
    buffer: Vec<u8>,
    disk: Disk,
    /// The newest commit point, and the one in the newest frame that has one.
    committed: Option<EntryId>,
    committed_written: Option<EntryId>,
    /// To be answered after the next sync.
    waiting: Vec<Done>,
    purged_since_sync: bool,
    #[cfg(feature = "simulated")]
    at_risk: super::cut::AtRisk,
    _lock: File,
}

enum Wait {
    Request(Request),
    Pause,
    End,
}

/// The log as the frames encoded so far tell it.
struct Disk {
    purged: Option<EntryId>,
    first: u64,
    end: u64,
    last: Option<EntryId>,
    /// The view's generation that it belongs to.
    generation: u64,
}

impl Writer {
    /// Takes over what recovery left.
    pub(super) fn new(
        dir: PathBuf,
        options: Options,
        shared: Arc<Shared>,
        queue: Receiver<Request>,
        recovered: Recovered,
    ) -> Writer {
        let Recovered { view, mut segments, votes, lock } = recovered;
        let current = segments.pop_back().expect("recovery leaves a segment");
        let state = view.state();
        let disk = Disk {
            purged: state.purged,
            first: view.live().start,
            end: view.live().end,
            last: state.last,
            generation: view.generation(),
        };
        let committed = view.committed;
        let reserve = Reserve::new(&dir, options.reserve_bytes);
        let spare = Spare::new(&dir, options.segment_bytes);
        shared.begin(view);
        let witness = Witness::open(&dir);
        let recovered_len = current.len;
        let mut writer = Writer {
            synced: recovered_len,
            closed: segments,
            current,
            current_since: Instant::now(),
            votes,
            witness,
            reserve,
            next_reserve_try: Instant::now(),
            spare,
            buffer: Vec::new(),
            disk,
            committed,
            committed_written: committed,
            waiting: Vec::new(),
            purged_since_sync: false,
            #[cfg(feature = "simulated")]
            at_risk: super::cut::AtRisk::behind(recovered_len),
            _lock: lock,
            dir,
            options,
            shared,
            queue,
        };
        writer.note_durable();
        writer.take_reserve(Reserve::take);
        writer
    }

    /// Runs until the log's last handle is gone.
    pub(super) fn run(mut self) {
        let mut outcome = Ok(());
        while outcome.is_ok() {
            outcome = match self.wait() {
                Wait::Request(first) => {
                    let batch = self.take_what_is_there(first);
                    self.serve(batch)
                }
                Wait::Pause => self.use_pause(),
                Wait::End => return self.finish(),
            };
        }
        if let Err(error) = outcome {
            self.refuse_all(error);
        }
    }

    fn wait(&mut self) -> Wait {
        self.learn_commit_point();
        let received = match self.patience() {
            Some(patience) => self.queue.recv_timeout(patience),
            None => self.queue.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(request) => Wait::Request(request),
            Err(RecvTimeoutError::Timeout) => Wait::Pause,
            Err(RecvTimeoutError::Disconnected) => Wait::End,
        }
    }

    /// How long to wait before the pause is of use; `None` if it is of none.
    fn patience(&self) -> Option<Duration> {
        if self.mark_is_due() {
            return Some(self.options.mark_after);
        }
        (!self.reserve.held()).then_some(RETRY)
    }

    fn take_what_is_there(&self, first: Request) -> Vec<Request> {
        let mut bytes = first.bytes();
        let mut batch = vec![first];
        while bytes < BATCH_BYTES
            && let Ok(request) = self.queue.try_recv()
        {
            bytes += request.bytes();
            batch.push(request);
        }
        batch
    }

    fn use_pause(&mut self) -> Result<(), LogError> {
        self.renew_reserve();
        self.learn_commit_point();
        if self.mark_is_due() {
            self.encode_mark();
            // Not synced: if it is lost, only the protection of the newest batch is.
            self.write()?;
        }
        Ok(())
    }

    /// A commit point among entries that are still in the queue has to wait for them.
    fn learn_commit_point(&mut self) {
        let known = self.shared.view().committed;
        if known.is_none_or(|id| id.index < self.disk.end) {
            self.committed = known;
        }
    }

    /// Whether the newest frame says less than what is known. Not worth writing on a full disk.
    fn mark_is_due(&self) -> bool {
        self.reserve.held() && (self.current.recorded < self.synced || self.committed != self.committed_written)
    }

    fn serve(&mut self, batch: Vec<Request>) -> Result<(), LogError> {
        let mut requests = batch.into_iter();
        while let Some(request) = requests.next() {
            if let Err(error) = self.take(request) {
                let cause = self.shared.stop(&error);
                for request in requests {
                    request.refuse(&cause);
                }
                return Err(error);
            }
        }
        self.settle()
    }

    fn take(&mut self, request: Request) -> Result<(), LogError> {
        match request {
            Request::Append { records, generation, done } => {
                self.waiting.push(done);
                self.disk.generation = generation;
                self.append(records)
            }
            Request::Truncate { after, end, generation, done } => {
                self.waiting.push(done);
                self.disk.generation = generation;
                self.truncate(after, end)
            }
            Request::Purge { upto, done } => {
                self.waiting.push(done);
                self.purge(upto)
            }
            Request::SaveVote { vote, done } => {
                let saved = self.settle().and_then(|()| self.save_vote(vote));
                answer(done, &saved);
                saved
            }
        }
    }

    fn append(&mut self, records: Vec<Record>) -> Result<(), LogError> {
        let mut places = Vec::with_capacity(records.len());
        for Record { id, tag, data } in &records {
            self.make_room()?;
            let offset = self.encode(Frame { synced: self.synced, kind: Kind::Entry, tag: *tag, id: *id, data });
            places.push((id.index, Place { segment: self.current.file.number, offset: offset as u32 }));
            self.current.max_index = self.current.max_index.max(Some(id.index));
            if self.disk.last.is_none() {
                self.disk.first = id.index;
            }
            (self.disk.last, self.disk.end) = (Some(*id), id.index + 1);
        }
        let mut view = self.shared.view();
        for (index, place) in places {
            view.place(index, place);
        }
        Ok(())
    }

    fn truncate(&mut self, after: Option<EntryId>, end: u64) -> Result<(), LogError> {
        self.make_room()?;
        self.encode(Frame::with_optional_id(Kind::Truncate, self.synced, after, &[]));
        self.disk.end = end;
        self.disk.last = if end == self.disk.first { self.disk.purged } else { after };
        self.shared.view().displace(end);
        Ok(())
    }

    fn purge(&mut self, upto: EntryId) -> Result<(), LogError> {
        self.make_room()?;
        self.encode(Frame::with_optional_id(Kind::Purge, self.synced, Some(upto), &[]));
        self.disk.purged = Some(upto);
        self.disk.first = upto.index + 1;
        if self.disk.first >= self.disk.end {
            (self.disk.last, self.disk.end) = (Some(upto), self.disk.first);
        }
        self.purged_since_sync = true;
        Ok(())
    }

    fn save_vote(&mut self, vote: Vote) -> Result<(), LogError> {
        if !planted(Bug::VoteNotKept) {
            self.votes.save(Some(vote), self.durable())?;
        }
        self.shared.view().vote = Some(vote);
        Ok(())
    }

    /// Puts a frame behind those gathered. Returns its offset.
    fn encode(&mut self, frame: Frame<'_>) -> u64 {
        let offset = self.current.len + self.buffer.len() as u64;
        frame.encode(self.current.file.number, offset, &mut self.buffer);
        self.current.recorded = frame.synced;
        offset
    }

    fn encode_mark(&mut self) {
        self.encode(Frame::with_optional_id(Kind::Mark, self.synced, self.committed, &[]));
        self.committed_written = self.committed;
    }

    /// Writes what was gathered if it is much; begins the next segment if this one is full.
    fn make_room(&mut self) -> Result<(), LogError> {
        if self.current.len + self.buffer.len() as u64 >= self.options.segment_bytes {
            return self.roll();
        }
        if self.buffer.len() >= BUFFER_BYTES { self.write() } else { Ok(()) }
    }

    /// One sync for all that was taken since the last, then all answers, then what a purge left to remove.
    fn settle(&mut self) -> Result<(), LogError> {
        if !self.buffer.is_empty() {
            self.learn_commit_point();
            if self.committed != self.committed_written {
                self.encode_mark();
            }
            self.write()?;
            self.sync()?;
        }
        self.shared.settle(self.disk.end, self.disk.generation);
        // Newest first: openraft keeps only the newest it was told of, so the older ones wake nobody.
        for done in self.waiting.drain(..).rev() {
            done(Ok(()));
        }
        if std::mem::take(&mut self.purged_since_sync) {
            self.remove_purged_segments()?;
        }
        self.renew_reserve();
        Ok(())
    }

    /// Writes the gathered frames; waits while the disk is full.
    fn write(&mut self) -> Result<(), LogError> {
        loop {
            match self.try_write() {
                Ok(()) => break,
                Err(error) if is_full(&error) => self.wait_for_space()?,
                Err(error) => return Err(LogError::io("write", &self.current.file.path)(error)),
            }
        }
        if self.spare_is_due() {
            self.spare.prepare();
        }
        Ok(())
    }

    /// Not at the segment's beginning, for a log that hardly grows need not take the space; not at its end, for it takes
    /// a moment to make.
    fn spare_is_due(&self) -> bool {
        if cfg!(feature = "simulated") {
            // It is made by a thread, whose pace is no seed's.
            return false;
        }
        let pace_allows = self.current_since.elapsed().as_secs_f64() * SPARE_PACE as f64;
        self.reserve.held()
            && self.current.len >= self.options.segment_bytes / 4
            && self.current.len as f64 <= pace_allows
    }

    /// Writes the gathered frames, or leaves the file as it was.
    fn try_write(&mut self) -> io::Result<()> {
        self.current.write(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    fn sync(&mut self) -> Result<(), LogError> {
        if self.synced < self.current.len {
            let synced = self.shared.sync_data(&self.current.file.file);
            #[cfg(feature = "simulated")]
            self.at_risk.synced(self.current.len, synced.is_ok());
            if !planted(Bug::FsyncErrorIgnored) {
                synced.map_err(LogError::io("sync", &self.current.file.path))?;
            }
            self.synced = self.current.len;
            self.note_durable();
        }
        Ok(())
    }

    fn note_durable(&self) {
        self.witness.note(self.durable());
    }

    fn durable(&self) -> Known {
        Known { segment: self.current.file.number, offset: self.synced }
    }

    fn roll(&mut self) -> Result<(), LogError> {
        self.write()?;
        self.sync()?;
        self.current.close().map_err(LogError::io("cut", &self.current.file.path))?;
        let next = self.create_next()?;
        self.shared.view().segments.insert(next.file.number, next.file.clone());
        self.synced = next.len;
        #[cfg(feature = "simulated")]
        {
            self.at_risk = super::cut::AtRisk::behind(next.len);
        }
        let full = std::mem::replace(&mut self.current, next);
        self.current_since = Instant::now();
        self.closed.push_back(full);
        self.note_durable();
        Ok(())
    }

    fn create_next(&mut self) -> Result<Segment, LogError> {
        let number = self.current.file.number + 1;
        let base = Base { first: self.disk.first, last: self.disk.last };
        loop {
            match Segment::create(&self.dir, number, self.disk.purged, base, self.spare.take()) {
                Ok(segment) => return Ok(segment),
                Err(error) if is_full(&error) => self.wait_for_space()?,
                Err(error) => return Err(LogError::io("create a segment in", &self.dir)(error)),
            }
        }
    }

    /// Oldest first, so that what is left is always a gapless run.
    fn remove_purged_segments(&mut self) -> Result<(), LogError> {
        let purged = self.disk.purged.map(|id| id.index);
        let mut removed = false;
        while let Some(oldest) = self.closed.pop_front_if(|oldest| oldest.max_index <= purged) {
            let path = &oldest.file.path;
            std::fs::remove_file(path).map_err(LogError::io("remove", path))?;
            self.shared.view().segments.remove(&oldest.file.number);
            removed = true;
        }
        if removed {
            sync_dir(&self.dir).map_err(LogError::io("sync", &self.dir))?;
        }
        Ok(())
    }

    /// Gives up what space it can the first time, then waits a while. Fails only if the log was told to stop waiting.
    fn wait_for_space(&mut self) -> Result<(), LogError> {
        self.shared.disk_full(true);
        if self.reserve.give_up() | self.spare.give_up() {
            tracing::warn!(path = %self.dir.display(), "the disk is full; the log's reserve is given up to finish its work");
            self.next_reserve_try = Instant::now() + RETRY;
            return Ok(());
        }
        if self.shared.give_up_waiting.load(Ordering::Acquire) {
            return Err(LogError::Full { path: self.current.file.path.clone() });
        }
        std::thread::sleep(RETRY);
        Ok(())
    }

    /// Now and then: takes the reserve again if there is space for it. Then the disk is not full any more.
    fn renew_reserve(&mut self) {
        if !self.reserve.held() && Instant::now() >= self.next_reserve_try {
            self.take_reserve(Reserve::take_again);
        }
    }

    fn take_reserve(&mut self, take: fn(&mut Reserve) -> io::Result<()>) {
        self.next_reserve_try = Instant::now() + RETRY;
        let taken = take(&mut self.reserve);
        if let Err(error) = &taken {
            tracing::debug!(%error, "there is no space for the log's reserve");
        }
        self.shared.disk_full(taken.is_err());
    }

    /// Notes at the end that everything is durable. Nobody waits for it, so a failure is only told.
    fn finish(&mut self) {
        self.learn_commit_point();
        if self.mark_is_due() {
            self.encode_mark();
        }
        let written = self.try_write().map_err(LogError::io("write", &self.current.file.path));
        if let Err(error) = written.and_then(|()| self.sync()) {
            tracing::warn!(%error, "the log's last mark was not written");
        }
    }

    /// The log has stopped: answers everything with the reason, until the last handle is gone.
    fn refuse_all(&mut self, error: LogError) {
        let cause = self.refuse_what_waits(&error);
        while let Ok(request) = self.queue.recv() {
            request.refuse(&cause);
        }
    }

    fn refuse_what_waits(&mut self, error: &LogError) -> Arc<str> {
        let cause = self.shared.stop(error);
        for done in self.waiting.drain(..) {
            done(Err(LogError::Stopped(cause.clone())));
        }
        cause
    }
}

#[cfg(feature = "simulated")]
impl Writer {
    /// One round of [`Writer::run`] that waits for nothing; false if there was nothing to do.
    pub(super) fn step(&mut self) -> Result<bool, LogError> {
        let Ok(first) = self.queue.try_recv() else {
            self.use_pause()?;
            return Ok(false);
        };
        let batch = self.take_what_is_there(first);
        let served = self.serve(batch);
        if let Err(error) = &served {
            let cause = self.refuse_what_waits(error);
            while let Ok(request) = self.queue.try_recv() {
                request.refuse(&cause);
            }
        }
        served.map(|()| true)
    }

    /// The power fails: what waits may be written as far as the next vote, nothing of it is synced, nobody is answered; then each sector
    /// that is at risk is as it was before unless `kept` says otherwise.
    pub(super) fn cut_power(mut self, mut kept: impl FnMut() -> bool) -> Result<u64, LogError> {
        while self.shared.runs() && kept() {
            match self.queue.try_recv() {
                Err(_) | Ok(Request::SaveVote { .. }) => break,
                Ok(request) => self.take(request)?,
            }
        }
        self.write()?;
        let Segment { file, len, .. } = &self.current;
        self.at_risk.cut(&file.file, *len, kept).map_err(LogError::io("cut", &file.path))
    }
}

fn answer(done: Done, result: &Result<(), LogError>) {
    match result {
        Ok(()) => done(Ok(())),
        Err(error) => done(Err(LogError::Stopped(error.to_string().into()))),
    }
}

/// The one way to a durable segment.
pub(super) fn sync_data(file: &File) -> io::Result<()> {
    // A simulated disk knows by itself what was synced.
    if cfg!(feature = "simulated") || planted(Bug::AckWithoutFsync) { Ok(()) } else { file.sync_data() }
}
