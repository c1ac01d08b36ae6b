//! Real processes under faults: the harness that starts, kills, freezes and restarts them, and the load that remembers
//! what was acknowledged. What must hold afterwards is in `tests/`.

pub mod cluster;
pub mod load;
pub mod process;
