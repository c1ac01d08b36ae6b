//! Experiments on job traces: reading them, drawing from them, filling a cluster until nothing fits, and running the jobs
//! over virtual time. Pure: text in, figures out; files, clocks and printing are the caller's.

pub mod course;
pub mod dice;
mod floor;
pub mod policy;
mod pools;
mod queue;
pub mod saturation;
pub mod trace;
mod turns;
mod waiting;

pub use pools::{Options, run, shares};
