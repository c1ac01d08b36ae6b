//! The keyspace as its readers see it.

mod world;

use statemachine::command::*;
use statemachine::keyspace::{self, Keyspace};
use statemachine::record::*;
use statemachine::*;
use world::*;

fn value(world: &World, key: &str) -> String {
    keyspace::get(&world.state, key).map_or_else(|| "absent".into(), |kv| kv.value)
}

fn keys(world: &World, prefix: &str) -> Vec<String> {
    keyspace::range(&world.state, prefix, 100, None).0.into_iter().map(|kv| kv.key).collect()
}

/// create, mod, version
fn life(world: &World, key: &str) -> (u64, u64, u32) {
    let kv = keyspace::get(&world.state, key).expect("the key is there");
    (kv.create_rev.0, kv.mod_rev.0, kv.version)
}

#[test]
fn a_jobs_keys_tell_its_story() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let all = ["/jobs/1", "/queue/pending/default/0/2/1", "/state/1", "/topology/n1"];
    assert_eq!(keys(&world, "/"), all);
    assert_eq!(value(&world, "/state/1"), r#"{"attempt":0,"job_id":1,"state":"PENDING"}"#);
    assert_eq!(value(&world, "/queue/pending/default/0/2/1"), r#"{"job_id":1}"#);

    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 29_500 }).unwrap();
    assert_eq!(value(&world, "/queue/pending/default/0/2/1"), "absent");
    assert_eq!(value(&world, "/state/1"), r#"{"attempt":1,"job_id":1,"state":"RUNNING","token":"1"}"#);
    assert_eq!(value(&world, "/fencing/job/1"), r#"{"job_id":1,"token":"1"}"#);
    let gpu = "GPU-01000000-0000-0000-0000-000000000001";
    assert_eq!(value(&world, &format!("/fencing/gpu/{gpu}")), format!(r#"{{"gpu":"{gpu}","token":"1"}}"#));
    assert_eq!(
        value(&world, "/leases/1"),
        format!(
            r#"{{"attempt":1,"granted_ms":1000,"job_id":1,"master":{{"node":"n1","port":29500}},"parts":[{{"first_rank":0,"gpus":["{gpu}"],"node":"n1","ranks":1}}],"phase":"RUNNING","started_ms":1000,"token":"1","ttl_ms":10000}}"#
        )
    );

    world.report(node, token, ended(0, 1, 9)).unwrap();
    assert_eq!(value(&world, "/leases/1"), "absent");
    assert!(value(&world, "/retry/1").starts_with(r#"{"attempt":1,"job_id":1,"not_before_ms":"#));
    assert_eq!(life(&world, "/state/1"), (2, 5, 4));
    assert_eq!(life(&world, "/retry/1"), (5, 5, 1));
    world.run(Command::Cancel { job: id });
    assert_eq!(value(&world, "/retry/1"), "absent");
    let wall = WALL0 + 1_000;
    assert_eq!(
        value(&world, "/results/1"),
        format!(r#"{{"attempt":1,"job_id":1,"outcome":"CANCELLED","wall_ms":{wall}}}"#)
    );
    assert_eq!(life(&world, "/jobs/1"), (2, 2, 1));
}

#[test]
fn a_draining_lease_shows_its_ending() {
    let mut world = World::new();
    let (node, _) = world.register(machine("n1", 1, 1));
    let id = world.submit(one_gpu());
    let token = world.place(id, &[node]).unwrap();
    world.report(node, token, PartReport::Started { port: 1 }).unwrap();
    world.run(Command::Cancel { job: id });
    assert_eq!(
        value(&world, "/state/1"),
        r#"{"attempt":1,"ending":"CANCELLED","job_id":1,"state":"RUNNING","token":"1"}"#
    );
}

#[test]
fn an_archived_job_keeps_its_keys_also_once_only_the_image_has_it() {
    let mut world = World::new();
    world.submit(one_gpu());
    world.run(Command::Cancel { job: JobId(1) });
    let before = keyspace::range(&world.state, "/", 100, None);
    world.wait(300_000);
    assert!(world.state.jobs.is_empty());
    assert_eq!(keyspace::range(&world.state, "/", 100, None), before);
    assert_eq!(world.state.meta.rev, Revision(2));

    let rows = std::mem::take(&mut world.state.archived);
    assert_eq!(value(&world, "/state/1"), "absent");
    let history = |id: JobId| rows.get(&id).cloned();
    let full = Keyspace::with_history(&world.state, &history);
    assert_eq!(full.range("/", 100, None), before);
}

#[test]
fn numbers_rise_as_numbers_and_a_prefix_is_a_prefix() {
    let mut world = World::new();
    for _ in 0..12 {
        world.submit(one_gpu());
    }
    assert_eq!(keys(&world, "/jobs/1"), ["/jobs/1", "/jobs/10", "/jobs/11", "/jobs/12"]);
    let (page, more) = keyspace::range(&world.state, "/jobs/", 2, Some("/jobs/9"));
    let page: Vec<String> = page.into_iter().map(|kv| kv.key).collect();
    assert_eq!((page, more), (vec!["/jobs/10".to_owned(), "/jobs/11".to_owned()], true));
    assert_eq!(keys(&world, "/nothing/"), Vec::<String>::new());
}

#[test]
fn the_queue_stands_as_it_is_served() {
    let mut world = World::new();
    for priority in [0, 5, -1, 5] {
        let mut some = one_gpu();
        some.spec.priority = priority;
        world.submit(some);
    }
    assert_eq!(
        keys(&world, "/queue/"),
        [
            "/queue/pending/default/5/2/2",
            "/queue/pending/default/5/4/4",
            "/queue/pending/default/0/1/1",
            "/queue/pending/default/-1/3/3",
        ]
    );
}

#[test]
fn secrets_in_the_environment_are_not_shown() {
    let mut world = World::new();
    let mut secret = one_gpu();
    secret.body.env.insert("API_KEY".into(), "hunter2".into());
    world.submit(secret);
    let job = value(&world, "/jobs/1");
    assert!(job.contains(r#""env_names":["API_KEY"]"#) && !job.contains("hunter2"), "{job}");
}

#[test]
fn a_lock_and_a_node_are_shown() {
    let mut world = World::new();
    let (node, epoch) = world.register(machine("n1", 1, 1));
    for _ in 0..2 {
        world.run(Command::OpenSession { owner: "ada".into(), ttl_ms: 10_000 });
    }
    for session in [1, 2] {
        world.run(Command::Acquire { session: SessionId(session), name: "db".into() });
    }
    assert_eq!(value(&world, "/locks/db"), r#"{"holder":{"session":1,"token":"1"},"name":"db","waiters":1}"#);
    assert_eq!(life(&world, "/locks/db"), (2, 3, 2));
    let change = GpuHealthChange {
        node,
        epoch,
        slot: 0,
        health: GpuHealth::Quarantined,
        xid: 79,
        reason: "fell off the bus".into(),
        end_lease: false,
    };
    world.run(Command::GpuHealth(change));
    let shown = value(&world, "/topology/n1");
    for part in [r#""health":"QUARANTINED""#, r#""xid":79"#, r#""type":"h100""#, r#""admin":"READY""#] {
        assert!(shown.contains(part), "{shown}");
    }
    assert_eq!(life(&world, "/topology/n1"), (1, 4, 2));
}
