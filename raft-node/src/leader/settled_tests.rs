//! When the planner may rest: the memory of its last cycle, beside reservations.

use super::*;
use scheduling::plan::{Cache, plan};
use statemachine::command::{PartReport, Place, SetPolicy, SetPriority, SubmitJob};
use statemachine::{Command, JobId};

use crate::leader::world::{World, ended, job, machine, one_gpu, shape};

fn limited(submit: SubmitJob, priority: i32, limit_ms: u64) -> SubmitJob {
    SubmitJob { spec: JobSpec { limit_ms, priority, ..submit.spec.clone() }, ..submit }
}

/// Half of a machine is taken, and a job waits for the whole of it; another one for what is kept.
fn world() -> (World, JobId) {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 2));
    let first = world.submit(limited(one_gpu(), 0, 60_000));
    world.place(first, &[node]).expect("it fits");
    let whole = world.submit(limited(job(shape(1, 1, 2)), 0, 60_000));
    world.submit(limited(one_gpu(), 0, 600_000));
    (world, whole)
}

fn settle(world: &World) -> Settled {
    let unheard = BTreeSet::new();
    let plan = plan(&world.state, &mut Cache::default(), &Limits::default(), &unheard);
    assert_eq!((plan.places.len(), plan.reservations.len()), (0, 1));
    Settled::after(&plan, &Limits::default(), &world.state, unheard).expect("a complete cycle")
}

fn holds(settled: &mut Settled, world: &World) -> bool {
    settled.still_holds(&world.state, &BTreeSet::new())
}

#[test]
fn who_comes_behind_one_that_is_barred_changes_nothing() {
    let (mut world, _) = world();
    let mut settled = settle(&world);
    for limit_ms in [600_000, 900_000, 0] {
        world.submit(limited(one_gpu(), 0, limit_ms));
        assert!(holds(&mut settled, &world));
    }
    world.submit(limited(job(shape(1, 1, 2)), 0, 60_000));
    assert!(holds(&mut settled, &world), "one more that finds no room");
}

#[test]
fn a_shorter_job_a_higher_one_and_the_end_of_the_reservation_wake_the_planner() {
    let changes: [fn(&mut World, JobId); 3] = [
        |world, _| {
            world.submit(limited(one_gpu(), 0, 30_000));
        },
        |world, _| {
            world.submit(limited(one_gpu(), 1, 0));
        },
        |world, whole| {
            world.run(Command::Cancel { job: whole });
        },
    ];
    for change in changes {
        let (mut world, whole) = world();
        let mut settled = settle(&world);
        change(&mut world, whole);
        assert!(!holds(&mut settled, &world));
        let plan = plan(&world.state, &mut Cache::default(), &Limits::default(), &BTreeSet::new());
        assert_eq!(plan.places.len(), 1, "and it starts something");
    }
}

#[test]
fn time_alone_wakes_the_planner_where_something_is_kept() {
    let (mut world, _) = world();
    let mut settled = settle(&world);
    world.wait(ORDER_KEEPS_MS - 1_000);
    assert!(holds(&mut settled, &world));
    world.wait(1_000);
    assert!(!holds(&mut settled, &world), "who waits may stand in another order");
}

/// Three jobs of one GPU each, and a machine with two.
fn full() -> (World, Settled, Vec<Place>) {
    let mut world = World::new();
    world.register(machine("n1", 1, 2));
    for _ in 0..3 {
        world.submit(one_gpu());
    }
    let plan = plan(&world.state, &mut Cache::default(), &Limits::default(), &BTreeSet::new());
    assert_eq!(plan.places.len(), 2);
    let settled = Settled::after(&plan, &Limits::default(), &world.state, BTreeSet::new());
    (world, settled.expect("a complete cycle"), plan.places)
}

#[test]
fn a_cycle_whose_placements_all_came_true_needs_no_second_one() {
    let (mut world, mut settled, places) = full();
    assert!(!holds(&mut settled, &world), "nothing is placed yet");
    world.plan(places);
    assert!(holds(&mut settled, &world));
    world.submit(one_gpu());
    assert!(holds(&mut settled, &world), "one more that finds no room");
    let first = world.state.allocs.iter().next().map(|(node, alloc)| (*node, alloc.leases[0])).expect("a lease");
    world.report(first.0, first.1, ended(0, 1, 0)).expect("it ended");
    assert!(!holds(&mut settled, &world), "a GPU is free");
}

#[test]
fn a_placement_that_was_refused_and_a_machine_that_changed_meanwhile_wake_the_planner() {
    let (mut world, mut settled, mut places) = full();
    let last = places.pop().expect("two");
    world.plan(places);
    assert!(!holds(&mut settled, &world), "one of two");
    world.plan(vec![last]);
    assert!(holds(&mut settled, &world));

    let (mut world, mut settled, places) = full();
    world.plan(places);
    world.register(machine("n2", 2, 2));
    assert!(!holds(&mut settled, &world), "a machine came");
}

/// A machine is taken by a job that may be ended once it has run for so long, and one waits that may end it.
fn urgent(min_run_ms: u64) -> World {
    let mut world = World::new();
    world.run(Command::SetPolicy(SetPolicy { min_run_ms: Some(min_run_ms), ..SetPolicy::default() }));
    for (name, value, preempts) in [("low", 10, false), ("high", 100, true)] {
        let set =
            SetPriority { name: name.into(), create: true, value, tenants: vec![], preempts, preemptible: !preempts };
        world.run(Command::SetPriority(set));
    }
    let (node, _) = world.register(machine("n1", 1, 2));
    let of = |class: &str| SubmitJob { priority_class: class.into(), ..job(shape(1, 1, 2)) };
    let low = world.submit(of("low"));
    world.place(low, &[node]).expect("it fits");
    world.submit(of("high"));
    world
}

fn planned(world: &World) -> (Plan, Option<Settled>) {
    let plan = plan(&world.state, &mut Cache::default(), &Limits::default(), &BTreeSet::new());
    let settled = Settled::after(&plan, &Limits::default(), &world.state, BTreeSet::new());
    (plan, settled)
}

#[test]
fn the_planner_rests_until_somebody_has_run_for_long_enough_to_be_ended() {
    let mut world = urgent(60_000);
    let (plan, settled) = planned(&world);
    assert_eq!((plan.preempts.len(), plan.preempts_from), (0, Some(world.clock_ms + 60_000)));
    let mut settled = settled.expect("nobody is to make room yet");
    world.wait(59_999);
    assert!(holds(&mut settled, &world));
    world.wait(1);
    assert!(!holds(&mut settled, &world));
    assert_eq!(planned(&world).0.preempts.len(), 1);
}

#[test]
fn the_planner_rests_while_somebody_makes_room_and_not_when_he_has() {
    let mut world = urgent(0);
    let (mut plan, settled) = planned(&world);
    assert!(settled.is_none() && plan.preempts.len() == 1);
    let preempt = plan.preempts.remove(0);
    let victim = preempt.victims[0];
    world.run(Command::Preempt(preempt));
    let (plan, settled) = planned(&world);
    assert_eq!((plan.places.len(), plan.preempts.len()), (0, 0));
    let mut settled = settled.expect("all is under way");
    world.wait(1_000);
    assert!(holds(&mut settled, &world));
    let node = *world.state.allocs.iter().next().expect("a machine").0;
    world.report(node, victim, PartReport::Released).expect("nothing is left of it");
    assert!(!holds(&mut settled, &world));
    assert_eq!(planned(&world).0.places.len(), 1);
}
