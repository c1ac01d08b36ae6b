//! What other replicas ask of this one: the gRPC service on Raft's own port, and how a snapshot's files cross the wire.
//! The asking side is `network`'s.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest, VoteRequest};
use proto::v1::snapshot_part::What;
use proto::v1::{
    FetchHistoryRequest, FetchSnapshotRequest, FileChunk, HistoryRow, PeerBytes, ReadIndexReply, ReadIndexRequest,
    SnapshotPart,
};
use statemachine::storage::{self, Image, Incoming, StorageError};
use statemachine::{JobId, State};
use tokio::sync::mpsc;
use tokio::task::JoinError;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::Raft;
use super::machine::{Shared, SnapshotFiles};
use super::network::{CLUSTER, REPLICA};
use super::types::TypeConfig;
use super::wire::{self, AppendAnswer, SnapshotHeader, Wire};
use crate::read::Reads;
use crate::runtime::blocking;

/// Bytes of a file in one message.
const CHUNK: usize = 1 << 20;
/// Rows of history that wait for the network, and jobs that may be asked for at once.
const ROWS_QUEUED: usize = 64;
pub(super) const HISTORY_JOBS: usize = 1_024;
/// How long a snapshot that somebody asked for may take to be written.
const SNAPSHOT_MADE: Duration = Duration::from_secs(120);
/// ... and how long one waits before asking again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// The service of one replica.
pub struct PeerService {
    pub raft: Raft,
    pub reads: Reads,
    /// This replica's id, in decimal as in metadata.
    pub replica: String,
    /// Hex.
    pub cluster: String,
    pub shared: Arc<Shared>,
}

impl PeerService {
    /// Refuses a caller of another cluster, and one that means another replica.
    fn check<T>(&self, request: &Request<T>) -> Result<(), Status> {
        for (key, mine) in [(CLUSTER, &self.cluster), (REPLICA, &self.replica)] {
            let theirs = request.metadata().get(key).and_then(|value| value.to_str().ok()).unwrap_or("nothing");
            if theirs != mine {
                return Err(Status::failed_precondition(format!("{key} is {theirs}, this replica has {mine}")));
            }
        }
        Ok(())
    }
}

fn decoded<T: Wire>(bytes: Bytes) -> Result<T, Status> {
    wire::decode(bytes).map_err(|err| Status::invalid_argument(err.to_string()))
}

fn stopped(err: impl std::fmt::Display) -> Status {
    Status::unavailable(err.to_string())
}

fn encoded<T: Wire>(value: &T) -> PeerBytes {
    PeerBytes { data: wire::encode(value) }
}

#[tonic::async_trait]
impl proto::v1::peer_server::Peer for PeerService {
    type AppendStream = BoxStream<'static, Result<PeerBytes, Status>>;

