//! discovery

pub mod cpulist;
pub mod matrix;
