//! The machines of one pool while jobs come and go: finds room for a whole gang or for none of it. Which machine is best
//! is `score`'s; when a job may start is the queue's.

use std::collections::{BTreeMap, BTreeSet};

use super::dice::Dice;
use crate::fragmentation::Kinds;
use crate::score::{Chooser, Score};
use crate::world::{Machine, Request, World};

/// What a job holds on one machine.
pub struct Held {
    node: usize,
    part: Request,
    /// The name of the GPU that it shares.
    share: Option<u16>,
}

/// A gang of up to the largest acceptable machine's GPUs lies on one machine; a larger one takes whole machines of that
/// size and, for the rest, a part of one more.
pub struct Floor {
    world: World,
    chooser: Chooser,
    dice: Dice,
    held: BTreeMap<usize, Vec<Held>>,
    /// Requests that found no room since something was given back.
    refused: BTreeSet<Request>,
}

impl Floor {
    pub fn new(machines: Vec<Machine>, score: Score, kinds: Kinds, seed: u64) -> Self {
        let chooser = Chooser::new(score, kinds, machines.len());
        let world = World::new(machines);
        Self { world, chooser, dice: Dice::new(seed), held: BTreeMap::new(), refused: BTreeSet::new() }
    }

    /// Thousandths of the GPUs of all machines.
    pub fn milli(&self) -> u64 {
        self.world.gpus() * u64::from(crate::world::WHOLE)
    }

    /// There would be room if all machines were empty.
    pub fn could_ever_hold(&self, request: &Request) -> bool {
        let mut empty = World::new(self.world.machines.clone());
        let mut first = Chooser::new(Score::First, Kinds::default(), empty.machines.len());
        self.parts(request).iter().all(|part| {
            let found = first.choose(&empty, part, &mut |_| 0);
            if let Some((node, slot)) = found {
                empty.take(node, part, slot);
                first.touched(node, part);
            }
            found.is_some()
        })
    }

    /// Takes room for the whole job; false and nothing taken where there is none.
    pub fn take(&mut self, job: usize, request: &Request) -> bool {
        if self.refused.contains(request) {
            return false;
        }
        let mut held = Vec::new();
        for part in self.parts(request) {
            let Some((node, slot)) = self.chooser.choose(&self.world, &part, &mut |n| self.dice.below(n)) else {
                held.into_iter().for_each(|held| self.put_back(held));
                self.refused.insert(*request);
                return false;
            };
            let share = self.world.take(node, &part, slot);
            self.chooser.touched(node, &part);
            held.push(Held { node, part, share });
        }
        self.held.insert(job, held);
        true
    }

    /// It is known that there is no room for such a job now.
    pub fn refuses(&self, request: &Request) -> bool {
        self.refused.contains(request)
    }

    /// Gives back what the job holds, if it holds anything.
    pub fn give(&mut self, job: usize) {
        if self.held.contains_key(&job) {
            self.lift(job);
        }
    }

    /// Takes a job off its machines; `set_down` may put it back where it was.
    pub fn lift(&mut self, job: usize) -> Vec<Held> {
        let held = self.held.remove(&job).unwrap_or_default();
        for part in &held {
            self.world.free[part.node].give(&part.part, part.share);
            self.chooser.left(part.node, &part.part);
        }
        self.refused.clear();
        held
    }

    /// Puts a lifted job back on the machines that it was on; false and nothing taken where one of them lacks the room.
    /// A share goes to any GPU there that has it.
    pub fn set_down(&mut self, job: usize, lifted: Vec<Held>) -> bool {
        let mut held = Vec::new();
        for Held { node, part, .. } in lifted {
            if !self.world.fits(node, &part) {
                held.into_iter().for_each(|held| self.put_back(held));
                return false;
            }
            let share = self.world.take(node, &part, self.world.free[node].slots(&part)[0]);
            self.chooser.touched(node, &part);
            held.push(Held { node, part, share });
        }
        self.held.insert(job, held);
        true
    }

    fn put_back(&mut self, held: Held) {
        self.world.free[held.node].give(&held.part, held.share);
        self.chooser.left(held.node, &held.part);
    }

    /// The parts of a job, each for one machine.
    fn parts(&self, request: &Request) -> Vec<Request> {
        let acceptable = self.world.machines.iter().filter(|machine| request.accepts(machine.gpu_type));
        let largest = acceptable.map(|machine| machine.gpus).max().unwrap_or(0).max(1);
        if request.gpus <= largest {
            return vec![*request];
        }
        let of = |total: u32, gpus: u32| (u64::from(total) * u64::from(gpus) / u64::from(request.gpus)) as u32;
        let part =
            |gpus| Request { gpus, cpus: of(request.cpus, gpus), mem_mib: of(request.mem_mib, gpus), ..*request };
        let whole = std::iter::repeat_n(largest, (request.gpus / largest) as usize);
        whole.chain(Some(request.gpus % largest).filter(|rest| *rest > 0)).map(part).collect()
    }
}
