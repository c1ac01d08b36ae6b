//! Arrays: one job that stands for many tasks, as stories.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::settings::Settings;
use statemachine::spec::{After, AfterKind, Terms};
use statemachine::*;
use world::*;

fn array(ranges: &[(u32, u32)], throttle: u32) -> SubmitJob {
    let mut job = one_gpu();
    job.spec.retry.max = 1;
    let array = Some(Array { ranges: ranges.to_vec(), throttle });
    job.spec.terms = Some(Box::new(Terms { array, ..Terms::default() }));
    job
}

fn progress(world: &World, id: JobId) -> Progress {
    world.state.jobs.get(&id).and_then(|job| job.value.array()).expect("an array").1.clone()
}

/// Starts the array's next task.
fn start(world: &mut World, id: JobId, node: NodeId) -> (JobId, Token) {
    let token = world.place(id, &[node]).expect("it fits");
    (world.state.leases.get(&token).expect("a lease").value.task.job, token)
}

fn end(world: &mut World, node: NodeId, token: Token, code: i32) {
    world.report(node, token, ended(0, 1, code)).expect("a live part");
}

fn shown(world: &World, key: &str) -> Option<String> {
    keyspace::get(&world.state, key).map(|kv| kv.value)
}

#[test]
fn ten_million_tasks_are_one_record_until_they_start() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 4));
    let id = world.submit(array(&[(5, 10_000_004)], 0));
    assert_eq!((world.state.jobs.len(), world.state.index.queue.len(), world.shown(id)), (1, 1, "PENDING".into()));
    let next = world.submit(one_gpu());
    assert_eq!(next.0, id.0 + 10_000_001, "their ids are set aside");
    let (first, token) = start(&mut world, id, node);
    let (second, _) = start(&mut world, id, node);
    assert_eq!([first.0, second.0], [id.0 + 1, id.0 + 2]);
    let element = |job: JobId| world.state.jobs.get(&job).unwrap().value.element().unwrap();
    assert_eq!([element(first).index, element(second).index], [5, 6]);
    assert_eq!((world.state.jobs.len(), world.state.bodies.len()), (4, 2), "tasks share their array's body");
    assert_eq!(world.state.body(first), world.state.body(id));
    assert_eq!((world.shown(id), world.shown(first)), ("RUNNING".into(), "STARTING".into()));
    end(&mut world, node, token, 0);
    let counts = progress(&world, id);
    assert_eq!((counts.begun, counts.open, counts.ended), (2, 1, [0, 0, 0, 0, 1]));
    let value = shown(&world, &format!("/jobs/{first}")).expect("a key");
    assert!(value.contains(&format!("\"array_index\":5,\"array_job_id\":{id}")), "{value}");
}

#[test]
fn tasks_start_in_their_order_and_no_more_than_the_throttle_at_a_time() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let id = world.submit(array(&[(1, 2), (7, 9)], 2));
    let mut ahead = world.placement(id, &[node]);
    ahead.task.index = 2;
    let no = world.plan(vec![ahead]).pop().unwrap().expect_err("not its turn");
    assert_eq!((no.code, no.detail.as_str()), (Code::TaskGone, "job 1: its next task is 1, not 2"));
    let (_, one) = start(&mut world, id, node);
    start(&mut world, id, node);
    assert!(world.state.index.queue.is_empty(), "two are under way");
    assert_eq!(world.place(id, &[node]).expect_err("the throttle").detail, "job 1: starts no more of its tasks now");
    end(&mut world, node, one, 0);
    let (third, _) = start(&mut world, id, node);
    assert_eq!(world.state.jobs.get(&third).unwrap().value.element(), Some(Element { array: id, index: 7 }));
}

