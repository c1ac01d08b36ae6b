//! One run: a group forms, has its faults for a while (safety), then they are lifted, in half of the seeds without one replica, and
//! everything must come to rest (liveness). After each tick the checks look at what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use raft_node::log::EntryId;

use super::Report;
use super::checks::{Broken, Checks, broken_if};
use super::clients::{Order, Users};
use super::fault::{Fault, Kind};
use super::group::{self, BOOT, Group, Loss, Sizes, but};
use super::ledger::Ledger;
use super::stand_in;
use crate::sim::random::Rng;
use crate::sim::trace::Trace;

/// How long the faults strike, in ms.
pub const SAFETY_MS: u64 = 20_000;
/// The group must have formed by then, by itself.
const FORMED: Duration = Duration::from_secs(20);
/// After the last fault: a leader that acknowledges, and all replicas equal.
const SERVES: Duration = Duration::from_secs(15);
const EQUAL: Duration = Duration::from_secs(45);
/// A replica taken out runs on for so long.
const OUTLIVES: Duration = Duration::from_secs(3);
/// No group grows beyond it.
const MOST: usize = 7;
const SLOW_SYNC: Duration = Duration::from_millis(700);

/// What is to be done later.
enum Later {
    /// A fault of the links ends.
    Mend(u64),
    Restart(u64, Loss),
    Sync(u64),
    Space(u64),
    Clock,
    Retire(u64),
}

pub struct Drive {
    seed: u64,
    group: Group,
    users: Users,
    checks: Checks,
    trace: Trace,
    rng: Rng,
    later: Vec<(Duration, Later)>,
    links: BTreeMap<u64, group::Broken>,
    next_link: u64,
    /// Machines that may be started again.
    serving: BTreeSet<u64>,
    retired: BTreeSet<u64>,
    took: BTreeMap<&'static str, u64>,
    in_office: BTreeMap<u64, u64>,
    offices: u64,
    orders_done: usize,
    next_id: u64,
    /// Who was leader when the links broke, to see whether he lost his place.
    parted: Option<u64>,
    last_check: Duration,
}

impl Drive {
    pub fn new(seed: u64, root: &Path, loud: bool) -> Result<Self, String> {
        let sizes = Sizes::of(seed);
        let replicas = sizes.replicas;
        let mut group = Group::new(seed, root, sizes);
        let mut serving = BTreeSet::new();
        for id in 1..=replicas {
            group.add(id, id == 1)?;
            serving.insert(id);
        }
        let users = Users::new(group.running.clone());
        users.orders.borrow_mut().extend((2..=replicas).map(Order::Add));
        group.client("users", users.clone().run(seed));
        Ok(Self {
            seed,
            group,
            users,
            checks: Checks::default(),
            trace: Trace::new(loud),
            rng: Rng::new(seed, 4),
            later: Vec::new(),
            links: BTreeMap::new(),
            next_link: 0,
            serving,
            retired: BTreeSet::new(),
            took: BTreeMap::new(),
            in_office: BTreeMap::new(),
            offices: 0,
            orders_done: 0,
            next_id: replicas + 1,
            parted: None,
            last_check: Duration::ZERO,
        })
    }

    /// The whole run.
    pub fn run(mut self, faults: &[Fault]) -> Report {
        let ended = self.phases(faults);
        let ledger = self.users.ledger.borrow();
        let mut sometimes: BTreeMap<String, u64> = BTreeMap::new();
        for (what, hits) in ledger.sometimes.iter().chain(&self.checks.sometimes) {
            *sometimes.entry((*what).to_owned()).or_default() += hits;
        }
        Report {
            seed: self.seed,
            hash: self.trace.hash(),
            broken: ended.err(),
            at_ms: self.now().as_millis() as u64,
            took: self.took.iter().map(|(kind, hits)| ((*kind).to_owned(), *hits)).collect(),
            sometimes,
            acknowledged: ledger.acknowledged(),
            reads: ledger.reads,
            unknown: ledger.unknown,
            entries: self.checks.committed(),
            offices: self.offices,
            cpu_ms: 0,
            tail: self.trace.tail(),
        }
    }

