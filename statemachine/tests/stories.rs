//! The machine's behaviour as stories: each name is a sentence that must stay true.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::settings::Settings;
use statemachine::*;
use world::*;

fn code<T>(answer: Result<T, Rejection>) -> Option<Code> {
    answer.err().map(|rejection| rejection.code)
}

// ------------------------------------------------------------------------------------------------ one job, end to end

#[test]
fn a_job_waits_runs_and_commits_one_result_with_its_token() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 2));
    let id = world.submit(one_gpu());
    assert_eq!(world.shown(id), "PENDING");
    let token = world.place(id, &[node]).unwrap();
    assert_eq!(world.shown(id), "STARTING");
    world.report(node, token, PartReport::Started { port: 29_500 }).unwrap();
    assert_eq!(world.shown(id), "RUNNING");
    assert_eq!(world.state.leases.get(&token).unwrap().value.master, Some(Master { node, port: 29_500 }));
    world.report(node, token, ended(0, 1, 0)).unwrap();
    assert_eq!(world.shown(id), "SUCCEEDED");
    let result = world.task(id).result.clone().unwrap();
    assert_eq!((result.token, result.attempt, result.exit), (Some(token), 1, Some(Exit { code: 0, signal: 0 })));
    assert!(world.state.leases.is_empty());
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0b11);
}

#[test]
fn an_ended_job_leaves_memory_after_its_linger_and_is_still_known() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, ended(0, 1, 0)).unwrap();
    world.wait(299_999);
    assert!(world.state.jobs.contains(&id));
    assert_eq!(world.state.next_due_ms(), Some(301_000));
    world.wait(1);
    assert!(!world.state.jobs.contains(&id) && !world.state.bodies.contains(&id));
    assert_eq!(world.state.ended_job(id), Some((TaskOutcome::Succeeded, 0)));
    assert_eq!(world.shown(id), "SUCCEEDED");
    let bucket = world.state.buckets.get(&0).unwrap();
    assert!(bucket.rows == 1 && bucket.bytes > 50 && bucket.sum != 0);
    assert_eq!(World::code(&world.run(Command::Cancel { job: id })), Some(Code::AlreadyEnded));
}

#[test]
fn dropped_history_is_gone_at_once_and_cleared_by_a_chore() {
    let mut world = World::new();
    let id = world.submit(one_gpu());
    world.run(Command::Cancel { job: id });
    world.wait(300_000);
    assert_eq!(World::code(&world.run(Command::Retain { bucket: 0 })), Some(Code::NotDue));
    world.wait(3_600_000);
    assert!(matches!(world.run(Command::Retain { bucket: 0 }), Outcome::Done(_)));
    assert_eq!(world.state.ended_job(id), None);
    world.wait(1);
    assert!(world.state.ended.is_empty() && world.state.meta.retiring.is_empty());
    assert_eq!(world.state.next_due_ms(), None);
}

// ----------------------------------------------------------------------------------------------------------- requests

#[test]
fn same_request_id_is_one_job() {
    let mut world = World::new();
    let submit = |world: &mut World, job| world.run_as("ada", Some(request(1)), Command::SubmitJob(Box::new(job)));
    let first = submit(&mut world, one_gpu());
    assert_eq!(first, Outcome::Done(Reply::Stored(StoredReply::Job(JobId(1)))));
    assert_eq!(submit(&mut world, one_gpu()), Outcome::Replayed(StoredReply::Job(JobId(1))));
    assert_eq!(world.state.jobs.len(), 1);
    let other = job(shape(1, 1, 2));
    assert_eq!(World::code(&submit(&mut world, other)), Some(Code::RequestMismatch));
}

#[test]
fn a_refused_request_may_be_tried_again() {
    let mut world = World::new();
    let mut bad = one_gpu();
    bad.tenant = "nobody".into();
    let refused = world.run_as("ada", Some(request(1)), Command::SubmitJob(Box::new(bad)));
    assert_eq!(World::code(&refused), Some(Code::TenantUnknown));
    let again = world.run_as("ada", Some(request(1)), Command::SubmitJob(Box::new(one_gpu())));
    assert!(matches!(again, Outcome::Done(_)));
}

