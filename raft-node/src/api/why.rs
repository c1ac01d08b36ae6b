//! Why a job waits and when it starts, from this replica's state: the planner runs here and asks nobody. One such plan
//! at a time, so that curious clients take one core of a replica at most.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::v1;
use scheduling::plan::Cache;
use scheduling::why::{Change, Holder, Why, why};
use scheduling::{Outlook, Start};
use statemachine::command::{Command, PlacePart, SubmitJob};
use statemachine::record::StoredReply;
use statemachine::{Cmd, Entry, JobId, NodeId, Outcome, Reply, State};
use tokio::sync::{Mutex, OwnedMutexGuard};
use tonic::Status;

use super::{Api, status, view};
use crate::door::wall_ms;

/// Steps of the estimates of one outlook, beyond its cycle: the front of a long queue gets one.
const ESTIMATE_STEPS: u64 = 400_000;
/// An outlook that took so long or longer is shown again for a while: `REST` times what it took.
const COSTLY: Duration = Duration::from_millis(50);
const REST: u32 = 10;
/// One of the very state that is asked about is as good as a new one for so long.
const SAME: Duration = Duration::from_secs(1);

/// The newest outlook of this replica, made when somebody asks.
#[derive(Clone, Default)]
pub struct Outlooks(Arc<Mutex<Kept>>);

#[derive(Default)]
struct Kept {
    cache: Cache,
    newest: Option<Made>,
}

struct Made {
    outlook: Arc<Outlook>,
    /// Log index of the state.
    index: u64,
    at: Instant,
    took: Duration,
}

impl Api {
    /// Why a job waits. The state is this replica's at the present time.
    pub(super) async fn why(&self, state: State, job: JobId) -> Result<v1::Why, Status> {
        let kept = self.outlooks.0.clone().lock_owned().await;
        let unheard = self.unheard(&state);
        blocking(kept, move |kept| answer(&state, &mut kept.cache, &unheard, job)).await
    }

    /// What would become of a submission.
    pub(super) async fn preview(&self, state: State, user: String, submit: SubmitJob) -> Result<v1::Why, Status> {
        let (state, job) = submitted(state, user, submit)?;
        Ok(v1::Why { job_id: 0, ..self.why(state, job).await? })
    }

    /// The outlook of this state, or one that is at most `age` older.
    pub(super) async fn outlook(&self, state: &State, age: Duration) -> Result<Arc<Outlook>, Status> {
        let kept = self.outlooks.0.clone().lock_owned().await;
        let index = state.meta.applied.index;
        let rested = |made: &Made| if made.took < COSTLY { age } else { age.max(made.took * REST) };
        let fresh =
            |made: &&Made| made.at.elapsed() <= rested(made) || made.index == index && made.at.elapsed() <= SAME;
        if let Some(made) = kept.newest.as_ref().filter(fresh) {
            return Ok(made.outlook.clone());
        }
        let (state, unheard) = (state.clone(), self.unheard(state));
        blocking(kept, move |kept| {
            // The first one makes the tables that all others use.
            let (first, began) = (kept.newest.is_none(), Instant::now());
            let outlook = Arc::new(Outlook::new(&state, &mut kept.cache, &unheard, ESTIMATE_STEPS));
            let took = if first { Duration::ZERO } else { began.elapsed() };
            kept.newest = Some(Made { outlook: outlook.clone(), index, at: Instant::now(), took });
            outlook
        })
        .await
    }

    /// Nodes that the leader finds silent; a follower can't know.
    pub(super) fn unheard(&self, state: &State) -> BTreeSet<NodeId> {
        self.board.desk().map(|desk| desk.unheard(state)).unwrap_or_default()
    }
}

/// Off the threads that serve calls; the next one waits.
async fn blocking<T: Send + 'static>(
    mut kept: OwnedMutexGuard<Kept>,
    work: impl FnOnce(&mut Kept) -> T + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(move || work(&mut kept)).await;
    done.map_err(|_| Status::internal("the planner panicked; the log of this replica says where"))
}

/// The state with its clocks at the present time. They stand still while nothing happens, and what has passed since must
/// not be told as to come.
pub(super) fn as_of_now(mut state: State) -> State {
    let since_ms = wall_ms().saturating_sub(state.meta.wall_ms).max(0);
    state.meta.wall_ms = state.meta.wall_ms.saturating_add(since_ms);
    state.meta.clock_ms = state.meta.clock_ms.saturating_add(since_ms.unsigned_abs());
    state
}

