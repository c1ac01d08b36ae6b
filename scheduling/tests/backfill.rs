//! The queue over virtual time: the published EASY schedules of two real logs, job by job, and that nothing depends on
//! a duration that has not passed. The logs are in $ARES_TEST_DATA/traces; without them it says so and passes.

mod traces;

use std::collections::BTreeMap;

use scheduling::profile::Profile;
use scheduling::simulate::queue::{Queue, waits};
use scheduling::simulate::trace::{Trace, TraceJob, read};
use traces::unpacked;

/// The log and its published waits by job.
fn log(name: &str) -> Option<(Trace, BTreeMap<String, u64>)> {
    let files = ["jobs.csv.gz", "nodes.csv", "easy-waits.csv.gz"].map(|kind| unpacked(&format!("{name}.{kind}")));
    let [Some(jobs), Some(nodes), Some(published)] = files else {
        eprintln!("SKIPPED: the log {name} is not in $ARES_TEST_DATA/traces");
        return None;
    };
    let line = |line: &str| line.split_once(',').map(|(id, wait)| (id.to_owned(), wait.parse().expect("seconds")));
    let published = published.lines().skip(1).filter_map(line).collect();
    Some((read(("jobs", &jobs), ("nodes", &nodes)).expect("a well-formed trace"), published))
}

/// Sum of the bounded slowdowns, in thousandths.
fn slowdowns<'a>(jobs: impl Iterator<Item = (&'a TraceJob, u64)>) -> u64 {
    jobs.map(|(job, wait)| ((wait + job.duration_s) * 1_000 / job.duration_s.max(10)).max(1_000)).sum()
}

fn agrees(name: &str) {
    let Some((trace, published)) = log(name) else { return };
    let pool = trace.machines.iter().map(|machine| u64::from(machine.gpus)).sum();
    let ours = waits(&trace.jobs, pool, Queue::Easy { depth: 1 });
    let pairs: Vec<(&TraceJob, u64, u64)> =
        (trace.jobs.iter().zip(&ours)).map(|(job, wait)| (job, wait.expect("it starts"), published[&job.id])).collect();
    let equal = pairs.iter().filter(|(_, ours, published)| ours == published).count();
    assert_eq!(pairs.len(), published.len());
    let mean = |sum: u64| sum / pairs.len() as u64;
    let ours = mean(slowdowns(pairs.iter().map(|(job, ours, _)| (*job, *ours))));
    let theirs = mean(slowdowns(pairs.iter().map(|(job, _, published)| (*job, *published))));
    println!("{name}: {equal} of {} waits equal; bounded slowdown {ours}, published {theirs}", pairs.len());
    assert!(equal * 1_000 >= pairs.len() * 999, "{name}: only {equal} of {} waits agree", pairs.len());
    assert!(ours.abs_diff(theirs) * 1_000 <= theirs, "{name}: {ours} thousandths, published {theirs}");
}

#[test]
fn kth_sp2_waits_as_published() {
    agrees("kth-sp2");
}

#[test]
fn sdsc_sp2_waits_as_published() {
    agrees("sdsc-sp2");
}

fn jobs(rows: &[(u64, u64, u32, u64)]) -> Vec<TraceJob> {
    let line = |(at, (submit, duration, gpus, limit)): (usize, &(u64, u64, u32, u64))| {
        format!("{at},{submit},{duration},{gpus},{limit}\n")
    };
    let text: String = rows.iter().enumerate().map(line).collect();
    let text = format!("id,submit_s,duration_s,gpus,requested_s\n{text}");
    read(("jobs", &text), ("nodes", "name,gpus\nn,10\n")).expect("a well-formed trace").jobs
}

#[test]
fn a_small_job_passes_only_where_it_delays_no_reservation() {
    // 6 of 10 run until 100 and 8 wait for them. The 4 that might end at 101 wait too; 2 that run on find room beside
    // the 8, and the last 2 may end at 100.
    let log = jobs(&[(0, 100, 6, 100), (1, 50, 8, 50), (2, 90, 4, 99), (3, 20, 2, 200), (4, 20, 2, 96)]);
    assert_eq!(waits(&log, 10, Queue::Fifo), [0, 99, 148, 147, 146].map(Some));
    assert_eq!(waits(&log, 10, Queue::FifoSkip), [0, 111, 0, 89, 88].map(Some));
    assert_eq!(waits(&log, 10, Queue::Easy { depth: 1 }), [0, 99, 148, 0, 0].map(Some));
}

/// Until the first end that differs, a log with other durations has the same starts.
#[test]
fn durations_that_have_not_passed_decide_nothing() {
    let first = jobs(&[(0, 100, 6, 100), (1, 50, 8, 50), (2, 90, 4, 98), (3, 20, 2, 200), (4, 70, 2, 90)]);
    let other = jobs(&[(0, 80, 6, 100), (1, 10, 8, 50), (2, 95, 4, 98), (3, 99, 2, 200), (4, 71, 2, 90)]);
    for queue in [Queue::Fifo, Queue::FifoSkip, Queue::Easy { depth: 1 }, Queue::Easy { depth: 9 }] {
        let starts = |log: &[TraceJob]| -> Vec<Option<u64>> {
            let started = waits(log, 10, queue).into_iter().zip(log);
            started.map(|(wait, job)| wait.map(|wait| wait + job.submit_s).filter(|start| *start <= 22)).collect()
        };
        assert_eq!(starts(&first), starts(&other), "{queue:?}");
    }
}

#[test]
fn a_profile_finds_the_first_gap() {
    let mut profile = Profile::new(10);
    profile.take(0, 100, 6);
    profile.take(150, 200, 8);
    assert_eq!(profile.earliest(0, 50, 4), Some(0));
    assert_eq!(profile.earliest(0, 50, 5), Some(100));
    assert_eq!(profile.earliest(0, 51, 5), Some(200));
    assert_eq!(profile.earliest(0, 1, 11), None);
    profile.give(40, 100, 6);
    profile.give(150, 200, 8);
    profile.advance(40);
    assert!(profile.fits(40, u64::MAX, 10));
    assert_eq!((profile.free_at(40), profile.free_at(150)), (10, 10));
}
