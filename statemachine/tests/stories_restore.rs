//! What a restore from a backup does to jobs, machines, tokens and locks, as stories.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::*;
use world::*;

/// Of `one_gpu`: its lease's time, the drift of clocks, and the kill.
fn span_ms(world: &World, job: JobId) -> u64 {
    let ttl_ms = world.state.jobs.get(&job).unwrap().value.spec.lease_ttl_ms;
    ttl_ms + ttl_ms / 100 + 2_000
}

fn restore(world: &mut World, generation: u32) -> Outcome {
    world.run(Command::Restore { generation })
}

fn is_done(outcome: &Outcome) -> bool {
    *outcome == Outcome::Done(Reply::Stored(StoredReply::Done))
}

fn running_part(token: Token, job: JobId, node: &RegisterNode) -> RunningPart {
    RunningPart { token, job, gpus: vec![node.gpus[0].uuid], started: true }
}

#[test]
fn no_old_token_id_or_revision_is_ever_given_out_again() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 2));
    let first = world.submit(one_gpu());
    let old = world.place(first, &[node]).expect("it fits");
    let rev = world.state.meta.rev;
    assert!(is_done(&restore(&mut world, 77)));
    assert_eq!(world.state.meta.incarnation, 77);
    assert!(world.state.meta.rev.0 > rev.0 + 1_000_000);
    assert!(world.state.events_since(rev).is_err(), "a watch of the old life is told so");
    let second = world.submit(one_gpu());
    assert!(second.0 > first.0 + 1_000_000);
    let epoch = world.register(machine("n1", 1, 2)).1;
    assert!(epoch > 1_000_000);
    let new = world.place(second, &[node]).expect("a new job waits for nothing");
    assert_eq!((new.generation(), new.counter()), (77, 1));
    assert!(new > old);
}

#[test]
fn a_generation_that_is_not_above_the_known_ones_is_refused_and_changes_nothing() {
    let mut world = World::new();
    assert!(is_done(&restore(&mut world, 5)));
    let before = world.state.digest_from_scratch();
    for stale in [0, 4, 5] {
        let Outcome::Rejected(no) = restore(&mut world, stale) else { panic!("{stale} was taken") };
        assert_eq!(no.code, Code::GenerationStale, "{no:?}");
    }
    let Outcome::Rejected(no) = restore(&mut world, 1 << 24) else { panic!("it has 25 bits") };
    assert_eq!(no.code, Code::Limit);
    assert_eq!(world.state.digest_from_scratch(), before);
    // An agent that saw a later life lifts the counter: that generation counts too.
    world.register(RegisterNode { max_token: Token::first_of(9), ..machine("n1", 1, 2) });
    assert!(matches!(restore(&mut world, 9), Outcome::Rejected(_)));
    assert!(is_done(&restore(&mut world, 10)));
}

#[test]
fn a_job_of_the_backup_starts_when_no_attempt_of_the_old_life_can_be_alive() {
    let mut world = World::new();
    world.register(machine("n1", 1, 2));
    let id = world.submit(one_gpu());
    let span_ms = span_ms(&world, id);
    restore(&mut world, 1);
    let (node, _) = world.register(machine("n1", 1, 2));
    assert_eq!(world.state.job_view(id).unwrap().task.holds.names(), ["RESTORE"]);
    world.wait(span_ms - 1);
    assert_eq!(world.place(id, &[node]).map_err(|no| no.code), Err(Code::TaskGone));
    assert_eq!(world.state.next_due_ms(), Some(world.clock_ms + 1));
    world.wait(1);
    assert!(world.place(id, &[node]).is_ok());
}

#[test]
fn a_person_may_say_that_nothing_of_a_job_is_left() {
    let mut world = World::new();
    world.register(machine("n1", 1, 2));
    let id = world.submit(one_gpu());
    restore(&mut world, 1);
    let (node, _) = world.register(machine("n1", 1, 2));
    world.run(Command::Release { job: id });
    assert!(world.place(id, &[node]).is_ok());
}

