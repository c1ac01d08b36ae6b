//! Jobs that leave open on how many machines their GPUs are: how the planner cuts them, and what it says of those that it
//! can't.

mod site;

use std::collections::BTreeSet;

use proptest::prelude::*;
use scheduling::plan::Cache;
use scheduling::why;
use site::{Machine, Site, hgx, mock_v100, shape};
use statemachine::command::SetTenant;
use statemachine::domain::{Level, Topology};
use statemachine::spec::Shape;
use statemachine::{JobId, TaskKey};

/// GPUs on each machine that the plan gives the job, by name; empty = none.
fn parts(site: &Site, job: JobId) -> Vec<(String, usize)> {
    let placed = site.placed(&site.plan(), job).unwrap_or_default();
    placed.into_iter().map(|(name, gpus)| (name, gpus.len())).collect()
}

fn join(site: &mut Site, names: &[&str], machine: Machine) {
    names.iter().for_each(|name| {
        site.join(name, machine.clone());
    });
}

fn named(names: &[&str], gpus: usize) -> Vec<(String, usize)> {
    names.iter().map(|name| ((*name).to_owned(), gpus)).collect()
}

#[test]
fn gpus_go_to_the_fewest_machines_in_equal_parts() {
    let mut site = Site::default();
    join(&mut site, &["a", "b", "c"], hgx("h100"));
    for (gpus, names, each) in [(16, &["a", "b"] as &[&str], 8), (12, &["a", "b"], 6), (18, &["a", "b", "c"], 6)] {
        let job = site.submit(shape(0, 1, gpus), 0, &[]);
        assert_eq!(parts(&site, job), named(names, each));
        site.cancel(job);
    }
    // Two processes share what a machine has.
    let two = site.submit(shape(0, 2, 6), 0, &[]);
    assert_eq!(parts(&site, two), named(&["a", "b"], 6));
    let token = site.start()[0];
    let ranks: Vec<u32> =
        site.state.leases.get(&token).unwrap().value.parts.iter().map(|part| part.first_rank).collect();
    assert_eq!(ranks, [0, 2]);
    assert_eq!(site.state.check(), Ok(()));
}

#[test]
fn a_job_waits_for_the_fewest_machines_and_keeps_them() {
    let mut site = Site::default();
    join(&mut site, &["a", "b"], hgx("h100"));
    join(&mut site, &["v", "w", "x", "y"], mock_v100());
    site.submit_limited("default", shape(2, 1, 1), 0, &["h100"], 60_000);
    assert_eq!(site.start().len(), 1);
    let job = site.submit(shape(0, 1, 16), 0, &[]);
    let wanted = "needs 2 machines with 8 GPUs each; 0 machines have room now, best has 7 free on a";
    assert_eq!(site.reason(job).to_string(), wanted);
    let plan = site.plan();
    let kept: Vec<usize> = plan.reservations[0].parts.iter().map(|part| part.gpu_order.len()).collect();
    assert_eq!((plan.reservations[0].task, kept), (TaskKey::only(job), vec![8, 8]));
    // What needs only four of another type is cut for those.
    let other = site.submit(shape(0, 1, 16), 0, &["v100"]);
    assert_eq!(parts(&site, other), named(&["v", "w", "x", "y"], 4));
}

#[test]
fn a_job_that_waits_follows_the_machines() {
    let mut site = Site::default();
    let job = site.submit(shape(0, 1, 8), 0, &[]);
    assert_eq!(site.reason(job).code(), "NO_NODES");
    site.join("v", mock_v100());
    let wanted = "needs 8 GPUs in equal parts; no machines could ever hold it so, 4 on one machine would fit";
    assert_eq!(site.reason(job).to_string(), wanted);
    assert_eq!(site.plan().reasons[0].1.to_string(), wanted);
    site.join("w", mock_v100());
    assert_eq!(parts(&site, job), named(&["v", "w"], 4));
    site.join("a", hgx("h100"));
    assert_eq!(parts(&site, job), named(&["a"], 8));
}

