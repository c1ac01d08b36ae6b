//! The policies by name: which waiting jobs start, and on which machines.

use crate::score::Score;

/// Which waiting jobs of a pool start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// In order of arrival; stops at the first job that does not fit.
    Fifo,
    /// In order of arrival; skips what does not fit.
    FifoSkip,
    /// In order of arrival; the first `depth` jobs that don't fit get protected reservations, and a later job starts
    /// only where it delays none of them.
    Easy { depth: usize },
    /// As `Easy` with one reservation, but in the order that a cluster has inside a tenant (`line`): the response ratio by
    /// the user's ended jobs. Reservations rest on limits, not on guesses.
    ResponseRatio,
    /// `ResponseRatio`, and turns with preemption in a pool in which no job has a limit.
    RatioOrTurns,
}

/// A named pair of both decisions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub name: &'static str,
    pub queue: Queue,
    pub score: Score,
    pub about: &'static str,
}

const fn named(name: &'static str, queue: Queue, score: Score, about: &'static str) -> Policy {
    Policy { name, queue, score, about }
}

impl Policy {
    pub const ALL: [Policy; 11] = [
        named(
            "default",
            Queue::RatioOrTurns,
            Score::LeastLoss,
            "as `ratio`, but turns where no job has a limit; least loss of shared GPUs",
        ),
        named(
            "ratio",
            Queue::ResponseRatio,
            Score::BestFit,
            "response ratio by learned run times with one protected reservation, as a cluster; best fit",
        ),
        named("easy", Queue::Easy { depth: 1 }, Score::BestFit, "arrival with one protected reservation; best fit"),
        named("fifo", Queue::Fifo, Score::BestFit, "arrival, stops at the first that does not fit; best fit"),
        named("fifo-skip", Queue::FifoSkip, Score::BestFit, "arrival, skips what does not fit; best fit"),
        named("first-fit", Queue::FifoSkip, Score::First, "fifo-skip; the first machine with room"),
        named("random", Queue::FifoSkip, Score::Random, "fifo-skip; any machine with room, by the seed"),
        named("best-fit", Queue::FifoSkip, Score::BestFit, "fifo-skip; the fewest cores and GPUs left"),
        named("gpu-packing", Queue::FifoSkip, Score::GpuPacking, "fifo-skip; shared GPUs, then used machines"),
        named("gpu-clustering", Queue::FifoSkip, Score::GpuClustering, "fifo-skip; jobs of one size together"),
        named("fgd", Queue::FifoSkip, Score::Fgd, "fifo-skip; fragmentation gradient descent (ATC '23)"),
    ];

    pub fn by_name(name: &str) -> Option<Policy> {
        Self::ALL.iter().find(|policy| policy.name == name).copied()
    }
}
