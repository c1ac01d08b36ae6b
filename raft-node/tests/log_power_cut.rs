//! Power cuts of the log alone: a process appends, votes and purges on an ext4 of its own, which is shut down under it
//! so that everything unsynced is gone; then nothing acknowledged may be missing. Needs root and loop devices, or says
//! loudly that it was skipped. The file system is mounted in a mount namespace of the test's own: however the test ends,
//! killed too, neither mount nor loop device stays. `ARES_POWER_CUTS` sets the number of cuts. With the planted bug (acknowledge without
//! fsync) the same run must find a loss.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use raft_node::log::{EntryId, Log, Options, Record, Vote};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use rustix::time::{ClockId, clock_gettime};

const ACKS_BEFORE_A_CUT: usize = 150;
const LIVE_ENTRIES: u64 = 3000;
const IN_FLIGHT: u64 = 5;

fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

fn options() -> Options {
    Options { segment_bytes: 256 << 10, tail_bytes: 64 << 10, reserve_bytes: 1 << 20, ..Options::default() }
}

fn record(index: u64, term: u64) -> Record {
    let len = (index * 37 % 900) as usize;
    let data: Vec<u8> = (0..len).map(|at| (index ^ term ^ at as u64) as u8).collect();
    Record { id: EntryId { index, term, node: 1 }, tag: 1, data: data.into() }
}

/// What the writing process says, one line each: `TIME entries FIRST END TERM`, `TIME vote TERM`, `TIME purged INDEX`.
fn say(what: std::fmt::Arguments<'_>) {
    let line = format!("{} {what}\n", now_ns());
    std::io::stdout().lock().write_all(line.as_bytes()).ok();
}

/// Not a test of its own: the process whose power is cut.
#[test]
#[ignore = "no test of its own: the power cut test in this file starts it"]
fn writing_process() {
    let Ok(dir) = std::env::var("ARES_POWER_CUT_DIR") else { return };
    let log = Log::open(Path::new(&dir), options()).expect("open");
    let mut term = log.reader().vote().map_or(1, |vote| vote.term);
    let mut next = log.reader().state().last.map_or(0, |id| id.index + 1);
    let (answer, answered) = channel();
    for round in 0u64.. {
        if round % 40 == 0 {
            term += 1;
            let (tell, told) = channel();
            let vote = Vote { term, node: 1, committed: true };
            log.save_vote(vote, Box::new(move |result| tell.send(result).expect("waits"))).expect("save");
            told.recv().expect("an answer").expect("save");
            say(format_args!("vote {term}"));
        }
        if round % 25 == 24 && next > LIVE_ENTRIES {
            let upto = log.reader().read(next - LIVE_ENTRIES..next, 1).expect("read").first().map(|entry| entry.id);
            let upto = upto.expect("a live entry");
            let done = move |result: Result<(), _>| {
                if result.is_ok() {
                    say(format_args!("purged {}", upto.index));
                }
            };
            log.purge(upto, Box::new(done)).expect("purge");
        }
        let end = next + 1 + round * round % 60;
        let records = (next..end).map(|index| record(index, term)).collect();
        let first = std::mem::replace(&mut next, end);
        if round >= IN_FLIGHT {
            answered.recv().expect("one is in flight");
        }
        let answer = answer.clone();
        let done = move |result: Result<(), _>| {
            if result.is_ok() {
                say(format_args!("entries {first} {end} {term}"));
            }
            answer.send(()).ok();
        };
        log.append(records, Box::new(done)).expect("append");
    }
}

/// An ext4 in a file.
struct Disk {
    base: tempfile::TempDir,
}

impl Disk {
    fn make() -> Option<Disk> {
        let made = leave_mount_namespace().and_then(|()| Disk::mounted());
        made.map_err(|why| {
            eprintln!("SKIPPED: power cuts were not tested, they need root, loop devices and mkfs.ext4: {why}");
        })
        .ok()
    }

    fn mounted() -> Result<Disk, String> {
        let disk = Disk { base: tempfile::tempdir().expect("a directory") };
        let image = std::fs::File::create(disk.image()).expect("create");
        image.set_len(96 << 20).expect("size");
        std::fs::create_dir(disk.mount_point()).expect("create");
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(disk.image()))?;
        disk.mount()?;
        Ok(disk)
    }

    fn image(&self) -> PathBuf {
        self.base.path().join("image")
    }

    fn mount_point(&self) -> PathBuf {
        self.base.path().join("mounted")
    }

    fn mount(&self) -> Result<(), String> {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(self.mount_point()))
    }

    fn unmount(&self) -> Result<(), String> {
        let mut tried = Ok(());
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(20));
            tried = run(Command::new("umount").arg(self.mount_point()));
            if tried.is_ok() {
                break;
            }
        }
        tried
    }

    /// Everything unsynced is gone from now on. Returns the time just before.
    fn cut_power(&self) -> u64 {
        /// `EXT4_IOC_SHUTDOWN`, and its flag that the journal is not flushed either.
        const SHUTDOWN: rustix::ioctl::Opcode = 0x8004_587d;
        const NO_LOG_FLUSH: u32 = 2;
        let root = std::fs::File::open(self.mount_point()).expect("open");
        let before = now_ns();
        // SAFETY: the request reads one u32.
        let done = unsafe { rustix::ioctl::ioctl(&root, rustix::ioctl::Setter::<SHUTDOWN, u32>::new(NO_LOG_FLUSH)) };
        done.expect("shut the file system down");
        before
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Not mounted, if it never was.
        run(Command::new("umount").arg("-l").arg(self.mount_point())).ok();
    }
}

