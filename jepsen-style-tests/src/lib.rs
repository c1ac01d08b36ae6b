//! Real processes under faults: the harness that starts, kills, freezes and restarts them and cuts their power, the load
//! that remembers what was acknowledged, and the checks of what must hold afterwards. Single stories are in `tests/`;
//! the long runs, `powercut`, `corrupt`, `replays` and `nemesis`, are started by `run`.

pub mod checks;
pub mod cluster;
pub mod corrupt;
pub mod damage;
pub mod disk;
pub mod faults;
pub mod history;
pub mod hunt;
pub mod ledger;
pub mod linear;
pub mod load;
pub mod lockers;
pub mod models;
pub mod nemesis;
pub mod network;
pub mod powercut;
pub mod process;
#[cfg(feature = "simulated")]
pub mod raft_sim;
pub mod reads;
pub mod replays;
pub mod report;
pub mod resources;
pub mod seeds;
pub mod shrink;
pub mod sim;
pub mod soak;
pub mod verdict;
pub mod watchers;
pub mod work;
