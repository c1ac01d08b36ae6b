//! How long half a million jobs take through the queue: `cargo run --release -p scheduling --example speed`.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, clippy::print_stdout)]

use std::fmt::Write;
use std::time::Instant;

use scheduling::simulate::dice::Dice;
use scheduling::simulate::policy::Policy;
use scheduling::simulate::trace::{Trace, read};
use scheduling::simulate::{Options, run};

const JOBS: usize = 500_000;

/// More demand than 1,250 machines of 8 GPUs have: 1 to 64 GPUs, heavy-tailed run times, limits of 1 to 10 times those.
fn overloaded() -> Trace {
    let mut dice = Dice::new(1);
    let mut submit_s = 0;
    let mut jobs = String::from("id,submit_s,duration_s,gpus,tenant,requested_s\n");
    for id in 0..JOBS {
        submit_s += [0, 0, 1, 1, 2][dice.below(5)];
        let gpus = [1, 1, 1, 1, 1, 2, 4, 8, 8, 64][dice.below(10)];
        // Each half as often as the one before it is twice as long.
        let doublings = (0..9).take_while(|_| dice.below(2) == 0).count();
        let duration_s = (200 + dice.below(200)) << doublings;
        let requested_s = 60 + duration_s * [2, 3, 6, 20][dice.below(4)] / 2;
        let _ = writeln!(jobs, "{id},{submit_s},{duration_s},{gpus},u{},{requested_s}", dice.below(300));
    }
    let nodes: String = (0..1_250).map(|node| format!("n{node},8\n")).collect();
    read(("jobs", &jobs), ("nodes", &format!("name,gpus\n{nodes}"))).expect("a well-formed trace")
}

fn main() {
    let trace = overloaded();
    let began = Instant::now();
    let figures = run(&trace, &Policy::by_name("easy").expect("a policy"), Options::default()).figures(&trace);
    println!("{:.1} s; {figures:?}", began.elapsed().as_secs_f64());
    assert_eq!(figures.jobs as usize, JOBS, "all of them end");
    assert!(figures.wait_mean > 100_000, "the cluster was not full: {figures:?}");
}
