//! The keyspace: reads at a read index, and watches that miss nothing and repeat nothing.

use std::cell::RefCell;
use std::future::ready;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use planted::{Bug, planted};
use proto::{error, reason, v1};
use statemachine::keyspace::Keyspace;
use statemachine::storage::Image;
use statemachine::{JobId, Revision, State};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::Api;
use super::history::Unread;

/// Keys of one page: by default, and at most with values or without.
const PAGE: usize = 1_000;
const KEYS_ONLY_PAGE: usize = 10_000;
/// Bytes of a page's values: well below the message limit.
const PAGE_BYTES: usize = 2 << 20;
/// Messages that a slow watcher may have pending; the events themselves wait in the ring.
const WATCH_BUFFER: usize = 16;
/// A watcher whose keys do not change learns this often how far it has seen.
const PROGRESS: Duration = Duration::from_secs(5);

#[tonic::async_trait]
impl v1::keyspace_server::Keyspace for Api {
    async fn get(&self, request: Request<v1::GetRequest>) -> Result<Response<v1::GetReply>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let state = self.read(request.read).await?;
        let page = self.mending(|| {
            let (image, state, request) = (self.image(), state.clone(), request.clone());
            // Rendering thousands of keys, and history from disk, would stall the other calls of this thread.
            let page = tokio::task::spawn_blocking(move || {
                with_history(&state, &image, |keyspace| page(keyspace, &request, state.meta.rev))
            });
            async { page.await.map_err(|error| Status::internal(format!("the read failed: {error}")))? }
        });
        page.await.map(Response::new)
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchReply, Status>> + Send>>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.admit(&request)?;
        let request = request.into_inner();
        let state = self.read(v1::ReadMode::Linearizable as i32).await?;
        let newest = state.meta.rev.0;
        let seen = match request.from_revision {
            0 => newest,
            from if from > newest + 1 => {
                let what = format!("revision {from} does not exist yet: the newest is {newest}");
                return Err(error::refusal(reason::FUTURE_REVISION, what));
            }
            _ if planted(Bug::WatchSkips) => newest,
            from => from - 1,
        };
        check_floor(&state, Revision(seen))?;
        let (out, stream) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(watch(self.clone(), request, Revision(seen), out));
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

/// What `read` makes of the keyspace, history included; an error if a row that it asked for can't be read.
fn with_history<T>(
    state: &State,
    image: &Result<Arc<Image>, Status>,
    read: impl FnOnce(&Keyspace<'_>) -> T,
) -> Result<T, Unread> {
    let damage = RefCell::new(None);
    let history = |id: JobId| {
        let row = image.as_ref().map_err(|status| Unread::Refused(status.clone()));
        let row = row.and_then(|image| Ok(image.history(state, id)?));
        row.unwrap_or_else(|error| {
            damage.borrow_mut().get_or_insert(error);
            None
        })
    };
    let found = read(&Keyspace::with_history(state, &history));
    match damage.take() {
        Some(error) => Err(error),
        None => Ok(found),
    }
}

fn page(keyspace: &Keyspace<'_>, request: &v1::GetRequest, revision: Revision) -> v1::GetReply {
    let revision = revision.0;
    let shown = |kv: statemachine::keyspace::Kv| v1::KeyValue {
        key: kv.key,
        value: if request.keys_only { String::new() } else { kv.value },
        create_revision: kv.create_rev.0,
        mod_revision: kv.mod_rev.0,
        version: u64::from(kv.version),
    };
    if !request.prefix {
        let kvs = keyspace.get(&request.key).map(shown).into_iter().collect();
        return v1::GetReply { kvs, revision, more: false };
    }
    let most = if request.keys_only { KEYS_ONLY_PAGE } else { PAGE };
    let limit = if request.limit == 0 { PAGE } else { (request.limit as usize).min(most) };
    let after = (!request.after.is_empty()).then_some(request.after.as_str());
    let (found, mut more) = keyspace.range(&request.key, limit, after);
    let mut kvs = Vec::with_capacity(found.len());
    let mut bytes = 0;
    for kv in found {
        let kv = shown(kv);
        bytes += kv.key.len() + kv.value.len();
        if bytes > PAGE_BYTES && !kvs.is_empty() {
            more = true;
            break;
        }
        kvs.push(kv);
    }
    v1::GetReply { kvs, revision, more }
}

/// Can this replica tell everything after `seen`?
fn check_floor(state: &State, seen: Revision) -> Result<(), Status> {
    let floor = state.events_floor();
    if seen >= floor {
        return Ok(());
    }
    let compacted = state.meta.compacted_rev;
    if seen < compacted {
        let what = format!("revision {} was compacted: events are kept from {} on", seen.0 + 1, compacted.0 + 1);
        return Err(error::refusal(reason::COMPACTED, what));
    }
    let what = format!("this replica keeps events from revision {} on, not from {}", floor.0 + 1, seen.0 + 1);
    Err(error::refusal(reason::REVISION_NOT_LOCAL, what))
}

/// Sends the changes of each revision in one message, until nobody listens or the ring has run past the watcher.
async fn watch(
    api: Api,
    request: v1::WatchRequest,
    mut seen: Revision,
    out: mpsc::Sender<Result<v1::WatchReply, Status>>,
) {
    let mut applied = api.replica.applied();
    let mut told = seen;
    loop {
        applied.mark_unchanged();
        let state = api.replica.state();
        if let Err(status) = check_floor(&state, seen) {
            let _ = out.send(Err(status)).await;
            return;
        }
        let read = || ready(changes(&api.image(), &state, &request, seen));
        let replies = match api.mending(read).await {
            Ok(replies) => replies,
            Err(status) => {
                let _ = out.send(Err(status)).await;
                return;
            }
        };
        for reply in replies {
            told = Revision(reply.revision);
            if out.send(Ok(reply)).await.is_err() {
                return;
            }
        }
        seen = state.meta.rev;
        drop(state);
        tokio::select! {
            changed = applied.changed() => if changed.is_err() { return },
            () = out.closed() => return,
            () = tokio::time::sleep(PROGRESS), if told < seen => {
                told = seen;
                if out.send(Ok(v1::WatchReply { events: Vec::new(), revision: seen.0 })).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// What happened to the watched keys after `seen`, a message for each revision.
fn changes(
    image: &Result<Arc<Image>, Status>,
    state: &State,
    request: &v1::WatchRequest,
    seen: Revision,
) -> Result<Vec<v1::WatchReply>, Unread> {
    let Ok(events) = state.events_since(seen) else { return Ok(Vec::new()) };
    let wanted = |key: &str| if request.prefix { key.starts_with(&request.key) } else { key == request.key };
    with_history(state, image, |keyspace| {
        let mut replies: Vec<v1::WatchReply> = Vec::new();
        for event in events {
            for (key, value) in keyspace.project(event).into_iter().filter(|(key, _)| wanted(key)) {
                let deleted = value.is_none();
                let value = if request.keys_only { String::new() } else { value.unwrap_or_default() };
                let change = v1::KeyEvent { key, value, deleted, mod_revision: event.rev.0 };
                match replies.last_mut().filter(|reply| reply.revision == event.rev.0) {
                    Some(reply) => reply.events.push(change),
                    None => replies.push(v1::WatchReply { events: vec![change], revision: event.rev.0 }),
                }
            }
        }
        replies
    })
}
