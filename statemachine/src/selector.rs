//! Which machines a job may be on, by their labels and names.
//!
//! What counts is what a machine says of itself when the job is placed: labels that change later move nothing that runs.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::record::Node;
use crate::spec::Shape;

/// Bytes of a constraint's text.
const BYTES: usize = 1_024;
/// Terms of a constraint, over all its alternatives.
const TERMS: usize = 16;
/// Names of machines in both lists together.
const NAMES: usize = 128;

/// All three must let a machine in.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Selector {
    pub constraint: Constraint,
    /// Only these machines, by name; empty = all.
    pub only: BTreeSet<String>,
    /// None of these.
    pub without: BTreeSet<String>,
}

/// Alternatives, each of terms that all hold; empty = any labels will do.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Constraint(Vec<Vec<Term>>);

/// What it says of one label.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
enum Term {
    /// The machine has it, whatever its value.
    Has(String),
    Is(String, String),
    /// It has another value, or the machine lacks it.
    IsNot(String, String),
}

impl Term {
    fn holds(&self, node: &Node) -> bool {
        match self {
            Term::Has(key) => node.labels.contains_key(key),
            Term::Is(key, value) => node.labels.get(key) == Some(value),
            Term::IsNot(key, value) => node.labels.get(key) != Some(value),
        }
    }
}

impl Constraint {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn holds(&self, node: &Node) -> bool {
        self.is_empty() || self.0.iter().any(|terms| terms.iter().all(|term| term.holds(node)))
    }
}

/// Terms are `KEY=VALUE`, `KEY!=VALUE` or `KEY`; `&` joins them, and binds closer than `|`.
impl FromStr for Constraint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        if text.len() > BYTES {
            return Err(format!("{} bytes, the limit is {BYTES}", text.len()));
        }
        let alternative = |text: &str| text.split('&').map(|term| term.trim().parse()).collect();
        let alternatives = text.split('|').map(alternative).collect::<Result<Vec<Vec<Term>>, String>>()?;
        let constraint = Self(alternatives);
        constraint.wrong().map_or(Ok(constraint), Err)
    }
}

impl Constraint {
    fn wrong(&self) -> Option<String> {
        let terms = self.0.iter().fold(0usize, |sum, terms| sum.saturating_add(terms.len()));
        let bytes = self.to_string().len();
        if terms > TERMS {
            return Some(format!("{terms} terms, the limit is {TERMS}"));
        }
        if bytes > BYTES {
            return Some(format!("{bytes} bytes, the limit is {BYTES}"));
        }
        // An empty alternative would let in every machine.
        self.0.iter().any(Vec::is_empty).then(|| "an alternative has no term".to_owned())
    }
}

impl FromStr for Term {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value, is) = match text.split_once('=') {
            None => (text, None, true),
            Some((key, value)) => match key.strip_suffix('!') {
                Some(key) => (key, Some(value), false),
                None => (key, Some(value), true),
            },
        };
        let named = |text: &str| !text.is_empty() && !text.contains(['!', '=']) && !text.chars().any(char::is_control);
        let (key, value) = (key.trim(), value.map(str::trim));
        if !named(key) || value.is_some_and(|value| !named(value)) {
            return Err(format!(
                "term {text:?} is none of KEY=VALUE, KEY!=VALUE and KEY; & joins terms, | alternatives"
            ));
        }
        let key = key.to_owned();
        Ok(match value {
            None => Term::Has(key),
            Some(value) if is => Term::Is(key, value.to_owned()),
            Some(value) => Term::IsNot(key, value.to_owned()),
        })
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Term::Has(key) => f.write_str(key),
            Term::Is(key, value) => write!(f, "{key}={value}"),
            Term::IsNot(key, value) => write!(f, "{key}!={value}"),
        }
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, terms) in self.0.iter().enumerate() {
            f.write_str(if nth > 0 { "|" } else { "" })?;
            for (nth, term) in terms.iter().enumerate() {
                write!(f, "{}{term}", if nth > 0 { "&" } else { "" })?;
            }
        }
        Ok(())
    }
}

