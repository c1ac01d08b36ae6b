//! Writes a snapshot of a state, on a thread that may take its time: the state is a clone, and the image is only read.

use std::path::Path;

use super::super::blocks::BlockWriter;
use super::super::codec::{self, StoredKey, Tag};
use super::super::error::{At, Cause, StorageError};
use super::super::events::EventKey;
use super::super::history::HistoryKey;
use super::super::image::Image;
use super::super::rows;
use super::manifest::{FileEntry, Manifest};
use super::{Snapshot, SnapshotId};
use crate::record::{Bucket, HistoryRow};
use crate::state::State;

/// Writes a snapshot of `state` (a clone of the applied one) below `snapshots` and removes all but the newest two. The
/// image gives the history rows that left memory; it may be ahead of the state, not behind it.
///
/// Errors: [`Cause::Superseded`] when a bucket of history was dropped meanwhile: take a new clone and try again.
pub fn write(snapshots: &Path, mut state: State, image: &Image) -> Result<Snapshot, StorageError> {
    let _history_stays = image.history.read().unwrap_or_else(|poisoned| poisoned.into_inner());
    let dir = super::begin(snapshots, "write")?;
    let written = write_files(snapshots, &dir, &mut state, image);
    if written.is_err() {
        // What is half written must not keep a full disk full. Else the next snapshot, or start, removes it.
        let _ = std::fs::remove_dir_all(&dir);
    }
    written?;
    let snapshot = super::publish(&dir, snapshots, SnapshotId(state.meta.applied))?;
    super::prune(snapshots)?;
    Ok(snapshot)
}

fn write_files(snapshots: &Path, dir: &Path, state: &mut State, image: &Image) -> Result<(), StorageError> {
    let digest = state.digest();
    let mut files = vec![write_live(dir, state, digest)?, write_events(dir, state)?];
    for (bucket, sums) in state.buckets.iter() {
        files.push(place_bucket(snapshots, dir, state, image, *bucket, sums)?);
    }
    Manifest::of(state, digest, files).write(dir)
}

fn write_live(dir: &Path, state: &State, digest: u128) -> Result<FileEntry, StorageError> {
    let path = dir.join("live");
    let mut file = BlockWriter::create(&path)?;
    let mut meta = Vec::new();
    codec::canonical(&state.meta, &mut meta);
    file.push(Tag::Meta, &[], &meta)?;
    for (tag, table) in rows::all(state) {
        let mut result = Ok(());
        table
            .encode_range(tag, None, None, &mut |key, bytes| {
                if result.is_ok() {
                    result = file.push(tag, key, bytes);
                }
            })
            .at(&path, "encode the state for")?;
        result?;
    }
    Ok(FileEntry::new("live", file.finish(digest)?))
}

fn write_events(dir: &Path, state: &State) -> Result<FileEntry, StorageError> {
    let mut file = BlockWriter::create(&dir.join("events"))?;
    let mut bytes = Vec::new();
    for event in &state.events {
        bytes.clear();
        codec::canonical(event.as_ref(), &mut bytes);
        file.push(Tag::Event, &EventKey::of(event).bytes(), &bytes)?;
    }
    Ok(FileEntry::new("events", file.finish(0)?))
}

/// A bucket's file: linked from an older snapshot, else written from the image and the rows that it doesn't hold yet.
fn place_bucket(
    snapshots: &Path,
    dir: &Path,
    state: &State,
    image: &Image,
    bucket: u32,
    sums: &Bucket,
) -> Result<FileEntry, StorageError> {
    let name = format!("history-{bucket:010}-{:032x}", sums.sum);
    if let Some(entry) = super::link_known(snapshots, &name, dir)? {
        return Ok(entry);
    }
    let path = dir.join(&name);
    let mut file = BucketFile { file: BlockWriter::create(&path)?, rows: 0, sum: 0 };
    let mut unstored = state.archived.values().filter(|row| row.bucket == bucket).peekable();
    image.bucket_rows(bucket, &mut |key, stored| {
        // The image may hold jobs that left memory after this state was cloned.
        if state.ended_job(key.job).map(|(_, hour)| hour) != Some(bucket) || state.archived.contains_key(&key.job) {
            return Ok(());
        }
        while let Some(row) = unstored.next_if(|row| row.id < key.job) {
            file.push_row(row)?;
        }
        file.push(key, stored)
    })?;
    unstored.try_for_each(|row| file.push_row(row))?;

    if (file.rows, file.sum) != (sums.rows, sums.sum) {
        tracing::warn!(bucket, found = file.rows, expected = sums.rows, "history differs from its bucket");
        return Err(StorageError { file: path, operation: "write", cause: Cause::Superseded { bucket } });
    }
    Ok(FileEntry::new(&name, file.file.finish(file.sum)?))
}

struct BucketFile {
    file: BlockWriter,
    rows: u64,
    sum: u128,
}

impl BucketFile {
    fn push(&mut self, key: HistoryKey, canonical: &[u8]) -> Result<(), StorageError> {
        let key = key.bytes();
        self.rows += 1;
        self.sum = self.sum.wrapping_add(codec::hash_row(Tag::History, &key, canonical));
        self.file.push(Tag::History, &key, canonical)
    }

    fn push_row(&mut self, row: &HistoryRow) -> Result<(), StorageError> {
        let mut bytes = Vec::with_capacity(512);
        codec::canonical(row, &mut bytes);
        self.push(HistoryKey::of(row), &bytes)
    }
}
