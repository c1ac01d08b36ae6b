//! RegisterNode: a machine joins, or its agent is new: another epoch, the machine's facts, and what became of the
//! parts that the state knows there.
//!
//! | a part of this node is | then |
//! |---|---|
//! | listed running | kept, in the new epoch |
//! | listed finished | as a report of its exits and release |
//! | listed dead, or the machine has booted since | released; LOST unless all ranks had exited |
//! | not listed, only Held, same fence file | kept for the new agent, which may still start it |
//! | anything else | LOST, its GPUs taken until silence or an operator frees them |
//!
//! A running attempt without a live lease here is an orphan: its GPUs stay taken and its job on hold until it is gone.
//!
//! Refuses INVALID_SPEC, LIMIT, IDENTITY_CONFLICT (the name is another machine's, or a GPU is leased on another node), EPOCH_STALE (it
//! was written before the newest registration: a late one, of an earlier boot perhaps, would free what runs).

use std::collections::{BTreeMap, BTreeSet};

use super::submit::is_slug;
use super::{Ctx, report, restore};
use crate::command::*;
use crate::fit::{MAX_GPUS, cores_of};
use crate::id::*;
use crate::lease::Ruling;
use crate::record::*;
use crate::state::State;

/// NUMA domains of one machine.
const NUMA_DOMAINS: usize = 64;
const NICS: usize = 64;
/// Attempts that one registration may list, each way.
const LISTED: usize = 4_096;
const ADDRESS_BYTES: usize = 256;

pub(super) fn apply(state: &mut State, ctx: &mut Ctx<'_>, register: &RegisterNode) -> Result<Reply, Rejection> {
    check_fields(register)?;
    check_lists(register)?;
    state.gpu_types_left(register.gpus.iter().map(|gpu| gpu.gpu_type.as_str()))?;
    let known = state.index.node_by_name.get(&register.name).copied();
    check_identity(state, register, known)?;
    check_gpus_elsewhere(state, register, known)?;
    check_epoch(state, register)?;
    let slots = Slots::of(state, register, known)?;
    let class = slots.class(&register.class);
    check_limits(state, register, known, &class)?;

    state.meta.token = state.meta.token.max(register.max_token);
    take_gpus_over(state, ctx, register, known);
    let class = intern_class(state, class);
    let (id, booted) = write_node(state, register, known, class, slots, ctx.rev);
    reconcile(state, ctx, register, id, booted);
    find_orphans(state, ctx, register, id);
    state.show_node(ctx, id);
    let epoch = state.nodes.get(&id).map_or(0, |node| node.value.epoch);
    Ok(Reply::Registered { node: id, epoch })
}

// --------------------------------------------------------------------------------------------------------- checks

fn check_fields(register: &RegisterNode) -> Result<(), Rejection> {
    let wrong = |detail: String| Err(Rejection::new(Code::InvalidSpec, detail));
    let name = &register.name;
    if name.is_empty() || name.len() > 128 || name.contains('/') || name.chars().any(char::is_control) {
        return wrong(format!("name has {} bytes, must have 1 to 128, without '/' and control characters", name.len()));
    }
    let texts = [("address", &register.address), ("host", &register.host), ("version", &register.version)];
    if let Some((field, text)) = texts.into_iter().find(|(_, text)| text.len() > ADDRESS_BYTES) {
        return wrong(format!("{field} has {} bytes, the limit is {ADDRESS_BYTES}", text.len()));
    }
    let domains = register.cores_by_numa.len();
    if domains == 0 || domains > NUMA_DOMAINS || cores_of(&register.cores_by_numa) == 0 {
        return wrong(format!("cores_by_numa names {domains} domains, must be 1 to {NUMA_DOMAINS} with a core"));
    }
    if register.gpus.len() > MAX_GPUS {
        return wrong(format!("gpus has {} entries, the limit is {MAX_GPUS}", register.gpus.len()));
    }
    let mut seen = BTreeSet::new();
    for (place, gpu) in register.gpus.iter().enumerate() {
        if !seen.insert(gpu.uuid) {
            return wrong(format!("gpus[{place}] has the UUID of a GPU before it"));
        }
        if !is_slug(&gpu.gpu_type) {
            return wrong(format!("gpus[{place}].gpu_type must be 1 to 64 of a-z 0-9 . _ -"));
        }
        if usize::from(gpu.numa) >= domains {
            return wrong(format!("gpus[{place}].numa is {}, the node has {domains} domains", gpu.numa));
        }
    }
    if register.labels.len() > 32 || register.labels.iter().any(|(key, value)| key.len() > 128 || value.len() > 128) {
        return wrong("labels: at most 32, of at most 128 bytes".into());
    }
    if register.max_token.next().is_none() {
        return wrong(format!("max_token is {}, the last of its generation", register.max_token));
    }
    check_class(&register.class, register.gpus.len())
}

