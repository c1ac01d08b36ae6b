//! Finished jobs that left memory: where their rows stand in the image, and how they are read. Which jobs are archived,
//! and when a bucket is dropped, is apply's matter; how damaged rows come back is `mend`'s.
//!
//! A value holds the rows of up to 64 consecutive job ids that one cut archived: key = bucket u32, job id / 64 u64, log
//! index of the cut u64, big-endian. So a cut only adds values, a job is found through its bucket (`State::ended_job`
//! knows it) with one short scan, and a dropped bucket is one key range.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::codec::{self, StoredKey, Tag};
use super::error::{At, Cause, DamagedHistory, StorageError};
use super::image::Image;
use super::pages::{RowReader, put_row};
use super::store::Batch;
use crate::id::JobId;
use crate::record::HistoryRow;
use crate::state::State;

/// Job ids that share a value.
pub(super) const GROUP: u64 = 64;

/// Gets key and canonical bytes of a history row.
pub(super) type EachHistoryRow<'a> = &'a mut dyn FnMut(HistoryKey, &[u8]) -> Result<(), StorageError>;

/// Identity of a history row: its bucket, then its job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HistoryKey {
    pub bucket: u32,
    pub job: JobId,
}

impl StoredKey for HistoryKey {
    fn put(&self, out: &mut Vec<u8>) {
        self.bucket.put(out);
        self.job.put(out);
    }

    fn take(bytes: &[u8]) -> Option<Self> {
        let (bucket, job) = bytes.split_at_checked(4)?;
        Some(Self { bucket: u32::take(bucket)?, job: JobId::take(job)? })
    }
}

impl HistoryKey {
    pub fn of(row: &HistoryRow) -> Self {
        Self { bucket: row.bucket, job: row.id }
    }
}

/// What a row adds to `Bucket::sum` and `Bucket::bytes`.
pub fn weigh(row: &HistoryRow) -> (u128, u64) {
    let mut bytes = Vec::with_capacity(512);
    codec::canonical(row, &mut bytes);
    (codec::hash_row(Tag::History, &HistoryKey::of(row).bytes(), &bytes), bytes.len() as u64)
}

/// Adds archived rows to a batch.
pub(super) fn put<'a>(rows: impl Iterator<Item = &'a Arc<HistoryRow>>, index: u64, batch: &mut Batch) {
    let mut groups: BTreeMap<(u32, u64), Vec<u8>> = BTreeMap::new();
    let mut bytes = Vec::with_capacity(512);
    for row in rows {
        bytes.clear();
        codec::canonical(row.as_ref(), &mut bytes);
        put_row(groups.entry((row.bucket, row.id.0 / GROUP)).or_default(), &HistoryKey::of(row).bytes(), &bytes);
    }
    for ((bucket, group), payload) in groups {
        batch.put(Tag::History, &[group_key(bucket, group), index.to_be_bytes().to_vec()].concat(), &payload);
    }
}

/// What the image has of one group of job ids.
pub(super) struct Group {
    /// Job id / [`GROUP`].
    pub number: u64,
    /// Keys of its values, with the numbers of their chunks as far as they are known.
    pub values: Vec<(Vec<u8>, u16)>,
    pub rows: BTreeMap<HistoryKey, Vec<u8>>,
    /// A value that can't be read.
    pub damage: Option<StorageError>,
}

impl Group {
    fn new(number: u64) -> Self {
        Self { number, values: Vec::new(), rows: BTreeMap::new(), damage: None }
    }
}

pub(super) fn group_key(bucket: u32, group: u64) -> Vec<u8> {
    [&bucket.to_be_bytes()[..], &group.to_be_bytes()].concat()
}

/// The bucket in the key of a value.
pub(super) fn bucket_of(key: &[u8]) -> Option<u32> {
    u32::take(key.get(..4)?)
}

fn group_of(key: &[u8]) -> Option<u64> {
    u64::take(key.get(4..12)?)
}

impl Image {
    /// A job that left memory: from the rows that no cut holds yet, else from disk. `None` when it never left memory,
    /// or its bucket was dropped. `state` is this replica's current one.
    pub fn history(&self, state: &State, job: JobId) -> Result<Option<Arc<HistoryRow>>, StorageError> {
        if let Some(row) = state.archived.get(&job) {
            return Ok(Some(row.clone()));
        }
        let bucket = state.ended_job(job).map(|(_, bucket)| bucket).filter(|bucket| state.buckets.contains(bucket));
        let Some(bucket) = bucket else { return Ok(None) };
        let (mut found, mut damage) = (None, None);
        self.store.scan_past_damage(Tag::History, &group_key(bucket, job.0 / GROUP), &mut |key, read| {
            // The job may stand in another value of its group.
            match self.rows_under(key, read) {
                Ok(rows) => found = rows.into_iter().find(|row| row.id == job),
                Err(error) => damage = Some(error),
            }
            Ok(found.is_none())
        })?;
        match (found, damage) {
            (Some(row), _) => Ok(Some(Arc::new(row))),
            (None, Some(damage)) => Err(damage),
            (None, None) => Err(self.damaged_history(bucket, job.0..=job.0, "its row is missing")),
        }
    }

