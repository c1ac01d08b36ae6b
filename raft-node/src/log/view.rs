//! What readers see: the log as it will be once everything queued is on disk. Owns the RAM copy of the log's end and
//! the places of all entries in the segments; leaves the disk to the writer and the order of calls to the engine.
//!
//! Places are dense, 8 bytes an entry (8 MB for a million): a sparse index would save little and need a scan for each
//! read.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use super::segment::SegmentFile;
use super::{EntryId, LogError, LogState, Record, Vote};

/// Where a frame lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub segment: u32,
    pub offset: u32,
}

/// RAM that a record of the tail takes beside its data.
const RECORD_OVERHEAD: usize = 64;

/// What [`View::lookup`] found. The segments are held open, so a purge meanwhile does no harm.
#[derive(Default)]
pub(super) struct Lookup {
    pub on_disk: Vec<(u64, Arc<SegmentFile>, u64)>,
    pub in_ram: Vec<Record>,
}

/// Counts down the bytes that a reader wants; the first record always fits.
pub(super) struct Room(pub usize);

impl Room {
    pub(super) fn is_left(&self) -> bool {
        self.0 > 0
    }

    /// Takes a record of `data` bytes; false if there was no room left.
    pub(super) fn take(&mut self, data: usize) -> bool {
        let fits = self.is_left();
        self.0 = self.0.saturating_sub(data + RECORD_OVERHEAD);
        fits
    }
}

#[derive(Debug, Default)]
pub(super) struct View {
    purged: Option<EntryId>,
    last: Option<EntryId>,
    /// Indices of the live entries.
    live: Range<u64>,
    /// The newest live entries, in order, up to the last one.
    tail: VecDeque<Record>,
    tail_bytes: usize,
    tail_limit: usize,
    /// Places of the entries from `places_first` on. Follows the disk, so it may lag behind `live`.
    places: VecDeque<Place>,
    places_first: u64,
    /// End of the entries known to be on disk: all live ones below it are durable.
    durable_end: u64,
    /// Grows with each truncation: what the disk settled before it says nothing of the entries appended after it.
    generation: u64,
    pub segments: BTreeMap<u32, Arc<SegmentFile>>,
    pub vote: Option<Vote>,
    pub committed: Option<EntryId>,
}

impl View {
    pub(super) fn new(tail_limit: usize) -> View {
        View { tail_limit, ..View::default() }
    }

    /// The log as a segment's base frame tells it: entries exist, but their places are not known (they lie in older
    /// segments).
    pub(super) fn begin(&mut self, purged: Option<EntryId>, first: u64, last: Option<EntryId>) {
        let end = if last == purged { first } else { last.map_or(first, |id| id.index + 1) };
        self.purged = purged;
        self.last = last;
        self.live = first..end;
        self.places_first = end;
    }

    pub(super) fn state(&self) -> LogState {
        LogState { purged: self.purged, last: self.last }
    }