    async fn append(&self, request: Request<Streaming<PeerBytes>>) -> Result<Response<Self::AppendStream>, Status> {
        self.check(&request)?;
        let requests = readable_appends(request.into_inner());
        let answers = self.raft.stream_append(requests).map(|answer| match answer {
            Ok(answer) => Ok(encoded(&AppendAnswer(answer))),
            Err(fatal) => Err(stopped(fatal)),
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn vote(&self, request: Request<PeerBytes>) -> Result<Response<PeerBytes>, Status> {
        self.check(&request)?;
        let ask: VoteRequest<TypeConfig> = decoded(request.into_inner().data)?;
        let answer = self.raft.vote(ask).await.map_err(stopped)?;
        Ok(Response::new(encoded(&answer)))
    }

    async fn pre_vote(&self, request: Request<PeerBytes>) -> Result<Response<PeerBytes>, Status> {
        self.check(&request)?;
        let ask: VoteRequest<TypeConfig> = decoded(request.into_inner().data)?;
        let answer = self.raft.pre_vote(ask).await.map_err(stopped)?;
        Ok(Response::new(encoded(&answer)))
    }

    async fn snapshot(&self, request: Request<Streaming<SnapshotPart>>) -> Result<Response<PeerBytes>, Status> {
        self.check(&request)?;
        let mut parts = request.into_inner();
        let header = match parts.message().await?.and_then(|part| part.what) {
            Some(What::Header(bytes)) => decoded::<SnapshotHeader>(bytes)?,
            _ => return Err(Status::invalid_argument("a snapshot begins with its header")),
        };
        let files = receive_files(&self.shared.snapshots(), parts).await?;
        let snapshot = openraft::Snapshot { meta: header.meta, snapshot: files };
        let answer = self.raft.install_full_snapshot(header.vote, snapshot).await.map_err(stopped)?;
        Ok(Response::new(encoded(&answer.vote)))
    }

    async fn transfer_leader(&self, request: Request<PeerBytes>) -> Result<Response<PeerBytes>, Status> {
        self.check(&request)?;
        let ask: TransferLeaderRequest<TypeConfig> = decoded(request.into_inner().data)?;
        self.raft
            .handle_transfer_leader(ask)
            .await
            .map_err(stopped)?
            .map_err(|refused| Status::aborted(refused.to_string()))?;
        Ok(Response::new(PeerBytes::default()))
    }

    async fn read_index(&self, request: Request<ReadIndexRequest>) -> Result<Response<ReadIndexReply>, Status> {
        self.check(&request)?;
        let index = self.reads.leader_index().await.map_err(stopped)?;
        Ok(Response::new(ReadIndexReply { index }))
    }

    type FetchSnapshotStream = BoxStream<'static, Result<SnapshotPart, Status>>;

    async fn fetch_snapshot(
        &self,
        request: Request<FetchSnapshotRequest>,
    ) -> Result<Response<Self::FetchSnapshotStream>, Status> {
        self.check(&request)?;
        let files = snapshot_of(&self.raft, &self.shared, request.into_inner().at_least).await?;
        Ok(Response::new(file_parts(files).map(Ok).boxed()))
    }

    type FetchHistoryStream = BoxStream<'static, Result<HistoryRow, Status>>;

    async fn fetch_history(
        &self,
        request: Request<FetchHistoryRequest>,
    ) -> Result<Response<Self::FetchHistoryStream>, Status> {
        self.check(&request)?;
        let jobs = request.into_inner().jobs;
        if jobs.len() > HISTORY_JOBS {
            let what = format!("{} jobs are asked for, at most {HISTORY_JOBS} at once", jobs.len());
            return Err(Status::invalid_argument(what));
        }
        let image = self.shared.image().ok_or_else(|| stopped("a snapshot is being installed"))?;
        let (rows, queue) = mpsc::channel(ROWS_QUEUED);
        let state = self.shared.state();
        tokio::task::spawn_blocking(move || send_rows(&state, &image, jobs, &rows));
        Ok(Response::new(ReceiverStream::new(queue).map(Ok).boxed()))
    }
}

/// The rows that this replica has; what it can't read itself is for the asking one to find elsewhere.
fn send_rows(state: &State, image: &Image, jobs: Vec<u64>, rows: &mpsc::Sender<HistoryRow>) {
    for job_id in jobs {
        match image.history(state, JobId(job_id)) {
            Ok(Some(row)) => {
                let row = HistoryRow { job_id, row: storage::canonical_row(&row).into() };
                if rows.blocking_send(row).is_err() {
                    return;
                }
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "another replica asks for history that is damaged here, too"),
        }
    }
}

/// A snapshot that holds entry `at_least`: the newest one, or one made now.
pub async fn snapshot_of(raft: &Raft, shared: &Shared, at_least: u64) -> Result<SnapshotFiles, Status> {
    let applied = *shared.applied().borrow();
    // Without any state there is no snapshot either: openraft, asked for one, would end.
    if !applied.has(at_least) {
        return Err(Status::unavailable(format!("applied up to {} only", applied.index)));
    }
    let reaches = |files: &SnapshotFiles| files.id.0.index >= at_least;
    let newest = || shared.newest_snapshot().filter(reaches);
    if let Some(files) = newest() {
        return Ok(files);
    }
    let mut marks = shared.marks();
    let made = async {
        loop {
            // While one is under way that began before that entry, openraft makes no other, and forgets that it was asked.
            raft.trigger().snapshot().await.map_err(stopped)?;
            let reached = marks.wait_for(|marks| marks.newest_snapshot.is_some_and(|index| index >= at_least));
            if tokio::time::timeout(ASK_AGAIN, reached).await.is_ok() {
                return Ok(());
            }
        }
    };
    let late = || Status::unavailable("no snapshot was made in time");
    tokio::time::timeout(SNAPSHOT_MADE, made).await.unwrap_or_else(|_| Err(late()))?;
    newest().ok_or_else(late)
}

/// The requests of a stream up to its end, or to the first that can't be read: then the stream ends and the leader begins another.
fn readable_appends(
    input: Streaming<PeerBytes>,
) -> impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static {
    futures::stream::unfold(input, |mut input| async move {
        let bytes = match input.message().await {
            Ok(bytes) => bytes?,
            Err(status) => {
                tracing::debug!(%status, "a stream of appends broke off");
                return None;
            }
        };
        match wire::decode(bytes.data) {
            Ok(request) => Some((request, input)),
            Err(err) => {
                tracing::error!(%err, "an append can't be read; is a replica of another version in the group?");
                None
            }
        }
    })
}

// ---------------------------------------------------------------------------------------------------------- snapshots

/// The header, then each file in chunks, the manifest last: without it the receiver throws the rest away.
pub fn snapshot_parts(
    header: SnapshotHeader,
    files: SnapshotFiles,
) -> impl Stream<Item = SnapshotPart> + Send + 'static {
    let header = SnapshotPart { what: Some(What::Header(wire::encode(&header))) };
    futures::stream::once(async { header }).chain(file_parts(files))
}

/// Each file in chunks, the manifest last.
pub fn file_parts(files: SnapshotFiles) -> impl Stream<Item = SnapshotPart> + Send + 'static {
    futures::stream::unfold(Some(Reading::new(files)), |reading| async move {
        let mut reading = reading?;
        let dir = reading.files.dir().to_owned();
        let read = blocking(move || reading.next().map(|chunk| chunk.map(|chunk| (chunk, reading)))).await;
        match read.map_err(io::Error::other).flatten() {
            Ok(chunk) => chunk.map(|(chunk, reading)| (SnapshotPart { what: Some(What::Chunk(chunk)) }, Some(reading))),
            Err(err) => {
                tracing::warn!(dir = %dir.display(), %err, "a snapshot could not be read to its end");
                None
            }
        }
    })
}

/// A snapshot's files, as far as they were read.
struct Reading {
    files: SnapshotFiles,
    /// Names not yet begun.
    left: VecDeque<String>,
    /// The file that is being read, and how far.
    open: Option<(String, File, u64)>,
}

impl Reading {
    fn new(files: SnapshotFiles) -> Self {
        let left = files.files().into_iter().map(|(name, _size)| name).collect();
        Self { files, left, open: None }
    }