    fn phases(&mut self, faults: &[Fault]) -> Result<(), Broken> {
        self.until(FORMED, "the group forms", |drive| drive.orders_done + 1 >= drive.serving.len())?;
        let began = self.now();
        for fault in faults.iter().copied() {
            let at = began + Duration::from_millis(fault.at_ms);
            while self.now() < at {
                self.tick()?;
            }
            self.strike(fault)?;
        }
        while self.now() < began + Duration::from_millis(SAFETY_MS) {
            self.tick()?;
        }
        self.lift()?;
        self.come_to_rest()
    }

    fn now(&self) -> Duration {
        self.group.elapsed()
    }

    fn us(&self) -> u64 {
        self.now().as_micros() as u64
    }

    fn until(&mut self, within: Duration, what: &str, holds: impl Fn(&Self) -> bool) -> Result<(), Broken> {
        let deadline = self.now() + within;
        while !holds(self) {
            broken_if(self.now() > deadline, "liveness", || {
                format!("within {} s: {what}; {}", within.as_secs(), self.picture())
            })?;
            self.tick()?;
        }
        Ok(())
    }

    /// The group in a line, for people.
    fn picture(&self) -> String {
        let replicas = self.group.running.borrow();
        let line = |id: &u64| match replicas.get(id) {
            Some(replica) => {
                let metrics = replica.metrics();
                let failed = replica.failed().borrow().clone().map(|why| format!(" FAILED {why}")).unwrap_or_default();
                format!(
                    "r{id} {} term {} applied {} of {}, {} members{failed}",
                    metrics.role,
                    metrics.term,
                    metrics.applied_index,
                    metrics.last_log_index,
                    metrics.members.len()
                )
            }
            None => format!("r{id} {}", if self.group.is_up(*id) { "starts" } else { "is down" }),
        };
        self.group.ids().iter().map(line).collect::<Vec<_>>().join("; ")
    }

    // ------------------------------------------------------------------------------------------------------- one tick

    fn tick(&mut self) -> Result<(), Broken> {
        self.do_what_is_due()?;
        let stepped = self.group.step();
        stepped.map_err(|detail| Broken { invariant: "no_panic".to_owned(), detail })?;
        self.look()?;
        self.follow_orders();
        self.start_after_failed_syncs()
    }

    fn look(&mut self) -> Result<(), Broken> {
        if let Some((id, why)) = self.group.refused() {
            let detail = format!("r{id} does not start again: {why}");
            return Err(Broken { invariant: "nothing_lost".to_owned(), detail });
        }
        let running = self.group.running.clone();
        let now = self.us();
        for (id, replica) in running.borrow().iter() {
            if let Some(step) = self.checks.look(*id, replica)? {
                let EntryId { index, term, node } = step.last;
                self.trace.event(now, "applied", *id, step.applied);
                self.trace.event(now, "last", term << 8 | node, index);
            }
            if replica.is_in_joint_state() && replica.leads().is_some() {
                self.checks.hit("the membership was half-way");
            }
        }
        self.look_at_offices()?;
        if self.now() >= self.last_check + Duration::from_secs(1) {
            self.last_check = self.now();
            for (id, replica) in running.borrow().iter() {
                self.state_is_sound(*id, replica)?;
            }
        }
        match self.users.ledger.borrow().broken.clone() {
            Some(broken) => Err(broken),
            None => Ok(()),
        }
    }

    fn state_is_sound(&self, id: u64, replica: &raft_node::replica::Replica) -> Result<(), Broken> {
        let state = replica.state();
        Ledger::once(id, &state)?;
        state.check().map_err(|violation| Broken {
            invariant: "state_sound".to_owned(),
            detail: format!("r{id}: {violation:?}"),
        })
    }

    /// A replica that takes office has everything that was acknowledged before.
    fn look_at_offices(&mut self) -> Result<(), Broken> {
        let running = self.group.running.clone();
        let mut leading = 0;
        for (id, replica) in running.borrow().iter() {
            leading += u64::from(replica.leads().is_some());
            let office = replica.leadership().borrow().as_ref().map(|office| office.term);
            let Some(term) = office else {
                self.in_office.remove(id);
                continue;
            };
            if self.in_office.insert(*id, term) != Some(term) {
                self.offices += 1;
                self.trace.event(self.us(), "office", *id, term);
                if self.parted.is_some_and(|parted| parted != *id) {
                    self.checks.hit("a leader that was cut off lost its place");
                    self.parted = None;
                }
                replica.look(|state| self.users.ledger.borrow().whole(*id, state))?;
            }
        }
        if leading > 1 {
            self.checks.hit("two leaders alive in different terms");
        }
        Ok(())
    }

