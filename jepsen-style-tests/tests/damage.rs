//! Damaged files and a full disk: refuse, rebuild or wait, never invent.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jepsen_style_tests::checks::{self, Digests};
use jepsen_style_tests::cluster::{Cluster, SOON, Setup, block_on};
use jepsen_style_tests::disk::Disk;
use jepsen_style_tests::load::Load;
use proto::{Patience, v1};

/// Largest file below a directory.
fn largest(dir: &Path) -> PathBuf {
    let mut found: Vec<(u64, PathBuf)> = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).expect("listed").flatten() {
            let meta = entry.metadata().expect("looked at");
            if meta.is_dir() { dirs.push(entry.path()) } else { found.push((meta.len(), entry.path())) }
        }
    }
    found.into_iter().max().expect("there are files").1
}

#[test]
fn a_flipped_byte_in_the_log_stops_that_replica_with_file_and_offset_and_the_others_go_on() {
    block_on(async {
        let mut cluster = Cluster::start(3).await;
        let load = Load::start(&cluster.client(), 4);
        load.more(200, SOON).await.expect("it runs");
        let (leader, _) = cluster.wait_for_leader().await;
        cluster.kill_replica(leader);
        // In the middle of what was durable: an entry that this replica acknowledged.
        let segments = fs::read_dir(cluster.replica_dir(leader).join("log")).expect("listed").flatten();
        let mut segments: Vec<PathBuf> =
            segments.map(|entry| entry.path()).filter(|path| path.extension().is_some()).collect();
        segments.sort();
        let segment = segments.first().expect("there is a segment").clone();
        let bytes = fs::read(&segment).expect("read");
        let end = bytes.iter().rposition(|byte| *byte != 0).expect("it holds frames");
        let file = fs::OpenOptions::new().write(true).open(&segment).expect("opened");
        file.write_all_at(&[bytes[end / 2] ^ 0x10], (end / 2) as u64).expect("written");

        let (code, said) = cluster.restart_and_end(leader).expect("it ends");
        let name = segment.file_name().and_then(|name| name.to_str()).expect("a name");
        assert!(code == 1 && said.contains(name) && said.contains("offset"), "{said}");
        assert_eq!(fs::read(&segment).expect("read")[end / 2], bytes[end / 2] ^ 0x10, "the files are as they were");
        load.more(50, SOON).await.expect("the others go on");
        let acks = load.finish().await;
        checks::nothing_lost(&cluster, &acks).await.expect("nothing is lost");
    });
}

#[test]
fn a_damaged_image_is_moved_aside_and_built_again() {
    block_on(async {
        let mut cluster = Cluster::start(1).await;
        let load = Load::start(&cluster.client(), 4);
        load.more(300, SOON).await.expect("it runs");
        let acks = load.finish().await;
        assert_eq!(cluster.stop_replica(0).expect("it ends"), 0);
        let dir = cluster.replica_dir(0);
        let victim = largest(&dir.join("image"));
        let len = fs::metadata(&victim).expect("looked at").len();
        let file = fs::OpenOptions::new().write(true).open(&victim).expect("opened");
        for at in (0..len).step_by(512) {
            file.write_all_at(&[0xa5; 16], at).expect("written");
        }

        cluster.restart_replica(0);
        cluster.wait_for_leader().await;
        checks::nothing_lost(&cluster, &acks).await.expect("nothing is lost");
        checks::request_once(&cluster.client(), &acks[..20]).await.expect("the request ids are known");
        let names = fs::read_dir(&dir).expect("listed").flatten().map(|entry| entry.file_name());
        let names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        let aside = names.iter().any(|name| name.starts_with("image") && name != "image");
        assert!(aside, "the damaged image is kept for whoever wants to look: {names:?}");
        assert!(cluster.replica_log(0).contains("aside"), "{}", cluster.replica_log(0));
        // The new image is good: it is what the next start loads.
        assert_eq!(cluster.stop_replica(0).expect("it ends"), 0);
        cluster.restart_replica(0);
        cluster.wait_for_leader().await;
        checks::nothing_lost(&cluster, &acks).await.expect("nothing is lost");
    });
}

#[test]
fn a_full_disk_acknowledges_nothing_hands_over_and_resumes_when_there_is_space() {
    if let Err(why) = Disk::available() {
        eprintln!("SKIPPED: no disk was filled, that needs root, loop devices and mkfs.ext4: {why}");
        return;
    }
    block_on(async {
        let setup = Setup { disk_mib: Some(128), ..Setup::of(3) };
        let mut cluster = Cluster::with(setup).await.expect("it starts");
        let (leader, term) = cluster.wait_for_leader().await;
        let load = Load::start(&cluster.client(), 4);
        load.more(50, SOON).await.expect("it begins");

        cluster.disk(leader).fill().expect("filled");
        let (next, _) = cluster.find_leader(term, SOON).await.expect("leadership moves");
        assert_ne!(next, leader, "a full replica does not lead");
        load.more(50, SOON).await.expect("the others go on");
        let full = cluster.status(leader).await.expect("it answers");
        assert!(full.disk_full, "it says so: {full:?}");
        let jobs = v1::ListJobsRequest { limit: 1, read: v1::ReadMode::Stale as i32, ..Default::default() };
        cluster.client_at(leader).list_jobs(jobs).await.expect("reads go on");

        // With a second full disk there is no quorum: nothing may be acknowledged.
        cluster.disk(next).fill().expect("filled");
        let (client, mut unacknowledged) = (cluster.client(), 0);
        let client = client.with_patience(Patience { call: Duration::from_secs(2), attempt: Duration::from_secs(2) });
        cluster
            .until("two of three are full", async |cluster| {
                cluster.status(next).await.is_ok_and(|status| status.disk_full)
            })
            .await;
        for at in 0..6 {
            let open = v1::OpenSessionRequest {
                request_id: proto::request_id(),
                // Large enough that what the log may still write by its reserve can't take all of them.
                owner: format!("{at}{}", "x".repeat(200)),
                ttl_ms: 60_000,
            };
            unacknowledged += u32::from(client.open_session(open).await.is_err());
        }
        assert_eq!(unacknowledged, 6, "a write was acknowledged without a quorum that could keep it");
        for at in [leader, next] {
            let jobs = v1::ListJobsRequest { limit: 1, read: v1::ReadMode::Stale as i32, ..Default::default() };
            cluster.client_at(at).list_jobs(jobs).await.expect("reads go on");
            cluster.disk(at).empty().expect("emptied");
        }
        load.more(50, SOON).await.expect("it resumes by itself");
        let acks = load.finish().await;
        cluster
            .until("no disk is full", async |cluster| {
                cluster.status(leader).await.is_ok_and(|status| !status.disk_full)
            })
            .await;
        checks::nothing_lost(&cluster, &acks).await.expect("nothing is lost");
        checks::replicas_equal(&cluster, &mut Digests::default()).await.expect("the replicas are equal");
    });
}
