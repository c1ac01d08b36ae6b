//! Derived indexes: what a job's records put into them, and how a change of a job keeps indexes, revisions and events
//! in step. Every change of a job, its task or its lease goes through [`State::change_job`].

use crate::apply::{Ctx, restore};
use crate::event::{Change, QueuePlace};
use crate::id::*;
use crate::record::*;
use crate::state::{Calendar, CalendarKind, Index, Kin, NameKind, QueueKey, State, Timer, TimerKind, Waiter};
use crate::view::{TaskView, task_view};

/// Where a job stands in the indexes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Standing {
    queue: Option<Waiter>,
    waiting: Option<TaskKey>,
    timer: Option<Timer>,
    begin: Option<Calendar>,
    deadline: Option<Calendar>,
    restoring: Option<(u64, JobId)>,
    sweeping: Option<JobId>,
    pacing: Option<JobId>,
}

/// What the keyspace shows of a job.
#[derive(PartialEq, Eq)]
struct Shown {
    standing: Standing,
    tenant: TenantId,
    task: TaskView,
    lease: Option<(Token, LeasePhase, Option<VerdictKind>, Option<Master>)>,
    result: bool,
    /// Jobs that it waits for.
    parents: Vec<JobId>,
    /// Arrays for whose tasks its own wait.
    peers: Vec<JobId>,
    /// It has not ended.
    live: bool,
    array: bool,
    /// Tasks of an array that have become jobs.
    begun: u32,
}