    /// The next chunk; `None` at the end of the last file.
    fn next(&mut self) -> io::Result<Option<FileChunk>> {
        loop {
            let Some((name, mut file, offset)) = self.open.take() else {
                let Some(name) = self.left.pop_front() else { return Ok(None) };
                let file = File::open(self.files.dir().join(&name))?;
                self.open = Some((name, file, 0));
                continue;
            };
            let mut data = Vec::with_capacity(CHUNK);
            let read = (&mut file).take(CHUNK as u64).read_to_end(&mut data)?;
            if read == CHUNK {
                self.open = Some((name.clone(), file, offset + read as u64));
            }
            // An empty file is one empty chunk, or the receiver would not have it.
            if read > 0 || offset == 0 {
                return Ok(Some(FileChunk { name, offset, data: data.into() }));
            }
        }
    }
}

/// Writes what arrives below `root`; the snapshot once it is whole, verified and durable.
pub async fn receive_files(root: &Path, mut parts: Streaming<SnapshotPart>) -> Result<SnapshotFiles, Status> {
    let root = root.to_owned();
    let mut incoming = written(blocking(move || Incoming::new(&root)).await)?;
    while let Some(SnapshotPart { what }) = parts.message().await? {
        let Some(What::Chunk(chunk)) = what else {
            return Err(Status::invalid_argument("a snapshot has one header"));
        };
        let write = move || incoming.write(&chunk.name, chunk.offset, &chunk.data).map(|()| incoming);
        incoming = written(blocking(write).await)?;
    }
    written(blocking(move || incoming.finish()).await)
}

fn written<T>(done: Result<Result<T, StorageError>, JoinError>) -> Result<T, Status> {
    let done = done.map_err(|err| Status::internal(err.to_string()))?;
    done.map_err(|err| Status::internal(err.to_string()))
}
