//! The deterministic core of Ares: records, commands, `apply`, the etcd-equivalent keyspace, and the durable image.
//!
//! No clock, no randomness, no hash order here: time and salt ride in each [`command::Entry`]. IO lives in `storage`
//! alone.

pub mod account;
pub mod apply;
pub mod array;
pub mod check;
pub mod command;
pub mod cut;
pub mod domain;
pub mod event;
pub mod fit;
pub mod id;
mod index;
pub mod keyspace;
mod lease;
pub mod preemption;
pub mod record;
pub mod reservation;
mod retry;
pub mod runs;
pub mod selector;
pub mod settings;
pub mod spec;
pub mod state;
pub mod storage;
pub mod table;
mod transition;
mod turns;
pub mod view;

pub use apply::{LEVEL, TooNew};
pub use check::Violation;
pub use command::{Cmd, Code, Command, Entry, Outcome, Rejection, Reply};
pub use event::{Change, Compacted, Event};
pub use id::*;
pub use state::State;
