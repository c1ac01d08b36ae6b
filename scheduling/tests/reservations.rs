//! Reservations: a task that can't start yet is not delayed by those behind it, and those behind it start where they
//! delay nobody.

mod site;

use std::collections::BTreeMap;

use proptest::prelude::*;
use scheduling::plan::{Cache, Limits, plan};
use scheduling::{ENDLESS_MS, Reason};
use site::{Machine, Site, hgx, mock_v100, pairs, shape};
use statemachine::command::{SetPolicy, SetTenant};
use statemachine::domain::{Level, Topology};
use statemachine::settings::OrderBy;
use statemachine::spec::Shape;
use statemachine::{JobId, Token};

const MINUTE: u64 = 60_000;
/// SIGTERM to SIGKILL of the site's jobs.
const GRACE: u64 = 10_000;

fn submit(site: &mut Site, shape: Shape, priority: i32, limit_ms: u64) -> JobId {
    site.submit_limited("default", shape, priority, &[], limit_ms)
}

fn small() -> Shape {
    shape(1, 1, 1)
}

/// Two machines of four GPUs, each with two taken for ten minutes, and a gang that needs both whole.
fn half_full() -> (Site, JobId) {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    site.join("n02", mock_v100());
    submit(&mut site, shape(2, 1, 2), 0, 10 * MINUTE);
    site.start();
    let gang = submit(&mut site, shape(2, 1, 4), 0, MINUTE);
    (site, gang)
}

#[test]
fn who_would_delay_the_first_that_waits_does_not_start() {
    let (mut site, gang) = half_full();
    let endless = submit(&mut site, small(), 0, 0);
    let long = submit(&mut site, small(), 0, 11 * MINUTE);
    let short = submit(&mut site, small(), 0, 5 * MINUTE);
    let plan = site.plan();
    let placed: Vec<JobId> = plan.places.iter().map(|place| place.task.job).collect();
    assert_eq!(placed, [short]);
    assert_eq!(plan.reservations.len(), 1);
    assert_eq!(plan.reservations[0].task.job, gang);
    let starts_in = plan.reservations[0].known_start_ms().unwrap() - site.state.meta.clock_ms;
    assert!((10 * MINUTE..=10 * MINUTE + GRACE).contains(&starts_in), "{starts_in} ms");
    for job in [endless, long] {
        let reason = site.reason(job);
        assert_eq!(reason.code(), "RESERVED");
        assert!(
            reason.to_string().starts_with(&format!(
                "needs 1 GPU on one machine; what is free is kept for job {gang}, which starts in 610 s at the latest; \
             with a time limit of 599 s or less it would fit before"
            )),
            "{reason}"
        );
    }
}

#[test]
fn who_fits_beside_what_is_kept_starts_however_long_it_runs() {
    let mut site = Site::default();
    site.join("n01", hgx("h100"));
    submit(&mut site, shape(1, 1, 4), 0, 10 * MINUTE);
    site.start();
    let waits = submit(&mut site, shape(1, 1, 6), 0, 0);
    let beside = submit(&mut site, shape(1, 1, 2), 0, 0);
    let too_much = submit(&mut site, small(), 0, 0);
    let plan = site.plan();
    assert_eq!(plan.places.iter().map(|place| place.task.job).collect::<Vec<_>>(), [beside]);
    assert_eq!(plan.reasons.iter().map(|(task, _)| task.job).collect::<Vec<_>>(), [waits, too_much]);
}

#[test]
fn what_is_free_before_its_start_is_left_to_who_runs_longer() {
    let mut site = Site::default();
    let one_gpu = || Machine { class: pairs(1, 0, 0), cores_by_numa: vec![1, 1], ..mock_v100() };
    for name in ["n0", "n1", "n2"] {
        site.join(name, one_gpu());
    }
    for _ in 0..2 {
        submit(&mut site, small(), 0, 10 * MINUTE);
    }
    site.start();
    let gang = submit(&mut site, shape(2, 1, 1), 0, MINUTE);
    let endless = submit(&mut site, small(), 0, 0);
    let plan = site.plan();
    assert_eq!(
        (plan.reservations[0].task.job, plan.places[0].task.job),
        (gang, endless),
        "the third is kept for nobody"
    );
}

