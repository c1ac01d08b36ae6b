//! What jobs did, as they wrote it themselves into files outside all faults: `start`, a `beat` each 200 ms, `end` in a ledger that records
//! all and refuses nothing, so that it shows two attempts that were alive at once; and effects behind a fence for each job, that an
//! older attempt can't pass. The checks are pure.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::process;

/// Beats by which a machine's next rank goes on longer.
const STAGGER: u32 = 8;
/// Of each attempt that ran to its end.
const EFFECTS: usize = 2;
/// From one beat of a rank to the next.
pub const BEAT: Duration = Duration::from_millis(200);

/// Where the jobs of a run write.
#[derive(Clone, Debug)]
pub struct Sink {
    ledger: PathBuf,
    /// A file of effects for each job.
    effects: PathBuf,
    /// What power cuts left of the agents' fence files.
    fences: PathBuf,
}

/// What an agent's fence file held when its power was back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceLeft {
    pub node: String,
    /// Of the machine's uptime, read just before the cut.
    pub cut_ms: u64,
    /// The highest token that was started there; 0 = there was no file, or a damaged one.
    pub max_token: u64,
}

impl Sink {
    pub fn of(out: &Path) -> Self {
        Self { ledger: out.join("ledger"), effects: out.join("effects"), fences: out.join("fences.json") }
    }

    /// One that nobody wrote to.
    pub fn empty(out: &Path) -> Result<Self, String> {
        let sink = Self::of(out);
        let _ = fs::remove_file(&sink.ledger);
        let _ = fs::remove_file(&sink.fences);
        let _ = fs::remove_dir_all(&sink.effects);
        fs::create_dir_all(&sink.effects).map_err(|error| format!("{}: {error}", sink.effects.display()))?;
        Ok(sink)
    }

    /// A shell script that writes to it for `beats` x 200 ms, the second rank of a machine for longer than the first; its first rank has an effect at the start and one at the end, and ends
    /// with the code of a refusal if a later attempt came. One line is one append, below the size up to which appends don't mix.
    pub fn script(&self, beats: u32) -> String {
        format!(
            "f='{}'; e='{}'/$ARES_JOB_ID; say() {{ read -r up _ < /proc/uptime; \
             echo \"$1 $ARES_JOB_ID $ARES_ATTEMPT $RANK $ARES_FENCING_TOKEN $up $ARES_NODE:$CUDA_VISIBLE_DEVICES\" >> \"$f\"; }}; \
             act() {{ [ $RANK != 0 ] || '{}' fence run \"$e\" -- \
             sh -c \"echo $1 $ARES_ATTEMPT $ARES_FENCING_TOKEN >> '$e'\" || exit $?; }}; \
             say start; act 1; i=0; while [ $i -lt $(({beats} + {STAGGER} * LOCAL_RANK)) ]; do sleep 0.2; say beat; i=$((i+1)); done; act 2; say end",
            self.ledger.display(),
            self.effects.display(),
            process::ares().display(),
        )
    }

    /// Keeps what the power cuts of the run left, to be judged with what the jobs wrote.
    pub fn keep(&self, fences: &[FenceLeft]) -> Result<(), String> {
        let text = serde_json::to_vec(fences).map_err(|error| error.to_string())?;
        fs::write(&self.fences, text).map_err(|error| format!("{}: {error}", self.fences.display()))
    }

    pub fn read(&self) -> Result<Ledger, String> {
        let text = match fs::read_to_string(&self.ledger) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(format!("{}: {error}", self.ledger.display())),
        };
        let lines: Result<Vec<Line>, String> = text.lines().map(parse).collect();
        let mut ledger = Ledger::of(&lines?);
        let wrong = |error: std::io::Error| format!("{}: {error}", self.effects.display());
        for entry in fs::read_dir(&self.effects).map_err(wrong)? {
            let entry = entry.map_err(wrong)?;
            let Some(job) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let text = fs::read_to_string(entry.path()).map_err(wrong)?;
            ledger.effects.insert(job, text.lines().map(parse_effect).collect::<Result<_, _>>()?);
        }
        if let Ok(text) = fs::read(&self.fences) {
            ledger.fences =
                serde_json::from_slice(&text).map_err(|error| format!("{}: {error}", self.fences.display()))?;
        }
        Ok(ledger)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Start,
    Beat,
    End,
}