impl Selector {
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    pub fn allows(&self, node: &Node) -> bool {
        self.refusal(node).is_none()
    }

    /// Which of the three keeps a machine out. The planner asks this of each machine: so it is no text of its own.
    pub fn refusal(&self, node: &Node) -> Option<&'static str> {
        if self.without.contains(&node.name) {
            return Some("the job excludes it");
        }
        if !self.only.is_empty() && !self.only.contains(&node.name) {
            return Some("it is none of those that the job names");
        }
        (!self.constraint.holds(node)).then_some("the job's constraint does not hold")
    }

    /// What is wrong with it, for a gang of so many machines.
    pub(crate) fn wrong(&self, nodes: u16) -> Option<String> {
        let names = self.only.len().saturating_add(self.without.len());
        if names > NAMES {
            return Some(format!("shape.nodelist and shape.exclude have {names} names, the limit is {NAMES}"));
        }
        if let Some(both) = self.only.intersection(&self.without).next() {
            return Some(format!("shape.nodelist and shape.exclude both name {:?}", crate::lease::clip(both)));
        }
        if !self.only.is_empty() && self.only.len() < usize::from(nodes) {
            let named = self.only.len();
            return Some(format!(
                "shape.nodelist has {named} names, shape.nodes is {nodes}: it must name as many or more"
            ));
        }
        self.constraint.wrong().map(|what| format!("shape.constraint has {what}"))
    }
}

impl Shape {
    /// The job may be on this machine.
    pub fn allows(&self, node: &Node) -> bool {
        self.machines.as_ref().is_none_or(|selector| selector.allows(node))
    }
}

/// As the options that say it: "--constraint rack=r1 --exclude n2".
impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |names: &BTreeSet<String>| names.iter().map(String::as_str).collect::<Vec<_>>().join(",");
        let options = [
            ("--constraint", self.constraint.to_string()),
            ("--nodelist", names(&self.only)),
            ("--exclude", names(&self.without)),
        ];
        let given = options.iter().filter(|(_, value)| !value.is_empty());
        let told: Vec<String> = given.map(|(option, value)| format!("{option} {value}")).collect();
        f.write_str(&told.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_constraint_is_read_as_it_is_written() {
        for text in ["rack=r1", "ssd", "rack!=r1", "rack=r1&ssd", "zone=a&rack!=r1|zone=b&ssd|x"] {
            assert_eq!(text.parse::<Constraint>().map(|it| it.to_string()), Ok(text.to_owned()));
        }
        assert_eq!(" rack = r1 & ssd | x ".parse::<Constraint>().map(|it| it.to_string()), Ok("rack=r1&ssd|x".into()));
        assert!("".parse::<Constraint>().is_ok_and(|it| it.is_empty()));
        for wrong in ["=r1", "rack=", "rack!=", "a=b=c", "&", "a&", "a||b", "|a", "!rack", "a==b", "a&&b"] {
            let told = wrong.parse::<Constraint>().unwrap_err();
            assert!(told.contains("is none of KEY=VALUE, KEY!=VALUE and KEY"), "{wrong}: {told}");
        }
        let many = vec!["a"; TERMS + 1];
        assert_eq!(many.join("|").parse::<Constraint>(), Err("17 terms, the limit is 16".into()));
        assert!(many[1..].join("&").parse::<Constraint>().is_ok());
        let long = "x".repeat(BYTES + 1);
        assert_eq!(long.parse::<Constraint>(), Err("1025 bytes, the limit is 1024".into()));
    }

    #[test]
    fn a_selector_is_told_by_its_options() {
        let selector = Selector {
            constraint: "rack=r1|ssd".parse().expect("a constraint"),
            only: ["a".into(), "b".into()].into(),
            without: ["c".into()].into(),
        };
        assert_eq!(selector.to_string(), "--constraint rack=r1|ssd --nodelist a,b --exclude c");
    }
}
