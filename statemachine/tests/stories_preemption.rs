//! Preemption as stories: who may end whom, what is kept for whom, what is lost, and how often.

mod world;

use proptest::prelude::*;
use statemachine::command::*;
use statemachine::record::*;
use statemachine::*;
use world::*;

/// Two priorities: `high` ends what is `low`; one that is neither; and a machine of four GPUs.
fn site() -> (World, NodeId) {
    let mut world = World::new();
    for (name, value, preempts, preemptible) in
        [("low", 0, false, true), ("high", 100, true, true), ("top", 200, true, false)]
    {
        let set = SetPriority { name: name.into(), create: true, value, tenants: vec![], preempts, preemptible };
        assert!(matches!(world.run(Command::SetPriority(set)), Outcome::Done(_)));
    }
    let (node, _) = world.register(machine("n1", 1, 4));
    (world, node)
}

fn of(class: &str, gpus: u16) -> SubmitJob {
    SubmitJob { priority_class: class.into(), ..job(shape(1, 1, gpus)) }
}

fn policy(world: &mut World, set: SetPolicy) {
    assert!(matches!(world.run(Command::SetPolicy(set)), Outcome::Done(_)));
}

fn start(world: &mut World, node: NodeId, job: SubmitJob) -> (JobId, Token) {
    let id = world.submit(job);
    let token = world.place(id, &[node]).expect("it fits");
    world.report(node, token, PartReport::Started { port: 29_500 }).expect("a live part");
    (id, token)
}

/// Its ranks ended after the signal, and nothing is left of it.
fn drain(world: &mut World, node: NodeId, token: Token) {
    let exits = exits(0, 1, 0, ExitCause::Stopped);
    world.report(node, token, PartReport::Exited { exits, released: true }).expect("a live part");
}

#[test]
fn room_is_made_kept_and_taken_and_the_victim_waits_where_it_waited() {
    let (mut world, node) = site();
    let (victim, token) = start(&mut world, node, of("low", 4));
    let seq = world.state.jobs.get(&victim).unwrap().value.seq;
    let urgent = world.submit(of("high", 2));
    world.wait(9_500);
    assert!(matches!(world.preempt(urgent, &[token], &[node]), Outcome::Done(_)));
    assert_eq!((world.shown(victim).as_str(), world.shown(urgent).as_str()), ("PREEMPTED", "PENDING"));
    drain(&mut world, node, token);
    let task = world.task(victim);
    assert_eq!((task.displaced, task.used.preempted, task.used.retries, &task.phase), (1, 1, 0, &Phase::Pending));
    let row = task.attempts.back().unwrap();
    assert_eq!((row.preemptor, row.lost_gpu_ms), (Some(urgent), 38_000));
    assert_eq!(row.text, format!("made room for job {urgent}, of priority 100 over 0; 38 GPU-s lost since its start"));
    assert_eq!(world.state.jobs.get(&victim).unwrap().value.seq, seq);

    // The victim, and whoever else, finds only what is not kept.
    assert_eq!(world.place(victim, &[node]).unwrap_err().code, Code::Claimed);
    let small = world.submit(of("low", 2));
    assert_eq!(world.place(small, &[node]).unwrap_err().code, Code::Claimed);
    let beside = world.placement(small, &[node]);
    let mine = world.state.claims.get(&TaskKey::only(urgent)).unwrap().parts[0].gpu_order.clone();
    let others: Vec<u8> = (0..4).filter(|slot| !mine.contains(slot)).collect();
    let part = PlacePart { gpu_order: others, cores_by_numa: vec![0, 8], ..beside.parts[0].clone() };
    assert!(world.plan(vec![Place { parts: vec![part], ..beside }])[0].is_ok());
    let mut place = world.placement(urgent, &[node]);
    place.parts[0].gpu_order = mine;
    assert!(world.plan(vec![place])[0].is_ok());
    assert!(world.state.claims.is_empty() && world.state.index.claims.is_empty());
}

