//! The way back from disk to a state, at the start of a replica: its image, else its newest snapshot that verifies,
//! else nothing if the log begins at its first entry, else the leader's snapshot. Damage costs time, never entries, and
//! nothing ever starts empty unseen. The log and the vote, checked before, are raft-node's.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::codec::CodecError;
use super::error::{At, Cause, StorageError};
use super::history::HistoryKey;
use super::image::Image;
use super::snapshot::{self, Snapshot, SnapshotId};
use crate::record::LogPosition;
use crate::state::State;

const IMAGE: &str = "image";
/// The image that was unusable, kept for inspection.
const DAMAGED: &str = "image.damaged";
const SNAPSHOTS: &str = "snapshots";
const DAMAGED_SNAPSHOTS: &str = "snapshots.damaged";

/// What the log on this machine holds, as far as recovery must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogBounds {
    /// The last entry purged; `None` = the log begins at its first entry.
    pub purged: Option<LogPosition>,
    /// The last entry, or the last purged one when none is left; `None` = there never was one.
    pub last: Option<LogPosition>,
}

impl LogBounds {
    fn purged_index(&self) -> u64 {
        self.purged.map_or(0, |position| position.index)
    }
}

/// Where the state came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Image,
    Snapshot(SnapshotId),
    /// Nothing on disk was usable, or there was nothing: the log, whole from its first entry, is the state.
    Empty,
    /// Nothing on disk was usable, and the log begins too late. The state is **not** the cluster's: do not campaign, do
    /// not serve, take the leader's snapshot. Alone, stop.
    NeedsLeaderSnapshot,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Image => write!(f, "the image"),
            Source::Snapshot(id) => write!(f, "snapshot {id}"),
            Source::Empty => write!(f, "the log alone"),
            Source::NeedsLeaderSnapshot => write!(f, "nothing: the leader's snapshot is needed"),
        }
    }
}

/// A state to go on from: replay the log behind `state.meta.applied`.
#[must_use]
pub struct Recovered {
    pub state: State,
    pub image: Image,
    pub source: Source,
}

/// Where `dir`'s snapshots are.
pub fn snapshots_dir(dir: &Path) -> PathBuf {
    dir.join(SNAPSHOTS)
}

/// Recovers the state of the replica whose directory is `dir` (made if absent); the caller holds its lock.
///
/// Errors mean stop: the disk fails, the image is ahead of the log, or a newer binary wrote it.
pub fn open(dir: &Path, log: LogBounds) -> Result<Recovered, StorageError> {
    fs::create_dir_all(dir).at(dir, "create")?;
    snapshot::remove_unfinished(&snapshots_dir(dir))?;
    if let Some((state, image)) = from_image(dir, log)? {
        return Ok(Recovered { state, image, source: Source::Image });
    }
    if let Some((state, image, id)) = from_snapshot(dir, log)? {
        return Ok(Recovered { state, image, source: Source::Snapshot(id) });
    }
    // An image without a head: unless the caller writes a cut, the next start comes this way again.
    let image = Image::open(&dir.join(IMAGE))?;
    let source = if log.purged_index() == 0 { Source::Empty } else { Source::NeedsLeaderSnapshot };
    if source == Source::NeedsLeaderSnapshot {
        let index = log.purged_index();
        tracing::error!(dir = %dir.display(), purged = index, "neither image nor snapshot reaches the log's beginning");
    }
    Ok(Recovered { state: State::default(), image, source })
}

/// Opens the image again after a cut found the disk full: the cut before it is whole. All handles to the old one must be
/// dropped.
pub fn reopen(dir: &Path) -> Result<Image, StorageError> {
    let image = Image::open(&dir.join(IMAGE))?;
    image.load()?;
    Ok(image)
}

/// Moves all snapshots out of the way of one from another replica: that may be older, and only the newest are kept. They
/// stay for inspection.
pub fn set_snapshots_aside(dir: &Path) -> Result<(), StorageError> {
    let (path, aside) = (snapshots_dir(dir), dir.join(DAMAGED_SNAPSHOTS));
    if snapshot::list(&path)?.is_empty() {
        return Ok(());
    }
    remove_dir(&aside)?;
    fs::rename(&path, &aside).at(&path, "move aside")?;
    tracing::warn!(kept_as = %aside.display(), "no snapshot is usable: they were moved aside");
    Ok(())
}

/// Makes a received snapshot this replica's state: a new image is written from it, finished jobs included. The old
/// image must be closed (every handle dropped); until the new one is whole, a restart begins from the snapshot.
pub fn install(dir: &Path, snapshot: &Snapshot) -> Result<(State, Image), StorageError> {
    let path = dir.join(IMAGE);
    remove_dir(&path)?;
    let mut state = snapshot.load()?;
    let image = Image::open(&path)?;
    put_history(&image, snapshot)?;
    image.fill(&mut state)?;
    Ok((state, image))
}

