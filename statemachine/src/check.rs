//! The invariants that live in one state, by the names that the checkers of whole histories use too.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::*;
use crate::preemption::mask_of;
use crate::record::*;
use crate::runs::USERS;
use crate::state::State;

/// A broken invariant: a bug, never a client's doing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{invariant} is broken: {detail}")]
pub struct Violation {
    pub invariant: &'static str,
    pub detail: String,
}

fn must(holds: bool, invariant: &'static str, detail: impl FnOnce() -> String) -> Result<(), Violation> {
    if holds { Ok(()) } else { Err(Violation { invariant, detail: detail() }) }
}

impl State {
    /// Checks the whole state; cost grows with its size.
    pub fn check(&self) -> Result<(), Violation> {
        for (id, _) in self.jobs.iter() {
            self.check_job(*id)?;
        }
        for (id, _) in self.nodes.iter() {
            self.check_node(*id)?;
        }
        for (token, lease) in self.leases.iter() {
            self.check_lease(*token, &lease.value)?;
        }
        self.check_strays()?;
        self.check_open_tasks()?;
        self.check_tenants()?;
        self.check_claims()?;
        self.check_reservations()?;
        let wrong = self.meta.settings.planning.wrong();
        must(wrong.is_empty(), "policy_in_bounds", || wrong.join("; "))?;
        must(self.runs.len() <= USERS, "runs_bounded", || format!("run times of {} users are kept", self.runs.len()))?;
        for (user, runs) in self.runs.iter() {
            must(runs.is_bounded(), "runs_bounded", || format!("user {user} has {runs:?}"))?;
        }
        self.check_requests()?;
        self.check_locks()?;
        must(self.index == self.indexes_of_tables(), "queue_iff_pending", || {
            "an index differs from the one that the tables give".into()
        })
    }

    pub(crate) fn check_job(&self, id: JobId) -> Result<(), Violation> {
        let Some(job) = self.jobs.get(&id) else { return Ok(()) };
        let task = self.tasks.get(&TaskKey::only(id)).map(|task| &task.value);
        must(id.0 < self.meta.next_job, "nothing_lost", || format!("job {id} is above the counter"))?;
        must(self.body(id).is_some(), "nothing_lost", || format!("job {id} has no body"))?;
        let ended = matches!(task.map(|task| &task.phase), Some(Phase::Ended { .. }));
        must(ended == job.value.ended.is_some(), "result_once", || format!("job {id} and its task differ on the end"))?;
        let orphan = job.value.holds.orphan == self.has_orphan(id) || ended;
        let after = (job.value.unmet != 0) == job.value.holds.after;
        must(after, "queue_iff_pending", || format!("job {id} waits for parents {:b}", job.value.unmet))?;
        must(job.value.waits_for().all(|after| after.job < id), "queue_iff_pending", || {
            format!("job {id} waits for a job that is not older")
        })?;
        must(orphan, "queue_iff_pending", || format!("job {id} is on hold for an orphan that is not there"))?;
        self.check_array(id, &job.value)?;
        task.map_or(Ok(()), |task| self.check_task(id, &job.value, task))
    }

    /// An array's numbers add up, and a task is what its array says it is.
    fn check_array(&self, id: JobId, job: &Job) -> Result<(), Violation> {
        if let Some((array, progress)) = job.array() {
            let ended = progress.ended.iter().fold(0u32, |sum, count| sum.saturating_add(*count));
            let sum = ended.saturating_add(progress.open).saturating_add(progress.left(array));
            must(sum == array.tasks(), "array_counts", || format!("array {id} counts {progress:?}"))?;
            if let Some(paced) = progress.paced {
                let freed = (progress.begun..=array.tasks()).contains(&paced.freed);
                must(freed || progress.rest.is_some(), "array_counts", || {
                    format!("array {id} freed {paced:?} of {progress:?}")
                })?;
            }
            let most = array.most_open(&self.meta.settings);
            return must(progress.open <= most, "array_throttle", || {
                format!("array {id} has {} tasks under way, its limit is {most}", progress.open)
            });
        }
        let Some(element) = job.element() else { return Ok(()) };
        let array = self.jobs.get(&element.array).and_then(|array| array.value.array());
        let nth = array.and_then(|(array, _)| array.nth_of(element.index));
        let begun = nth.zip(array).is_some_and(|(nth, (_, progress))| nth < progress.begun);
        must(begun && nth.map(|nth| element.array.nth_task(nth)) == Some(id), "array_counts", || {
            format!("job {id} is not task {} of array {}", element.index, element.array)
        })
    }