/// One line of a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub what: What,
    pub job: u64,
    pub attempt: u32,
    pub rank: u32,
    pub token: u64,
    /// Of the machine's uptime, read just before the line was written.
    pub at_ms: u64,
    pub node: String,
    /// Each with its node's name before it.
    pub gpus: Vec<String>,
}

/// One attempt of a job, over all its ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Life {
    token: u64,
    first_ms: u64,
    last_ms: u64,
    ends: u32,
}

/// A result that the cluster committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    pub attempt: u32,
    pub token: u64,
}

/// One effect of a job, as it passed the fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effect {
    /// 1 at the start, 2 at the end.
    pub number: u32,
    pub attempt: u32,
    pub token: u64,
}

/// Job, attempt and rank.
type Who = (u64, u32, u32);

/// All lines of a run.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// First and last line of each rank that had a GPU, by GPU and then by (job, attempt, rank).
    held: BTreeMap<String, BTreeMap<Who, (u64, u64)>>,
    /// By job, in the order in which they passed.
    effects: BTreeMap<u64, Vec<Effect>>,
    lives: BTreeMap<u64, BTreeMap<u32, Life>>,
    /// Two ranks of one attempt must carry the same token.
    mixed: Vec<String>,
    /// Token and time of each rank's start, by node.
    starts: BTreeMap<String, Vec<(u64, u64)>>,
    fences: Vec<FenceLeft>,
}

impl Ledger {
    pub fn of(lines: &[Line]) -> Self {
        let mut ledger = Self::default();
        for line in lines {
            let new = Life { token: line.token, first_ms: line.at_ms, last_ms: line.at_ms, ends: 0 };
            let life = ledger.lives.entry(line.job).or_default().entry(line.attempt).or_insert(new);
            if life.token != line.token {
                ledger.mixed.push(format!(
                    "attempt {} of job {} ran with tokens {} and {}",
                    line.attempt, line.job, life.token, line.token
                ));
            }
            life.first_ms = life.first_ms.min(line.at_ms);
            life.last_ms = life.last_ms.max(line.at_ms);
            life.ends += u32::from(line.what == What::End);
            if line.what == What::Start {
                ledger.starts.entry(line.node.clone()).or_default().push((line.token, line.at_ms));
            }
            for gpu in &line.gpus {
                let ranks = ledger.held.entry(gpu.clone()).or_default();
                let held = ranks.entry((line.job, line.attempt, line.rank)).or_insert((line.at_ms, line.at_ms));
                *held = (held.0.min(line.at_ms), held.1.max(line.at_ms));
            }
        }
        ledger
    }

    /// Attempts that wrote anything.
    pub fn attempts(&self) -> usize {
        self.lives.values().map(BTreeMap::len).sum()
    }

    /// Effects that passed a fence.
    pub fn effects(&self) -> usize {
        self.effects.values().map(Vec::len).sum()
    }

    /// The last attempt of a job that wrote anything.
    pub fn last_attempt(&self, job: u64) -> Option<u32> {
        self.lives.get(&job)?.last_key_value().map(|(attempt, _)| *attempt)
    }

    /// Behind a fence nothing of an older attempt follows a later one's, and no effect of an attempt is there twice.
    pub fn effects_fenced(&self) -> Result<(), String> {
        for (job, effects) in &self.effects {
            for two in effects.windows(2) {
                let (old, new) = (two[0], two[1]);
                if new.token < old.token || new.token == old.token && new.number <= old.number {
                    return Err(format!("token_grows: behind the fence of job {job} came {new:?} after {old:?}"));
                }
            }
        }
        Ok(())
    }

    /// `one_attempt_alive`: no attempt writes before the last line of an earlier one of the same job.
    pub fn one_attempt_alive(&self) -> Result<(), String> {
        self.each_next(|job, (before, old), (after, new)| {
            (new.first_ms < old.last_ms).then(|| {
                format!(
                    "one_attempt_alive: attempt {after} of job {job} began at {} ms, attempt {before} still wrote at {} ms",
                    new.first_ms, old.last_ms
                )
            })
        })
    }

    /// Power cuts of agents' disks.
    pub fn power_cuts(&self) -> usize {
        self.fences.len()
    }

