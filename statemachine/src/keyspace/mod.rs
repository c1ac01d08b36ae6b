//! The etcd-equivalent keyspace: keys and JSON values, rendered from the records when they are read. Nothing here is
//! stored, and nothing can be written through it.
//!
//! | key | value | exists while |
//! |---|---|---|
//! | `/jobs/ID` | the spec, which never changes | the job is known |
//! | `/state/ID` | the shown state | the job is known |
//! | `/queue/pending/TENANT/PRIORITY/SEQ/ID` | the job | it may be placed |
//! | `/leases/TOKEN` | a lease | it is not closed |
//! | `/fencing/job/ID`, `/fencing/gpu/UUID` | the highest token granted | ... one was |
//! | `/topology/NODE` | a machine's facts and health | ... it registered once |
//! | `/locks/NAME` | holder and number of waiters | somebody holds it |
//! | `/results/ID` | the one result | the job ended and is known |
//! | `/retry/ID` | when the next attempt may start | RETRYING |
//!
//! A range and the events after its revision give the same as a later range: one key changes at most once a revision.
//! Two things are silent: an ended job that leaves memory (its keys stay, read from history), and the retention that
//! drops whole hours of history.

mod key;
mod value;

use std::iter::Peekable;
use std::ops::Bound;
use std::sync::Arc;

pub use key::Key;
use key::{Collection, numbers_with_prefix};

use crate::event::{Change, Event, QueuePlace};
use crate::id::*;
use crate::record::*;
use crate::state::{QueueKey, State, TimerKind};
use crate::view::task_view;

/// A key with its value and the revisions of its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kv {
    pub key: String,
    /// JSON.
    pub value: String,
    pub create_rev: Revision,
    pub mod_rev: Revision,
    /// Changes since the key was created; 1 for a new one.
    pub version: u32,
}

/// Reads the row of a job that left memory, from the image; `None` when it is not there.
pub type History<'a> = &'a dyn Fn(JobId) -> Option<Arc<HistoryRow>>;

/// The keys of one state. Without history it knows the jobs in memory and those on their way to the image.
#[derive(Clone, Copy)]
pub struct Keyspace<'a> {
    state: &'a State,
    history: Option<History<'a>>,
}

/// [`Keyspace::get`] without history.
pub fn get(state: &State, key: &str) -> Option<Kv> {
    Keyspace::new(state).get(key)
}

/// [`Keyspace::range`] without history.
pub fn range(state: &State, prefix: &str, limit: usize, after: Option<&str>) -> (Vec<Kv>, bool) {
    Keyspace::new(state).range(prefix, limit, after)
}

/// [`Keyspace::project`] without history.
pub fn project(event: &Event, state: &State) -> Vec<(String, Option<String>)> {
    Keyspace::new(state).project(event)
}

/// A job with what belongs to it, from memory or history.
enum Found<'a> {
    Live { job: &'a Versioned<Job>, body: Option<&'a Body>, task: Option<&'a Versioned<Task>> },
    Row(Arc<HistoryRow>),
}

impl Found<'_> {
    fn job(&self) -> &Versioned<Job> {
        match self {
            Found::Live { job, .. } => job,
            Found::Row(row) => &row.job,
        }
    }

    fn body(&self) -> Option<&Body> {
        match self {
            Found::Live { body, .. } => *body,
            Found::Row(row) => Some(&row.body),
        }
    }

    fn task(&self) -> Option<&Versioned<Task>> {
        match self {
            Found::Live { task, .. } => *task,
            Found::Row(row) => row.task.as_ref(),
        }
    }
}

impl<'a> Keyspace<'a> {
    pub fn new(state: &'a State) -> Self {
        Self { state, history: None }
    }

    pub fn with_history(state: &'a State, history: History<'a>) -> Self {
        Self { state, history: Some(history) }
    }

    pub fn get(&self, key: &str) -> Option<Kv> {
        self.kv(&Key::parse(key)?)
    }

