//! The replica's own durable Raft log and vote store: append-only segments, two vote files, one IO thread. The engine
//! knows nothing of openraft; [`storage`] is the thin adapter to it. Owns every byte below its directory; leaves the
//! directory's identity, snapshots and the state machine's image to others.
//!
//! | file | what it is |
//! |---|---|
//! | `000000000001.log` ... | segments of 16 MiB, see frame.rs |
//! | `spare` | the next segment's file, made ahead, see spare.rs |
//! | `vote-a`, `vote-b` | the vote, twice, see vote.rs |
//! | `durable` | how far the log was synced, see witness.rs |
//! | `reserve` | space kept for handing over leadership on a full disk, see reserve.rs |
//!
//! Promises: an acknowledgement comes after `fdatasync`; what was acknowledged is found again or the log refuses to
//! open, with file and offset; entries can be read as soon as `append` returns; a failed sync stops the log for good.

#[cfg(feature = "simulated")]
mod cut;
mod engine;
mod frame;
mod recovery;
mod reserve;
mod segment;
mod space;
mod spare;
pub mod storage;
mod view;
mod vote;
mod witness;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

#[cfg(feature = "simulated")]
pub(crate) use engine::ByHand;
pub use engine::{Log, LogReader, PendingRead};
pub use frame::MAX_DATA;

/// Names an entry. Two entries with one id are the same entry, on every replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct EntryId {
    pub index: u64,
    pub term: u64,
    /// The leader that proposed it.
    pub node: u64,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub id: EntryId,
    /// What kind of data it is: the caller's own, opaque here.
    pub tag: u8,
    /// At most [`MAX_DATA`] bytes.
    pub data: Bytes,
}

/// For whom this replica voted, or whom it follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Vote {
    pub term: u64,
    pub node: u64,
    /// A quorum granted it.
    pub committed: bool,
}

/// Which entries the log has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LogState {
    /// The last entry that was purged.
    pub purged: Option<EntryId>,
    /// The last entry, or the purged one if there is none behind it.
    pub last: Option<EntryId>,
}

/// Sizes and times. The defaults are what a replica runs with; tests make them small.
#[derive(Clone, Debug)]
pub struct Options {
    /// A segment is closed when it has reached this size. It has it from the start, in zeros, if there is space.
    pub segment_bytes: u64,
    /// Bound of the RAM copy of the log's end. Entries that are not durable yet are kept beyond it.
    pub tail_bytes: usize,
    /// Disk space kept back, so that a replica on a full disk can still finish what it holds.
    pub reserve_bytes: u64,
    /// How long the log must be quiet before it notes, in a frame of its own, that all before it is durable.
    pub mark_after: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            segment_bytes: 16 << 20,
            tail_bytes: 64 << 20,
            reserve_bytes: 16 << 20,
            mark_after: Duration::from_millis(50),
        }
    }
}

/// Why the log could not do what was asked. All but [`LogError::Hole`], [`LogError::TooLarge`] and [`LogError::Purged`]
/// mean that this replica must stop.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("{path}: cannot {doing}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },

    #[error(
        "{path} is damaged at offset {offset}: {what}. Nothing was changed. Keep the directory for inspection, remove \
         this replica from the group, and let it join again with an empty directory, as a new member"
    )]
    Damaged { path: PathBuf, offset: u64, what: String },

    #[error(
        "{path}: {what}. A replica that lost its vote could vote twice in one term, so it must not start under its old \
         id. Remove it from the group, and let it join again with an empty directory, as a new member"
    )]
    VoteLost { path: PathBuf, what: String },

    #[error("{path} has format {found}, this program knows {known}. Start it with the newer program that wrote it")]
    Format { path: PathBuf, found: u32, known: u32 },

    #[error("{path} is in use by another process")]
    InUse { path: PathBuf },

    #[error("entry {got} does not follow on entry {expected}: the log may have no hole")]
    Hole { expected: u64, got: u64 },

    #[error("entry {index} was purged; the log begins at {first}")]
    Purged { index: u64, first: u64 },

    #[error("entry {index} has {bytes} bytes, the limit is {limit}")]
    TooLarge { index: u64, bytes: usize, limit: usize },

    #[error("no space left for {path}, and the log was told to stop waiting for it")]
    Full { path: PathBuf },

    #[error("the log stopped: {0}")]
    Stopped(Arc<str>),
}

impl LogError {
    fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LogError {
        move |source| LogError::Io { doing, path: path.to_owned(), source }
    }

    fn damaged(path: &Path, offset: u64, what: impl Into<String>) -> LogError {
        LogError::Damaged { path: path.to_owned(), offset, what: what.into() }
    }
}

impl From<LogError> for io::Error {
    fn from(error: LogError) -> io::Error {
        let kind = match &error {
            LogError::Io { source, .. } => source.kind(),
            LogError::Damaged { .. } | LogError::VoteLost { .. } | LogError::Format { .. } => {
                io::ErrorKind::InvalidData
            }
            LogError::InUse { .. } => io::ErrorKind::ResourceBusy,
            LogError::Hole { .. } | LogError::Purged { .. } | LogError::TooLarge { .. } => io::ErrorKind::InvalidInput,
            LogError::Full { .. } => io::ErrorKind::StorageFull,
            LogError::Stopped(_) => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// Called once, from the IO thread, when what was asked is durable or has failed. What became durable at once is answered
/// newest first.
pub type Done = Box<dyn FnOnce(Result<(), LogError>) + Send>;
