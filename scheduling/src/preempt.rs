//! Whose end makes room for a task that waits, at the least loss. Who may be ended at all is `statemachine::preemption`'s
//! answer, and what fits is `statemachine::fit`'s.
//!
//! One that only its own tenant's limit keeps from starting ends others of that tenant, if it is of one machine.
//!
//! A task of one machine gets the set of victims that loses least of all sets on all machines (branch and bound, down to
//! `SEARCH` looks a machine; beyond those, a set of which none can be spared). A gang takes the machines that add the
//! least loss one after the other; then those victims are spared, the costliest first, without whom it fits too. One that
//! must be in one domain is looked for in each, and takes the one that loses least.

use std::cell::{RefCell, RefMut};
use std::collections::{BTreeMap, BTreeSet};

use statemachine::account::Amounts;
use statemachine::command::{PlacePart, Preempt};
use statemachine::domain::Path;
use statemachine::fit;
use statemachine::preemption::{Headroom, Rights};
use statemachine::record::{Alloc, Lease, Node, NodeAdmin, PartState};
use statemachine::spec::{JobSpec, Shape};
use statemachine::{GpuTypeId, NodeId, State, TaskKey, TenantId, Token};

use crate::cache::Cache;
use crate::domains::{along, domain_for};
use crate::fleet::Fleet;
use crate::machines::Machines;
use crate::seats::has_seat;

/// Looks at sets of victims on one machine.
const SEARCH: u32 = 2_048;
/// Tries with other victims, where those chosen together would take a tenant below what is guaranteed to it.
const TRIES: usize = 4;
/// Victims of one task; apply takes a few more.
const VICTIMS: usize = 1_000;

/// What the end of a set of leases costs: less is better.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    gpu_ms: u64,
    core_ms: u64,
    leases: u64,
}

impl Cost {
    const MOST: Cost = Cost { gpu_ms: u64::MAX, core_ms: u64::MAX, leases: u64::MAX };

    fn of(state: &State, lease: &Lease) -> Self {
        let loss = state.loss(lease);
        Self { gpu_ms: loss.gpu_ms, core_ms: loss.core_ms, leases: 1 }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            gpu_ms: self.gpu_ms.saturating_add(other.gpu_ms),
            core_ms: self.core_ms.saturating_add(other.core_ms),
            leases: self.leases.saturating_add(other.leases),
        }
    }
}

/// Leases that may be ended for some task, found once a cycle.
#[derive(Debug, Default)]
pub(crate) struct Open {
    all: Vec<Token>,
    by_node: BTreeMap<NodeId, Vec<Token>>,
    /// The lowest priority among those of preemptible classes.
    lowest: Option<i32>,
    /// Some tenant has a guarantee, so that others may borrow.
    guarantees: bool,
    /// Somebody has had his turn.
    turns: bool,
    /// When the first of those leases that have not run for the least time, or have not had their turn, may be ended.
    pub next_ms: Option<u64>,
    /// What machines have free once all that drains has gone: for a task for which nothing is kept.
    drained: RefCell<BTreeMap<NodeId, Option<Alloc>>>,
    /// The GPUs that machines had free if all of these ended too.
    most: RefCell<BTreeMap<NodeId, u128>>,
}

impl Open {
    pub(crate) fn of(state: &State, steps: &mut u64) -> Self {
        let guarantees = state.tenants.iter().any(|(_, tenant)| !tenant.policy.guaranteed.is_empty());
        let mut open = Self { guarantees, ..Self::default() };
        for (token, lease) in state.leases.iter() {
            *steps += 1;
            let lease = &lease.value;
            let Some(job) = state.jobs.get(&lease.task.job) else { continue };
            let by_class = state.is_preemptible(&job.value);
            if lease.verdict.is_some() || !(by_class || open.guarantees) {
                continue;
            }
            let (turn_ends_ms, makes_room) = (state.turn_ends_ms(lease), state.may_make_room(lease).is_ok());
            let turn_ended = turn_ends_ms.is_some_and(|ends_ms| ends_ms <= state.meta.clock_ms);
            let protected_until_ms = if makes_room { None } else { state.protected_until_ms(lease) };
            let opens_ms = protected_until_ms.into_iter().chain(turn_ends_ms.filter(|_| !turn_ended));
            open.next_ms = open.next_ms.into_iter().chain(opens_ms).min();
            open.turns |= turn_ended;
            if !makes_room && !turn_ended {
                continue;
            }
            if by_class && makes_room {
                let priority = job.value.spec.priority;
                open.lowest = Some(open.lowest.map_or(priority, |lowest| lowest.min(priority)));
            }
            open.all.push(*token);
            for part in lease.parts.iter().filter(|part| part.state != PartState::Released) {
                open.by_node.entry(part.node).or_default().push(*token);
            }
        }
        open
    }

