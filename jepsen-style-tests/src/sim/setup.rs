//! What a seed says of a run besides its faults: how large the cluster is, what it is asked to do, and how its clocks run.

use super::random::Rng;

/// The derived options of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setup {
    pub seed: u64,
    pub replicas: usize,
    pub agents: usize,
    pub jobs: usize,
    pub gpus: usize,
    /// Length of the safety phase, in ms.
    pub safety_ms: u64,
    /// Faults and submissions come within this time.
    pub busy_ms: u64,
    /// Lease of the jobs, in ms.
    pub ttls_ms: [u64; 2],
    /// Mean of a message's way, in us.
    pub way_us: u64,
    /// How far clock rates may lie from true time, in millionths: two of them differ by at most one in a hundred.
    pub drift_ppm: u64,
    /// Nothing but process groups holds the ranks together.
    pub weak: bool,
    /// A minority of the replicas stays away in the liveness phase.
    pub stays_broken: bool,
    /// Entries after which a replica takes a snapshot, and behind which it needs one.
    pub snapshot_every: u64,
    /// How long request ids are kept, in ms; runs that outlive it send old ones again.
    pub request_keep_ms: u64,
}

impl Setup {
    /// `seconds`: of the safety phase; `None` = 60, and 900 for every sixteenth seed, so that request ids grow old.
    pub fn of(seed: u64, seconds: Option<u64>) -> Self {
        let mut rng = Rng::new(seed, 1);
        let long = rng.chance(60);
        let safety_ms = seconds.map_or(if long { 900_000 } else { 60_000 }, |seconds| seconds * 1_000);
        Self {
            seed,
            replicas: rng.pick(&[3, 3, 3, 4, 5]),
            agents: 20,
            jobs: 200,
            gpus: rng.pick(&[4, 8]),
            safety_ms,
            busy_ms: safety_ms.min(60_000),
            ttls_ms: rng.pick(&[[10_000, 10_000], [10_000, 15_000], [12_000, 30_000]]),
            way_us: rng.pick(&[200, 1_000, 1_000, 5_000]),
            drift_ppm: rng.pick(&[0, 1_000, 4_900]),
            weak: rng.chance(150),
            stays_broken: rng.chance(500),
            snapshot_every: rng.pick(&[50, 200, 1_000]),
            request_keep_ms: if safety_ms > 600_000 { 60_000 } else { 24 * 3_600_000 },
        }
    }
}