    fn check_task(&self, id: JobId, job: &Job, task: &Task) -> Result<(), Violation> {
        match &task.phase {
            Phase::Leased { token } => {
                let held = self.leases.get(token).is_some_and(|lease| lease.value.task == TaskKey::only(id));
                must(held, "lease_iff_running", || format!("job {id} names lease {token}, which is not its own"))?;
                let fence = task.fence.as_ref().map(|fence| fence.value);
                must(fence == Some(*token), "token_grows", || {
                    format!("job {id} runs {token}, its fence is {fence:?}")
                })?;
            }
            Phase::Ended { outcome } => {
                let result = task.result.as_ref();
                let fits = result.is_some_and(|result| result.outcome == *outcome);
                must(fits, "result_once", || format!("job {id} ended {outcome:?}, its result is {result:?}"))?;
            }
            Phase::Pending | Phase::Retrying { .. } => {}
        }
        let live = !matches!(task.phase, Phase::Ended { .. });
        must(!live || task.result.is_none(), "result_once", || format!("job {id} has a result and goes on"))?;
        let token = task.result.as_ref().and_then(|result| result.token);
        let last = task.fence.as_ref().map(|fence| fence.value);
        must(token.is_none() || token == last, "result_once", || {
            format!("job {id} has a result of {token:?}, its last token is {last:?}")
        })?;
        let used = &task.used;
        let counts = [used.retries, used.lost, used.launch, used.gpu_fault, used.preempted, used.timeout];
        let charged: u32 = counts.into_iter().map(u32::from).sum();
        must(task.attempt <= charged.saturating_add(1), "retries_bounded", || {
            format!("job {id} had {} attempts, charged were {charged}", task.attempt)
        })?;
        let made_room = task.displaced.saturating_add(task.had.given);
        must(made_room <= used.preempted, "preemptions_bounded", || {
            format!("job {id} made room {made_room} times, was preempted {} times", used.preempted)
        })?;
        must(used.retries <= job.spec.retry.max, "retries_bounded", || {
            format!("job {id} burnt {} retries of {}", used.retries, job.spec.retry.max)
        })
    }

