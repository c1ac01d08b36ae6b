//! Gangs on 1,250 machines in racks, planned and applied as in a cluster, under virtual time: best fit that knows no racks,
//! domains as a preference, gangs that require their rack, and the same where it does not cost most. First with run times that are the
//! same wherever a gang is, then with parts of them spent in collectives, which take as long as the bandwidth lets them.
//! `cargo run --release -p scheduling --example racks [SEED..]`.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, clippy::print_stdout)]

#[path = "../tests/site/mod.rs"]
mod site;

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Instant;

use scheduling::BandwidthTable;
use scheduling::plan::{Cache, Limits, plan};
use scheduling::simulate::dice::Dice;
use site::{Site, hgx, shape};
use statemachine::command::{Place, Preempt, SetPriority};
use statemachine::domain::{Level, Topology};
use statemachine::spec::Shape;
use statemachine::{Command, JobId, Outcome, Token};

const MACHINES: usize = 1_250;
const GPUS: usize = 8;
const RACK: usize = 10;
const BLOCK: usize = 50;
const JOBS: usize = 5_400;
/// Percent of the machine that is asked for while jobs arrive.
const LOAD: u64 = 95;
const MINUTE: u64 = 60_000;
/// What happens within it is planned at once.
const TICK: u64 = MINUTE;
/// Of each GPU, in MB/s: a NIC of 400 Gbit/s at what collectives reach. Racks have half of theirs upwards, blocks a quarter.
const NIC_MBPS: u64 = 48_000;
/// So many times less than the best is the least bandwidth.
const SLOWEST: u64 = 4;

/// Machines and GPUs on each, by how often of 100.
const SIZES: [(usize, u16, u16); 14] = [
    (14, 1, 1),
    (10, 1, 2),
    (14, 1, 4),
    (20, 1, 8),
    (9, 2, 8),
    (4, 2, 4),
    (4, 3, 8),
    (11, 4, 8),
    (3, 6, 8),
    (5, 8, 8),
    (2, 10, 8),
    (2, 16, 8),
    (1, 32, 8),
    (1, 64, 8),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    BestFit,
    Domains,
    Required,
    /// Not where it costs most: by a gang that needs a whole rack, or an urgent one of half a rack, which would end others for it.
    Sparingly,
}

/// The most of a gang's run that is spent in collectives, where each rank waits for all, in percent where the bandwidth is best: each
/// tenth up to it as often as any other.
const COLLECTIVES: [u64; 3] = [0, 20, 40];

struct Ask {
    at_ms: u64,
    nodes: u16,
    gpus: u16,
    /// Where the bandwidth is best; so many percent of it in collectives.
    runs_ms: u64,
    collectives: u64,
    /// Nobody passes it, wherever he is.
    limit_ms: u64,
    class: &'static str,
}

fn draw(seed: u64, most: u64) -> Vec<Ask> {
    let (mut dice, mut more) = (Dice::new(seed), Dice::new(seed ^ u64::MAX));
    let mut asks = Vec::new();
    for _ in 0..JOBS {
        let mut at = dice.below(100);
        let size = SIZES.iter().find(|(weight, ..)| {
            let hit = at < *weight;
            at = at.saturating_sub(*weight);
            hit
        });
        let (_, nodes, gpus) = *size.expect("the weights add up to 100");
        // 10 min to 21 h, each octave as often as any other.
        let runs_ms = ((10 + dice.below(10)) << dice.below(7)) as u64 * MINUTE;
        let collectives = if nodes > 1 { 10 * more.below(most as usize / 10 + 1) as u64 } else { 0 };
        let longest_ms = runs_ms * (100 + collectives * (SLOWEST - 1)) / 100;
        let limit_ms = longest_ms * [2, 3, 4, 8][dice.below(4)] / 2;
        let class = ["low", "low", "low", "low", "low", "low", "", "", "", "urgent"][dice.below(10)];
        asks.push(Ask { at_ms: 0, nodes, gpus, runs_ms, collectives, limit_ms, class });
    }
    let gpu_ms: u64 = asks.iter().map(|ask| u64::from(ask.nodes) * u64::from(ask.gpus) * ask.runs_ms).sum();
    let span_ms = gpu_ms * 100 / (MACHINES * GPUS) as u64 / LOAD;
    let mut times: Vec<u64> = (0..JOBS).map(|_| dice.below(span_ms as usize) as u64).collect();
    times.sort_unstable();
    asks.iter_mut().zip(times).for_each(|(ask, at_ms)| ask.at_ms = at_ms);
    asks
}

#[derive(Default)]
struct Figures {
    /// Starts of gangs that a rack could hold, and those of them in one.
    fit: u64,
    whole: u64,
    /// Sums over the starts of gangs.
    mbps: u64,
    best_mbps: u64,
    /// GPU-ms while jobs arrive: taken, idle though those who wait would take them were they together, and lost to preemption.
    used: u64,
    idle: u64,
    lost: u64,
    preempted: u64,
    waits_ms: Vec<u64>,
}

