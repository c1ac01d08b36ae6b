//! The deterministic core of Ares: records, commands, `apply`, the etcd-equivalent keyspace, and the durable image.
//!
//! No clock, no randomness, no hash order here: time and salt ride in each [`command::Entry`]. IO lives in `storage`
//! alone.

pub mod command;
pub mod event;
pub mod id;
pub mod record;
pub mod settings;
pub mod spec;
pub mod state;
pub mod storage;
pub mod table;

pub use command::{Cmd, Code, Command, Entry, Outcome, Rejection, Reply};
pub use id::*;
pub use state::State;
