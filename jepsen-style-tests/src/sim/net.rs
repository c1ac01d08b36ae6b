//! The network: who reaches whom, how long it takes, what gets lost.

use std::collections::BTreeMap;

use super::event::Site;
use super::random::Rng;

/// What cuts sites off from each other, until it is lifted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Between the sites of the set and all others: replicas by mask, agents by mask of their number modulo 4.
    Island { replicas: u64, agents: u64 },
    /// What this replica sends to replicas.
    Mute(usize),
    /// Between replicas on two sides only.
    Halves(u64),
    /// Between an agent and one replica.
    Hidden { agent: usize, replica: usize },
    /// Towards an agent.
    Deaf(usize),
    /// From an agent.
    MuteAgent(usize),
    /// Between an agent and all others.
    Parted(usize),
    /// Between users and all replicas but one.
    UsersSee(usize),
}

impl Cut {
    fn holds(&self, from: Site, to: Site) -> bool {
        match *self {
            Cut::Island { replicas, agents } => {
                let inside = |site: Site| match site {
                    Site::Replica(at) => replicas >> at & 1 == 1,
                    Site::Agent(at) => agents >> (at % 4) & 1 == 1,
                    Site::User(at) => at == 0,
                };
                inside(from) != inside(to)
            }
            Cut::Mute(at) => from == Site::Replica(at) && matches!(to, Site::Replica(_)),
            Cut::Halves(mask) => match (from, to) {
                (Site::Replica(a), Site::Replica(b)) => mask >> a & 1 != mask >> b & 1,
                _ => false,
            },
            Cut::Hidden { agent, replica } => {
                let pair = [from, to];
                pair.contains(&Site::Agent(agent)) && pair.contains(&Site::Replica(replica))
            }
            Cut::Deaf(agent) => to == Site::Agent(agent),
            Cut::MuteAgent(agent) => from == Site::Agent(agent),
            Cut::Parted(agent) => [from, to].contains(&Site::Agent(agent)),
            Cut::UsersSee(replica) => match (from, to) {
                (Site::User(_), Site::Replica(at)) | (Site::Replica(at), Site::User(_)) => at != replica,
                _ => false,
            },
        }
    }
}

#[derive(Debug, Default)]
pub struct Net {
    pub cuts: Vec<Cut>,
    pub loss_permille: u64,
    pub duplicate_permille: u64,
    pub extra_ms: u64,
    pub way_us: u64,
    /// What the leader says to these agents takes so many us longer.
    pub slow_words_us: BTreeMap<usize, u64>,
}

impl Net {
    pub fn reaches(&self, from: Site, to: Site) -> bool {
        self.cuts.is_empty() || !self.cuts.iter().any(|cut| cut.holds(from, to))
    }

    /// Both ways.
    pub fn linked(&self, a: Site, b: Site) -> bool {
        self.cuts.is_empty() || (self.reaches(a, b) && self.reaches(b, a))
    }

    /// How long one message takes, in us.
    pub fn way(&self, rng: &mut Rng) -> u64 {
        let base = rng.tail(self.way_us);
        if self.extra_ms == 0 { base } else { base + rng.tail(self.extra_ms * 1_000) }
    }

    pub fn loses(&self, rng: &mut Rng) -> bool {
        self.loss_permille > 0 && rng.chance(self.loss_permille)
    }
}

/// A machine's clocks: they run at a rate of their own, and start somewhere.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    /// Millionths of true time.
    pub rate_ppm: u64,
    pub offset_us: u64,
    /// Of the wall, against true time.
    pub wall_offset_ms: i64,
    /// Time in suspension, which the boot clock counts and the monotonic one does not.
    pub slept_us: u64,
}

impl Clock {
    pub fn new(rng: &mut Rng, drift_ppm: u64) -> Self {
        let rate_ppm = 1_000_000 - drift_ppm + rng.below(2 * drift_ppm + 1);
        Self {
            rate_ppm,
            offset_us: rng.range(1_000_000, 1 << 40),
            wall_offset_ms: rng.range(0, 400) as i64,
            slept_us: 0,
        }
    }

    fn local_us(&self, true_us: u64) -> u64 {
        (u128::from(true_us) * u128::from(self.rate_ppm) / 1_000_000) as u64 + self.offset_us
    }

    pub fn boot_ms(&self, true_us: u64) -> u64 {
        self.local_us(true_us) / 1_000
    }

    pub fn monotonic_ms(&self, true_us: u64) -> u64 {
        (self.local_us(true_us) - self.slept_us) / 1_000
    }

    /// The clock that deadlines are counted by, as the agent's code chooses it.
    pub fn deadline_ms(&self, true_us: u64) -> u64 {
        gpu_agent::clock::of_deadlines(|| self.boot_ms(true_us), || self.monotonic_ms(true_us))
    }

    /// When that clock will show `ms`, in true time.
    pub fn when_deadline(&self, ms: u64) -> u64 {
        let local_us = gpu_agent::clock::of_deadlines(
            || u128::from(ms) * 1_000,
            || u128::from(ms) * 1_000 + u128::from(self.slept_us),
        );
        let since = local_us.saturating_sub(u128::from(self.offset_us));
        u64::try_from((since * 1_000_000).div_ceil(u128::from(self.rate_ppm))).unwrap_or(u64::MAX)
    }

    /// Ms since 1970.
    pub fn wall_ms(&self, true_us: u64) -> i64 {
        EPOCH_MS + (true_us / 1_000) as i64 + self.wall_offset_ms
    }
}

/// Wall time at the beginning of each run: the start of 2026.
pub const EPOCH_MS: i64 = 1_767_225_600_000;
