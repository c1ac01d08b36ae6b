//! The answer to "why does my job wait": the reason, the holders, the interval of the start, and changes that hold what
//! they promise.

mod site;

use scheduling::plan::Cache;
use scheduling::why::why;
use scheduling::{Outlook, Start, Why};
use site::{Machine, Site, hgx, mock_v100, shape};
use statemachine::command::SetTenant;
use statemachine::spec::Shape;
use statemachine::{JobId, TaskKey};

const MINUTE: u64 = 60_000;
const GRACE: u64 = 10_000;

fn submit(site: &mut Site, shape: Shape, limit_ms: u64) -> JobId {
    site.submit_limited("default", shape, 0, &[], limit_ms)
}

fn ask(site: &Site, job: JobId) -> Why {
    why(&site.state, &mut Cache::default(), site.state.front_task(job), &site.unheard).expect("it waits")
}

/// From now, in ms.
fn wait(site: &Site, start: Start) -> Option<u64> {
    match start {
        Start::Now => Some(0),
        Start::At(at_ms) => Some(at_ms - site.state.meta.clock_ms),
        Start::Unknown => None,
    }
}

fn asks(why: &Why) -> Vec<(&str, bool)> {
    why.changes.iter().map(|change| (change.ask.as_str(), change.start == Start::Now)).collect()
}

#[test]
fn a_job_that_fits_starts_now_and_is_told_where() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let job = submit(&mut site, shape(1, 1, 2), 0);
    let why = ask(&site, job);
    assert_eq!((why.reason.code(), why.soonest, why.latest), ("SOON", Start::Now, Start::Now));
    assert_eq!(why.placed.expect("a placement").parts[0].gpu_order, [0, 1]);
    assert!(why.changes.is_empty() && why.holders.is_empty());
}

#[test]
fn a_busy_machine_is_told_with_its_holders_and_their_ends() {
    let mut site = Site::default();
    site.join("n01", hgx("h100"));
    let long = submit(&mut site, shape(1, 1, 4), 20 * MINUTE);
    let short = submit(&mut site, shape(1, 1, 2), 5 * MINUTE);
    site.start();
    let job = submit(&mut site, shape(1, 1, 4), 10 * MINUTE);
    let why = ask(&site, job);
    assert_eq!(why.reason.to_string(), "needs 4 GPUs on one machine; best has 2 free on n01");
    let holders: Vec<_> =
        why.holders.iter().map(|holder| (holder.job, holder.gpus, holder.ends_ms.is_some())).collect();
    assert_eq!(holders, [(short, 2, true)], "job {long} need not end first");
    assert!(wait(&site, why.soonest).unwrap() <= 1);
    let latest = wait(&site, why.latest).unwrap();
    assert!((5 * MINUTE..=5 * MINUTE + GRACE).contains(&latest), "{latest} ms");
    assert_eq!(asks(&why), [("--gpus 2", true)]);
}

#[test]
fn the_interval_counts_those_before_it_in_the_order() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    submit(&mut site, shape(1, 1, 4), 10 * MINUTE);
    site.start();
    let first = submit(&mut site, shape(1, 1, 4), 10 * MINUTE);
    let second = submit(&mut site, shape(1, 1, 4), 10 * MINUTE);
    let length = 10 * MINUTE + GRACE;
    for (job, soonest, latest) in [(first, 0, length), (second, length / 10, 2 * length)] {
        let why = ask(&site, job);
        let within = |start, expected| wait(&site, start).unwrap().abs_diff(expected) <= 10;
        assert!(within(why.soonest, soonest) && within(why.latest, latest), "job {job}: {why:?}");
    }
    let why = ask(&site, second);
    assert!(why.assumes.iter().any(|text| text.starts_with("1 job before it")), "{:?}", why.assumes);
    let outlook = Outlook::new(&site.state, &mut Cache::default(), &site.unheard, 10_000);
    assert_eq!(outlook.start(TaskKey::only(second)), why.latest, "ares queue says the same");
}

#[test]
fn behind_a_job_without_a_limit_no_latest_start_is_told() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    submit(&mut site, shape(1, 1, 4), 0);
    site.start();
    let job = submit(&mut site, shape(1, 1, 1), MINUTE);
    let why = ask(&site, job);
    assert_eq!(why.latest, Start::Unknown);
    assert!(wait(&site, why.soonest).unwrap() <= 1);
    assert_eq!(why.holders[0].ends_ms, None);
    assert!(why.assumes.iter().any(|text| text.contains("have no time limit")), "{:?}", why.assumes);
}

#[test]
fn a_limit_that_fits_before_a_reservation_is_found() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    submit(&mut site, shape(1, 1, 2), 10 * MINUTE);
    site.start();
    let whole = submit(&mut site, shape(1, 1, 4), MINUTE);
    let job = submit(&mut site, shape(1, 1, 2), 0);
    let why = ask(&site, job);
    assert_eq!(why.reason.code(), "RESERVED");
    assert_eq!((why.holders.len(), why.holders[0].job, why.holders[0].waits), (1, whole, true));
    assert_eq!(asks(&why), [("--time-limit 590s", true)]);
}

