//! What a planning cycle costs at three sizes, and with which exponent it grows: `cargo bench -p scheduling --bench plan`. At the
//! end a verdict on each bar.
//!
//! Everything is CPU time of the thread, because others may want the cores, and allocates as `ares` does. A warm cache has planned for
//! another state of the same cluster before, one job different; cycles take turns on both. A new leader's has followed that state.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, clippy::print_stdout)]

#[path = "../tests/site/mod.rs"]
mod site;

use std::cell::{Cell, OnceCell};
use std::hint::black_box;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use rustix::time::{ClockId, clock_gettime};
use scheduling::choose::Want;
use scheduling::plan::{Cache, Limits, Plan, plan};
use scheduling::why;
use site::{Site, hgx, mock_v100, shape};
use statemachine::spec::Shape;
use statemachine::{JobId, State, Token};

#[global_allocator]
static ALLOCATOR: allocator::Allocator = allocator::Allocator;

/// Tenfold from one to the next.
const MACHINES: [usize; 3] = [100, 1_000, 10_000];
const GPUS: usize = 8;
const MINUTE: u64 = 60_000;

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let mut verdicts: Vec<String> = CASES.iter().filter_map(|case| of_case(&mut criterion, case)).collect();
    verdicts.extend(choosing(&mut criterion));
    criterion.final_summary();
    println!("CPU time, the best sample of each:");
    verdicts.iter().for_each(|verdict| println!("{verdict}"));
}

/// What a case is measured by, at its largest size.
enum Bar {
    Below(Duration),
    Placements { per_s: f64 },
}

const CYCLE: Bar = Bar::Below(Duration::from_millis(100));
const PLACEMENTS: Bar = Bar::Placements { per_s: 20_000.0 };

type Set = fn(usize) -> Case;

const CASES: &[(&str, Bar, Set)] = &[
    ("a full cluster of equal jobs", CYCLE, |machines| Case { reservations: 0, ..full(machines, &ONE) }),
    ("the same and a reservation", CYCLE, |machines| full(machines, &ONE)),
    ("the same, a new leader's first", CYCLE, |machines| Case { has: Cached::Followed, ..full(machines, &ONE) }),
    ("the same with an empty cache", CYCLE, |machines| Case { has: Cached::Nothing, ..full(machines, &ONE) }),
    ("a full cluster of many shapes", CYCLE, |machines| Case { reservations: 0, ..full(machines, &MANY) }),
    ("the same and a reservation, many shapes", CYCLE, |machines| full(machines, &MANY)),
    ("an empty cluster, jobs of many shapes", PLACEMENTS, |machines| empty(machines, &MANY)),
    ("an empty cluster, jobs of 1 GPU", PLACEMENTS, |machines| empty(machines, &ONE)),
    ("an empty cluster, gangs of 4 machines", PLACEMENTS, |machines| empty(machines, &GANGS)),
    ("a quiet cluster, one arrival", Bar::Below(Duration::from_millis(1)), quiet),
    ("why of the last that waits, many shapes", Bar::Below(Duration::from_secs(1)), |machines| Case {
        asks_why: true,
        ..full(machines, &MANY)
    }),
    ("why of the last that waits, equal jobs", Bar::Below(Duration::from_secs(1)), |machines| Case {
        asks_why: true,
        ..full(machines, &ONE)
    }),
];

