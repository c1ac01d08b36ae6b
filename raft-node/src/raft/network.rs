//! The way to the other replicas: one pool of connections, and openraft's network on top of it. What arrives is `service`'s.
//!
//! Three connections to each peer, so that no kind of traffic starves another: log (streams of appends), control (heartbeats, votes,
//! read indexes, a handed-over leadership) and snapshots. Each call carries the cluster's id and the replica it is meant for; each has
//! a deadline.

use std::collections::{BTreeMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{Backoff, RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use proto::v1::peer_client::PeerClient;
use proto::v1::{FetchHistoryRequest, FetchSnapshotRequest, HistoryRow, PeerBytes, ReadIndexRequest, SnapshotPart};
use tonic::metadata::{AsciiMetadataValue, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};

use super::machine::SnapshotFiles;
use super::service::snapshot_parts;
use super::types::{Peer, TypeConfig, Vote};
use super::wire::{self, AppendAnswer, SnapshotHeader, Wire, WireError};
use crate::log::LogReader;
use crate::sockets;

/// Metadata of each call: the cluster, and the replica that is meant (an address may be given to another one).
pub const CLUSTER: &str = "ares-cluster";
pub const REPLICA: &str = "ares-replica";

/// Largest message between replicas: an append of `settings::APPEND_ENTRIES` entries of 320 KiB and room to spare.
pub const MAX_MESSAGE: usize = 32 << 20;
/// Until a connection stands; loopback and a machine room need far less.
const CONNECT: Duration = Duration::from_millis(200);
/// A stream of appends is given up when its oldest request is not answered within this time and what the bytes on the way take on
/// the slowest link: longer than any disk's bad moment, shorter than a person's patience. The follower is then tried anew.
const APPEND_STALL: Duration = Duration::from_secs(2);
/// Bytes a second that each connection gets at least where replicas can join and catch up: a fourth of a link of 64 KiB/s, which appends
/// share with a snapshot.
const SLOWEST: u32 = 16 << 10;
/// Until a peer takes a stream of appends: what the connection was given before is in the way.
const STREAM_OPENS: Duration = Duration::from_secs(10);
/// A whole snapshot with its installation.
const SNAPSHOT: Duration = Duration::from_secs(600);
/// Until the rows of damaged history begin to come.
const HISTORY: Duration = Duration::from_secs(5);
/// A read index: the leader asks a quorum for it.
const READ_INDEX: Duration = Duration::from_secs(1);
/// Something is sent on an idle connection so often: `sockets` notices when it does not arrive.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(2);
/// Between tries to reach a peer that does not answer.
const BACKOFF: Duration = Duration::from_millis(100);
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Lane {
    Log,
    Control,
    Snapshot,
}

type Client = PeerClient<InterceptedService<Channel, Stamp>>;

/// Writes on each call whom it is meant for.
#[derive(Clone)]
pub struct Stamp {
    cluster: AsciiMetadataValue,
    replica: AsciiMetadataValue,
}

impl Interceptor for Stamp {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert(CLUSTER, self.cluster.clone());
        request.metadata_mut().insert(REPLICA, self.replica.clone());
        Ok(request)
    }
}

/// Connections to peers, made when first used. Cloning shares them.
#[derive(Clone)]
pub struct Pool {
    me: u64,
    /// Hex of the cluster's id.
    cluster: AsciiMetadataValue,
    channels: Arc<Mutex<BTreeMap<(String, Lane), Channel>>>,
}

impl Pool {
    /// `cluster`: hex of the cluster's id.
    pub fn new(me: u64, cluster: &str) -> Self {
        let cluster = MetadataValue::try_from(cluster).expect("hex is ASCII");
        Self { me, cluster, channels: Arc::default() }
    }

    fn client(&self, to: u64, addr: &str, lane: Lane) -> Result<Client, Status> {
        let channel = {
            let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
            match channels.get(&(addr.to_owned(), lane)) {
                Some(channel) => channel.clone(),
                None => {
                    let channel = connect_lazy(addr)?;
                    channels.insert((addr.to_owned(), lane), channel.clone());
                    channel
                }
            }
        };
        let replica = MetadataValue::from(to);
        let stamp = Stamp { cluster: self.cluster.clone(), replica };
        let client = PeerClient::with_interceptor(channel, stamp);
        Ok(client.max_decoding_message_size(MAX_MESSAGE).max_encoding_message_size(MAX_MESSAGE))
    }

    /// Asks the leader for an index that every read begun before now must have applied.
    pub async fn read_index(&self, leader: u64, peer: &Peer) -> Result<u64, Status> {
        let mut client = self.client(leader, &peer.peer_addr, Lane::Control)?;
        let reply = within(READ_INDEX, client.read_index(ReadIndexRequest {})).await?;
        Ok(reply.into_inner().index)
    }

    /// Asks a peer for a snapshot of the entries up to `at_least`, or more; it may have to write one first.
    pub async fn fetch_snapshot(
        &self,
        from: u64,
        peer: &Peer,
        at_least: u64,
    ) -> Result<Streaming<SnapshotPart>, Status> {
        let mut client = self.client(from, &peer.peer_addr, Lane::Snapshot)?;
        let request = FetchSnapshotRequest { at_least };
        Ok(within(SNAPSHOT, client.fetch_snapshot(request)).await?.into_inner())
    }

    /// Asks a peer for its rows of finished jobs.
    pub async fn fetch_history(&self, from: u64, peer: &Peer, jobs: Vec<u64>) -> Result<Streaming<HistoryRow>, Status> {
        let mut client = self.client(from, &peer.peer_addr, Lane::Snapshot)?;
        Ok(within(HISTORY, client.fetch_history(FetchHistoryRequest { jobs })).await?.into_inner())
    }
}

fn connect_lazy(addr: &str) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{addr}"))
        .map_err(|err| Status::invalid_argument(format!("peer address {addr:?}: {err}")))?;
    let endpoint = endpoint
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(KEEP_ALIVE_EVERY)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    Ok(sockets::connect_lazy(endpoint))
}

