//! A full disk, for real: a small tmpfs. Needs root, or says loudly that it was skipped.

use std::process::Command;

use super::*;

/// A mounted file system of its own, unmounted at the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<SmallDisk> {
        let dir = tempfile::tempdir().expect("a directory");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .output()
            .is_ok_and(|output| output.status.success());
        if !mounted {
            eprintln!("SKIPPED: a full disk was not tested, mounting a tmpfs needs root");
            return None;
        }
        Some(SmallDisk(dir))
    }

    fn ballast(&self) -> PathBuf {
        self.0.path().join("ballast")
    }

    /// Leaves no space at all.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.ballast()).expect("create");
        while std::io::Write::write(&mut file, &[1; 4096]).is_ok() {}
    }

    fn free(&self) {
        std::fs::remove_file(self.ballast()).expect("remove");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount").arg(self.0.path()).status().ok();
    }
}

fn wait_until(full: bool, log: &Log) {
    let seen = (0..1000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        *log.disk_full().borrow() == full
    });
    assert!(seen, "disk_full never became {full}");
}

#[test]
fn a_full_disk_acknowledges_nothing_and_goes_on_when_there_is_space() {
    let Some(disk) = SmallDisk::mount("4m") else { return };
    let dir = disk.0.path().join("log");
    let options = Options { segment_bytes: 64 << 10, reserve_bytes: 256 << 10, ..quiet() };
    let log = open(&dir, &options);
    save_vote(&log, 1);
    append(&log, records(0..10, 1, 1000));
    assert!(!*log.disk_full().borrow());
    disk.fill();

    // The room that is left carries some more: by itself, for what is written together is acknowledged together. Then nothing is
    // acknowledged, but everything can be read.
    append(&log, records(10..20, 1, 1000));
    let (tell, told) = mpsc::channel();
    for batch in 2..50 {
        let tell = tell.clone();
        let done = Box::new(move |result: Result<(), LogError>| tell.send((batch, result)).expect("the test waits"));
        log.append(records(batch * 10..batch * 10 + 10, 1, 1000), done).expect("append");
    }
    wait_until(true, &log);
    std::thread::sleep(Duration::from_millis(700));
    let acked: Vec<_> = told.try_iter().map(|(batch, result)| (batch, result.is_ok())).collect();
    assert!(acked.len() < 48, "{} of 48 batches acknowledged", acked.len());
    assert!(acked.iter().all(|(_, ok)| *ok));
    assert_eq!(all(&log.reader()), records(0..500, 1, 1000));
    assert!(*log.durable_index().borrow() < Some(499));

    // What a crash would leave now: every acknowledged entry, and no piece of a frame (but for the moment of a retry).
    let crashed = copy(&dir);
    let whole = (0..5).any(|_| ends_clean(&last_segment(copy(&dir).path())));
    assert!(whole, "the failed write was not taken back");
    let found = all(&open(crashed.path(), &quiet()).reader());
    assert!(found.len() >= 20 + acked.len() * 10);
    assert_eq!(found, records(0..found.len() as u64, 1, 1000));

    disk.free();
    for _ in acked.len()..48 {
        let (_, result) = told.recv_timeout(Duration::from_secs(10)).expect("an acknowledgement");
        result.expect("append");
    }
    wait_until(false, &log);
    drop(log);
    assert_eq!(all(&open(&dir, &options).reader()), records(0..500, 1, 1000));
}

#[test]
fn the_room_of_the_segment_is_of_use_on_a_full_disk() {
    let Some(disk) = SmallDisk::mount("8m") else { return };
    let dir = disk.0.path().join("log");
    let log = open(&dir, &quiet());
    save_vote(&log, 1);
    disk.fill();
    append(&log, records(0..900, 1, 1000));
    assert!(!*log.disk_full().borrow());
    assert_eq!(segments(&dir).len(), 1);
    disk.free();
    drop(log);
    assert_eq!(all(&open(&dir, &quiet()).reader()), records(0..900, 1, 1000));
}

#[test]
fn a_vote_is_saved_and_the_log_opens_on_a_full_disk() {
    let Some(disk) = SmallDisk::mount("4m") else { return };
    let dir = disk.0.path().join("log");
    let options = Options { reserve_bytes: 256 << 10, ..quiet() };
    let log = open(&dir, &options);
    save_vote(&log, 1);
    append(&log, records(0..10, 1, 1000));
    disk.fill();
    save_vote(&log, 2);
    drop(log);
    std::fs::remove_file(dir.join("reserve")).expect("remove");
    std::fs::remove_file(disk.ballast()).expect("remove");
    disk.fill();
    let log = open(&dir, &options);
    assert!(*log.disk_full().borrow());
    save_vote(&log, 3);
    assert_eq!(log.reader().vote().map(|vote| vote.term), Some(3));
    assert_eq!(all(&log.reader()).len(), 10);
}

#[test]
fn a_log_told_to_give_up_answers_everything() {
    let Some(disk) = SmallDisk::mount("4m") else { return };
    let dir = disk.0.path().join("log");
    let options = Options { segment_bytes: 64 << 10, reserve_bytes: 4096, ..quiet() };
    let log = open(&dir, &options);
    append(&log, records(0..10, 1, 1000));
    disk.fill();
    let (tell, told) = mpsc::channel();
    for first in [10, 110] {
        let tell = tell.clone();
        let done = Box::new(move |result| tell.send(result).expect("the test waits"));
        log.append(records(first..first + 100, 1, 1000), done).expect("append");
    }
    wait_until(true, &log);
    log.give_up_waiting();
    for _ in 0..2 {
        let result = told.recv_timeout(Duration::from_secs(10)).expect("an answer");
        let error = result.expect_err("there is no space").to_string();
        assert!(error.contains("no space left"), "{error}");
    }
    let error = durably(|done| log.append(records(210..211, 1, 1), done)).expect_err("the log stopped");
    assert!(matches!(error, LogError::Stopped(_)), "{error}");
    drop(log);
    disk.free();
    assert!(all(&open(&dir, &options).reader()).len() >= 10);
}