    /// Free once all that drains has gone: for a task for which nothing is kept.
    fn drained(&self, state: &State, node: NodeId, task: TaskKey) -> RefMut<'_, Option<Alloc>> {
        RefMut::map(self.drained.borrow_mut(), |drained| {
            drained.entry(node).or_insert_with(|| state.free_after(node, &[], task))
        })
    }

    fn most_gpus(&self, state: &State, node: NodeId, task: TaskKey) -> u128 {
        let free = self.drained(state, node, task).as_ref().map_or(0, |alloc| alloc.free_gpus);
        let leases = self.by_node.get(&node).into_iter().flatten().filter_map(|token| state.leases.get(token));
        let parts = leases.flat_map(|lease| &lease.value.parts).filter(|part| part.node == node);
        parts.fold(free, |gpus, part| gpus | part.gpus)
    }

    /// Without a look at any lease: the task could end one of them.
    fn is_worth_a_look(&self, by_class: bool, by_turn: bool, priority: i32) -> bool {
        let lower = by_class && self.lowest.is_some_and(|lowest| lowest < priority);
        !self.all.is_empty() && (lower || self.guarantees || by_turn && self.turns)
    }
}

/// What this cycle did for tasks before it.
pub(crate) struct Before<'a> {
    /// Who ends for them.
    pub victims: &'a BTreeSet<Token>,
    /// What they get, by tenant.
    pub coming: &'a BTreeMap<TenantId, Amounts>,
}

/// What is looked at for one task, with GPUs of one type.
struct Search<'a, 'b> {
    machines: &'a Machines<'b>,
    open: &'a Open,
    /// Victims of tasks before it in this cycle.
    spoken_for: &'a BTreeSet<Token>,
    task: TaskKey,
    shape: &'a Shape,
    gpu_type: Option<GpuTypeId>,
    /// When it would end if it started now: no reservation of time may begin there before.
    until_ms: u64,
    rights: Rights<'a>,
    headroom: Headroom<'a>,
    /// Not to be ended, beside those whom its rights protect.
    spared: BTreeSet<Token>,
    cost: BTreeMap<Token, Cost>,
}

/// The least set that makes room on one machine.
struct Found {
    node: NodeId,
    victims: Vec<Token>,
    cost: Cost,
}