async fn within<T>(limit: Duration, call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} ms", limit.as_millis()))),
    }
}

/// Makes openraft's network clients out of the pool.
pub struct Network {
    pool: Pool,
    log: LogReader,
}

impl Network {
    pub fn new(pool: Pool, log: LogReader) -> Self {
        Self { pool, log }
    }

    fn link(&self, to: u64, peer: &Peer, lane: Lane) -> Link {
        Link { pool: self.pool.clone(), log: self.log.clone(), to, addr: peer.peer_addr.clone(), lane }
    }
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Link;

    async fn new_client(&mut self, target: u64, node: &Peer) -> Link {
        self.link(target, node, Lane::Log)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &Peer) -> Link {
        self.link(target, node, Lane::Control)
    }

    async fn new_snapshot_client(&mut self, target: u64, node: &Peer) -> Link {
        self.link(target, node, Lane::Snapshot)
    }
}

/// One peer, as openraft talks to it.
pub struct Link {
    pool: Pool,
    log: LogReader,
    to: u64,
    addr: String,
    /// Of appends; votes always go over [`Lane::Control`].
    lane: Lane,
}

impl Link {
    fn client(&self, lane: Lane) -> Result<Client, RPCError<TypeConfig>> {
        self.pool
            .client(self.to, &self.addr, lane)
            .map_err(|status| self.failed(RPCTypes::AppendEntries, CONNECT, status))
    }

    fn failed(&self, action: RPCTypes, limit: Duration, status: Status) -> RPCError<TypeConfig> {
        failed(action, self.pool.me, self.to, limit, status)
    }

    async fn ask_vote(
        &self,
        request: VoteRequest<TypeConfig>,
        limit: Duration,
        pre: bool,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        let mut client = self.client(Lane::Control)?;
        let data = PeerBytes { data: wire::encode(&request) };
        let call = async { if pre { client.pre_vote(data).await } else { client.vote(data).await } };
        let answer = within(limit, call).await.map_err(|status| self.failed(RPCTypes::Vote, limit, status))?;
        decoded(answer.into_inner())
    }
}

/// Whether the entries after those that the follower has are there no more. openraft orders a stream of them, and may purge them before it
/// begins: a late word of an earlier failure makes it forget the order. It sends a snapshot then, and the stream must end.
fn is_purged(log: &LogReader, request: &AppendEntriesRequest<TypeConfig>) -> bool {
    let follower_has = request.prev_log_id.map(|id| id.index);
    request.entries.is_empty() && follower_has < log.state().purged.map(|id| id.index)
}