fn from_image(dir: &Path, log: LogBounds) -> Result<Option<(State, Image)>, StorageError> {
    let path = dir.join(IMAGE);
    if !path.exists() {
        return Ok(None);
    }
    match load_image(&path) {
        Ok(None) => {
            set_unfinished_aside(&path)?;
            Ok(None)
        }
        Ok(Some((state, image))) => {
            refuse_ahead_of_log(dir, &path, state.meta.applied, log)?;
            if state.meta.applied.index >= log.purged_index() {
                return Ok(Some((state, image)));
            }
            drop(image);
            let error = format!("it is at log index {}, the log begins behind it", state.meta.applied.index);
            move_aside(&path, &error)?;
            Ok(None)
        }
        Err(error) if is_newer(&error) => Err(error),
        Err(error) => {
            move_aside(&path, &error)?;
            Ok(None)
        }
    }
}

fn load_image(path: &Path) -> Result<Option<(State, Image)>, StorageError> {
    let image = Image::open(path)?;
    if let Some(head) = image.head()?
        && head.meta.level > crate::LEVEL
    {
        let cause = Cause::NewerLevel { found: head.meta.level, known: crate::LEVEL };
        return Err(StorageError { file: path.into(), operation: "load", cause });
    }
    let Some(mut state) = image.load()? else { return Ok(None) };
    state.rebuild_indexes();
    Ok(Some((state, image)))
}

/// A cut is written only when the log is durable up to it, so an image ahead of the log means that the log lost
/// entries; but for one made from a leader's snapshot, whose entries this log never had.
fn refuse_ahead_of_log(dir: &Path, path: &Path, applied: LogPosition, log: LogBounds) -> Result<(), StorageError> {
    let last = log.last.or(log.purged).map_or(0, |position| position.index);
    if applied.index <= last || snapshot::list(&snapshots_dir(dir))?.contains(&SnapshotId(applied)) {
        return Ok(());
    }
    let cause = Cause::AheadOfLog { image: applied.index, log: last };
    Err(StorageError { file: path.into(), operation: "recover", cause })
}

/// Written by a newer binary: not damage, and nothing to move aside.
fn is_newer(error: &StorageError) -> bool {
    matches!(
        error.cause,
        Cause::NewerLevel { .. } | Cause::Codec(CodecError::Schema(_)) | Cause::Codec(CodecError::Codec(_))
    )
}

fn from_snapshot(dir: &Path, log: LogBounds) -> Result<Option<(State, Image, SnapshotId)>, StorageError> {
    let snapshots = snapshots_dir(dir);
    for id in snapshot::list(&snapshots)?.into_iter().filter(|id| id.0.index >= log.purged_index()) {
        let verified = Snapshot::open(&snapshots, id).and_then(|found| found.verify().map(|()| found));
        match verified.and_then(|found| install(dir, &found)) {
            Ok((state, image)) => return Ok(Some((state, image, id))),
            Err(error) if is_newer(&error) => return Err(error),
            Err(error) => tracing::warn!(%error, snapshot = %id, "snapshot is damaged, trying an older one"),
        }
    }
    Ok(None)
}

/// Copies the history rows of a snapshot into a new image.
fn put_history(image: &Image, snapshot: &Snapshot) -> Result<(), StorageError> {
    const BATCH: usize = 4 << 20;
    let index = snapshot.id.0.index;
    let mut rows: Vec<(HistoryKey, Vec<u8>)> = Vec::new();
    let mut bytes = 0;
    snapshot.history(&mut |key, row| {
        let group = |key: HistoryKey| (key.bucket, key.job.0 / super::history::GROUP);
        // A group of ids is one value, so a batch ends between groups.
        if rows
            .last()
            .is_some_and(|(last, _)| last.bucket != key.bucket || (bytes > BATCH && group(*last) != group(key)))
        {
            image.put_history(&std::mem::take(&mut rows), index)?;
            bytes = 0;
        }
        bytes += row.len();
        rows.push((key, row.to_vec()));
        Ok(())
    })?;
    image.put_history(&rows, index)
}

/// Keeps a damaged image for inspection, the newest one only: it may be large.
fn move_aside(path: &Path, why: &dyn fmt::Display) -> Result<(), StorageError> {
    let aside = path.with_file_name(DAMAGED);
    remove_dir(&aside)?;
    fs::rename(path, &aside).at(path, "move aside")?;
    tracing::warn!(error = %why, kept_as = %aside.display(), "the image is unusable and was moved aside");
    Ok(())
}

/// An image without a head: made, but never finished, or so damaged that sled sees nothing in it. Never at the cost of
/// one that was kept before.
fn set_unfinished_aside(path: &Path) -> Result<(), StorageError> {
    if path.with_file_name(DAMAGED).exists() {
        return remove_dir(path);
    }
    move_aside(path, &"it holds no whole cut")
}

fn remove_dir(path: &Path) -> Result<(), StorageError> {
    match fs::remove_dir_all(path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => Err(err).at(path, "remove"),
        _ => Ok(()),
    }
}
