//! The laws of the order between tenants and inside one, over random clusters and trees.

mod site;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use scheduling::line::Rank;
use scheduling::order::{Order, Position, queue};
use scheduling::plan::{Cache, Limits, plan};
use site::{Site, hgx, shape};
use statemachine::JobId;
use statemachine::command::{SetPolicy, SetTenant};
use statemachine::settings::OrderBy;

fn set(name: &str, weight: u32) -> SetTenant {
    SetTenant { name: name.into(), parent: Some(String::new()), weight: Some(weight), ..SetTenant::default() }
}

fn below(name: &str, parent: &str, weight: u32) -> SetTenant {
    SetTenant { parent: Some(parent.into()), ..set(name, weight) }
}

fn guaranteed(set: SetTenant, gpus: u32) -> SetTenant {
    SetTenant { guaranteed: Some([("h100".to_owned(), gpus)].into()), ..set }
}

fn site(machines: usize) -> Site {
    let mut site = Site::default();
    for n in 0..machines {
        site.join(&format!("n{n:02}"), hgx("h100"));
    }
    site
}

fn submit(site: &mut Site, tenant: &str, jobs: usize, gpus: u16) -> Vec<JobId> {
    (0..jobs).map(|_| site.submit_for(tenant, shape(1, 1, gpus), 0, &[])).collect()
}

/// GPUs of the tenant and those below it.
fn gpus_of(site: &Site, tenant: &str) -> u64 {
    let id = site.state.index.tenant_by_name.get(tenant).unwrap();
    site.state.tenants.get(id).unwrap().used.all_gpus()
}

fn names(site: &Site, jobs: impl Iterator<Item = JobId>) -> Vec<String> {
    let tenant = |job: JobId| site.state.jobs.get(&job).unwrap().value.tenant;
    jobs.map(|job| site.state.tenants.get(&tenant(job)).unwrap().name.clone()).collect()
}

#[test]
fn tenants_take_turns_by_weight() {
    let mut site = site(1);
    site.tenant(set("a", 1));
    site.tenant(set("b", 3));
    submit(&mut site, "a", 8, 1);
    submit(&mut site, "b", 8, 1);
    site.start();
    assert_eq!((gpus_of(&site, "a"), gpus_of(&site, "b")), (2, 6));
}

#[test]
fn a_guarantee_goes_before_every_borrower_and_past_use() {
    let mut site = site(1);
    site.tenant(set("rich", 100));
    site.tenant(guaranteed(set("poor", 1), 4));
    submit(&mut site, "rich", 8, 1);
    submit(&mut site, "poor", 8, 1);
    let order = names(&site, queue(&site.state).map(|key| key.task.job));
    assert!(order[..4].iter().all(|name| name == "poor"), "{order:?}");
    assert_eq!(order[4], "rich");
    site.start();
    assert_eq!((gpus_of(&site, "poor"), gpus_of(&site, "rich")), (4, 4));
}

#[test]
fn a_guarantee_below_counts_against_strangers_too() {
    let mut site = site(1);
    site.tenant(set("lab", 1));
    site.tenant(guaranteed(below("vision", "lab", 1), 6));
    site.tenant(set("other", 1_000));
    submit(&mut site, "other", 8, 1);
    submit(&mut site, "lab", 8, 1);
    submit(&mut site, "vision", 8, 1);
    site.start();
    assert_eq!((gpus_of(&site, "vision"), gpus_of(&site, "lab"), gpus_of(&site, "other")), (6, 6, 2));
}

#[test]
fn shares_are_split_level_by_level() {
    let mut site = site(1);
    site.tenant(set("lab", 1));
    site.tenant(set("other", 1));
    for name in ["x", "y", "z"] {
        site.tenant(below(name, "lab", 1));
        submit(&mut site, name, 8, 1);
    }
    submit(&mut site, "other", 8, 1);
    site.start();
    assert_eq!((gpus_of(&site, "lab"), gpus_of(&site, "other")), (4, 4), "three in a lab get no more than its share");
    assert!(["x", "y", "z"].iter().all(|name| (1..=2).contains(&gpus_of(&site, name))));
}

