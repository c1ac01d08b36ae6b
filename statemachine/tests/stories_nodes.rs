//! What leases, gangs and machines go through, as stories: each name is a sentence that must stay true.

mod world;

use statemachine::command::*;
use statemachine::domain::{Level, Topology};
use statemachine::record::*;
use statemachine::spec::Shape;
use statemachine::*;
use world::*;

fn code<T>(answer: Result<T, Rejection>) -> Option<Code> {
    answer.err().map(|rejection| rejection.code)
}

// -------------------------------------------------------------------------------------------------------------- fencing

#[test]
fn report_of_an_older_token_is_refused() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let first = world.place(id, &[node]).unwrap();
    world.report(node, first, ended(0, 1, 1)).unwrap();
    world.wait(2_000);
    let second = world.place(id, &[node]).unwrap();
    assert!(second > first);
    assert_eq!(code(world.report(node, first, ended(0, 1, 0))), Some(Code::TokenStale));
    assert_eq!(world.shown(id), "STARTING");
}

#[test]
fn lease_expires_then_late_report_is_refused() {
    let mut world = World::new();
    let (node, epoch) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    world.run(Command::NodeSilent { node, epoch, tokens: vec![token] });
    assert_eq!(world.shown(id), "RETRYING");
    assert_eq!(code(world.report(node, token, ended(0, 1, 0))), Some(Code::TokenStale));
    assert!(world.task(id).result.is_none());
}

#[test]
fn a_message_of_an_older_epoch_changes_nothing() {
    let mut world = World::new();
    let (node, old) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    let mut again = machine("n1", 1, 1);
    again.running = vec![RunningPart { token, job: id, gpus: vec![again.gpus[0].uuid], started: true }];
    let (_, new) = world.register(again);
    assert_eq!(new, old + 1);
    assert_eq!(code(world.report_in(node, old, token, ended(0, 1, 0))), Some(Code::EpochStale));
    let silent = world.run(Command::NodeSilent { node, epoch: old, tokens: vec![token] });
    assert_eq!(World::code(&silent), Some(Code::EpochStale));
    assert_eq!(world.shown(id), "RUNNING");
}

#[test]
fn the_token_counter_is_lifted_above_what_an_agent_has_seen() {
    let mut world = World::new();
    let mut seen = machine("n1", 1, 1);
    seen.max_token = Token(500);
    let (node, _) = world.register(seen);
    let id = world.submit(one_gpu());
    assert_eq!(world.place(id, &[node]), Ok(Token(501)));
}

// ---------------------------------------------------------------------------------------------------------------- gangs

#[test]
fn gang_is_leased_whole_or_not_at_all() {
    let mut world = World::new();
    let (a, _) = world.register(machine("a", 1, 2));
    let (b, _) = world.register(machine("b", 2, 2));
    let small = world.submit(one_gpu());
    world.place(small, &[b]).unwrap();
    let gang = world.submit(job(shape(2, 2, 1)));
    let mut place = world.placement(gang, &[a, b]);
    place.parts[1].gpu_order = vec![0, 1];
    let before = world.state.allocs.get(&a).cloned();
    assert_eq!(code(world.plan(vec![place]).remove(0)), Some(Code::GpuTaken));
    assert_eq!(world.state.allocs.get(&a).cloned(), before);
    assert_eq!(world.shown(gang), "PENDING");
    assert_eq!(code(world.place(gang, &[a])), Some(Code::NoFit));
    assert_eq!(code(world.place(gang, &[a, a])), Some(Code::NoFit));
}

#[test]
fn a_gang_gets_one_gpu_type_unless_it_may_mix() {
    let mut world = World::new();
    let mut other = machine("b", 2, 1);
    other.gpus[0].gpu_type = "a100".into();
    let nodes = [world.register(machine("a", 1, 1)).0, world.register(other).0];
    let pure = world.submit(job(shape(2, 1, 1)));
    assert_eq!(code(world.place(pure, &nodes)), Some(Code::NoFit));
    let mixed = world.submit(job(Shape { mix_types: true, ..shape(2, 1, 1) }));
    assert!(world.place(mixed, &nodes).is_ok());
}

