//! Turns as stories: who ends whom where nobody states a limit, how often, and who keeps his place.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::settings::OrderBy;
use statemachine::*;
use world::*;

const SECOND: u64 = 1_000;

/// Jobs of `low` and `higher` make room; a turn is 100 GPU seconds and at least 10 s; a machine of four GPUs.
fn site() -> (World, NodeId) {
    let mut world = World::new();
    for (name, value, preemptible) in [("low", 0, true), ("kept", 0, false), ("higher", 1, true)] {
        let set = SetPriority { name: name.into(), create: true, value, tenants: vec![], preempts: false, preemptible };
        assert!(matches!(world.run(Command::SetPriority(set)), Outcome::Done(_)));
    }
    let turns = SetPolicy { turn_gpu_ms: Some(100 * SECOND), turn_run_ms: Some(10 * SECOND), ..SetPolicy::default() };
    policy(&mut world, turns);
    let (node, _) = world.register(machine("n1", 1, 4));
    (world, node)
}

fn of(class: &str, tenant: &str, limit_ms: u64) -> SubmitJob {
    let mut submit = SubmitJob { priority_class: class.into(), ..job(shape(1, 1, 4)) };
    if !tenant.is_empty() {
        submit.tenant = tenant.into();
    }
    submit.spec.limit_ms = limit_ms;
    submit
}

fn unlimited() -> SubmitJob {
    of("low", "", 0)
}

fn policy(world: &mut World, set: SetPolicy) {
    assert!(matches!(world.run(Command::SetPolicy(set)), Outcome::Done(_)));
}

fn tenant(world: &mut World, name: &str, guaranteed: u32) {
    let guaranteed = Some([("h100".into(), guaranteed)].into());
    let set = SetTenant { name: name.into(), create: true, guaranteed, ..SetTenant::default() };
    let outcome = world.run(Command::SetTenant(Box::new(set)));
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
}

fn start(world: &mut World, node: NodeId, job: SubmitJob) -> (JobId, Token) {
    let id = world.submit(job);
    (id, start_again(world, node, id))
}

fn start_again(world: &mut World, node: NodeId, id: JobId) -> Token {
    let token = world.place(id, &[node]).expect("it fits");
    world.report(node, token, PartReport::Started { port: 29_500 }).expect("a live part");
    token
}

fn drain(world: &mut World, node: NodeId, token: Token) {
    let exits = exits(0, 1, 0, ExitCause::Stopped);
    world.report(node, token, PartReport::Exited { exits, released: true }).expect("a live part");
}

fn takes(world: &mut World, node: NodeId, by: JobId, from: Token) -> bool {
    let outcome = world.preempt(by, &[from], &[node]);
    let done = matches!(outcome, Outcome::Done(_));
    assert!(done || World::code(&outcome) == Some(Code::VictimProtected), "{outcome:?}");
    done
}

#[test]
fn who_has_had_a_turn_gives_its_place_to_who_has_not_and_each_time_later() {
    let (mut world, node) = site();
    let (old, mut token) = start(&mut world, node, unlimited());
    for times in 1..=3u64 {
        let young = world.submit(unlimited());
        // 25 s of four GPUs are a turn; after that the least run counts.
        let least = if times == 1 { 25 } else { 10 * times };
        world.wait(least * SECOND - 1);
        assert!(!takes(&mut world, node, young, token), "time {times}: not yet");
        world.wait(1);
        assert!(takes(&mut world, node, young, token), "time {times}");
        drain(&mut world, node, token);
        let task = world.task(old);
        assert_eq!((u64::from(task.had.given), task.displaced, task.used.retries), (times, 0, 0));
        assert!(task.had.turn && task.had.gpu_ms >= 100 * SECOND, "{:?}", task.had);
        let row = task.attempts.back().unwrap();
        assert!(row.text.starts_with(&format!("made room for job {young}, whose turn it is; ")), "{}", row.text);
        let own = start_again(&mut world, node, young);
        // It is not its turn: it has had one.
        assert!(!takes(&mut world, node, old, own));
        world.run(Command::Cancel { job: young });
        drain(&mut world, node, own);
        token = start_again(&mut world, node, old);
    }
}

