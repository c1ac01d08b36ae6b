//! A failing run's least schedule, and the file that is replayed forever.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Report;
use super::fault::Timed;
use super::setup::Setup;
use crate::shrink;

/// A failure that was found once: what it takes to find it again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Corpus {
    pub seed: u64,
    /// Length of the safety phase.
    pub seconds: u64,
    pub jobs: usize,
    pub agents: usize,
    /// The invariant that was broken when it was found.
    pub invariant: String,
    pub faults: Vec<Timed>,
}

impl Corpus {
    pub fn setup(&self) -> Setup {
        let setup = Setup::of(self.seed, Some(self.seconds));
        Setup { jobs: self.jobs, agents: self.agents, ..setup }
    }

    pub fn run(&self, loud: bool) -> Report {
        super::run(&self.setup(), &self.faults, loud)
    }

    /// Keeps it in a file of this directory.
    pub fn write(&self, dir: &Path) -> io::Result<PathBuf> {
        shrink::keep(self, &self.invariant, dir)
    }

    fn fails(&self) -> bool {
        self.run(false).failure.is_some_and(|failure| failure.invariant == self.invariant)
    }
}

/// The smallest schedule found with at most `runs` runs that still breaks the same invariant.
pub fn shrink(found: &Corpus, runs: usize) -> Corpus {
    let mut left = runs;
    let faults =
        shrink::least(&found.faults, &mut left, |faults| Corpus { faults: faults.to_vec(), ..found.clone() }.fails());
    shorten(Corpus { faults, ..found.clone() }, left)
}

/// Less time, fewer jobs.
fn shorten(mut best: Corpus, mut left: usize) -> Corpus {
    for half in [true, false] {
        while left > 0 {
            let candidate = if half {
                Corpus { seconds: best.seconds * 3 / 4, ..best.clone() }
            } else {
                Corpus { jobs: best.jobs * 3 / 4, ..best.clone() }
            };
            left -= 1;
            if candidate.seconds < 5 || candidate.jobs < 5 || !candidate.fails() {
                break;
            }
            best = candidate;
        }
    }
    best
}
