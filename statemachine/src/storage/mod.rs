//! What lasts: bytes of records (`codec`), their sum over the state (`digest`), the write-behind image in sled
//! (`image`), snapshot files (`snapshot`), and the way back from disk to a state (`recovery`). The only IO of this
//! crate. The replicated log is not here: raft-node owns it.

mod blocks;
pub mod codec;
mod digest;
mod error;
mod events;
#[cfg(test)]
mod golden;
mod history;
mod image;
mod mend;
mod pages;
mod recovery;
mod renewal;
mod rows;
pub mod snapshot;
mod store;

pub use codec::CodecError;
pub use error::{Cause, StorageError};
pub use history::{HistoryKey, weigh};
pub use image::{BEHIND_BYTES, BEHIND_RECORDS, CUT_MS, CUT_RECORDS, Cut, Image, Persisted};
pub use mend::{Copies, canonical_row, copies_in_snapshots};
pub use recovery::{LogBounds, Recovered, Source, install, open, reopen, set_snapshots_aside, snapshots_dir};
pub use renewal::{NewLife, renew};
pub use snapshot::{Incoming, Snapshot, SnapshotId};