#[test]
fn another_type_more_machines_and_a_resumed_machine_are_tried() {
    let mut site = Site::default();
    site.join("v1", mock_v100());
    site.join("v2", mock_v100());
    let out = site.join("h1", hgx("h100"));
    site.join("h2", hgx("h100"));
    site.out(out);
    site.submit_limited("default", shape(1, 1, 8), 0, &["h100"], 0);
    site.start();
    let job = site.submit_limited("default", shape(1, 1, 8), 0, &["h100"], 0);
    assert_eq!(asks(&ask(&site, job)), [("ares node resume h1", true)]);
    let any = site.submit_limited("default", shape(1, 2, 4), 1, &[], 0);
    let why = ask(&site, any);
    assert_eq!(
        asks(&why),
        [
            ("--nodes 2 --gpus-per-node 4 --ranks-per-node 1", true),
            ("--gpus 4 --ranks-per-node 2", true),
            ("ares node resume h1", true)
        ]
    );
    let small = site.submit_limited("default", shape(1, 1, 4), 2, &["h100"], 0);
    assert_eq!(asks(&ask(&site, small))[0], ("--gpu-type v100", true));
}

#[test]
fn what_never_fits_is_told_what_would() {
    let mut site = Site::default();
    site.join("n01", Machine { cores_by_numa: vec![4, 4], ..mock_v100() });
    let job = submit(&mut site, Shape { cores_per_rank: 20, ..shape(1, 1, 1) }, 0);
    let why = ask(&site, job);
    assert_eq!((why.reason.code(), why.latest, asks(&why)), ("NEVER", Start::Unknown, vec![("--cores 8", true)]));
    let job = submit(&mut site, Shape { min_bandwidth_mbps: 90_000, ..shape(1, 1, 2) }, 0);
    assert_eq!(asks(&ask(&site, job))[0], ("--min-bandwidth 40000MB/s", true));
}

#[test]
fn a_tenants_limit_names_who_uses_it_and_the_limit_that_would_do() {
    let mut site = Site::default();
    site.join("n01", hgx("h100"));
    site.tenant(SetTenant {
        name: "lab".into(),
        parent: Some(String::new()),
        limit_gpus: Some(Some(4)),
        ..SetTenant::default()
    });
    let runs = site.submit_for("lab", shape(1, 1, 3), 0, &[]);
    submit(&mut site, shape(1, 1, 1), 0);
    site.start();
    let job = site.submit_for("lab", shape(1, 1, 2), 0, &[]);
    let why = ask(&site, job);
    assert_eq!(why.reason.code(), "QUOTA");
    assert_eq!(why.holders.iter().map(|holder| holder.job).collect::<Vec<_>>(), [runs]);
    let changes = [("--gpus 1", true), ("--tenant default", true), ("ares tenant set lab --limit-gpus 5", true)];
    assert_eq!(asks(&why), changes);
    site.tenant(SetTenant { name: "below".into(), parent: Some("lab".into()), ..SetTenant::default() });
    assert!(!asks(&ask(&site, job)).contains(&("--tenant below", true)), "the limit above binds it too");
}

#[test]
fn what_is_not_the_planners_has_a_reason_and_no_start() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let job = submit(&mut site, shape(1, 1, 1), 0);
    site.command(statemachine::Command::Hold { job });
    let why = ask(&site, job);
    assert_eq!((why.reason.code(), why.soonest, why.latest), ("HELD", Start::Unknown, Start::Unknown));
    assert!(!why.reason.advice().is_empty());
    assert!(scheduling::why(&site.state, &mut Cache::default(), TaskKey::only(JobId(99)), &site.unheard).is_none());
}

#[test]
fn a_job_in_its_backoff_starts_no_sooner_than_that_ends() {
    let mut site = Site::default();
    site.join("n01", mock_v100());
    let job = submit(&mut site, shape(1, 1, 1), 0);
    let token = site.start()[0];
    site.fail_launch(token);
    let why = ask(&site, job);
    let scheduling::Reason::Backoff { in_ms, .. } = *why.reason else { panic!("{:?}", why.reason) };
    assert_eq!((wait(&site, why.soonest), why.latest), (Some(in_ms), Start::Unknown));
}

/// The promise of a change: who asks for it in its place starts now.
#[test]
fn a_change_that_starts_it_now_does() {
    let mut site = Site::default();
    site.join("n01", hgx("h100"));
    submit(&mut site, shape(1, 1, 5), 30 * MINUTE);
    site.start();
    let job = submit(&mut site, shape(1, 1, 8), 0);
    assert_eq!(asks(&ask(&site, job))[0], ("--gpus 3", true));
    site.command(statemachine::Command::Cancel { job });
    let job = submit(&mut site, shape(1, 1, 3), 0);
    assert!(site.placed(&site.plan(), job).is_some());
}

#[test]
fn every_code_is_documented_once() {
    let names: Vec<&str> = scheduling::reason::CODES.iter().map(|(name, ..)| *name).collect();
    let mut unique = names.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), names.len());
    assert!(names.contains(&"SOON") && names.contains(&"RESERVED"));
}