#[test]
fn an_old_request_id_is_forgotten_and_then_refused_but_not_while_its_job_lives() {
    let mut world = World::new();
    let wall = WALL0 + 1_000;
    let submit = |world: &mut World, id| world.run_as("ada", Some(id), Command::SubmitJob(Box::new(one_gpu())));
    let (ends, lives) = (request_at(wall, 1), request_at(wall, 2));
    submit(&mut world, ends);
    submit(&mut world, lives);
    world.run(Command::Cancel { job: JobId(1) });
    world.wait(25 * 3_600_000);
    assert_eq!(world.state.requests.len(), 1);
    assert_eq!(World::code(&submit(&mut world, ends)), Some(Code::RequestExpired));
    assert_eq!(submit(&mut world, lives), Outcome::Replayed(StoredReply::Job(JobId(2))));
}

#[test]
fn a_request_id_from_the_future_is_refused() {
    let mut world = World::new();
    let id = request_at(WALL0 + 20 * 60_000, 1);
    let refused = world.run_as("ada", Some(id), Command::SubmitJob(Box::new(one_gpu())));
    assert_eq!(World::code(&refused), Some(Code::RequestFromFuture));
}

#[test]
fn a_full_request_table_forgets_the_oldest_but_none_younger_than_15_minutes() {
    let mut world = World::with(Settings { requests: 2, ..Settings::default() });
    let open = |world: &mut World, n| {
        world.run_as("ada", Some(request(n)), Command::OpenSession { owner: "ada".into(), ttl_ms: 10_000 })
    };
    open(&mut world, 1);
    open(&mut world, 2);
    assert_eq!(World::code(&open(&mut world, 3)), Some(Code::RequestsFull));
    world.wait(20 * 60_000);
    assert!(matches!(open(&mut world, 3), Outcome::Done(_)));
    assert_eq!(world.state.requests.len(), 2);
}

// ------------------------------------------------------------------------------------------------------------- fencing

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

// -------------------------------------------------------------------------------------------------------------- cancel

#[test]
fn cancel_races_success_first_verdict_wins() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 2));
    let (cancelled, succeeded) = (world.submit(one_gpu()), world.submit(one_gpu()));
    let first = world.place(cancelled, &[node]).unwrap();
    let second = world.place(succeeded, &[node]).unwrap();
    world.report(node, first, PartReport::Started { port: 1 }).unwrap();
    world.run(Command::Cancel { job: cancelled });
    assert_eq!(world.shown(cancelled), "RUNNING ending=CANCELLED");
    assert_eq!(code(world.report(node, first, ended(0, 1, 0))), Some(Code::AlreadyDecided));
    assert_eq!(world.shown(cancelled), "CANCELLED");

    let exited = PartReport::Exited { exits: exits(0, 1, 0, ExitCause::Own), released: false };
    world.report(node, second, exited).unwrap();
    assert!(matches!(world.run(Command::Cancel { job: succeeded }), Outcome::Done(_)));
    world.report(node, second, PartReport::Released).unwrap();
    assert_eq!(world.shown(succeeded), "SUCCEEDED");
}

#[test]
fn cancel_replaces_the_way_back_to_the_queue() {
    let mut world = World::new();
    let (node, epoch) = world.register(machine("n1", 1, 2));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    let failed = PartReport::Exited { exits: exits(0, 1, 1, ExitCause::Own), released: false };
    world.report(node, token, failed).unwrap();
    world.run(Command::Cancel { job: id });
    world.run(Command::NodeSilent { node, epoch, tokens: vec![token] });
    assert_eq!(world.shown(id), "CANCELLED");
    assert_eq!(world.task(id).attempts.back().unwrap().verdict, VerdictKind::Failed);
}

#[test]
fn a_waiting_or_retrying_job_is_cancelled_at_once_and_a_second_cancel_is_told_so() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let (waiting, retrying) = (world.submit(one_gpu()), world.submit(one_gpu()));
    let token = world.place(retrying, &[node]).unwrap();
    world.report(node, token, ended(0, 1, 1)).unwrap();
    assert_eq!(world.shown(retrying), "RETRYING");
    for id in [waiting, retrying] {
        world.run(Command::Cancel { job: id });
        assert_eq!(world.shown(id), "CANCELLED");
        assert_eq!(World::code(&world.run(Command::Cancel { job: id })), Some(Code::AlreadyEnded));
    }
    assert_eq!(World::code(&world.run(Command::Cancel { job: JobId(9) })), Some(Code::NotFound));
}

