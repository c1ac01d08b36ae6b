//! Finished jobs whose rows were damaged on one replica's disk: read there they come back from its own snapshots or from another replica,
//! and while no copy is to be had the reader is told what is damaged, never that there is no such job.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use proto::v1;
use proto::v1::audit_server::Audit;
use proto::v1::jobs_server::Jobs;
use proto::v1::keyspace_server::Keyspace;
use raft_node::api::Api;
use raft_node::leader::Board;
use statemachine::record::LogPosition;
use statemachine::storage::{self, LogBounds};
use statemachine::{Cmd, Command};
use tonic::{Code, Request, Status};

use support::{Group, SOON, until};

/// First byte of the keys of history values, and the segments of the store: parts of the format.
const HISTORY: u8 = 17;
const SEGMENT: usize = 16 << 20;
const JOBS: u64 = 5;
const STALE: i32 = v1::ReadMode::Stale as i32;

fn api(group: &Group, n: usize) -> Api {
    Api::new(group.replica(n).clone(), Board::default(), "secret")
}

/// A group in which jobs ended and left memory, into the image and no snapshot.
async fn with_history(size: usize, snapshot_entries: u64) -> Group {
    let mut group = Group::with(size, snapshot_entries).await;
    let leader = group.leader().await;
    let api = api(&group, leader);
    for number in 0..JOBS {
        let body = v1::Body { argv: vec!["sleep".to_owned(), number.to_string()], ..Default::default() };
        let job = v1::JobSpec { body: Some(body), ..Default::default() };
        let submit = v1::SubmitJobRequest { request_id: proto::request_id(), user: "u".into(), job: Some(job) };
        let job_id = api.submit_job(Request::new(submit)).await.expect("accepted").into_inner().job_id;
        let cancel = v1::CancelJobRequest { request_id: proto::request_id(), user: "u".into(), job_id };
        api.cancel_job(Request::new(cancel)).await.expect("accepted");
    }
    drop(api);
    group.assert_equal().await;
    for n in 0..size {
        group.stop(n).await;
        let dir = group.places[n].dir.clone();
        tokio::task::spawn_blocking(move || ten_minutes_later(&dir)).await.expect("ran");
    }
    resume(&mut group, size).await;
    let leader = group.leader().await;
    let tick = Cmd { request: None, actor: "tests".to_owned(), body: Command::Tick };
    group.replica(leader).propose(tick).await.expect("cluster time goes on");
    let archived = until(SOON, || {
        let all =
            group.running().all(|(_, replica)| replica.state().jobs.is_empty() && replica.state().archived.is_empty());
        all.then_some(())
    });
    assert!(archived.await.is_some(), "the jobs left memory, and their rows are on disk");
    group
}

async fn resume(group: &mut Group, size: usize) {
    for n in 0..size {
        group.resume(n).await;
    }
}

/// Cluster time goes on in the image: jobs linger in memory for five minutes.
fn ten_minutes_later(dir: &Path) {
    let last = LogPosition { term: u64::MAX, leader: 0, index: u64::MAX };
    let recovered = storage::open(dir, LogBounds { purged: None, last: Some(last) }).expect("a good image");
    let mut state = recovered.state;
    state.meta.clock_ms += 600_000;
    recovered.image.write(state.cut()).expect("a working disk");
}

/// Flips a bit in every row of a replica that is not running.
fn flip(dir: &Path) {
    let db = sled::Config::new().path(dir.join("image")).segment_size(SEGMENT).open().expect("closed");
    let tree = db.open_tree("image").expect("the image's");
    let mut flipped = 0;
    for (key, value) in tree.scan_prefix([HISTORY]).map(|value| value.expect("readable")) {
        let mut bytes = value.to_vec();
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
        tree.insert(key, bytes).expect("written");
        flipped += 1;
    }
    assert!(flipped > 0, "history is stored");
    db.flush().expect("flushed");
}

async fn damage(group: &mut Group, n: usize) {
    group.stop(n).await;
    let dir = group.places[n].dir.clone();
    tokio::task::spawn_blocking(move || flip(&dir)).await.expect("ran");
    group.resume(n).await;
}

struct Read {
    job: Result<v1::Job, Status>,
    list: Result<usize, Status>,
    keys: Result<usize, Status>,
}

