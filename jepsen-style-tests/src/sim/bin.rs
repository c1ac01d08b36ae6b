//! `simulation [FIRST [COUNT [TRACE]]]`: runs seeds of the core tier; exit code 1 if an invariant was broken.

use std::process::ExitCode;

use jepsen_style_tests::sim;

fn main() -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    let seeds = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(1u64);
    let count = std::env::args().nth(2).and_then(|text| text.parse().ok()).unwrap_or(1u64);
    let loud = std::env::args().nth(3).is_some();
    for seed in seeds..seeds + count {
        let setup = sim::setup::Setup::of(seed, None);
        let faults = sim::faults_of(&setup, &[]);
        let began = std::time::Instant::now();
        let report = sim::run(&setup, &faults, loud);
        if report.failure.is_some() {
            code = ExitCode::FAILURE;
        }
        println!(
            "seed {seed}: {:016x} {:?} events {} sim {} s wall {:?} started {} entries {} offices {} took {:?}",
            report.hash,
            report.failure,
            report.events,
            report.simulated_ms / 1000,
            began.elapsed(),
            report.started,
            report.entries,
            report.offices,
            report.took
        );
        if loud {
            println!("{}", report.tail);
        }
    }
    code
}
