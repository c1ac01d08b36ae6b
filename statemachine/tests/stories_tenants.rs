//! Who pays and how urgent work may be called: tenants, quotas, usage and priorities, as stories.

mod world;

use statemachine::command::*;
use statemachine::record::*;
use statemachine::settings::{OrderBy, Planning, Settings};
use world::*;

fn tenant(name: &str, parent: &str) -> SetTenant {
    let parent = Some(parent.to_owned());
    SetTenant { name: name.into(), create: true, parent, ..SetTenant::default() }
}

fn set(world: &mut World, set: SetTenant) -> Result<(), (Code, String)> {
    answer(world.run(Command::SetTenant(Box::new(set))))
}

fn answer(outcome: Outcome) -> Result<(), (Code, String)> {
    match outcome {
        Outcome::Done(_) => Ok(()),
        Outcome::Rejected(no) => Err((no.code, no.detail)),
        Outcome::Replayed(_) => panic!("no request id was given"),
    }
}

fn job_of(tenant: &str, gpus: u16) -> SubmitJob {
    SubmitJob { tenant: tenant.into(), ..job(shape(1, 1, gpus)) }
}

fn tenant_record<'a>(world: &'a World, name: &str) -> &'a Tenant {
    let id = world.state.index.tenant_by_name.get(name).expect("a tenant of this name");
    world.state.tenants.get(id).expect("its record")
}

#[test]
fn a_grant_passes_no_limit_at_any_level_and_the_refusal_names_the_numbers() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    set(&mut world, SetTenant { limit_gpus: Some(Some(4)), ..tenant("lab", "") }).unwrap();
    set(&mut world, tenant("vision", "lab")).unwrap();
    set(&mut world, tenant("speech", "lab")).unwrap();
    let first = world.submit(job_of("vision", 3));
    let second = world.submit(job_of("speech", 2));
    let token = world.place(first, &[node]).unwrap();
    assert_eq!(tenant_record(&world, "lab").used.all_gpus(), 3);
    let refusal = world.place(second, &[node]).unwrap_err();
    assert_eq!(refusal.code, Code::Quota);
    assert_eq!(refusal.detail, "tenant \"lab\" uses 3 of its 4 GPUs, 2 more would pass the limit");
    world.report(node, token, ended(0, 1, 0)).unwrap();
    assert!(world.place(second, &[node]).is_ok());
    assert_eq!((tenant_record(&world, "vision").leases, tenant_record(&world, "speech").leases), (0, 1));
}

#[test]
fn two_placements_of_one_plan_share_a_quota() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let (other, _) = world.register(machine("n2", 2, 8));
    set(&mut world, SetTenant { limit_by_type: Some([("h100".into(), 5)].into()), ..tenant("lab", "") }).unwrap();
    let jobs = [world.submit(job_of("lab", 3)), world.submit(job_of("lab", 3))];
    let places = vec![world.placement(jobs[0], &[node]), world.placement(jobs[1], &[other])];
    let answers = world.plan(places);
    assert!(answers[0].is_ok());
    assert_eq!(answers[1].as_ref().map_err(|no| no.code), Err(Code::Quota));
}

#[test]
fn a_limit_lowered_under_use_stops_grants_and_ends_nothing() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    set(&mut world, tenant("lab", "")).unwrap();
    let first = world.submit(job_of("lab", 4));
    world.place(first, &[node]).unwrap();
    let lower = SetTenant { create: false, parent: None, limit_gpus: Some(Some(2)), ..tenant("lab", "") };
    set(&mut world, lower).unwrap();
    assert_eq!(world.shown(first), "STARTING");
    let second = world.submit(job_of("lab", 1));
    assert_eq!(world.place(second, &[node]).map_err(|no| no.code), Err(Code::Quota));
    let cores = world.submit(job_of("lab", 0));
    assert!(world.place(cores, &[node]).is_ok(), "a limit of GPUs binds no job without");
}

#[test]
fn a_tenant_that_may_not_borrow_stays_within_its_guarantee() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    let guaranteed = Some([("h100".into(), 2)].into());
    set(&mut world, SetTenant { guaranteed, may_borrow: Some(false), ..tenant("guest", "") }).unwrap();
    let jobs = [world.submit(job_of("guest", 2)), world.submit(job_of("guest", 1))];
    assert!(world.place(jobs[0], &[node]).is_ok());
    assert_eq!(world.place(jobs[1], &[node]).map_err(|no| no.code), Err(Code::Quota));
}

#[test]
fn jobs_get_the_time_limit_of_the_nearest_tenant_that_has_one() {
    let mut world = World::new();
    set(&mut world, SetTenant { default_limit_ms: Some(60_000), ..tenant("lab", "") }).unwrap();
    set(&mut world, tenant("vision", "lab")).unwrap();
    let plain = world.submit(job_of("vision", 1));
    let mut own = job_of("vision", 1);
    own.spec.limit_ms = 5_000;
    let own = world.submit(own);
    let limit = |id| world.state.jobs.get(&id).unwrap().value.spec.limit_ms;
    assert_eq!((limit(plain), limit(own)), (60_000, 5_000));
}

