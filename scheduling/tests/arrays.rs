//! Arrays in the planner: one entry of the queue that gives task after task.

mod site;

use proptest::prelude::*;
use scheduling::Reason;
use scheduling::order::queue;
use site::{Site, hgx, mock_v100, shape};
use statemachine::command::SetTenant;
use statemachine::{JobId, TaskKey};

fn set(name: &str, weight: u32) -> SetTenant {
    SetTenant { name: name.into(), parent: Some(String::new()), weight: Some(weight), ..SetTenant::default() }
}

fn open(site: &Site, array: JobId) -> u32 {
    site.state.jobs.get(&array).and_then(|job| job.value.array()).map_or(0, |(_, progress)| progress.open)
}

#[test]
fn an_array_fills_what_is_free_in_one_cycle_and_stands_once_in_the_queue() {
    let mut site = Site::default();
    site.join("n1", hgx("h100"));
    let (array, behind) =
        (site.submit_array("default", shape(1, 1, 1), 1_000_000, 0), site.submit(shape(1, 1, 1), 0, &[]));
    let order: Vec<TaskKey> = queue(&site.state).map(|key| key.task).collect();
    assert_eq!(order, [TaskKey { job: array, index: 0 }, TaskKey::only(behind)]);
    let plan = site.plan();
    let named: Vec<TaskKey> = plan.places.iter().map(|place| place.task).collect();
    assert_eq!(named, (0..8).map(|index| TaskKey { job: array, index }).collect::<Vec<_>>());
    assert_eq!(
        plan.reasons.iter().map(|(task, _)| task.job).collect::<Vec<_>>(),
        [array, behind],
        "one reason for the rest"
    );
    site.grant(&plan);
    assert_eq!(open(&site, array), 8);
    assert_eq!(site.reason(array).code(), "GPUS_BUSY");
}

#[test]
fn no_more_than_the_limit_of_an_array_start_and_it_says_so() {
    let mut site = Site::default();
    site.join("n1", hgx("h100"));
    let (array, behind) = (site.submit_array("default", shape(1, 1, 1), 20, 3), site.submit(shape(1, 1, 4), 0, &[]));
    assert_eq!(site.start().len(), 4);
    assert_eq!(open(&site, array), 3);
    assert_eq!(site.reason(array), Reason::ArrayLimit { open: 3, limit: 3 });
    assert!(site.state.tasks.contains(&TaskKey::only(behind)), "what is behind it starts");
    assert!(site.plan().places.is_empty());
}

#[test]
fn arrays_of_two_tenants_take_turns_by_weight() {
    let mut site = Site::default();
    site.join("n1", hgx("h100"));
    site.tenant(set("a", 1));
    site.tenant(set("b", 3));
    let (a, b) = (site.submit_array("a", shape(1, 1, 1), 100, 0), site.submit_array("b", shape(1, 1, 1), 100, 0));
    site.start();
    assert_eq!((open(&site, a), open(&site, b)), (2, 6));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is planned of arrays is accepted, goes in their order and within their limits, and all of it comes to its end.
    #[test]
    fn arrays_among_jobs_are_granted_as_planned_and_end(
        arrays in prop::collection::vec((1u16..4, 1u32..30, 0u32..5), 1..4),
        gangs in 0usize..4,
    ) {
        let mut site = Site::default();
        for n in 0..3 {
            site.join(&format!("n{n}"), if n == 0 { hgx("h100") } else { mock_v100() });
        }
        let ids: Vec<JobId> =
            arrays.iter().map(|(gpus, tasks, limit)| site.submit_array("default", shape(1, 1, *gpus), *tasks, *limit)).collect();
        for _ in 0..gangs {
            site.submit(shape(2, 1, 3), 0, &[]);
        }
        let mut rounds = 0;
        while site.state.jobs.iter().any(|(_, job)| job.value.ended.is_none()) {
            rounds += 1;
            prop_assert!(rounds < 200, "it does not end");
            let tokens = site.start();
            site.state.check().expect("all invariants hold");
            for (id, (_, _, limit)) in ids.iter().zip(&arrays) {
                prop_assert!(*limit == 0 || open(&site, *id) <= *limit);
            }
            // Some end; the oldest at least.
            tokens.chunks(3).flat_map(|some| some.iter().take(2)).for_each(|token| site.finish(*token));
            let left: Vec<_> = site.state.leases.iter().map(|(token, _)| *token).take(1).collect();
            left.into_iter().for_each(|token| site.finish(token));
        }
        for (id, (_, tasks, _)) in ids.iter().zip(&arrays) {
            let job = site.state.jobs.get(id).unwrap();
            prop_assert_eq!(job.value.array().unwrap().1.ended, [0, 0, 0, 0, *tasks]);
        }
    }
}
