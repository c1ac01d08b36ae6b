//! What a process of this tier runs: a seed with its faults; and a failing run's least ones, in a file that is replayed forever.

use serde::{Deserialize, Serialize};

use super::drive::SAFETY_MS;
use super::fault::{self, Fault};
use crate::shrink;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corpus {
    pub seed: u64,
    /// The invariant that was broken when it was found; empty: none was.
    pub invariant: String,
    pub faults: Vec<Fault>,
}

impl Corpus {
    /// The seed's own faults, or those of these kinds.
    pub fn of(seed: u64, only: &[String]) -> Self {
        Self { seed, invariant: String::new(), faults: fault::draw(seed, SAFETY_MS, only) }
    }

    /// The fewest faults found with at most `runs` runs by which `broken` tells of the same invariant.
    pub fn shrink(&self, mut runs: usize, broken: impl Fn(&Self) -> Option<String>) -> Self {
        let with = |faults: &[Fault]| Self { faults: faults.to_vec(), ..self.clone() };
        with(&shrink::least(&self.faults, &mut runs, |faults| broken(&with(faults)).as_ref() == Some(&self.invariant)))
    }
}