fn check_class(class: &Class, gpus: usize) -> Result<(), Rejection> {
    let wrong = |detail: String| Err(Rejection::new(Code::InvalidSpec, detail));
    if usize::from(class.gpus) != gpus {
        return wrong(format!("class.gpus is {}, gpus has {gpus} entries", class.gpus));
    }
    for (field, len, must) in [
        ("nvlinks", class.nvlinks.len(), gpus * gpus),
        ("pci", class.pci.len(), gpus * gpus),
        ("numa", class.numa.len(), gpus),
    ] {
        if len != must {
            return wrong(format!("class.{field} has {len} entries, must have {must}"));
        }
    }
    if class.nics.len() > NICS {
        return wrong(format!("class.nics has {} entries, the limit is {NICS}", class.nics.len()));
    }
    match class.nics.iter().find(|nic| nic.class_to_gpu.len() != gpus || nic.name.len() > 64) {
        Some(nic) => {
            let len = nic.class_to_gpu.len();
            wrong(format!("class.nics: class_to_gpu has {len} entries, must have {gpus}; names have at most 64 bytes"))
        }
        None => Ok(()),
    }
}

fn check_lists(register: &RegisterNode) -> Result<(), Rejection> {
    let lists =
        [("running", register.running.len()), ("finished", register.finished.len()), ("dead", register.dead.len())];
    match lists.into_iter().find(|(_, len)| *len > LISTED) {
        Some((field, len)) => {
            Err(Rejection::new(Code::Limit, format!("{field} has {len} entries, the limit is {LISTED}")))
        }
        None => Ok(()),
    }
}

fn check_identity(state: &State, register: &RegisterNode, known: Option<NodeId>) -> Result<(), Rejection> {
    let Some(node) = known.and_then(|id| state.nodes.get(&id)) else { return Ok(()) };
    let leases = known.and_then(|id| state.allocs.get(&id)).map_or(0, |alloc| alloc.leases.len());
    if node.value.machine_id != register.machine_id && leases > 0 {
        let detail = format!("name {:?} is another machine's, which holds {leases} leases", register.name);
        return Err(Rejection::new(Code::IdentityConflict, detail));
    }
    Ok(())
}

/// A GPU that moved may be taken over, but not while something runs on it elsewhere.
fn check_gpus_elsewhere(state: &State, register: &RegisterNode, known: Option<NodeId>) -> Result<(), Rejection> {
    for (place, gpu) in register.gpus.iter().enumerate() {
        let Some((other, slot)) = elsewhere(state, gpu.uuid, known) else { continue };
        if state.allocs.get(&other).is_some_and(|alloc| alloc.free_gpus & (1 << slot) == 0) {
            let detail = format!("gpus[{place}] is leased on node {}", state.node_name(other));
            return Err(Rejection::new(Code::IdentityConflict, detail));
        }
    }
    Ok(())
}

fn check_epoch(state: &State, register: &RegisterNode) -> Result<(), Rejection> {
    let newest = state.node_epoch(&register.name);
    if newest != register.after_epoch {
        let (name, after) = (&register.name, register.after_epoch);
        let detail = format!("after_epoch is {after}, node {name:?} is in epoch {newest}: register after that one");
        return Err(Rejection::new(Code::EpochStale, detail));
    }
    Ok(())
}