#[test]
fn no_job_has_a_longer_time_limit_than_its_tenants_allow() {
    let mut world = World::new();
    set(&mut world, SetTenant { max_limit_ms: Some(60_000), ..tenant("lab", "") }).unwrap();
    let (max_limit_ms, default_limit_ms) = (Some(90_000), Some(70_000));
    set(&mut world, SetTenant { max_limit_ms, default_limit_ms, ..tenant("vision", "lab") }).unwrap();
    let of = |tenant: &str, limit_ms: u64| {
        let mut job = job_of(tenant, 1);
        job.spec.limit_ms = limit_ms;
        job
    };
    let limit = |world: &World, id| world.state.jobs.get(&id).unwrap().value.spec.limit_ms;
    let plain = world.submit(of("vision", 0));
    assert_eq!(limit(&world, plain), 60_000, "its default, within what is allowed");
    let bare = world.submit(of("lab", 0));
    assert_eq!(limit(&world, bare), 60_000, "what is allowed, for want of a default");
    world.submit(of("vision", 60_000));
    match world.run(Command::SubmitJob(Box::new(of("vision", 60_001)))) {
        Outcome::Rejected(no) => {
            assert_eq!(no.code, Code::InvalidSpec);
            assert_eq!(no.detail, "limit_ms is 60001, the limit of tenant \"lab\" is 60000");
        }
        other => panic!("{other:?}"),
    }
    set(&mut world, SetTenant { max_limit_ms: Some(0), create: false, ..tenant("lab", "") }).unwrap();
    world.submit(of("vision", 90_000));
}

#[test]
fn a_tenant_may_have_only_so_many_jobs_that_wait() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    set(&mut world, SetTenant { max_pending: Some(1), ..tenant("lab", "") }).unwrap();
    let first = world.submit(job_of("lab", 1));
    let again = Command::SubmitJob(Box::new(job_of("lab", 1)));
    let (code, detail) = answer(world.run(again.clone())).unwrap_err();
    assert_eq!((code, detail.as_str()), (Code::QuotaPending, "tenant \"lab\" has 1 jobs that wait, its limit is 1"));
    world.place(first, &[node]).unwrap();
    assert!(answer(world.run(again)).is_ok());
}

#[test]
fn usage_is_counted_at_each_level_from_committed_leases_and_fades() {
    let half = 1_000_000;
    let mut world = World::with(Settings { usage_half_life_ms: half, ..Settings::default() });
    let (node, _) = world.register(machine("n1", 1, 8));
    set(&mut world, tenant("lab", "")).unwrap();
    set(&mut world, tenant("vision", "lab")).unwrap();
    let id = world.submit(job_of("vision", 4));
    let token = world.place(id, &[node]).unwrap();
    world.wait(1_000);
    world.report(node, token, ended(0, 1, 0)).unwrap();
    for name in ["vision", "lab"] {
        assert_eq!(tenant_record(&world, name).usage.gpu_ms, 4_000, "{name}");
    }
    assert_eq!(tenant_record(&world, "default").usage.gpu_ms, 0);
    let shares = world.state.shares();
    let of = |name: &str| shares[world.state.index.tenant_by_name.get(name).unwrap()];
    assert_eq!((of("lab").fair_ppm, of("lab").used_ppm, of("lab").owed_gpu_ms), (500_000, 1_000_000, -2_000));
    assert_eq!((of("default").owed_gpu_ms, of("vision").owed_gpu_ms), (2_000, 0));
    let lab = tenant_record(&world, "lab");
    let later = lab.usage.at(world.clock_ms + half, &lab.used, half);
    assert!((1_990..=2_000).contains(&later.gpu_ms), "{later:?}");
}

#[test]
fn the_tree_has_no_ring_no_strays_and_an_end_to_its_depth() {
    let mut world = World::new();
    set(&mut world, tenant("t0", "")).unwrap();
    for depth in 1..8 {
        set(&mut world, tenant(&format!("t{depth}"), &format!("t{}", depth - 1))).unwrap();
    }
    assert_eq!(set(&mut world, tenant("t8", "t7")).unwrap_err().0, Code::Limit);
    let ring = SetTenant { create: false, ..tenant("t0", "t3") };
    assert_eq!(set(&mut world, ring).unwrap_err().0, Code::Conflict);
    assert_eq!(set(&mut world, tenant("t0", "")).unwrap_err().0, Code::Conflict);
    assert_eq!(set(&mut world, tenant("x", "nobody")).unwrap_err().0, Code::TenantUnknown);
    assert_eq!(set(&mut world, tenant("Bad Name", "")).unwrap_err().0, Code::InvalidSpec);
    let heavy = SetTenant { weight: Some(0), ..tenant("x", "") };
    assert_eq!(set(&mut world, heavy).unwrap_err(), (Code::InvalidSpec, "weight is 0, must be 1 to 1000000".into()));
}