/// The cheapest set of victims for a task that found no room, with the parts that it takes then. `None` where nobody may
/// be ended, or no set suffices, or what drains already does.
pub(crate) fn make_room(
    machines: &Machines<'_>,
    cache: &mut Cache,
    (open, before): (&Open, Before<'_>),
    (task, spec, shape): (TaskKey, &JobSpec, &Shape),
    steps: &mut u64,
) -> Option<Preempt> {
    let state = machines.state;
    let job = &state.jobs.get(&task.job)?.value;
    let (by_class, by_turn) = (state.preempts_by_class(job), state.may_take_turn(task, job));
    if state.claims.contains(&task) || !open.is_worth_a_look(by_class, by_turn, spec.priority) {
        return None;
    }
    let mut best: Option<(Cost, Preempt)> = None;
    for gpu_type in types_of(&cache.fleet, shape) {
        let asks = asks(shape, gpu_type);
        let Some(mut rights) = Rights::new(state, task, &asks, before.coming) else { continue };
        before.victims.iter().for_each(|token| rights.count(*token));
        let (spared, cost) = (BTreeSet::new(), BTreeMap::new());
        let leaving = before.victims.iter().copied();
        let headroom = Headroom::new(state, task, before.coming, leaving);
        let until_ms = machines.room_until(spec);
        let mut search = Search {
            machines,
            open,
            spoken_for: before.victims,
            task,
            shape,
            gpu_type,
            until_ms,
            rights,
            headroom,
            spared,
            cost,
        };
        if !search.may_end_somebody(steps) {
            continue;
        }
        let Some((cost, preempt)) = search.run(cache, steps) else { continue };
        // Of equal ones the type that the job prefers.
        if best.as_ref().is_none_or(|(least, _)| cost < *least) {
            best = Some((cost, preempt));
        }
    }
    best.map(|(_, preempt)| preempt).filter(|preempt| !preempt.victims.is_empty())
}

/// The types to try, in the shape's order.
fn types_of(fleet: &Fleet, shape: &Shape) -> Vec<Option<GpuTypeId>> {
    if shape.gpus_per_node() == 0 {
        return vec![None];
    }
    let registered = &fleet.capacity().gpus;
    if shape.gpu_types.is_empty() {
        return registered.keys().copied().filter(|gpu_type| shape.accepts(*gpu_type)).map(Some).collect();
    }
    shape.gpu_types.iter().copied().filter(|wanted| registered.contains_key(wanted)).map(Some).collect()
}

fn asks(shape: &Shape, gpu_type: Option<GpuTypeId>) -> Amounts {
    Amounts { gpus: gpu_type.map(|gpu_type| (gpu_type, shape.gpus())).into_iter().collect(), ..Amounts::default() }
}

impl Search<'_, '_> {
    fn run(&mut self, cache: &mut Cache, steps: &mut u64) -> Option<(Cost, Preempt)> {
        for _ in 0..TRIES {
            let found = if self.shape.nodes == 1 { self.one(cache, steps) } else { self.gang(cache, steps) }?;
            match self.protected_among(&found) {
                Some(victim) => self.spared.insert(victim),
                None => return self.told(cache, found),
            };
        }
        None
    }

    /// Otherwise no machine need be looked at.
    fn may_end_somebody(&self, steps: &mut u64) -> bool {
        *steps += self.open.all.len() as u64;
        self.open.all.iter().any(|token| self.may_end(*token))
    }

    fn may_end(&self, token: Token) -> bool {
        !self.spoken_for.contains(&token) && !self.spared.contains(&token) && self.rights.against(token).is_ok()
    }

    /// The one machine where the least is lost.
    fn one(&mut self, cache: &mut Cache, steps: &mut u64) -> Option<(Vec<NodeId>, Vec<Token>)> {
        let mut best: Option<Found> = None;
        for node in self.nodes(steps) {
            let bound = best.as_ref().map_or(Cost::MOST, |found| found.cost);
            if let Some(found) = self.on_node(cache, node, bound, steps) {
                best = Some(found);
            }
        }
        best.map(|found| (vec![found.node], found.victims))
    }

    /// Machine after machine, the least addition first; then who is not needed is spared.
    fn gang(&mut self, cache: &mut Cache, steps: &mut u64) -> Option<(Vec<NodeId>, Vec<Token>)> {
        let state = self.machines.state;
        let nodes = self.nodes(steps);
        if nodes.len() < usize::from(self.shape.nodes) {
            return None;
        }
        let mut by_domain: BTreeMap<Path<'_>, Vec<Found>> = BTreeMap::new();
        for id in nodes {
            let domain = state.nodes.get(&id).and_then(|node| domain_for(&node.value, self.shape));
            let Some(domain) = domain else { continue };
            if let Some(found) = self.on_node(cache, id, Cost::MOST, steps) {
                by_domain.entry(domain).or_default().push(found);
            }
        }
        let gangs = by_domain.into_values().filter_map(|found| self.gang_among(cache, found, steps));
        gangs.min_by_key(|(_, victims)| self.cost_of(victims))
    }

    fn cost_of(&self, victims: &[Token]) -> Cost {
        victims.iter().fold(Cost::default(), |sum, token| sum.plus(self.cost[token]))
    }

    fn gang_among(
        &self,
        cache: &mut Cache,
        mut left: Vec<Found>,
        steps: &mut u64,
    ) -> Option<(Vec<NodeId>, Vec<Token>)> {
        let (mut nodes, mut victims) = (Vec::new(), BTreeSet::new());
        while nodes.len() < usize::from(self.shape.nodes) {
            let added = |found: &Found| {
                let more = found.victims.iter().filter(|token| !victims.contains(*token));
                more.fold(Cost::default(), |sum, token| sum.plus(self.cost[token]))
            };
            *steps += left.len() as u64 / 8;
            let (at, _) = left.iter().enumerate().min_by_key(|(_, found)| (added(found), found.node))?;
            let found = left.swap_remove(at);
            nodes.push(found.node);
            victims.extend(found.victims);
        }
        nodes.sort_by_key(|id| along(self.machines.state, *id));
        let mut kept: Vec<Token> = victims.into_iter().collect();
        kept.sort_by_key(|token| std::cmp::Reverse((self.cost[token], *token)));
        for token in kept.clone() {
            let others: Vec<Token> = kept.iter().copied().filter(|other| *other != token).collect();
            *steps += nodes.len() as u64;
            if nodes.iter().all(|node| self.fits(cache, *node, &others)) {
                kept = others;
            }
        }
        Some((nodes, kept))
    }

    /// Machines in service that the task may be on, and that could have its GPUs.
    fn nodes(&self, steps: &mut u64) -> Vec<NodeId> {
        let state = self.machines.state;
        *steps += state.nodes.len() as u64 / 8;
        let ready = state.nodes.iter().filter(|(_, node)| node.value.admin == NodeAdmin::Ready);
        let usable = ready.filter(|(id, node)| {
            !self.machines.unheard.contains(id)
                && self.machines.is_open(**id)
                && self.could_have_gpus(**id, &node.value)
                && self.machines.window_on(**id, self.until_ms).is_none()
                && self.shape.allows(&node.value)
        });
        usable.map(|(id, _)| *id).collect()
    }

    /// The cheapest set there that costs less than `bound`.
    fn on_node(&mut self, cache: &mut Cache, node: NodeId, bound: Cost, steps: &mut u64) -> Option<Found> {
        *steps += 1;
        if self.fits(cache, node, &[]) {
            return (Cost::default() < bound).then_some(Found { node, victims: Vec::new(), cost: Cost::default() });
        }
        let mut able = self.able_on(node, steps);
        if able.is_empty() {
            return None;
        }
        able.sort_unstable_by_key(|token| (self.cost[token], *token));
        let costs: Vec<Cost> = able.iter().map(|token| self.cost[token]).collect();
        // Whatever set it is, it costs as much as its cheapest member.
        *steps += 1;
        if costs[0] >= bound || !self.fits(cache, node, &able) {
            return None;
        }
        let mut looks = 0;
        let mut best = self.greedy(cache, node, &able, &mut looks);
        let mut cost = self.cost_of(&best);
        let mut walk = Walk { able: &able, costs: &costs, chosen: Vec::new(), looks };
        if cost > bound {
            (cost, best) = (bound, Vec::new());
        }
        self.walk(cache, node, &mut walk, 0, Cost::default(), (&mut cost, &mut best));
        *steps += u64::from(walk.looks);
        (!best.is_empty() && cost < bound).then_some(Found { node, victims: best, cost })
    }

    /// Enough usable ones of the type, if everybody ended whom anybody may end.
    fn could_have_gpus(&self, id: NodeId, node: &Node) -> bool {
        let Some(gpu_type) = self.gpu_type else { return true };
        let mut most = self.open.most.borrow_mut();
        let most = *most.entry(id).or_insert_with(|| self.open.most_gpus(self.machines.state, id, self.task));
        (most & fit::healthy_gpus(node, &[gpu_type])).count_ones() >= self.shape.gpus_per_node()
    }

    /// Who may be ended on a machine; their costs are noted.
    fn able_on(&mut self, node: NodeId, steps: &mut u64) -> Vec<Token> {
        let state = self.machines.state;
        let open = self.open.by_node.get(&node).map(Vec::as_slice).unwrap_or_default();
        *steps += open.len() as u64;
        let able: Vec<Token> = open.iter().copied().filter(|token| self.may_end(*token)).collect();
        for token in &able {
            if let Some(lease) = state.leases.get(token) {
                self.cost.entry(*token).or_insert_with(|| Cost::of(state, &lease.value));
            }
        }
        able
    }

    /// The cheapest until it fits, then without those who are not needed, the costliest first.
    fn greedy(&self, cache: &mut Cache, node: NodeId, able: &[Token], looks: &mut u32) -> Vec<Token> {
        let mut chosen: Vec<Token> = Vec::new();
        for token in able {
            chosen.push(*token);
            *looks += 1;
            if self.fits(cache, node, &chosen) {
                break;
            }
        }
        for token in chosen.clone().into_iter().rev() {
            let others: Vec<Token> = chosen.iter().copied().filter(|other| *other != token).collect();
            *looks += 1;
            if self.fits(cache, node, &others) {
                chosen = others;
            }
        }
        chosen
    }

    /// Branch and bound over the candidates from `at` on, the cheapest first.
    fn walk(
        &self,
        cache: &mut Cache,
        node: NodeId,
        walk: &mut Walk<'_>,
        at: usize,
        cost: Cost,
        best: (&mut Cost, &mut Vec<Token>),
    ) {
        for next in at..walk.able.len() {
            let more = cost.plus(walk.costs[next]);
            // Those behind cost no less.
            if more >= *best.0 || walk.looks >= SEARCH {
                return;
            }
            walk.looks += 1;
            walk.chosen.push(walk.able[next]);
            if self.fits(cache, node, &walk.chosen) {
                *best.0 = more;
                *best.1 = walk.chosen.clone();
            } else {
                self.walk(cache, node, walk, next + 1, more, (&mut *best.0, &mut *best.1));
            }
            walk.chosen.pop();
        }
    }

    /// A part of the shape fits on the machine once these and all that was decided before have drained. A task of one machine
    /// must then be within its tenants' limits too.
    fn fits(&self, cache: &mut Cache, node: NodeId, victims: &[Token]) -> bool {
        self.is_within_limits(node, victims)
            && self.room(node, victims).is_some_and(|alloc| {
                self.machines.takes_lease_beside(node, alloc.leases.len(), self.task)
                    && self.fits_in(cache, node, &alloc)
            })
    }

    fn is_within_limits(&self, node: NodeId, victims: &[Token]) -> bool {
        if self.shape.nodes > 1 || !self.headroom.is_bounded() {
            return true;
        }
        let Some(node) = self.machines.state.nodes.get(&node) else { return true };
        let (cores, mem_mib) = fit::request_on(&node.value, self.shape);
        self.headroom.hit(&Amounts { cores, mem_mib, ..asks(self.shape, self.gpu_type) }, victims).is_none()
    }

    fn fits_in(&self, cache: &mut Cache, id: NodeId, alloc: &Alloc) -> bool {
        let Some(node) = self.machines.state.nodes.get(&id) else { return false };
        has_seat(self.machines, cache, (self.shape, self.gpu_type), (&node.value, alloc))
    }

    /// What the machine will have free then, less what this cycle gave to others. `None` where that has too few GPUs.
    fn room(&self, node: NodeId, victims: &[Token]) -> Option<Alloc> {
        let state = self.machines.state;
        let leaving = victims.iter().chain(self.spoken_for).copied();
        let here: Vec<Token> = leaving.filter(|token| is_on(state, *token, node)).collect();
        let enough = |alloc: &Alloc| alloc.free_gpus.count_ones() >= self.shape.gpus_per_node();
        let mut alloc = if here.is_empty() {
            self.open.drained(state, node, self.task).as_ref().filter(|alloc| enough(alloc))?.clone()
        } else {
            state.free_after(node, &here, self.task).filter(enough)?
        };
        self.machines.take_planned(node, &mut alloc);
        Some(alloc)
    }

    /// The first of them whose end would, after that of those before it, pass what protects it.
    fn protected_among(&self, (_, victims): &(Vec<NodeId>, Vec<Token>)) -> Option<Token> {
        let mut rights = self.rights.clone();
        victims.iter().copied().find(|token| {
            let refused = rights.against(*token).is_err();
            rights.count(*token);
            refused
        })
    }

    fn told(&self, cache: &mut Cache, (nodes, victims): (Vec<NodeId>, Vec<Token>)) -> Option<(Cost, Preempt)> {
        if victims.len() > VICTIMS {
            return None;
        }
        let part = |id: &NodeId| -> Option<PlacePart> {
            let node = &self.machines.state.nodes.get(id)?.value;
            let alloc = self.room(*id, &victims)?;
            self.machines.part(cache, (*id, node, &alloc), self.shape, self.gpu_type)
        };
        let parts: Option<Vec<PlacePart>> = nodes.iter().map(part).collect();
        let cost = self.cost_of(&victims);
        let parts = parts?;
        let amounts = self.machines.state.amounts_of(parts.iter().map(PlacePart::takes));
        if self.headroom.hit(&amounts, &victims).is_some() {
            return None;
        }
        Some((cost, Preempt { task: self.task, victims, parts }))
    }
}

struct Walk<'a> {
    able: &'a [Token],
    costs: &'a [Cost],
    chosen: Vec<Token>,
    looks: u32,
}

fn is_on(state: &State, token: Token, node: NodeId) -> bool {
    state.leases.get(&token).is_some_and(|lease| lease.value.parts.iter().any(|part| part.node == node))
}
