//! The agent's own port: what ranks wrote, read from their files and followed while they run. No output goes through the
//! Raft group. Looking for more is by the file's length; it costs nothing while nobody follows.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::Stream;
use proto::v1::agent_logs_server::AgentLogs;
use proto::v1::{LogChunk, ReadLogRequest};
use proto::{error, reason};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::attempts::{Attempts, is_held};
use crate::shim::record;

/// Largest piece of a log in one message.
const CHUNK: usize = 64 << 10;
/// Pieces that wait for a slow reader.
const AHEAD: usize = 4;
/// How often a followed log is looked at.
const POLL: Duration = Duration::from_millis(50);
/// A reader may come before the rank: the leader says RUNNING in the same moment.
const APPEARS: Duration = Duration::from_secs(10);

pub struct Logs {
    pub attempts: Attempts,
    /// Empty before the first registration.
    pub cluster: Box<dyn Fn() -> String + Send + Sync>,
}

type Chunks = Pin<Box<dyn Stream<Item = Result<LogChunk, Status>> + Send>>;

#[tonic::async_trait]
impl AgentLogs for Logs {
    type ReadLogStream = Chunks;

    async fn read_log(&self, request: Request<ReadLogRequest>) -> Result<Response<Chunks>, Status> {
        self.check_cluster(&request)?;
        let request = request.into_inner();
        let dir = self.attempts.rank_dir(request.token, request.rank);
        appear(&dir, &request).await?;
        let (chunks, stream) = mpsc::channel(AHEAD);
        tokio::spawn(async move {
            if let Err(error) = send(&dir, &request, &chunks).await {
                let status = Status::internal(format!("{}: {error}", dir.display()));
                let _ = chunks.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Logs {
    fn check_cluster<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let ours = (self.cluster)();
        let theirs = request.metadata().get(proto::client::CLUSTER).and_then(|id| id.to_str().ok()).unwrap_or("");
        if ours.is_empty() || theirs.is_empty() || ours == theirs {
            return Ok(());
        }
        let text = format!("this agent belongs to cluster {ours}, the call names {theirs}");
        Err(error::refusal(reason::CLUSTER_MISMATCH, text))
    }
}

/// Waits for the rank where the reader follows.
async fn appear(dir: &Path, request: &ReadLogRequest) -> Result<(), Status> {
    let began = Instant::now();
    while !dir.exists() {
        if !request.follow || began.elapsed() > APPEARS {
            let text = format!(
                "rank {} of attempt {} has no log here: it never started on this machine, or its records were removed",
                request.rank, request.token
            );
            return Err(error::refusal(reason::NOT_FOUND, text));
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// No rank is behind the log any more. Asked before reading: what it wrote last is then there.
fn has_ended(dir: &Path) -> bool {
    dir.join(record::EXIT).exists() || !is_held(dir)
}

async fn send(dir: &Path, request: &ReadLogRequest, chunks: &mpsc::Sender<Result<LogChunk, Status>>) -> io::Result<()> {
    let path = dir.join(record::LOG);
    let mut file: Option<File> = None;
    let mut offset = request.offset;
    loop {
        let ended = has_ended(dir);
        if file.is_none() {
            file = open(&path)?;
            if let (Some(file), true) = (&file, request.tail_bytes > 0) {
                offset = file.metadata()?.len().saturating_sub(request.tail_bytes);
            }
        }
        let data = match &file {
            Some(file) => read(file, offset).await?,
            None => Bytes::new(),
        };
        if data.is_empty() {
            if ended || !request.follow {
                let _ = chunks.send(Ok(LogChunk { data, offset, end: ended })).await;
                return Ok(());
            }
            tokio::select! {
                () = tokio::time::sleep(POLL) => {}
                () = chunks.closed() => return Ok(()),
            }
            continue;
        }
        let length = data.len() as u64;
        if chunks.send(Ok(LogChunk { data, offset, end: false })).await.is_err() {
            return Ok(());
        }
        offset += length;
    }
}

/// `None`: the rank wrote nothing yet, or never started.
fn open(path: &PathBuf) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

async fn read(file: &File, offset: u64) -> io::Result<Bytes> {
    let file = file.try_clone()?;
    let read = tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; CHUNK];
        let n = file.read_at(&mut buffer, offset)?;
        buffer.truncate(n);
        Ok(Bytes::from(buffer))
    });
    read.await.map_err(io::Error::other)?
}