/// Measures a case at each size; its verdict, unless it was filtered out.
fn of_case(criterion: &mut Criterion, (name, bar, set): &(&str, Bar, Set)) -> Option<String> {
    let mut costs: Vec<f64> = Vec::new();
    let mut placed = 0;
    for machines in MACHINES {
        let (case, best) = (OnceCell::new(), Cell::new(f64::INFINITY));
        criterion.bench_with_input(BenchmarkId::new(*name, machines), &machines, |bencher, machines| {
            let case = case.get_or_init(|| set(*machines));
            bencher.iter_custom(|rounds| {
                let took = case.run(rounds);
                best.set(best.get().min(took.as_secs_f64() / rounds as f64));
                took
            });
        });
        if let Some(case) = case.get() {
            placed = case.placed();
            costs.push(best.get());
        }
    }
    let cost = *costs.last()?;
    let exponents: Vec<String> = costs.windows(2).map(|pair| format!("{:.2}", (pair[1] / pair[0]).log10())).collect();
    let (measured, bar, is_met) = match bar {
        Bar::Below(bar) => (Duration::from_secs_f64(cost), format!("below {bar:?}"), cost < bar.as_secs_f64()),
        Bar::Placements { per_s } => {
            let bar = format!("{:.0} placements/s, at least {per_s:.0}", placed as f64 / cost);
            (Duration::from_secs_f64(cost), bar, placed as f64 / cost >= *per_s)
        }
    };
    let verdict = if is_met { "met" } else { "MISSED" };
    Some(format!("{name}: {measured:.1?}, bar: {bar}: {verdict}; exponents {}", exponents.join(", ")))
}

/// What a cycle's cache has.
enum Cached {
    Plans,
    Followed,
    Nothing,
}

/// Two states of one cluster.
struct Case {
    states: [State; 2],
    site: Site,
    has: Cached,
    reservations: u32,
    /// Of the last job, instead of a cycle.
    asks_why: bool,
    last: JobId,
}

impl Case {
    fn run(&self, rounds: u64) -> Duration {
        let mut cache = Cache::default();
        let mut took = Duration::ZERO;
        self.cycle(&mut cache, 1);
        for round in 0..rounds {
            match self.has {
                Cached::Plans => {}
                Cached::Followed => {
                    cache = Cache::default();
                    cache.follow(&self.states[(round as usize + 1) % 2]);
                }
                Cached::Nothing => cache = Cache::default(),
            }
            let began = cpu_time();
            if self.asks_why {
                let state = &self.states[round as usize % 2];
                black_box(why(state, &mut cache, state.front_task(self.last), &self.site.unheard));
            } else {
                black_box(self.cycle(&mut cache, round));
            }
            took += cpu_time() - began;
        }
        took
    }

    fn cycle(&self, cache: &mut Cache, round: u64) -> Plan {
        let limits = Limits { steps: u64::MAX, reservations: Some(self.reservations), ..Limits::of_leader() };
        plan(&self.states[round as usize % 2], cache, &limits, &self.site.unheard)
    }

    fn placed(&self) -> usize {
        self.cycle(&mut Cache::default(), 0).places.len()
    }
}

/// Of this thread, the only one that works here.
fn cpu_time() -> Duration {
    let used = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(used.tv_sec.unsigned_abs(), used.tv_nsec as u32)
}

fn machines(count: usize) -> Site {
    let mut site = Site::default();
    (0..count).for_each(|n| {
        site.join(&format!("n{n:05}"), hgx("h100"));
    });
    site
}

/// The shapes of the jobs that arrive, as many as the cluster has for each.
struct Mix {
    /// The shapes of a cluster of so many machines.
    shapes: fn(usize) -> Vec<Shape>,
    /// Jobs that fill a machine.
    on_each: usize,
}

const ONE: Mix = Mix { shapes: |_| vec![shape(1, 1, 1)], on_each: GPUS };
const GANGS: Mix = Mix { shapes: |_| vec![shape(4, 8, 1)], on_each: 1 };
/// A thousand for the largest cluster, of 1 to 8 GPUs.
const MANY: Mix = Mix { shapes: many_shapes, on_each: 2 };

fn many_shapes(machines: usize) -> Vec<Shape> {
    let of = |n: usize| Shape { mem_mib_per_rank: 1_000 + n as u64, ..shape(1, 1, 1 + (n % 8) as u16) };
    (0..machines / 10).map(of).collect()
}

/// Submits so many jobs, the shapes in turn, with limits of `limits` minutes on; the last one.
fn submit(site: &mut Site, shapes: &[Shape], count: usize, limits: std::ops::Range<u64>) -> JobId {
    let each = (0..count).zip(shapes.iter().cycle()).map(|(n, shape)| {
        let minutes = limits.start + n as u64 % (limits.end - limits.start);
        site.submit_limited("default", shape.clone(), 0, &[], minutes * MINUTE)
    });
    each.last().unwrap_or_default()
}