/// What openraft must know of a failed call: an unreachable peer is tried again after a pause, a slow one at once.
fn failed(action: RPCTypes, id: u64, target: u64, timeout: Duration, status: Status) -> RPCError<TypeConfig> {
    match status.code() {
        Code::DeadlineExceeded => RPCError::Timeout(Timeout { action, id, target, timeout }),
        Code::Cancelled | Code::Unknown | Code::Internal => RPCError::Network(NetworkError::new(&status)),
        _ => RPCError::Unreachable(Unreachable::new(&status)),
    }
}

fn decoded<T: Wire>(bytes: PeerBytes) -> Result<T, RPCError<TypeConfig>> {
    wire::decode(bytes.data).map_err(unreadable)
}

fn unreadable(err: WireError) -> RPCError<TypeConfig> {
    RPCError::Unreachable(Unreachable::new(&err))
}

/// The unanswered requests of one stream, oldest first: their bytes, and when they must be answered.
#[derive(Default)]
struct Outstanding {
    requests: VecDeque<(usize, Instant)>,
    bytes: usize,
}

impl Outstanding {
    fn sent(&mut self, bytes: usize, now: Instant) {
        self.bytes += bytes;
        let on_the_way = Duration::from_secs_f64(self.bytes as f64 / f64::from(SLOWEST));
        self.requests.push_back((bytes, now + APPEND_STALL + on_the_way));
    }

    fn answered(&mut self) {
        if let Some((bytes, _)) = self.requests.pop_front() {
            self.bytes -= bytes;
        }
    }

    fn due(&self) -> Option<Instant> {
        self.requests.front().map(|(_, due)| *due)
    }
}