#[test]
fn a_job_is_its_owners_to_cancel() {
    let mut world = World::new();
    let id = world.submit(one_gpu());
    let refused = world.run_as("eve", None, Command::Cancel { job: id });
    assert_eq!(World::code(&refused), Some(Code::NotOwner));
    assert_eq!(world.shown(id), "PENDING");
}

// --------------------------------------------------------------------------------------------------------------- gangs

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

// ------------------------------------------------------------------------------------------------------------- retries

#[test]
fn failures_burn_retries_with_growing_waits_and_then_the_job_has_failed() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    for least in [750, 1_500, 3_000] {
        let token = world.place(id, &[node]).unwrap();
        let now = world.clock_ms;
        world.report(node, token, ended(0, 1, 1)).unwrap();
        let Phase::Retrying { not_before_ms } = world.task(id).phase else { panic!("{}", world.shown(id)) };
        assert!((least..=least * 5 / 3).contains(&(not_before_ms - now)), "{} ms", not_before_ms - now);
        assert_eq!(world.state.next_due_ms(), Some(not_before_ms));
        assert_eq!(code(world.place(id, &[node])), Some(Code::TaskGone));
        world.wait(not_before_ms - now);
        assert_eq!(world.shown(id), "PENDING");
    }
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, ended(0, 1, 1)).unwrap();
    assert_eq!(world.shown(id), "FAILED");
    assert_eq!(world.task(id).result.clone().unwrap().attempt, 4);
}

#[test]
fn only_the_listed_exits_are_retried() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    for (exit, state) in [(75, "RETRYING"), (1, "FAILED")] {
        let mut picky = one_gpu();
        picky.spec.retry.on_exit = vec![75];
        let id = world.submit(picky);
        let token = world.place(id, &[node]).unwrap();
        world.report(node, token, ended(0, 1, exit)).unwrap();
        assert_eq!(world.shown(id), state);
    }
}

#[test]
fn lost_node_burns_no_retry() {
    let mut world = World::new();
    let (node, epoch) = world.register(machine("n1", 1, 1));
    let mut once = one_gpu();
    once.spec.retry.max = 0;
    let id = world.submit(once);
    let token = world.place(id, &[node]).unwrap();
    world.run(Command::NodeSilent { node, epoch, tokens: vec![token] });
    // The first time without a wait.
    assert_eq!(world.task(id).phase, Phase::Retrying { not_before_ms: world.clock_ms });
    world.wait(0);
    assert_eq!(world.shown(id), "PENDING");
    assert_eq!((world.task(id).used.lost, world.task(id).used.retries), (1, 0));
    let token = world.place(id, &[node]).unwrap();
    world.run(Command::NodeSilent { node, epoch, tokens: vec![token] });
    let Phase::Retrying { not_before_ms } = world.task(id).phase else { panic!() };
    assert!(not_before_ms > world.clock_ms);
}

#[test]
fn too_many_excused_attempts_put_the_job_on_hold() {
    let mut world = World::with(Settings { excused_in_row: 2, ..Settings::default() });
    let (node, epoch) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    for _ in 0..2 {
        let token = world.place(id, &[node]).unwrap();
        world.run(Command::NodeSilent { node, epoch, tokens: vec![token] });
        world.wait(10_000);
    }
    let view = world.state.job_view(id).unwrap();
    assert_eq!((world.shown(id).as_str(), view.task.holds.launch), ("PENDING", true));
    assert!(world.state.index.queue.is_empty() && world.state.index.waiting.len() == 1);
    assert_eq!(code(world.place(id, &[node])), Some(Code::TaskGone));
    world.run(Command::Cancel { job: id });
    assert_eq!(world.shown(id), "CANCELLED");
}

#[test]
fn a_launch_that_failed_by_the_jobs_fault_burns_a_retry_and_says_nothing_about_the_node() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    let failed = PartReport::LaunchFailed { fault: LaunchFault::Job, why: "no such file: python9".into() };
    world.report(node, token, failed).unwrap();
    assert_eq!(world.state.job_view(id).unwrap().verdict_text, "no such file: python9");
    world.report(node, token, PartReport::Released).unwrap();
    assert_eq!((world.shown(id).as_str(), world.task(id).used.retries), ("RETRYING", 1));
    assert!(world.state.nodes.get(&node).unwrap().value.launch_fails.is_empty());
}

