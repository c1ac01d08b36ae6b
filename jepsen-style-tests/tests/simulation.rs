//! The simulation itself: it is deterministic, it is what it says, and what it once found stays found.

use std::path::Path;
use std::process::Command;

use jepsen_style_tests::shrink;
use jepsen_style_tests::sim;
use jepsen_style_tests::sim::setup::Setup;
use jepsen_style_tests::sim::shrink::Corpus;

const SEEDS: [u64; 2] = [1, 17];

fn hash_of(seed: u64) -> u64 {
    let setup = Setup::of(seed, None);
    sim::run(&setup, &sim::faults_of(&setup, &[]), false).hash
}

#[test]
fn a_seed_is_the_same_run_twice_in_one_process_and_in_another() {
    let seed = SEEDS[0];
    let hash = hash_of(seed);
    assert_eq!(hash_of(seed), hash, "seed {seed} in the same process");
    let trace = |program: &str| {
        let output = Command::new(program).args(["sim", "--seed", &seed.to_string()]).output().expect("it starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stdout).expect("text").lines().last().unwrap_or_default().to_owned()
    };
    let (one, two) = (trace(env!("CARGO_BIN_EXE_faults")), trace(env!("CARGO_BIN_EXE_faults")));
    assert_eq!(one, two, "seed {seed} in two processes");
    let mut own = [0; 16];
    own[..8].copy_from_slice(&seed.to_le_bytes());
    own[8..].copy_from_slice(&hash.to_le_bytes());
    assert_eq!(one, format!("hash {:016x}", xxhash_rust::xxh3::xxh3_64(&own)), "seed {seed} here and there");
}

#[test]
fn another_seed_is_another_run() {
    assert_ne!(hash_of(SEEDS[0]), hash_of(SEEDS[1]));
}

#[test]
fn what_was_found_once_is_not_found_again() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (path, corpus) in shrink::kept::<Corpus>(&dir).expect("what was kept") {
        let report = corpus.run(false);
        assert_eq!(report.failure, None, "{}\n{}", path.display(), report.tail);
    }
}
