//! The pure policy of Ares: which task starts where, and why another one still waits.
//!
//! Functions over an immutable view of the state. No clock, no IO, no randomness; floats only while a bandwidth table
//! is built. What is allowed at all (`fit`) is decided once, in `statemachine`, and imported here.

pub mod bandwidth;
mod cache;
pub mod choose;
mod cuts;
mod domains;
pub mod explain;
mod fleet;
pub mod fragmentation;
mod holding;
pub mod line;
pub mod links;
mod machines;
pub mod order;
mod outcome;
pub mod outlook;
pub mod plan;
pub mod points;
pub mod predict;
mod preempt;
pub mod profile;
mod prospects;
mod quota;
mod racks;
pub mod reason;
mod reserve;
pub mod score;
mod seats;
mod selection;
pub mod simulate;
mod survey;
pub mod tables;
mod unplaced;
pub mod why;
mod windows;
pub mod world;

pub use bandwidth::BandwidthTable;
pub use explain::{Explainer, reason_for};
pub use holding::ENDLESS_MS;
pub use outlook::{Outlook, Start};
pub use plan::{Cache, Limits, Plan, Reservation, plan};
pub use reason::Reason;
/// The link facts of a machine, for callers that have no state.
pub use statemachine::record::{Class, Nic, PciClass};
pub use why::{Why, why};