#[test]
fn a_node_that_fails_launches_of_three_jobs_is_taken_out() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let fail = |world: &mut World, id| {
        let token = world.place(id, &[node]).unwrap();
        let failed = PartReport::LaunchFailed { fault: LaunchFault::Node, why: "no space left".into() };
        world.report(node, token, failed).unwrap();
        world.report(node, token, PartReport::Released).unwrap();
        world.wait(600_000);
    };
    let first = world.submit(one_gpu());
    fail(&mut world, first);
    fail(&mut world, first);
    assert_eq!((world.task(first).used.launch, world.task(first).used.retries), (2, 0));
    for _ in 0..2 {
        assert_eq!(world.state.nodes.get(&node).unwrap().value.admin, NodeAdmin::Ready);
        let id = world.submit(one_gpu());
        fail(&mut world, id);
    }
    assert!(matches!(world.state.nodes.get(&node).unwrap().value.admin, NodeAdmin::Out { .. }));
    assert_eq!(code(world.place(first, &[node])), Some(Code::NodeNotReady));
    world.run(Command::NodeAdmin { node, out: None });
    assert!(world.place(first, &[node]).is_ok());
}

// ---------------------------------------------------------------------------------------------------------------- time

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
    assert_eq!(world.shown(id), "STARTING ending=LAUNCH_NODE");
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

// --------------------------------------------------------------------------------------------------- nodes come and go

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
    assert_eq!(world.state.leases.get(&tokens[0]).unwrap().value.parts[0].epoch, 2);
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
    world.register(machine("n1", 1, 1));
    assert_eq!(world.shown(id), "LOST");
    assert_eq!(world.state.allocs.get(&node).unwrap().free_gpus, 0);
    world.run(Command::NodeSilent { node, epoch: old, tokens: vec![token] });
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

// --------------------------------------------------------------------------------------------------------------- locks

fn open(world: &mut World) -> SessionId {
    match world.run(Command::OpenSession { owner: "ada".into(), ttl_ms: 10_000 }) {
        Outcome::Done(Reply::Stored(StoredReply::Session(id))) => id,
        other => panic!("{other:?}"),
    }
}

fn acquire(world: &mut World, session: SessionId) -> Option<Token> {
    match world.run(Command::Acquire { session, name: "db".into() }) {
        Outcome::Done(Reply::Stored(StoredReply::Lock(token))) => token,
        other => panic!("{other:?}"),
    }
}

#[test]
fn lock_goes_to_next_waiter_with_a_live_session() {
    let mut world = World::new();
    let sessions = [open(&mut world), open(&mut world), open(&mut world)];
    let first = acquire(&mut world, sessions[0]).unwrap();
    assert_eq!(acquire(&mut world, sessions[1]), None);
    assert_eq!(acquire(&mut world, sessions[2]), None);
    assert_eq!(acquire(&mut world, sessions[0]), Some(first));
    world.run(Command::EndSession { session: sessions[1] });
    world.run(Command::EndSession { session: sessions[0] });
    let holder = world.state.locks.get(&"db".to_owned()).unwrap().value.holder.unwrap();
    assert_eq!(holder.session, sessions[2]);
    assert!(holder.token > first);
    assert_eq!(acquire(&mut world, sessions[2]), Some(holder.token));
    world.run(Command::Unlock { session: sessions[2], name: "db".into() });
    assert!(world.state.locks.is_empty());
    let refused = world.run(Command::Unlock { session: sessions[2], name: "db".into() });
    assert_eq!(World::code(&refused), Some(Code::LockNotHeld));
    let refused = world.run(Command::Acquire { session: sessions[0], name: "db".into() });
    assert_eq!(World::code(&refused), Some(Code::SessionUnknown));
}

// ---------------------------------------------------------------------------------------------------------- validation