    /// `fence_kept`: what had started before its machine's power was cut, the fence file on the machine's disk knows.
    pub fn fence_kept(&self) -> Result<(), String> {
        for left in &self.fences {
            let starts = self.starts.get(&left.node).map(Vec::as_slice).unwrap_or_default();
            let before = starts.iter().filter(|(_, at_ms)| *at_ms < left.cut_ms).max();
            if let Some((token, at_ms)) = before.filter(|(token, _)| *token > left.max_token) {
                return Err(format!(
                    "fence_kept: token {token} started on {} at {at_ms} ms, its power was cut at {} ms, and its fence file knows none above {}",
                    left.node, left.cut_ms, left.max_token
                ));
            }
        }
        Ok(())
    }

    /// GPUs that any rank had.
    pub fn gpus(&self) -> usize {
        self.held.len()
    }

    /// `gpu_in_one_lease`: no two ranks had one GPU at one time.
    pub fn gpu_in_one_lease(&self) -> Result<(), String> {
        for (gpu, ranks) in &self.held {
            let mut spans: Vec<_> = ranks.iter().map(|(who, span)| (*span, *who)).collect();
            spans.sort_unstable();
            for two in spans.windows(2) {
                let (((_, until), old), ((from, _), new)) = (two[0], two[1]);
                if from < until {
                    return Err(format!(
                        "gpu_in_one_lease: {gpu} was of rank {} of job {} (attempt {}) until {until} ms and of rank {} of job {} (attempt {}) from {from} ms",
                        old.2, old.0, old.1, new.2, new.0, new.1
                    ));
                }
            }
        }
        Ok(())
    }

    /// `token_grows`: a later attempt has a higher token, an attempt has one token, and no two attempts share one.
    pub fn token_grows(&self) -> Result<(), String> {
        if let Some(mixed) = self.mixed.first() {
            return Err(format!("token_grows: {mixed}"));
        }
        let mut owners = BTreeMap::new();
        for (job, attempts) in &self.lives {
            for (attempt, life) in attempts {
                if let Some((other, its)) = owners.insert(life.token, (*job, *attempt)) {
                    return Err(format!(
                        "token_grows: token {} was of attempt {its} of job {other} and of attempt {attempt} of job {job}",
                        life.token
                    ));
                }
            }
        }
        self.each_next(|job, (before, old), (after, new)| {
            (new.token <= old.token).then(|| {
                format!(
                    "token_grows: attempt {after} of job {job} has token {}, attempt {before} had {}",
                    new.token, old.token
                )
            })
        })
    }

    /// `result_once`: the success that was committed is that of an attempt whose ranks all wrote their end with the
    /// token of the result, and nothing ran after it.
    pub fn committed_ran(&self, job: u64, ranks: u32, committed: Committed) -> Result<(), String> {
        let lives = self.lives.get(&job);
        let life = lives.and_then(|lives| lives.get(&committed.attempt));
        let life = life.ok_or_else(|| {
            format!("result_once: attempt {} of job {job} was committed and never ran", committed.attempt)
        })?;
        if life.token != committed.token || life.ends != ranks {
            return Err(format!(
                "result_once: job {job} was committed with token {}, its attempt {} ran with token {} and wrote {} of {ranks} ends",
                committed.token, committed.attempt, life.token, life.ends
            ));
        }
        let passed =
            self.effects.get(&job).map_or(0, |all| all.iter().filter(|one| one.token == committed.token).count());
        if passed != EFFECTS {
            return Err(format!(
                "result_once: job {job} was committed, and {passed} of {EFFECTS} effects of its attempt passed the fence"
            ));
        }
        match lives.and_then(|lives| lives.last_key_value()) {
            Some((last, _)) if *last > committed.attempt => Err(format!(
                "result_once: job {job} was committed by attempt {}, attempt {last} ran too",
                committed.attempt
            )),
            _ => Ok(()),
        }
    }

    /// The first finding over neighbouring attempts of a job.
    fn each_next(&self, wrong: impl Fn(u64, (u32, Life), (u32, Life)) -> Option<String>) -> Result<(), String> {
        for (job, attempts) in &self.lives {
            let mut before: Option<(u32, Life)> = None;
            for (attempt, life) in attempts {
                if let Some(found) = before.and_then(|before| wrong(*job, before, (*attempt, *life))) {
                    return Err(found);
                }
                // The widest reach of all earlier attempts counts, not only the last one's.
                let reach = before.map_or(0, |(_, old)| old.last_ms).max(life.last_ms);
                before = Some((*attempt, Life { last_ms: reach, ..*life }));
            }
        }
        Ok(())
    }
}

