//! A scheduler replica: openraft, the log, the APIs, and the loops that only the leader runs.

#![cfg_attr(feature = "simulated", allow(dead_code, reason = "the threads are the simulator's"))]

#[cfg(all(feature = "simulated", not(debug_assertions)))]
compile_error!("simulated sockets and disks are for builds with debug assertions: no release build may hold them");

pub mod api;
pub mod backup;
pub mod door;
pub mod identity;
pub mod leader;
pub mod log;
pub mod members;
pub mod office;
mod peers;
pub mod raft;
pub mod read;
mod recovery;
pub mod replica;
mod runtime;
pub mod server;
#[cfg(feature = "simulated")]
pub mod simulated;
#[cfg(not(feature = "simulated"))]
mod sockets;
#[cfg(feature = "simulated")]
use simulated::sockets;