#[test]
fn a_machine_takes_no_work_until_its_agent_has_registered_and_a_drained_one_stays_so() {
    let mut world = World::new();
    world.register(machine("n1", 1, 2));
    let (drained, _) = world.register(machine("n2", 2, 2));
    let out = NodeOut { reason: "fans".into(), evict_in_ms: None };
    world.run(Command::NodeAdmin { node: drained, out: Some(out) });
    restore(&mut world, 1);
    let id = world.submit(one_gpu());
    assert_eq!(world.place(id, &[NodeId(1)]).map_err(|no| no.code), Err(Code::NodeNotReady));
    world.register(machine("n2", 2, 2));
    assert_eq!(world.place(id, &[drained]).map_err(|no| no.code), Err(Code::NodeNotReady));
    world.register(machine("n1", 1, 2));
    assert!(world.place(id, &[NodeId(1)]).is_ok());
}

#[test]
fn what_runs_on_is_kept_what_ended_meanwhile_is_committed_and_what_died_runs_again() {
    let mut world = World::new();
    let n1 = machine("n1", 1, 4);
    let (node, _) = world.register(n1.clone());
    let jobs: Vec<JobId> = (0..3).map(|_| world.submit(one_gpu())).collect();
    let tokens: Vec<Token> = jobs.iter().map(|id| world.place(*id, &[node]).expect("it fits")).collect();
    for token in &tokens {
        world.report(node, *token, PartReport::Started { port: 29_500 }).expect("a live part");
    }
    restore(&mut world, 1);
    let finished = FinishedPart { token: tokens[1], exits: exits(0, 1, 0, ExitCause::Own) };
    world.register(RegisterNode {
        running: vec![running_part(tokens[0], jobs[0], &n1)],
        finished: vec![finished],
        dead: vec![tokens[2]],
        max_token: tokens[2],
        ..n1
    });
    let shown: Vec<String> = jobs.iter().map(|id| world.shown(*id)).collect();
    assert_eq!(shown, ["RUNNING", "SUCCEEDED", "RETRYING"]);
    let result = world.state.tasks.get(&TaskKey::only(jobs[1])).unwrap().value.result.clone().expect("committed");
    assert_eq!(result.token, Some(tokens[1]));
    world.wait(span_ms(&world, jobs[2]));
    let again = world.place(jobs[2], &[node]).expect("it is pending again");
    assert!(again > tokens[2]);
    // The one that ran on ends as if nothing had been.
    let ended = PartReport::Exited { exits: exits(0, 1, 0, ExitCause::Own), released: true };
    world.report(node, tokens[0], ended).expect("its token is good");
    assert_eq!(world.shown(jobs[0]), "SUCCEEDED");
}

#[test]
fn an_attempt_that_the_backup_does_not_know_is_killed_before_its_job_runs_again() {
    let mut world = World::new();
    let (n1, n2) = (machine("n1", 1, 2), machine("n2", 2, 2));
    let (first, _) = world.register(n1.clone());
    let id = world.submit(one_gpu());
    let old = world.place(id, &[first]).expect("it fits");
    restore(&mut world, 1);
    // After the backup the attempt was lost on n1, and another one began on n2.
    let later = Token(old.0 + 5);
    world.register(RegisterNode { dead: vec![old], max_token: old, ..n1 });
    let orphan = RegisterNode { running: vec![running_part(later, id, &n2)], max_token: later, ..n2.clone() };
    let (second, _) = world.register(orphan);
    world.wait(span_ms(&world, id));
    assert_eq!(world.place(id, &[first]).map_err(|no| no.code), Err(Code::TaskGone), "it runs on n2 still");
    world.register(RegisterNode { dead: vec![later], max_token: later, ..n2 });
    world.wait(1);
    let again = world.place(id, &[second]).expect("nothing of it is left");
    assert!(again > later);
}

#[test]
fn locks_are_had_again_with_a_token_of_the_new_generation() {
    let mut world = World::new();
    let acquire = |world: &mut World| {
        let opened = world.run(Command::OpenSession { owner: "ada".into(), ttl_ms: 60_000 });
        let Outcome::Done(Reply::Stored(StoredReply::Session(session))) = opened else { panic!("{opened:?}") };
        let held = world.run(Command::Acquire { session, name: "one".into() });
        let Outcome::Done(Reply::Stored(StoredReply::Lock(Some(token)))) = held else { panic!("{held:?}") };
        token
    };
    let old = acquire(&mut world);
    restore(&mut world, 3);
    assert!(world.state.locks.is_empty() && world.state.sessions.is_empty());
    let new = acquire(&mut world);
    assert!(new > old && new.generation() == 3);
}
