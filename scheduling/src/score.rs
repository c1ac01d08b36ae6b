//! Where on the machines a single job goes, by named scores. Owns the memo of scores; a score is a pure function of the
//! request and of what the machine has and has free. Lowest cost wins, ties go to the first machine of the list.

use std::collections::BTreeMap;

use crate::fragmentation::Kinds;
use crate::world::{Free, Machine, Request, Slot, WHOLE, World};

/// A named way to choose a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Score {
    /// The first machine with room.
    First,
    /// Any machine with room, by the caller's draw.
    Random,
    /// Least cores and GPUs left, each as a share of the largest machine's, in whole percent.
    BestFit,
    /// Shared GPUs first, then used machines, then empty ones.
    GpuPacking,
    /// Jobs of one size together.
    GpuClustering,
    /// Least growth of fragmentation, in the published whole points.
    Fgd,
    /// Least growth of fragmentation, exactly.
    FgdExact,
    /// Least growth of what the usual jobs will not use.
    LeastLoss,
}

/// Cores of the largest machine, thousandths, and GPUs: the published norms of `BestFit`.
const LARGEST_CPUS: i64 = 128_000;
const LARGEST_MILLI: i64 = 8_000;

/// What a machine answered to a request at one of its versions: the cost and the slot, none where it has no room.
type Answer = (u32, Option<(i64, Slot)>);

/// Chooses machines and remembers what it computed for each (request, machine) until the machine changes.
#[derive(Clone, Debug)]
pub struct Chooser {
    score: Score,
    kinds: Kinds,
    shapes: BTreeMap<Request, usize>,
    /// By shape and machine.
    memo: Vec<Vec<Answer>>,
    version: Vec<u32>,
    /// By machine, the sizes of the jobs on it; for `GpuClustering`.
    sizes: Vec<BTreeMap<u32, u32>>,
}

impl Chooser {
    pub fn new(score: Score, kinds: Kinds, machines: usize) -> Self {
        let sizes = vec![BTreeMap::new(); machines];
        Self { score, kinds, shapes: BTreeMap::new(), memo: Vec::new(), version: vec![1; machines], sizes }
    }

    /// What was computed for the machine no longer holds.
    pub fn touched(&mut self, node: usize, request: &Request) {
        self.version[node] += 1;
        *self.sizes[node].entry(size_of(request)).or_default() += 1;
    }

    /// A job is gone from the machine.
    pub fn left(&mut self, node: usize, request: &Request) {
        self.version[node] += 1;
        let size = size_of(request);
        if let Some(count) = self.sizes[node].get_mut(&size) {
            *count -= 1;
            if *count == 0 {
                self.sizes[node].remove(&size);
            }
        }
    }

    /// The best machine for a request of one machine, and the GPU for a share. `draw` picks among n for `Random`.
    pub fn choose(
        &mut self,
        world: &World,
        request: &Request,
        draw: &mut dyn FnMut(usize) -> usize,
    ) -> Option<(usize, Slot)> {
        if self.score == Score::Random {
            let fitting: Vec<usize> = (0..world.machines.len()).filter(|node| world.fits(*node, request)).collect();
            let node = *fitting.get(if fitting.is_empty() { 0 } else { draw(fitting.len()) })?;
            let slots = world.free[node].gpus_for(request);
            return Some((node, slots[draw(slots.len())]));
        }
        let shape = self.shape(request, world.machines.len());
        let mut best: Option<(i64, usize, Slot)> = None;
        for node in 0..world.machines.len() {
            if self.memo[shape][node].0 != self.version[node] {
                let answer = world.fits(node, request).then(|| self.cost(world, node, request));
                self.memo[shape][node] = (self.version[node], answer);
            }
            let Some((cost, slot)) = self.memo[shape][node].1 else { continue };
            if best.is_none_or(|(least, _, _)| cost < least) {
                best = Some((cost, node, slot));
                if self.score == Score::First {
                    break;
                }
            }
        }
        best.map(|(_, node, slot)| (node, slot))
    }

    fn shape(&mut self, request: &Request, machines: usize) -> usize {
        let next = self.shapes.len();
        let shape = *self.shapes.entry(*request).or_insert(next);
        if shape == next {
            self.memo.push(vec![(0, None); machines]);
        }
        shape
    }

    fn cost(&self, world: &World, node: usize, request: &Request) -> (i64, Slot) {
        let (machine, free) = (&world.machines[node], &world.free[node]);
        let tightest = free.slots(request)[0];
        match self.score {
            Score::First | Score::Random => (0, tightest),
            Score::BestFit => (-best_fit(free, request), tightest),
            Score::GpuPacking => (-gpu_packing(machine, free, request), tightest),
            Score::GpuClustering => (-gpu_clustering(&self.sizes[node], free, request), tightest),
            Score::Fgd => self.least(free, request, |after| -self.kinds.points(machine, free, after)),
            Score::LeastLoss => self.least(free, request, |after| self.kinds.loss(machine, free, after)),
            Score::FgdExact => {
                let before = self.kinds.fragments(machine, free);
                self.least(free, request, |after| self.kinds.fragments(machine, after) - before)
            }
        }
    }

    /// The cheapest slot, the first among equals.
    fn least(&self, free: &Free, request: &Request, cost: impl Fn(&Free) -> i64) -> (i64, Slot) {
        let costs = free.slots(request).into_iter().map(|slot| {
            let mut after = free.clone();
            after.take(request, slot);
            (cost(&after), slot)
        });
        costs.min_by_key(|(cost, _)| *cost).unwrap_or((i64::MAX, Slot::Fresh))
    }
}

/// Jobs of equal size cluster: the thousandths of a share, or the number of whole GPUs.
fn size_of(request: &Request) -> u32 {
    match request.gpus {
        0 => 0,
        1 => request.milli.min(WHOLE).div_ceil(WHOLE) + u32::from(!request.is_share()),
        gpus => gpus + 1,
    }
}

fn best_fit(free: &Free, request: &Request) -> i64 {
    let cpus = i64::from(free.cpus) - i64::from(request.cpus);
    let milli = i64::from(free.milli()) - request.total_milli() as i64;
    // 100 * (1 - cpus / 128000 / 2 - milli / 8000 / 2), rounded towards zero.
    let denominator = 2 * LARGEST_CPUS * LARGEST_MILLI;
    100 * (denominator - cpus * LARGEST_MILLI - milli * LARGEST_CPUS) / denominator
}

fn gpu_packing(machine: &Machine, free: &Free, request: &Request) -> i64 {
    if request.gpus == 0 {
        return 0;
    }
    let whole = i64::from(free.whole);
    if free.whole == machine.gpus {
        return (100 / 3 - whole).max(whole);
    }
    let shared =
        free.shared.iter().map(|(_, left)| i64::from(*left)).filter(|left| *left >= i64::from(request.milli)).min();
    match shared.filter(|_| request.is_share()) {
        Some(left) => (100 - left * 100 / i64::from(WHOLE) / 10).max(50),
        None => (50 - i64::from(request.gpus)).max(33),
    }
}

fn gpu_clustering(sizes: &BTreeMap<u32, u32>, free: &Free, request: &Request) -> i64 {
    if request.gpus == 0 {
        return 0;
    }
    let sizes: Vec<u32> = sizes.keys().copied().filter(|size| *size > 0).collect();
    let used = 25 * (LARGEST_MILLI - i64::from(free.milli())) / LARGEST_MILLI;
    let alike = sizes.contains(&size_of(request));
    used + match (alike, sizes.len()) {
        (true, 1) => 75,
        (true, _) => 50,
        (false, 0) => 25,
        (false, _) => 0,
    }
}
