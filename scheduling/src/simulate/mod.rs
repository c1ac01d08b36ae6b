//! Experiments on job traces: reading them, drawing from them, and filling a cluster until nothing fits. Pure: text in,
//! figures out; files and printing are the caller's. A run over virtual time is not here yet.

pub mod dice;
pub mod saturation;
pub mod trace;
