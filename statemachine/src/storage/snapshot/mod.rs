//! Snapshots: directories of checksummed files that hold everything, finished jobs included; the way to a replica whose
//! log begins too late, and the second footing of one whose image is damaged. When one is due, and how its bytes
//! travel, is raft-node's matter.
//!
//! A directory `INDEX-TERM-LEADER` below the snapshots' directory holds `live` (all records of the state, sorted),
//! `events` (the ring), one file per bucket of history, and MANIFEST. A bucket's file is named by its rows' sum, so it
//! never changes: later snapshots share it by a hard link, and a receiver skips those it has. Everything is written and
//! synced in a directory of another name, which is renamed at the end; so a directory with this name is whole.

mod incoming;
mod manifest;
mod writer;

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use incoming::Incoming;
pub use manifest::{FileEntry, MANIFEST, Manifest};
pub use writer::write;

use planted::{Bug, planted};

use self::manifest::hex;
use super::blocks;
use super::codec::{self, CodecError, StoredKey, Tag};
use super::error::{At, Cause, StorageError};
use super::history::{EachHistoryRow, HistoryKey};
use super::rows;
use super::store::sync_dir;
use crate::event::Event;
use crate::id::Token;
use crate::record::LogPosition;
use crate::state::State;

/// Snapshots kept; a third one removes the oldest.
pub const KEPT: usize = 2;
/// Begins the names of directories that are not finished.
const UNFINISHED: &str = ".unfinished-";

/// Which snapshot: where in the log it was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotId(pub LogPosition);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:020}-{:020}-{:020}", self.0.index, self.0.term, self.0.leader)
    }
}

impl SnapshotId {
    /// Reads what `Display` wrote.
    pub fn parse(name: &str) -> Option<Self> {
        let mut numbers = name.split('-').map(|part| part.parse::<u64>().ok().filter(|_| part.len() == 20));
        let (index, term, leader) = (numbers.next()??, numbers.next()??, numbers.next()??);
        numbers.next().is_none().then_some(Self(LogPosition { term, leader, index }))
    }
}

/// A finished snapshot on this machine.
#[derive(Clone, Debug)]
pub struct Snapshot {
    pub id: SnapshotId,
    pub manifest: Manifest,
    dir: PathBuf,
}

impl Snapshot {
    /// Reads the manifest; the files are not looked at.
    pub fn open(snapshots: &Path, id: SnapshotId) -> Result<Self, StorageError> {
        let dir = snapshots.join(id.to_string());
        let manifest = Manifest::read(&dir)?;
        if manifest.position != id.0 {
            return Err(StorageError::damaged(&dir.join(MANIFEST), "read", "it belongs to another directory"));
        }
        Ok(Self { id, manifest, dir })
    }

    /// A snapshot in a directory of any name: a copy that somebody keeps.
    pub fn kept_at(dir: &Path) -> Result<Self, StorageError> {
        let manifest = Manifest::read(dir)?;
        Ok(Self { id: SnapshotId(manifest.position), manifest, dir: dir.into() })
    }

    /// The directory that holds its files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names and sizes of all files, the MANIFEST last: in this order they are sent.
    pub fn files(&self) -> Vec<(String, u64)> {
        let manifest = (MANIFEST.to_string(), self.manifest.encode().len() as u64);
        self.manifest.files.iter().map(|file| (file.name.clone(), file.size)).chain([manifest]).collect()
    }

