//! Judges an exported history of a cluster: did each job have at most one committed result, was each GPU in one lease,
//! did tokens and attempts grow, were gangs whole? A small model of its own, which knows the exported events and nothing
//! of the code that wrote them. Reading the file is `read`'s matter, what must hold is `model`'s.
//!
//! A history is JSON, an object a line: first a [`Header`], then the changes of the keyspace in order, as
//! `ares watch / --prefix -o jsonl` prints them. Without a header it is taken as a part that begins somewhere.

mod model;
mod read;

use std::fmt;
use std::io::BufRead;

use serde::{Deserialize, Serialize};

pub use read::{FORMAT, Header, LINE_LIMIT, Unreadable};

/// What a history was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    Holds(Counts),
    Broken(Counterexample),
}

/// What was looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Revisions of the first and the last event; 0 in an empty history.
    pub first_revision: u64,
    pub last_revision: u64,
    /// The history begins with the cluster, or with its last restore: nothing happened before it.
    pub from_the_beginning: bool,
    pub events: u64,
    pub jobs: u64,
    /// Grants seen, and leases that were there before the history began.
    pub grants: u64,
    pub leases_before: u64,
    pub results: u64,
    pub gpus: u64,
    pub lock_tokens: u64,
    /// GPUs that went on from one node of a gang while the rest of its lease was still open: that node had let go, which a
    /// history doesn't show.
    pub handed_on: u64,
}

/// The first thing that must not be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counterexample {
    /// The invariant's name, as in the documentation.
    pub invariant: &'static str,
    /// What happened, in a sentence.
    pub what: String,
    /// The events that show it, in order.
    pub facts: Vec<Fact>,
    /// What that means for whoever owns the job.
    pub meaning: &'static str,
}

/// One event that matters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// From 1.
    pub line: u64,
    pub revision: u64,
    pub text: String,
}

impl fmt::Display for Counterexample {
    /// The story, several lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} ({})", self.what, self.invariant)?;
        for fact in &self.facts {
            writeln!(f, "  revision {}, line {}: {}", fact.revision, fact.line, fact.text)?;
        }
        write!(f, "{}", self.meaning)
    }
}

/// Reads a history to its end, or to the first counterexample.
pub fn judge(history: impl BufRead) -> Result<Judgement, Unreadable> {
    let mut lines = read::Lines::new(history);
    let header = lines.header()?;
    let mut model = model::Model::new(header);
    while let Some(revision) = lines.next_revision()? {
        if let Err(counterexample) = model.take(&revision) {
            return Ok(Judgement::Broken(*counterexample));
        }
    }
    Ok(match model.finish() {
        Ok(counts) => Judgement::Holds(counts),
        Err(counterexample) => Judgement::Broken(*counterexample),
    })
}
