//! What jobs, requests, locks and watches go through, as stories: each name is a sentence that must stay true.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::settings::Settings;
use statemachine::*;
use world::*;

fn code<T>(answer: Result<T, Rejection>) -> Option<Code> {
    answer.err().map(|rejection| rejection.code)
}

// -------------------------------------------------------------------------------------------------- one job, end to end

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
fn run_times_of_ended_jobs_are_kept_by_user_and_limit() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let mut run = |limit_ms: u64, ran_ms: u64, end: Option<VerdictKind>| {
        let mut asked = one_gpu();
        asked.spec.limit_ms = limit_ms;
        let id = world.submit(asked);
        let token = world.place(id, &[node]).unwrap();
        world.report(node, token, PartReport::Started { port: 29_500 }).unwrap();
        world.wait(ran_ms);
        if end == Some(VerdictKind::Cancelled) {
            world.run(Command::Cancel { job: id });
            world.wait(3_000);
        }
        let _ = world.report(node, token, ended(0, 1, 0));
        let user = world.state.jobs.get(&id).unwrap().value.user;
        world.state.check().unwrap();
        (
            world.state.guess_ms(user, limit_ms),
            world.state.guess_ms(user, 0),
            world.state.guess_ms(UserId(999), limit_ms),
        )
    };
    assert_eq!(run(60_000, 5_000, None), (5_000, 5_000, 60_000));
    assert_eq!(run(90_000, 7_000, None), (7_000, 7_000, 90_000), "of any limit, where one of the same is known");
    assert_eq!(run(60_000, 6_000, None), (6_000, 7_000, 60_000));
    assert_eq!(run(60_000, 9_000, Some(VerdictKind::Cancelled)), (9_000, 9_000, 60_000), "until it was told to end");
    let late = run(60_000, 70_000, None);
    assert_eq!((late.0, late.1), (60_000, 60_000), "no longer than its limit");
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

// ------------------------------------------------------------------------------------------------------------- requests

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
fn a_forgotten_request_id_is_refused_wherever_the_wall_clock_has_leapt_since() {
    let mut world = World::new();
    let submit = |world: &mut World, id| world.run_as("ada", Some(id), Command::SubmitJob(Box::new(one_gpu())));
    let id = request_at(WALL0 + 1_000, 1);
    submit(&mut world, id);
    world.run(Command::Cancel { job: JobId(1) });
    world.wall_ahead_ms = -3_600_000;
    world.wait(25 * 3_600_000);
    assert_eq!(world.state.requests.len(), 0);
    for ahead in [-3_600_000, 0, 3_600_000] {
        world.wall_ahead_ms = ahead;
        assert_eq!(World::code(&submit(&mut world, id)), Some(Code::RequestExpired));
    }
}

#[test]
fn a_leap_of_the_wall_clock_while_ids_are_forgotten_does_not_refuse_new_ones() {
    let mut world = World::with(Settings { request_keep_ms: 900_000, ..Settings::default() });
    let submit = |world: &mut World, id| world.run_as("ada", Some(id), Command::SubmitJob(Box::new(one_gpu())));
    submit(&mut world, request_at(WALL0 + 1_000, 1));
    world.run(Command::Cancel { job: JobId(1) });
    world.wall_ahead_ms = 3_600_000;
    world.wait(1_800_000);
    assert_eq!(world.state.requests.len(), 0);
    world.wall_ahead_ms = 0;
    let fresh = request_at(WALL0 + 1_801_000, 2);
    assert!(matches!(submit(&mut world, fresh), Outcome::Done(_)));
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

// --------------------------------------------------------------------------------------------------------------- cancel

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

// -------------------------------------------------------------------------------------------------------------- retries

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
        picky.spec.retry.on_exit = [75].into();
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

// ---------------------------------------------------------------------------------------------------------------- locks

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

// ----------------------------------------------------------------------------------------------------------- validation

#[test]
fn all_field_errors_come_at_once_and_name_their_limits() {
    let mut world = World::new();
    let mut bad = one_gpu();
    bad.spec.lease_ttl_ms = 5;
    bad.spec.shape = shape(0, 1, 0);
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

// --------------------------------------------------------------------------------------------------------------- events

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