    /// Where a file of it lies; `None` for a name that it doesn't have.
    pub fn path(&self, name: &str) -> Option<PathBuf> {
        let known = name == MANIFEST || self.manifest.files.iter().any(|file| file.name == name);
        known.then(|| self.dir.join(name))
    }

    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        self.files().iter().map(|(_, size)| size).sum()
    }

    /// Compares every file with the manifest.
    pub fn verify(&self) -> Result<(), StorageError> {
        self.manifest.files.iter().try_for_each(|file| verify_file(&self.dir.join(&file.name), file))
    }

    /// The state, verified; its indexes are rebuilt. The history rows stay in the files: see `storage::install`.
    pub fn load(&self) -> Result<State, StorageError> {
        let mut state = State::default();
        let path = self.dir.join("live");
        let mut has_meta = false;
        let check = blocks::read_rows(&path, &mut |tag, key, bytes| {
            if tag == Tag::Meta as u8 {
                has_meta = true;
                state.meta = codec::decode_record(bytes).at(&path, "read")?;
                return Ok(());
            }
            match rows::of_tag(&mut state, tag) {
                Some((tag, table)) => table.restore(tag, key, bytes).at(&path, "read"),
                None => Err(StorageError::damaged(&path, "read", format!("table {tag} is unknown"))),
            }
        })?;
        self.verify_state(&mut state, has_meta, check)?;
        self.load_events(&mut state)?;
        state.rebuild_indexes();
        if planted(Bug::TokenNotInSnapshot) {
            state.meta.token = Token(0);
        }
        Ok(state)
    }

    fn verify_state(&self, state: &mut State, has_meta: bool, check: u128) -> Result<(), StorageError> {
        let path = self.dir.join("live");
        let digest = state.digest();
        if !has_meta || state.meta.applied != self.id.0 {
            return Err(StorageError::damaged(&path, "load", "it is not of the position in its manifest"));
        }
        if state.meta.level > crate::LEVEL {
            let cause = Cause::NewerLevel { found: state.meta.level, known: crate::LEVEL };
            return Err(StorageError { file: path, operation: "load", cause });
        }
        if digest != check || format!("{digest:032x}") != self.manifest.digest {
            let what = format!("the digest of its records is {digest:032x}, should be {}", self.manifest.digest);
            return Err(StorageError::damaged(&path, "load", what));
        }
        Ok(())
    }

    fn load_events(&self, state: &mut State) -> Result<(), StorageError> {
        let path = self.dir.join("events");
        let mut events: Vec<Arc<Event>> = Vec::new();
        blocks::read_rows(&path, &mut |_, _, bytes| {
            events.push(Arc::new(codec::decode_record(bytes).at(&path, "read")?));
            Ok(())
        })?;
        state.restore_events(events);
        Ok(())
    }

    /// Calls `each` with the rows of every bucket of history, bucket by bucket, ids ascending.
    pub(super) fn history(&self, each: EachHistoryRow) -> Result<(), StorageError> {
        let mut files = self.manifest.files.iter().filter(|file| file.name.starts_with("history-"));
        files.try_for_each(|file| self.history_file(&file.name, each))
    }

    /// The same for one bucket; nothing if the snapshot doesn't have it.
    pub(super) fn history_of(&self, bucket: u32, each: EachHistoryRow) -> Result<(), StorageError> {
        let begin = format!("history-{bucket:010}-");
        let mut files = self.manifest.files.iter().filter(|file| file.name.starts_with(&begin));
        files.try_for_each(|file| self.history_file(&file.name, each))
    }

    fn history_file(&self, name: &str, each: EachHistoryRow) -> Result<(), StorageError> {
        let path = self.dir.join(name);
        let mut sum = 0u128;
        let check = blocks::read_rows(&path, &mut |tag, key, bytes| {
            let malformed = CodecError::Key { tag, len: key.len() };
            let row = HistoryKey::take(key).filter(|_| tag == Tag::History as u8).ok_or(malformed);
            sum = sum.wrapping_add(codec::hash_row(Tag::History, key, bytes));
            each(row.at(&path, "read")?, bytes)
        })?;
        if sum != check {
            return Err(StorageError::damaged(&path, "read", "the sum of its rows is wrong"));
        }
        Ok(())
    }
}

/// Finished snapshots in a directory, the newest first. Whether they verify is another question.
pub fn list(snapshots: &Path) -> Result<Vec<SnapshotId>, StorageError> {
    let mut ids: Vec<SnapshotId> = entries(snapshots)?.iter().filter_map(|name| SnapshotId::parse(name)).collect();
    ids.sort_by_key(|id| std::cmp::Reverse((id.0.index, id.0)));
    Ok(ids)
}

/// The newest snapshot at or above log index `at_least` of which every file is as its manifest says; those that are
/// not are passed over with a warning.
pub fn newest_valid(snapshots: &Path, at_least: u64) -> Result<Option<Snapshot>, StorageError> {
    for id in list(snapshots)?.into_iter().filter(|id| id.0.index >= at_least) {
        match Snapshot::open(snapshots, id).and_then(|snapshot| snapshot.verify().map(|()| snapshot)) {
            Ok(snapshot) => return Ok(Some(snapshot)),
            Err(error) => tracing::warn!(%error, snapshot = %id, "snapshot does not verify"),
        }
    }
    Ok(None)
}

