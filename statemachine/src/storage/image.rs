//! The image: what the state was at one log index, on disk, written behind by whole cuts. A cut is taken from the state
//! in O(1) by the thread that applies; encoding and writing happen on another. Pages are `pages`' matter, history rows
//! `history`'s, events `events`', sled `store`'s.
//!
//! Memory is the truth: the image is never read but at the start and for history. The caller's rule: a cut may be
//! written only when the local log is durable up to its index.

use std::path::Path;
use std::sync::{Arc, Mutex, RwLock};

use imbl::OrdMap;
use serde::{Deserialize, Serialize};

use super::codec::{self, CodecError, Tag};
use super::error::{At, StorageError};
use super::events::EventPages;
use super::pages::{Filler, PAGE, Pages, RowReader, Run};
use super::rows::{self, Rows};
use super::store::{Batch, Store};
use crate::id::JobId;
use crate::record::{HistoryRow, LogPosition, Meta};
use crate::state::State;

/// Above so many changed records the caller refuses new commands (IMAGE_BEHIND) until a cut was written: they and the
/// rows that they replaced stay in memory until then.
pub const BEHIND_RECORDS: usize = 262_144;
/// The same bound in bytes of entries applied since the last cut.
pub const BEHIND_BYTES: usize = 256 << 20;
/// A cut is worth its sync from so many changed records on ...
pub const CUT_RECORDS: usize = 65_536;
/// ... or from such an age of the oldest change on, in ms. The next cut waits for the last one to be written, so that
/// cuts grow with the load: what changes twice is written once.
pub const CUT_MS: u64 = 1_000;

/// A state to be written, with what changed in it since the cut before. Cloning is O(1).
#[derive(Clone)]
pub struct Cut {
    state: State,
}

/// What a written cut tells the state's owner.
#[derive(Clone, Debug)]
pub struct Persisted {
    pub applied: LogPosition,
    /// The state's digest at that position.
    pub digest: u128,
    /// Changed records.
    pub records: usize,
    /// Values and bytes handed to sled.
    pub values: usize,
    pub bytes: usize,
    archived: OrdMap<JobId, Arc<HistoryRow>>,
}

/// Stored under tag 0 in the same batch as the records: the position that the image is at.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    pub meta: Meta,
    /// The digest of all records, this meta among them.
    pub digest: u128,
}

impl State {
    /// Records changed since the last cut, archived rows among them.
    pub fn uncut(&self) -> usize {
        rows::all(self).iter().map(|(_, table)| table.uncut()).sum::<usize>() + self.archived.len()
    }

    /// Takes a cut: O(1). What changes from here on is the next cut's. Archived rows stay readable in this state until
    /// [`State::forget_archived`].
    pub fn cut(&mut self) -> Cut {
        let state = self.clone();
        for (_, table) in rows::all_mut(self) {
            table.forget_uncut();
        }
        Cut { state }
    }

    /// Takes back a cut that could not be written: what changed in it is the next one's too.
    pub fn take_back(&mut self, cut: &Cut) {
        for ((_, table), (_, unwritten)) in rows::all_mut(self).into_iter().zip(rows::all(&cut.state)) {
            table.change_again(unwritten);
        }
    }

    /// Drops the archived rows that a written cut holds; the image serves them from now on. Call it before the next
    /// cut. Neither the digest nor a command's answer depends on archived rows.
    pub fn forget_archived(&mut self, persisted: &Persisted) {
        for job in persisted.archived.keys() {
            self.archived.remove(job);
        }
    }
}

impl Cut {
    pub fn applied(&self) -> LogPosition {
        self.state.meta.applied
    }

    pub fn records(&self) -> usize {
        self.state.uncut()
    }
}

/// The image of one replica. One thread writes; any thread may read history.
pub struct Image {
    pub(super) store: Store,
    pub(super) written: Mutex<Written>,
    /// Held for reading by who needs all history of a state; for writing while buckets are deleted.
    pub(super) history: RwLock<()>,
}

