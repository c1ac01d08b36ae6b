//! What a planning cycle costs at three sizes, and with which exponent it grows: `cargo bench -p scheduling --bench plan`.
//!
//! A warm cache has seen another state of the same cluster before, one job different; cycles take turns on both.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, clippy::print_stdout)]

#[path = "../tests/site/mod.rs"]
mod site;

use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use scheduling::choose::Want;
use scheduling::plan::{Cache, Limits, Plan, plan};
use site::{Site, hgx, mock_v100, shape};
use statemachine::State;
use statemachine::spec::Shape;

const MACHINES: [usize; 3] = [100, 1_000, 10_000];
const GPUS: usize = 8;
const MINUTE: u64 = 60_000;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for (name, set) in CASES {
        let mut costs = Vec::new();
        for machines in MACHINES {
            let case = set(machines);
            let best = Cell::new(Duration::MAX);
            criterion.bench_with_input(BenchmarkId::new(*name, machines), &case, |bencher, case| {
                bencher.iter_custom(|rounds| {
                    let took = case.run(rounds);
                    best.set(best.get().min(took / u32::try_from(rounds).unwrap_or(u32::MAX)));
                    took
                });
            });
            if best.get() < Duration::MAX {
                let per_s = case.placed() as f64 / best.get().as_secs_f64();
                println!("{name} on {machines} machines: {:?}, {per_s:.0} placements/s", best.get());
                costs.push(best.get().as_secs_f64());
            }
        }
        for (pair, machines) in costs.windows(2).zip(&MACHINES[1..]) {
            println!("{name} up to {machines} machines: cost grows with exponent {:.2}", (pair[1] / pair[0]).log10());
        }
    }
    choosing(&mut criterion);
    criterion.final_summary();
}

type Set = fn(usize) -> Case;

const CASES: &[(&str, Set)] = &[
    ("full cluster, 10 jobs a machine of a tenth as many shapes wait", |machines| full(machines, true)),
    ("the same with an empty cache", |machines| Case { is_warm: false, ..full(machines, false) }),
    ("empty cluster, jobs of 1 GPU", |machines| empty(machines, shape(1, 1, 1), GPUS)),
    ("empty cluster, gangs of 4 machines", |machines| empty(machines, shape(4, 8, 1), 1)),
    ("quiet cluster, one arrival", quiet),
];

/// Two states of one cluster.
struct Case {
    states: [State; 2],
    site: Site,
    is_warm: bool,
}

impl Case {
    fn run(&self, rounds: u64) -> Duration {
        let mut cache = Cache::default();
        let mut took = Duration::ZERO;
        self.cycle(&mut cache, 1);
        for round in 0..rounds {
            if !self.is_warm {
                cache = Cache::default();
            }
            let began = Instant::now();
            let plan = self.cycle(&mut cache, round);
            took += began.elapsed();
            black_box(plan);
        }
        took
    }

    fn cycle(&self, cache: &mut Cache, round: u64) -> Plan {
        let limits = Limits { steps: u64::MAX, ..Limits::default() };
        plan(&self.states[round as usize % 2], cache, &limits, &self.site.unheard)
    }

    fn placed(&self) -> usize {
        self.cycle(&mut Cache::default(), 0).places.len()
    }
}

fn machines(count: usize) -> Site {
    let mut site = Site::default();
    (0..count).for_each(|n| {
        site.join(&format!("n{n:05}"), hgx("h100"));
    });
    site
}

/// Starts all that fits.
fn start(site: &mut Site) -> Vec<statemachine::Token> {
    let mut cache = Cache::default();
    let mut tokens = Vec::new();
    loop {
        let plan = plan(&site.state, &mut cache, &Limits::default(), &site.unheard);
        if plan.places.is_empty() {
            return tokens;
        }
        tokens.extend(site.grant(&plan));
    }
}

/// Every GPU is taken; a gang stands in front of jobs of many shapes and users' limits.
fn full(count: usize, reserves: bool) -> Case {
    let mut site = machines(count);
    for n in 0..count * GPUS {
        site.submit_limited("default", shape(1, 1, 1), 0, &[], (60 + n as u64 % 600) * MINUTE);
    }
    let tokens = start(&mut site);
    assert_eq!(tokens.len(), count * GPUS);
    if reserves {
        site.submit_limited("default", shape(4, 8, 1), 1, &[], 60 * MINUTE);
    }
    let shapes = count / 10;
    for n in 0..10 * count {
        let shape = Shape { mem_mib_per_rank: 1_000 + (n % shapes) as u64, ..shape(1, 1, 1 + (n % shapes % 8) as u16) };
        site.submit_limited("default", shape, 0, &[], (30 + n as u64 % 7) * MINUTE);
    }
    let before = site.state.clone();
    site.finish(tokens[count]);
    Case { states: [before, site.state.clone()], site, is_warm: true }
}

/// As many jobs as fit, a number on each machine.
fn empty(count: usize, shape: Shape, on_each: usize) -> Case {
    let mut site = machines(count);
    for _ in 0..count * on_each / usize::from(shape.nodes) {
        site.submit_limited("default", shape.clone(), 0, &[], 60 * MINUTE);
    }
    let before = site.state.clone();
    site.submit_limited("default", shape, 0, &[], 60 * MINUTE);
    Case { states: [before, site.state.clone()], site, is_warm: true }
}

/// Half of the GPUs are taken, and one job waits.
fn quiet(count: usize) -> Case {
    let mut site = machines(count);
    for _ in 0..count * GPUS / 2 {
        site.submit_limited("default", shape(1, 1, 1), 0, &[], 600 * MINUTE);
    }
    start(&mut site);
    site.submit_limited("default", shape(1, 2, 1), 0, &[], 60 * MINUTE);
    let before = site.state.clone();
    start(&mut site);
    site.submit_limited("default", shape(1, 4, 1), 0, &[], 60 * MINUTE);
    Case { states: [before, site.state.clone()], site, is_warm: true }
}

/// The GPUs of a job in a machine, for each set of free ones and each size.
fn choosing(criterion: &mut Criterion) {
    for (name, machine) in [("8 GPUs behind a switch", hgx("h100")), ("4 GPUs in pairs", mock_v100())] {
        let mut site = Site::default();
        let gpus = u32::from(machine.class.gpus);
        let node = site.join("n", machine);
        let class = site.state.nodes.get(&node).expect("it joined").value.class;
        let mut cache = Cache::default();
        criterion.bench_function(&format!("all choices among {name}, each"), |bencher| {
            bencher.iter_custom(|rounds| {
                let began = Instant::now();
                for round in 0..rounds {
                    let (free, gpus) = (round % (1 << gpus), 1 + (round / 7) as u32 % gpus);
                    let want = Want { gpus, several_nodes: false, min_mbps: 0 };
                    let _ = black_box(cache.choose(&site.state, class, u128::from(free), want));
                }
                began.elapsed()
            });
        });
    }
}