#[test]
fn who_used_more_goes_later_until_it_has_faded() {
    let mut site = site(1);
    site.tenant(set("busy", 1));
    site.tenant(set("fresh", 1));
    submit(&mut site, "busy", 1, 8);
    let tokens = site.start();
    site.wait_ms(24 * 3_600_000);
    site.finish(tokens[0]);
    let jobs = [submit(&mut site, "busy", 1, 8)[0], submit(&mut site, "fresh", 1, 8)[0]];
    assert_eq!(site.plan().places[0].task.job, jobs[1], "a day of use goes behind none");
    site.wait_ms(400 * 24 * 3_600_000);
    assert_eq!(site.plan().places[0].task.job, jobs[0], "after a year the first comes first again");
}

fn policy(site: &mut Site, order: OrderBy, aged_after_ms: u64) {
    site.policy(SetPolicy { order: Some(order), aged_after_ms: Some(aged_after_ms), ..SetPolicy::default() });
}

fn order_of(site: &Site) -> Vec<JobId> {
    queue(&site.state).map(|key| key.task.job).collect()
}

#[test]
fn fifo_knows_priority_and_submission_alone() {
    let mut site = site(1);
    site.tenant(set("rich", 1_000));
    site.tenant(guaranteed(set("poor", 1), 8));
    site.tenant(below("child", "rich", 1));
    policy(&mut site, OrderBy::Fifo, 0);
    let plain: Vec<JobId> =
        ["rich", "poor", "child", "poor"].map(|tenant| site.submit_for(tenant, shape(1, 1, 1), 0, &[])).into();
    let low = site.submit_for("poor", shape(1, 1, 1), -3, &[]);
    let high = site.submit_for("child", shape(1, 1, 1), i32::MAX, &[]);
    let expected: Vec<JobId> = [&[high][..], &plain, &[low]].concat();
    assert_eq!(order_of(&site), expected);
    assert_eq!(site.plan().places.iter().map(|place| place.task.job).collect::<Vec<_>>(), expected);
    policy(&mut site, OrderBy::Fair, 0);
    assert_eq!(order_of(&site)[0], plain[1], "the guarantee goes first again");
}

#[test]
fn what_has_aged_goes_first_in_its_tenant_and_takes_no_others_turn() {
    const HOUR: u64 = 3_600_000;
    let mut site = site(0);
    site.tenant(set("a", 1));
    site.tenant(set("b", 1));
    policy(&mut site, OrderBy::Fair, 10 * HOUR);
    let old = [-7, 0, -7, 3].map(|priority| site.submit_for("a", shape(1, 1, 1), priority, &[]));
    site.wait_ms(6 * HOUR);
    let young = [9, -9].map(|priority| site.submit_for("a", shape(1, 1, 1), priority, &[]));
    let other = [0, 0, 0].map(|priority| site.submit_for("b", shape(1, 1, 1), priority, &[]));
    let of_a = |site: &Site| -> Vec<JobId> { order_of(site).into_iter().filter(|job| !other.contains(job)).collect() };
    assert_eq!(of_a(&site), [young[0], old[3], old[1], old[0], old[2], young[1]]);
    site.wait_ms(5 * HOUR);
    assert_eq!(of_a(&site), [&old[..], &young].concat(), "by age, whatever the priority");
    // The tenants still take turns.
    site.join("n00", hgx("h100"));
    let first = names(&site, order_of(&site).into_iter().take(4));
    assert_eq!(first.iter().filter(|name| *name == "b").count(), 2, "{first:?}");
    policy(&mut site, OrderBy::Fifo, 10 * HOUR);
    assert_eq!(order_of(&site)[..5], [&old[..], &young[..1]].concat());
    policy(&mut site, OrderBy::Fair, 0);
    assert_eq!(of_a(&site)[0], young[0], "never, if the site wants it so");
}

