//! Machines set aside for a window of wall time, as stories: who may start there when, and what begin and end do.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::spec::{JobSpec, Terms};
use statemachine::*;
use world::*;

const MIN: u64 = 60_000;

fn machines(names: &[&str]) -> Machines {
    Machines { names: names.iter().map(|name| (*name).to_owned()).collect(), ..Machines::default() }
}

/// A maintenance of these machines, from so many minutes after the start of the story, for ten minutes.
fn maintenance(name: &str, nodes: &[&str], from_min: i64) -> CreateReservation {
    CreateReservation {
        name: name.into(),
        maintenance: true,
        machines: machines(nodes),
        start_wall_ms: WALL0 + from_min * MIN as i64,
        duration_ms: 10 * MIN,
        ..CreateReservation::default()
    }
}

fn reservation(name: &str, nodes: &[&str], from_min: i64) -> CreateReservation {
    CreateReservation { maintenance: false, ..maintenance(name, nodes, from_min) }
}

fn create(world: &mut World, create: CreateReservation) -> Result<(), (Code, String)> {
    match world.run(Command::CreateReservation(Box::new(create))) {
        Outcome::Done(_) => Ok(()),
        Outcome::Rejected(no) => Err((no.code, no.detail)),
        other => panic!("{other:?}"),
    }
}

fn limited(minutes: u64) -> SubmitJob {
    let mut job = one_gpu();
    (job.spec.limit_ms, job.spec.kill_grace_ms) = (minutes * MIN, 1_000);
    job
}

fn inside(name: &str) -> SubmitJob {
    let mut job = one_gpu();
    job.spec.terms = Some(Box::new(Terms { reservation: name.into(), ..Terms::default() }));
    job
}

fn code<T>(answer: Result<T, Rejection>) -> Option<Code> {
    answer.err().map(|no| no.code)
}

#[test]
fn nothing_starts_that_may_run_into_a_maintenance_and_its_end_gives_all_back() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 4));
    let (other, _) = world.register(machine("n2", 2, 4));
    create(&mut world, maintenance("spring", &["n1"], 60)).unwrap();
    let (long, endless, short) = (world.submit(limited(60)), world.submit(one_gpu()), world.submit(limited(59)));
    assert_eq!(code(world.place(long, &[node])), Some(Code::Reserved));
    assert_eq!(code(world.place(endless, &[node])), Some(Code::Reserved));
    let token = world.place(short, &[node]).expect("it ends before");
    world.place(long, &[other]).expect("that machine is not set aside");

    // Nothing is left of its time.
    world.clock_ms = 60 * MIN - 1_001;
    world.entry(Vec::new());
    let last = world.submit(limited(1));
    assert_eq!(code(world.place(last, &[node])), Some(Code::Reserved));
    assert_eq!(world.state.next_due_wall_ms(), Some(WALL0 + 60 * MIN as i64));
    world.wait(2_000);
    assert!(world.state.reservation("spring").unwrap().1.begun.is_some());
    assert!(world.state.leases.get(&token).unwrap().value.verdict.is_none(), "what runs runs on");
    assert_eq!(code(world.place(last, &[node])), Some(Code::Reserved));

    // A wall clock that goes back ends nothing, and gives nothing back.
    world.wall_ahead_ms = -30 * MIN as i64;
    assert_eq!(code(world.place(last, &[node])), Some(Code::Reserved));
    world.wall_ahead_ms = 0;
    world.wait(10 * MIN);
    assert!(world.state.reservations.is_empty());
    world.place(last, &[node]).expect("the maintenance is over");
    world.place(endless, &[node]).expect("the maintenance is over");
}

