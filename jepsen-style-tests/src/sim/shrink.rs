//! From a failing run to the few faults that it takes: delta debugging over the recorded schedule, then a file that is replayed forever.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Report;
use super::fault::Timed;
use super::setup::Setup;

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

    pub fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Writes `DIR/<invariant>-<hash>.json`.
    pub fn write(&self, dir: &Path) -> io::Result<PathBuf> {
        let mut json = serde_json::to_vec_pretty(self)?;
        json.push(b'\n');
        let path = dir.join(format!("{}-{:08x}.json", self.invariant, xxhash_rust::xxh3::xxh3_64(&json) as u32));
        fs::create_dir_all(dir)?;
        fs::write(&path, json)?;
        Ok(path)
    }

    fn fails(&self) -> bool {
        self.run(false).failure.is_some_and(|failure| failure.invariant == self.invariant)
    }
}

/// The smallest schedule found with at most `runs` runs that still breaks the same invariant.
pub fn shrink(found: &Corpus, runs: usize) -> Corpus {
    let mut left = runs;
    let mut best = found.clone();
    let mut chunks = 2;
    while best.faults.len() > 1 && left > 0 {
        let size = best.faults.len().div_ceil(chunks);
        let mut smaller = None;
        for from in (0..best.faults.len()).step_by(size) {
            let mut faults = best.faults.clone();
            faults.drain(from..(from + size).min(best.faults.len()));
            let candidate = Corpus { faults, ..best.clone() };
            left = left.saturating_sub(1);
            if candidate.fails() {
                smaller = Some(candidate);
                break;
            }
            if left == 0 {
                break;
            }
        }
        match smaller {
            Some(smaller) => {
                best = smaller;
                chunks = (chunks - 1).max(2);
            }
            None if size == 1 => break,
            None => chunks = (chunks * 2).min(best.faults.len()),
        }
    }
    shorten(best, left)
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