    /// Jobs that left memory, the latest hour first and within it the highest id first: up to `limit` below `before`
    /// (the key of the last row of the page before; `None` for the first page).
    pub fn history_list(
        &self,
        state: &State,
        before: Option<HistoryKey>,
        limit: usize,
    ) -> Result<Vec<Arc<HistoryRow>>, StorageError> {
        let before = before.unwrap_or(HistoryKey { bucket: u32::MAX, job: JobId(u64::MAX) });
        let mut rows: BTreeMap<HistoryKey, Arc<HistoryRow>> = BTreeMap::new();
        let fits = |row: &HistoryRow| HistoryKey::of(row) < before && state.buckets.contains(&row.bucket);
        rows.extend(state.archived.values().filter(|row| fits(row)).map(|row| (HistoryKey::of(row), row.clone())));

        let mut read = 0;
        let mut last_group = Vec::new();
        let below = group_key(before.bucket, (before.job.0 / GROUP).saturating_add(1));
        self.store.scan_down(Tag::History, &below, &mut |key, value| {
            let group = key.get(..12).unwrap_or_default();
            if read >= limit && group != last_group {
                return Ok(false);
            }
            last_group = group.to_vec();
            if !bucket_of(key).is_some_and(|bucket| state.buckets.contains(&bucket)) {
                // A dropped hour's values wait for their deletion: nobody looks at them.
                return Ok(true);
            }
            for row in self.rows_under(key, value)?.into_iter().filter(|row| fits(row)) {
                read += 1;
                rows.entry(HistoryKey::of(&row)).or_insert_with(|| Arc::new(row));
            }
            Ok(true)
        })?;
        Ok(rows.into_values().rev().take(limit).collect())
    }

    /// Calls `each` with the stored rows of a bucket, job ids ascending.
    pub(super) fn bucket_rows(&self, bucket: u32, each: EachHistoryRow) -> Result<(), StorageError> {
        self.groups(bucket, &mut |group| match group.damage {
            Some(damage) => Err(damage),
            None => group.rows.iter().try_for_each(|(key, bytes)| each(*key, bytes)),
        })
    }

    /// Calls `each` with what is stored of every group of a bucket, ascending.
    pub(super) fn groups(
        &self,
        bucket: u32,
        each: &mut dyn FnMut(Group) -> Result<(), StorageError>,
    ) -> Result<(), StorageError> {
        let mut group: Option<Group> = None;
        self.store.scan_past_damage(Tag::History, &bucket.to_be_bytes(), &mut |key, read| {
            let number = group_of(key).ok_or_else(|| self.malformed_key(key))?;
            if let Some(whole) = group.take_if(|group| group.number != number) {
                each(whole)?;
            }
            let group = group.get_or_insert_with(|| Group::new(number));
            group.values.push((key.to_vec(), read.as_ref().map_or(0, |(_, chunks)| *chunks)));
            match read.and_then(|(payload, _)| self.stored_rows(&payload)) {
                Ok(rows) => group.rows.extend(rows),
                Err(error) => group.damage = Some(self.damage_under(key, error)),
            }
            Ok(true)
        })?;
        group.map_or(Ok(()), each)
    }

    fn stored_rows(&self, payload: &[u8]) -> Result<Vec<(HistoryKey, Vec<u8>)>, StorageError> {
        let row = |row: Result<(&[u8], &[u8]), String>| {
            let (key, bytes) = row.map_err(|text| self.damaged_row(text))?;
            let key = HistoryKey::take(key).ok_or_else(|| self.damaged_row("a key is malformed"))?;
            Ok((key, bytes.to_vec()))
        };
        RowReader(payload).map(row).collect()
    }

    /// Stores rows given as (key, canonical bytes), all of one bucket and in the order of their ids; for a new image.
    pub(super) fn put_history(&self, rows: &[(HistoryKey, Vec<u8>)], index: u64) -> Result<(), StorageError> {
        let mut batch = Batch::default();
        for group in rows.chunk_by(|left, right| left.0.job.0 / GROUP == right.0.job.0 / GROUP) {
            let mut payload = Vec::new();
            group.iter().for_each(|(key, bytes)| put_row(&mut payload, &key.bytes(), bytes));
            let first = group[0].0;
            let key = [group_key(first.bucket, first.job.0 / GROUP), index.to_be_bytes().to_vec()].concat();
            batch.put(Tag::History, &key, &payload);
        }
        self.store.apply(batch)
    }

    fn rows_under(
        &self,
        key: &[u8],
        read: Result<(Vec<u8>, u16), StorageError>,
    ) -> Result<Vec<HistoryRow>, StorageError> {
        let decode = |row: Result<(&[u8], &[u8]), String>| {
            let (_, bytes) = row.map_err(|text| self.damaged_row(text))?;
            codec::decode_record(bytes).at(self.dir(), "read a history row of")
        };
        let rows = read.and_then(|(payload, _)| RowReader(&payload).map(decode).collect());
        rows.map_err(|error| self.damage_under(key, error))
    }

    /// Names the jobs that an unreadable value holds; a disk that fails stays the cause.
    fn damage_under(&self, key: &[u8], error: StorageError) -> StorageError {
        match (bucket_of(key), group_of(key)) {
            (Some(bucket), Some(group)) if !matches!(error.cause, Cause::Io(_)) => {
                let first = group * GROUP;
                self.damaged_history(bucket, first..=first + (GROUP - 1), error.cause.to_string())
            }
            _ => error,
        }
    }

    pub(super) fn damaged_history(
        &self,
        bucket: u32,
        jobs: RangeInclusive<u64>,
        what: impl Into<String>,
    ) -> StorageError {
        let damaged = DamagedHistory { bucket, first: *jobs.start(), last: *jobs.end(), what: what.into() };
        StorageError { file: self.dir().into(), operation: "read", cause: Cause::History(Box::new(damaged)) }
    }

    fn malformed_key(&self, key: &[u8]) -> StorageError {
        self.damaged_row(format!("the key {key:02x?} is malformed"))
    }

    fn damaged_row(&self, text: impl Into<String>) -> StorageError {
        StorageError::damaged(self.dir(), "read a history value of", text)
    }
}
