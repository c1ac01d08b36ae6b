//! What a person's word does to a job and an operator's to a node: holds, requeues and drains, as stories.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::settings::Settings;
use statemachine::*;
use world::*;

fn exited(cause: ExitCause, code: i32) -> PartReport {
    PartReport::Exited { exits: exits(0, 1, code, cause), released: true }
}

/// A machine, a job that runs there, and its token.
fn running(world: &mut World) -> (NodeId, JobId, Token) {
    let (node, _) = world.register(machine("n1", 1, 2));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).expect("it fits");
    world.report(node, token, PartReport::Started { port: 29_500 }).expect("a live part");
    (node, id, token)
}

#[test]
fn a_job_submitted_on_hold_starts_once_it_is_released() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 2));
    let id = world.submit(SubmitJob { hold: true, ..one_gpu() });
    assert_eq!((world.state.index.queue.len(), world.state.index.waiting.len()), (0, 1));
    assert_eq!(world.place(id, &[node]).map_err(|no| no.code), Err(Code::TaskGone));
    world.run(Command::Release { job: id });
    assert_eq!((world.state.index.queue.len(), world.state.index.waiting.len()), (1, 0));
    assert!(world.place(id, &[node]).is_ok());
}

#[test]
fn a_hold_lets_a_running_attempt_go_on_and_keeps_the_next_one() {
    let mut world = World::new();
    let (node, id, token) = running(&mut world);
    world.run(Command::Hold { job: id });
    assert_eq!(world.shown(id), "RUNNING");
    world.report(node, token, ended(0, 1, 1)).unwrap();
    world.wait(5_000);
    assert_eq!(world.shown(id), "PENDING");
    assert!(world.state.job_view(id).unwrap().task.holds.user && world.state.index.queue.is_empty());
}

#[test]
fn a_hold_is_kept_by_its_owner_alone() {
    let mut world = World::new();
    let id = world.submit(one_gpu());
    for command in [Command::Hold { job: id }, Command::Release { job: id }, Command::Requeue { job: id }] {
        assert_eq!(World::code(&world.run_as("bob", None, command)), Some(Code::NotOwner));
    }
    assert_eq!(World::code(&world.run(Command::Hold { job: JobId(9) })), Some(Code::NotFound));
    world.run(Command::Cancel { job: id });
    assert_eq!(World::code(&world.run(Command::Release { job: id })), Some(Code::AlreadyEnded));
}

#[test]
fn a_release_ends_the_hold_of_too_many_excused_attempts_and_counts_them_anew() {
    let mut world = World::with(Settings { excused_in_row: 1, ..Settings::default() });
    let (node, id, token) = running(&mut world);
    world.report(node, token, PartReport::Released).unwrap();
    assert!(world.state.job_view(id).unwrap().task.holds.launch);
    world.run(Command::Release { job: id });
    assert_eq!((world.state.index.queue.len(), world.task(id).excused_in_row), (1, 0));
}

#[test]
fn a_requeued_attempt_is_preempted_and_goes_back_to_its_old_place() {
    let mut world = World::new();
    let (node, id, token) = running(&mut world);
    let seq = world.state.jobs.get(&id).unwrap().value.seq;
    let later = world.submit(one_gpu());
    world.run(Command::Requeue { job: id });
    assert_eq!(world.shown(id), "PREEMPTED");
    assert_eq!(World::code(&world.run(Command::Requeue { job: id })), Some(Code::AlreadyDecided));
    world.report(node, token, exited(ExitCause::Stopped, 143)).unwrap();
    assert_eq!(world.shown(id), "PENDING");
    let queue: Vec<(u64, JobId)> = world.state.index.queue.keys().map(|key| (key.seq, key.task.job)).collect();
    assert_eq!((queue[0], queue[1].1), ((seq, id), later));
    assert_eq!((world.task(id).used.preempted, world.task(id).used.retries), (1, 0));
}

#[test]
fn work_that_was_done_before_the_signal_is_a_success_and_after_it_a_preemption() {
    for (cause, code, shown) in
        [(ExitCause::Own, 0, "SUCCEEDED"), (ExitCause::Stopped, 0, "PENDING"), (ExitCause::Own, 1, "PENDING")]
    {
        let mut world = World::new();
        let (node, id, token) = running(&mut world);
        world.run(Command::Requeue { job: id });
        world.report(node, token, exited(cause, code)).ok();
        assert_eq!(world.shown(id), shown, "{cause:?} {code}");
    }
}

#[test]
fn a_cancel_takes_the_way_back_from_a_requeued_job() {
    let mut world = World::new();
    let (node, id, token) = running(&mut world);
    world.run(Command::Requeue { job: id });
    world.run(Command::Cancel { job: id });
    // The verdict was PREEMPTED, so the exit comes too late to decide; it is recorded all the same.
    assert_eq!(world.report(node, token, exited(ExitCause::Own, 0)).map_err(|no| no.code), Err(Code::AlreadyDecided));
    assert_eq!(world.shown(id), "CANCELLED");
}

#[test]
fn a_requeue_cuts_a_backoff_short() {
    let mut world = World::new();
    let (node, id, token) = running(&mut world);
    world.report(node, token, ended(0, 1, 1)).unwrap();
    assert_eq!(world.shown(id), "RETRYING");
    world.run(Command::Requeue { job: id });
    assert_eq!((world.shown(id).as_str(), world.state.index.timers.len()), ("PENDING", 0));
}

#[test]
fn a_drained_node_keeps_its_work_until_the_time_it_was_given() {
    let mut world = World::new();
    let (node, id, token) = running(&mut world);
    let out = |evict_in_ms| Some(NodeOut { reason: "new fans".into(), evict_in_ms });
    world.run(Command::NodeAdmin { node, out: out(None) });
    assert_eq!(world.state.next_due_ms(), None);
    world.run(Command::NodeAdmin { node, out: out(Some(60_000)) });
    world.wait(59_999);
    assert_eq!(world.shown(id), "RUNNING");
    world.wait(1);
    assert_eq!((world.shown(id).as_str(), world.state.next_due_ms()), ("PREEMPTED", None));
    world.report(node, token, exited(ExitCause::Stopped, 143)).unwrap();
    assert_eq!(world.place(id, &[node]).map_err(|no| no.code), Err(Code::NodeNotReady));
    world.run(Command::NodeAdmin { node, out: None });
    assert!(world.place(id, &[node]).is_ok());
}

#[test]
fn a_resumed_node_forgets_when_it_was_to_be_empty() {
    let mut world = World::new();
    let (node, id, _) = running(&mut world);
    world.run(Command::NodeAdmin { node, out: Some(NodeOut { reason: "fans".into(), evict_in_ms: Some(1_000) }) });
    world.run(Command::NodeAdmin { node, out: None });
    world.wait(10_000);
    assert_eq!(world.shown(id), "RUNNING");
}