#[derive(Default)]
pub(super) struct Written {
    /// By tag.
    pages: Vec<Pages>,
    events: EventPages,
    /// Rows that the last cut archived: a next one taken before they were forgotten doesn't store them twice.
    archived: OrdMap<JobId, Arc<HistoryRow>>,
    /// Buckets dropped from the state whose rows are still stored.
    dropped: Vec<u32>,
}

impl Image {
    /// Opens the image in `dir` (made if absent), without reading a state.
    pub(super) fn open(dir: &Path) -> Result<Self, StorageError> {
        let written = Written { pages: rows::TAGS.iter().map(|_| Pages::default()).collect(), ..Default::default() };
        let store = Store::open(dir)?;
        Ok(Self { store, written: Mutex::new(written), history: RwLock::new(()) })
    }

    pub fn dir(&self) -> &Path {
        self.store.dir()
    }

    /// Writes a cut and makes it durable: all of it or nothing. After an error the image must not be written again; if the
    /// disk was full ([`StorageError::is_full`]) the owner may give the cut back, and go on with `storage::reopen`.
    pub fn write(&self, cut: Cut) -> Result<Persisted, StorageError> {
        let mut state = cut.state;
        let mut written = self.written.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut batch = Batch::default();
        let records = state.uncut();

        for (number, (tag, table)) in rows::all(&state).into_iter().enumerate() {
            put_changed(&mut written.pages[number], tag, table, &mut batch).at(self.dir(), "encode a cut for")?;
        }
        let fresh = state.archived.iter().filter(|(job, _)| !written.archived.contains_key(*job)).map(|(_, row)| row);
        super::history::put(fresh, state.meta.applied.index, &mut batch);
        written.events.put(&state.events, &mut batch);
        let head = Head { digest: state.digest(), meta: state.meta.clone() };
        put_head(&head, &mut batch);

        let (values, bytes) = (batch.values, batch.bytes);
        self.store.apply(batch)?;
        self.store.persist()?;

        written.archived = state.archived.clone();
        written.dropped.extend(state.buckets.uncut.iter().filter(|bucket| !state.buckets.contains(bucket)));
        self.delete_dropped(&mut written)?;
        Ok(Persisted {
            applied: head.meta.applied,
            digest: head.digest,
            records,
            values,
            bytes,
            archived: state.archived,
        })
    }

    /// Fills an empty image with a whole state; its history rows were put before.
    pub(super) fn fill(&self, state: &mut State) -> Result<(), StorageError> {
        let mut written = self.written.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for (number, (tag, table)) in rows::all(state).into_iter().enumerate() {
            self.put_all(&mut written.pages[number], tag, table)?;
        }
        let mut batch = Batch::default();
        super::history::put(state.archived.values(), state.meta.applied.index, &mut batch);
        written.events.put(&state.events, &mut batch);
        self.store.apply(batch)?;
        // The head comes last: an image without one was never finished.
        self.store.persist()?;
        let mut batch = Batch::default();
        put_head(&Head { digest: state.digest(), meta: state.meta.clone() }, &mut batch);
        self.store.apply(batch)?;
        self.store.persist()
    }

    /// Writes all rows of a table, in batches of a few MiB.
    fn put_all(&self, pages: &mut Pages, tag: Tag, table: &dyn Rows) -> Result<(), StorageError> {
        const BATCH: usize = 8 << 20;
        let mut batch = Batch::default();
        let mut result = Ok(());
        let mut filler = Filler::default();
        let mut emit = |bound: Vec<u8>, page: &[u8]| {
            let chunks = batch.put(tag, &bound, page);
            pages.add(bound, chunks);
            if batch.bytes > BATCH && result.is_ok() {
                result = self.store.apply(std::mem::take(&mut batch));
            }
        };
        table
            .encode_range(tag, None, None, &mut |key, bytes| filler.push(key, bytes, &mut emit))
            .at(self.dir(), "encode the state for")?;
        filler.finish(&mut emit);
        result?;
        self.store.apply(batch)
    }

