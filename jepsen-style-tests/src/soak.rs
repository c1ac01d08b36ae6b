//! Hours of the long runs, one round after the other, and the page that sums them up. A round that ended is a line in a file: what is
//! started again goes on behind the last line. The rounds themselves are the callers'.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::verdict::Verdict;

/// The rounds that ended, a line of JSON each.
const ROUNDS: &str = "rounds.jsonl";
/// What they add up to, for people.
const PAGE: &str = "soak.md";

/// What a round runs; its number is its seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Nemesis,
    /// Under a second fault that lasts.
    Pairs,
    Replays,
    PowerCuts,
}

impl Kind {
    /// Half of the rounds are of the nemesis, for it has the most to combine.
    fn of(round: u64) -> Self {
        [Self::Nemesis, Self::Pairs, Self::Replays, Self::Nemesis, Self::Pairs, Self::PowerCuts][(round % 6) as usize]
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Round {
    round: u64,
    kind: Kind,
    ms: u64,
    figures: BTreeMap<String, String>,
    /// Violations, and why it shows nothing.
    wrong: Vec<String>,
    /// Kinds of faults that had no effect in it, and may have in another round.
    idle: BTreeSet<String>,
}

pub struct Plan {
    /// Of rounds, all together.
    pub duration: Duration,
    pub dir: PathBuf,
    /// Number of the first round.
    pub seed: u64,
}

/// Runs rounds until they add up to the duration, or one is wrong; the page's text, and whether none is and each kind of fault had an
/// effect in some round.
///
/// Errors: the directory can't be read or written, or holds a round that is wrong: that is to be looked at first.
pub fn run(plan: &Plan, mut round: impl FnMut(Kind, u64, &Path) -> Verdict) -> Result<(String, bool), String> {
    fs::create_dir_all(&plan.dir).map_err(|error| format!("{}: {error}", plan.dir.display()))?;
    let mut rounds = read(&plan.dir.join(ROUNDS))?;
    if let Some(bad) = rounds.iter().find(|round| !round.wrong.is_empty()) {
        return Err(format!(
            "round {} in {} is wrong: look at it, then soak in another directory",
            bad.round,
            plan.dir.display()
        ));
    }
    while run_ms(&rounds) < plan.duration.as_millis() as u64 {
        let number = rounds.last().map_or(plan.seed, |last| last.round + 1);
        let (kind, began) = (Kind::of(number), Instant::now());
        let verdict = round(kind, number, &plan.dir.join(format!("round-{number}")));
        let ended = Round {
            round: number,
            kind,
            ms: began.elapsed().as_millis() as u64,
            figures: verdict.figures.into_iter().collect(),
            wrong: verdict.violations.into_iter().chain(verdict.empty).collect(),
            idle: verdict.idle.into_iter().collect(),
        };
        append(&plan.dir.join(ROUNDS), &ended)?;
        rounds.push(ended);
        let page = page(&rounds);
        fs::write(plan.dir.join(PAGE), &page).map_err(|error| format!("{PAGE}: {error}"))?;
        if rounds.last().is_some_and(|last| !last.wrong.is_empty()) {
            return Ok((page, false));
        }
    }
    Ok((page(&rounds), never_struck(&rounds).is_empty()))
}

/// Faults that had an effect in no round of the kind.
fn never_struck(rounds: &[Round]) -> Vec<(Kind, String)> {
    let mut idle: BTreeMap<Kind, BTreeSet<String>> = BTreeMap::new();
    for round in rounds {
        let all = idle.entry(round.kind).or_insert_with(|| round.idle.clone());
        all.retain(|what| round.idle.contains(what));
    }
    idle.into_iter().flat_map(|(kind, what)| what.into_iter().map(move |what| (kind, what))).collect()
}

fn run_ms(rounds: &[Round]) -> u64 {
    rounds.iter().map(|round| round.ms).sum()
}

fn read(path: &Path) -> Result<Vec<Round>, String> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("{}: {error}", path.display())),
    };
    let mut rounds = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        rounds.push(serde_json::from_str(line).map_err(|error| format!("{}:{number}: {error}", path.display()))?);
    }
    Ok(rounds)
}

fn append(path: &Path, round: &Round) -> Result<(), String> {
    let write = || {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        writeln!(file, "{}", serde_json::to_string(round)?)?;
        file.sync_all()
    };
    write().map_err(|error| format!("{}: {error}", path.display()))
}

