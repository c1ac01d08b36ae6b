//! Damaged rows of history, made whole again from copies: which rows of a bucket can't be read, what the kept snapshots
//! have of them, and the way back into the image. Copies of other replicas are raft-node's to fetch.
//!
//! No copy is believed by itself: a bucket is written only when all its rows add up to the sum that the state, which is
//! replicated, keeps of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::codec::{self, StoredKey, Tag};
use super::error::StorageError;
use super::history::{GROUP, HistoryKey, group_key, weigh};
use super::image::Image;
use super::pages::put_row;
use super::recovery::snapshots_dir;
use super::snapshot::{self, Snapshot};
use super::store::Batch;
use crate::id::JobId;
use crate::record::HistoryRow;
use crate::state::State;

/// Rows by job, each in its canonical bytes.
pub type Copies = BTreeMap<JobId, Vec<u8>>;

/// A row as it is stored, and as replicas give it to each other.
pub fn canonical_row(row: &HistoryRow) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(512);
    codec::canonical(row, &mut bytes);
    bytes
}

/// What the snapshots of a replica's directory have of these jobs. One that can't be read is passed over with a warning.
pub fn copies_in_snapshots(dir: &Path, bucket: u32, jobs: &BTreeSet<JobId>) -> Result<Copies, StorageError> {
    let snapshots = snapshots_dir(dir);
    let mut copies = Copies::new();
    for id in snapshot::list(&snapshots)? {
        let mut found = Copies::new();
        let read = Snapshot::open(&snapshots, id).and_then(|snapshot| {
            snapshot.history_of(bucket, &mut |key, bytes| {
                if jobs.contains(&key.job) && !copies.contains_key(&key.job) {
                    found.insert(key.job, bytes.to_vec());
                }
                Ok(())
            })
        });
        match read {
            Ok(()) => copies.append(&mut found),
            Err(error) => tracing::warn!(%error, snapshot = %id, "its history is no source for damaged rows"),
        }
    }
    Ok(copies)
}

impl Image {
    /// The jobs of a bucket whose rows can't be read, here or in `state`, which is this replica's current one.
    pub fn missing_history(&self, state: &State, bucket: u32) -> Result<BTreeSet<JobId>, StorageError> {
        let mut missing = jobs_of(state, bucket);
        missing.retain(|job| !state.archived.contains_key(job));
        self.groups(bucket, &mut |group| {
            for key in group.rows.keys() {
                missing.remove(&key.job);
            }
            Ok(())
        })?;
        Ok(missing)
    }

    /// Writes the damaged groups of a bucket anew, with `copies` for the rows that can't be read, and makes them durable.
    /// Refused, with nothing changed, if rows and copies together are not the bucket of `state`. Blocks cuts meanwhile.
    pub fn mend_history(&self, state: &State, bucket: u32, copies: &Copies) -> Result<(), StorageError> {
        let Some(sums) = state.buckets.get(&bucket) else { return Ok(()) };
        let _no_cut = self.written.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let _history_stays = self.history.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut mended = Mended { state, bucket, rows: 0, sum: 0, batch: Batch::default() };
        for row in state.archived.values().filter(|row| row.bucket == bucket) {
            mended.rows += 1;
            mended.sum = mended.sum.wrapping_add(weigh(row).0);
        }
        let mut copies = copies.clone();
        self.groups(bucket, &mut |mut group| {
            let whole = group.damage.is_none();
            let known = group.rows.len();
            let first = JobId(group.number * GROUP);
            let of_group: Vec<JobId> =
                copies.range(first..).map(|(job, _)| *job).take_while(|job| job.0 / GROUP == group.number).collect();
            for job in of_group {
                let bytes = copies.remove(&job).unwrap_or_default();
                group.rows.entry(HistoryKey { bucket, job }).or_insert(bytes);
            }
            mended.count(&group.rows);
            if !whole || group.rows.len() > known {
                for (key, chunks) in &group.values {
                    mended.batch.remove(Tag::History, key, *chunks);
                }
                mended.put(group.number, &group.rows);
            }
            Ok(())
        })?;
        // Groups of which nothing was left.
        let mut lost: BTreeMap<u64, BTreeMap<HistoryKey, Vec<u8>>> = BTreeMap::new();
        for (job, bytes) in copies {
            lost.entry(job.0 / GROUP).or_default().insert(HistoryKey { bucket, job }, bytes);
        }
        for (number, rows) in &lost {
            mended.count(rows);
            mended.put(*number, rows);
        }
        if (mended.rows, mended.sum) != (sums.rows, sums.sum) {
            let what = format!("its rows and their copies are {} of {}, or not the right ones", mended.rows, sums.rows);
            return Err(self.damaged_history(bucket, 0..=sums.highest_job.0, what));
        }
        self.store.apply(mended.batch)?;
        self.store.persist()
    }
}

/// A bucket on its way to being whole.
struct Mended<'a> {
    state: &'a State,
    bucket: u32,
    /// What the state should say of the bucket.
    rows: u64,
    sum: u128,
    batch: Batch,
}

impl Mended<'_> {
    /// Adds up the rows that the state knows to be the image's.
    fn count(&mut self, rows: &BTreeMap<HistoryKey, Vec<u8>>) {
        for (key, bytes) in rows {
            // The image may hold jobs that left memory after the state was cloned.
            let known = self.state.ended_job(key.job).is_some_and(|(_, hour)| hour == self.bucket);
            if known && !self.state.archived.contains_key(&key.job) {
                self.rows += 1;
                self.sum = self.sum.wrapping_add(codec::hash_row(Tag::History, &key.bytes(), bytes));
            }
        }
    }

    /// One value for a whole group. No cut is at index 0, so none replaces it.
    fn put(&mut self, number: u64, rows: &BTreeMap<HistoryKey, Vec<u8>>) {
        let mut payload = Vec::new();
        rows.iter().for_each(|(key, bytes)| put_row(&mut payload, &key.bytes(), bytes));
        let key = [group_key(self.bucket, number), 0u64.to_be_bytes().to_vec()].concat();
        self.batch.put(Tag::History, &key, &payload);
    }
}

/// The jobs that left memory in a bucket.
fn jobs_of(state: &State, bucket: u32) -> BTreeSet<JobId> {
    let chunks = state.ended.iter().flat_map(|(chunk, ended)| {
        ended.jobs.iter().map(move |(place, (_, hour))| (JobId((chunk << 8) | u64::from(*place)), *hour))
    });
    chunks.filter(|(job, hour)| *hour == bucket && state.ended_job(*job).is_some()).map(|(job, _)| job).collect()
}