#[test]
fn an_array_ends_with_its_last_task_by_the_worst_of_their_outcomes() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let id = world.submit(array(&[(0, 1)], 0));
    let (first, token) = start(&mut world, id, node);
    end(&mut world, node, token, 3);
    assert_eq!(world.shown(first), "RETRYING", "a task is retried by itself");
    let (second, token) = start(&mut world, id, node);
    end(&mut world, node, token, 0);
    assert_eq!((world.shown(second), world.shown(id)), ("SUCCEEDED".into(), "RUNNING".into()));
    world.wait(60_000);
    let token = world.place(first, &[node]).expect("its second attempt");
    end(&mut world, node, token, 3);
    assert_eq!((world.shown(first), world.shown(id)), ("FAILED".into(), "FAILED".into()));
    assert!(shown(&world, &format!("/results/{id}")).unwrap().contains("\"outcome\":\"FAILED\""));
    assert_eq!(world.state.tenants.get(&TenantId(0)).unwrap().live_jobs, 0);

    world.wait(world.state.meta.settings.linger_ms + 1);
    assert!(world.state.jobs.is_empty() && world.state.bodies.is_empty(), "tasks and array left memory");
    let row = world.state.archived.get(&first).expect("in history");
    assert_eq!(row.body.argv, ["python3", "train.py"], "with the body");
}

#[test]
fn what_comes_back_from_a_machine_stands_before_the_tasks_that_have_not_started() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let (before, id) = (world.submit(one_gpu()), world.submit(array(&[(0, 99)], 0)));
    let (first, token) = start(&mut world, id, node);
    end(&mut world, node, token, 1);
    world.wait(60_000);
    let order: Vec<JobId> = world.state.index.queue.keys().map(|key| key.task.job).collect();
    assert_eq!(order, [before, first, id]);
}

#[test]
fn a_cancel_forbids_every_start_at_once_and_reaches_the_running_tasks_in_steps() {
    let mut world = World::with(Settings { chore_steps: 2, ..Settings::default() });
    let (node, _) = world.register(machine("n1", 1, 8));
    let id = world.submit(array(&[(0, 9_999_999)], 0));
    let tokens: Vec<(JobId, Token)> = (0..5).map(|_| start(&mut world, id, node)).collect();
    end(&mut world, node, tokens[0].1, 1);
    assert_eq!(world.shown(tokens[0].0), "RETRYING");
    assert_eq!(world.run(Command::Cancel { job: id }), Outcome::Done(Reply::Stored(StoredReply::Done)));
    assert_eq!(progress(&world, id).rest, Some((TaskOutcome::Cancelled, None)));
    let told = tokens.iter().filter(|(job, _)| world.shown(*job) != "STARTING").count();
    assert_eq!(told, 2, "two steps an entry: one retrying task, one running");
    assert_eq!(world.state.next_due_ms(), Some(world.clock_ms), "a tick is due");
    assert_eq!(world.place(id, &[node]).map_err(|no| no.code), Err(Code::TaskGone));
    // Even one that the chore has not reached does not come back.
    end(&mut world, node, tokens[4].1, 1);
    assert_eq!(world.shown(tokens[4].0), "CANCELLED");
    (0..3).for_each(|_| world.wait(0));
    assert!(world.state.index.sweeping.is_empty());
    for (_, token) in &tokens[1..4] {
        assert!(world.state.leases.get(token).unwrap().value.verdict.is_some());
        let late = world.report(node, *token, ended(0, 1, 143)).expect_err("its end was decided by the cancel");
        assert_eq!(late.code, Code::AlreadyDecided);
    }
    assert_eq!(world.shown(id), "CANCELLED");
    assert_eq!(progress(&world, id).ended, [0, 0, 10_000_000, 0, 0]);
}

#[test]
fn a_held_array_starts_no_task_and_none_again() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let id = world.submit(array(&[(0, 3)], 0));
    let (first, token) = start(&mut world, id, node);
    world.run(Command::Hold { job: id });
    end(&mut world, node, token, 1);
    world.wait(60_000);
    for job in [id, first] {
        assert_eq!(world.place(job, &[node]).expect_err("held").detail, format!("job {job}: is on hold"));
    }
    world.run(Command::Release { job: id });
    assert!(world.place(first, &[node]).is_ok() && world.place(id, &[node]).is_ok());
    let Outcome::Rejected(no) = world.run(Command::Requeue { job: id }) else { panic!("an array") };
    assert_eq!(no.detail, "job 1 is an array: requeue those of its tasks that run");
}

