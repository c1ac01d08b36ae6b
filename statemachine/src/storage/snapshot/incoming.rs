//! A snapshot on its way in from another replica: files arrive in pieces, are verified as a whole, and only then become
//! a snapshot of this machine. How the bytes travel is raft-node's matter.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::super::error::{At, StorageError};
use super::manifest::{MANIFEST, Manifest, is_file_name};
use super::{Snapshot, SnapshotId};

/// Bytes of a manifest: one line per hour of history of ten years is 10 MiB.
const MANIFEST_LIMIT: usize = 16 << 20;

/// One snapshot being received. A second one in the same directory replaces the first.
#[derive(Debug)]
pub struct Incoming {
    snapshots: PathBuf,
    dir: PathBuf,
    open: BTreeMap<String, File>,
}

impl Incoming {
    /// Begins to receive below the directory of snapshots.
    pub fn new(snapshots: &Path) -> Result<Self, StorageError> {
        Ok(Self { snapshots: snapshots.into(), dir: super::begin(snapshots, "receive")?, open: BTreeMap::new() })
    }

    /// Optional first step: given the sender's MANIFEST, links the files that this machine has already and names those
    /// that must be sent.
    pub fn missing(&mut self, manifest: &[u8]) -> Result<Vec<String>, StorageError> {
        if manifest.len() > MANIFEST_LIMIT {
            let what = format!("{} bytes, the limit is {MANIFEST_LIMIT}", manifest.len());
            return Err(StorageError::damaged(&self.dir.join(MANIFEST), "receive", what));
        }
        let manifest = Manifest::decode(manifest, &self.dir.join(MANIFEST))?;
        let mut missing = Vec::new();
        for file in &manifest.files {
            let linked = file.name.starts_with("history-")
                && super::link_known(&self.snapshots, &file.name, &self.dir)?.is_some_and(|known| known == *file);
            if !linked {
                missing.push(file.name.clone());
            }
        }
        missing.push(MANIFEST.into());
        Ok(missing)
    }

    /// Writes a piece of a file at its offset. Pieces may come in any order; a name with a path in it is refused.
    pub fn write(&mut self, name: &str, offset: u64, bytes: &[u8]) -> Result<(), StorageError> {
        if !is_file_name(name) {
            return Err(StorageError::damaged(&self.dir, "receive into", format!("{name:?} is no name of a file")));
        }
        let path = self.dir.join(name);
        if !self.open.contains_key(name) {
            // A linked file is shared with other snapshots: never written through.
            if path.exists() {
                fs::remove_file(&path).at(&path, "replace")?;
            }
            let file = OpenOptions::new().write(true).create_new(true).open(&path).at(&path, "create")?;
            self.open.insert(name.into(), file);
        }
        self.open[name].write_all_at(bytes, offset).at(&path, "write")
    }

    /// Verifies what arrived and makes it a snapshot; the oldest one above two is removed.
    pub fn finish(mut self) -> Result<Snapshot, StorageError> {
        for (name, file) in std::mem::take(&mut self.open) {
            file.sync_all().at(&self.dir.join(name), "sync")?;
        }
        let manifest = Manifest::read(&self.dir)?;
        for file in &manifest.files {
            super::verify_file(&self.dir.join(&file.name), file)?;
        }
        let snapshot = super::publish(&self.dir, &self.snapshots, SnapshotId(manifest.position))?;
        super::prune(&self.snapshots)?;
        Ok(snapshot)
    }
}
