//! Request ids: the same id with the same body is one effect. Kept `request_keep_ms` of cluster time and as long as
//! its job lives; over the limit the oldest go early, never within `request_keep_least_ms`. An id that may have been
//! forgotten is refused, so that a late repetition can't become a second effect.

use planted::{Bug, planted};

use crate::command::{Cmd, Code, Command, Rejection};
use crate::id::RequestId;
use crate::record::{Request, StoredReply};
use crate::state::State;
use crate::storage::codec;

const BUCKET_MS: u64 = 300_000;
/// Old ids dropped for each new one while the table is over its limit: more than one, so that it shrinks.
const EARLY_DROPS: u32 = 4;

pub(super) enum Admitted {
    /// New, with the digest of its body; `None` for a command without a request id.
    Fresh(Option<u128>),
    Known(StoredReply),
    Refused(Rejection),
}

pub(super) fn admit(state: &State, cmd: &Cmd) -> Admitted {
    let Some(id) = cmd.request else { return Admitted::Fresh(None) };
    let digest = digest(&cmd.body);
    if let Some(known) = state.requests.get(&id) {
        if known.body == digest || planted(Bug::DedupIgnoresBody) {
            return Admitted::Known(known.reply);
        }
        let detail = "request_id was used before with another body: make a new id for a new request";
        return Admitted::Refused(Rejection::new(Code::RequestMismatch, detail));
    }
    match refuse_new(state, id) {
        Some(rejection) => Admitted::Refused(rejection),
        None => Admitted::Fresh(Some(digest)),
    }
}

fn refuse_new(state: &State, id: RequestId) -> Option<Rejection> {
    let (settings, wall_ms) = (&state.meta.settings, state.meta.wall_ms);
    if let Some(own_ms) = id.unix_ms() {
        let horizon = state.meta.request_horizon_wall_ms;
        if own_ms <= horizon {
            let detail = format!("request_id was made at {own_ms} ms, ids up to {horizon} ms were forgotten");
            return Some(Rejection::new(Code::RequestExpired, detail));
        }
        let ahead = own_ms.saturating_sub(wall_ms);
        if ahead > i64::try_from(settings.request_future_ms).unwrap_or(i64::MAX) {
            let limit = settings.request_future_ms;
            let detail =
                format!("request_id was made {ahead} ms in the future, the limit is {limit}: check the clocks");
            return Some(Rejection::new(Code::RequestFromFuture, detail));
        }
    }
    let full = u64::try_from(state.requests.len()).is_ok_and(|len| len >= settings.requests);
    let oldest = state.index.requests.get_min().map_or(0, |(bucket, _)| *bucket);
    if full && age_ms(state, oldest) < settings.request_keep_least_ms {
        let detail = format!("{} request ids are kept, all too young to be forgotten: retry later", settings.requests);
        return Some(Rejection::new(Code::RequestsFull, detail));
    }
    None
}

pub(super) fn remember(state: &mut State, id: RequestId, body: u128, reply: StoredReply) {
    let ahead = id.unix_ms().map_or(0, |own_ms| own_ms.saturating_sub(state.meta.wall_ms).max(0));
    let at_ms = state.meta.clock_ms.saturating_add(u64::try_from(ahead).unwrap_or(0));
    let bucket = u32::try_from(at_ms / BUCKET_MS).unwrap_or(u32::MAX);
    state.requests.insert(id, Request { body, reply, bucket });
    state.index.requests.insert((bucket, id));
    for _ in 0..EARLY_DROPS {
        let over = u64::try_from(state.requests.len()).is_ok_and(|len| len > state.meta.settings.requests);
        if !over || !forget_oldest(state, state.meta.settings.request_keep_least_ms) {
            break;
        }
    }
}

/// Forgets ids that are old enough, at most `steps`; the steps that are left.
pub(super) fn forget_old(state: &mut State, steps: u32) -> u32 {
    let keep_ms = state.meta.settings.request_keep_ms;
    (0..steps).find(|_| !forget_oldest(state, keep_ms)).map_or(0, |used| steps - used)
}

pub(super) fn next_due_ms(state: &State) -> Option<u64> {
    let (bucket, _) = state.index.requests.get_min()?;
    Some(end_ms(*bucket).saturating_add(state.meta.settings.request_keep_ms))
}

/// Forgets the oldest id if its bucket is `keep_ms` old. The id of a live job moves to the newest bucket instead.
fn forget_oldest(state: &mut State, keep_ms: u64) -> bool {
    let Some((bucket, id)) = state.index.requests.get_min().copied() else { return false };
    if state.meta.clock_ms < end_ms(bucket) || age_ms(state, bucket) < keep_ms {
        return false;
    }
    state.index.requests.remove(&(bucket, id));
    let job = state.requests.get(&id).and_then(|request| match request.reply {
        StoredReply::Job(job) => Some(job),
        _ => None,
    });
    if job.is_some_and(|job| state.jobs.get(&job).is_some_and(|job| job.value.ended.is_none())) {
        let now = u32::try_from(state.meta.clock_ms / BUCKET_MS).unwrap_or(u32::MAX);
        state.requests.update(&id, |request| request.bucket = now);
        state.index.requests.insert((now, id));
    } else {
        state.requests.remove(&id);
        if planted(Bug::ForgottenTooEarly) {
            return true;
        }
        // By the ids' own times, whatever the leader's wall clock has leapt to since.
        if let Some(own_ms) = id.unix_ms() {
            state.meta.request_horizon_wall_ms = state.meta.request_horizon_wall_ms.max(own_ms);
        }
    }
    true
}

fn end_ms(bucket: u32) -> u64 {
    (u64::from(bucket) + 1) * BUCKET_MS
}

/// Cluster time since the bucket was over; 0 for one that is not.
fn age_ms(state: &State, bucket: u32) -> u64 {
    state.meta.clock_ms.saturating_sub(end_ms(bucket))
}

fn digest(command: &Command) -> u128 {
    let mut bytes = Vec::with_capacity(512);
    codec::canonical(command, &mut bytes);
    xxhash_rust::xxh3::xxh3_128(&bytes)
}