    fn follow_orders(&mut self) {
        let done: Vec<Order> = self.users.done.borrow()[self.orders_done..].to_vec();
        for order in done {
            self.orders_done += 1;
            let (word, id) = match order {
                Order::Add(id) => ("added", id),
                Order::Remove(id) => ("removed", id),
                Order::Transfer => ("moved", 0),
                Order::Snapshot => ("snapshots", 0),
            };
            self.trace.event(self.us(), word, id, 0);
            match order {
                Order::Add(id) if id > self.initial() => self.took(Kind::Add),
                Order::Remove(id) => {
                    self.took(Kind::Remove);
                    self.serving.remove(&id);
                    self.at(OUTLIVES, Later::Retire(id));
                }
                Order::Transfer => self.took(Kind::Transfer),
                Order::Snapshot => self.took(Kind::Snapshot),
                Order::Add(_) => {}
            }
        }
    }

    fn initial(&self) -> u64 {
        Sizes::of(self.seed).replicas
    }

    fn start_after_failed_syncs(&mut self) -> Result<(), Broken> {
        for id in self.group.failed_disks() {
            self.took(Kind::FailedSync);
            self.cut(id, Loss::default(), 400)?;
        }
        Ok(())
    }

    fn at(&mut self, after: Duration, what: Later) {
        self.later.push((self.now() + after, what));
    }

    fn do_what_is_due(&mut self) -> Result<(), Broken> {
        let now = self.now();
        while let Some(next) = self.later.iter().position(|(at, _)| *at <= now) {
            let (_, what) = self.later.remove(next);
            self.finish(what)?;
        }
        Ok(())
    }

    fn finish(&mut self, what: Later) -> Result<(), Broken> {
        match what {
            Later::Mend(link) => {
                self.links.remove(&link);
                self.set_links();
                if self.links.is_empty() {
                    self.parted = None;
                }
            }
            Later::Restart(id, loss) => {
                if self.retired.contains(&id) || self.group.is_up(id) {
                    return Ok(());
                }
                self.group.lose(id, loss).map_err(|error| harness(&error))?;
                self.trace.event(self.us(), "restart", id, u64::from(loss.image) * 2 + u64::from(loss.snapshots));
                self.group.restart(id);
            }
            Later::Sync(id) => self.group.sync_every(id, None),
            Later::Space(id) => self.group.fill_disk(id, false),
            Later::Clock => stand_in::set_leap_ms(0),
            Later::Retire(id) => {
                self.retired.insert(id);
                if self.group.is_up(id) {
                    self.down(id, |_| true)?;
                }
            }
        }
        Ok(())
    }

    // --------------------------------------------------------------------------------------------------------- faults

    fn took(&mut self, kind: Kind) {
        *self.took.entry(kind.name()).or_default() += 1;
    }

    fn leader(&self) -> Option<u64> {
        self.group.running.borrow().iter().find(|(_, replica)| replica.is_leader()).map(|(id, _)| *id)
    }

    /// Whom the fault strikes: a running replica.
    fn target(&self, fault: &Fault) -> Option<u64> {
        let running: Vec<u64> = self.group.running.borrow().keys().copied().collect();
        let by_chance = running.get((fault.chance % running.len().max(1) as u64) as usize).copied();
        if fault.leader { self.leader().or(by_chance) } else { by_chance }
    }