#[test]
fn jobs_without_a_limit_are_waited_for_and_the_machine_with_the_fewest_is_kept() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    for _ in 0..4 {
        submit(&mut site, small(), 0, 0);
    }
    site.start();
    site.join("n02", mock_v100());
    submit(&mut site, small(), 0, 0);
    site.start();
    let whole = submit(&mut site, shape(1, 1, 4), 0, 0);
    let endless = submit(&mut site, small(), 0, 0);
    let limited = submit(&mut site, small(), 0, 90 * 24 * 60 * MINUTE);
    let plan = site.plan();
    assert_eq!(plan.reservations[0].task.job, whole);
    assert_eq!(site.name(plan.reservations[0].parts[0].node), "n02");
    assert!(plan.reservations[0].start_ms >= ENDLESS_MS && plan.reservations[0].known_start_ms().is_none());
    assert_eq!(plan.places.iter().map(|place| place.task.job).collect::<Vec<_>>(), [limited]);
    assert!(site.reason(endless).to_string().ends_with("which waits for jobs without a time limit"));
}

#[test]
fn who_goes_before_it_in_the_order_takes_what_was_kept() {
    let (mut site, _) = half_full();
    let urgent = submit(&mut site, small(), 9, 0);
    assert_eq!(site.plan().places[0].task.job, urgent);
}

#[test]
fn what_is_never_possible_reserves_nothing() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    submit(&mut site, small(), 0, 0);
    site.start();
    submit(&mut site, shape(1, 1, 9), 5, 0);
    submit(&mut site, shape(2, 1, 4), 5, 0);
    let job = submit(&mut site, small(), 0, 0);
    let plan = site.plan();
    assert_eq!((plan.reservations.len(), plan.places[0].task.job), (0, job));
}

#[test]
fn each_pool_has_its_own_reservation() {
    let mut site = Site::default();
    site.join("v1", mock_v100());
    site.join("h1", hgx("h100"));
    for (gpus, gpu_type) in [(2, "v100"), (4, "h100")] {
        site.submit_limited("default", shape(1, 1, gpus), 0, &[gpu_type], MINUTE);
    }
    site.start();
    let waits = [(4, "v100"), (8, "h100"), (8, "h100")]
        .map(|(gpus, gpu_type)| site.submit_limited("default", shape(1, 1, gpus), 0, &[gpu_type], MINUTE));
    let kept = |reservations: u32| -> Vec<JobId> {
        let limits = Limits { reservations: Some(reservations), ..Limits::default() };
        let plan = plan(&site.state, &mut Cache::default(), &limits, &site.unheard);
        plan.reservations.iter().map(|kept| kept.task.job).collect()
    };
    assert_eq!(kept(0), []);
    assert_eq!(kept(1), waits[..2]);
    assert_eq!(kept(9), waits);
}

#[test]
fn what_is_kept_for_a_tenants_job_is_kept_of_its_limit_too() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    site.join("n02", mock_v100());
    site.tenant(SetTenant {
        name: "lab".into(),
        parent: Some(String::new()),
        limit_gpus: Some(Some(5)),
        ..SetTenant::default()
    });
    submit(&mut site, shape(2, 1, 2), 0, MINUTE);
    site.start();
    let whole = site.submit_limited("lab", shape(1, 1, 4), 1, &[], MINUTE);
    let one = site.submit_for("lab", small(), 0, &[]);
    let two = site.submit_for("lab", small(), 0, &[]);
    let plan = site.plan();
    assert_eq!(plan.reservations[0].task.job, whole);
    assert_eq!(plan.places.iter().map(|place| place.task.job).collect::<Vec<_>>(), [one]);
    assert_eq!(site.reason(two).code(), "QUOTA");
}