#[test]
fn only_a_higher_class_that_preempts_ends_a_lower_one_that_is_preemptible() {
    let (mut world, node) = site();
    let cases = [
        ("low", "high", true),
        ("low", "top", true),
        ("high", "top", true),
        ("low", "low", false),
        ("high", "high", false),
        ("high", "low", false),
        ("top", "high", false),
        ("", "high", false),
        ("low", "", false),
    ];
    for (victim, preemptor, may) in cases {
        let (id, token) = start(&mut world, node, of(victim, 4));
        let waits = world.submit(of(preemptor, 4));
        let outcome = world.preempt(waits, &[token], &[node]);
        assert_eq!(matches!(outcome, Outcome::Done(_)), may, "{preemptor:?} over {victim:?}: {outcome:?}");
        assert!(may || World::code(&outcome) == Some(Code::VictimProtected), "{outcome:?}");
        world.run(Command::Cancel { job: id });
        world.run(Command::Cancel { job: waits });
        drain(&mut world, node, token);
    }
}

#[test]
fn a_refusal_changes_nothing_and_names_the_reason() {
    let (mut world, node) = site();
    policy(&mut world, SetPolicy { min_run_ms: Some(60_000), ..SetPolicy::default() });
    let (_, token) = start(&mut world, node, of("low", 2));
    let (_, other) = start(&mut world, node, of("low", 2));
    let urgent = world.submit(of("high", 2));
    let refused = |world: &mut World, victims: &[Token]| {
        let digest = world.state.digest();
        let outcome = world.preempt(urgent, victims, &[node]);
        assert!(world.state.claims.is_empty() && world.state.digest() != 0 && digest != 0);
        World::code(&outcome)
    };
    assert_eq!(refused(&mut world, &[token]), Some(Code::VictimProtected), "it has not run for a minute");
    world.wait(60_000);
    assert_eq!(refused(&mut world, &[token, other]), Some(Code::VictimProtected), "one could be spared");
    assert_eq!(refused(&mut world, &[token, token]), Some(Code::InvalidSpec));
    assert_eq!(refused(&mut world, &[]), Some(Code::Limit));
    policy(&mut world, SetPolicy { preemptions: Some(0), ..SetPolicy::default() });
    assert_eq!(refused(&mut world, &[token]), Some(Code::VictimProtected), "nobody makes room");
    policy(&mut world, SetPolicy { preemptions: Some(1), ..SetPolicy::default() });
    assert!(matches!(world.preempt(urgent, &[token], &[node]), Outcome::Done(_)));
    assert_eq!(World::code(&world.preempt(urgent, &[other], &[node])), Some(Code::Conflict));
}

#[test]
fn a_claim_ends_with_its_time_with_a_cancel_and_with_a_hold() {
    for end in 0..3 {
        let (mut world, node) = site();
        let (victim, token) = start(&mut world, node, of("low", 4));
        let urgent = world.submit(of("high", 4));
        assert!(matches!(world.preempt(urgent, &[token], &[node]), Outcome::Done(_)));
        drain(&mut world, node, token);
        match end {
            // The grace of the victim and the minute of the policy.
            0 => {
                world.wait(61_999);
                assert!(!world.state.claims.is_empty());
                world.wait(1);
            }
            1 => drop(world.run(Command::Cancel { job: urgent })),
            _ => drop(world.run(Command::Hold { job: urgent })),
        }
        assert!(world.state.claims.is_empty() && world.state.index.claims.is_empty());
        assert!(world.place(victim, &[node]).is_ok());
    }
}

#[test]
fn a_gang_ends_whole_and_its_other_machine_is_anybodys() {
    let (mut world, first) = site();
    let (second, _) = world.register(machine("n2", 2, 4));
    let gang = world.submit(SubmitJob { priority_class: "low".into(), ..job(shape(2, 1, 4)) });
    let token = world.place(gang, &[first, second]).unwrap();
    let urgent = world.submit(of("high", 4));
    assert!(matches!(world.preempt(urgent, &[token], &[second]), Outcome::Done(_)));
    for node in [first, second] {
        world.report(node, token, PartReport::Released).unwrap();
    }
    assert!(world.task(gang).attempts.back().unwrap().text.ends_with("nothing was lost, it had not started"));
    let small = world.submit(of("low", 4));
    assert_eq!(world.place(small, &[second]).unwrap_err().code, Code::Claimed);
    assert!(world.place(small, &[first]).is_ok());
    assert!(world.place(urgent, &[second]).is_ok());
}

