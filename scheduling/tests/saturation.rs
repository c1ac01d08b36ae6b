//! The published filling experiment, on the real lists: how much of the cluster each named score fills. Needs the traces
//! in $ARES_TEST_DATA/traces and gzip; without them it says so and passes.

mod traces;

use scheduling::score::Score;
use scheduling::simulate::saturation::saturate;
use scheduling::simulate::trace::{Trace, read, read_untimed};
use scheduling::world::{Free, Machine, Request, Slot};
use traces::unpacked;

fn list(name: &str) -> Option<Trace> {
    let found = unpacked(&format!("openb-{name}.jobs.csv.gz")).zip(unpacked("openb.nodes.csv.gz"));
    if found.is_none() {
        eprintln!("SKIPPED: the trace openb-{name} is not in $ARES_TEST_DATA/traces");
    }
    let (jobs, nodes) = found?;
    Some(read_untimed(("jobs", &jobs), ("nodes", &nodes)).expect("a well-formed trace"))
}

/// Median of the allocated percent at 130 % arrived over that many seeds, in hundredths.
fn median(trace: &Trace, score: Score, seeds: u64, shuffled: bool) -> u32 {
    let last = |seed| saturate(trace, score, 130, seed, shuffled).alloc.last().map_or(0, |(_, alloc)| *alloc);
    let mut all: Vec<u32> = (0..seeds).map(last).collect();
    all.sort_unstable();
    (all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2
}

/// One seed each, so that a debug build stays short: one seed lies within half a point of the published median.
#[test]
fn one_seed_fills_as_published() {
    let Some(trace) = list("default") else { return };
    for (score, published) in [(Score::Random, 8_739), (Score::BestFit, 9_311), (Score::Fgd, 9_540)] {
        let ours = median(&trace, score, 1, true);
        assert!(ours.abs_diff(published) <= 75, "{score:?}: {ours} hundredths, published {published}");
    }
}

/// The default policy's score fills more than the published FGD, here by one seed on the smallest list of shares.
#[test]
fn the_default_score_fills_more_than_fgd() {
    let Some(trace) = list("gpushare40") else { return };
    let (fgd, ours) = (median(&trace, Score::Fgd, 1, true), median(&trace, Score::LeastLoss, 1, true));
    assert!(ours >= fgd + 15 && ours >= 9_414, "{ours} hundredths, fgd {fgd}");
}

#[test]
fn what_is_taken_comes_back() {
    let machine = Machine { gpus: 2, gpu_type: 0, cpus: 8_000, mem_mib: 1_024 };
    let share = |milli| Request { gpus: 1, milli, cpus: 1_000, mem_mib: 1, types: 0 };
    let mut free = Free::of(&machine);
    let first = free.take(&share(300), Slot::Fresh);
    assert_eq!((free.whole, free.milli(), first), (1, 1_700, Some(0)));
    // The rest of the shared GPU comes before a whole one, and a share that is too large for it does not fit there.
    assert_eq!(free.slots(&share(700)), [Slot::Shared(0), Slot::Fresh]);
    assert_eq!(free.slots(&share(701)), [Slot::Fresh]);
    assert!(!free.fits(&Request { gpus: 2, milli: 1_000, cpus: 0, mem_mib: 0, types: 0 }));
    let second = free.take(&share(700), Slot::Shared(0));
    free.give(&share(300), first);
    free.give(&share(700), second);
    assert_eq!(free, Free::of(&machine));
}

#[test]
fn errors_name_file_line_and_column() {
    let nodes = "name,gpus,gpu_type,cpus,mem_mib\nn,4,a,,\n";
    let head = "id,submit_s,duration_s,gpus,gpu_milli,cpus";
    let error = |jobs: &str| read(("j.csv", &format!("{head}\n{jobs}")), ("n.csv", nodes)).unwrap_err().to_string();
    assert!(error("1,0,5,1,1000,2\n2,0,5,x,1000,2\n").starts_with("j.csv, line 3, column gpus: \"x\""));
    assert!(error("1,0,5,1,1001,2\n").starts_with("j.csv, line 2, column gpu_milli: 1001"));
    assert!(error("1,0,5,1,1000,-2\n").starts_with("j.csv, line 2, column cpus"));
    let headless = read(("j.csv", "id,gpus\n"), ("n.csv", nodes)).unwrap_err().to_string();
    assert!(headless.starts_with("j.csv, line 1, column submit_s"), "{headless}");
}