#[test]
fn a_deadline_ends_the_tasks_that_have_not_started_and_a_parent_all() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let mut job = array(&[(0, 9)], 0);
    job.spec.terms.as_mut().unwrap().deadline_wall_ms = WALL0 + 60_000;
    let id = world.submit(job);
    let (_, token) = start(&mut world, id, node);
    let mut child = array(&[(0, 9)], 0);
    child.spec.terms.as_mut().unwrap().after = vec![After { kind: AfterKind::Ok, job: id }];
    let child = world.submit(child);
    assert_eq!(world.place(child, &[node]).map_err(|no| no.code), Err(Code::TaskGone));
    world.wait(60_000);
    assert_eq!(world.shown(id), "RUNNING");
    assert_eq!(world.state.next_due_wall_ms(), None);
    end(&mut world, node, token, 0);
    assert_eq!((world.shown(id), world.shown(child)), ("CANCELLED".into(), "SKIPPED".into()));
    assert_eq!(progress(&world, id).ended, [0, 0, 9, 0, 1]);
    assert_eq!(progress(&world, child).ended, [0, 0, 0, 10, 0]);
    assert_eq!(world.task(id).result.as_ref().unwrap().cause, Some(EndCause::Deadline));
    assert_eq!(world.task(child).result.as_ref().unwrap().cause, Some(EndCause::Parent(id)));
}

#[test]
fn what_is_no_array_is_refused_with_field_value_and_limit() {
    let mut world = World::new();
    let Outcome::Rejected(no) = world.run(Command::SubmitJob(Box::new(array(&[(0, 10_000_000)], 0)))) else {
        panic!("too many")
    };
    assert_eq!((no.code, no.detail.as_str()), (Code::InvalidSpec, "array has 10000001 tasks, the limit is 10000000"));
}

#[test]
fn an_array_counts_as_one_job_against_a_machine() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let id = world.submit(array(&[(0, 9)], 0));
    for _ in 0..4 {
        let (_, token) = start(&mut world, id, node);
        let failed = PartReport::LaunchFailed { fault: LaunchFault::Node, why: "no cgroup".into() };
        world.report(node, token, failed).expect("a live part");
    }
    assert_eq!(world.state.nodes.get(&node).unwrap().value.admin, NodeAdmin::Ready);
    assert_eq!(world.state.nodes.get(&node).unwrap().value.launch_fails, [id]);
}

/// An array of these indexes whose tasks wait for those of others, each for the ones of its index.
fn behind(parents: &[JobId], ranges: &[(u32, u32)]) -> SubmitJob {
    let mut job = array(ranges, 0);
    job.spec.retry.max = 0;
    let after = parents.iter().map(|job| After { kind: AfterKind::Corr, job: *job }).collect();
    job.spec.terms.as_mut().expect("an array").after = after;
    job
}

/// As `behind`, with no parent and no retry.
fn plain(ranges: &[(u32, u32)]) -> SubmitJob {
    behind(&[], ranges)
}

