//! kill -9 of a process that writes cuts: every start afterwards finds a whole cut, and none older than the last one
//! that was reported as written.

mod random_state;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use random_state::Random;
use statemachine::State;
use statemachine::record::LogPosition;
use statemachine::storage::{self, LogBounds, Source};

const DIR: &str = "ARES_TEST_KILL_DIR";
const SEED: u64 = 31;

fn whole_log() -> LogBounds {
    LogBounds { purged: None, last: Some(LogPosition { term: 9, leader: 0, index: u64::MAX }) }
}

/// Not a test by itself: the process that is killed. Goes on from what it finds, a cut for every few entries.
#[test]
fn child_writes_cuts() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let recovered = storage::open(Path::new(&dir), whole_log()).expect("recoverable");
    let image = recovered.image;
    let (mut state, mut random) = replay(recovered.state);
    loop {
        for _ in 0..1 + state.meta.applied.index % 5 {
            random_state::entry(&mut state, &mut random);
        }
        let persisted = image.write(state.cut()).expect("a working disk");
        state.forget_archived(&persisted);
        println!("written {}", persisted.applied.index);
        std::io::stdout().flush().expect("the parent listens");
    }
}

/// The random numbers of a seed go with its states: what was recovered must be one of them, bit for bit.
fn replay(mut recovered: State) -> (State, Random) {
    let (mut state, mut random) = (State::default(), Random(SEED));
    while state.meta.applied.index < recovered.meta.applied.index {
        random_state::entry(&mut state, &mut random);
    }
    assert_eq!(recovered.digest(), state.digest(), "not a whole cut, at entry {}", state.meta.applied.index);
    (recovered, random)
}

#[test]
fn after_kill_nine_a_whole_cut_is_found_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let mut waits = Random(7);
    let mut last = 0;
    for round in 0..15 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_writes_cuts", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("this test again");
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut written = last;
        let mut next =
            || lines.by_ref().map_while(Result::ok).find_map(|line| line.strip_prefix("written ")?.parse::<u64>().ok());
        // At least one cut a round, then death at any moment.
        written = next().expect("the child writes a cut").max(written);
        std::thread::sleep(Duration::from_millis(waits.below(150)));
        child.kill().unwrap();
        child.wait().unwrap();
        while let Some(index) = next() {
            written = written.max(index);
        }
        let recovered = storage::open(dir.path(), whole_log()).expect("recoverable");
        assert_eq!(recovered.source, Source::Image, "round {round}");
        let found = recovered.state.meta.applied.index;
        assert!(found >= written, "round {round}: cut {written} was reported, {found} found");
        replay(recovered.state);
        last = found;
    }
}