#[test]
fn an_order_that_goes_on_forgets_no_aged_task_and_tells_none_twice() {
    let mut site = site(0);
    site.tenant(set("a", 1));
    policy(&mut site, OrderBy::Fair, 60_000);
    let jobs: Vec<JobId> = (0..100).map(|n| site.submit_for("a", shape(1, 1, 1), n % 7, &[])).collect();
    site.wait_ms(120_000);
    let whole: Vec<JobId> = Order::new(&site.state, Position::default()).map(|key| key.task.job).collect();
    assert_eq!((whole.len(), &whole[..64]), (100, &jobs[..64]));
    let (mut told, mut at) = (Vec::new(), Position::default());
    loop {
        let mut order = Order::new(&site.state, at);
        let some: Vec<JobId> = order.by_ref().take(7).map(|key| key.task.job).collect();
        at = order.position();
        if some.is_empty() {
            break;
        }
        told.extend(some);
    }
    let (mut told, mut all) = (told.clone(), jobs.clone());
    told.sort_unstable();
    all.sort_unstable();
    assert_eq!(told, all);
}

#[test]
fn in_a_tenant_the_ratio_of_waiting_to_the_likely_run_time_decides() {
    const MIN: u64 = 60_000;
    let mut site = site(1);
    (0..2).for_each(|_| site.ran("quick", 600 * MIN, MIN));
    (0..2).for_each(|_| site.ran("slow", 600 * MIN, 500 * MIN));
    let submit = |site: &mut Site, user: &str, priority| {
        let job = site.submit_by(user, shape(1, 1, 8), priority, 600 * MIN);
        site.wait_ms(MIN);
        job
    };
    let slow = submit(&mut site, "slow", 0);
    let fresh = submit(&mut site, "new", 0);
    let quick = [submit(&mut site, "quick", 0), submit(&mut site, "quick", 0)];
    let below = submit(&mut site, "quick", -1);
    assert_eq!(order_of(&site), [&quick[..], &[slow, fresh, below]].concat(), "one guess has 500 min, one the limit");
    assert_eq!(site.plan().places[0].task.job, quick[0]);
    assert_eq!(site.reason(slow).code(), site.reason(fresh).code());
    policy(&mut site, OrderBy::Fifo, 0);
    assert_eq!(order_of(&site), [&[slow, fresh][..], &quick, &[below]].concat(), "fifo learns nothing");
}

#[derive(Clone, Debug)]
struct Crowd {
    /// Ended jobs: user, limit in minutes, run time in minutes.
    ran: Vec<(u8, u64, u64)>,
    /// Who waits: user, limit in minutes, priority, minutes until the next one.
    waits: Vec<(u8, u64, i32, u64)>,
}

fn crowds() -> impl Strategy<Value = Crowd> {
    let limit = || prop::sample::select(vec![0u64, 10, 60, 600]);
    let ran = prop::collection::vec((0u8..3, limit(), 1u64..90), 0..12);
    let waits = prop::collection::vec((0u8..4, limit(), -1i32..=1, 0u64..200), 1..40);
    (ran, waits).prop_map(|(ran, waits)| Crowd { ran, waits })
}

/// No machine is left to start anything.
fn crowded(crowd: &Crowd) -> Site {
    let mut site = site(1);
    for (user, limit_min, ran_min) in &crowd.ran {
        site.ran(&format!("u{user}"), limit_min * 60_000, ran_min * 60_000);
    }
    for (user, limit_min, priority, gap_min) in &crowd.waits {
        site.submit_by(&format!("u{user}"), shape(1, 1, 1), *priority, limit_min * 60_000);
        site.wait_ms(gap_min * 60_000);
    }
    site
}

/// By a look at each job: what has aged, then priorities, then the ratio.
fn by_looking_at_each(site: &Site) -> Vec<JobId> {
    let aged_after_ms = site.state.meta.settings.planning.aged_after_ms;
    let place = |job: &statemachine::record::Job| {
        let waited_ms = site.state.meta.clock_ms - job.submitted_clock_ms;
        let guess_ms = site.state.guess_ms(job.user, job.spec.limit_ms);
        let aged = aged_after_ms > 0 && waited_ms >= aged_after_ms;
        let priority = std::cmp::Reverse(if aged { i32::MAX } else { job.spec.priority });
        (priority, Rank::new(waited_ms, guess_ms, aged_after_ms, job.seq))
    };
    let waits =
        site.state.index.queue.keys().map(|key| (place(&site.state.jobs.get(&key.task.job).unwrap().value), key));
    let mut waits: Vec<_> = waits.collect();
    waits.sort_unstable();
    waits.into_iter().map(|(_, key)| key.task.job).collect()
}