fn parse(line: &str) -> Result<Line, String> {
    let wrong = || format!("a line of the ledger is no line: {line:?}");
    let words: Vec<&str> = line.split(' ').collect();
    let &[what, job, attempt, rank, token, at, place] = words.as_slice() else { return Err(wrong()) };
    let what = match what {
        "start" => What::Start,
        "beat" => What::Beat,
        "end" => What::End,
        _ => return Err(wrong()),
    };
    let (seconds, hundredths) = at.split_once('.').ok_or_else(wrong)?;
    let (node, gpus) = place.split_once(':').ok_or_else(wrong)?;
    let gpus = gpus.split(',').filter(|gpu| !gpu.is_empty()).map(|gpu| format!("{node}:{gpu}")).collect();
    let number = |text: &str| text.parse::<u64>().map_err(|_| wrong());
    let small = |text: &str| text.parse::<u32>().map_err(|_| wrong());
    Ok(Line {
        what,
        job: number(job)?,
        attempt: small(attempt)?,
        rank: small(rank)?,
        token: number(token)?,
        at_ms: number(seconds)? * 1_000 + number(hundredths)? * 10,
        node: node.to_owned(),
        gpus,
    })
}

fn parse_effect(line: &str) -> Result<Effect, String> {
    let words: Vec<&str> = line.split(' ').collect();
    let parsed = match words.as_slice() {
        [number, attempt, token] => number.parse().ok().zip(attempt.parse().ok()).zip(token.parse().ok()),
        _ => None,
    };
    let ((number, attempt), token) = parsed.ok_or_else(|| format!("{line:?} is no effect"))?;
    Ok(Effect { number, attempt, token })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn life(job: u64, attempt: u32, token: u64, times_ms: std::ops::RangeInclusive<u64>, end: bool) -> Vec<Line> {
        let gpus = vec!["n1:0".to_owned()];
        let line =
            |what, at_ms| Line { what, job, attempt, rank: 0, token, at_ms, node: "n1".to_owned(), gpus: gpus.clone() };
        let mut lines = vec![line(What::Start, *times_ms.start())];
        lines.extend(times_ms.clone().step_by(200).map(|at| line(What::Beat, at)));
        lines.push(line(if end { What::End } else { What::Beat }, *times_ms.end()));
        lines
    }

    fn good() -> Vec<Line> {
        let mut lines = life(1, 1, 10, 1_000..=3_000, false);
        lines.extend(life(2, 1, 11, 1_500..=2_500, true));
        lines.extend(life(1, 2, 12, 3_010..=5_000, true));
        lines
    }

    fn with_effects(lines: &[Line]) -> Ledger {
        let mut ledger = Ledger::of(lines);
        let effect = |number, attempt, token| Effect { number, attempt, token };
        ledger.effects.insert(1, vec![effect(1, 1, 10), effect(1, 2, 12), effect(2, 2, 12)]);
        ledger.effects.insert(2, vec![effect(1, 1, 11), effect(2, 1, 11)]);
        ledger
    }

    #[test]
    fn an_effect_of_an_older_attempt_or_a_second_one_is_found() {
        let good = with_effects(&good());
        good.effects_fenced().expect("in order");
        for late in [Effect { number: 2, attempt: 1, token: 10 }, Effect { number: 2, attempt: 2, token: 12 }] {
            let mut ledger = good.clone();
            ledger.effects.get_mut(&1).expect("it has some").push(late);
            ledger.effects_fenced().expect_err("it must not pass");
        }
        let mut ledger = good;
        ledger.effects.insert(2, vec![Effect { number: 1, attempt: 1, token: 11 }]);
        ledger.committed_ran(2, 1, Committed { attempt: 1, token: 11 }).expect_err("its end had no effect");
        assert_eq!(parse_effect("2 1 11"), Ok(Effect { number: 2, attempt: 1, token: 11 }));
        parse_effect("2 1").expect_err("no effect");
    }

    #[test]
    fn a_good_ledger_passes() {
        let ledger = with_effects(&good());
        assert_eq!(ledger.attempts(), 3);
        ledger.one_attempt_alive().expect("apart");
        ledger.token_grows().expect("grows");
        ledger.committed_ran(1, 1, Committed { attempt: 2, token: 12 }).expect("it ran");
    }

    #[test]
    fn two_attempts_at_once_are_found_whichever_wrote_first() {
        for late in [life(1, 1, 10, 3_020..=3_020, false), life(1, 1, 10, 4_900..=9_000, false)] {
            let mut lines = good();
            lines.extend(late);
            let found = Ledger::of(&lines).one_attempt_alive().expect_err("attempt 1 lives on");
            assert!(found.contains("attempt 2 of job 1"), "{found}");
        }
        // An attempt that outlives its successor still counts against the one after that.
        let mut lines = good();
        lines.extend(life(2, 2, 13, 2_600..=2_700, false));
        lines.extend(life(2, 3, 14, 2_800..=2_900, false));
        Ledger::of(&lines).one_attempt_alive().expect("apart");
        lines.extend(life(2, 1, 11, 2_850..=2_850, false));
        Ledger::of(&lines).one_attempt_alive().expect_err("attempt 1 lives on");
    }

    #[test]
    fn a_gpu_of_two_ranks_at_once_is_found() {
        let apart = [life(1, 1, 10, 1_000..=3_000, true), life(2, 1, 11, 3_000..=4_000, true)].concat();
        Ledger::of(&apart).gpu_in_one_lease().expect("one after the other");
        let found = Ledger::of(&good()).gpu_in_one_lease().expect_err("jobs 1 and 2");
        assert!(found.contains("n1:0 was of rank 0 of job 1"), "{found}");
    }

    #[test]
    fn a_start_that_the_fence_forgot_is_found() {
        // Tokens 10, 11 and 12 start at 1,000, 1,500 and 3,010 ms.
        let left = |cut_ms, max_token| Ledger {
            fences: vec![FenceLeft { node: "n1".to_owned(), cut_ms, max_token }],
            ..Ledger::of(&good())
        };
        left(3_010, 11).fence_kept().expect("token 12 came later");
        left(9_000, 12).fence_kept().expect("all are known");
        left(1_000, 0).fence_kept().expect("nothing had started");
        let found = left(3_011, 11).fence_kept().expect_err("token 12 is forgotten");
        assert!(found.contains("token 12 started on n1"), "{found}");
    }

    #[test]
    fn a_token_that_does_not_grow_or_is_used_twice_is_found() {
        let with = |more: Vec<Line>| Ledger::of(&[good(), more].concat()).token_grows();
        with(life(2, 2, 9, 4_000..=4_100, true)).expect_err("lower than before");
        with(life(2, 2, 12, 4_000..=4_100, true)).expect_err("another job's");
        with(life(2, 1, 13, 2_000..=2_100, true)).expect_err("a second one in an attempt");
    }

    #[test]
    fn a_commit_that_did_not_run_is_found() {
        let ledger = with_effects(&good());
        ledger.committed_ran(1, 1, Committed { attempt: 1, token: 10 }).expect_err("it wrote no end, and 2 ran later");
        ledger.committed_ran(1, 1, Committed { attempt: 2, token: 10 }).expect_err("another token");
        ledger.committed_ran(1, 2, Committed { attempt: 2, token: 12 }).expect_err("one rank of two");
        ledger.committed_ran(2, 1, Committed { attempt: 2, token: 12 }).expect_err("it never ran");
        ledger.committed_ran(3, 1, Committed { attempt: 1, token: 13 }).expect_err("no such job");
        let after = [good(), life(2, 2, 13, 6_000..=6_100, false)].concat();
        with_effects(&after)
            .committed_ran(2, 1, Committed { attempt: 1, token: 11 })
            .expect_err("attempt 2 ran after it");
    }

    #[test]
    fn lines_are_read_as_the_script_writes_them() {
        let line = parse("beat 7 2 1 99 123.45 n1:a,b").expect("a line");
        let gpus = ["n1:a", "n1:b"].map(str::to_owned).to_vec();
        let node = "n1".to_owned();
        let wanted = Line { what: What::Beat, job: 7, attempt: 2, rank: 1, token: 99, at_ms: 123_450, node, gpus };
        assert_eq!(line, wanted);
        for wrong in ["", "beat 7 2 1 99", "beat 7 2 1 99 123 n1:", "stop 7 2 1 99 1.00 n1:", "beat 7 2 1 99 1.00 x"] {
            parse(wrong).expect_err("no line");
        }
    }
}