/// Starts all that fits.
fn start(site: &mut Site) -> Vec<Token> {
    let mut cache = Cache::default();
    let mut tokens = Vec::new();
    loop {
        let limits = Limits { reservations: Some(0), ..Limits::default() };
        let plan = plan(&site.state, &mut cache, &limits, &site.unheard);
        if plan.places.is_empty() {
            return tokens;
        }
        tokens.extend(site.grant(&plan));
    }
}

/// No GPU of use is free; a gang stands in front of ten jobs a machine of many shapes and of seven time limits.
fn full(count: usize, runs: &Mix) -> Case {
    let mut site = machines(count);
    submit(&mut site, &(runs.shapes)(count), runs.on_each * count, 60..660);
    let tokens = start(&mut site);
    // Those that are left over would only start earlier than others.
    let left: Vec<JobId> = site.state.index.queue.keys().map(|key| key.task.job).collect();
    left.into_iter().for_each(|job| site.cancel(job));
    site.submit_limited("default", shape(4, 8, 1), 1, &[], 60 * MINUTE);
    let last = submit(&mut site, &many_shapes(count), 10 * count, 30..37);
    start(&mut site);
    let before = site.state.clone();
    site.finish(tokens[count]);
    Case { states: [before, site.state.clone()], site, has: Cached::Plans, reservations: 1, asks_why: false, last }
}

/// Twice as many jobs as fit.
fn empty(count: usize, arrives: &Mix) -> Case {
    let mut site = machines(count);
    let shapes = (arrives.shapes)(count);
    let last = submit(&mut site, &shapes, 2 * arrives.on_each * count / usize::from(shapes[0].nodes), 60..61);
    let before = site.state.clone();
    site.submit_limited("default", shapes[0].clone(), 0, &[], 60 * MINUTE);
    Case { states: [before, site.state.clone()], site, has: Cached::Plans, reservations: 1, asks_why: false, last }
}

/// Half of the GPUs are taken, and one job waits.
fn quiet(count: usize) -> Case {
    let mut site = machines(count);
    submit(&mut site, &[shape(1, 1, 1)], count * GPUS / 2, 600..601);
    start(&mut site);
    site.submit_limited("default", shape(1, 2, 1), 0, &[], 60 * MINUTE);
    let before = site.state.clone();
    start(&mut site);
    let last = site.submit_limited("default", shape(1, 4, 1), 0, &[], 60 * MINUTE);
    Case { states: [before, site.state.clone()], site, has: Cached::Plans, reservations: 1, asks_why: false, last }
}

/// The GPUs of a job in a machine, for each set of free ones and each size.
fn choosing(criterion: &mut Criterion) -> Vec<String> {
    let mut verdicts = Vec::new();
    for (name, machine) in [("8 GPUs behind a switch", hgx("h100")), ("4 GPUs in pairs", mock_v100())] {
        let mut site = Site::default();
        let gpus = u32::from(machine.class.gpus);
        let node = site.join("n", machine);
        let class = site.state.nodes.get(&node).expect("it joined").value.class;
        let mut cache = Cache::default();
        let mut best = f64::INFINITY;
        criterion.bench_function(&format!("choices among {name}, each"), |bencher| {
            bencher.iter_custom(|rounds| {
                let began = cpu_time();
                for round in 0..rounds {
                    let (free, gpus) = (round % (1 << gpus), 1 + (round / 7) as u32 % gpus);
                    let want = Want { gpus, several_nodes: false, min_mbps: 0 };
                    let _ = black_box(cache.choose(&site.state, class, u128::from(free), want));
                }
                let took = cpu_time() - began;
                best = best.min(took.as_secs_f64() / rounds as f64);
                took
            });
        });
        if best.is_finite() {
            let verdict = if best < 1e-6 { "met" } else { "MISSED" };
            verdicts.push(format!("choices among {name}, each: {:.0} ns, bar: below 1 us: {verdict}", best * 1e9));
        }
    }
    verdicts
}