    /// At most `limit` keys that begin with `prefix`, after the key `after`, and whether there are more. Folders come
    /// in the order of their names; in a folder numbers rise as numbers, and a tenant's queue stands as it is served.
    pub fn range(&self, prefix: &str, limit: usize, after: Option<&str>) -> (Vec<Kv>, bool) {
        let after = match after.map(Key::parse) {
            None => None,
            Some(Some(key)) => Some(key),
            // Nothing comes after what is no key.
            Some(None) => return (Vec::new(), false),
        };
        let from = after.as_ref().map(Key::collection);
        let mut found = Vec::new();
        for collection in Collection::ALL {
            let folder = collection.prefix();
            let meets = folder.starts_with(prefix) || prefix.starts_with(folder);
            if !meets || from.is_some_and(|from| collection < from) {
                continue;
            }
            let after = after.as_ref().filter(|after| after.collection() == collection);
            let rest = prefix.strip_prefix(folder).unwrap_or("");
            for key in self.keys(collection, rest, after) {
                let Some(kv) = self.kv(&key).filter(|kv| kv.key.starts_with(prefix)) else { continue };
                if found.len() >= limit {
                    return (found, true);
                }
                found.push(kv);
            }
        }
        (found, false)
    }

    /// What an event did to keys: the new value, or `None` for a key that is no more. The spec of a job that is not in
    /// this keyspace's reach is left out.
    pub fn project(&self, event: &Event) -> Vec<(String, Option<String>)> {
        let state = self.state;
        let one = |key: Key, value: Option<String>| vec![(key.to_string(), value)];
        match &event.what {
            Change::JobSubmitted { job } => {
                let value = self.find(*job).and_then(|found| self.job_value(*job, &found));
                value.map_or_else(Vec::new, |value| one(Key::Job(*job), Some(value)))
            }
            Change::TaskState { task, state } => one(Key::State(task.job), Some(value::state(task.job, state))),
            Change::Queued { place } => one(self.queue_key(place), Some(value::queue(place.task.job))),
            Change::Dequeued { place } => one(self.queue_key(place), None),
            Change::RetrySet { task, attempt, not_before_ms } => {
                one(Key::Retry(task.job), Some(value::retry(task.job, *attempt, *not_before_ms)))
            }
            Change::RetryOver { task } => one(Key::Retry(task.job), None),
            Change::LeaseShown { token, lease } => one(Key::Lease(*token), Some(value::lease(state, *token, lease))),
            Change::LeaseClosed { token } => one(Key::Lease(*token), None),
            Change::JobFenced { task, token } => one(Key::JobFence(task.job), Some(value::job_fence(task.job, *token))),
            Change::GpusFenced { token, gpus } => {
                gpus.iter().map(|gpu| (Key::GpuFence(*gpu).to_string(), Some(value::gpu_fence(*gpu, *token)))).collect()
            }
            Change::ResultCommitted { task, result } => {
                one(Key::Result(task.job), Some(value::result(task.job, result)))
            }
            Change::NodeShown { node, record } => {
                one(Key::Node(record.name.clone()), Some(value::node(state, *node, record)))
            }
            Change::LockShown { name, holder, waiters } => {
                one(Key::Lock(name.clone()), Some(value::lock(name, *holder, *waiters as usize)))
            }
            Change::LockFree { name } => one(Key::Lock(name.clone()), None),
        }
    }

    // ------------------------------------------------------------------------------------------------------ one key

    fn kv(&self, key: &Key) -> Option<Kv> {
        let state = self.state;
        let (value, life) = match key {
            Key::Job(id) => {
                let found = self.find(*id)?;
                (self.job_value(*id, &found)?, once(found.job().create_rev))
            }
            Key::State(id) => {
                let found = self.find(*id)?;
                let task = found.task();
                let view = task_view(state, &found.job().value, task.map(|task| &task.value));
                let life = task.map_or_else(|| life_of(found.job()), life_of);
                (value::state(*id, &view), life)
            }
            Key::Result(id) => {
                let found = self.find(*id)?;
                let result = found.task()?.value.result.as_ref()?;
                (value::result(*id, result), once(result.rev))
            }
            Key::JobFence(id) => {
                let found = self.find(*id)?;
                let fence = found.task()?.value.fence.as_ref()?;
                (value::job_fence(*id, fence.value), life_of(fence))
            }
            Key::Retry(id) => {
                let task = state.tasks.get(&TaskKey::only(*id))?;
                let Phase::Retrying { not_before_ms } = task.value.phase else { return None };
                // The state did not change since the task went to RETRYING.
                (value::retry(*id, task.value.attempt, not_before_ms), once(task.mod_rev))
            }
            Key::Queue { tenant, priority, seq, job } => self.queued(tenant, *priority, *seq, *job)?,
            Key::Lease(token) => {
                let lease = state.leases.get(token)?;
                (value::lease(state, *token, &state.lease_view(&lease.value)), life_of(lease))
            }
            Key::GpuFence(gpu) => {
                let fence = state.gpu_tokens.get(gpu)?;
                (value::gpu_fence(*gpu, fence.value), life_of(fence))
            }
            Key::Node(name) => {
                let id = state.index.node_by_name.get(name)?;
                let node = state.nodes.get(id)?;
                (value::node(state, *id, &node.value), life_of(node))
            }
            Key::Lock(name) => {
                let lock = state.locks.get(name)?;
                (value::lock(name, lock.value.holder, lock.value.waiters.len()), life_of(lock))
            }
        };
        let (create_rev, mod_rev, version) = life;
        Some(Kv { key: key.to_string(), value, create_rev, mod_rev, version })
    }

