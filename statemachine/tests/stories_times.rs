//! When a job may start: begin times, deadlines and parents, as stories.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::settings::Settings;
use statemachine::spec::{After, AfterKind, Terms};
use statemachine::*;
use world::*;

fn with(terms: Terms) -> SubmitJob {
    let mut job = one_gpu();
    job.spec.terms = Some(Box::new(terms));
    job
}

fn after(parents: &[(AfterKind, JobId)]) -> SubmitJob {
    let after = parents.iter().map(|(kind, job)| After { kind: *kind, job: *job }).collect();
    with(Terms { after, ..Terms::default() })
}

fn refused(world: &mut World, job: SubmitJob) -> (Code, String) {
    match world.run(Command::SubmitJob(Box::new(job))) {
        Outcome::Rejected(no) => (no.code, no.detail),
        other => panic!("{other:?}"),
    }
}

/// Runs the job to its end with this exit code, without retries.
fn end(world: &mut World, node: NodeId, job: JobId, code: i32) {
    let token = world.place(job, &[node]).expect("it fits");
    world.report(node, token, ended(0, 1, code)).expect("a live part");
}

fn once() -> SubmitJob {
    let mut job = one_gpu();
    job.spec.retry.max = 0;
    job
}

fn cause(world: &World, job: JobId) -> Option<EndCause> {
    world.task(job).result.as_ref().and_then(|result| result.cause)
}

// ------------------------------------------------------------------------------------------------- begin and deadline

#[test]
fn a_job_does_not_start_before_its_begin_time_and_wall_time_alone_brings_it() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let begin_wall_ms = WALL0 + 61_000;
    let id = world.submit(with(Terms { begin_wall_ms, ..Terms::default() }));
    assert_eq!(world.place(id, &[node]).map_err(|no| no.code), Err(Code::TaskGone));
    assert_eq!((world.state.next_due_wall_ms(), world.state.next_due_ms()), (Some(begin_wall_ms), None));
    world.wait(59_999);
    assert!(world.state.index.queue.is_empty());
    world.wait(1);
    assert!(world.place(id, &[node]).is_ok());
    assert_eq!(world.state.next_due_wall_ms(), None);
}

#[test]
fn a_wall_clock_that_goes_back_takes_no_begin_back() {
    let mut world = World::new();
    world.submit(with(Terms { begin_wall_ms: WALL0 + 2_000, ..Terms::default() }));
    world.wait(1_000);
    let back = Entry { level: LEVEL, clock_ms: world.clock_ms, wall_ms: WALL0 - 999, salt: 1, cmds: Vec::new() };
    world.state.apply(&back).unwrap();
    world.state.check().unwrap();
    assert_eq!(world.state.index.queue.len(), 1);
}

#[test]
fn a_deadline_that_can_not_be_kept_is_refused_with_the_numbers() {
    let mut world = World::new();
    let mut job = with(Terms { deadline_wall_ms: WALL0 + 60_000, ..Terms::default() });
    job.spec.limit_ms = 59_001;
    let (code, detail) = refused(&mut world, job.clone());
    assert_eq!(code, Code::DeadlineTooSoon);
    assert!(detail.contains("59001 ms") && detail.contains("1800000060000"), "{detail}");
    job.spec.limit_ms = 59_000;
    world.submit(job);
    let begin_wall_ms = WALL0 + 60_001;
    let late = with(Terms { begin_wall_ms, deadline_wall_ms: WALL0 + 60_000, ..Terms::default() });
    assert_eq!(refused(&mut world, late).0, Code::DeadlineTooSoon);
}

#[test]
fn a_job_that_waits_until_it_is_too_late_is_cancelled_with_the_reason() {
    let mut world = World::new();
    let mut job = with(Terms { deadline_wall_ms: WALL0 + 60_000, ..Terms::default() });
    job.spec.limit_ms = 10_000;
    let id = world.submit(job);
    world.wait(48_999);
    assert_eq!(world.shown(id), "PENDING");
    world.wait(1);
    assert_eq!((world.shown(id).as_str(), cause(&world, id)), ("CANCELLED", Some(EndCause::Deadline)));
    assert_eq!(world.state.next_due_wall_ms(), None);
}

#[test]
fn an_attempt_runs_over_its_deadline_and_is_not_tried_again_after_it() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(with(Terms { deadline_wall_ms: WALL0 + 60_000, ..Terms::default() }));
    let token = world.place(id, &[node]).unwrap();
    world.wait(90_000);
    assert_eq!(world.shown(id), "STARTING");
    world.report(node, token, ended(0, 1, 1)).unwrap();
    world.wait(0);
    assert_eq!((world.shown(id).as_str(), cause(&world, id)), ("CANCELLED", Some(EndCause::Deadline)));
}