async fn read(api: &Api, job_id: u64) -> Read {
    let job = api.get_job(Request::new(v1::GetJobRequest { job_id, read: STALE })).await;
    let list = v1::ListJobsRequest { ended: true, read: STALE, ..Default::default() };
    let list = api.list_jobs(Request::new(list)).await;
    let keys = v1::GetRequest { key: "/jobs/".into(), prefix: true, read: STALE, ..Default::default() };
    let keys = api.get(Request::new(keys)).await;
    Read {
        job: job.map(|reply| reply.into_inner()),
        list: list.map(|reply| reply.into_inner().jobs.len()),
        keys: keys.map(|reply| reply.into_inner().kvs.len()),
    }
}

async fn assert_whole(api: &Api) {
    for number in 1..=JOBS {
        let found = read(api, number).await;
        let job = found.job.expect("readable");
        assert_eq!(
            (job.id, job.spec.and_then(|spec| spec.body).expect("a body").argv),
            (number, vec!["sleep".to_owned(), (number - 1).to_string()])
        );
        assert_eq!((found.list.expect("readable"), found.keys.expect("readable")), (JOBS as usize, JOBS as usize));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_row_is_read_right_with_the_help_of_another_replica_and_stays_so() {
    let mut group = with_history(3, 50_000).await;
    damage(&mut group, 0).await;
    group.leader().await;
    assert_whole(&api(&group, 0)).await;
    // It was written back: alone it has it, too.
    group.kill(1).await;
    group.kill(2).await;
    group.stop(0).await;
    group.resume(0).await;
    assert_whole(&api(&group, 0)).await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn alone_it_comes_back_from_a_kept_snapshot() {
    let mut group = with_history(1, 60).await;
    for request in 0..150 {
        group.open_session(request).await;
    }
    let (snapshots, applied) =
        (storage::snapshots_dir(&group.places[0].dir), group.replica(0).state().meta.applied.index);
    let kept = until(SOON, || {
        let kept = storage::snapshot::list(&snapshots).expect("listed");
        kept.first().filter(|newest| newest.0.index + 60 > applied).map(drop)
    });
    assert!(kept.await.is_some(), "a snapshot was made");
    damage(&mut group, 0).await;
    assert_whole(&api(&group, 0)).await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_copy_the_reader_is_told_what_is_damaged() {
    let mut group = with_history(1, 50_000).await;
    damage(&mut group, 0).await;
    let found = read(&api(&group, 0), 1).await;
    for status in
        [found.job.map(drop), found.list.map(drop), found.keys.map(drop)].map(|read| read.expect_err("damaged"))
    {
        assert_eq!(status.code(), Code::DataLoss, "{status}");
        let text = status.message();
        assert!(text.contains("history of jobs 0 to 63") && text.contains("checksum"), "{text}");
    }
    // What never was is still not there.
    let unknown = api(&group, 0).get_job(Request::new(v1::GetJobRequest { job_id: 99, read: STALE })).await;
    assert_eq!(unknown.expect_err("unknown").code(), Code::NotFound);
    group.stop_all().await;
}

/// Asks for a copy, which makes a replica write a snapshot of now.
async fn makes_a_snapshot(group: &Group, n: usize) -> Result<(), Status> {
    let (api, began) = (api(group, n), Instant::now());
    loop {
        let mut request = Request::new(v1::SaveSnapshotRequest {});
        request.metadata_mut().insert("ares-join-token", "secret".parse().expect("plain"));
        match api.save_snapshot(request).await {
            // A replica that has just come back may not know its leader yet.
            Err(status) if status.code() == Code::Unavailable && began.elapsed() < SOON => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            saved => return saved.map(drop),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_damaged_history_is_written_once_another_replica_gave_it() {
    let mut group = with_history(3, 50_000).await;
    damage(&mut group, 0).await;
    group.leader().await;
    makes_a_snapshot(&group, 0).await.expect("saved");
    assert_whole(&api(&group, 0)).await;
    group.stop_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_copy_there_is_no_snapshot_and_the_replica_goes_on() {
    let mut group = with_history(1, 60).await;
    damage(&mut group, 0).await;
    let applied = group.replica(0).state().meta.applied.index;
    let snapshots = storage::snapshots_dir(&group.places[0].dir);
    assert_eq!(storage::snapshot::list(&snapshots).expect("listed"), [], "there is no copy");
    for request in 0..150 {
        group.open_session(request).await;
    }
    // It tries, and fails, and serves meanwhile.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(group.replica(0).failed().borrow().is_none(), "{:?}", group.replica(0).failed().borrow());
    group.open_session(150).await;
    assert!(group.replica(0).state().meta.applied.index > applied + 60);
    assert_eq!(storage::snapshot::list(&snapshots).expect("listed"), []);
    group.stop_all().await;
}