    fn check_lease(&self, token: Token, lease: &Lease) -> Result<(), Violation> {
        let task = self.tasks.get(&lease.task).map(|task| &task.value);
        let named = task.is_some_and(|task| task.phase == Phase::Leased { token });
        must(named, "lease_iff_running", || format!("lease {token} is not its task's"))?;
        must(token <= self.meta.token, "token_grows", || format!("lease {token} is above the counter"))?;
        let spec = self.jobs.get(&lease.task.job).map(|job| &job.value.spec);
        let gpus = lease.parts.iter().map(|part| part.gpu_order.len()).sum();
        let shape = spec.and_then(|spec| spec.shape_of(lease.parts.len(), gpus));
        let shape = shape.as_deref();
        let whole = shape.is_some_and(|shape| {
            let ranks: u32 = lease.parts.iter().map(|part| u32::from(part.ranks)).sum();
            let equal = lease.parts.iter().all(|part| part.gpu_order.len() == shape.gpus_per_node() as usize);
            lease.parts.len() == usize::from(shape.nodes) && ranks == shape.ranks() && equal
        });
        must(whole, "gang_whole", || format!("lease {token} does not hold its whole gang"))?;
        // A machine may have registered since with other labels.
        let stands = |part: &Part| {
            let node = self.nodes.get(&part.node);
            node.is_some_and(|node| node.value.registered_clock_ms < lease.granted_ms)
        };
        let nodes = || lease.parts.iter().map(|part| part.node);
        let near = shape.is_none_or(|shape| self.are_near_enough(shape, nodes()));
        must(near || !lease.parts.iter().all(stands), "gang_together", || {
            format!("lease {token} is on nodes {:?}, its job requires {:?}", nodes(), shape.and_then(|it| it.topology))
        })?;
        let allows = |part: &&Part| {
            let node = self.nodes.get(&part.node);
            shape.zip(node).is_none_or(|(shape, node)| shape.allows(&node.value))
        };
        let barred = lease.parts.iter().filter(|part| stands(part)).find(|part| !allows(part));
        must(barred.is_none(), "machine_allowed", || {
            let node = barred.map(|part| self.node_name(part.node));
            format!("lease {token} is on node {node:?}, which its job keeps out: {:?}", shape.map(|it| &it.machines))
        })?;
        let open = lease.parts.iter().any(|part| part.state != PartState::Released);
        must(open, "lease_iff_running", || format!("lease {token} has no part left and is not closed"))?;
        for part in &lease.parts {
            let epoch = self.nodes.get(&part.node).map(|node| node.value.epoch);
            must(epoch.is_some_and(|epoch| part.epoch <= epoch), "epoch_grows", || {
                format!("lease {token} has a part of epoch {} on node {} in {epoch:?}", part.epoch, part.node)
            })?;
            let listed = self.allocs.get(&part.node).is_some_and(|alloc| alloc.leases.contains(&token));
            must(listed == (part.state != PartState::Released), "gpu_in_one_lease", || {
                format!("lease {token}: node {} disagrees on its part", part.node)
            })?;
        }
        Ok(())
    }

    pub(crate) fn check_node(&self, id: NodeId) -> Result<(), Violation> {
        let Some(alloc) = self.allocs.get(&id) else {
            return must(!self.nodes.contains(&id), "gpu_in_one_lease", || format!("node {id} has no alloc"));
        };
        let counted = self.count_alloc(id, &alloc.leases, alloc.orphans.clone());
        must(counted.as_ref() == Some(alloc), "gpu_in_one_lease", || {
            format!("node {id} counts {alloc:?}, its leases give {counted:?}")
        })?;
        let mut taken = 0u128;
        let parts = alloc.leases.iter().filter_map(|token| self.leases.get(token)).flat_map(|lease| &lease.value.parts);
        for gpus in
            parts.filter(|part| part.node == id).map(|part| part.gpus).chain(alloc.orphans.iter().map(|o| o.gpus))
        {
            must(taken & gpus == 0, "gpu_in_one_lease", || format!("node {id} has GPUs {:b} twice", taken & gpus))?;
            taken |= gpus;
        }
        for (slot, token) in &alloc.holders {
            let Some(uuid) = self.gpu_uuid(id, *slot) else { continue };
            let fence = self.gpu_tokens.get(&uuid).map(|fence| fence.value);
            must(fence >= Some(*token), "token_grows", || {
                format!("node {id} slot {slot} is held by {token}, its fence is {fence:?}")
            })?;
        }
        Ok(())
    }

    fn check_strays(&self) -> Result<(), Violation> {
        for (key, _) in self.tasks.iter() {
            must(self.jobs.contains(&key.job), "nothing_lost", || format!("task of job {} has no job", key.job))?;
        }
        for (id, _) in self.bodies.iter() {
            must(self.jobs.contains(id), "nothing_lost", || format!("body of job {id} has no job"))?;
        }
        let mut gpus = BTreeSet::new();
        for (id, node) in self.nodes.iter() {
            for gpu in node.value.gpus.iter().filter(|gpu| gpu.is_present()) {
                must(gpus.insert(gpu.uuid), "gpu_in_one_lease", || {
                    format!("a GPU of node {id} is on another node too")
                })?;
            }
        }
        Ok(())
    }

