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
        let passed = self.steps.partition_point(|(at, _)| *at <= now).saturating_sub(1);
        // Rarely, because the rest moves forward.
        if passed > self.steps.len() / 2 {
            self.steps.drain(..passed);
        }
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
    /// One walk over the steps.
    pub fn earliest(&self, from: u64, length: u64, gpus: u64) -> Option<u64> {
        let mut start = None;
        for (at, free) in &self.steps[self.step_at(from)..] {
            match start {
                Some(start) if *at >= u64::saturating_add(start, length.max(1)) => return Some(start),
                _ if *free < gpus => start = None,
                Some(_) => {}
                None => start = Some(from.max(*at)),
            }
        }
        start
    }

    /// Until when so many GPUs stay free from `from` on, as stairs.
    pub fn stairs(&self, from: u64) -> Stairs {
        let mut stairs: Vec<(u64, u64)> = Vec::new();
        let mut free = None;
        for (at, level) in &self.steps[self.step_at(from)..] {
            match free {
                None => free = Some(*level),
                Some(lowest) if *level < lowest => {
                    stairs.push((lowest, *at));
                    free = Some(*level);
                }
                Some(_) => {}
            }
        }
        stairs.extend(free.map(|level| (level, u64::MAX)));
        Stairs(stairs)
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

/// See `Profile::stairs`: answers whether a request fits from one moment on, without a walk.
#[derive(Clone, Debug, PartialEq, Eq)]
/// (GPUs, until when): GPUs fall and times rise.
pub struct Stairs(Vec<(u64, u64)>);

impl Stairs {
    /// Until when so many GPUs are free from the stairs' moment on; `None` when they aren't free at all.
    pub fn until(&self, gpus: u64) -> Option<u64> {
        let enough = self.0.partition_point(|(free, _)| *free >= gpus);
        enough.checked_sub(1).map(|last| self.0[last].1)
    }
}
