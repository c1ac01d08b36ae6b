//! The planner's own light view of a cluster: what each machine has and has free, and what a request takes of it.
//! Owns fit, take and give over plain integers; who may start and where it is best is decided by others. Callers that
//! have a replicated state, a trace or a test fill it in.

/// Thousandths of one GPU.
pub const WHOLE: u32 = 1_000;

/// A quantity that the source did not state: never binding.
pub const UNBOUNDED: u32 = u32::MAX / 4;

/// What one job asks for. Several GPUs are always whole ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Request {
    pub gpus: u32,
    /// Thousandths of each GPU; below `WHOLE` only with one GPU, which it then shares.
    pub milli: u32,
    /// Thousandths of a core.
    pub cpus: u32,
    pub mem_mib: u32,
    /// Acceptable GPU types as a set of bits; 0 = any.
    pub types: u64,
}

impl Request {
    pub fn is_share(&self) -> bool {
        self.gpus == 1 && self.milli < WHOLE
    }

    /// GPU thousandths in all.
    pub fn total_milli(&self) -> u64 {
        u64::from(self.gpus) * u64::from(self.milli)
    }

    pub fn accepts(&self, gpu_type: u8) -> bool {
        self.types == 0 || self.types & (1 << gpu_type) != 0
    }
}

/// What a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Machine {
    pub gpus: u32,
    /// A number below 64.
    pub gpu_type: u8,
    pub cpus: u32,
    pub mem_mib: u32,
}

/// What of a machine is free.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Free {
    pub whole: u32,
    /// GPUs given out in shares: a name that is unique in the machine, and the thousandths left.
    pub shared: Vec<(u16, u16)>,
    pub cpus: u32,
    pub mem_mib: u32,
}

/// Which GPU a share goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    /// A GPU that is free as a whole; the only answer for whole GPUs and for none.
    Fresh,
    Shared(u16),
}

impl Free {
    pub fn of(machine: &Machine) -> Self {
        Self { whole: machine.gpus, shared: Vec::new(), cpus: machine.cpus, mem_mib: machine.mem_mib }
    }

    pub fn fits(&self, request: &Request) -> bool {
        let gpus = if request.is_share() {
            self.whole > 0 || self.shared.iter().any(|(_, left)| u32::from(*left) >= request.milli)
        } else {
            self.whole >= request.gpus
        };
        gpus && self.cpus >= request.cpus && self.mem_mib >= request.mem_mib
    }

    /// Thousandths of GPUs left.
    pub fn milli(&self) -> u32 {
        self.whole * WHOLE + self.shared.iter().map(|(_, left)| u32::from(*left)).sum::<u32>()
    }

    /// Where a share could go: each distinct remainder once, smallest first, a whole GPU last.
    pub fn slots(&self, request: &Request) -> Vec<Slot> {
        if !request.is_share() {
            return vec![Slot::Fresh];
        }
        let mut fitting: Vec<(u16, u16)> = self
            .shared
            .iter()
            .filter(|(_, left)| u32::from(*left) >= request.milli)
            .map(|(id, left)| (*left, *id))
            .collect();
        fitting.sort_unstable();
        fitting.dedup_by_key(|(left, _)| *left);
        let fresh = (self.whole > 0).then_some(Slot::Fresh);
        fitting.into_iter().map(|(_, id)| Slot::Shared(id)).chain(fresh).collect()
    }

    /// Where a share could go: each GPU with room once.
    pub fn gpus_for(&self, request: &Request) -> Vec<Slot> {
        if !request.is_share() {
            return vec![Slot::Fresh];
        }
        let shared = self.shared.iter().filter(|(_, left)| u32::from(*left) >= request.milli);
        let fresh = std::iter::repeat_n(Slot::Fresh, self.whole as usize);
        shared.map(|(id, _)| Slot::Shared(*id)).chain(fresh).collect()
    }

    /// Takes what fits; the shared GPU's name comes back for `give`.
    pub fn take(&mut self, request: &Request, slot: Slot) -> Option<u16> {
        self.cpus -= request.cpus;
        self.mem_mib -= request.mem_mib;
        if !request.is_share() {
            self.whole -= request.gpus;
            return None;
        }
        match slot {
            Slot::Shared(id) => {
                if let Some((_, left)) = self.shared.iter_mut().find(|(known, _)| *known == id) {
                    *left -= request.milli as u16;
                }
                Some(id)
            }
            Slot::Fresh => {
                let id = (0..).find(|id| self.shared.iter().all(|(known, _)| known != id))?;
                self.whole -= 1;
                self.shared.push((id, (WHOLE - request.milli) as u16));
                Some(id)
            }
        }
    }

    /// Puts back what `take` took.
    pub fn give(&mut self, request: &Request, share: Option<u16>) {
        self.cpus += request.cpus;
        self.mem_mib += request.mem_mib;
        let Some(id) = share else {
            self.whole += request.gpus;
            return;
        };
        let Some(at) = self.shared.iter().position(|(known, _)| *known == id) else { return };
        self.shared[at].1 += request.milli as u16;
        if u32::from(self.shared[at].1) == WHOLE {
            self.shared.swap_remove(at);
            self.whole += 1;
        }
    }
}

/// Machines and what is free on them. `Clone` is a scratch copy for "what if".
#[derive(Clone, Debug)]
pub struct World {
    pub machines: Vec<Machine>,
    pub free: Vec<Free>,
}

impl World {
    pub fn new(machines: Vec<Machine>) -> Self {
        let free = machines.iter().map(Free::of).collect();
        Self { machines, free }
    }

    /// GPUs of all machines.
    pub fn gpus(&self) -> u64 {
        self.machines.iter().map(|machine| u64::from(machine.gpus)).sum()
    }

    pub fn fits(&self, node: usize, request: &Request) -> bool {
        let accepted = request.gpus == 0 || request.accepts(self.machines[node].gpu_type);
        accepted && self.free[node].fits(request)
    }

    /// As `Free::take`.
    pub fn take(&mut self, node: usize, request: &Request, slot: Slot) -> Option<u16> {
        self.free[node].take(request, slot)
    }
}