#[test]
fn a_checkpoint_lowers_the_loss_of_its_attempt_and_a_stale_token_records_none() {
    let (mut world, node) = site();
    let (victim, token) = start(&mut world, node, of("low", 4));
    world.wait(100_000);
    let record = |path: &str| Command::Checkpoint { token, path: path.into(), step: 7 };
    assert!(matches!(world.run(record("/ckpt/7")), Outcome::Done(_)));
    world.wait(5_000);
    let lease = world.state.leases.get(&token).unwrap().value.clone();
    assert_eq!(world.state.loss(&lease).gpu_ms, 20_000);
    assert_eq!(World::code(&world.run(record(""))), Some(Code::InvalidSpec));
    assert_eq!(World::code(&world.run(record(&"x".repeat(1_025)))), Some(Code::InvalidSpec));
    let urgent = world.submit(of("high", 4));
    assert!(matches!(world.preempt(urgent, &[token], &[node]), Outcome::Done(_)));
    // Told to end, it saves what it has.
    world.wait(1_000);
    assert!(matches!(world.run(record("/ckpt/8")), Outcome::Done(_)));
    drain(&mut world, node, token);
    let task = world.task(victim);
    assert_eq!(task.attempts.back().unwrap().lost_gpu_ms, 0);
    assert_eq!(task.checkpoint.as_ref().unwrap().path, "/ckpt/8");
    assert_eq!(World::code(&world.run(record("/ckpt/9"))), Some(Code::TokenStale));
    // The next attempt has recorded none yet.
    world.run(Command::Cancel { job: urgent });
    let again = world.place(victim, &[node]).unwrap();
    world.report(node, again, PartReport::Started { port: 1 }).unwrap();
    world.wait(2_000);
    let lease = world.state.leases.get(&again).unwrap().value.clone();
    assert_eq!(world.state.loss(&lease).gpu_ms, 8_000);
}

/// A tenant of this name with so many guaranteed GPUs.
fn tenant(world: &mut World, name: &str, guaranteed: u32) {
    let set = SetTenant {
        name: name.into(),
        create: true,
        guaranteed: Some([("h100".into(), guaranteed)].into()),
        ..SetTenant::default()
    };
    assert!(matches!(world.run(Command::SetTenant(Box::new(set))), Outcome::Done(_)));
}

#[test]
fn a_tenant_takes_its_guarantee_back_from_who_borrows_and_never_what_is_anothers() {
    let (mut world, node) = site();
    tenant(&mut world, "a", 2);
    tenant(&mut world, "b", 2);
    let of = |tenant: &str, class: &str| SubmitJob { tenant: tenant.into(), ..of(class, 1) };
    let held: Vec<(JobId, Token)> = (0..4).map(|_| start(&mut world, node, of("b", ""))).collect();
    // Two of the four are borrowed.
    let own: Vec<JobId> = (0..3).map(|_| world.submit(of("a", ""))).collect();
    assert!(matches!(world.preempt(own[0], &[held[0].1], &[node]), Outcome::Done(_)));
    assert!(matches!(world.preempt(own[1], &[held[1].1], &[node]), Outcome::Done(_)));
    let third = world.preempt(own[2], &[held[2].1], &[node]);
    assert_eq!(World::code(&third), Some(Code::VictimProtected), "neither is a's: {third:?}");
    drain(&mut world, node, held[0].1);
    drain(&mut world, node, held[1].1);
    let text = &world.task(held[0].0).attempts.back().unwrap().text;
    assert!(text.contains("tenant \"a\" takes what is guaranteed to it"), "{text}");
    let token = world.place(own[0], &[node]).unwrap();
    // Not by priority either: what is guaranteed to a is a's.
    let back = world.submit(of("b", "top"));
    let refused = world.preempt(back, &[token], &[node]);
    assert_eq!(World::code(&refused), Some(Code::VictimProtected), "{refused:?}");
}

