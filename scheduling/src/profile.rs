//! How many GPUs of a pool are free at each moment to come, by the limits of what runs and by what is reserved.
//! Owns the arithmetic over intervals; which jobs are entered, and in which order, is the caller's policy.

/// A step function over time: `steps[i].1` GPUs are free from `steps[i].0` until the next step; times ascend, the last
/// step holds for ever. Times are in any one unit. `Clone` is a scratch copy for reservations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Profile {
    steps: Vec<(u64, u64)>,
}

impl Profile {
    /// All of `gpus` are free from time 0 on.
    pub fn new(gpus: u64) -> Self {
        Self { steps: vec![(0, gpus)] }
    }

    /// Forgets what lies before `now`; every later question and change must lie at `now` or behind.
    pub fn advance(&mut self, now: u64) {
        let passed = self.steps.partition_point(|(at, _)| *at <= now);
        self.steps.drain(..passed.saturating_sub(1));
    }

    /// GPUs free at that moment.
    pub fn free_at(&self, time: u64) -> u64 {
        self.steps[self.step_at(time)].1
    }

    /// So many GPUs are free during all of [`from`, `until`).
    pub fn fits(&self, from: u64, until: u64, gpus: u64) -> bool {
        let first = self.step_at(from);
        let within = self.steps[first..].iter().enumerate().take_while(|(at, step)| *at == 0 || step.0 < until);
        from >= until || within.into_iter().all(|(_, (_, free))| *free >= gpus)
    }

    /// The earliest start at `from` or later at which so many GPUs stay free for `length`; `None` when that never comes.
    pub fn earliest(&self, from: u64, length: u64, gpus: u64) -> Option<u64> {
        let later = self.steps.iter().map(|(at, _)| *at).filter(|at| *at > from);
        std::iter::once(from).chain(later).find(|start| self.fits(*start, start.saturating_add(length.max(1)), gpus))
    }

    /// Takes GPUs that `fits` found free.
    pub fn take(&mut self, from: u64, until: u64, gpus: u64) {
        self.change(from, until, |free| free - gpus);
    }

    /// Puts back what `take` took, for the part of its time that is left.
    pub fn give(&mut self, from: u64, until: u64, gpus: u64) {
        self.change(from, until, |free| free + gpus);
    }

    fn change(&mut self, from: u64, until: u64, to: impl Fn(u64) -> u64) {
        if from >= until {
            return;
        }
        let (first, end) = (self.cut(from), self.cut(until));
        for (_, free) in &mut self.steps[first..end] {
            *free = to(*free);
        }
        self.steps.dedup_by_key(|(_, free)| *free);
    }

    /// The step that holds at `time`; the first one for a time before it.
    fn step_at(&self, time: u64) -> usize {
        self.steps.partition_point(|(at, _)| *at <= time).saturating_sub(1)
    }

    /// Makes a step begin at `time`; its number.
    fn cut(&mut self, time: u64) -> usize {
        let at = self.step_at(time);
        if self.steps[at].0 >= time {
            return at;
        }
        self.steps.insert(at + 1, (time, self.steps[at].1));
        at + 1
    }
}
