//! Traces over virtual time: the published EASY schedules of two real logs, job by job, what the default policy makes of
//! three, and that nothing depends on a duration that has not passed. The logs are in $ARES_TEST_DATA/traces; without them it says so and passes.

mod traces;

use std::collections::BTreeMap;

use scheduling::profile::Profile;
use scheduling::simulate::course::Course;
use scheduling::simulate::dice::Dice;
use scheduling::simulate::policy::{Policy, Queue};
use scheduling::simulate::trace::{Trace, TraceJob, read};
use scheduling::simulate::{Options, run, shares};
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

fn policy(queue: Queue) -> Policy {
    Policy { queue, ..Policy::by_name("easy").expect("a policy") }
}

/// By job, the seconds that it waited.
fn waits(trace: &Trace, queue: Queue) -> Vec<Option<u64>> {
    let course = run(trace, &policy(queue), Options::default());
    (0..trace.jobs.len()).map(|job| course.wait_s(trace, job)).collect()
}

fn agrees(name: &str) {
    let Some((trace, published)) = log(name) else { return };
    let ours = waits(&trace, Queue::Easy { depth: 1 });
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

/// The default policy waits less than the best published one without hindsight (58.9 and 65.1), and its worst job is no
/// worse than twice the worst under EASY (14,805 and 10,953; 262,194 s and 459,740 s).
fn waits_less(name: &str, mean: u64, worst: u64, worst_wait_s: u64) {
    let Some((trace, _)) = log(name) else { return };
    let course = run(&trace, &Policy::by_name("default").expect("a policy"), Options::default());
    let figures = course.figures(&trace);
    println!("{name}: {figures:?}");
    assert_eq!(figures.jobs as usize, trace.jobs.len());
    assert!(figures.bounded_slowdown_mean <= mean * 1_000, "{name}: {figures:?}");
    assert!(figures.bounded_slowdown_max <= 2 * worst * 1_000, "{name}: {figures:?}");
    assert!(figures.wait_max <= 2 * worst_wait_s * 1_000, "{name}: {figures:?}");
}

#[test]
fn the_default_policy_waits_less_on_kth_sp2() {
    waits_less("kth-sp2", 58, 14_805, 262_194);
}

#[test]
fn the_default_policy_waits_less_on_sdsc_sp2() {
    waits_less("sdsc-sp2", 65, 10_953, 459_740);
}

#[test]
fn kth_sp2_waits_as_published() {
    agrees("kth-sp2");
}

#[test]
fn sdsc_sp2_waits_as_published() {
    agrees("sdsc-sp2");
}

fn jobs(rows: &[(u64, u64, u32, u64)]) -> Trace {
    let line = |(at, (submit, duration, gpus, limit)): (usize, &(u64, u64, u32, u64))| {
        format!("{at},{submit},{duration},{gpus},{limit},u{}\n", at % 40)
    };
    let text: String = rows.iter().enumerate().map(line).collect();
    let text = format!("id,submit_s,duration_s,gpus,requested_s,tenant\n{text}");
    read(("jobs", &text), ("nodes", "name,gpus\nn,10\n")).expect("a well-formed trace")
}

#[test]
fn a_small_job_passes_only_where_it_delays_no_reservation() {
    // 6 of 10 run until 100 and 8 wait for them. The 4 that might end at 101 wait too; 2 that run on find room beside
    // the 8, and the last 2 may end at 100.
    let log = jobs(&[(0, 100, 6, 100), (1, 50, 8, 50), (2, 90, 4, 99), (3, 20, 2, 200), (4, 20, 2, 96)]);
    assert_eq!(waits(&log, Queue::Fifo), [0, 99, 148, 147, 146].map(Some));
    assert_eq!(waits(&log, Queue::FifoSkip), [0, 111, 0, 89, 88].map(Some));
    assert_eq!(waits(&log, Queue::Easy { depth: 1 }), [0, 99, 148, 0, 0].map(Some));
}

/// Starts up to a moment are the same whatever the durations of the jobs are that have not ended by then: they are dealt
/// out anew among those, long enough for them not to have ended.
#[test]
fn durations_that_have_not_passed_decide_nothing() {
    let mut dice = Dice::new(7);
    let mut draw = |most: usize| dice.below(most) as u64;
    let rows: Vec<(u64, u64, u32, u64)> = (0..400)
        .map(|at| {
            let limit = [20, 60, 300, 900][draw(4) as usize];
            (at * 9 + draw(9), 1 + draw(limit as usize), 1 + draw(10) as u32, limit)
        })
        .collect();
    let log = jobs(&rows);
    for queue in
        [Queue::Fifo, Queue::FifoSkip, Queue::Easy { depth: 1 }, Queue::Easy { depth: 9 }, Queue::ResponseRatio]
    {
        let first = waits(&log, queue);
        for moment in [500, 1_500, 3_000] {
            let start = |job: usize, waits: &[Option<u64>]| log.jobs[job].submit_s + waits[job].expect("it starts");
            let ended = |job: usize| start(job, &first) + log.jobs[job].duration_s <= moment;
            let rest: Vec<usize> = (0..rows.len()).filter(|job| !ended(*job)).collect();
            let mut other = log.clone();
            for (at, job) in rest.iter().enumerate() {
                let dealt = log.jobs[rest[rest.len() - 1 - at]].duration_s;
                let passed = moment.saturating_sub(start(*job, &first));
                let of = &mut other.jobs[*job];
                of.duration_s = dealt.max(passed + 1).min(of.requested_s.unwrap_or(u64::MAX));
            }
            let changed =
                (0..rows.len()).filter(|job| other.jobs[*job].duration_s != log.jobs[*job].duration_s).count();
            assert!(changed > rest.len() / 4, "too few durations changed");
            let second = waits(&other, queue);
            let until = |waits: &[Option<u64>]| -> Vec<u64> {
                (0..rows.len()).map(|job| start(job, waits)).filter(|start| *start <= moment).collect()
            };
            assert_eq!(until(&first), until(&second), "{queue:?} until {moment}");
        }
    }
}

/// The same where GPUs go round, for each time that a job holds any.
#[test]
fn nor_where_gpus_go_round() {
    let mut dice = Dice::new(11);
    let line = |at: usize, dice: &mut Dice| {
        let duration = [300, 2_000, 9_000, 40_000][dice.below(4)] + dice.below(300);
        format!("{at},{},{duration},{}\n", at * 1_700 + dice.below(900), 1 + dice.below(8))
    };
    let rows: String = (0..300).map(|at| line(at, &mut dice)).collect();
    let text = format!("id,submit_s,duration_s,gpus\n{rows}");
    let log = read(("jobs", &text), ("nodes", "name,gpus\nm,8\nn,8\n")).expect("a well-formed trace");
    let default = Policy::by_name("default").expect("a policy");
    let first = run(&log, &default, Options::default());
    assert!(first.figures(&log).preemptions > 50, "too few preemptions to tell");
    for moment in [90_000, 250_000, 420_000] {
        let held = |course: &Course, job: usize| -> u64 {
            let spells = course.spells.iter().filter(|spell| spell.job == job && spell.from_s < moment);
            spells.map(|spell| spell.until_s.min(moment) - spell.from_s).sum()
        };
        let ends = |job: usize| first.journeys[job].expect("it ends").end_s;
        let rest: Vec<usize> = (0..log.jobs.len()).filter(|job| ends(*job) > moment).collect();
        let mut other = log.clone();
        for (at, job) in rest.iter().enumerate() {
            let dealt = log.jobs[rest[rest.len() - 1 - at]].duration_s;
            other.jobs[*job].duration_s = dealt.max(held(&first, *job) + 1);
        }
        let second = run(&other, &default, Options::default());
        let until = |course: &Course| {
            let spells = course.spells.iter().filter(|spell| spell.from_s <= moment);
            let mut spells: Vec<_> = spells.map(|spell| (spell.from_s, spell.job, spell.until_s.min(moment))).collect();
            spells.sort_unstable();
            spells
        };
        assert!(until(&first) == until(&second), "other decisions until {moment}");
    }
}

#[test]
fn a_week_of_waiting_goes_before_any_ratio() {
    // Of two that wait for the first, the shorter one has the higher ratio, but not when the other has waited a week.
    let starts = |until: u64| -> Vec<Option<u64>> {
        let rows = [(0, until, 10, until), (0, 50_000, 10, 50_000), (until - 100_000, 100, 10, 100)];
        let log = jobs(&rows);
        let waits = waits(&log, Queue::ResponseRatio).into_iter().zip(&log.jobs);
        waits.map(|(wait, job)| wait.map(|wait| wait + job.submit_s)).collect()
    };
    let week = 7 * 86_400;
    assert_eq!(starts(week - 1), [Some(0), Some(week + 99), Some(week - 1)]);
    assert_eq!(starts(week), [Some(0), Some(week), Some(week + 50_000)]);
}

/// By job, (first start, end, preemptions).
fn journeys(jobs: &str, nodes: &str, pooled: bool) -> Vec<Option<(u64, u64, u32)>> {
    let jobs = format!("id,submit_s,duration_s,gpus,tenant\n{jobs}");
    let log = read(("jobs", &jobs), ("nodes", nodes)).expect("a well-formed trace");
    let options = Options { pooled, ..Options::default() };
    let course = run(&log, &Policy::by_name("default").expect("a policy"), options);
    course.journeys.iter().map(|journey| journey.map(|it| (it.start_s, it.end_s, it.preemptions))).collect()
}

#[test]
fn a_young_job_goes_before_an_old_one_that_has_run_its_least_time() {
    // The first is old after 1,200 s but may be preempted from 1,800 s on; it loses 60 s. The third fits beside the second.
    let jobs = "a,0,10000,10,x\nb,1000,100,1,x\nc,1790,100,9,x\n";
    let of = journeys(jobs, "name,gpus\nn,10\n", false);
    assert_eq!(of, [Some((0, 10_160, 1)), Some((1_800, 1_900, 0)), Some((1_800, 1_900, 0))]);
    // A young job is preempted for nobody.
    let of = journeys("a,0,2000,5,x\nb,1900,100,10,x\n", "name,gpus\nn,10\n", false);
    assert_eq!(of, [Some((0, 2_000, 0)), Some((2_000, 2_100, 0))]);
}

#[test]
fn who_waited_long_is_preempted_for_no_young_job() {
    // The second waits for the first, which is young all the time with its 0.04 GPUs; the third would take its turn from the second.
    let starts = |long: u64| -> Vec<u64> {
        let head = "id,submit_s,duration_s,gpus,gpu_milli\n";
        let jobs = format!("{head}a,0,{long},1,40\nb,0,50000,1,1000\nc,{},100,1,1000\n", long + 40_000);
        let log = read(("jobs", &jobs), ("nodes", "name,gpus\nm,1\n")).expect("a well-formed trace");
        let course = run(&log, &Policy::by_name("default").expect("a policy"), Options::default());
        course.journeys.iter().map(|journey| journey.expect("it runs").start_s).collect()
    };
    let long = 64 * 3_600;
    assert_eq!(starts(long), [0, long, long + 50_000]);
    assert_eq!(starts(long - 1), [0, long - 1, long - 1 + 40_000]);
}

#[test]
fn each_time_a_job_is_preempted_after_a_longer_run() {
    // Young ones come all the time. It is old after 1,500 s with its 8 GPUs, and loses 60 s each time.
    let young: String = (0..11_000).step_by(10).map(|at| format!("y{at},{at},1,1\n")).collect();
    let jobs = format!("id,submit_s,duration_s,gpus\na,0,12000,8\n{young}");
    let log = read(("jobs", &jobs), ("nodes", "name,gpus\nm,8\n")).expect("a well-formed trace");
    let course = run(&log, &Policy::by_name("default").expect("a policy"), Options::default());
    let own = course.spells.iter().filter(|spell| spell.job == 0);
    let own: Vec<u64> = own.map(|spell| spell.until_s - spell.from_s).collect();
    assert_eq!(own, [1_800, 3_600, 5_400, 12_000 + 3 * 60 - 10_800]);
}

#[test]
fn what_is_lent_comes_back() {
    let nodes = "name,gpus,gpu_type\nm,5,x\nn,5,y\n";
    let jobs = "a,0,9000,10,x\nb,2000,100,5,y\nc,2000,100,5,x\n";
    // Within 100 s the second has its share; the third has its tenant's own, which the first can't use alone.
    let of = journeys(jobs, nodes, true);
    assert_eq!(of, [Some((0, 9_160, 1)), Some((2_000, 2_100, 0)), Some((2_000, 2_100, 0))]);
    // Apart, the first fits nowhere.
    assert_eq!(journeys(jobs, nodes, false), [None, Some((2_000, 2_100, 0)), Some((2_000, 2_100, 0))]);
}

#[test]
fn philly_in_one_pool_gives_each_tenant_its_share() {
    let [Some(jobs), Some(nodes)] = ["jobs.csv.gz", "nodes.csv"].map(|kind| unpacked(&format!("philly.{kind}"))) else {
        eprintln!("SKIPPED: philly is not in $ARES_TEST_DATA/traces");
        return;
    };
    let mut log = read(("jobs", &jobs), ("nodes", &nodes)).expect("a well-formed trace");
    log.jobs.retain(|job| (2_592_000..7_862_400).contains(&job.submit_s));
    let default = Policy::by_name("default").expect("a policy");
    let pooled = run(&log, &default, Options { pooled: true, ..Options::default() });
    let (figures, shortfall) = (pooled.figures(&log), pooled.shortfall(&log, &shares(&log, true)));
    println!("pooled: shortfall {shortfall}, {figures:?}");
    assert!(shortfall < 200 && figures.jct_mean <= 14_237_000, "shortfall {shortfall}, {figures:?}");
    assert_eq!(figures.jobs, 38_128);
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
    assert_eq!(profile.earliest(120, 30, 10), Some(120));
    assert_eq!(profile.earliest(121, 30, 10), Some(200));
    let stairs = profile.stairs(0);
    assert_eq!([2, 4, 5].map(|gpus| stairs.until(gpus)), [Some(u64::MAX), Some(150), None]);
    profile.give(40, 100, 6);
    profile.give(150, 200, 8);
    profile.advance(40);
    assert!(profile.fits(40, u64::MAX, 10));
    assert_eq!((profile.free_at(40), profile.free_at(150)), (10, 10));
}