    fn strike(&mut self, fault: Fault) -> Result<(), Broken> {
        let Some(target) = self.target(&fault) else { return Ok(()) };
        self.trace.event(self.us(), fault.kind.name(), target, fault.for_ms);
        let for_time = Duration::from_millis(fault.for_ms);
        match fault.kind {
            Kind::Cut => self.cut_counted(target, Loss::default(), &fault)?,
            // A group whose replicas all lost their state has lost it: only one at a time does.
            Kind::LostImage | Kind::LostSnapshots | Kind::LostState if !self.all_run() => {}
            Kind::LostImage => self.cut_counted(target, Loss { image: true, snapshots: false }, &fault)?,
            Kind::LostSnapshots => self.cut_counted(target, Loss { image: false, snapshots: true }, &fault)?,
            Kind::LostState => self.cut_counted(target, Loss { image: true, snapshots: true }, &fault)?,
            Kind::Kill => {
                self.down(target, |_| true)?;
                self.at(for_time.max(BOOT), Later::Restart(target, Loss::default()));
                self.took(fault.kind);
            }
            Kind::CutAll => {
                for id in self.group.up() {
                    self.cut(id, Loss::default(), fault.for_ms)?;
                }
                self.took(fault.kind);
            }
            Kind::Isolate
            | Kind::Halves
            | Kind::Mute
            | Kind::Deaf
            | Kind::Bridge
            | Kind::Hold
            | Kind::Slow
            | Kind::Loss => {
                self.break_links(&fault, target);
                self.took(fault.kind);
            }
            Kind::SlowDisk => {
                let share = 1 + (fault.chance >> 8) as u32 % 10;
                self.group.sync_every(target, Some(SLOW_SYNC * share / 10));
                self.at(for_time, Later::Sync(target));
                self.took(fault.kind);
            }
            Kind::FullDisk => {
                self.group.fill_disk(target, true);
                self.at(for_time, Later::Space(target));
                self.took(fault.kind);
            }
            Kind::FailedSync => self.group.fail_next_sync(target),
            Kind::Leap => {
                let hour = 3_600_000;
                stand_in::set_leap_ms((fault.chance % (2 * hour)) as i64 - hour as i64);
                self.at(for_time, Later::Clock);
                self.took(fault.kind);
            }
            Kind::Transfer => self.order(Order::Transfer),
            Kind::Snapshot => self.order(Order::Snapshot),
            Kind::Add => self.add_replica()?,
            Kind::Remove => self.remove_replica(target),
        }
        Ok(())
    }

    fn all_run(&self) -> bool {
        let running = self.group.running.borrow();
        self.serving.iter().all(|id| running.contains_key(id))
    }

    fn order(&mut self, order: Order) {
        let mut orders = self.users.orders.borrow_mut();
        // A group that can't carry out what it was told is told nothing new.
        if orders.is_empty() {
            orders.push_back(order);
        }
    }

    fn add_replica(&mut self) -> Result<(), Broken> {
        if self.serving.len() >= MOST || !self.users.orders.borrow().is_empty() {
            return Ok(());
        }
        let id = self.next_id;
        self.next_id += 1;
        self.group.add(id, false).map_err(|error| harness(&error))?;
        self.serving.insert(id);
        self.set_links();
        self.order(Order::Add(id));
        Ok(())
    }

    fn remove_replica(&mut self, target: u64) {
        if self.serving.len() > 3 && self.serving.contains(&target) {
            self.order(Order::Remove(target));
        }
    }

    fn break_links(&mut self, fault: &Fault, target: u64) {
        let ids = self.group.ids();
        let others = but(&ids, &[target]);
        let half: Vec<u64> = others.iter().copied().filter(|id| fault.chance >> id & 1 == 1).collect();
        let rest = but(&others, &half);
        let with_target: Vec<u64> = half.iter().copied().chain([target]).collect();
        let most = Duration::from_millis(30 + fault.chance % 300);
        let broken = match fault.kind {
            Kind::Isolate => group::Broken::Both(vec![target], others),
            Kind::Halves => group::Broken::Both(with_target, rest),
            Kind::Mute => group::Broken::OneWay(vec![target], others),
            Kind::Deaf => group::Broken::OneWay(others, vec![target]),
            // The target sees both halves.
            Kind::Bridge => group::Broken::Both(half, rest),
            Kind::Hold => group::Broken::Held(vec![target], others),
            Kind::Loss => group::Broken::Lossy((1 + fault.chance % 20) as f64 / 1_000.0),
            _ => group::Broken::Slow(most),
        };
        self.parted = self.leader().filter(|leader| *leader == target);
        let link = self.next_link;
        self.next_link += 1;
        self.links.insert(link, broken);
        self.set_links();
        self.at(Duration::from_millis(fault.for_ms), Later::Mend(link));
    }

    fn set_links(&mut self) {
        let broken: Vec<group::Broken> = self.links.values().cloned().collect();
        self.group.set_links(&broken);
    }

    fn cut_counted(&mut self, id: u64, loss: Loss, fault: &Fault) -> Result<(), Broken> {
        self.took(fault.kind);
        if loss.snapshots {
            self.checks.hit(if loss.image { "a replica lost its state" } else { "a replica had its image alone" });
        } else if loss.image {
            self.checks.hit("a replica lost its image");
        }
        self.cut(id, loss, fault.for_ms)
    }