/// What this thread and the processes that it starts mount from now on is seen by them alone and goes with the last of
/// them; a loop device goes with its mount.
fn leave_mount_namespace() -> Result<(), String> {
    // SAFETY: file descriptors stay shared.
    let left = unsafe { unshare_unsafe(UnshareFlags::NEWNS) };
    left.map_err(|error| format!("no mount namespace of its own: {error}"))?;
    run(Command::new("mount").args(["--make-rprivate", "/"]))
}

fn run(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

fn start_writing(disk: &Disk, planted: &str) -> (Child, Receiver<()>, Arc<Mutex<Vec<String>>>) {
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "writing_process", "--ignored", "--nocapture"])
        .env("ARES_POWER_CUT_DIR", disk.mount_point().join("log"))
        .env("ARES_PLANTED", planted)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("start");
    let lines = Arc::new(Mutex::new(Vec::new()));
    let (ended, end) = channel();
    let (stdout, to) = (child.stdout.take().expect("piped"), lines.clone());
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            to.lock().expect("lock").push(line);
        }
        drop(ended);
    });
    (child, end, lines)
}

/// What must be there after a cut.
#[derive(Default)]
struct Acked {
    /// Term of each entry.
    entries: BTreeMap<u64, u64>,
    term: u64,
    purged: Option<u64>,
}

impl Acked {
    /// Takes what was said before `cut`; what was said later is unknown.
    fn hear(&mut self, lines: &[String], cut: u64) -> usize {
        let mut heard = 0;
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            let number = |at: usize| words[at].parse::<u64>().expect("a number");
            match words.get(1).copied() {
                _ if words[0].parse::<u64>().is_ok_and(|time| time >= cut) => continue,
                Some("entries") => self.entries.extend((number(2)..number(3)).map(|index| (index, number(4)))),
                Some("vote") => self.term = self.term.max(number(2)),
                Some("purged") => self.purged = self.purged.max(Some(number(2))),
                _ => continue,
            }
            heard += 1;
        }
        heard
    }

    /// The first thing that is missing or wrong.
    fn missing_in(&self, log: &Log) -> Result<(), String> {
        let reader = log.reader();
        let state = reader.state();
        let term = reader.vote().map_or(0, |vote| vote.term);
        if term < self.term {
            return Err(format!("the vote for term {} is gone, {term} is there", self.term));
        }
        let purged = state.purged.map(|id| id.index);
        if purged < self.purged {
            return Err(format!("the purge up to {:?} is gone, {purged:?} is there", self.purged));
        }
        let found = reader.read(0..u64::MAX, usize::MAX).map_err(|error| error.to_string())?;
        for entry in &found {
            if *entry != record(entry.id.index, entry.id.term) {
                return Err(format!("entry {} is not what was written", entry.id.index));
            }
        }
        let found: BTreeMap<u64, u64> = found.iter().map(|entry| (entry.id.index, entry.id.term)).collect();
        let live = purged.map_or(0, |index| index + 1);
        match self.entries.range(live..).find(|(index, term)| found.get(index) != Some(term)) {
            Some((index, term)) => Err(format!("entry {index} of term {term} was acknowledged and is gone")),
            None => Ok(()),
        }
    }
}

/// One life of the process, with this planted bug, and its end. Counts what was acknowledged.
fn one_cut(disk: &Disk, acked: &mut Acked, planted: &str) -> Result<usize, String> {
    let (mut child, end, lines) = start_writing(disk, planted);
    let enough = (0..3000).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        lines.lock().expect("lock").len() >= ACKS_BEFORE_A_CUT
    });
    let cut = disk.cut_power();
    child.kill().expect("kill");
    child.wait().expect("wait");
    end.recv().ok();
    let heard = acked.hear(&lines.lock().expect("lock"), cut);
    assert!(enough && heard >= 100, "only {heard} acknowledgements before the cut");
    disk.unmount().and_then(|()| disk.mount()).expect("mounted again");
    let log = Log::open(&disk.mount_point().join("log"), options()).map_err(|error| error.to_string())?;
    acked.missing_in(&log)?;
    // What was not acknowledged may be there too; now that it was shown, it must stay.
    let shown = log.reader().read(0..u64::MAX, usize::MAX).expect("read");
    acked.entries.extend(shown.iter().map(|entry| (entry.id.index, entry.id.term)));
    Ok(heard)
}

fn cuts() -> usize {
    std::env::var("ARES_POWER_CUTS").map_or(5, |text| text.parse().expect("ARES_POWER_CUTS: a number"))
}

#[test]
fn power_cuts_lose_nothing_acknowledged() {
    let Some(disk) = Disk::make() else { return };
    let mut acked = Acked::default();
    let mut total = 0;
    for cut in 1..=cuts() {
        total += one_cut(&disk, &mut acked, "").unwrap_or_else(|what| panic!("cut {cut}: {what}"));
    }
    println!("{} power cuts, {total} acknowledgements, none lost", cuts());
}

#[cfg(feature = "planted")]
#[test]
fn without_the_fsync_the_same_cuts_find_a_loss() {
    let Some(disk) = Disk::make() else { return };
    let mut acked = Acked::default();
    let lost = (0..cuts()).find_map(|_| one_cut(&disk, &mut acked, "ack_without_fsync").err());
    println!("found: {}", lost.expect("a log that never syncs lost nothing: the test is blind"));
}