impl State {
    /// Runs `change` on one job's records, then brings indexes, revisions and events to what the records say.
    pub(crate) fn change_job<T>(
        &mut self,
        ctx: &mut Ctx<'_>,
        id: JobId,
        change: impl FnOnce(&mut State, &mut Ctx<'_>) -> T,
    ) -> T {
        let before = self.shown(id);
        let answer = change(self, ctx);
        let after = self.shown(id);
        self.move_parents(id, before.as_ref(), after.as_ref());
        let waits = |shown: &Option<Shown>| shown.as_ref().is_some_and(|shown| shown.standing.queue.is_some());
        let begun = |shown: &Option<Shown>| shown.as_ref().map_or(0, |shown| shown.begun);
        if !waits(&before) && after.as_ref().is_some_and(|shown| shown.standing.queue.is_some() && shown.array) {
            self.note_queued(id, ctx.rev);
        }
        if waits(&before) && (!waits(&after) || begun(&before) != begun(&after)) {
            self.drop_claims_of(id);
        }
        self.index.move_standing(
            before.as_ref().map(|shown| shown.standing).unwrap_or_default(),
            after.as_ref().map(|shown| shown.standing).unwrap_or_default(),
        );
        if let Some(after) = &after {
            self.tell_queue(ctx, before.as_ref(), after);
            self.tell_retry(ctx, id, before.as_ref(), after);
            self.tell_lease(ctx, before.as_ref(), after);
            self.tell_state(ctx, id, before.as_ref(), after);
            self.tell_result(ctx, id, before.as_ref(), after);
        }
        answer
    }

    /// Brings the index of parents and children to what the job says now.
    fn move_parents(&mut self, id: JobId, before: Option<&Shown>, after: Option<&Shown>) {
        let parents = |shown: Option<&Shown>| shown.map(|shown| shown.parents.clone()).unwrap_or_default();
        let (old, new) = (parents(before), parents(after));
        for parent in old.iter().filter(|parent| !new.contains(parent)) {
            self.index.dependants.remove(&(*parent, id));
            if !self.index.has_dependants(*parent) {
                self.index.ripe.remove(parent);
            }
        }
        for parent in new.iter().filter(|parent| !old.contains(parent)) {
            self.index.dependants.insert((*parent, id));
        }
        let peers = |shown: Option<&Shown>| shown.map(|shown| shown.peers.clone()).unwrap_or_default();
        let (old, new) = (peers(before), peers(after));
        if old != new {
            for parent in old {
                self.index.paced.remove(&(parent, id));
            }
            self.index.paced.extend(new.into_iter().map(|parent| (parent, id)));
        }
        let ends = before.is_some_and(|shown| shown.live) && after.is_some_and(|shown| !shown.live);
        if ends && self.index.has_dependants(id) {
            self.index.ripe.insert(id);
        }
    }

    fn shown(&self, id: JobId) -> Option<Shown> {
        let job = &self.jobs.get(&id)?.value;
        let task = self.tasks.get(&TaskKey::only(id)).map(|task| &task.value);
        let lease = task.and_then(|task| match task.phase {
            Phase::Leased { token } => self.leases.get(&token).map(|lease| {
                let lease = &lease.value;
                (token, lease.phase, lease.verdict.as_ref().map(|verdict| verdict.kind), lease.master)
            }),
            _ => None,
        });
        Some(Shown {
            standing: standing(id, job, task, &self.meta.settings),
            tenant: job.tenant,
            task: task_view(self, job, task),
            lease,
            result: task.is_some_and(|task| task.result.is_some()),
            parents: job.waits_for().map(|after| after.job).collect(),
            peers: job.peers().collect(),
            live: job.ended.is_none(),
            array: job.array().is_some(),
            begun: job.array().map_or(0, |(_, progress)| progress.begun),
        })
    }

    fn tell_queue(&self, ctx: &mut Ctx<'_>, before: Option<&Shown>, after: &Shown) {
        let old = before.and_then(|shown| shown.standing.queue);
        if old == after.standing.queue {
            return;
        }
        let place =
            |key: QueueKey| QueuePlace { tenant: key.tenant, priority: key.priority.0, seq: key.seq, task: key.task };
        if let Some(waiter) = old {
            ctx.tell(Change::Dequeued { place: place(waiter.key()) });
        }
        if let Some(waiter) = after.standing.queue {
            ctx.tell(Change::Queued { place: place(waiter.key()) });
        }
    }

    fn tell_retry(&self, ctx: &mut Ctx<'_>, id: JobId, before: Option<&Shown>, after: &Shown) {
        let old = before.and_then(|shown| shown.task.not_before_ms);
        match after.task.not_before_ms {
            new if new == old => {}
            Some(not_before_ms) => {
                ctx.tell(Change::RetrySet { task: TaskKey::only(id), attempt: after.task.attempt, not_before_ms });
            }
            None => ctx.tell(Change::RetryOver { task: TaskKey::only(id) }),
        }
    }

    fn tell_lease(&mut self, ctx: &mut Ctx<'_>, before: Option<&Shown>, after: &Shown) {
        let old = before.and_then(|shown| shown.lease);
        if old == after.lease {
            return;
        }
        let token_after = after.lease.map(|lease| lease.0);
        if let Some((token, ..)) = old.filter(|lease| Some(lease.0) != token_after) {
            ctx.tell(Change::LeaseClosed { token });
        }
        if let Some(token) = token_after {
            self.leases.update(&token, |lease| lease.bump(ctx.rev));
            if let Some(lease) = self.leases.get(&token) {
                ctx.tell(Change::LeaseShown { token, lease: Box::new(self.lease_view(&lease.value)) });
            }
        }
    }

    /// The revisions of `/state/ID` are the task's, and the job's as long as there is no task record.
    fn tell_state(&mut self, ctx: &mut Ctx<'_>, id: JobId, before: Option<&Shown>, after: &Shown) {
        if before.is_some_and(|shown| shown.task == after.task) {
            return;
        }
        if self.tasks.update(&TaskKey::only(id), |task| task.bump(ctx.rev)).is_none() {
            self.jobs.update(&id, |job| job.bump(ctx.rev));
        }
        ctx.tell(Change::TaskState { task: TaskKey::only(id), state: after.task.clone() });
    }

    fn tell_result(&self, ctx: &mut Ctx<'_>, id: JobId, before: Option<&Shown>, after: &Shown) {
        if before.is_some_and(|shown| shown.result) || !after.result {
            return;
        }
        if let Some(result) = self.tasks.get(&TaskKey::only(id)).and_then(|task| task.value.result.clone()) {
            ctx.tell(Change::ResultCommitted { task: TaskKey::only(id), result });
        }
    }

    /// Builds all indexes anew from the tables: after a load, which brings tables only.
    pub fn rebuild_indexes(&mut self) {
        self.index = self.indexes_of_tables();
    }

    pub(crate) fn indexes_of_tables(&self) -> Index {
        let mut index = Index::default();
        for (id, job) in self.jobs.iter() {
            let task = self.tasks.get(&TaskKey::only(*id)).map(|task| &task.value);
            index.move_standing(Standing::default(), standing(*id, &job.value, task, &self.meta.settings));
            index.paced.extend(job.value.peers().map(|parent| (parent, *id)));
            for parent in job.value.waits_for() {
                index.dependants.insert((parent.job, *id));
                if self.jobs.get(&parent.job).is_none_or(|parent| parent.value.ended.is_some()) {
                    index.ripe.insert(parent.job);
                }
            }
        }
        for (key, name) in self.names.iter() {
            let (kind, id) = match key {
                NameKey::User(id) => (NameKind::User, id.0),
                NameKey::GpuType(id) => (NameKind::GpuType, u32::from(id.0)),
            };
            index.names.insert((kind, name.clone()), id);
        }
        for (id, tenant) in self.tenants.iter().filter(|(_, tenant)| !tenant.removed) {
            index.tenant_by_name.insert(tenant.name.clone(), *id);
        }
        for (id, node) in self.nodes.iter() {
            index.node_by_name.insert(node.value.name.clone(), *id);
            if let Some(timer) = node.value.admin.timer(*id) {
                index.timers.insert(timer);
            }
            for gpu in node.value.gpus.iter().filter(|gpu| gpu.is_present()) {
                index.gpus.insert(gpu.uuid, *id);
            }
        }
        for (id, alloc) in self.allocs.iter() {
            for orphan in &alloc.orphans {
                index.orphans.insert((orphan.job, *id, orphan.token));
            }
        }
        for (task, claim) in self.claims.iter() {
            index.timers.insert(claim.timer(*task));
            index.claims.extend(claim.parts.iter().map(|part| (part.node, *task)));
        }
        for (id, reservation) in self.reservations.iter() {
            index.enter_reservation(*id, reservation);
        }
        for (user, runs) in self.runs.iter() {
            index.learned.insert((runs.clock_ms, *user));
        }
        for (id, class) in self.classes.iter() {
            index.class_by_facts.insert(class.clone(), *id);
        }
        for (id, request) in self.requests.iter() {
            index.requests.insert((request.bucket, *id));
        }
        index
    }
}

fn standing(id: JobId, job: &Job, task: Option<&Task>, settings: &crate::settings::Settings) -> Standing {
    let task_key = TaskKey::only(id);
    let mut standing = Standing::default();
    if let Some(end) = &job.ended {
        // An array leaves memory behind its tasks, which share its body.
        let last = u64::from(job.array().is_some());
        let due_ms = end.clock_ms.saturating_add(settings.linger_ms).saturating_add(last);
        standing.timer = Some(Timer { due_ms, what: TimerKind::Archive(id) });
        return standing;
    }
    if job.holds.begin {
        standing.begin = Some(Calendar { due_wall_ms: job.spec.begin_wall_ms(), what: CalendarKind::Begin(id) });
    }
    if job.holds.restore {
        standing.restoring = Some((restore::span_ms(job), id));
    }
    let leased = matches!(task.map(|task| &task.phase), Some(Phase::Leased { .. }));
    let array = job.array();
    standing.sweeping = array.and_then(|(_, progress)| progress.sweep).map(|_| id);
    standing.pacing = array.and_then(|(_, progress)| progress.paced).filter(|paced| paced.due).map(|_| id);
    let all_begun = array.is_some_and(|(array, progress)| progress.left(array) == 0);
    if let Some(due_wall_ms) = job.spec.latest_start_wall_ms().filter(|_| !leased && !all_begun) {
        standing.deadline = Some(Calendar { due_wall_ms, what: CalendarKind::Deadline(id) });
    }
    match task.map_or(&Phase::Pending, |task| &task.phase) {
        // Its last tasks are under way.
        Phase::Pending if all_begun => {}
        Phase::Pending if job.holds.any() || job.stop().is_some() => standing.waiting = Some(task_key),
        Phase::Pending if array.is_some_and(|(array, progress)| progress.room(array, settings) == 0) => {
            standing.waiting = Some(task_key);
        }
        Phase::Pending => {
            standing.queue = Some(Waiter { kin: Kin::of(job, task), seq: job.seq, job: id });
        }
        Phase::Retrying { not_before_ms } => {
            standing.timer = Some(Timer { due_ms: *not_before_ms, what: TimerKind::Retry(task_key) });
        }
        Phase::Leased { .. } | Phase::Ended { .. } => {}
    }
    standing
}

impl Index {
    fn has_dependants(&self, parent: JobId) -> bool {
        self.dependants.range((parent, JobId(0))..).next().is_some_and(|pair| pair.0 == parent)
    }