#[test]
fn a_cycle_that_goes_on_keeps_what_the_first_part_kept() {
    let (mut site, gang) = half_full();
    for n in 0..20 {
        submit(&mut site, Shape { cores_per_rank: n + 1, ..small() }, 0, 0);
    }
    let mut limits = Limits { steps: 3, ..Limits::default() };
    for _ in 0..100 {
        let plan = plan(&site.state, &mut Cache::default(), &limits, &site.unheard);
        assert_eq!(plan.places, []);
        assert_eq!(plan.reservations[0].task.job, gang);
        if !plan.unfinished {
            return;
        }
        limits.after = plan.reached;
    }
    panic!("the end of the queue was never reached");
}

/// A cluster under virtual time: what runs ends at its limit and grace at the latest.
struct Running {
    site: Site,
    /// By token, when it ends.
    ends: BTreeMap<Token, u64>,
    started: BTreeMap<JobId, u64>,
}

impl Running {
    fn now(&self) -> u64 {
        self.site.state.meta.clock_ms
    }

    /// Plans and starts; `early` is the share of its limit that a job really runs, in percent.
    fn cycle(&mut self, early: u64) {
        let plan = self.site.plan();
        let tokens = self.site.grant(&plan);
        for (token, place) in tokens.into_iter().zip(plan.places) {
            let limit = self.site.state.jobs.get(&place.task.job).unwrap().value.spec.limit_ms;
            let length = if limit == 0 { 3 * 60 * MINUTE } else { limit + GRACE };
            self.ends.insert(token, self.now() + length * early / 100);
            self.started.insert(place.task.job, self.now());
        }
    }

    fn pass(&mut self, ms: u64) {
        self.site.wait_ms(ms);
        let now = self.now();
        let due: Vec<Token> = self.ends.iter().filter(|(_, end)| **end <= now).map(|(token, _)| *token).collect();
        for token in due {
            self.ends.remove(&token);
            self.site.finish(token);
        }
    }
}

#[test]
fn a_gang_behind_a_stream_of_small_jobs_starts_at_its_reservation() {
    for limit in [4 * MINUTE, 0] {
        let mut running = Running { site: Site::default(), ends: BTreeMap::new(), started: BTreeMap::new() };
        running.site.join("n01", mock_v100());
        running.site.join("n02", mock_v100());
        for n in 0..8 {
            submit(&mut running.site, small(), 0, limit);
            running.cycle(100);
            running.pass(n * 1_000);
        }
        let gang = submit(&mut running.site, shape(2, 1, 4), 0, MINUTE);
        let promised = running.site.plan().reservations[0].known_start_ms();
        for _ in 0..400 {
            submit(&mut running.site, small(), 0, limit);
            running.cycle(100);
            running.pass(30_000);
        }
        let start = *running.started.get(&gang).expect("it has started");
        assert!(promised.is_none_or(|promised| start <= promised + 31_000), "{start} ms, promised {promised:?}");
        assert_eq!(promised.is_none(), limit == 0);
    }
}

/// A job of the lowest priority that needs a whole machine, in a stream of small urgent ones: when it starts.
fn start_in_a_stream_of_urgent_jobs(aged_after_ms: u64) -> Option<u64> {
    let mut running = Running { site: Site::default(), ends: BTreeMap::new(), started: BTreeMap::new() };
    running.site.join("n01", mock_v100());
    running.site.policy(SetPolicy { aged_after_ms: Some(aged_after_ms), ..SetPolicy::default() });
    let low = submit(&mut running.site, shape(1, 1, 4), -5, MINUTE);
    submit(&mut running.site, small(), 9, 4 * MINUTE);
    for _ in 0..400 {
        submit(&mut running.site, small(), 9, 4 * MINUTE);
        running.cycle(100);
        running.pass(MINUTE / 2);
    }
    running.started.get(&low).copied()
}