#[test]
fn all_field_errors_come_at_once_and_name_their_limits() {
    let mut world = World::new();
    let mut bad = one_gpu();
    bad.spec.lease_ttl_ms = 5;
    bad.spec.shape.nodes = 0;
    bad.body.argv.clear();
    bad.gpu_types = vec!["H100 PCIe".into()];
    let Outcome::Rejected(rejection) = world.run(Command::SubmitJob(Box::new(bad))) else { panic!() };
    assert_eq!(rejection.code, Code::InvalidSpec);
    for part in ["lease_ttl_ms is 5, must be 10000 to 86400000", "shape.nodes is 0", "argv is empty", "gpu_types[0]"] {
        assert!(rejection.detail.contains(part), "{}", rejection.detail);
    }
    let mut large = one_gpu();
    large.body.argv.push("x".repeat(256 << 10));
    let Outcome::Rejected(rejection) = world.run(Command::SubmitJob(Box::new(large))) else { panic!() };
    assert!(rejection.detail.contains("the limit is 262144"), "{}", rejection.detail);
    let never = world.run(Command::SubmitJob(Box::new(job(shape(1, 200, 1)))));
    assert_eq!(World::code(&never), Some(Code::NeverFits));
}

#[test]
fn a_job_for_gpus_that_no_node_has_waits() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let mut wish = one_gpu();
    wish.gpu_types = vec!["b200".into()];
    let id = world.submit(wish);
    assert_eq!(world.shown(id), "PENDING");
    let mut place = world.placement(id, &[node]);
    place.parts[0].gpu_order = vec![0];
    assert_eq!(code(world.plan(vec![place]).remove(0)), Some(Code::NoFit));
}

#[test]
fn a_full_state_refuses_jobs_and_says_so() {
    let mut world = World::with(Settings { live_jobs: 1, ..Settings::default() });
    world.submit(one_gpu());
    let full = world.run(Command::SubmitJob(Box::new(one_gpu())));
    assert_eq!(World::code(&full), Some(Code::StateFull));
}

// -------------------------------------------------------------------------------------------------------------- events

#[test]
fn a_revision_is_one_per_command_that_changed_the_keyspace() {
    let mut world = World::new();
    world.submit(one_gpu());
    assert_eq!(world.state.meta.rev, Revision(1));
    open(&mut world);
    world.run(Command::Tick);
    world.run(Command::Cancel { job: JobId(77) });
    assert_eq!(world.state.meta.rev, Revision(1));
    let cmd = || Cmd { request: None, actor: "ada".into(), body: Command::SubmitJob(Box::new(one_gpu())) };
    world.entry(vec![cmd(), cmd()]);
    assert_eq!(world.state.meta.rev, Revision(3));
    let revs: Vec<(u64, u16)> = world.state.events_since(Revision(1)).unwrap().map(|e| (e.rev.0, e.sub)).collect();
    assert_eq!(revs, [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)]);
}

#[test]
fn a_watch_below_the_floor_is_told_so() {
    let mut world = World::with(Settings { event_ring: 7, ..Settings::default() });
    for _ in 0..4 {
        world.submit(one_gpu());
    }
    // Twelve events, three a revision: the ring begins inside revision 2, so revision 3 is the first whole one.
    assert_eq!(world.state.events_since(Revision(1)).err(), Some(Compacted { floor: Revision(2) }));
    assert_eq!(world.state.events_since(Revision(2)).unwrap().count(), 6);
    assert_eq!(World::code(&world.run(Command::Compact { rev: Revision(5) })), Some(Code::FutureRevision));
    world.run(Command::Compact { rev: Revision(3) });
    assert_eq!(world.state.events_since(Revision(2)).err(), Some(Compacted { floor: Revision(3) }));
    assert_eq!(world.state.events_since(Revision(3)).unwrap().count(), 3);
    assert_eq!(world.state.events_since(Revision(4)).unwrap().count(), 0);
}

#[test]
fn indexes_built_from_tables_are_those_kept_along_the_way() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 2));
    let ids: Vec<JobId> = (0..3).map(|_| world.submit(one_gpu())).collect();
    let token = world.place(ids[0], &[node]).unwrap();
    world.report(node, token, ended(0, 1, 1)).unwrap();
    let kept = world.state.index.clone();
    world.state.rebuild_indexes();
    assert_eq!(world.state.index, kept);
    assert!(!kept.queue.is_empty() && !kept.timers.is_empty() && !kept.gpus.is_empty());
}