    fn move_standing(&mut self, old: Standing, new: Standing) {
        if old == new {
            return;
        }
        if let Some(waiter) = old.queue {
            self.dequeue(&waiter);
        }
        if let Some(task) = old.waiting {
            self.waiting.remove(&task);
        }
        if let Some(timer) = old.timer {
            self.timers.remove(&timer);
        }
        for rule in [old.begin, old.deadline].into_iter().flatten() {
            self.calendar.remove(&rule);
        }
        for rule in [new.begin, new.deadline].into_iter().flatten() {
            self.calendar.insert(rule);
        }
        if let Some(held) = old.restoring {
            self.restoring.remove(&held);
        }
        if let Some(array) = old.sweeping {
            self.sweeping.remove(&array);
        }
        if let Some(array) = new.sweeping {
            self.sweeping.insert(array);
        }
        if let Some(array) = old.pacing {
            self.pacing.remove(&array);
        }
        if let Some(array) = new.pacing {
            self.pacing.insert(array);
        }
        if let Some(held) = new.restoring {
            self.restoring.insert(held);
        }
        if let Some(waiter) = new.queue {
            self.enqueue(waiter);
        }
        if let Some(task) = new.waiting {
            self.waiting.insert(task);
        }
        if let Some(timer) = new.timer {
            self.timers.insert(timer);
        }
    }
}