impl RaftNetworkV2<TypeConfig> for Link {
    type SnapshotData = SnapshotFiles;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let input = Box::pin(futures::stream::once(async { rpc }));
        let mut answers = self.stream_append(input, option).await?;
        match answers.next().await {
            Some(answer) => Ok(answer?.into()),
            None => Err(RPCError::Network(NetworkError::from_string("the stream ended without an answer"))),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<
        's,
        Result<BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>, RPCError<TypeConfig>>,
    >
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        Box::pin(async move {
            let log = self.log.clone();
            let mut input = input.take_while(move |request| std::future::ready(!is_purged(&log, request)));
            // openraft pauses between tries of an unreachable peer where the next request is made: without asking for it first, a peer that
            // is down would be tried without a pause.
            let Some(first) = input.next().await else { return Ok(futures::stream::empty().boxed()) };
            let mut client = self.client(self.lane)?;
            #[cfg(feature = "planted")]
            if planted::planted(planted::Bug::AckBeforeQuorum) {
                return Ok(sent_is_stored(client, futures::stream::once(async { first }).chain(input)));
            }
            let outstanding = Arc::new(Mutex::new(Outstanding::default()));
            let sent = outstanding.clone();
            let requests = futures::stream::once(async { first }).chain(input).map(move |request| {
                let data = wire::encode(&request);
                locked(&sent).sent(data.len(), Instant::now());
                PeerBytes { data }
            });
            let answers = within(STREAM_OPENS, client.append(requests))
                .await
                .map_err(|status| self.failed(RPCTypes::AppendEntries, STREAM_OPENS, status))?
                .into_inner();
            let (me, to) = (self.pool.me, self.to);
            let answers = futures::stream::unfold(Some((answers, outstanding)), move |state| async move {
                let (mut answers, outstanding) = state?;
                match next_answer(&mut answers, &outstanding).await {
                    Ok(None) => None,
                    Ok(Some(bytes)) => match decoded::<AppendAnswer>(bytes) {
                        Ok(AppendAnswer(answer)) => {
                            let goes_on = answer.is_ok();
                            Some((Ok(answer), goes_on.then_some((answers, outstanding))))
                        }
                        Err(err) => Some((Err(err), None)),
                    },
                    Err(status) => Some((Err(failed(RPCTypes::AppendEntries, me, to, APPEND_STALL, status)), None)),
                }
            });
            let answers: BoxStream<'s, _> = Box::pin(answers);
            Ok(answers)
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask_vote(rpc, option.soft_ttl(), false).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        self.ask_vote(rpc, option.soft_ttl(), true).await
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: openraft::Snapshot<super::types::LeaderId, u64, Peer, SnapshotFiles>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let mut client = self.client(Lane::Snapshot).map_err(streaming)?;
        let header = SnapshotHeader { vote, meta: snapshot.meta };
        let parts = snapshot_parts(header, snapshot.snapshot);
        let send = within(SNAPSHOT, client.snapshot(parts));
        let cancel: Pin<Box<dyn Future<Output = ReplicationClosed> + Send>> = Box::pin(cancel);
        let answer = tokio::select! {
            answer = send => answer.map_err(|status| streaming(self.failed(RPCTypes::InstallSnapshot, SNAPSHOT, status)))?,
            closed = cancel => return Err(StreamingError::Closed(closed)),
        };
        let vote = decoded::<Vote>(answer.into_inner()).map_err(streaming)?;
        Ok(SnapshotResponse::new(vote))
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        let limit = option.soft_ttl();
        let mut client = self.client(Lane::Control)?;
        let data = PeerBytes { data: wire::encode(&req) };
        within(limit, client.transfer_leader(data))
            .await
            .map_err(|status| self.failed(RPCTypes::TransferLeader, limit, status))?;
        Ok(Ok(()))
    }

    fn backoff(&self) -> Option<Backoff> {
        Some(Backoff::new(std::iter::repeat(BACKOFF)))
    }
}

fn streaming(err: RPCError<TypeConfig>) -> StreamingError<TypeConfig> {
    match err {
        RPCError::Timeout(err) => StreamingError::Timeout(err),
        RPCError::Network(err) => StreamingError::Network(err),
        RPCError::Unreachable(err) => StreamingError::Unreachable(err),
        RPCError::RemoteError(err) => StreamingError::Unreachable(Unreachable::new(&err)),
    }
}

/// The planted bug: answers each append as it is sent, whatever becomes of it.
#[cfg(feature = "planted")]
fn sent_is_stored(
    mut client: Client,
    input: impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static,
) -> BoxStream<'static, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>> {
    let (told, answers) = tokio::sync::mpsc::unbounded_channel();
    let requests = input.map(move |request| {
        let last = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
        // Nobody waits for it once the leader is no leader any more.
        let _ = told.send(Ok(Ok(last)));
        PeerBytes { data: wire::encode(&request) }
    });
    tokio::spawn(async move {
        let Ok(answers) = client.append(requests).await else { return };
        let mut answers = answers.into_inner();
        while let Ok(Some(_)) = answers.message().await {}
    });
    tokio_stream::wrappers::UnboundedReceiverStream::new(answers).boxed()
}

/// The next answer of a stream; an error once the oldest unanswered request is too old. A stream without one may rest for ever.
async fn next_answer(
    answers: &mut tonic::Streaming<PeerBytes>,
    outstanding: &Mutex<Outstanding>,
) -> Result<Option<PeerBytes>, Status> {
    loop {
        let due = locked(outstanding).due();
        let wait = due.map_or(APPEND_STALL, |due| due.saturating_duration_since(Instant::now()));
        match tokio::time::timeout(wait, answers.message()).await {
            Ok(answer) => {
                locked(outstanding).answered();
                return answer;
            }
            Err(_) if due.is_some() => {
                let bytes = locked(outstanding).bytes;
                return Err(Status::deadline_exceeded(format!(
                    "an append was not answered, {bytes} bytes are on the way"
                )));
            }
            Err(_) => {}
        }
    }
}

fn locked(outstanding: &Mutex<Outstanding>) -> std::sync::MutexGuard<'_, Outstanding> {
    outstanding.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_append_has_the_time_that_the_bytes_before_it_take() {
        let (now, mut outstanding) = (Instant::now(), Outstanding::default());
        assert_eq!(outstanding.due(), None);
        outstanding.sent(100 * SLOWEST as usize, now);
        outstanding.sent(SLOWEST as usize, now);
        assert_eq!(outstanding.due(), Some(now + APPEND_STALL + Duration::from_secs(100)));
        outstanding.answered();
        assert_eq!(outstanding.due(), Some(now + APPEND_STALL + Duration::from_secs(101)));
        outstanding.answered();
        outstanding.sent(0, now);
        assert_eq!(outstanding.due(), Some(now + APPEND_STALL));
    }
}