#[test]
fn a_gang_that_requires_a_rack_is_refused_in_two() {
    let mut world = World::new();
    let racks = [Some("r1"), Some("r1"), Some("r2"), None, None];
    let nodes: Vec<NodeId> = (1u8..)
        .zip(racks)
        .map(|(nth, rack)| {
            let labels = rack.map(|rack| ("rack".to_owned(), rack.to_owned())).into_iter().collect();
            world.register(RegisterNode { labels, ..machine(&format!("n{nth}"), nth, 1) }).0
        })
        .collect();
    let wants = |required| Some(Topology { level: Level::Rack, required });
    let gang = world.submit(job(Shape { topology: wants(true), ..shape(2, 1, 1) }));
    for apart in [[1, 2], [0, 3], [3, 4]] {
        let refused = world.place(gang, &apart.map(|nth| nodes[nth]));
        assert_eq!(code(refused.clone()), Some(Code::NoFit));
        let detail = refused.unwrap_err().detail;
        assert!(detail.starts_with("the gang requires one rack: nodes n"), "{detail}");
    }
    world.wait(1_000);
    let token = world.place(gang, &[nodes[1], nodes[0]]).expect("in one rack");
    // It runs on where its machine is carried to another rack; what starts next knows.
    let labels = [("rack".to_owned(), "r2".to_owned())].into();
    let second = machine("n2", 2, 1);
    let running = vec![RunningPart { token, job: gang, gpus: vec![second.gpus[0].uuid], started: false }];
    world.wait(1_000);
    world.register(RegisterNode { labels, running, ..second });
    assert!(world.state.leases.contains(&token));
    let preferred = world.submit(job(Shape { topology: wants(false), ..shape(2, 1, 1) }));
    assert!(world.place(preferred, &[nodes[2], nodes[3]]).is_ok());
    let alone = world.submit(job(Shape { topology: wants(true), ..shape(1, 1, 1) }));
    assert!(world.place(alone, &[nodes[4]]).is_ok());
}

#[test]
fn one_bad_placement_refuses_no_other_of_its_plan() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let (first, second) = (world.submit(one_gpu()), world.submit(one_gpu()));
    let cpu = world.submit(job(shape(1, 1, 0)));
    let places = [first, second, cpu].map(|id| world.placement(id, &[node])).to_vec();
    let answers = world.plan(places);
    assert!(answers[0].is_ok());
    // Both counted on the same GPU; the first one has it, and its share of the machine: all of it.
    assert_eq!(code(answers[1].clone()), Some(Code::GpuTaken));
    assert_eq!(code(answers[2].clone()), Some(Code::NoFit));
}

#[test]
fn gang_waits_at_its_barrier_until_the_last_part_is_prepared() {
    let mut world = World::new();
    let nodes = [world.register(machine("a", 1, 2)).0, world.register(machine("b", 2, 2)).0];
    let id = world.submit(job(shape(2, 2, 1)));
    let token = world.place(id, &nodes).unwrap();
    assert_eq!(code(world.report(nodes[0], token, PartReport::Started { port: 0 })), Some(Code::NotDue));
    assert_eq!(code(world.report(nodes[0], token, PartReport::Prepared { port: 0 })), Some(Code::InvalidSpec));
    world.report(nodes[0], token, PartReport::Prepared { port: 29_400 }).unwrap();
    assert_eq!(world.state.leases.get(&token).unwrap().value.phase, LeasePhase::Prepare);
    world.report(nodes[1], token, PartReport::Prepared { port: 0 }).unwrap();
    let lease = world.state.leases.get(&token).unwrap().value.clone();
    assert_eq!((lease.phase, lease.master), (LeasePhase::Go, Some(Master { node: nodes[0], port: 29_400 })));
    for node in nodes {
        assert_eq!(world.shown(id), "STARTING");
        world.report(node, token, PartReport::Started { port: 0 }).unwrap();
    }
    assert_eq!(world.shown(id), "RUNNING");
    // The first half's success is not the gang's.
    world.report(nodes[0], token, ended(0, 2, 0)).unwrap();
    assert_eq!(world.shown(id), "RUNNING");
    assert_eq!(world.state.allocs.get(&nodes[0]).unwrap().free_gpus, 0b11);
    world.report(nodes[1], token, ended(2, 2, 0)).unwrap();
    assert_eq!(world.shown(id), "SUCCEEDED");
}

#[test]
fn one_failed_rank_ends_its_gang_and_gpus_come_free_part_by_part() {
    let mut world = World::new();
    let nodes = [world.register(machine("a", 1, 2)).0, world.register(machine("b", 2, 2)).0];
    let id = world.submit(job(shape(2, 2, 1)));
    let token = world.place(id, &nodes).unwrap();
    for node in nodes {
        world.report(node, token, PartReport::Prepared { port: 1 }).unwrap();
    }
    for node in nodes {
        world.report(node, token, PartReport::Started { port: 0 }).unwrap();
    }
    world.report(nodes[1], token, ended(2, 2, 3)).unwrap();
    assert_eq!(world.shown(id), "RUNNING ending=FAILED");
    assert_eq!(world.state.allocs.get(&nodes[1]).unwrap().free_gpus, 0b11);
    assert_eq!(world.state.allocs.get(&nodes[0]).unwrap().free_gpus, 0);
    // The other ranks were stopped because of the verdict: nothing that came too late.
    let stopped = PartReport::Exited { exits: exits(0, 2, 143, ExitCause::Stopped), released: true };
    world.report(nodes[0], token, stopped).unwrap();
    assert_eq!(world.shown(id), "RETRYING");
    let task = world.task(id);
    assert_eq!(task.attempts.back().unwrap().exit, Some(Exit { code: 3, signal: 0 }));
    assert_eq!(task.avoid, [nodes[1]]);
}