#[test]
fn a_task_starts_once_the_one_of_its_index_has_succeeded_and_is_skipped_where_it_has_not() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let parent = world.submit(plain(&[(0, 3)]));
    let child = world.submit(behind(&[parent], &[(0, 3)]));
    assert_eq!((world.shown(child), world.state.index.queue.len()), ("PENDING".into(), 1));
    let tokens: Vec<Token> = (0..3).map(|_| start(&mut world, parent, node).1).collect();
    assert_eq!(
        world.place(child, &[node]).expect_err("no peer has ended").detail,
        format!("job {child}: starts no more of its tasks now")
    );
    // Out of order: the second peer's end frees nothing before the first one's.
    end(&mut world, node, tokens[1], 1);
    assert!(world.place(child, &[node]).is_err());
    end(&mut world, node, tokens[0], 0);
    let (first, token) = start(&mut world, child, node);
    assert_eq!(first, child.nth_task(0));
    // The second one's turn has come with the first one's start, and its peer has failed.
    world.wait(1);
    let second = child.nth_task(1);
    assert_eq!(world.shown(second), "SKIPPED");
    let result = world.task(second).result.clone().unwrap();
    assert_eq!((result.cause, result.token), (Some(EndCause::Parent(parent.nth_task(1))), None));
    assert!(world.place(child, &[node]).is_err(), "the third peer runs");
    end(&mut world, node, tokens[2], 0);
    let (third, last) = start(&mut world, child, node);
    assert_eq!(third, child.nth_task(2));
    // A cancel of the parent ends the peers that have not started.
    world.run(Command::Cancel { job: parent });
    world.wait(1);
    assert_eq!(world.shown(child.nth_task(3)), "SKIPPED");
    assert_eq!(world.shown(child), "RUNNING");
    end(&mut world, node, token, 0);
    end(&mut world, node, last, 0);
    assert_eq!((world.shown(child), progress(&world, child).ended), ("SKIPPED".into(), [0, 0, 0, 2, 2]));
    assert!(world.state.index.paced.is_empty() && world.state.index.pacing.is_empty());
}

#[test]
fn all_parents_count_also_when_they_have_left_memory_before_the_child_comes_so_far() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let parents = [(); 2].map(|()| world.submit(plain(&[(5, 6)])));
    let tokens = parents.map(|parent| [(); 2].map(|()| start(&mut world, parent, node).1));
    let child = world.submit(SubmitJob { hold: true, ..behind(&parents, &[(5, 6)]) });
    tokens[0].into_iter().for_each(|token| end(&mut world, node, token, 0));
    end(&mut world, node, tokens[1][1], 0);
    let free = progress(&world, child).paced.expect("it waits for others");
    assert_eq!(free, Paced { parents: 0b11, freed: 0, due: false }, "the first peer of the second one runs");
    end(&mut world, node, tokens[1][0], 1);
    world.wait(world.state.meta.settings.linger_ms + 1);
    assert!(!world.state.jobs.contains(&parents[0]) && !world.state.jobs.contains(&parents[1].nth_task(1)));
    world.wait(1);
    assert_eq!(world.shown(child.nth_task(0)), "SKIPPED");
    world.run(Command::Release { job: child });
    let (second, token) = start(&mut world, child, node);
    assert_eq!(second, child.nth_task(1));
    end(&mut world, node, token, 0);
    assert_eq!(world.shown(child), "SKIPPED");
}

#[test]
fn a_cancelled_child_skips_nobody_and_other_indexes_are_refused() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let parent = world.submit(plain(&[(0, 1)]));
    let outcome = world.run(Command::SubmitJob(Box::new(behind(&[parent], &[(0, 2)]))));
    let detail = format!("after[0] names array {parent} of 2 tasks, must have the same indexes as this one of 3");
    assert!(
        matches!(&outcome, Outcome::Rejected(no) if no.code == Code::InvalidSpec && no.detail == detail),
        "{outcome:?}"
    );
    let child = world.submit(behind(&[parent], &[(0, 1)]));
    world.run(Command::Cancel { job: child });
    let (_, token) = start(&mut world, parent, node);
    end(&mut world, node, token, 1);
    world.wait(1);
    assert_eq!((world.shown(child), progress(&world, child).ended), ("CANCELLED".into(), [0, 0, 2, 0, 0]));
    // A plain job waits for all of an array, and an array for all of a plain job.
    let one = world.submit(one_gpu());
    let array = world.submit(behind(&[one], &[(0, 1)]));
    assert!(world.state.jobs.get(&array).unwrap().value.holds.after);
}