    /// Of each array, those tasks are under way that are there and have not ended.
    fn check_open_tasks(&self) -> Result<(), Violation> {
        let mut open: BTreeMap<JobId, u32> = BTreeMap::new();
        for (_, job) in self.jobs.iter().filter(|(_, job)| job.value.ended.is_none()) {
            if let Some(element) = job.value.element() {
                *open.entry(element.array).or_default() += 1;
            }
        }
        for (id, job) in self.jobs.iter() {
            let Some((_, progress)) = job.value.array() else { continue };
            let counted = open.remove(id).unwrap_or_default();
            must(progress.open == counted, "array_counts", || {
                format!("array {id} has {counted} tasks under way, it counts {}", progress.open)
            })?;
        }
        Ok(())
    }

    fn check_tenants(&self) -> Result<(), Violation> {
        let mut counted: BTreeMap<TenantId, (u64, u64, u64)> = BTreeMap::new();
        let mut used: BTreeMap<TenantId, Amounts> = BTreeMap::new();
        for (id, job) in self.jobs.iter() {
            let entry = counted.entry(job.value.tenant).or_default();
            entry.0 += u64::from(job.value.ended.is_none());
            entry.1 += self.bodies.get(id).map_or(0, |body| u64::try_from(body.size()).unwrap_or(u64::MAX));
        }
        for (_, lease) in self.leases.iter() {
            let Some(job) = self.jobs.get(&lease.value.task.job) else { continue };
            counted.entry(job.value.tenant).or_default().2 += 1;
            for (tenant, _) in self.tenant_chain(job.value.tenant) {
                used.entry(tenant).or_default().add(&lease.value.amounts);
            }
        }
        for (id, tenant) in self.tenants.iter() {
            let has = (tenant.live_jobs, tenant.body_bytes, tenant.leases);
            let should = counted.remove(id).unwrap_or_default();
            must(has == should, "quota_holds", || {
                format!("tenant {id} counts (jobs, bytes, leases) {has:?}, its jobs give {should:?}")
            })?;
            let should = used.remove(id).unwrap_or_default();
            must(tenant.used == should, "quota_holds", || {
                format!("tenant {id} uses {:?}, its leases give {should:?}", tenant.used)
            })?;
            let hit = tenant.over(*id);
            must(hit.is_none(), "quota_holds", || format!("tenant {id} was let over a bound: {hit:?}"))?;
            must(self.tenant_chain(*id).last().is_some_and(|(_, top)| top.parent.is_none()), "quota_holds", || {
                format!("tenant {id} stands in a ring or too deep")
            })?;
        }
        Ok(())
    }

    /// What is kept for a task is free or drains, is kept for nobody else, and the task waits.
    fn check_claims(&self) -> Result<(), Violation> {
        let mut kept: BTreeMap<NodeId, u128> = BTreeMap::new();
        let waiting: BTreeSet<JobId> = match self.claims.is_empty() {
            true => BTreeSet::new(),
            false => self.index.queue.keys().map(|key| key.task.job).collect(),
        };
        for (task, claim) in self.claims.iter() {
            let waits = waiting.contains(&task.job) && self.task_to_start(task.job, 0) == Some(*task);
            must(waits, "claim_kept", || format!("job {} has a claim and does not wait", task.job))?;
            for part in &claim.parts {
                let mask = mask_of(part);
                let before = kept.entry(part.node).or_default();
                must(*before & mask == 0, "claim_kept", || {
                    format!("node {} has GPUs {:b} kept for two tasks", part.node, *before & mask)
                })?;
                *before |= mask;
                let holders = self.allocs.get(&part.node).map(|alloc| alloc.holders.clone()).unwrap_or_default();
                for token in part.gpu_order.iter().filter_map(|slot| holders.get(slot)) {
                    let drains = self.leases.get(token).is_some_and(|lease| lease.value.verdict.is_some());
                    must(drains, "claim_kept", || {
                        format!("node {} has GPUs that are kept for job {} in lease {token}", part.node, task.job)
                    })?;
                }
            }
        }
        Ok(())
    }