#[test]
fn a_tenant_leaves_once_it_is_empty_and_its_old_jobs_keep_its_name() {
    let mut world = World::new();
    set(&mut world, tenant("lab", "")).unwrap();
    let id = world.submit(job_of("lab", 1));
    let remove = || Command::RemoveTenant { name: "lab".into() };
    assert_eq!(answer(world.run(remove())).unwrap_err().0, Code::NotEmpty);
    world.run(Command::Cancel { job: id });
    answer(world.run(remove())).unwrap();
    assert_eq!(answer(world.run(Command::SubmitJob(Box::new(job_of("lab", 1))))).unwrap_err().0, Code::TenantUnknown);
    assert_eq!(world.state.job_view(id).unwrap().tenant, "lab");
    set(&mut world, tenant("lab", "")).expect("the name is free");
    assert_eq!(answer(world.run(Command::RemoveTenant { name: "default".into() })).unwrap_err().0, Code::Conflict);
}

#[test]
fn a_tenant_with_running_jobs_does_not_move() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 8));
    set(&mut world, tenant("lab", "")).unwrap();
    set(&mut world, tenant("vision", "")).unwrap();
    let id = world.submit(job_of("vision", 1));
    world.place(id, &[node]).unwrap();
    let moved = SetTenant { create: false, ..tenant("vision", "lab") };
    assert_eq!(set(&mut world, moved).unwrap_err().0, Code::NotEmpty);
}

#[test]
fn a_priority_is_used_by_those_who_may_and_gives_its_value() {
    let mut world = World::new();
    set(&mut world, tenant("lab", "")).unwrap();
    set(&mut world, tenant("vision", "lab")).unwrap();
    let urgent = SetPriority {
        name: "urgent".into(),
        create: true,
        value: 100,
        tenants: vec!["lab".into()],
        preempts: true,
        preemptible: false,
    };
    answer(world.run(Command::SetPriority(urgent.clone()))).unwrap();
    assert_eq!(answer(world.run(Command::SetPriority(urgent))).unwrap_err().0, Code::Conflict);
    let as_urgent = |tenant: &str| SubmitJob { priority_class: "urgent".into(), ..job_of(tenant, 1) };
    let id = world.submit(as_urgent("vision"));
    let spec = &world.state.jobs.get(&id).unwrap().value.spec;
    assert_eq!((spec.priority, spec.terms.as_ref().unwrap().class.as_str()), (100, "urgent"));
    let denied = answer(world.run(Command::SubmitJob(Box::new(as_urgent("default"))))).unwrap_err();
    assert_eq!(denied, (Code::PriorityDenied, "priority \"urgent\" is not for tenant \"default\"".into()));
    let mut both = as_urgent("lab");
    both.spec.priority = 3;
    assert_eq!(answer(world.run(Command::SubmitJob(Box::new(both)))).unwrap_err().0, Code::InvalidSpec);
    answer(world.run(Command::RemovePriority { name: "urgent".into() })).unwrap();
    assert_eq!(answer(world.run(Command::SubmitJob(Box::new(as_urgent("lab"))))).unwrap_err().0, Code::PriorityUnknown);
}

#[test]
fn a_policy_changes_what_it_names_within_its_bounds() {
    let mut world = World::new();
    let before = world.state.meta.settings.planning.clone();
    assert_eq!((before.order, before.reservations), (OrderBy::Fair, 1));
    let fifo = SetPolicy { order: Some(OrderBy::Fifo), ..SetPolicy::default() };
    answer(world.run(Command::SetPolicy(fifo))).unwrap();
    let after = world.state.meta.settings.planning.clone();
    assert_eq!(after, Planning { order: OrderBy::Fifo, ..before });
    let policy = world.state.meta.policy;
    let wild = SetPolicy { order: None, reservations: Some(65), aged_after_ms: Some(59_999), ..SetPolicy::default() };
    let (code, detail) = answer(world.run(Command::SetPolicy(wild))).unwrap_err();
    assert_eq!(code, Code::InvalidSpec);
    assert!(
        detail.starts_with("reservations is 65, the limit is 64; aged_after_ms is 59999, must be 60000 to "),
        "{detail}"
    );
    assert_eq!((world.state.meta.settings.planning.clone(), world.state.meta.policy), (after, policy));
    let never = SetPolicy { reservations: Some(0), aged_after_ms: Some(0), ..SetPolicy::default() };
    answer(world.run(Command::SetPolicy(never))).unwrap();
}