#[test]
fn what_cannot_be_cut_is_told_what_could_be() {
    let mut site = Site::default();
    join(&mut site, &["a", "b"], hgx("h100"));
    let job = site.submit(shape(0, 1, 13), 0, &[]);
    let why = why(&site.state, &mut Cache::default(), TaskKey::only(job), &BTreeSet::new()).expect("it waits");
    let wanted =
        "needs 13 GPUs in equal parts; no machines could ever hold it so, 12 as 2 x 6 or 14 as 2 x 7 would fit";
    assert_eq!((why.reason.code(), why.reason.to_string().as_str()), ("NEVER", wanted));
    assert_eq!(why.changes[0].ask, "--gpus 12");
    // The same on one machine, as it was asked for.
    let whole = site.submit(shape(1, 1, 13), 0, &[]);
    assert!(site.reason(whole).to_string().starts_with("needs 13 GPUs on one machine; no machine could ever run it"));
    let more = site.submit(shape(0, 1, 20), 0, &[]);
    assert!(site.reason(more).to_string().ends_with("16 as 2 x 8 would fit"));
}

#[test]
fn parts_are_in_one_domain_where_they_must_be() {
    let mut site = Site::default();
    for (name, rack) in [("a", "r1"), ("b", "r2"), ("v", "r3"), ("w", "r3"), ("x", "r3"), ("y", "r3")] {
        let machine = if rack == "r3" { mock_v100() } else { hgx("h100") };
        site.join_with(name, machine, &[("rack", rack)]);
    }
    let in_a_rack = Some(Topology { level: Level::Rack, required: true });
    let job = site.submit(Shape { topology: in_a_rack, ..shape(0, 1, 16) }, 0, &[]);
    assert_eq!(parts(&site, job), named(&["v", "w", "x", "y"], 4));
    let anywhere = site.submit(shape(0, 1, 16), 0, &["h100"]);
    assert_eq!(parts(&site, anywhere), named(&["a", "b"], 8));
}

#[test]
fn an_elastic_job_takes_the_most_that_fits() {
    let mut site = Site::default();
    join(&mut site, &["a", "b", "c"], hgx("h100"));
    // 32 can't be had on three machines of eight.
    let job = site.submit_elastic("default", shape(0, 1, 8), 2, 0);
    assert_eq!(parts(&site, job), named(&["a", "b"], 8));
    let token = site.start()[0];
    assert_eq!(site.state.check(), Ok(()));
    // Its next attempt finds a machine taken.
    site.submit_limited("default", shape(1, 1, 8), 1, &[], 60_000);
    site.submit_limited("default", shape(1, 1, 1), 1, &[], 60_000);
    assert_eq!(site.start().len(), 1);
    site.fail_launch(token);
    site.wait_ms(60_000);
    assert_eq!(parts(&site, job), named(&["b"], 8));
}

#[test]
fn an_elastic_job_waits_for_the_least_that_it_takes() {
    let mut site = Site::default();
    join(&mut site, &["a", "b"], hgx("h100"));
    site.submit_limited("default", shape(2, 1, 1), 0, &[], 60_000);
    assert_eq!(site.start().len(), 1);
    let job = site.submit_elastic("default", shape(0, 1, 8), 1, 0);
    assert_eq!(site.reason(job).to_string(), "needs 8 GPUs on one machine; best has 7 free on a");
    let plan = site.plan();
    let kept: Vec<usize> = plan.reservations[0].parts.iter().map(|part| part.gpu_order.len()).collect();
    assert_eq!((plan.reservations[0].task, kept), (TaskKey::only(job), vec![8]));
    // One that takes less starts with what is there.
    let small = site.submit_elastic("default", shape(0, 1, 2), 2, 30_000);
    assert_eq!(parts(&site, small), named(&["a"], 4));
    let none = site.submit_elastic("default", shape(0, 1, 13), 1, 0);
    let wanted =
        "needs 13 GPUs in equal parts; no machines could ever hold it so, 12 as 2 x 6 or 14 as 2 x 7 would fit";
    assert_eq!(site.reason(none).to_string(), wanted);
}

