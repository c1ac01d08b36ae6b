//! Experiments on job traces: reading them, drawing from them, filling a cluster until nothing fits, and running a queue
//! over virtual time. Pure: text in,
//! figures out; files and printing are the caller's.

pub mod dice;
pub mod queue;
pub mod saturation;
pub mod trace;
