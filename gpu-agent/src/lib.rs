//! The worker agent of Ares: what a GPU machine runs.
//!
//! `discovery` says what the machine has; it owns no lease and starts no process. `agent` joins the cluster, takes up
//! attempts and keeps their leases. `shim` is the small process behind each rank, which outlives the agent. `fencing` is for the
//! jobs' own use: files and directories that refuse an older attempt.

pub mod agent;
pub mod clock;
pub mod discovery;
pub mod fencing;
pub mod shim;

pub use agent::{Error, Left, Options, run};