#[test]
fn who_made_room_does_not_take_it_back_from_a_tenant_that_borrows_by_then() {
    let (mut world, node) = site();
    tenant(&mut world, "a", 2);
    let of = |tenant: &str, class: &str, gpus| SubmitJob { tenant: tenant.into(), ..of(class, gpus) };
    let (top, token) = start(&mut world, node, of("default", "top", 1));
    let (filler, rest) = start(&mut world, node, of("default", "", 3));
    let own = world.submit(of("a", "low", 1));
    // A class that is not preemptible protects nobody who borrows.
    assert!(matches!(world.preempt(own, &[token], &[node]), Outcome::Done(_)));
    drain(&mut world, node, token);
    let token = world.place(own, &[node]).unwrap();
    world.run(Command::Cancel { job: filler });
    drain(&mut world, node, rest);
    start(&mut world, node, of("a", "low", 3));
    let back = world.preempt(top, &[token], &[node]);
    assert!(format!("{back:?}").contains("this task made room for it"), "{back:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whoever tries to end whom, and however often: no job makes room more often than it may, nobody ends who took its
    /// place, and every job that was preempted goes on.
    #[test]
    fn nobody_is_thrashed(tries in proptest::collection::vec((any::<u8>(), any::<u8>(), 0..4u8), 20..120)) {
        let (mut world, node) = site();
        tenant(&mut world, "a", 2);
        policy(&mut world, SetPolicy { preemptions: Some(2), ..SetPolicy::default() });
        let mut jobs = Vec::new();
        for nth in 0..9u16 {
            let class = ["low", "high", "top"][usize::from(nth % 3)];
            let tenant = ["default", "a"][usize::from(nth / 3 % 2)];
            jobs.push(world.submit(SubmitJob { tenant: tenant.into(), ..of(class, 1 + nth % 2) }));
        }
        let mut ended_by: Vec<(JobId, JobId)> = Vec::new();
        for (job, victim, what) in tries {
            let job = jobs[usize::from(job) % jobs.len()];
            let leases: Vec<(Token, Lease)> =
                world.state.leases.iter().map(|(token, lease)| (*token, lease.value.clone())).collect();
            let Some((token, lease)) = leases.get(usize::from(victim) % leases.len().max(1)).cloned() else {
                let _ = world.place(job, &[node]);
                continue;
            };
            match what {
                0 if lease.verdict.is_some() => drain(&mut world, node, token),
                0 | 1 => drop(world.place(job, &[node])),
                _ => {
                    if let Outcome::Done(_) = world.preempt(job, &[token], &[node]) {
                        let back = (lease.task.job, job);
                        prop_assert!(!ended_by.contains(&back), "{job} ended {} back", lease.task.job);
                        ended_by.push((job, lease.task.job));
                    }
                }
            }
            for (_, task) in world.state.tasks.iter() {
                prop_assert!(task.value.displaced <= 2, "{} times", task.value.displaced);
                let goes_on = task.value.result.is_none();
                prop_assert!(goes_on);
            }
        }
    }
}

#[test]
fn a_tenants_own_jobs_make_room_under_its_limit_and_what_they_leave_is_kept() {
    let (mut world, node) = site();
    let limit_gpus = Some(Some(2));
    let set = SetTenant { name: "lab".into(), create: true, limit_gpus, ..SetTenant::default() };
    assert!(matches!(world.run(Command::SetTenant(Box::new(set))), Outcome::Done(_)));
    let of = |tenant: &str, class: &str, gpus| SubmitJob { tenant: tenant.into(), ..of(class, gpus) };
    let (empty, _) = world.register(machine("n2", 2, 1));
    let (_, others) = start(&mut world, node, of("default", "low", 1));
    let (_, first) = start(&mut world, node, of("lab", "low", 1));
    let (_, second) = start(&mut world, node, of("lab", "low", 1));
    let urgent = world.submit(of("lab", "high", 1));
    let late = world.submit(of("lab", "low", 1));
    assert_eq!(world.place(urgent, &[node]).map_err(|no| no.code), Err(Code::Quota), "a GPU is free, the limit is not");
    assert_eq!(World::code(&world.preempt(urgent, &[others], &[node])), Some(Code::Quota), "another tenant's");
    let both = world.preempt(urgent, &[first, second], &[node]);
    assert_eq!(World::code(&both), Some(Code::VictimProtected), "one could be spared");
    assert!(matches!(world.preempt(urgent, &[first], &[node]), Outcome::Done(_)));
    drain(&mut world, node, first);
    assert_eq!(world.place(late, &[empty]).map_err(|no| no.code), Err(Code::Quota), "it is kept for the urgent one");
    assert!(world.place(urgent, &[node]).is_ok());
}
