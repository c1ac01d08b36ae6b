//! The core tier of the simulation: a whole cluster in one thread and in virtual time, driven by a seed. Replicas apply with the real
//! state machine under a Raft oracle; planner, keeper, agents, shims and client retries are the real pure code. What is simulated is
//! what surrounds them: network, clocks, disks, kernels, and which process runs where.

pub mod agent;
pub mod audit;
#[cfg(feature = "planted")]
pub mod bugs;
pub mod campaign;
pub mod desk;
pub mod event;
pub mod fault;
pub mod inject;
pub mod machine;
pub mod net;
pub mod raft;
pub mod random;
pub mod setup;
pub mod shrink;
pub mod sometimes;
pub mod trace;
pub mod users;
pub mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use fault::Timed;
use setup::Setup;
use sometimes::Sometimes;
use trace::Trace;
use world::{Failure, World};

/// What one run showed.
#[derive(Clone, Debug)]
pub struct Report {
    pub setup: Setup,
    pub hash: u64,
    pub failure: Option<Failure>,
    pub sometimes: Sometimes,
    /// Faults that took effect, by kind.
    pub took: BTreeMap<&'static str, u64>,
    pub events: u64,
    pub simulated_ms: u64,
    /// Ranks that began, entries applied, leaders in office.
    pub started: u64,
    pub entries: u64,
    pub offices: u64,
    /// The last events.
    pub tail: String,
}

/// Runs one seed under its own faults, or under the given ones.
pub fn run(setup: &Setup, faults: &[Timed], loud: bool) -> Report {
    watch(World::new(setup.clone(), faults, Trace::new(loud)))
}

/// Runs one seed until one of these invariants breaks, whatever else breaks before. The report has another one's breach if none did.
#[cfg(feature = "planted")]
pub fn run_for(setup: &Setup, faults: &[Timed], looked_for: &'static [&'static str]) -> Report {
    let mut world = World::new(setup.clone(), faults, Trace::new(false));
    world.looked_for = looked_for;
    watch(world)
}

fn watch(mut world: World) -> Report {
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    if let Err(panic) = ended {
        world.failure = Some(failure_of(&*panic, world.now / 1_000));
    }
    Report {
        setup: world.setup.clone(),
        hash: world.trace.hash(),
        failure: world.failure.clone().or(world.passed_over.take()),
        sometimes: world.sometimes.clone(),
        took: world.took.clone(),
        events: world.events,
        simulated_ms: world.now / 1_000,
        started: world.audit.started,
        entries: world.audit.applied,
        offices: world.audit.offices,
        tail: world.trace.tail(),
    }
}

/// The state machine's own checks end a run by a panic that names the invariant.
fn failure_of(panic: &(dyn std::any::Any + Send), at_ms: u64) -> Failure {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
    match text.split_once(" is broken: ") {
        Some((invariant, detail)) => Failure { invariant: invariant.to_owned(), detail: detail.to_owned(), at_ms },
        None => Failure { invariant: "no_panic".to_owned(), detail: text, at_ms },
    }
}

/// The faults of a seed: its swarm, or of these kinds alone.
pub fn faults_of(setup: &Setup, only: &[String]) -> Vec<Timed> {
    fault::draw(setup, only)
}
