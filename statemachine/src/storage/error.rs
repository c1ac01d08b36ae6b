//! What can go wrong with this machine's disk. Such an error stops the replica; it is never the answer to a command.

use std::io;
use std::path::{Path, PathBuf};

use super::codec::CodecError;

/// A failed operation on a file or directory of this replica.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}: {cause}", file.display())]
pub struct StorageError {
    pub file: PathBuf,
    /// A verb phrase: "read", "sync".
    pub operation: &'static str,
    pub cause: Cause,
}

#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// Contents that are not what was written, or not what belongs here.
    #[error("{0}")]
    Damaged(String),
    /// Finished jobs whose rows can't be read; copies may be elsewhere (`Image::mend_history`).
    #[error(transparent)]
    History(Box<DamagedHistory>),
    /// The image holds entries that the log has lost: the rule to sync the log first was broken.
    #[error(
        "the image is at log index {image}, the log ends at {log}: the log lost entries. Keep the directory for \
         inspection, remove this replica from the group and let it join again with a new id"
    )]
    AheadOfLog { image: u64, log: u64 },
    /// Written by a newer binary.
    #[error("written at level {found}, this binary knows levels up to {known}: start a newer binary")]
    NewerLevel { found: u16, known: u16 },
    /// The state given is no longer complete in the image: take a new clone and try again.
    #[error("history of the hour {bucket} changed under the snapshot: take a new one")]
    Superseded { bucket: u32 },
}

/// Rows of an hour of history that can't be read.
#[derive(Debug, thiserror::Error)]
#[error("the history of jobs {first} to {last}, which left memory in hour {bucket}, is damaged: {what}")]
pub struct DamagedHistory {
    pub bucket: u32,
    /// Job ids.
    pub first: u64,
    pub last: u64,
    pub what: String,
}

impl StorageError {
    /// Whether the disk, or the user's share of it, was full.
    pub fn is_full(&self) -> bool {
        let Cause::Io(error) = &self.cause else { return false };
        matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }

    /// The hour of history that is damaged, if that is the cause.
    pub fn damaged_bucket(&self) -> Option<u32> {
        match &self.cause {
            Cause::History(damaged) => Some(damaged.bucket),
            _ => None,
        }
    }

    pub(crate) fn damaged(file: &Path, operation: &'static str, what: impl Into<String>) -> Self {
        Self { file: file.into(), operation, cause: Cause::Damaged(what.into()) }
    }
}

/// Names file and operation of an error.
pub(crate) trait At<T> {
    fn at(self, file: &Path, operation: &'static str) -> Result<T, StorageError>;
}

impl<T, E: Into<Cause>> At<T> for Result<T, E> {
    fn at(self, file: &Path, operation: &'static str) -> Result<T, StorageError> {
        self.map_err(|err| StorageError { file: file.into(), operation, cause: err.into() })
    }
}