    /// A machine is set aside once at a time, and since a window began nothing started there but what it is for.
    fn check_reservations(&self) -> Result<(), Violation> {
        for (id, reservation) in self.reservations.iter() {
            for node in &reservation.nodes {
                let clash =
                    self.reserved_on(*node).find(|(other, record)| *other > *id && record.overlaps(reservation));
                must(clash.is_none(), "reservation_kept", || {
                    let other = clash.map(|(_, record)| record.name.as_str());
                    format!("{:?} and {other:?} set node {node} aside at one time", reservation.name)
                })?;
                let Some(begun) = reservation.begun else { continue };
                let leases = self.allocs.get(node).map(|alloc| alloc.leases.as_slice()).unwrap_or_default();
                for token in leases.iter().filter(|token| **token > begun) {
                    let job = self.leases.get(token).and_then(|lease| self.jobs.get(&lease.value.task.job));
                    let may = job.is_some_and(|job| job.value.spec.reservation() == reservation.name);
                    must(may, "reservation_kept", || {
                        format!("lease {token} started on node {node}, which {:?} sets aside", reservation.name)
                    })?;
                }
            }
        }
        Ok(())
    }

    fn check_requests(&self) -> Result<(), Violation> {
        let mut seen = BTreeSet::new();
        for (id, job) in self.jobs.iter() {
            let Some(request) = job.value.request else { continue };
            must(seen.insert(request), "request_once", || format!("job {id} shares its request id"))?;
            let live = job.value.ended.is_none();
            let known = self.requests.get(&request).map(|request| request.reply);
            let fits = known == Some(StoredReply::Job(*id)) || (!live && known.is_none());
            must(fits, "request_once", || format!("job {id}: its request id stands for {known:?}"))?;
        }
        Ok(())
    }

    fn check_locks(&self) -> Result<(), Violation> {
        for (name, lock) in self.locks.iter() {
            let held = lock.value.holder.map(|holder| holder.session);
            must(held.is_some(), "lock_held", || format!("lock {name:?} is kept without a holder"))?;
            for session in held.iter().chain(&lock.value.waiters) {
                let live = self.sessions.get(session).is_some_and(|session| session.locks.contains(name));
                must(live, "lock_held", || format!("lock {name:?} names session {session}, which does not name it"))?;
            }
        }
        Ok(())
    }
}

#[cfg(debug_assertions)]
pub(crate) use debug::Touched;

/// What debug builds check after each command.
#[cfg(debug_assertions)]
mod debug {
    use super::*;
    use crate::event::Change;

    /// Entries between two checks of the whole state.
    const WHOLE: u64 = 1_000;

    #[derive(Default)]
    pub(crate) struct Touched {
        jobs: BTreeSet<JobId>,
        nodes: BTreeSet<NodeId>,
        tokens: BTreeSet<Token>,
    }

    impl Touched {
        pub(crate) fn by(changes: &[Change]) -> Self {
            let mut touched = Self::default();
            for change in changes {
                match change {
                    Change::TaskState { task, .. } => {
                        touched.jobs.insert(task.job);
                    }
                    Change::LeaseShown { token, lease } => {
                        touched.tokens.insert(*token);
                        touched.nodes.extend(lease.parts.iter().map(|part| part.node));
                    }
                    Change::NodeShown { node, .. } => {
                        touched.nodes.insert(*node);
                    }
                    _ => {}
                }
            }
            touched
        }
    }

    impl State {
        pub(crate) fn assert_touched(&self, touched: &Touched) {
            let jobs = touched.jobs.iter().try_for_each(|id| self.check_job(*id));
            let nodes = touched.nodes.iter().try_for_each(|id| self.check_node(*id));
            let mut leases = touched.tokens.iter().filter_map(|token| Some((*token, self.leases.get(token)?)));
            let leases = leases.try_for_each(|(token, lease)| self.check_lease(token, &lease.value));
            if let Err(violation) = jobs.and(nodes).and(leases) {
                panic!("{violation}");
            }
        }

        pub(crate) fn check_now_and_then(&self) {
            if self.meta.applied.index % WHOLE == WHOLE - 1
                && let Err(violation) = self.check()
            {
                panic!("{violation}");
            }
        }
    }
}