/// What was counted, added up by kind of round.
fn page(rounds: &[Round]) -> String {
    let mut page = String::from("# Soak\n");
    let hours = run_ms(rounds) as f64 / 3_600_000.0;
    let bad = rounds.iter().filter(|round| !round.wrong.is_empty()).count();
    let _ = writeln!(page, "\n{} rounds, {hours:.1} h, {bad} wrong\n", rounds.len());
    let _ = writeln!(page, "| kind | figure | sum |\n|---|---|---|");
    let mut sums: BTreeMap<(String, &str), Option<String>> = BTreeMap::new();
    for round in rounds {
        let kind = format!("{:?}", round.kind);
        let figures = round.figures.iter().map(|(name, text)| (name.as_str(), text.as_str()));
        for (name, text) in figures.chain([("rounds", "1")]) {
            let sum = sums.entry((kind.clone(), name));
            sum.and_modify(|sum| *sum = sum.as_deref().and_then(|sum| added(sum, text)))
                .or_insert(Some(text.to_owned()));
        }
    }
    for ((kind, figure), sum) in sums {
        if let Some(sum) = sum {
            let _ = writeln!(page, "| {kind} | {figure} | {sum} |");
        }
    }
    for round in rounds.iter().filter(|round| !round.wrong.is_empty()) {
        let _ = writeln!(page, "\nRound {} ({:?}): {}", round.round, round.kind, round.wrong.join("; "));
    }
    for round in rounds.iter().filter(|round| !round.idle.is_empty()) {
        let idle: Vec<&str> = round.idle.iter().map(String::as_str).collect();
        let _ = writeln!(page, "\nWithout effect in round {} ({:?}): {}", round.round, round.kind, idle.join(", "));
    }
    for (kind, what) in never_struck(rounds) {
        let _ = writeln!(page, "\nNo round of {kind:?} is evidence for {what}");
    }
    page
}

/// The sum of two such as `3 of 4 took effect`, whole number by whole number; `None` where they differ in anything else.
fn added(one: &str, other: &str) -> Option<String> {
    let (ones, others): (Vec<&str>, Vec<&str>) = (one.split(' ').collect(), other.split(' ').collect());
    if ones.len() != others.len() {
        return None;
    }
    let sums = ones.into_iter().zip(others).map(|(one, other)| {
        let digits = |word: &str| word.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(word.len());
        let ((count, rest), (more, other_rest)) = (one.split_at(digits(one)), other.split_at(digits(other)));
        if count.is_empty() || more.is_empty() || rest != other_rest {
            return (one == other).then(|| one.to_owned());
        }
        Some((count.parse::<u64>().ok()? + more.parse::<u64>().ok()?).to_string() + rest)
    });
    let sums: Option<Vec<String>> = sums.collect();
    sums.map(|words| words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(acknowledged: u64) -> Verdict {
        std::thread::sleep(Duration::from_millis(11));
        Verdict { figures: vec![("acknowledged".to_owned(), acknowledged.to_string())], ..Verdict::default() }
    }

    #[test]
    fn figures_are_added_number_by_number() {
        assert_eq!(added("3 of 4 took effect", "1 of 1 took effect").as_deref(), Some("4 of 5 took effect"));
        assert_eq!(added("88, 50 of them won", "2, 1 of them won").as_deref(), Some("90, 51 of them won"));
        assert_eq!(added("0.5 s", "0.7 s"), None);
        assert_eq!(added("2 jobs", "3 locks"), None);
    }

    #[test]
    fn a_fault_without_effect_in_one_round_may_have_one_in_another() {
        let round = |kind, idle: &[&str]| Round {
            round: 1,
            kind,
            ms: 1,
            figures: BTreeMap::new(),
            wrong: Vec::new(),
            idle: idle.iter().map(|what| (*what).to_owned()).collect(),
        };
        let mut rounds = vec![round(Kind::Nemesis, &["full-disk", "loss"]), round(Kind::Pairs, &[])];
        rounds.push(round(Kind::Nemesis, &["loss"]));
        assert_eq!(never_struck(&rounds), [(Kind::Nemesis, "loss".to_owned())]);
        rounds.push(round(Kind::Nemesis, &[]));
        assert_eq!(never_struck(&rounds), []);
    }

    #[test]
    fn a_soak_goes_on_behind_its_last_round_and_stops_at_one_that_is_not_valid() {
        let dir = tempfile::tempdir().expect("a directory");
        let plan = |ms| Plan { duration: Duration::from_millis(ms), dir: dir.path().to_owned(), seed: 4 };
        let mut seen = Vec::new();
        let (_, valid) = run(&plan(10), |kind, number, _| {
            seen.push((number, kind));
            verdict(7)
        })
        .expect("it runs");
        assert!(valid);
        let (page, valid) = run(&plan(30), |kind, number, _| {
            seen.push((number, kind));
            // One that gave up is no better than one with a violation.
            Verdict { empty: (number == 6).then(|| "lost".to_owned()).into_iter().collect(), ..verdict(7) }
        })
        .expect("it goes on");
        assert!(
            !valid && page.contains("| PowerCuts | acknowledged | 7 |") && page.contains("Round 6 (Nemesis): lost"),
            "{page}"
        );
        assert_eq!(seen, [(4, Kind::Pairs), (5, Kind::PowerCuts), (6, Kind::Nemesis)]);
        assert!(run(&plan(90), |_, _, _| verdict(7)).expect_err("a bad round stays").contains("round 6"));
    }
}