#[test]
fn a_rank_of_another_part_is_refused() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    assert_eq!(code(world.report(node, token, ended(1, 1, 0))), Some(Code::InvalidSpec));
    assert_eq!(world.shown(id), "STARTING");
}

// ----------------------------------------------------------------------------------------------------------------- time

#[test]
fn start_timeout_and_time_limit_are_due_in_cluster_time_only() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let mut limited = one_gpu();
    limited.spec.limit_ms = 5_000;
    let id = world.submit(limited);
    let token = world.place(id, &[node]).unwrap();
    let due = |world: &mut World, cause| world.run(Command::LeaseDue { token, cause });
    world.wait(59_999);
    assert_eq!(World::code(&due(&mut world, DueCause::StartTimeout)), Some(Code::NotDue));
    assert_eq!(World::code(&due(&mut world, DueCause::TimeLimit)), Some(Code::NotDue));
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    world.wait(4_999);
    assert_eq!(World::code(&due(&mut world, DueCause::StartTimeout)), Some(Code::NotDue));
    assert_eq!(World::code(&due(&mut world, DueCause::TimeLimit)), Some(Code::NotDue));
    world.wait(1);
    assert!(matches!(due(&mut world, DueCause::TimeLimit), Outcome::Done(_)));
    assert_eq!(World::code(&due(&mut world, DueCause::TimeLimit)), Some(Code::AlreadyDecided));
    assert_eq!(world.shown(id), "RUNNING ending=TIMED_OUT");
    let stopped = PartReport::Exited { exits: exits(0, 1, 143, ExitCause::TimeLimit), released: true };
    let _ = world.report(node, token, stopped);
    assert_eq!(world.shown(id), "TIMED_OUT");
}

#[test]
fn a_gang_that_does_not_start_names_its_culprits() {
    let mut world = World::new();
    let nodes = [world.register(machine("a", 1, 1)).0, world.register(machine("b", 2, 1)).0];
    let id = world.submit(job(shape(2, 1, 1)));
    let token = world.place(id, &nodes).unwrap();
    world.report(nodes[0], token, PartReport::Prepared { port: 1 }).unwrap();
    world.wait(60_000);
    world.run(Command::LeaseDue { token, cause: DueCause::StartTimeout });
    assert_eq!(world.shown(id), "STARTING ending=LAUNCH_FAILED_BY_NODE");
    assert_eq!(world.state.job_view(id).unwrap().verdict_text, "not started in time: b");
    assert_eq!(world.state.nodes.get(&nodes[1]).unwrap().value.launch_fails, [id]);
    for node in nodes {
        world.report(node, token, PartReport::Released).unwrap();
    }
    assert_eq!((world.shown(id).as_str(), world.task(id).used.launch), ("RETRYING", 1));
}

#[test]
fn the_clock_never_goes_back() {
    let mut world = World::new();
    world.wait(5_000);
    world.clock_ms = 10;
    world.entry(Vec::new());
    assert_eq!(world.state.meta.clock_ms, 6_000);
}

#[test]
fn a_newer_level_stops_the_replica() {
    let mut world = World::new();
    let entry = Entry { level: LEVEL + 1, clock_ms: 9_999, wall_ms: 0, salt: 0, cmds: Vec::new() };
    assert_eq!(world.state.apply(&entry), Err(TooNew { needs: LEVEL + 1 }));
    assert_eq!(world.state.meta.clock_ms, 0);
}

// ---------------------------------------------------------------------------------------------------- nodes come and go

#[test]
fn boot_id_change_releases_at_once() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    let mut booted = machine("n1", 1, 1);
    booted.boot_id = [2; 16];
    world.register(booted);
    assert_eq!((world.shown(id).as_str(), world.task(id).used.lost), ("RETRYING", 1));
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 1);
}