#[test]
fn a_reservation_is_for_jobs_that_name_it_and_may() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 4));
    let (other, _) = world.register(machine("n2", 2, 4));
    for (name, parent) in [("vision", ""), ("speech", "vision"), ("other", "")] {
        let set = SetTenant { name: name.into(), create: true, parent: Some(parent.into()), ..SetTenant::default() };
        assert!(matches!(world.run(Command::SetTenant(Box::new(set))), Outcome::Done(_)));
    }
    let (tenants, users) = (vec!["vision".to_owned()], vec!["bob".to_owned()]);
    create(&mut world, CreateReservation { tenants, users, ..reservation("demo", &["n1"], 1) }).unwrap();
    create(&mut world, maintenance("spring", &["n2"], 1)).unwrap();
    let submit = |world: &mut World, actor: &str, tenant: &str, name: &str| {
        let job = SubmitJob { tenant: tenant.into(), ..inside(name) };
        world.run_as(actor, None, Command::SubmitJob(Box::new(job)))
    };
    let refused = |outcome: Outcome| World::code(&outcome);
    assert_eq!(refused(submit(&mut world, "ada", "other", "demo")), Some(Code::ReservationDenied));
    assert_eq!(refused(submit(&mut world, "ada", "other", "spring")), Some(Code::ReservationDenied));
    assert_eq!(refused(submit(&mut world, "ada", "other", "nope")), Some(Code::ReservationUnknown));
    assert_eq!(refused(submit(&mut world, "bob", "other", "demo")), None);
    let job = match submit(&mut world, "ada", "speech", "demo") {
        Outcome::Done(Reply::Stored(StoredReply::Job(id))) => id,
        other => panic!("{other:?}"),
    };
    let mut wide = SubmitJob { tenant: "vision".into(), ..inside("demo") };
    wide.spec.shape.nodes = 2;
    assert_eq!(refused(world.run(Command::SubmitJob(Box::new(wide)))), Some(Code::NeverFits));

    let with = |terms: Terms| {
        let terms = Some(Box::new(Terms { reservation: "demo".into(), ..terms }));
        let spec = JobSpec { terms, ..inside("demo").spec };
        Command::SubmitJob(Box::new(SubmitJob { tenant: "vision".into(), spec, ..inside("demo") }))
    };
    let end_wall_ms = WALL0 + 11 * MIN as i64;
    let late = with(Terms { begin_wall_ms: end_wall_ms, ..Terms::default() });
    assert_eq!(refused(world.run(late)), Some(Code::InvalidSpec), "it begins after the window");
    let soon = with(Terms { deadline_wall_ms: WALL0 + MIN as i64 - 1, ..Terms::default() });
    assert_eq!(refused(world.run(soon)), Some(Code::DeadlineTooSoon), "the window begins after its deadline");

    assert_eq!(code(world.place(job, &[node])), Some(Code::Reserved), "it has not begun");
    world.wait(MIN);
    assert_eq!(code(world.place(job, &[other])), Some(Code::Reserved), "not one of its machines");
    let stranger = world.submit(limited(1));
    assert_eq!(code(world.place(stranger, &[node])), Some(Code::Reserved));
    world.place(job, &[node]).expect("its own, and without a limit");
    // It outlasts the window, and who still waits for it waits on.
    let late = world.submit(SubmitJob { tenant: "vision".into(), ..inside("demo") });
    assert!(matches!(world.run(Command::EndReservation { name: "demo".into() }), Outcome::Done(_)));
    assert_eq!(code(world.place(late, &[node])), Some(Code::Reserved), "there is no such reservation any more");
    world.place(stranger, &[node]).expect("the machine is anybody's");
    let again = Command::EndReservation { name: "demo".into() };
    assert_eq!(World::code(&world.run(again)), Some(Code::ReservationUnknown));
}

#[test]
fn a_window_sends_away_what_runs_if_it_says_so() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 4));
    let job = world.submit(one_gpu());
    let token = world.place(job, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 7_000 }).unwrap();
    create(&mut world, CreateReservation { requeue: true, ..maintenance("spring", &["n1"], 1) }).unwrap();
    world.wait(MIN - 2_000);
    assert!(world.state.leases.get(&token).unwrap().value.verdict.is_none());
    world.wait(2_000);
    let verdict = world.state.leases.get(&token).unwrap().value.verdict.clone().expect("it ends");
    assert_eq!((verdict.kind, verdict.text.as_str()), (VerdictKind::Preempted, "reservation \"spring\" has begun"));
    world.report(node, token, PartReport::Released).unwrap();
    assert_eq!(world.task(job).phase, Phase::Pending);
    assert_eq!((world.task(job).used.preempted, world.task(job).displaced), (1, 0));
    assert_eq!(code(world.place(job, &[node])), Some(Code::Reserved));
    world.wait(10 * MIN);
    world.place(job, &[node]).expect("the maintenance is over");
}

#[test]
fn a_machine_is_set_aside_once_at_a_time() {
    let mut world = World::new();
    world.register(machine("n1", 1, 4));
    world.register(machine("n2", 2, 4));
    create(&mut world, maintenance("a", &["n1"], 10)).unwrap();
    let (conflict, detail) = create(&mut world, maintenance("b", &["n2", "n1"], 19)).unwrap_err();
    assert_eq!(conflict, Code::Conflict);
    assert!(detail.contains("node n1 is set aside by \"a\""), "{detail}");
    assert_eq!(create(&mut world, maintenance("a", &["n2"], 30)).unwrap_err().0, Code::Conflict, "the name");
    create(&mut world, maintenance("b", &["n1", "n2"], 20)).expect("the first has ended by then");
    create(&mut world, reservation("c", &["n2"], 10)).expect("another machine");
}

