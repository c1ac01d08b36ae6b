//! How much of a cluster can be filled: jobs drawn from a list arrive until their GPU demand is a multiple of the
//! cluster, nothing ends, what does not fit is dropped (Weng et al., ATC '23, section 6).

use super::dice::Dice;
use super::trace::Trace;
use crate::fragmentation::Kinds;
use crate::score::{Chooser, Score};
use crate::world::{Request, WHOLE, World};

/// Allocated percent of the GPU thousandths each time a whole percent of the cluster has arrived.
#[derive(Clone, Debug, Default)]
pub struct Saturation {
    /// (arrived percent, allocated hundredths of a percent).
    pub alloc: Vec<(u32, u32)>,
    pub placed: usize,
    pub dropped: usize,
}

/// Runs the experiment once. `arrive_percent` = 130 is the published one; `shuffle_nodes` draws the machines' order too.
pub fn saturate(trace: &Trace, score: Score, arrive_percent: u64, seed: u64, shuffle_nodes: bool) -> Saturation {
    let mut dice = Dice::new(seed);
    let mut machines = trace.machines.clone();
    machines.retain(|machine| machine.gpus > 0);
    if shuffle_nodes {
        dice.shuffle(&mut machines);
    }
    let requests: Vec<Request> = trace.jobs.iter().map(|job| job.request).collect();
    let mut world = World::new(machines);
    let capacity = world.gpus() * u64::from(WHOLE);
    let arrivals = draw(&requests, capacity * arrive_percent / 100, &mut dice);
    let kinds = Kinds::of(requests.iter());
    let mut chooser = Chooser::new(score, kinds, world.machines.len());
    let (mut arrived, mut allocated) = (0u64, 0u64);
    let mut outcome = Saturation::default();
    for request in &arrivals {
        let chosen = chooser.choose(&world, request, &mut |n| dice.below(n));
        match chosen {
            Some((node, slot)) => {
                world.take(node, request, slot);
                chooser.touched(node, request);
                allocated += request.total_milli_of_gpus();
                outcome.placed += 1;
            }
            None => outcome.dropped += 1,
        }
        let before = arrived * 100 / capacity.max(1);
        arrived += request.total_milli_of_gpus();
        for percent in before + 1..=arrived * 100 / capacity.max(1) {
            outcome.alloc.push((percent as u32, (allocated * 10_000 / capacity.max(1)) as u32));
        }
    }
    outcome
}

impl Request {
    /// Thousandths of GPUs in all; 0 without GPUs.
    fn total_milli_of_gpus(&self) -> u64 {
        if self.gpus == 0 { 0 } else { self.total_milli() }
    }
}

/// Each job once or more until the demand is reached, in a drawn order.
fn draw(requests: &[Request], demand: u64, dice: &mut Dice) -> Vec<Request> {
    let mut drawn = Vec::new();
    let mut sum = 0;
    if requests.iter().all(|request| request.gpus == 0) {
        return drawn;
    }
    while sum < demand {
        let request = requests[dice.below(requests.len())];
        sum += request.total_milli_of_gpus();
        drawn.push(request);
    }
    dice.shuffle(&mut drawn);
    drawn
}
