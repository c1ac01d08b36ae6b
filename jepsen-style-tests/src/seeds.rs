//! What campaigns over many seeds share, whatever a seed runs: how seeds are handed to threads, the hash of them all, where a number lies
//! over them, and what a set of them must have reached to be evidence.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_64;

/// Failures after which a run that goes on gives up.
const FAILURES: usize = 20;

/// When no further seed begins.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub count: u64,
    /// Wall time; `None` = no limit.
    pub wall: Option<Duration>,
    pub jobs: usize,
    /// Go on after a failure.
    pub keep_going: bool,
}

/// Runs seeds on so many threads: `one` makes the report of the nth, or says that it is enough; `add` gets each as it comes.
pub fn run<R: Send>(
    limits: Limits,
    one: impl Fn(u64) -> Option<R> + Sync,
    failed: impl Fn(&R) -> bool + Sync,
    mut add: impl FnMut(R),
) {
    let (next, stop, began) = (AtomicU64::new(0), AtomicBool::new(false), Instant::now());
    let (send, receive) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..limits.jobs.max(1) {
            let (send, next, stop, one, failed) = (send.clone(), &next, &stop, &one, &failed);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let nth = next.fetch_add(1, Ordering::Relaxed);
                    if nth >= limits.count || limits.wall.is_some_and(|limit| began.elapsed() >= limit) {
                        break;
                    }
                    let Some(report) = one(nth) else { break };
                    if failed(&report) && !limits.keep_going {
                        stop.store(true, Ordering::Relaxed);
                    }
                    let _ = send.send(report);
                }
            });
        }
        drop(send);
        let mut failures = 0;
        for report in receive {
            failures += usize::from(failed(&report));
            add(report);
            if failures >= FAILURES {
                stop.store(true, Ordering::Relaxed);
            }
        }
    });
}

/// The hash of a set of seeds with one more: the same whatever order they come in.
pub fn with_seed(hash: u64, seed: u64, trace: u64) -> u64 {
    let mut one = [0; 16];
    one[..8].copy_from_slice(&seed.to_le_bytes());
    one[8..].copy_from_slice(&trace.to_le_bytes());
    hash.wrapping_add(xxh3_64(&one))
}

/// Where a number lies over the seeds.
pub fn spread(of: impl Iterator<Item = u64>) -> String {
    let mut sorted: Vec<u64> = of.collect();
    sorted.sort_unstable();
    let at = |percent: usize| sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied();
    let at = |percent| at(percent).unwrap_or(0);
    format!(
        "{} (least), {} (one in ten has fewer), {} (median), {} (one in ten has more), {} (most)",
        at(0),
        at(10),
        at(50),
        at(90),
        at(100)
    )
}

/// The end of a verdict: what was seen sometimes, what a `big` set should have seen and did not, who failed, and the hash. Whether
/// everything held.
pub fn conclude(
    text: &mut String,
    sometimes: &BTreeMap<String, u64>,
    required: Option<&[&str]>,
    failed: &[u64],
    (seeds, hash): (u64, u64),
) -> bool {
    let _ = writeln!(text, "sometimes:");
    for (what, hits) in sometimes {
        let _ = writeln!(text, "  {hits:>9}  {what}");
    }
    let mut valid = failed.is_empty() && seeds > 0;
    for what in required.unwrap_or_default().iter().filter(|what| !sometimes.contains_key(**what)) {
        valid = false;
        let _ = writeln!(text, "NEVER REACHED: {what}");
    }
    if !failed.is_empty() {
        let failed: Vec<String> = failed.iter().map(u64::to_string).collect();
        let _ = writeln!(text, "seeds that failed: {}", failed.join(" "));
    }
    let _ = writeln!(text, "{}", if valid { "VALID" } else { "INVALID" });
    let _ = write!(text, "hash {hash:016x}");
    valid
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid(reached: &[&str], required: Option<&[&str]>, failed: &[u64], seeds: u64) -> bool {
        let sometimes = reached.iter().map(|what| ((*what).to_owned(), 1)).collect();
        conclude(&mut String::new(), &sometimes, required, failed, (seeds, 0))
    }

    #[test]
    fn no_seed_a_failed_one_or_what_was_never_reached_is_no_evidence() {
        assert!(valid(&["a", "b"], Some(&["a"]), &[], 9));
        assert!(valid(&["b"], None, &[], 9), "few seeds need not reach all");
        assert!(!valid(&["b"], Some(&["a"]), &[], 9));
        assert!(!valid(&["a"], Some(&["a"]), &[3], 9));
        assert!(!valid(&[], None, &[], 0));
    }

    #[test]
    fn a_failure_ends_a_run_unless_it_goes_on_and_enough_is_enough() {
        let seen = |limits: Limits, until: u64| {
            let mut seen = Vec::new();
            run(limits, |nth| (nth < until).then_some(nth), |nth| *nth >= 3, |nth| seen.push(nth));
            seen
        };
        let limits = Limits { count: 100, wall: None, jobs: 1, keep_going: false };
        assert_eq!(seen(limits, 100), [0, 1, 2, 3]);
        assert_eq!(seen(limits, 2), [0, 1]);
        assert_eq!(seen(Limits { count: 6, keep_going: true, ..limits }, 100), [0, 1, 2, 3, 4, 5]);
        assert_eq!(seen(Limits { wall: Some(Duration::ZERO), ..limits }, 100), [0; 0]);
    }

    #[test]
    fn the_hash_of_a_set_knows_no_order() {
        let both =
            |first: (u64, u64), second: (u64, u64)| with_seed(with_seed(0, first.0, first.1), second.0, second.1);
        assert_eq!(both((1, 7), (2, 8)), both((2, 8), (1, 7)));
        assert_ne!(both((1, 7), (2, 8)), both((1, 8), (2, 7)));
    }
}
