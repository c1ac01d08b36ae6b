//! The Raft tier of the simulation: the real replica, with the real openraft, door, encoding, state machine, image, snapshots and log, on
//! a simulated network and simulated disks, in one thread and in virtual time, driven by a seed. Exists with the feature `simulated`.
//! Clients speak to the replicas' doors: gRPC among the replicas is real, the clients' API is the core tier's and the real processes'.
//!
//! One process runs one seed: some libraries keep counters for the life of a process.

pub mod campaign;
mod checks;
mod clients;
pub mod corpus;
pub mod drive;
pub mod fault;
mod group;
mod ledger;
pub mod sometimes;
mod stand_in;

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use checks::Broken;
use corpus::Corpus;
use drive::Drive;

/// Deep enough for state machine, openraft and gRPC in one thread of an unoptimised build.
const STACK: usize = 64 << 20;

/// What one run showed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    pub seed: u64,
    pub hash: u64,
    pub broken: Option<Broken>,
    /// Simulated time at the end.
    pub at_ms: u64,
    /// Faults that took effect, by kind.
    pub took: BTreeMap<String, u64>,
    pub sometimes: BTreeMap<String, u64>,
    pub acknowledged: u64,
    pub reads: u64,
    /// Requests whose outcome a client did not learn at once.
    pub unknown: u64,
    /// Entries that were committed, and leaders that took office.
    pub entries: u64,
    pub offices: u64,
    pub cpu_ms: u64,
    /// The last events.
    pub tail: String,
}

impl Report {
    /// Of a run that ended without one.
    fn of_failure(seed: u64, invariant: &str, detail: String) -> Self {
        Self {
            seed,
            hash: 0,
            broken: Some(Broken { invariant: invariant.to_owned(), detail }),
            at_ms: 0,
            took: BTreeMap::new(),
            sometimes: BTreeMap::new(),
            acknowledged: 0,
            reads: 0,
            unknown: 0,
            entries: 0,
            offices: 0,
            cpu_ms: 0,
            tail: String::new(),
        }
    }
}

/// Runs one seed with these faults in this process, which must run no other. `root`: an empty directory for the disks, best in memory.
pub fn run(Corpus { seed, faults, .. }: Corpus, root: &Path, loud: bool) -> Report {
    let root = root.to_owned();
    let simulate = move || {
        stand_in::begin(seed);
        let drive = Drive::new(seed, &root, loud);
        drive.map_or_else(|error| Report::of_failure(seed, "harness", error), |drive| drive.run(&faults))
    };
    let thread = std::thread::Builder::new().name(format!("seed {seed}")).stack_size(STACK).spawn(simulate);
    let mut report = match thread.map(std::thread::JoinHandle::join) {
        Ok(Ok(report)) => report,
        Ok(Err(panic)) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Report::of_failure(seed, "no_panic", text.unwrap_or_default())
        }
        Err(error) => Report::of_failure(seed, "harness", error.to_string()),
    };
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    report.cpu_ms = used.tv_sec as u64 * 1_000 + used.tv_nsec as u64 / 1_000_000;
    report
}