fn elsewhere(state: &State, uuid: GpuUuid, known: Option<NodeId>) -> Option<(NodeId, usize)> {
    let other = *state.index.gpus.get(&uuid).filter(|other| Some(**other) != known)?;
    let slot = state.nodes.get(&other)?.value.gpus.iter().take(MAX_GPUS).position(|gpu| gpu.uuid == uuid)?;
    Some((other, slot))
}

fn check_limits(state: &State, register: &RegisterNode, known: Option<NodeId>, class: &Class) -> Result<(), Rejection> {
    let settings = &state.meta.settings;
    let limit = |detail: String| Err(Rejection::new(Code::Limit, detail));
    if known.is_none() && state.nodes.len() >= settings.nodes as usize {
        return limit(format!(
            "{} nodes are known, the limit is {}: {:?}",
            state.nodes.len(),
            settings.nodes,
            register.name
        ));
    }
    if !state.index.class_by_facts.contains_key(class) && state.classes.len() >= settings.classes as usize {
        return limit(format!("{} machine classes are known, the limit is {}", state.classes.len(), settings.classes));
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------------------- slots

/// Which slot each GPU has. Slots that something holds stay as they are, and then all others do too; a vanished GPU
/// keeps its slot as Gone. With nothing held, the slots are the list's order.
struct Slots {
    gpus: Vec<SlotGpu>,
}

/// The registration lists other GPUs than before, and a lease that drains elsewhere still names some of them.
fn renames_a_lease(state: &State, id: NodeId, register: &RegisterNode) -> bool {
    let old = state.nodes.get(&id).map(|node| node.value.gpus.as_slice()).unwrap_or_default();
    let kept = old.iter().map(|gpu| gpu.uuid).eq(register.gpus.iter().take(old.len()).map(|gpu| gpu.uuid));
    !kept && state.leases.iter().any(|(_, lease)| lease.value.parts.iter().any(|part| part.node == id))
}

/// A GPU of the registration by its place there, or one that vanished.
enum SlotGpu {
    Listed { place: usize, facts: GpuFacts, quarantine: Option<Gpu> },
    Gone(Gpu),
}

impl Slots {
    fn of(state: &State, register: &RegisterNode, known: Option<NodeId>) -> Result<Self, Rejection> {
        let node = known.and_then(|id| state.nodes.get(&id)).map(|node| &node.value);
        let old: &[Gpu] = node.map_or(&[], |node| &node.gpus);
        let alloc = known.and_then(|id| state.allocs.get(&id));
        let held = alloc.is_some_and(|alloc| !alloc.leases.is_empty())
            || known.is_some_and(|id| renames_a_lease(state, id, register));
        let same_boot = node.is_some_and(|node| node.boot_id == register.boot_id);
        let listed = |place: usize| {
            let facts = register.gpus[place].clone();
            // A quarantine outlives the agent; only the machine's boot or a health command ends it.
            let quarantine = old
                .iter()
                .find(|gpu| same_boot && gpu.uuid == facts.uuid && gpu.health == GpuHealth::Quarantined)
                .cloned();
            SlotGpu::Listed { place, facts, quarantine }
        };
        let place_of: BTreeMap<GpuUuid, usize> =
            register.gpus.iter().enumerate().map(|(place, gpu)| (gpu.uuid, place)).collect();
        if !held {
            return Ok(Self { gpus: (0..register.gpus.len()).map(listed).collect() });
        }
        let mut gpus: Vec<SlotGpu> = old
            .iter()
            .map(|gpu| place_of.get(&gpu.uuid).map_or_else(|| SlotGpu::Gone(gpu.clone()), |place| listed(*place)))
            .collect();
        let olds: BTreeSet<GpuUuid> = old.iter().map(|gpu| gpu.uuid).collect();
        gpus.extend((0..register.gpus.len()).filter(|place| !olds.contains(&register.gpus[*place].uuid)).map(listed));
        if gpus.len() > MAX_GPUS {
            let detail = format!("old and new GPUs need {} slots, the limit is {MAX_GPUS}", gpus.len());
            return Err(Rejection::new(Code::Limit, detail));
        }
        Ok(Self { gpus })
    }

    /// The link facts in the order of the slots; a vanished GPU has no links.
    fn class(&self, listed: &Class) -> Class {
        let places: Vec<Option<usize>> = self
            .gpus
            .iter()
            .map(|gpu| match gpu {
                SlotGpu::Listed { place, .. } => Some(*place),
                SlotGpu::Gone(_) => None,
            })
            .collect();
        let count = usize::from(listed.gpus);
        if places.iter().enumerate().all(|(slot, place)| *place == Some(slot)) {
            return listed.clone();
        }
        let pairs = || places.iter().flat_map(|row| places.iter().map(move |column| (*row, *column)));
        let cell = |pair: (Option<usize>, Option<usize>)| Some(pair.0? * count + pair.1?);
        let pick = |place: Option<usize>, of: &[PciClass]| {
            place.and_then(|place| of.get(place)).copied().unwrap_or(PciClass::Sys)
        };
        Class {
            gpus: u8::try_from(self.gpus.len()).unwrap_or(u8::MAX),
            nvlinks: pairs()
                .map(|pair| cell(pair).and_then(|at| listed.nvlinks.get(at)).copied().unwrap_or(0))
                .collect(),
            pci: pairs().map(|pair| pick(cell(pair), &listed.pci)).collect(),
            numa: places
                .iter()
                .map(|place| place.and_then(|place| listed.numa.get(place)).copied().unwrap_or(0))
                .collect(),
            nics: listed
                .nics
                .iter()
                .map(|nic| Nic {
                    class_to_gpu: places.iter().map(|place| pick(*place, &nic.class_to_gpu)).collect(),
                    ..nic.clone()
                })
                .collect(),
            ..listed.clone()
        }
    }

    fn records(self, state: &mut State, domains: usize) -> Vec<Gpu> {
        let records = self.gpus.into_iter().map(|gpu| match gpu {
            SlotGpu::Gone(gpu) => Gpu {
                health: GpuHealth::Gone,
                reason: "its UUID vanished".into(),
                numa: if usize::from(gpu.numa) < domains { gpu.numa } else { 0 },
                ..gpu
            },
            SlotGpu::Listed { facts, quarantine, .. } => Gpu {
                uuid: facts.uuid,
                gpu_type: state.intern_gpu_type(&facts.gpu_type),
                mem_mib: facts.mem_mib,
                numa: facts.numa,
                health: quarantine.as_ref().map_or(facts.health, |old| old.health),
                reason: crate::lease::clip(quarantine.as_ref().map_or(&facts.reason, |old| &old.reason)),
                xid: quarantine.as_ref().map_or(0, |old| old.xid),
            },
        });
        records.collect()
    }
}

// --------------------------------------------------------------------------------------------------------- changes

/// GPUs that are registered here now are Gone where they were.
fn take_gpus_over(state: &mut State, ctx: &mut Ctx<'_>, register: &RegisterNode, known: Option<NodeId>) {
    let mut left = BTreeSet::new();
    for gpu in &register.gpus {
        let Some((other, slot)) = elsewhere(state, gpu.uuid, known) else { continue };
        state.nodes.update(&other, |node| {
            if let Some(gpu) = node.value.gpus.get_mut(slot) {
                gpu.health = GpuHealth::Gone;
                gpu.reason = format!("registered by node {}", register.name);
            }
        });
        state.index.gpus.remove(&gpu.uuid);
        left.insert(other);
    }
    for other in left {
        state.show_node(ctx, other);
    }
}

fn intern_class(state: &mut State, class: Class) -> ClassId {
    if let Some(id) = state.index.class_by_facts.get(&class) {
        return *id;
    }
    let id = ClassId(state.meta.next_class);
    state.meta.next_class = state.meta.next_class.saturating_add(1);
    state.index.class_by_facts.insert(class.clone(), id);
    state.classes.insert(id, class);
    id
}

/// The node's record in its new epoch. Also says whether the machine has booted since the last registration.
fn write_node(
    state: &mut State,
    register: &RegisterNode,
    known: Option<NodeId>,
    class: ClassId,
    slots: Slots,
    rev: Revision,
) -> (NodeId, bool) {
    let id = known.unwrap_or(NodeId(state.meta.next_node));
    let old = state.nodes.get(&id).cloned();
    let booted = old.as_ref().is_some_and(|old| old.value.boot_id != register.boot_id);
    let gpus = slots.records(state, register.cores_by_numa.len());
    let node = Node {
        name: register.name.clone(),
        address: register.address.clone(),
        host: register.host.clone(),
        machine_id: register.machine_id,
        boot_id: register.boot_id,
        epoch: old.as_ref().map_or(0, |old| old.value.epoch).saturating_add(1),
        version: register.version.clone(),
        class,
        cores_by_numa: register.cores_by_numa.clone(),
        mem_mib: register.mem_mib,
        gpus,
        simulated: register.simulated,
        kill: register.kill,
        admin: old.as_ref().map_or(NodeAdmin::Ready, |old| restore::heard(old.value.admin.clone())),
        launch_fails: old.as_ref().filter(|_| !booted).map_or_else(Vec::new, |old| old.value.launch_fails.clone()),
        labels: register.labels.clone(),
        registered_clock_ms: state.meta.clock_ms,
    };
    for gpu in old.iter().flat_map(|old| &old.value.gpus) {
        if state.index.gpus.get(&gpu.uuid) == Some(&id) {
            state.index.gpus.remove(&gpu.uuid);
        }
    }
    for gpu in node.gpus.iter().filter(|gpu| gpu.is_present()) {
        state.index.gpus.insert(gpu.uuid, id);
    }
    match old {
        Some(old) => {
            state.nodes.insert(id, Versioned { value: node, ..old });
            state.recount(id);
        }
        None => {
            state.meta.next_node = id.0.saturating_add(1);
            state.index.node_by_name.insert(node.name.clone(), id);
            // `show_node` makes it version 1 of this revision.
            let new = Versioned { create_rev: rev, mod_rev: Revision(0), version: 0, value: node };
            state.nodes.insert(id, new);
            if let Some(alloc) = state.count_alloc(id, &[], Vec::new()) {
                state.allocs.insert(id, alloc);
            }
        }
    }
    (id, booted)
}

fn reconcile(state: &mut State, ctx: &mut Ctx<'_>, register: &RegisterNode, id: NodeId, booted: bool) {
    let running: BTreeMap<Token, bool> = register.running.iter().map(|part| (part.token, part.started)).collect();
    let finished: BTreeMap<Token, &[ReportExit]> =
        register.finished.iter().map(|part| (part.token, part.exits.as_slice())).collect();
    let dead: BTreeSet<Token> = register.dead.iter().copied().collect();
    let tokens = state.allocs.get(&id).map(|alloc| alloc.leases.clone()).unwrap_or_default();
    for token in tokens {
        let Some(job) = state.leases.get(&token).map(|lease| lease.value.task.job) else { continue };
        state.change_job(ctx, job, |state, ctx| {
            if let Some(started) = running.get(&token) {
                keep(state, token, id, *started);
            } else if let Some(exits) = finished.get(&token) {
                report::exited(state, ctx, token, id, exits);
                state.release_part(ctx, token, id);
            } else if booted || dead.contains(&token) {
                state.release_part(ctx, token, id);
            } else {
                leave_to_silence(state, ctx, token, id, register.fence_new);
            }
        });
    }
}

fn keep(state: &mut State, token: Token, node: NodeId, started: bool) {
    let Some(lease) = state.leases.get(&token) else { return };
    let Some(now) = lease.value.parts.iter().find(|part| part.node == node).map(|part| part.state) else { return };
    let barrier = lease.value.phase == LeasePhase::Prepare && lease.value.verdict.is_none();
    // An agent that says Started before the barrier opened is wrong about it; its part is kept as it was.
    let to = if started && !barrier { PartState::Started } else { now };
    report::advance_part(state, token, node, to);
}

/// The agent does not know the part: its processes, if there are any, end at their deadline. A part that never left
/// Held may still start, unless a new fence file can't say whether it did. It is the new agent's then, which is asked
/// for its life from now on: measured by the old agent's silence it could be freed while the new one starts it.
fn leave_to_silence(state: &mut State, ctx: &mut Ctx<'_>, token: Token, node: NodeId, fence_new: bool) {
    let Some(lease) = state.leases.get(&token) else { return };
    let Some(part) = lease.value.parts.iter().find(|part| part.node == node) else { return };
    if part.all_exited() {
        return;
    }
    if part.state == PartState::Held && !fence_new {
        return report::advance_part(state, token, node, PartState::Held);
    }
    let text = format!("{} registered without the attempt", state.node_name(node));
    // An older verdict stands.
    let _ = state.decide(ctx, token, Ruling::new(VerdictKind::Lost, text).on(node));
}

fn find_orphans(state: &mut State, ctx: &mut Ctx<'_>, register: &RegisterNode, id: NodeId) {
    let (Some(node), Some(alloc)) = (state.nodes.get(&id), state.allocs.get(&id)) else { return };
    let slot_of: BTreeMap<GpuUuid, usize> =
        node.value.gpus.iter().take(MAX_GPUS).enumerate().map(|(slot, gpu)| (gpu.uuid, slot)).collect();
    let held =
        alloc.holders.keys().filter(|slot| usize::from(**slot) < MAX_GPUS).fold(0u128, |mask, slot| mask | 1 << slot);
    let mut taken = held;
    let mut orphans: BTreeMap<Token, Orphan> = BTreeMap::new();
    for part in register.running.iter().filter(|part| alloc.leases.binary_search(&part.token).is_err()) {
        let slots = part.gpus.iter().filter_map(|uuid| slot_of.get(uuid));
        let gpus = slots.fold(0u128, |mask, slot| mask | 1 << slot) & !taken;
        taken |= gpus;
        orphans.entry(part.token).or_insert(Orphan { token: part.token, job: part.job, gpus });
    }
    state.set_orphans(ctx, id, orphans.into_values().collect());
}

impl State {
    /// Replaces the node's orphans; the jobs that gain or lose one are put on hold or let go.
    pub(crate) fn set_orphans(&mut self, ctx: &mut Ctx<'_>, node: NodeId, orphans: Vec<Orphan>) {
        let Some(alloc) = self.allocs.get(&node) else { return };
        let tokens = alloc.leases.clone();
        let mut jobs = BTreeSet::new();
        for old in alloc.orphans.clone() {
            self.index.orphans.remove(&(old.job, node, old.token));
            jobs.insert(old.job);
        }
        for new in &orphans {
            self.index.orphans.insert((new.job, node, new.token));
            jobs.insert(new.job);
        }
        if jobs.is_empty() {
            return;
        }
        if let Some(alloc) = self.count_alloc(node, &tokens, orphans) {
            self.allocs.insert(node, alloc);
        }
        for job in jobs {
            let hold = self.has_orphan(job);
            if self.jobs.get(&job).is_some_and(|job| job.value.ended.is_none() && job.value.holds.orphan != hold) {
                self.change_job(ctx, job, |state, _| {
                    state.jobs.update(&job, |job| job.value.holds.orphan = hold);
                });
            }
        }
    }

    pub(crate) fn has_orphan(&self, job: JobId) -> bool {
        let first = (job, NodeId(0), Token(0));
        self.index.orphans.range(first..).next().is_some_and(|orphan| orphan.0 == job)
    }
}