#[test]
fn a_limit_another_priority_and_one_that_makes_no_room_take_no_turns() {
    let cases = [
        (unlimited(), unlimited(), true),
        (of("low", "", 3_600 * SECOND), unlimited(), false),
        (unlimited(), of("low", "", 3_600 * SECOND), false),
        (of("kept", "", 0), unlimited(), false),
        (unlimited(), of("kept", "", 0), false),
        (of("higher", "", 0), unlimited(), false),
        (unlimited(), of("higher", "", 0), false),
    ];
    for (nth, (held, asks, may)) in cases.into_iter().enumerate() {
        let (mut world, node) = site();
        let (_, token) = start(&mut world, node, held);
        world.wait(60 * SECOND);
        let asks = world.submit(asks);
        assert_eq!(takes(&mut world, node, asks, token), may, "case {nth}");
    }
}

#[test]
fn policies_end_turns() {
    let none = [
        SetPolicy { turn_gpu_ms: Some(0), ..SetPolicy::default() },
        SetPolicy { preemptions: Some(0), ..SetPolicy::default() },
        SetPolicy { order: Some(OrderBy::Fifo), ..SetPolicy::default() },
    ];
    for set in none {
        let (mut world, node) = site();
        let (_, token) = start(&mut world, node, unlimited());
        world.wait(60 * SECOND);
        policy(&mut world, set.clone());
        let young = world.submit(unlimited());
        assert!(!takes(&mut world, node, young, token), "{set:?}");
    }
    let (mut world, _) = site();
    let outcome = world.run(Command::SetPolicy(SetPolicy { turn_run_ms: Some(999), ..SetPolicy::default() }));
    assert_eq!(World::code(&outcome), Some(Code::InvalidSpec));
}

#[test]
fn who_has_waited_long_in_all_keeps_its_place() {
    let (mut world, node) = site();
    policy(&mut world, SetPolicy { turn_wait_ms: Some(100 * SECOND), ..SetPolicy::default() });
    let old = world.submit(unlimited());
    world.wait(60 * SECOND);
    let token = start_again(&mut world, node, old);
    world.wait(100 * SECOND);
    // 60 s of waiting are not 100, however long it ran: it gives its place.
    let young = world.submit(unlimited());
    assert!(takes(&mut world, node, young, token));
    drain(&mut world, node, token);
    let own = start_again(&mut world, node, young);
    world.wait(39 * SECOND);
    let ran_ms = world.task(old).had.run_ms;
    let is_first = |world: &World| world.state.is_owed_first(&world.state.jobs.get(&old).unwrap().value, ran_ms);
    assert!(!is_first(&world));
    world.wait(SECOND);
    assert!(is_first(&world));
    world.run(Command::Cancel { job: young });
    drain(&mut world, node, own);
    let token = start_again(&mut world, node, old);
    world.wait(1_000 * SECOND);
    let lease = world.state.leases.get(&token).unwrap().value.clone();
    assert_eq!(world.state.turn_ends_ms(&lease), None);
    let young = world.submit(unlimited());
    assert!(!takes(&mut world, node, young, token));
}

#[test]
fn another_tenant_gives_no_more_than_what_it_has_borrowed() {
    for (holder, guaranteed, may) in
        [("lab", 4, [false, false]), ("lab", 2, [true, false]), ("other", 0, [false, false])]
    {
        let (mut world, node) = site();
        if guaranteed > 0 {
            tenant(&mut world, holder, guaranteed);
        } else {
            let set = SetTenant { name: holder.into(), create: true, ..SetTenant::default() };
            assert!(matches!(world.run(Command::SetTenant(Box::new(set))), Outcome::Done(_)));
        }
        let half = |mut submit: SubmitJob| {
            submit.spec.shape.gpus_per_rank = 2;
            submit
        };
        let held = [0; 2].map(|_| start(&mut world, node, half(of("low", holder, 0))).1);
        world.wait(60 * SECOND);
        // Nothing is guaranteed to the tenant of those who come: nothing is theirs to take back.
        let took = held.map(|token| {
            let young = world.submit(half(unlimited()));
            takes(&mut world, node, young, token)
        });
        assert_eq!(took, may, "{holder} with {guaranteed}");
    }
}
