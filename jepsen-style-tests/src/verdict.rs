//! What a run says in the end. A run that could not show anything is as bad as one that found something.

use std::fmt;

/// Violations, and reasons for which the run shows nothing.
#[derive(Debug, Default)]
pub struct Verdict {
    /// What must hold and did not, as told by a check.
    pub violations: Vec<String>,
    /// Why the run is no evidence: it did not come to its end, too little load.
    pub empty: Vec<String>,
    /// Kinds of faults that were asked for and never took effect: it is no evidence for these.
    pub idle: Vec<String>,
    /// Figures, in the order in which they are shown.
    pub figures: Vec<(String, String)>,
}

impl Verdict {
    pub fn check(&mut self, outcome: Result<(), String>) {
        self.violations.extend(outcome.err());
    }

    pub fn figure(&mut self, name: impl Into<String>, value: impl fmt::Display) {
        self.figures.push((name.into(), value.to_string()));
    }

    pub fn is_valid(&self) -> bool {
        self.violations.is_empty() && self.empty.is_empty() && self.idle.is_empty()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.figures {
            writeln!(f, "  {name}: {value}")?;
        }
        for violation in &self.violations {
            writeln!(f, "  VIOLATION {violation}")?;
        }
        for reason in &self.empty {
            writeln!(f, "  NO EVIDENCE {reason}")?;
        }
        for kind in &self.idle {
            writeln!(f, "  NO EVIDENCE {kind} never took effect")?;
        }
        f.write_str(if self.is_valid() { "VALID" } else { "INVALID" })
    }
}