    pub(super) fn live(&self) -> Range<u64> {
        self.live.clone()
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// The last index known to be durable; `None` before the first.
    pub(super) fn durable_index(&self) -> Option<u64> {
        self.durable_end.checked_sub(1)
    }

    /// Whether `records` follow on the log without a hole. A log that never had an entry may begin anywhere.
    pub(super) fn check(&self, records: &[Record]) -> Result<(), LogError> {
        let start = match (self.last, records.first()) {
            (None, Some(first)) => first.id.index,
            _ => self.live.end,
        };
        for (expected, record) in (start..).zip(records) {
            let (index, bytes) = (record.id.index, record.data.len());
            if index != expected {
                return Err(LogError::Hole { expected, got: index });
            }
            if bytes > super::MAX_DATA {
                return Err(LogError::TooLarge { index, bytes, limit: super::MAX_DATA });
            }
        }
        Ok(())
    }

    /// Adds a record that [`View::check`] accepted.
    pub(super) fn push(&mut self, record: Record) {
        if self.last.is_none() {
            self.live = record.id.index..record.id.index;
        }
        self.live.end = record.id.index + 1;
        self.last = Some(record.id);
        self.tail_bytes += record.data.len() + RECORD_OVERHEAD;
        self.tail.push_back(record);
    }

    /// Drops the entries after `after`. Returns the log's new end if that changed it.
    pub(super) fn truncate(&mut self, after: Option<EntryId>) -> Result<Option<u64>, LogError> {
        let end = after.map_or(self.purged.map_or(self.live.start, |id| id.index + 1), |id| id.index + 1);
        if end >= self.live.end {
            return Ok(None);
        }
        if end < self.live.start {
            return Err(LogError::Purged { index: end, first: self.live.start });
        }
        while self.tail.back().is_some_and(|record| record.id.index >= end) {
            let record = self.tail.pop_back().expect("looked at just now");
            self.tail_bytes -= record.data.len() + RECORD_OVERHEAD;
        }
        self.live.end = end;
        self.last = if self.live.is_empty() { self.purged } else { after };
        self.durable_end = self.durable_end.min(end);
        self.generation += 1;
        Ok(Some(end))
    }

    /// Drops the entries up to `upto`, which may lie behind the last one. Returns false if they were purged before.
    pub(super) fn purge(&mut self, upto: EntryId) -> bool {
        let start = upto.index + 1;
        if self.purged.is_some_and(|id| id.index >= upto.index) {
            return false;
        }
        self.purged = Some(upto);
        self.live.start = start;
        if start >= self.live.end {
            self.live.end = start;
            self.last = Some(upto);
        }
        while self.tail.front().is_some_and(|record| record.id.index < start) {
            self.drop_front();
        }
        let unneeded = start.saturating_sub(self.places_first).min(self.places.len() as u64);
        self.places.drain(..unneeded as usize);
        self.places_first += unneeded;
        true
    }

    /// The writer put entry `index` to `place`.
    pub(super) fn place(&mut self, index: u64, place: Place) {
        if index < self.live.start {
            return;
        }
        if self.places.is_empty() {
            self.places_first = index;
        }
        debug_assert_eq!(index, self.places_first + self.places.len() as u64);
        self.places.push_back(place);
    }

    /// The writer wrote a truncation to `end`.
    pub(super) fn displace(&mut self, end: u64) {
        self.places.truncate(end.saturating_sub(self.places_first) as usize);
    }

    /// Everything before `end` is durable, as the disk's history of `generation` has it.
    pub(super) fn settle(&mut self, end: u64, generation: u64) {
        if generation == self.generation {
            self.durable_end = self.durable_end.max(end);
        }
        self.shrink();
    }

    /// Keeps the tail within its bound. Only durable entries go: the others cannot be read from a segment yet.
    pub(super) fn shrink(&mut self) {
        while self.tail_bytes > self.tail_limit
            && self.tail.front().is_some_and(|record| record.id.index < self.durable_end)
        {
            self.drop_front();
        }
    }

    fn drop_front(&mut self) {
        if let Some(record) = self.tail.pop_front() {
            self.tail_bytes -= record.data.len() + RECORD_OVERHEAD;
        }
    }

    /// The live entries of `range`, about `max_bytes` of them and at least one: first those that lie on disk only, then
    /// those in RAM.
    pub(super) fn lookup(&self, range: Range<u64>, max_bytes: usize) -> Result<Lookup, LogError> {
        let range = range.start.max(self.live.start)..range.end.min(self.live.end);
        let tail_first = self.live.end - self.tail.len() as u64;
        let mut found = Lookup::default();
        let mut room = Room(max_bytes);
        for index in range.start..range.end.min(tail_first) {
            if !room.take(0) {
                break;
            }
            let at = index.checked_sub(self.places_first).and_then(|at| self.places.get(at as usize));
            let place = *at.ok_or(LogError::Hole { expected: index, got: self.places_first })?;
            found.on_disk.push((index, self.segments[&place.segment].clone(), u64::from(place.offset)));
        }
        for index in range.start.max(tail_first)..range.end {
            let record = &self.tail[(index - tail_first) as usize];
            if !room.take(record.data.len()) {
                break;
            }
            found.in_ram.push(record.clone());
        }
        Ok(found)
    }

    /// Whether each live entry has a place; else the index of the first without.
    pub(super) fn missing_place(&self) -> Option<u64> {
        let covered = self.places_first + self.places.len() as u64;
        if self.live.is_empty() || (self.places_first <= self.live.start && covered >= self.live.end) {
            return None;
        }
        Some(if self.places_first > self.live.start { self.live.start } else { covered })
    }
}
