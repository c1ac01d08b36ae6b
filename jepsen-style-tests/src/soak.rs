//! Hours of the long runs, one round after the other, and the page that sums them up. A round that ended is a line in a file: what is
//! started again goes on behind the last line. The rounds themselves are the callers'.

use std::collections::BTreeMap;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    valid: bool,
    figures: BTreeMap<String, String>,
    /// Violations, and why it shows nothing.
    wrong: Vec<String>,
}

pub struct Plan {
    /// Of rounds, all together.
    pub duration: Duration,
    pub dir: PathBuf,
    /// Number of the first round.
    pub seed: u64,
}

/// Runs rounds until they add up to the duration, or one is not valid; the page's text, and whether all are valid.
///
/// Errors: the directory can't be read or written, or holds a round that was not valid: that is to be looked at first.
pub fn run(plan: &Plan, mut round: impl FnMut(Kind, u64, &Path) -> Verdict) -> Result<(String, bool), String> {
    fs::create_dir_all(&plan.dir).map_err(|error| format!("{}: {error}", plan.dir.display()))?;
    let mut rounds = read(&plan.dir.join(ROUNDS))?;
    if let Some(bad) = rounds.iter().find(|round| !round.valid) {
        return Err(format!(
            "round {} in {} was not valid: look at it, then soak in another directory",
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
            valid: verdict.is_valid(),
            figures: verdict.figures.into_iter().collect(),
            wrong: verdict.violations.into_iter().chain(verdict.empty).collect(),
        };
        append(&plan.dir.join(ROUNDS), &ended)?;
        rounds.push(ended);
        let page = page(&rounds);
        fs::write(plan.dir.join(PAGE), &page).map_err(|error| format!("{PAGE}: {error}"))?;
        if rounds.last().is_some_and(|last| !last.valid) {
            return Ok((page, false));
        }
    }
    Ok((page(&rounds), true))
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

/// Figures that are numbers are added up, by kind.
fn page(rounds: &[Round]) -> String {
    let mut page = String::from("# Soak\n");
    let hours = run_ms(rounds) as f64 / 3_600_000.0;
    let bad = rounds.iter().filter(|round| !round.valid).count();
    let _ = writeln!(page, "\n{} rounds, {hours:.1} h, {bad} not valid\n", rounds.len());
    let _ = writeln!(page, "| kind | figure | sum |\n|---|---|---|");
    let mut sums: BTreeMap<(String, &str), u64> = BTreeMap::new();
    for round in rounds {
        let kind = format!("{:?}", round.kind);
        *sums.entry((kind.clone(), "rounds")).or_default() += 1;
        for (name, value) in &round.figures {
            if let Ok(number) = value.parse::<u64>() {
                *sums.entry((kind.clone(), name)).or_default() += number;
            }
        }
    }
    for ((kind, figure), sum) in sums {
        let _ = writeln!(page, "| {kind} | {figure} | {sum} |");
    }
    for round in rounds.iter().filter(|round| !round.valid) {
        let _ = writeln!(page, "\nRound {} ({:?}): {}", round.round, round.kind, round.wrong.join("; "));
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(acknowledged: u64) -> Verdict {
        std::thread::sleep(Duration::from_millis(11));
        Verdict { figures: vec![("acknowledged".to_owned(), acknowledged.to_string())], ..Verdict::default() }
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
            Verdict { violations: (number == 6).then(|| "lost".to_owned()).into_iter().collect(), ..verdict(7) }
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