// ------------------------------------------------------------------------------------------------------------ parents

#[test]
fn a_child_starts_once_its_last_parent_has_ended_as_needed() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let (first, second) = (world.submit(once()), world.submit(once()));
    let child = world.submit(after(&[(AfterKind::Ok, first), (AfterKind::NotOk, second)]));
    end(&mut world, node, first, 0);
    let waits: Vec<JobId> = world.state.jobs.get(&child).unwrap().value.waits_for().map(|after| after.job).collect();
    assert_eq!(waits, [second]);
    assert_eq!(world.place(child, &[node]).map_err(|no| no.code), Err(Code::TaskGone));
    end(&mut world, node, second, 1);
    assert!(world.place(child, &[node]).is_ok());
    assert!(world.state.index.dependants.is_empty() && world.state.index.ripe.is_empty());
}

#[test]
fn a_child_that_can_not_be_satisfied_is_skipped_with_the_parent_named_and_so_are_its_children() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let parent = world.submit(once());
    let child = world.submit(after(&[(AfterKind::Ok, parent)]));
    let grandchild = world.submit(after(&[(AfterKind::Corr, child)]));
    let any = world.submit(after(&[(AfterKind::Any, grandchild)]));
    end(&mut world, node, parent, 1);
    assert_eq!((world.shown(child).as_str(), cause(&world, child)), ("SKIPPED", Some(EndCause::Parent(parent))));
    assert_eq!(
        (world.shown(grandchild).as_str(), cause(&world, grandchild)),
        ("SKIPPED", Some(EndCause::Parent(child)))
    );
    assert_eq!((world.shown(any).as_str(), world.state.index.queue.len()), ("PENDING", 1));
}

#[test]
fn parents_that_ended_before_are_judged_at_once_in_memory_and_in_history() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let parent = world.submit(once());
    end(&mut world, node, parent, 0);
    for _ in 0..2 {
        let ready = world.submit(after(&[(AfterKind::Ok, parent)]));
        assert!(!world.state.jobs.get(&ready).unwrap().value.holds.any());
        let never = world.submit(after(&[(AfterKind::NotOk, parent)]));
        assert_eq!((world.shown(never).as_str(), cause(&world, never)), ("SKIPPED", Some(EndCause::Parent(parent))));
        world.wait(300_000);
        assert!(!world.state.jobs.contains(&parent));
    }
}

#[test]
fn unknown_parents_and_parents_named_twice_are_refused_and_a_cycle_can_not_be_written_down() {
    let mut world = World::new();
    let own = JobId(world.state.meta.next_job);
    assert_eq!(refused(&mut world, after(&[(AfterKind::Ok, own)])).0, Code::DependencyUnknown);
    let parent = world.submit(once());
    let twice = after(&[(AfterKind::Ok, parent), (AfterKind::Ok, parent)]);
    assert_eq!(refused(&mut world, twice), (Code::InvalidSpec, format!("after names afterok:{parent} twice")));
    let many: Vec<_> = (0..65).map(|_| (AfterKind::Any, parent)).collect();
    assert_eq!(refused(&mut world, after(&many)).1, "after names 65 jobs, the limit is 64");
}

#[test]
fn a_parent_of_many_children_tells_them_in_steps_and_none_starts_early() {
    let mut world = World::with(Settings { chore_steps: 2, ..Settings::default() });
    let parent = world.submit(once());
    let children: Vec<JobId> = (0..5).map(|_| world.submit(after(&[(AfterKind::Any, parent)]))).collect();
    world.run(Command::Cancel { job: parent });
    assert_eq!(world.state.index.queue.len(), 2);
    assert_eq!(world.state.next_due_ms(), Some(world.state.meta.clock_ms));
    world.wait(0);
    world.wait(0);
    assert_eq!((world.state.index.queue.len(), world.state.index.ripe.len()), (children.len(), 0));
}

#[test]
fn a_cancelled_child_is_forgotten_by_its_parent() {
    let mut world = World::new();
    let parent = world.submit(once());
    let child = world.submit(after(&[(AfterKind::Ok, parent)]));
    world.run(Command::Cancel { job: child });
    assert_eq!((world.shown(child).as_str(), world.state.index.dependants.len()), ("CANCELLED", 0));
}
