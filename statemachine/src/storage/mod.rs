//! What lasts: bytes of records (`codec`), their sum over the state (`digest`), the write-behind image in sled
//! (`image`), snapshot files (`snapshot`), and the way back from disk to a state (`recovery`). The only IO of this
//! crate. The replicated log is not here: raft-node owns it.

pub mod codec;

pub use codec::CodecError;
mod digest;
mod rows;