#[test]
fn an_agent_that_comes_back_keeps_what_runs_ends_what_ended_and_releases_what_is_dead() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 4));
    let ids: Vec<JobId> = (0..4).map(|_| world.submit(one_gpu())).collect();
    let tokens: Vec<Token> = ids.iter().map(|id| world.place(*id, &[node]).unwrap()).collect();
    for token in &tokens[..3] {
        world.report(node, *token, PartReport::Started { port: 1 }).unwrap();
    }
    let mut back = machine("n1", 1, 4);
    back.running = vec![RunningPart { token: tokens[0], job: ids[0], gpus: vec![back.gpus[0].uuid], started: true }];
    back.finished = vec![FinishedPart { token: tokens[1], exits: exits(0, 1, 0, ExitCause::Own) }];
    back.dead = vec![tokens[2]];
    world.register(back);
    let shown: Vec<String> = ids.iter().map(|id| world.shown(*id)).collect();
    // The last one was never started: it still may be.
    assert_eq!(shown, ["RUNNING", "SUCCEEDED", "RETRYING", "STARTING"]);
    for kept in [tokens[0], tokens[3]] {
        assert_eq!(world.state.leases.get(&kept).unwrap().value.parts[0].epoch, 2);
    }
    world.report(node, tokens[3], PartReport::Started { port: 1 }).unwrap();
    assert_eq!(world.shown(ids[3]), "RUNNING");
}

#[test]
fn a_part_that_its_agent_does_not_know_is_lost_but_its_gpus_wait_for_silence() {
    let mut world = World::new();
    let (node, old) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    let (_, new) = world.register(machine("n1", 1, 1));
    assert_eq!(world.shown(id), "LOST");
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0);
    // The part stays in its old epoch, so nobody extends it.
    assert_eq!(world.state.leases.get(&token).unwrap().value.parts[0].epoch, old);
    world.run(Command::NodeSilent { node, epoch: new, tokens: vec![token] });
    assert_eq!(world.shown(id), "RETRYING");
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 1);
}

#[test]
fn a_new_fence_file_loses_even_what_was_only_held() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    world.place(id, &[node]).unwrap();
    let mut amnesic = machine("n1", 1, 1);
    amnesic.fence_new = true;
    world.register(amnesic);
    assert_eq!(world.shown(id), "LOST");
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0);
}

#[test]
fn node_silent_on_weak_machine_is_stuck_until_confirmed() {
    let mut world = World::new();
    let mut weak = machine("n1", 1, 1);
    weak.kill = KillStrength::Weak;
    let (node, epoch) = world.register(weak);
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    assert_eq!(World::code(&world.run(Command::ConfirmDead { node, token: None })), Some(Code::NotStuck));
    world.run(Command::NodeSilent { node, epoch, tokens: vec![token] });
    assert_eq!(world.shown(id), "LOST");
    assert_eq!(world.state.leases.get(&token).unwrap().value.parts[0].state, PartState::Stuck);
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0);
    world.run(Command::ConfirmDead { node, token: Some(token) });
    assert_eq!(world.shown(id), "RETRYING");
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 1);
}

#[test]
fn an_orphan_keeps_its_gpus_and_holds_its_job_until_it_is_gone() {
    let mut world = World::new();
    let (node, epoch) = world.register(machine("n1", 1, 2));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    world.run(Command::NodeSilent { node, epoch, tokens: vec![token] });
    world.wait(1);
    let mut back = machine("n1", 1, 2);
    back.running = vec![RunningPart { token, job: id, gpus: vec![back.gpus[0].uuid], started: true }];
    world.register(back);
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0b10);
    assert!(world.state.job_view(id).unwrap().task.holds.orphan);
    assert_eq!(code(world.place(id, &[node])), Some(Code::TaskGone));
    world.report(node, token, PartReport::Released).unwrap();
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0b11);
    assert!(world.place(id, &[node]).is_ok());
}

/// A registration that was held up on its way while the machine booted: it says of a boot that is over that nothing runs.
#[test]
fn a_registration_that_comes_after_a_newer_one_changes_nothing() {
    let mut world = World::new();
    world.register(machine("n1", 1, 1));
    let late = RegisterNode { after_epoch: 1, ..machine("n1", 1, 1) };
    let booted = RegisterNode { boot_id: [2; 16], ..machine("n1", 1, 1) };
    let (node, epoch) = world.register(booted);
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    let refused = world.run(Command::RegisterNode(Box::new(late)));
    assert_eq!(World::code(&refused), Some(Code::EpochStale), "{refused:?}");
    assert_eq!((world.state.node_epoch("n1"), world.shown(id).as_str()), (epoch, "RUNNING"));
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0);
}