/// Removes all but the newest [`KEPT`] snapshots. Streams that still read one end with an error.
pub fn prune(snapshots: &Path) -> Result<(), StorageError> {
    for id in list(snapshots)?.into_iter().skip(KEPT) {
        remove(&snapshots.join(id.to_string()))?;
    }
    Ok(())
}

/// Removes what a crash left half written. For the start, before anything writes here.
pub(super) fn remove_unfinished(snapshots: &Path) -> Result<(), StorageError> {
    for name in entries(snapshots)?.iter().filter(|name| name.starts_with(UNFINISHED)) {
        let path = snapshots.join(name);
        fs::remove_dir_all(&path).at(&path, "remove")?;
    }
    Ok(())
}

/// Under an unfinished name first, so that a crash in the middle leaves no snapshot with files missing.
pub(super) fn remove(dir: &Path) -> Result<(), StorageError> {
    let doomed = dir.with_file_name(format!("{UNFINISHED}{}", dir.file_name().unwrap_or_default().to_string_lossy()));
    fs::rename(dir, &doomed).at(dir, "rename")?;
    fs::remove_dir_all(&doomed).at(&doomed, "remove")
}

/// Gives a finished directory its name. One that has the name already is replaced: it is of the same position.
fn publish(unfinished: &Path, snapshots: &Path, id: SnapshotId) -> Result<Snapshot, StorageError> {
    sync_dir(unfinished)?;
    let dir = snapshots.join(id.to_string());
    if dir.exists() {
        remove(&dir)?;
    }
    fs::rename(unfinished, &dir).at(unfinished, "rename")?;
    sync_dir(snapshots)?;
    Snapshot::open(snapshots, id)
}

/// A new, empty, unfinished directory.
fn begin(snapshots: &Path, kind: &str) -> Result<PathBuf, StorageError> {
    fs::create_dir_all(snapshots).at(snapshots, "create")?;
    let dir = snapshots.join(format!("{UNFINISHED}{kind}"));
    if dir.exists() {
        fs::remove_dir_all(&dir).at(&dir, "remove")?;
    }
    fs::create_dir(&dir).at(&dir, "create")?;
    Ok(dir)
}

/// Copies a verified snapshot among those of a replica.
pub(super) fn copy(from: &Snapshot, snapshots: &Path) -> Result<Snapshot, StorageError> {
    let dir = begin(snapshots, "copy")?;
    for (name, _) in from.files() {
        let (source, target) = (from.dir.join(&name), dir.join(&name));
        fs::copy(&source, &target).at(&source, "copy")?;
        fs::File::open(&target).and_then(|file| file.sync_all()).at(&target, "sync")?;
    }
    let copied = publish(&dir, snapshots, from.id)?;
    copied.verify()?;
    Ok(copied)
}

/// Links a file of the same name and content from a finished snapshot, where there is one. Its content is verified
/// when the snapshot is read, not here: that would read all history at every snapshot.
fn link_known(snapshots: &Path, name: &str, into: &Path) -> Result<Option<FileEntry>, StorageError> {
    for id in list(snapshots)? {
        let Ok(known) = Snapshot::open(snapshots, id) else { continue };
        let Some(entry) = known.manifest.files.iter().find(|file| file.name == name) else { continue };
        let path = known.dir.join(name);
        if fs::metadata(&path).is_ok_and(|found| found.len() == entry.size)
            && fs::hard_link(&path, into.join(name)).is_ok()
        {
            return Ok(Some(entry.clone()));
        }
    }
    Ok(None)
}

fn verify_file(path: &Path, entry: &FileEntry) -> Result<(), StorageError> {
    let found = blocks::weigh_file(path)?;
    if found.size != entry.size {
        let what = format!("it has {} bytes, should have {}", found.size, entry.size);
        return Err(StorageError::damaged(path, "verify", what));
    }
    if hex(&found.sha256) != entry.sha256 {
        return Err(StorageError::damaged(path, "verify", "its SHA-256 is not the manifest's"));
    }
    Ok(())
}

fn entries(snapshots: &Path) -> Result<Vec<String>, StorageError> {
    let found = match fs::read_dir(snapshots) {
        Ok(found) => found,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => return Err(err).at(snapshots, "list"),
    };
    found.map(|entry| Ok(entry.at(snapshots, "list")?.file_name().to_string_lossy().into_owned())).collect()
}
