//! What a cycle costs on the largest cluster that is planned for: `cargo run --release -p scheduling --example scale`.
#![allow(clippy::disallowed_types, clippy::disallowed_methods, clippy::print_stdout)]

#[path = "../tests/site/mod.rs"]
mod site;

use std::time::{Duration, Instant};

use scheduling::plan::{Cache, Limits, plan};
use scheduling::{Outlook, why};
use site::{Site, hgx, shape};
use statemachine::spec::Shape;

const MACHINES: usize = 10_000;
const WAITING: usize = 100_000;
const SHAPES: usize = 1_000;
const MINUTE: u64 = 60_000;

/// Every GPU is taken by a job of its own; a gang waits in front of jobs of a thousand shapes.
fn main() {
    let mut site = Site::default();
    for n in 0..MACHINES {
        site.join(&format!("n{n:05}"), hgx("h100"));
    }
    for n in 0..MACHINES * 8 {
        site.submit_limited("default", shape(1, 1, 1), 0, &[], (60 + n as u64 % 600) * MINUTE);
    }
    let mut cache = Cache::default();
    for _ in 0..20 {
        let plan = plan(&site.state, &mut cache, &Limits::default(), &site.unheard);
        site.grant(&plan);
    }
    assert_eq!(site.state.leases.len(), MACHINES * 8);
    let gang = site.submit_limited("default", shape(64, 8, 1), 1, &[], 60 * MINUTE);
    compare(&site, &mut cache, "the gang alone");
    for _ in 0..2 * WAITING {
        site.submit_limited("default", shape(1, 1, 1), -1, &["absent"], 0);
    }
    compare(&site, &mut cache, "the gang and 200,000 jobs of an absent type");
    let shape_of = |n: usize| Shape { mem_mib_per_rank: 1_000 + n as u64, ..shape(1, 1, 1 + n as u16 % 8) };
    let mut last = gang;
    for n in 0..WAITING {
        last = site.submit_limited("default", shape_of(n % SHAPES), 0, &[], 30 * MINUTE);
    }
    compare(&site, &mut cache, "all of them and 100,000 jobs of 1,000 shapes");
    let began = Instant::now();
    let outlook = Outlook::new(&site.state, &mut cache, &site.unheard, 400_000);
    println!("outlook: {:?}, the gang {:?}", began.elapsed(), outlook.start(site.state.front_task(gang)));
    for (name, job) in [("the first", gang), ("the last", last)] {
        let began = Instant::now();
        let answer = why(&site.state, &mut cache, site.state.front_task(job), &site.unheard).expect("it waits");
        println!(
            "why of {name}: {:?}, {} {:?} {:?}",
            began.elapsed(),
            answer.reason.code(),
            answer.latest,
            answer.changes
        );
    }
}

/// A whole cycle with and without reservations, the best of three.
fn compare(site: &Site, cache: &mut Cache, what: &str) {
    let mut best = [Duration::MAX; 2];
    for _ in 0..3 {
        for (reservations, best) in [0, 1].into_iter().zip(&mut best) {
            let limits = Limits { steps: u64::MAX, reservations: Some(reservations), ..Limits::default() };
            let began = Instant::now();
            let plan = plan(&site.state, cache, &limits, &site.unheard);
            *best = (*best).min(began.elapsed());
            assert_eq!(plan.reservations.len(), reservations as usize);
        }
    }
    println!("{what}: {:?} without a reservation, {:?} with one", best[0], best[1]);
}
