//! Jobs: submit and cancel through the door; reads and watches from this replica's state.

use std::collections::BTreeSet;
use std::future::ready;
use std::ops::Bound;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use proto::{error, reason, v1};
use scheduling::Outlook;
use scheduling::explain::Explainer;
use scheduling::plan::Cache;
use statemachine::command::Command;
use statemachine::record::{Phase, StoredReply};
use statemachine::state::TimerKind;
use statemachine::storage::{HistoryKey, Image};
use statemachine::{JobId, State, TaskKey, Token};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::history::Unread;
use super::why::as_of_now;
use super::{Api, requests, view};
use crate::replica::Applied;

/// Jobs of one page: by default, and at most (a job with its command is ~1 KiB; the message limit is 4 MiB).
const PAGE: usize = 1_000;
/// Bytes shown of a page that is none.
const SHOWN_OF_PAGE: usize = 64;
/// Updates of one job that a slow watcher may have pending.
const WATCH_BUFFER: usize = 4;
/// A watcher hears nothing more often than this.
const WATCH_PACE: Duration = Duration::from_millis(5);
/// What a watcher is told of a start may be so old.
const OUTLOOK_AGE: Duration = Duration::from_secs(2);

#[tonic::async_trait]
impl v1::jobs_server::Jobs for Api {
    async fn submit_job(&self, request: Request<v1::SubmitJobRequest>) -> Result<Response<v1::SubmitJobReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let user = requests::user(&request.user)?;
        let submit = requests::submit(request.job.unwrap_or_default())?;
        let committed = self.commit(Some(id), user, Command::SubmitJob(Box::new(submit))).await?;
        match committed.stored()? {
            StoredReply::Job(job) => Ok(Response::new(v1::SubmitJobReply {
                job_id: job.0,
                replayed: committed.replayed,
                revision: committed.revision,
            })),
            other => Err(Status::internal(format!("a submission was answered with {other:?}"))),
        }
    }

    async fn cancel_job(&self, request: Request<v1::CancelJobRequest>) -> Result<Response<v1::CancelJobReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let user = requests::user(&request.user)?;
        self.commit(Some(id), user, Command::Cancel { job: JobId(request.job_id) }).await?;
        Ok(Response::new(v1::CancelJobReply {}))
    }

    async fn hold_job(&self, request: Request<v1::SteerJobRequest>) -> Result<Response<v1::SteerJobReply>, Status> {
        self.steer(request, |job| Command::Hold { job }).await
    }

    async fn release_job(&self, request: Request<v1::SteerJobRequest>) -> Result<Response<v1::SteerJobReply>, Status> {
        self.steer(request, |job| Command::Release { job }).await
    }

    async fn requeue_job(&self, request: Request<v1::SteerJobRequest>) -> Result<Response<v1::SteerJobReply>, Status> {
        self.steer(request, |job| Command::Requeue { job }).await
    }

    async fn record_checkpoint(
        &self,
        request: Request<v1::RecordCheckpointRequest>,
    ) -> Result<Response<v1::RecordCheckpointReply>, Status> {
        self.admit(&request)?;
        let v1::RecordCheckpointRequest { request_id, token, path, step } = request.into_inner();
        let id = requests::request_id(&request_id)?;
        self.commit(Some(id), String::new(), Command::Checkpoint { token: Token(token), path, step }).await?;
        Ok(Response::new(v1::RecordCheckpointReply {}))
    }

    async fn get_job(&self, request: Request<v1::GetJobRequest>) -> Result<Response<v1::Job>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let state = as_of_now(self.read(request.read).await?);
        self.job(&state, JobId(request.job_id), Duration::ZERO).await.map(Response::new)
    }

    async fn why_job(&self, request: Request<v1::WhyJobRequest>) -> Result<Response<v1::Why>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let state = as_of_now(self.read(request.read).await?);
        let id = JobId(request.job_id);
        if state.jobs.get(&id).is_some_and(|job| job.value.ended.is_none()) {
            return self.why(state, id).await.map(Response::new);
        }
        let job = self.job(&state, id, OUTLOOK_AGE).await?;
        let (revision, now_unix_ms) = (state.meta.rev.0, state.meta.wall_ms);
        Ok(Response::new(v1::Why { job_id: job.id, state: job.state, revision, now_unix_ms, ..Default::default() }))
    }

    async fn preview_job(&self, request: Request<v1::SubmitJobRequest>) -> Result<Response<v1::Why>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let user = requests::user(&request.user)?;
        let submit = requests::submit(request.job.unwrap_or_default())?;
        let state = as_of_now(self.read(v1::ReadMode::Linearizable as i32).await?);
        self.preview(state, user, submit).await.map(Response::new)
    }

    async fn list_jobs(&self, request: Request<v1::ListJobsRequest>) -> Result<Response<v1::ListJobsReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let state = as_of_now(self.read(request.read).await?);
        let limit = if request.limit == 0 { PAGE } else { (request.limit as usize).min(PAGE) };
        let from = Cursor::parse(&request.page)?;
        let outlook = self.outlook(&state, Duration::ZERO).await?;
        let (jobs, at) = self.mending(|| ready(self.page(&state, from, limit, request.ended, &outlook))).await?;
        Ok(Response::new(v1::ListJobsReply {
            jobs,
            next_page: at.to_string(),
            revision: state.meta.rev.0,
            live: state.tenants.iter().map(|(_, tenant)| tenant.live_jobs).sum(),
        }))
    }

    type WatchJobStream = Pin<Box<dyn Stream<Item = Result<v1::Job, Status>> + Send>>;

    async fn watch_job(&self, request: Request<v1::WatchJobRequest>) -> Result<Response<Self::WatchJobStream>, Status> {
        self.admit(&request)?;
        let id = JobId(request.into_inner().job_id);
        // Subscribed before the first look: what changes while the job is rendered is not missed.
        let applied = self.replica.applied();
        let state = self.read(v1::ReadMode::Linearizable as i32).await?;
        let first = self.job(&state, id, OUTLOOK_AGE).await?;
        let (out, stream) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(watch(self.clone(), id, first, applied, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// Sends the job whenever it looks different, until it has ended or nobody listens.
async fn watch(
    api: Api,
    id: JobId,
    first: v1::Job,
    mut applied: watch::Receiver<Applied>,
    out: mpsc::Sender<Result<v1::Job, Status>>,
) {
    let mut last = first;
    loop {
        let ended = last.result.is_some();
        if out.send(Ok(last.clone())).await.is_err() || ended {
            return;
        }
        loop {
            tokio::select! {
                changed = applied.changed() => if changed.is_err() { return },
                () = out.closed() => return,
            }
            tokio::time::sleep(WATCH_PACE).await;
            applied.mark_unchanged();
            let state = api.replica.state();
            let next = match api.job(&state, id, OUTLOOK_AGE).await {
                Ok(next) => next,
                Err(status) => {
                    let _ = out.send(Err(status)).await;
                    return;
                }
            };
            if next != last {
                last = next;
                break;
            }
        }
    }
}

impl Api {
    async fn steer(
        &self,
        request: Request<v1::SteerJobRequest>,
        command: impl FnOnce(JobId) -> Command,
    ) -> Result<Response<v1::SteerJobReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let id = requests::request_id(&request.request_id)?;
        let user = requests::user(&request.user)?;
        self.commit(Some(id), user, command(JobId(request.job_id))).await?;
        Ok(Response::new(v1::SteerJobReply {}))
    }

    /// The job from memory, or from history; where it waits, with an outlook of at most this age.
    async fn job(&self, state: &State, id: JobId, age: Duration) -> Result<v1::Job, Status> {
        let outlook = match may_start(state, id) {
            true => self.outlook(state, age).await?,
            false => Arc::default(),
        };
        self.mending(|| ready(self.find(state, id, &outlook))).await
    }

    fn find(&self, state: &State, id: JobId, outlook: &Arc<Outlook>) -> Result<v1::Job, Unread> {
        let (unheard, mut cache) = (self.unheard(state), Cache::with(&self.tables));
        let mut reasons = Explainer::new(state, &mut cache, &unheard).with(outlook.clone());
        if let Some(job) = view::live(state, id, &mut reasons, &self.tables) {
            return Ok(job);
        }
        if let Some(job) = view::unbegun(state, id, &mut reasons, &self.tables) {
            return Ok(job);
        }
        match self.image()?.history(state, id)? {
            Some(row) => Ok(view::archived(state, &row)),
            None => Err(error::refusal(reason::NOT_FOUND, format!("there is no job {id}")).into()),
        }
    }

    /// One page of the list from the cursor on, and where the next begins.
    fn page(
        &self,
        state: &State,
        from: Cursor,
        limit: usize,
        ended: bool,
        outlook: &Arc<Outlook>,
    ) -> Result<(Vec<v1::Job>, Cursor), Unread> {
        let (unheard, mut cache) = (self.unheard(state), Cache::with(&self.tables));
        let mut reasons = Explainer::new(state, &mut cache, &unheard).with(outlook.clone());
        let (mut at, mut jobs) = (from, Vec::new());
        while jobs.len() < limit && at != Cursor::End {
            if at.past_live() && !ended {
                at = Cursor::End;
                break;
            }
            at = self.fill(state, at, limit, &mut reasons, &mut jobs)?;
        }
        Ok((jobs, at))
    }

    /// History's home on this replica.
    pub(super) fn image(&self) -> Result<Arc<Image>, Status> {
        let reason = "this replica is taking a snapshot of the leader's in: ask another one";
        self.replica.image().ok_or_else(|| error::refusal(reason::STOPPING, reason))
    }

    /// One section of the list from the cursor on: appends jobs and says where to go on.
    fn fill(
        &self,
        state: &State,
        at: Cursor,
        limit: usize,
        reasons: &mut Explainer<'_>,
        jobs: &mut Vec<v1::Job>,
    ) -> Result<Cursor, Unread> {
        let room = limit - jobs.len();
        let mut live = |ids: Vec<JobId>| {
            jobs.extend(ids.into_iter().filter_map(|id| view::live(state, id, reasons, &self.tables)))
        };
        Ok(match at {
            Cursor::Leased(after) => {
                let leases: Vec<_> =
                    state.leases.range((Bound::Excluded(after), Bound::Unbounded)).take(room).collect();
                let next = leases.last().map(|(token, _)| **token);
                live(leases.iter().map(|(_, lease)| lease.value.task.job).collect());
                let first = Cursor::Queued { last: JobId(0), told: 0 };
                next.filter(|_| leases.len() == room).map_or(first, Cursor::Leased)
            }
            Cursor::Queued { last, told } => {
                let ids = queued(state, last, told, room);
                let next = ids.last().copied().filter(|_| ids.len() == room);
                live(ids);
                next.map_or(Cursor::Waiting(JobId(0)), |last| Cursor::Queued { last, told: told.saturating_add(room) })
            }
            Cursor::Waiting(after) => {
                let ids = waiting(state, after, room);
                let next = ids.last().copied().filter(|_| ids.len() == room);
                live(ids);
                next.map_or(Cursor::Ended(JobId(u64::MAX)), Cursor::Waiting)
            }
            Cursor::Ended(below) => {
                let ids: Vec<JobId> = state
                    .jobs
                    .range(..below)
                    .rev()
                    .filter(|(_, job)| job.value.ended.is_some())
                    .map(|(id, _)| *id)
                    .take(room)
                    .collect();
                let next = ids.last().copied().filter(|_| ids.len() == room);
                live(ids);
                next.map_or(Cursor::Archived(None), Cursor::Ended)
            }
            Cursor::Archived(before) => {
                let rows = self.image()?.history_list(state, before, room)?;
                let next = rows.last().map(|row| HistoryKey::of(row)).filter(|_| rows.len() == room);
                jobs.extend(rows.iter().map(|row| view::archived(state, row)));
                next.map_or(Cursor::End, |key| Cursor::Archived(Some(key)))
            }
            Cursor::End => Cursor::End,
        })
    }
}

/// Jobs in the planner's order, behind the last one told; where that waits no longer, behind as many as were told.
fn queued(state: &State, last: JobId, told: usize, room: usize) -> Vec<JobId> {
    let queue = || scheduling::order::queue(state).map(|key| key.task.job);
    let found = if told == 0 { None } else { queue().position(|id| id == last) };
    let behind = found.map_or(told, |at| at + 1);
    queue().skip(behind).take(room).collect()
}

/// Held jobs and those between two attempts, by id.
fn waiting(state: &State, after: JobId, room: usize) -> Vec<JobId> {
    let held = state.index.waiting.iter().map(|task| task.job);
    let retrying = state.index.timers.iter().filter_map(|timer| match timer.what {
        TimerKind::Retry(task) => Some(task.job),
        _ => None,
    });
    let ids: BTreeSet<JobId> = held.chain(retrying).filter(|id| *id > after && is_waiting(state, *id)).collect();
    ids.into_iter().take(room).collect()
}

/// It is in the queue.
fn may_start(state: &State, id: JobId) -> bool {
    let free = state.jobs.get(&id).is_some_and(|job| !job.value.holds.any() && job.value.ended.is_none());
    free && state.tasks.get(&TaskKey::only(id)).is_none_or(|task| task.value.phase == Phase::Pending)
}

fn is_waiting(state: &State, id: JobId) -> bool {
    match state.tasks.get(&TaskKey::only(id)).map(|task| &task.value.phase) {
        Some(Phase::Leased { .. } | Phase::Ended { .. }) => false,
        Some(Phase::Pending | Phase::Retrying { .. }) | None => state.jobs.contains(&id),
    }
}

/// Where a list goes on: the sections follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cursor {
    Leased(Token),
    /// In the planner's order, which moves: the last job told, and how many were.
    Queued {
        last: JobId,
        told: usize,
    },
    Waiting(JobId),
    Ended(JobId),
    Archived(Option<HistoryKey>),
    End,
}

impl Cursor {
    fn past_live(self) -> bool {
        matches!(self, Cursor::Ended(_) | Cursor::Archived(_))
    }

    fn parse(page: &str) -> Result<Self, Status> {
        let refuse = || {
            // A long one would not fit in the answer's head, and the caller would see a broken call.
            let (shown, more) = page.split_at(page.floor_char_boundary(SHOWN_OF_PAGE));
            let more = if more.is_empty() { "" } else { " and more" };
            let what = format!("{shown:?}{more} is no page; pass what next_page said");
            error::invalid_fields(&[("page".to_owned(), what)])
        };
        if page.is_empty() {
            return Ok(Cursor::Leased(Token(0)));
        }
        let (section, rest) = page.split_once('-').ok_or_else(refuse)?;
        let number = |text: &str| text.parse::<u64>().map_err(|_| refuse());
        Ok(match section {
            "leased" => Cursor::Leased(Token(number(rest)?)),
            "queued" => {
                let (last, told) = rest.split_once('-').ok_or_else(refuse)?;
                Cursor::Queued {
                    last: JobId(number(last)?),
                    told: usize::try_from(number(told)?).unwrap_or(usize::MAX),
                }
            }
            "waiting" => Cursor::Waiting(JobId(number(rest)?)),
            "ended" => Cursor::Ended(JobId(number(rest)?)),
            "archived" if rest == "first" => Cursor::Archived(None),
            "archived" => {
                let (bucket, job) = rest.split_once('-').ok_or_else(refuse)?;
                let bucket = bucket.parse().map_err(|_| refuse())?;
                Cursor::Archived(Some(HistoryKey { bucket, job: JobId(number(job)?) }))
            }
            _ => return Err(refuse()),
        })
    }
}

impl std::fmt::Display for Cursor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Cursor::Leased(token) => write!(f, "leased-{token}"),
            Cursor::Queued { last, told } => write!(f, "queued-{last}-{told}"),
            Cursor::Waiting(job) => write!(f, "waiting-{job}"),
            Cursor::Ended(job) => write!(f, "ended-{job}"),
            Cursor::Archived(None) => f.write_str("archived-first"),
            Cursor::Archived(Some(key)) => write!(f, "archived-{}-{}", key.bucket, key.job),
            Cursor::End => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use statemachine::command::{SubmitJob, default_retry};
    use statemachine::settings::Settings;
    use statemachine::spec::{Body, JobSpec, Shape};
    use statemachine::{Cmd, Entry};

    fn apply(state: &mut State, body: Command) {
        let clock_ms = state.meta.clock_ms + 1;
        let cmds = vec![Cmd { request: None, actor: "alice".into(), body }];
        let entry = Entry { level: state.meta.level, clock_ms, wall_ms: 1_700_000_000_000, salt: 9, cmds };
        state.apply(&entry).expect("this level");
    }

    fn job(priority: i32) -> Command {
        let shape = Shape {
            nodes: 1,
            ranks_per_node: 1,
            gpus_per_rank: 1,
            gpu_types: [].into(),
            cores_per_rank: 0,
            mem_mib_per_rank: 0,
            mix_types: false,
            min_bandwidth_mbps: 0,
            topology: None,
            machines: None,
        };
        let spec = JobSpec {
            name: "job".into(),
            priority,
            shape,
            limit_ms: 0,
            lease_ttl_ms: 300_000,
            kill_grace_ms: 10_000,
            retry: default_retry(),
            labels: BTreeMap::new(),
            terms: None,
        };
        Command::SubmitJob(Box::new(SubmitJob {
            tenant: "default".into(),
            queue: "default".into(),
            gpu_types: Vec::new(),
            spec,
            body: Body { argv: vec!["true".into()], ..Body::default() },
            hold: false,
            priority_class: String::new(),
        }))
    }

    #[test]
    fn pages_of_the_queue_follow_each_other_and_survive_a_start_between_them() {
        let mut state = State::new([7; 16], Settings::default());
        (0..7).for_each(|n| apply(&mut state, job(n % 3)));
        let all = queued(&state, JobId(0), 0, 100);
        assert_eq!(all.len(), 7);
        for room in 1..=7 {
            let mut told: Vec<JobId> = Vec::new();
            while told.len() < 7 {
                let page = queued(&state, told.last().copied().unwrap_or(JobId(0)), told.len(), room);
                assert!(!page.is_empty());
                told.extend(page);
            }
            assert_eq!(told, all);
        }
        // One that was told has left: the rest goes on behind the last one.
        apply(&mut state, Command::Cancel { job: all[0] });
        assert_eq!(queued(&state, all[2], 3, 100), all[3..]);
    }

    #[test]
    fn a_page_is_read_as_it_was_written() {
        for page in ["leased-7", "queued-5-12", "waiting-3", "ended-9", "archived-first", "archived-4-9"] {
            assert_eq!(Cursor::parse(page).map(|cursor| cursor.to_string()).map_err(|_| ()), Ok(page.to_owned()));
        }
        for page in ["queued-5", "queued-5-x", "queued", "nothing-1"] {
            assert!(Cursor::parse(page).is_err(), "{page}");
        }
    }
}