struct Play {
    site: Site,
    cache: Cache,
    asks: Vec<Ask>,
    /// By their ids, which begin with 1.
    jobs: Vec<JobId>,
    ends: BinaryHeap<Reverse<(u64, Token)>>,
    started: BTreeSet<JobId>,
    now_ms: u64,
    last_ask_ms: u64,
    figures: Figures,
}

impl Play {
    fn new(how: How, mut asks: Vec<Ask>) -> (Self, Vec<Shape>) {
        let mut site = Site::default();
        for n in 0..MACHINES {
            let (block, rack) = (format!("b{:02}", n / BLOCK), format!("r{:03}", n / RACK));
            let labels = [("block", block.as_str()), ("rack", rack.as_str())];
            site.join_with(&format!("n{n:04}"), hgx("h100"), if how == How::BestFit { &[] } else { &labels });
        }
        for (name, value, preempts) in [("low", 0, false), ("urgent", 100, true)] {
            let (name, tenants) = (name.to_owned(), Vec::new());
            let set = SetPriority { name, create: true, value, tenants, preempts, preemptible: !preempts };
            assert!(matches!(site.command(Command::SetPriority(set)), Outcome::Done(_)));
        }
        asks.sort_by_key(|ask| ask.at_ms);
        let in_a_rack = Topology { level: Level::Rack, required: true };
        let requires = |ask: &Ask| match how {
            How::BestFit | How::Domains => false,
            How::Required => true,
            How::Sparingly => usize::from(ask.nodes) < if ask.class == "urgent" { RACK / 2 } else { RACK },
        };
        let topology = |ask: &Ask| (requires(ask) && usize::from(ask.nodes) <= RACK).then_some(in_a_rack);
        let shapes =
            asks.iter().map(|ask| Shape { topology: topology(ask), ..shape(ask.nodes, 1, ask.gpus) }).collect();
        let (now_ms, last_ask_ms) = (site.state.meta.clock_ms, asks.last().map_or(0, |ask| ask.at_ms));
        let play = Self {
            site,
            cache: Cache::default(),
            asks,
            jobs: Vec::new(),
            ends: BinaryHeap::new(),
            started: BTreeSet::new(),
            now_ms,
            last_ask_ms,
            figures: Figures::default(),
        };
        (play, shapes)
    }

    fn run(mut self, shapes: &[Shape]) -> Figures {
        loop {
            let end = self.ends.peek().map(|Reverse((at, _))| *at);
            let ask = self.asks.get(self.jobs.len()).map(|ask| ask.at_ms);
            let Some(next) = end.into_iter().chain(ask).min() else { break };
            self.pass(next.next_multiple_of(TICK));
            while let Some(Reverse((_, token))) =
                self.ends.peek().copied().filter(|Reverse((at, _))| *at <= self.now_ms)
            {
                self.ends.pop();
                if self.site.state.leases.get(&token).is_some_and(|lease| lease.value.verdict.is_none()) {
                    self.site.finish(token);
                }
            }
            while let Some(ask) = self.asks.get(self.jobs.len()).filter(|ask| ask.at_ms <= self.now_ms) {
                let shape = shapes[self.jobs.len()].clone();
                self.jobs.push(self.site.submit_of_limited(ask.class, shape, ask.limit_ms));
            }
            self.cycles();
        }
        assert_eq!(self.started.len(), JOBS, "all of them ran");
        self.site.state.check().expect("all invariants hold");
        self.figures
    }

    /// To this time, in which nothing changes.
    fn pass(&mut self, to_ms: u64) {
        let (state, figures) = (&self.site.state, &mut self.figures);
        let ms = to_ms.min(self.last_ask_ms).saturating_sub(self.now_ms);
        let idle: u64 = state.allocs.iter().map(|(_, alloc)| u64::from(alloc.free_gpus.count_ones())).sum();
        let asks = |job: &JobId| {
            let shape = &state.jobs.get(job).expect("a job that waits").value.spec.shape;
            u64::from(shape.nodes) * u64::from(shape.gpus_per_node())
        };
        // Those who wait, in their order, on idle GPUs as if these were together.
        let waiting = state.index.queue.keys().map(|key| asks(&key.task.job));
        let left = waiting.fold(idle, |left, ask| left.checked_sub(ask).unwrap_or(left));
        figures.used += ((MACHINES * GPUS) as u64 - idle) * ms;
        figures.idle += (idle - left) * ms;
        self.now_ms = to_ms.max(self.now_ms);
        self.site.state.meta.clock_ms = self.site.state.meta.clock_ms.max(self.now_ms);
    }

    fn cycles(&mut self) {
        loop {
            let plan = plan(&self.site.state, &mut self.cache, &Limits::default(), &self.site.unheard);
            let tokens = self.site.grant(&plan);
            for (token, place) in tokens.into_iter().zip(&plan.places) {
                self.start(token, place);
            }
            plan.preempts.iter().for_each(|made| self.preempt(made));
            if plan.preempts.is_empty() {
                return;
            }
        }
    }