#[derive(Clone, Debug)]
struct Cluster {
    machines: usize,
    /// Weight, guarantee, parent among the earlier ones.
    tenants: Vec<(u32, u32, Option<usize>)>,
    /// Tenant, GPUs, priority.
    jobs: Vec<(usize, u16, i32)>,
}

fn clusters() -> impl Strategy<Value = Cluster> {
    let tenant = (1u32..=4, 0u32..=6, prop::option::of(any::<prop::sample::Index>()));
    let job = (any::<prop::sample::Index>(), 1u16..=4, -1i32..=1);
    (1usize..=3, prop::collection::vec(tenant, 1..6), prop::collection::vec(job, 1..40)).prop_map(
        |(machines, tenants, jobs)| {
            let count = tenants.len();
            let tenants = tenants.into_iter().enumerate().map(|(n, (weight, guarantee, parent))| {
                (weight, guarantee, parent.filter(|_| n > 0).map(|parent| parent.index(n)))
            });
            let jobs = jobs.into_iter().map(|(tenant, gpus, priority)| (tenant.index(count), gpus, priority));
            Cluster { machines, tenants: tenants.collect(), jobs: jobs.collect() }
        },
    )
}

fn name(tenant: usize) -> String {
    format!("t{tenant}")
}

fn built(cluster: &Cluster) -> Site {
    let mut site = site(cluster.machines);
    for (n, (weight, guarantee, parent)) in cluster.tenants.iter().enumerate() {
        let parent = parent.map(name).unwrap_or_default();
        site.tenant(guaranteed(below(&name(n), &parent, *weight), *guarantee));
    }
    for (tenant, gpus, priority) in &cluster.jobs {
        site.submit_for(&name(*tenant), shape(1, 1, *gpus), *priority, &[]);
    }
    site
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Each task once, and in a tenant by priority, then by age.
    #[test]
    fn everything_that_waits_has_one_place(cluster in clusters()) {
        let site = built(&cluster);
        let waits: BTreeSet<_> = site.state.index.queue.keys().copied().collect();
        for order in [queue(&site.state).collect::<Vec<_>>(), Order::new(&site.state, Position::default()).collect()] {
            prop_assert_eq!(order.len(), waits.len());
            prop_assert_eq!(&order.iter().copied().collect::<BTreeSet<_>>(), &waits);
            let mut last = BTreeMap::new();
            for key in order {
                let before = last.insert(key.tenant, (key.priority, key.seq));
                prop_assert!(before < Some((key.priority, key.seq)));
            }
        }
    }

    /// One look at each kin finds the order that a look at each job finds; and a walk of it may stop anywhere.
    #[test]
    fn kin_stand_where_each_of_them_would(crowd in crowds(), aged_min in 0u64..2_000, stop in any::<prop::sample::Index>()) {
        let mut site = crowded(&crowd);
        policy(&mut site, OrderBy::Fair, aged_min * 60_000);
        let should = by_looking_at_each(&site);
        let mut order = Order::new(&site.state, Position::default());
        let mut walked: Vec<JobId> = order.by_ref().take(stop.index(should.len() + 1)).map(|key| key.task.job).collect();
        walked.extend(Order::new(&site.state, order.position()).map(|key| key.task.job));
        prop_assert_eq!(walked, should);
    }

    /// Whom nobody younger passes any more: before a job that has aged stand older ones of its tenant alone, whatever the ratios
    /// and priorities. And no higher priority stands behind a lower one, but for age.
    #[test]
    fn nobody_waits_for_ever_behind_ratios(crowd in crowds()) {
        let mut site = crowded(&crowd);
        let jobs = |site: &Site| -> Vec<(i32, u64, u64)> {
            let of = |job: JobId| site.state.jobs.get(&job).map(|job| (job.value.spec.priority, job.value.seq, job.value.submitted_clock_ms));
            order_of(site).into_iter().filter_map(of).collect()
        };
        policy(&mut site, OrderBy::Fair, 0);
        prop_assert!(jobs(&site).windows(2).all(|pair| pair[0].0 >= pair[1].0));
        policy(&mut site, OrderBy::Fair, 600 * 60_000);
        let all = jobs(&site);
        let aged = |at_ms: u64| site.state.meta.clock_ms >= at_ms + 600 * 60_000;
        let old = all.iter().filter(|job| aged(job.2)).count();
        prop_assert!(all[..old].is_sorted_by_key(|job| job.1) && all[..old].iter().all(|job| aged(job.2)));
    }

    /// A walk that stops anywhere goes on as if it had not stopped.
    #[test]
    fn a_position_goes_on_where_it_stopped(cluster in clusters(), stop in any::<prop::sample::Index>()) {
        let site = built(&cluster);
        let whole: Vec<_> = Order::new(&site.state, Position::default()).collect();
        let stop = stop.index(whole.len() + 1);
        let mut order = Order::new(&site.state, Position::default());
        let mut parts: Vec<_> = order.by_ref().take(stop).collect();
        parts.extend(Order::new(&site.state, order.position()));
        prop_assert_eq!(parts, whole);
    }

    /// With jobs of one GPU: what is guaranteed and wanted is had, and between tenants of one parent that both still
    /// want more and borrow, none is ahead by more than a job (no envy beyond one job; an equal share for each that
    /// wants it).
    #[test]
    fn single_gpus_are_shared_fairly(cluster in clusters()) {
        let single: Vec<_> = cluster.jobs.iter().map(|(tenant, _, _)| (*tenant, 1, 0)).collect();
        let tenants: Vec<_> = cluster.tenants.iter().map(|(weight, guarantee, _)| (*weight, *guarantee, None)).collect();
        let cluster = Cluster { tenants, jobs: single, machines: 1 };
        let mut site = built(&cluster);
        let wants = |tenant: usize| cluster.jobs.iter().filter(|job| job.0 == tenant).count() as u64;
        site.start();
        let had: Vec<u64> = (0..cluster.tenants.len()).map(|n| gpus_of(&site, &name(n))).collect();
        let all: u64 = cluster.tenants.iter().map(|tenant| u64::from(tenant.1)).sum();
        for (a, (weight, guarantee, _)) in cluster.tenants.iter().enumerate() {
            let due = wants(a).min(u64::from(*guarantee));
            prop_assert!(all > 8 || had[a] >= due, "{} of {due} guaranteed: {:?}", had[a], had);
            if all > 8 || had[a] >= wants(a) {
                continue;
            }
            for (b, (other, theirs, _)) in cluster.tenants.iter().enumerate() {
                // The other's last GPU was borrowed while `a` still wanted one.
                if b != a && had[b] > u64::from(*theirs) {
                    let (mine, its) = (had[a] * u64::from(*other), (had[b] - 1) * u64::from(*weight));
                    prop_assert!(its <= mine, "tenant {a} with {guarantee} guaranteed envies {b}: {had:?}");
                }
            }
        }
    }

    /// In a tenant no job starts while one of the same size and a higher priority waits.
    #[test]
    fn a_lower_priority_passes_no_higher_one_of_its_tenant(cluster in clusters()) {
        let site = built(&cluster);
        let made = plan(&site.state, &mut Cache::default(), &Limits::default(), &site.unheard);
        let started: BTreeSet<JobId> = made.places.iter().map(|place| place.task.job).collect();
        let mut waits = BTreeSet::new();
        for key in site.state.index.queue.keys() {
            let gpus = site.state.jobs.get(&key.task.job).unwrap().value.spec.shape.gpus_per_rank;
            if started.contains(&key.task.job) {
                prop_assert!(!waits.contains(&(key.tenant, gpus)), "{:?}", key);
            } else {
                waits.insert((key.tenant, gpus));
            }
        }
    }
}