#[test]
fn an_elastic_job_keeps_to_the_quota_and_is_charged_for_what_it_got() {
    let mut site = Site::default();
    join(&mut site, &["a", "b"], hgx("h100"));
    site.tenant(SetTenant { name: "ai".into(), limit_gpus: Some(Some(9)), ..SetTenant::default() });
    let job = site.submit_elastic("ai", shape(0, 1, 4), 2, 0);
    assert_eq!(parts(&site, job), named(&["a"], 8));
    site.start();
    let tenant = site.state.tenants.iter().find(|(_, tenant)| tenant.name == "ai").expect("it").1;
    assert_eq!(tenant.used.all_gpus(), 8);
    let more = site.submit_elastic("ai", shape(0, 1, 2), 1, 0);
    assert_eq!(site.reason(more).code(), "QUOTA");
    let one = site.submit_elastic("ai", shape(0, 1, 1), 3, 0);
    assert_eq!(parts(&site, one), named(&["b"], 1));
    assert_eq!(site.state.check(), Ok(()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Against every number of machines: the fewest of which there are enough.
    #[test]
    fn the_cut_is_the_one_of_brute_force(large in 0usize..4, small in 0usize..5, ranks in 1u16..=3, each in 1u16..=24) {
        let mut site = Site::default();
        let names: Vec<String> = (0..large).map(|nth| format!("h{nth}")).collect();
        join(&mut site, &names.iter().map(String::as_str).collect::<Vec<_>>(), hgx("h100"));
        let names: Vec<String> = (0..small).map(|nth| format!("v{nth}")).collect();
        join(&mut site, &names.iter().map(String::as_str).collect::<Vec<_>>(), mock_v100());
        let job = site.submit(shape(0, ranks, each), 0, &[]);
        let spec = &site.state.jobs.get(&job).unwrap().value.spec;
        let fits = |nodes: u16| {
            let gpus = u32::from(ranks * each / nodes);
            let has = |count: usize, of: u32| gpus <= of && usize::from(nodes) <= count;
            each % nodes == 0 && (has(large, 8) || has(small, 4))
        };
        let fewest = (1..=24).find(|nodes| fits(*nodes));
        if spec.shape.is_open() {
            prop_assert_eq!(site.state.fewest_nodes(spec), fewest.map(u32::from));
        } else {
            prop_assert!(fewest == Some(1) || each == 1);
        }
        // On an idle cluster it starts just so.
        let found = site.placed(&site.plan(), job).map(|parts| parts.len());
        prop_assert_eq!(found, fewest.map(usize::from));
        if let Some(fewer) = site.state.nearest_cuts(spec).fewer {
            let gpus = u16::try_from(fewer.gpus()).unwrap();
            prop_assert!(gpus < ranks * each && gpus % ranks == 0);
            let smaller = site.submit(shape(0, ranks, gpus / ranks), 9, &[]);
            let found = site.placed(&site.plan(), smaller).expect("what is told fits");
            prop_assert_eq!((found.len() as u32, found[0].1.len() as u32), (fewer.nodes, fewer.gpus_each));
        }
    }

    /// It has as many GPUs as the largest of the jobs of one size that would start in its place.
    #[test]
    fn an_elastic_job_is_the_largest_that_would_start(
        large in 0usize..4, small in 0usize..4, taken in prop::collection::vec(1u16..=4, 0..8),
        each in 1u16..=6, doublings in 0u8..=3
    ) {
        let mut site = Site::default();
        let names: Vec<String> = (0..large).map(|nth| format!("h{nth}")).collect();
        join(&mut site, &names.iter().map(String::as_str).collect::<Vec<_>>(), hgx("h100"));
        let names: Vec<String> = (0..small).map(|nth| format!("v{nth}")).collect();
        join(&mut site, &names.iter().map(String::as_str).collect::<Vec<_>>(), mock_v100());
        taken.into_iter().for_each(|gpus| { site.submit(shape(1, 1, gpus), 0, &[]); });
        site.start();
        let placed_of = |mut site: Site, gpus: u16, doublings: u8| {
            let job = site.submit_elastic("default", shape(0, 1, gpus), doublings, 0);
            parts(&site, job)
        };
        let again = || Site { state: site.state.clone(), ..Site::default() };
        let of_one_size = (0..=doublings).rev().map(|times| placed_of(again(), each << times, 0));
        let largest = of_one_size.into_iter().find(|parts| !parts.is_empty()).unwrap_or_default();
        prop_assert_eq!(placed_of(again(), each, doublings), largest);
    }
}