/// The bound: its age, and then the longest of what runs.
#[test]
fn an_aged_job_starts_once_what_ran_at_its_age_has_ended() {
    let age = 60 * MINUTE;
    let start = start_in_a_stream_of_urgent_jobs(age).expect("it starts");
    assert!((age..=age + 4 * MINUTE + GRACE + MINUTE).contains(&start), "{start} ms");
    assert_eq!(start_in_a_stream_of_urgent_jobs(0), None, "without ageing it starves");
}

const IN_A_RACK: Topology = Topology { level: Level::Rack, required: true };

#[derive(Clone, Debug)]
struct Ask {
    shape: Shape,
    limit_minutes: u64,
    /// Percent of its limit that it runs.
    runs: u64,
}

fn asks() -> impl Strategy<Value = Vec<Ask>> {
    let limit = prop_oneof![1 => Just(0u64), 6 => 1u64..30];
    let ask = (1u16..=3, 1u16..=4, 0u16..=6, any::<bool>(), limit, 20u64..=100).prop_map(
        |(nodes, gpus, cores_per_rank, together, limit_minutes, runs)| Ask {
            shape: Shape { cores_per_rank, topology: together.then_some(IN_A_RACK), ..shape(nodes, 1, gpus) },
            limit_minutes,
            runs,
        },
    );
    prop::collection::vec(ask, 5..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// The first task that waits has a time; while only tasks behind it are added, and the order does not change, it starts by then.
    #[test]
    fn the_first_that_waits_is_never_later_than_it_was_told(machines in 1usize..4, asks in asks()) {
        let mut running = Running { site: Site::default(), ends: BTreeMap::new(), started: BTreeMap::new() };
        running.site.policy(SetPolicy { order: Some(OrderBy::Fifo), ..SetPolicy::default() });
        for n in 0..machines {
            // Two racks, of two and of one.
            running.site.join_with(&format!("n{n}"), mock_v100(), &[("rack", ["r0", "r1", "r0"][n])]);
        }
        let mut told: BTreeMap<JobId, u64> = BTreeMap::new();
        for ask in asks {
            submit(&mut running.site, ask.shape, 0, ask.limit_minutes * MINUTE);
            running.cycle(ask.runs);
            let plan = running.site.plan();
            prop_assert_eq!(&plan.places, &[]);
            if let Some(first) = plan.reservations.first() && let Some(start) = first.known_start_ms() {
                let first_told = *told.entry(first.task.job).or_insert(start);
                // A few ms pass with each command.
                prop_assert!(start <= first_told + 1_000, "job {} slips from {first_told} to {start}", first.task.job);
            }
            running.pass(MINUTE / 2);
            prop_assert_eq!(running.site.state.check(), Ok(()));
        }
        for _ in 0..100 {
            running.cycle(100);
            running.pass(MINUTE);
        }
        for (job, start) in told {
            let started = running.started.get(&job).copied();
            prop_assert!(started.is_some_and(|at| at <= start + MINUTE + 1_000), "job {job}: told {start}, {started:?}");
        }
    }
}

#[test]
fn what_is_long_overdue_is_not_waited_for() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    submit(&mut site, small(), 0, MINUTE);
    site.start();
    let whole = submit(&mut site, shape(1, 1, 4), 0, MINUTE);
    assert_eq!(site.plan().reservations[0].task.job, whole);
    site.wait_ms(5 * MINUTE);
    assert!(site.plan().reservations[0].known_start_ms().is_some(), "any moment");
    site.wait_ms(15 * MINUTE);
    assert_eq!(site.plan().reservations[0].known_start_ms(), None);
    let limited = submit(&mut site, small(), 0, 60 * MINUTE);
    assert_eq!(site.plan().places[0].task.job, limited, "nothing idles for it");
}

#[test]
fn a_reason_says_what_is_kept_for_whom() {
    let (mut site, gang) = half_full();
    let job = submit(&mut site, small(), 0, 0);
    assert!(matches!(site.reason(job), Reason::Reserved { job, .. } if job == gang));
}