    /// The power of one machine fails, for a while.
    fn cut(&mut self, id: u64, loss: Loss, for_ms: u64) -> Result<(), Broken> {
        // All of what was not synced, nothing of it, or each sector on its own.
        let mode = self.rng.below(4);
        let lost = self.down(id, |rng| match mode {
            0 => true,
            1 => false,
            _ => rng.chance(500),
        })?;
        if lost > 0 {
            self.checks.hit("a power cut took what was not synced");
            if mode > 1 {
                self.checks.hit("a power cut tore what was not synced");
            }
        }
        self.at(Duration::from_millis(for_ms).max(BOOT), Later::Restart(id, loss));
        Ok(())
    }

    fn down(&mut self, id: u64, mut kept: impl FnMut(&mut Rng) -> bool) -> Result<u64, Broken> {
        let in_office = self.in_office.remove(&id).is_some();
        if in_office {
            self.checks.hit("a leader went down");
            let joint =
                self.group.running.borrow().get(&id).is_some_and(raft_node::replica::Replica::is_in_joint_state);
            if joint {
                self.checks.hit("a leader went down while the membership was half-way");
            }
        }
        self.checks.down(id);
        let rng = &mut self.rng;
        let lost = self.group.crash(id, || kept(rng)).map_err(|error| harness(&error))?;
        self.trace.event(self.us(), "down", id, lost);
        Ok(lost)
    }

    // ------------------------------------------------------------------------------------------------------- liveness

    /// Ends all faults; in half of the seeds one replica stays down.
    fn lift(&mut self) -> Result<(), Broken> {
        self.trace.event(self.us(), "lift", 0, 0);
        // In the order of their times, retirements as well: what was taken out may be gone.
        let mut later = std::mem::take(&mut self.later);
        later.sort_by_key(|(at, _)| *at);
        for (_, what) in later {
            self.finish(what)?;
        }
        self.links.clear();
        self.set_links();
        let serving: Vec<u64> = self.serving.iter().copied().collect();
        let spare = self.rng.pick(&serving);
        // Nobody comes or goes without who is down then: it must be there to be taken in, and a quorum must remain without another one.
        let needed = |order: &Order| matches!(order, Order::Remove(_)) || *order == Order::Add(spare);
        let needed = self.users.orders.borrow().iter().any(needed);
        if self.rng.chance(500) && serving.len() >= 3 && !needed && self.group.is_up(spare) {
            self.down(spare, |_| true)?;
            self.serving.remove(&spare);
        }
        Ok(())
    }

    fn come_to_rest(&mut self) -> Result<(), Broken> {
        let before = self.users.ledger.borrow().acknowledged();
        self.until(SERVES, "somebody leads and acknowledges", |drive| {
            drive.leader().is_some() && drive.users.ledger.borrow().acknowledged() > before + 2
        })?;
        self.until(EQUAL, "what was ordered is done", |drive| {
            drive.users.orders.borrow().is_empty() && drive.orders_done == drive.users.done.borrow().len()
        })?;
        self.users.rest.set(true);
        let serving = self.serving.clone();
        self.until(EQUAL, "all replicas have applied the same", |drive| drive.are_level(&serving))?;
        let running = self.group.running.clone();
        for (id, replica) in running.borrow().iter().filter(|(id, _)| serving.contains(id)) {
            replica.look(|state| self.users.ledger.borrow().whole(*id, state))?;
            self.state_is_sound(*id, replica)?;
            self.trace.event(self.us(), "end", *id, replica.applied().borrow().index);
        }
        Ok(())
    }

    fn are_level(&self, serving: &BTreeSet<u64>) -> bool {
        let running = self.group.running.borrow();
        let known: BTreeSet<u64> =
            serving.iter().filter_map(|id| Some(running.get(id)?.applied().borrow().index)).collect();
        let all = serving.iter().all(|id| running.contains_key(id));
        all && known.len() == 1 && known.first() == Some(&self.checks.committed())
    }
}

/// The simulator's own failure: no evidence of anything.
fn harness(error: &dyn std::fmt::Display) -> Broken {
    Broken { invariant: "harness".to_owned(), detail: error.to_string() }
}