    fn find(&self, id: JobId) -> Option<Found<'a>> {
        if let Some(job) = self.state.jobs.get(&id) {
            return Some(Found::Live {
                job,
                body: self.state.body(id),
                task: self.state.tasks.get(&TaskKey::only(id)),
            });
        }
        // What retention dropped is gone, also where its row is still at hand.
        self.state.ended_job(id)?;
        let row = self.state.archived.get(&id).cloned();
        row.or_else(|| self.history.and_then(|history| history(id))).map(Found::Row)
    }

    fn job_value(&self, id: JobId, found: &Found<'_>) -> Option<String> {
        Some(value::job(self.state, id, &found.job().value, found.body()?))
    }

    fn queued(&self, tenant: &str, priority: i32, seq: u64, id: JobId) -> Option<(String, Life)> {
        let job = self.state.jobs.get(&id)?;
        let (tenant_id, queue) = (job.value.tenant, job.value.queue);
        let key =
            QueueKey { tenant: tenant_id, queue, priority: std::cmp::Reverse(priority), seq, task: TaskKey::only(id) };
        let named = self.state.tenants.get(&job.value.tenant).is_some_and(|owner| owner.name == tenant);
        if !named || !self.state.index.queue.contains_key(&key) {
            return None;
        }
        // The last change of a queued task's state is its way into the queue; of an array it may be the start of a task.
        let of_task = || self.state.tasks.get(&TaskKey::only(id)).map_or(job.mod_rev, |task| task.mod_rev);
        let mod_rev = job.value.array().map_or_else(of_task, |(_, progress)| progress.queued);
        Some((value::queue(id), once(mod_rev)))
    }

    fn queue_key(&self, place: &QueuePlace) -> Key {
        let tenant = self.state.tenants.get(&place.tenant).map_or("", |tenant| tenant.name.as_str());
        Key::queue(tenant, place)
    }

    // ------------------------------------------------------------------------------------------------------ folders

    /// Keys of a folder that may exist and whose text after the folder may begin with `rest`, in order.
    fn keys(&self, folder: Collection, rest: &str, after: Option<&Key>) -> Box<dyn Iterator<Item = Key> + 'a> {
        let state = self.state;
        match folder {
            Collection::Jobs => self.job_keys(rest, after, Key::Job),
            Collection::State => self.job_keys(rest, after, Key::State),
            Collection::Results => self.job_keys(rest, after, Key::Result),
            Collection::JobFences => self.job_keys(rest, after, Key::JobFence),
            Collection::Retry => self.retry_keys(after),
            Collection::Leases => {
                let last = number_after(after);
                let ranges = numbers_with_prefix(rest).into_iter();
                Box::new(ranges.flat_map(move |range| {
                    let tokens = bounds(range, last).map(|(from, to)| state.leases.range(Token(from)..=Token(to)));
                    tokens.into_iter().flatten().map(|(token, _)| Key::Lease(*token))
                }))
            }
            Collection::GpuFences => {
                let from = match after {
                    Some(Key::GpuFence(gpu)) => Bound::Excluded(*gpu),
                    _ => Bound::Unbounded,
                };
                Box::new(state.gpu_tokens.range((from, Bound::Unbounded)).map(|(gpu, _)| Key::GpuFence(*gpu)))
            }
            Collection::Topology => {
                let from = match after {
                    Some(Key::Node(name)) => Bound::Excluded(name.clone()),
                    _ => Bound::Included(rest.to_owned()),
                };
                let nodes = state.index.node_by_name.range((from, Bound::Unbounded));
                Box::new(nodes.map(|(name, _)| Key::Node(name.clone())))
            }
            Collection::Locks => {
                let from = match after {
                    Some(Key::Lock(name)) => Bound::Excluded(name.clone()),
                    _ => Bound::Included(rest.to_owned()),
                };
                Box::new(state.locks.range((from, Bound::Unbounded)).map(|(name, _)| Key::Lock(name.clone())))
            }
            Collection::Queue => self.queue_keys(after),
        }
    }

    fn job_keys(&self, rest: &str, after: Option<&Key>, make: fn(JobId) -> Key) -> Box<dyn Iterator<Item = Key> + 'a> {
        let (state, last) = (self.state, number_after(after));
        let ranges = numbers_with_prefix(rest).into_iter();
        Box::new(ranges.flat_map(move |range| {
            let ids = bounds(range, last).map(|(from, to)| job_ids(state, from, to));
            ids.into_iter().flatten().map(make)
        }))
    }

    fn retry_keys(&self, after: Option<&Key>) -> Box<dyn Iterator<Item = Key> + 'a> {
        let last = number_after(after);
        let mut ids: Vec<JobId> = self
            .state
            .index
            .timers
            .iter()
            .filter_map(|timer| match timer.what {
                TimerKind::Retry(task) => Some(task.job),
                TimerKind::Archive(_) | TimerKind::Evict(_) | TimerKind::Claim(_) => None,
            })
            .filter(|id| last.is_none_or(|last| id.0 > last))
            .collect();
        ids.sort_unstable();
        Box::new(ids.into_iter().map(Key::Retry))
    }

    fn queue_keys(&self, after: Option<&Key>) -> Box<dyn Iterator<Item = Key> + 'a> {
        let state = self.state;
        let from = match after {
            Some(Key::Queue { priority, seq, job, .. }) => {
                let of = self.find(*job).map(|found| (found.job().value.tenant, found.job().value.queue));
                let (tenant, queue) = of.unwrap_or((TenantId(0), QueueId(0)));
                let priority = std::cmp::Reverse(*priority);
                Bound::Excluded(QueueKey { tenant, queue, priority, seq: *seq, task: TaskKey::only(*job) })
            }
            _ => Bound::Unbounded,
        };
        let keys = state.index.queue.range((from, Bound::Unbounded));
        Box::new(keys.filter_map(move |(key, ())| {
            let tenant = state.jobs.get(&key.task.job).and_then(|job| state.tenants.get(&job.value.tenant))?;
            let (priority, seq, job) = (key.priority.0, key.seq, key.task.job);
            Some(Key::Queue { tenant: tenant.name.clone(), priority, seq, job })
        }))
    }
}