/// The state after the submission, and the id that the job has there.
fn submitted(mut state: State, actor: String, submit: SubmitJob) -> Result<(State, JobId), Status> {
    let cmds = vec![Cmd { request: None, actor, body: Command::SubmitJob(Box::new(submit)) }];
    let (level, clock_ms, wall_ms) = (state.meta.level, state.meta.clock_ms, state.meta.wall_ms);
    let outcomes = state.apply(&Entry { level, clock_ms, wall_ms, salt: 0, cmds });
    match outcomes.ok().and_then(|mut outcomes| outcomes.pop()) {
        Some(Outcome::Done(Reply::Stored(StoredReply::Job(job)))) => Ok((state, job)),
        Some(Outcome::Rejected(rejection)) => Err(status::rejected(&rejection)),
        other => Err(Status::internal(format!("a submission was answered with {other:?}"))),
    }
}

fn answer(state: &State, cache: &mut Cache, unheard: &BTreeSet<NodeId>, job: JobId) -> v1::Why {
    let shown = state.job_view(job).map(|view| view.task.state.name().to_owned());
    let about = v1::Why {
        job_id: job.0,
        state: shown.unwrap_or_default(),
        revision: state.meta.rev.0,
        now_unix_ms: state.meta.wall_ms,
        ..Default::default()
    };
    match why(state, cache, state.front_task(job), unheard) {
        Some(why) => told(state, why, about),
        None => about,
    }
}

fn told(state: &State, why: Why, about: v1::Why) -> v1::Why {
    let parts = why.placed.iter().flat_map(|place| {
        let ranks = state.jobs.get(&place.task.job).map_or(0, |job| u32::from(job.value.spec.shape.ranks_per_node));
        place.parts.iter().enumerate().map(move |(nth, part)| planned(state, part, nth as u32 * ranks, ranks))
    });
    v1::Why {
        code: why.reason.code().to_owned(),
        reason: why.reason.to_string(),
        advice: why.reason.advice().to_owned(),
        holders: why.holders.iter().map(|found| holder(state, found)).collect(),
        soonest_unix_ms: start_unix_ms(state, why.soonest),
        latest_unix_ms: start_unix_ms(state, why.latest),
        changes: why.changes.iter().map(|found| change(state, found)).collect(),
        parts: parts.collect(),
        assumes: why.assumes,
        ..about
    }
}

/// Wall time of a start; 0 where it is not known.
pub(super) fn start_unix_ms(state: &State, start: Start) -> i64 {
    match start {
        Start::Now => state.meta.wall_ms,
        Start::At(at_ms) => unix_ms(state, at_ms),
        Start::Unknown => 0,
    }
}

/// Wall time of a cluster time, as the two stand to each other now.
fn unix_ms(state: &State, at_ms: u64) -> i64 {
    let ahead = i128::from(at_ms) - i128::from(state.meta.clock_ms);
    i64::try_from(i128::from(state.meta.wall_ms) + ahead).unwrap_or(i64::MAX)
}

fn holder(state: &State, holder: &Holder) -> v1::Holder {
    let job = state.jobs.get(&holder.job).map(|job| &job.value);
    v1::Holder {
        job_id: holder.job.0,
        name: job.map(|job| job.spec.name.to_string()).unwrap_or_default(),
        user: job.map(|job| view::user_name(state, job.user)).unwrap_or_default(),
        node: state.node_name(holder.node).to_owned(),
        gpus: holder.gpus,
        cores: holder.cores,
        mem_mib: holder.mem_mib,
        ends_unix_ms: holder.ends_ms.map(|at_ms| unix_ms(state, at_ms)).unwrap_or_default(),
        waits: holder.waits,
    }
}

fn change(state: &State, change: &Change) -> v1::Change {
    let now = change.start == Start::Now;
    v1::Change { ask: change.ask.clone(), now, latest_unix_ms: start_unix_ms(state, change.start) }
}

fn planned(state: &State, part: &PlacePart, first_rank: u32, ranks: u32) -> v1::PlacedPart {
    v1::PlacedPart {
        node_id: part.node.0,
        node: state.node_name(part.node).to_owned(),
        gpu_slots: part.gpu_order.iter().map(|slot| u32::from(*slot)).collect(),
        first_rank,
        ranks,
        cores: part.cores_by_numa.iter().map(|cores| u32::from(*cores)).sum(),
        mem_mib: part.mem_mib,
        ..Default::default()
    }
}