#[test]
fn another_machine_may_not_take_a_name_with_leases_on_it() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    let other = machine("n1", 2, 1);
    let refused = world.run(Command::RegisterNode(Box::new(other.clone())));
    assert_eq!(World::code(&refused), Some(Code::IdentityConflict));
    world.report(node, token, ended(0, 1, 0)).unwrap();
    assert_eq!(world.register(other), (node, 2));
}

#[test]
fn a_gpu_in_use_on_one_node_can_not_be_registered_by_another() {
    let mut world = World::new();
    let (a, _) = world.register(machine("a", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[a]).unwrap();
    let mut thief = machine("b", 2, 1);
    thief.gpus[0].uuid = machine("a", 1, 1).gpus[0].uuid;
    let refused = world.run(Command::RegisterNode(Box::new(thief.clone())));
    assert_eq!(World::code(&refused), Some(Code::IdentityConflict));
    world.report(a, token, ended(0, 1, 0)).unwrap();
    let (b, _) = world.register(thief);
    assert_eq!(world.state.nodes.get(&a).unwrap().value.gpus[0].health, GpuHealth::Gone);
    let id = world.submit(one_gpu());
    assert!(world.place(id, &[b]).is_ok());
}

#[test]
fn slots_stay_while_something_is_leased_and_a_vanished_gpu_is_gone() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 3));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    let mut fewer = machine("n1", 1, 3);
    fewer.gpus.swap(0, 2);
    fewer.gpus.remove(1);
    fewer.class = machine("n1", 1, 2).class;
    fewer.running = vec![RunningPart { token, job: id, gpus: vec![fewer.gpus[1].uuid], started: true }];
    world.register(fewer.clone());
    let gpus = world.state.nodes.get(&node).unwrap().value.gpus.clone();
    let seen: Vec<(u8, GpuHealth)> = gpus.iter().map(|gpu| (gpu.uuid.0[1], gpu.health)).collect();
    assert_eq!(seen, [(0, GpuHealth::Ok), (1, GpuHealth::Gone), (2, GpuHealth::Ok)]);
    let class = world.state.nodes.get(&node).unwrap().value.class;
    assert_eq!(world.state.classes.get(&class).unwrap().gpus, 3);
    world.report(node, token, ended(0, 1, 0)).unwrap();
    fewer.running.clear();
    world.register(fewer);
    let gpus = &world.state.nodes.get(&node).unwrap().value.gpus;
    assert_eq!(gpus.iter().map(|gpu| gpu.uuid.0[1]).collect::<Vec<_>>(), [2, 0]);
}

#[test]
fn a_gpu_fault_requeues_its_job_without_a_burnt_retry() {
    let mut world = World::new();
    let (node, epoch) = world.register(machine("n1", 1, 2));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    let change = GpuHealthChange {
        node,
        epoch,
        slot: 0,
        health: GpuHealth::Quarantined,
        xid: 79,
        reason: "fell off the bus".into(),
        end_lease: true,
    };
    world.run(Command::GpuHealth(change));
    assert_eq!(world.shown(id), "STARTING ending=GPU_FAULT");
    world.report(node, token, PartReport::Released).unwrap();
    let task = world.task(id);
    assert_eq!((task.used.gpu_fault, task.used.retries, task.avoid.back()), (1, 0, Some(&node)));
    world.wait(60_000);
    let mut place = world.placement(id, &[node]);
    assert_eq!(place.parts[0].gpu_order, [1]);
    place.parts[0].gpu_order = vec![0];
    assert_eq!(code(world.plan(vec![place]).remove(0)), Some(Code::GpuUnhealthy));
    // The agent's restart does not make the GPU good.
    world.register(machine("n1", 1, 2));
    assert_eq!(world.state.nodes.get(&node).unwrap().value.gpus[0].health, GpuHealth::Quarantined);
}

#[test]
fn a_plan_made_before_a_registration_is_refused() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let place = world.placement(id, &[node]);
    world.register(machine("n1", 1, 1));
    assert_eq!(code(world.plan(vec![place.clone()]).remove(0)), Some(Code::EpochMoved));
    let mut wrong = world.placement(id, &[node]);
    wrong.attempt = 2;
    assert_eq!(code(world.plan(vec![wrong]).remove(0)), Some(Code::AttemptMoved));
}

#[test]
fn an_agent_can_not_free_a_part_that_its_registration_did_not_name() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    let (_, epoch) = world.register(machine("n1", 1, 1));
    for what in [PartReport::Released, ended(0, 1, 0)] {
        assert_eq!(code(world.report(node, token, what)), Some(Code::TokenStale));
    }
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0);
    world.run(Command::NodeSilent { node, epoch, tokens: vec![token] });
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 1);
}