/// Created, last changed, changes.
type Life = (Revision, Revision, u32);

fn once(rev: Revision) -> Life {
    (rev, rev, 1)
}

fn life_of<T>(record: &Versioned<T>) -> Life {
    (record.create_rev, record.mod_rev, record.version)
}

fn number_after(after: Option<&Key>) -> Option<u64> {
    match after? {
        Key::Job(id) | Key::State(id) | Key::Result(id) | Key::JobFence(id) | Key::Retry(id) => Some(id.0),
        Key::Lease(token) => Some(token.0),
        Key::Queue { .. } | Key::GpuFence(_) | Key::Node(_) | Key::Lock(_) => None,
    }
}

/// The part of an inclusive range that lies after `last`.
fn bounds((from, to): (u64, u64), last: Option<u64>) -> Option<(u64, u64)> {
    let from = match last {
        Some(last) => from.max(last.checked_add(1)?),
        None => from,
    };
    (from <= to).then_some((from, to))
}

/// Jobs in memory and jobs that ended, in one rising order.
fn job_ids(state: &State, from: u64, to: u64) -> impl Iterator<Item = JobId> + '_ {
    let live = state.jobs.range(JobId(from)..=JobId(to)).map(|(id, _)| *id);
    let ended = state.ended.range(from >> 8..=to >> 8).flat_map(|(chunk, ended)| {
        let first = chunk << 8;
        ended.jobs.keys().map(move |place| JobId(first | u64::from(*place)))
    });
    let ended = ended.filter(move |id| (from..=to).contains(&id.0));
    Merged { left: live.peekable(), right: ended.peekable() }
}

struct Merged<L: Iterator, R: Iterator> {
    left: Peekable<L>,
    right: Peekable<R>,
}

impl<T: Ord, L: Iterator<Item = T>, R: Iterator<Item = T>> Iterator for Merged<L, R> {
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match (self.left.peek(), self.right.peek()) {
            (Some(left), Some(right)) if right < left => self.right.next(),
            (None, _) => self.right.next(),
            _ => self.left.next(),
        }
    }
}