    /// The state that the image holds, verified; `None` when it was never finished. Indexes are rebuilt.
    pub(super) fn load(&self) -> Result<Option<State>, StorageError> {
        let Some(head) = self.head()? else { return Ok(None) };
        let mut written = self.written.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut state = State { meta: head.meta, ..State::default() };
        for (number, (tag, table)) in rows::all_mut(&mut state).into_iter().enumerate() {
            let pages = &mut written.pages[number];
            self.store.scan(tag, &[], &mut |bound, payload, chunks| {
                for row in RowReader(&payload) {
                    let (key, bytes) = row.map_err(|text| StorageError::damaged(self.dir(), "read a page of", text))?;
                    table.restore(tag, key, bytes).at(self.dir(), "read a record of")?;
                }
                pages.add(bound.to_vec(), chunks);
                Ok(true)
            })?;
        }
        let found = state.digest();
        if found != head.digest {
            let what = format!("the digest of its records is {found:032x}, should be {:032x}", head.digest);
            return Err(StorageError::damaged(self.dir(), "load", what));
        }
        state.restore_events(written.events.load(&self.store)?);
        self.delete_unknown_buckets(&state)?;
        Ok(Some(state))
    }

    /// Position and digest, without the records.
    pub(super) fn head(&self) -> Result<Option<Head>, StorageError> {
        let Some((payload, _)) = self.store.get(Tag::Meta, &[])? else { return Ok(None) };
        codec::decode_record(&payload).at(self.dir(), "read the head of").map(Some)
    }

    fn delete_dropped(&self, written: &mut Written) -> Result<(), StorageError> {
        // A snapshot being written still reads them: next time.
        let Ok(_alone) = self.history.try_write() else { return Ok(()) };
        for bucket in std::mem::take(&mut written.dropped) {
            self.store.remove_prefix(Tag::History, &bucket.to_be_bytes())?;
        }
        Ok(())
    }

    /// A crash may have come between the cut that dropped a bucket and the deletion of its rows.
    fn delete_unknown_buckets(&self, state: &State) -> Result<(), StorageError> {
        let mut from = 0u32;
        while let Some(key) = self.store.first_key_from(Tag::History, &from.to_be_bytes())? {
            let bucket = super::history::bucket_of(&key)
                .ok_or_else(|| StorageError::damaged(self.dir(), "read a history key of", format!("{key:02x?}")))?;
            if !state.buckets.contains(&bucket) {
                self.store.remove_prefix(Tag::History, &bucket.to_be_bytes())?;
            }
            match bucket.checked_add(1) {
                Some(next) => from = next,
                None => break,
            }
        }
        Ok(())
    }
}

/// Writes the pages that hold changed keys anew, and drops those left without a row.
fn put_changed(pages: &mut Pages, tag: Tag, table: &dyn Rows, batch: &mut Batch) -> Result<(), CodecError> {
    if table.uncut() == 0 {
        return Ok(());
    }
    for run in pages.runs(&table.uncut_keys()) {
        put_run(pages, run, tag, table, batch)?;
    }
    Ok(())
}

fn put_run(pages: &mut Pages, mut run: Run, tag: Tag, table: &dyn Rows, batch: &mut Batch) -> Result<(), CodecError> {
    let mut made: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut emit = |bound: Vec<u8>, page: &[u8]| made.push((bound, page.to_vec()));
    let mut filler = Filler::default();
    table.encode_range(tag, run.from.as_deref(), run.to.as_deref(), &mut |key, bytes| {
        filler.push(key, bytes, &mut emit);
    })?;
    let waiting = filler.waiting();
    if waiting > 0 && waiting < PAGE / 4 {
        // What little is left after removals joins the next page.
        if let Some(next) = run.to.take() {
            run.to = pages.after(&next);
            table.encode_range(tag, Some(&next), run.to.as_deref(), &mut |key, bytes| {
                filler.push(key, bytes, &mut emit);
            })?;
        }
    }
    filler.finish(&mut emit);

    for (bound, chunks) in pages.remove(&run) {
        batch.remove(tag, &bound, chunks);
    }
    for (bound, page) in made {
        let chunks = batch.put(tag, &bound, &page);
        pages.add(bound, chunks);
    }
    Ok(())
}

fn put_head(head: &Head, batch: &mut Batch) {
    let mut bytes = Vec::with_capacity(1_024);
    codec::canonical(head, &mut bytes);
    batch.put(Tag::Meta, &[], &bytes);
}