#[test]
fn machines_are_chosen_by_what_they_have() {
    let mut world = World::new();
    let ids: Vec<NodeId> = (1..=4u8)
        .map(|nth| {
            let mut node = machine(&format!("n{nth}"), nth, 2);
            node.labels.insert("rack".into(), if nth < 4 { "r1" } else { "r2" }.into());
            world.register(node).0
        })
        .collect();
    let job = world.submit(one_gpu());
    world.place(job, &[ids[0]]).unwrap();
    create(&mut world, maintenance("taken", &["n2"], 1)).unwrap();
    let labels = [("rack".to_owned(), "r1".to_owned())];
    let of = |count: u32| Machines { labels: labels.clone().into(), count, ..Machines::default() };
    let mut with = |name: &str, machines: Machines| {
        create(&mut world, CreateReservation { machines, ..reservation(name, &[], 1) }).map(|()| {
            let nodes = world.state.reservation(name).unwrap().1.nodes.clone();
            world.run(Command::EndReservation { name: name.into() });
            nodes
        })
    };
    assert_eq!(with("one", of(1)), Ok([ids[2]].into()), "not set aside, and nothing runs there");
    assert_eq!(with("two", of(2)), Ok([ids[0], ids[2]].into()));
    assert_eq!(with("three", of(3)).unwrap_err().0, Code::Conflict);
    assert_eq!(with("four", of(4)).unwrap_err(), (Code::NoFit, "3 machines match, the reservation needs 4".into()));
    let unknown = Machines { gpu_type: "b200".into(), ..Machines::default() };
    assert_eq!(with("none", unknown).unwrap_err().0, Code::NoFit);
    assert_eq!(with("all", Machines::default()).unwrap_err().0, Code::Conflict);
    assert_eq!(with("nobody", machines(&["n9"])).unwrap_err(), (Code::NotFound, "there is no node \"n9\"".into()));
}

#[test]
fn what_is_wrong_is_told_with_field_value_and_limit() {
    let mut world = World::new();
    world.register(machine("n1", 1, 2));
    let wrong = CreateReservation {
        name: "No!".into(),
        tenants: vec!["t".into()],
        users: vec![String::new()],
        duration_ms: 999,
        start_wall_ms: WALL0 - 2_000,
        machines: Machines { count: 1, ..machines(&["n1"]) },
        ..maintenance("x", &[], 0)
    };
    let (code, detail) = create(&mut world, wrong).unwrap_err();
    assert_eq!(code, Code::InvalidSpec);
    for part in [
        "name is \"No!\"",
        "duration_ms is 999, must be 1000 to",
        "would be over",
        "maintenance is for nobody",
        "must have 1 to 256",
        "machines are named",
    ] {
        assert!(detail.contains(part), "{part} in {detail}");
    }
    let far = CreateReservation { start_wall_ms: i64::MAX, ..maintenance("x", &["n1"], 0) };
    assert!(create(&mut world, far).unwrap_err().1.contains("a year from now"));
    assert!(world.state.reservations.is_empty());
    create(&mut world, CreateReservation { start_wall_ms: 0, ..maintenance("now", &["n1"], 0) }).unwrap();
    assert!(world.state.reservation("now").unwrap().1.begun.is_some(), "0 = now");
}

#[test]
fn nobody_is_ended_for_room_that_is_set_aside_and_what_is_kept_there_is_given_up() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    for (name, value) in [("high", 9), ("low", 1)] {
        let (preempts, preemptible) = (value == 9, value == 1);
        let set = SetPriority { name: name.into(), create: true, value, tenants: vec![], preempts, preemptible };
        assert!(matches!(world.run(Command::SetPriority(set)), Outcome::Done(_)));
    }
    let of = |class: &str, job: SubmitJob| SubmitJob { priority_class: class.into(), ..job };
    let low = world.submit(of("low", one_gpu()));
    let victim = world.place(low, &[node]).unwrap();
    let high = world.submit(of("high", one_gpu()));
    create(&mut world, maintenance("far", &["n1"], 30)).unwrap();
    assert_eq!(World::code(&world.preempt(high, &[victim], &[node])), Some(Code::Reserved));
    world.run(Command::EndReservation { name: "far".into() });
    assert_eq!(World::code(&world.preempt(high, &[victim], &[node])), None);
    assert_eq!(world.state.claims.len(), 1);
    create(&mut world, maintenance("near", &["n1"], 1)).unwrap();
    assert!(world.state.claims.is_empty(), "it could not start there any more");
}
