//! Reads that reach into history on disk. A damaged row is never a missing one: it is mended and read again, and if that fails the
//! reader is told what is damaged.

use std::future::Future;

use proto::{error, reason};
use statemachine::storage::StorageError;
use tonic::Status;

use super::Api;

/// Why a read has no answer.
pub enum Unread {
    Refused(Status),
    Storage(StorageError),
}

impl From<Status> for Unread {
    fn from(status: Status) -> Self {
        Self::Refused(status)
    }
}

impl From<StorageError> for Unread {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

impl Api {
    /// What `read` gives, once no history that it needs is damaged any more. Each damaged hour is mended once.
    pub async fn mending<T, F>(&self, mut read: impl FnMut() -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<T, Unread>>,
    {
        let mut mended = None;
        loop {
            let error = match read().await {
                Ok(found) => return Ok(found),
                Err(Unread::Refused(status)) => return Err(status),
                Err(Unread::Storage(error)) => error,
            };
            let bucket = match error.damaged_bucket() {
                Some(bucket) if mended != Some(bucket) => bucket,
                _ => return Err(unreadable(&error.to_string())),
            };
            tracing::warn!(%error, "damaged history");
            if let Err(why) = self.replica.mend_history(bucket).await {
                tracing::error!(%error, %why, "damaged history stays as it is");
                return Err(unreadable(&format!("{error}. It can't be made whole now: {why}")));
            }
            mended = Some(bucket);
        }
    }
}

fn unreadable(what: &str) -> Status {
    error::refusal(reason::HISTORY_DAMAGED, format!("this replica's history can't be read: {what}"))
}