    fn start(&mut self, token: Token, place: &Place) {
        let job = place.task.job;
        let ask = &self.asks[self.jobs.binary_search(&job).expect("a job of the trace")];
        self.site.started(token);
        if self.started.insert(job) {
            self.figures.waits_ms.push(self.now_ms - ask.at_ms);
        }
        let slower = if ask.nodes > 1 { self.figures.count_gang(ask, place) } else { 100 };
        let runs_ms = ask.runs_ms * (100 - ask.collectives) / 100 + ask.runs_ms * ask.collectives * slower / 10_000;
        self.ends.push(Reverse((self.now_ms + runs_ms, token)));
    }

    /// The victims end at once.
    fn preempt(&mut self, made: &Preempt) {
        let leases = made.victims.iter().filter_map(|token| self.site.state.leases.get(token));
        let lost: u64 = leases.map(|lease| self.site.state.loss(&lease.value).gpu_ms).sum();
        if matches!(self.site.command(Command::Preempt(made.clone())), Outcome::Done(_)) {
            self.figures.lost += lost;
            self.figures.preempted += made.victims.len() as u64;
            made.victims.iter().for_each(|token| self.site.drain(*token));
        }
    }
}

impl Figures {
    /// How long its collectives take, in percent of the shortest time.
    fn count_gang(&mut self, ask: &Ask, place: &Place) -> u64 {
        let crossed = |size: usize| {
            let domains = place.parts.iter().map(|part| (part.node.0 as usize - 1) / size);
            domains.collect::<BTreeSet<_>>().len() > 1
        };
        if usize::from(ask.nodes) <= RACK {
            self.fit += 1;
            self.whole += u64::from(!crossed(RACK));
        }
        let mask = place.parts[0].gpu_order.iter().fold(0u128, |mask, slot| mask | 1 << slot);
        let inside = u64::from(BandwidthTable::new(&hgx("h100").class).mbps(mask));
        let network = |over_racks: bool, over_blocks: bool| {
            let part = if over_blocks { SLOWEST } else { 1 + u64::from(over_racks) };
            inside.min(u64::from(ask.gpus) * NIC_MBPS / part)
        };
        let mbps = network(crossed(RACK), crossed(BLOCK));
        let best_mbps = network(usize::from(ask.nodes) > RACK, usize::from(ask.nodes) > BLOCK);
        self.mbps += mbps;
        self.best_mbps += best_mbps;
        100 * best_mbps / mbps
    }

    fn add(&mut self, more: Figures) {
        self.fit += more.fit;
        self.whole += more.whole;
        self.mbps += more.mbps;
        self.best_mbps += more.best_mbps;
        self.used += more.used;
        self.idle += more.idle;
        self.lost += more.lost;
        self.preempted += more.preempted;
        self.waits_ms.extend(more.waits_ms);
    }
}

fn main() {
    let seeds: Vec<u64> = std::env::args().skip(1).map(|seed| seed.parse().expect("a number")).collect();
    let seeds = if seeds.is_empty() { vec![1] } else { seeds };
    println!("a seed: {JOBS} jobs on {MACHINES} machines of {GPUS} GPUs, {RACK} a rack, {BLOCK} a block");
    for most in COLLECTIVES {
        println!("collectives take up to {most} % of a gang's run");
        for (name, how) in [
            ("best fit", How::BestFit),
            ("domains", How::Domains),
            ("rack:require", How::Required),
            ("rack:require, sparingly", How::Sparingly),
        ] {
            run(&seeds, most, name, how);
        }
    }
}

fn run(seeds: &[u64], most: u64, name: &str, how: How) {
    let began = Instant::now();
    let (mut figures, mut all_ms) = (Figures::default(), 0);
    for seed in seeds {
        let (play, shapes) = Play::new(how, draw(*seed, most));
        all_ms += play.last_ask_ms * (MACHINES * GPUS) as u64;
        figures.add(play.run(&shapes));
    }
    figures.waits_ms.sort_unstable();
    let hours = |gpu_ms: u64| gpu_ms as f64 / 3_600_000.0 / seeds.len() as f64;
    let percent = |part: u64, all: u64| 100.0 * part as f64 / all as f64;
    let waits = figures.waits_ms.len();
    println!(
        "{name}: {:.1} % of {} gangs that fit a rack are in one; bandwidth {:.1} % of the optimum; used {:.1} %; \
         GPU-hours a seed: {:.0} used, {:.0} idle that those who wait would take, were they together, {:.0} lost to {} preemptions; \
         wait mean {:.1} min, p99 {:.1} h; {:.0} s",
        percent(figures.whole, figures.fit),
        figures.fit,
        percent(figures.mbps, figures.best_mbps),
        percent(figures.used, all_ms),
        hours(figures.used),
        hours(figures.idle),
        hours(figures.lost),
        figures.preempted / seeds.len() as u64,
        figures.waits_ms.iter().sum::<u64>() as f64 / waits as f64 / MINUTE as f64,
        figures.waits_ms[waits * 99 / 100] as f64 / 3_600_000.0,
        began.elapsed().as_secs_f64()
    );
}
