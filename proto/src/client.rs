//! The one typed client: it finds the leader through any replica's address, follows it, and repeats the same request id
//! until the call is answered or its deadline passes. What is left to the caller: making the request, and its id.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use prost::bytes::Bytes;
use tonic::metadata::{AsciiMetadataValue, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::error::{Error, Failure};
use crate::reason;
use crate::retry::{Action, Event, Retry};
use crate::{v1, wire};

/// Metadata of every call once the caller knows its cluster: the id in hex.
pub const CLUSTER: &str = "ares-cluster";
/// Metadata of joins.
pub const JOIN_TOKEN: &str = "ares-join-token";

/// A channel that carries the caller's metadata.
pub type Transport = InterceptedService<Channel, Identity>;

/// What the caller says of itself in each call.
#[derive(Clone, Debug, Default)]
pub struct Identity {
    cluster: Option<AsciiMetadataValue>,
    join_token: Option<AsciiMetadataValue>,
}

impl Identity {
    /// Empty strings are left out; a value that is no plain ASCII is an error of the caller's.
    pub fn new(cluster: &str, join_token: &str) -> Result<Self, Error> {
        Ok(Self { cluster: ascii("cluster id", cluster)?, join_token: ascii("join token", join_token)? })
    }
}

fn ascii(what: &str, text: &str) -> Result<Option<AsciiMetadataValue>, Error> {
    if text.is_empty() {
        return Ok(None);
    }
    let value = MetadataValue::try_from(text).map_err(|_| Error::Refused {
        reason: reason::INVALID_ARGUMENT.name.to_owned(),
        code: Code::InvalidArgument,
        message: format!("the {what} holds characters that are not plain ASCII"),
        retry_after: None,
    })?;
    Ok(Some(value))
}

impl Interceptor for Identity {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(cluster) = &self.cluster {
            request.metadata_mut().insert(CLUSTER, cluster.clone());
        }
        if let Some(token) = &self.join_token {
            request.metadata_mut().insert(JOIN_TOKEN, token.clone());
        }
        Ok(request)
    }
}

/// How long calls may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// One call with all its tries.
    pub call: Duration,
    /// One try at one replica.
    pub attempt: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { call: Duration::from_secs(15), attempt: Duration::from_secs(5) }
    }
}

/// A client of one cluster. Cloning shares connections and the known leader.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    pub patience: Patience,
}

struct Shared {
    servers: Vec<String>,
    identity: Identity,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    channels: BTreeMap<String, Channel>,
    leader: Option<String>,
    /// Where the next read begins, so that reads spread over the replicas.
    next_read: usize,
}

impl Client {
    /// `servers`: `host:port` of one replica or more. No connection is made before the first call.
    pub fn new(servers: Vec<String>, identity: Identity) -> Self {
        let shared = Shared { servers, identity, known: Mutex::new(Known::default()) };
        Self { shared: Arc::new(shared), patience: Patience::default() }
    }

    /// The same client with other patience.
    pub fn with_patience(&self, patience: Patience) -> Self {
        Self { shared: self.shared.clone(), patience }
    }

    pub fn servers(&self) -> &[String] {
        &self.shared.servers
    }

    /// The last leader that answered, `host:port`.
    pub fn leader(&self) -> Option<String> {
        self.known().leader.clone()
    }

    /// Calls the leader, with retries: `call` must carry a request id or be harmless when it happens twice.
    pub async fn leader_call<T, F, Fut>(&self, call: F) -> Result<T, Error>
    where
        F: Fn(Transport) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let first = self.leader();
        self.drive(first, 0, true, call).await
    }

    /// Calls any replica, the next one on failure.
    pub async fn read_call<T, F, Fut>(&self, call: F) -> Result<T, Error>
    where
        F: Fn(Transport) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let start = {
            let mut known = self.known();
            known.next_read = known.next_read.wrapping_add(1);
            known.next_read
        };
        self.drive(None, start, false, call).await
    }

    /// A transport to one address, connected when it is first used.
    pub fn transport(&self, addr: &str) -> Result<Transport, Error> {
        let mut known = self.known();
        let channel = match known.channels.get(addr) {
            Some(channel) => channel.clone(),
            None => {
                let channel = connect_lazy(addr)?;
                known.channels.insert(addr.to_owned(), channel.clone());
                channel
            }
        };
        Ok(InterceptedService::new(channel, self.shared.identity.clone()))
    }

    async fn drive<T, F, Fut>(&self, first: Option<String>, start: usize, to_leader: bool, call: F) -> Result<T, Error>
    where
        F: Fn(Transport) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let began = Instant::now();
        let now = || began.elapsed().as_millis() as u64;
        let call_ms = self.patience.call.as_millis() as u64;
        let try_ms = self.patience.attempt.as_millis() as u64;
        let mut retry = Retry::new(self.shared.servers.clone(), first, start, call_ms, try_ms);
        let mut last: Option<Error> = None;
        // Once a try was sent and not answered, the call's outcome is unknown unless a later try is answered.
        let mut sent = false;
        let mut event = Event::Ready;
        loop {
            match retry.step(event, now()) {
                Action::GiveUp => return Err(give_up(last, sent, &self.shared.servers)),
                Action::Wait { ms } => {
                    tokio::time::sleep(Duration::from_millis(ms)).await;
                    event = Event::Ready;
                }
                Action::Call { addr, timeout_ms } => {
                    let transport = self.transport(&addr)?;
                    let answer = tokio::time::timeout(Duration::from_millis(timeout_ms), call(transport)).await;
                    let failure = match answer {
                        Ok(Ok(response)) => {
                            if to_leader {
                                self.known().leader = Some(addr);
                            }
                            return Ok(response.into_inner());
                        }
                        Ok(Err(status)) => Failure::from(status),
                        Err(_) => Failure {
                            code: Code::DeadlineExceeded,
                            reason: String::new(),
                            message: format!("{addr} did not answer within {timeout_ms} ms"),
                            leader: None,
                            retry_after: None,
                        },
                    };
                    let Some(next) = classify(&failure) else {
                        return Err(failure.into());
                    };
                    // Over a bound, it still leads; and what a read met says nothing of the leader.
                    if to_leader && !matches!(next, Event::Busy { .. }) {
                        self.known().leader = None;
                    }
                    let lost = next == Event::Lost;
                    sent |= to_leader && lost;
                    // What a replica answered says more than a later try that nobody did, unless that one may have done
                    // something.
                    let error = Error::from(failure);
                    let answered = |error: &Error| matches!(error, Error::Refused { .. });
                    if answered(&error) || (to_leader && lost) || !last.as_ref().is_some_and(answered) {
                        last = Some(error);
                    }
                    event = next;
                }
            }
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.shared.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// What a failed try means for the next one; `None` = a refusal that another try would only repeat.
fn classify(failure: &Failure) -> Option<Event> {
    let name = failure.reason.as_str();
    if name == reason::NOT_LEADER.name {
        return Some(Event::NotLeader(failure.leader.clone()));
    }
    if name == reason::NO_QUORUM.name || name == reason::REVISION_NOT_LOCAL.name {
        return Some(Event::NotLeader(None));
    }
    if name == reason::STOPPING.name {
        return Some(Event::Unreachable);
    }
    if let (Code::ResourceExhausted, Some(after)) = (failure.code, failure.retry_after) {
        return Some(Event::Busy { retry_ms: after.as_millis() as u64 });
    }
    match failure.code {
        Code::DeadlineExceeded => Some(Event::Lost),
        Code::Unavailable if name == reason::OUTCOME_UNKNOWN.name => Some(Event::Lost),
        Code::Unavailable if never_connected(&failure.message) => Some(Event::Unreachable),
        // A transport that broke: the request may have been read.
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal if name.is_empty() => Some(Event::Lost),
        _ => None,
    }
}

/// The transport's words for a request that was never sent: nobody listens, or the name means nothing.
fn never_connected(message: &str) -> bool {
    message.contains("tcp connect error") || message.contains("dns error")
}

fn give_up(last: Option<Error>, sent: bool, servers: &[String]) -> Error {
    let tried = servers.join(", ");
    match last {
        None => Error::Unreachable(format!("no time was left to ask {tried}")),
        Some(Error::Unreachable(text) | Error::Unknown(text)) if sent => {
            Error::Unknown(format!("{text} (asked {tried})"))
        }
        Some(error) if sent => Error::Unknown(format!("{error} (asked {tried})")),
        Some(Error::Unreachable(text) | Error::Unknown(text)) => Error::Unreachable(format!("{text} (asked {tried})")),
        // Whoever answered had no leader to name, or one that is gone: the group has lost its quorum, or is electing.
        Some(Error::Refused { reason, code, .. }) if reason == reason::NOT_LEADER.name => Error::Refused {
            reason: reason::NO_QUORUM.name.to_owned(),
            code,
            message: format!("no leader was found (asked {tried})"),
            retry_after: None,
        },
        Some(refused) => refused,
    }
}

fn connect_lazy(addr: &str) -> Result<Channel, Error> {
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).map_err(|_| Error::Refused {
        reason: reason::INVALID_ARGUMENT.name.to_owned(),
        code: Code::InvalidArgument,
        message: format!("{addr:?} is no address: write host:port"),
        retry_after: None,
    })?;
    let endpoint =
        endpoint.http2_keep_alive_interval(Duration::from_secs(5)).keep_alive_timeout(Duration::from_secs(5));
    Ok(wire::connect_lazy(&endpoint, Duration::from_millis(1_000)))
}

// A request that the caller keeps is passed by reference: each try has a copy of its own in any case. The future of a call has some
// kilobytes and would be copied into each of those around it, so it gets a place of its own.
macro_rules! calls {
    ($($(#[$doc:meta])* $via:ident $method:ident($client:path, $request:ty) -> $reply:ty;)*) => {
        impl Client {
            $($(#[$doc])*
            pub async fn $method(&self, request: impl Borrow<$request>) -> Result<$reply, Error> {
                self.$via(|transport| {
                    let request = request.borrow().clone();
                    Box::pin(async move { <$client>::new(transport).max_decoding_message_size(MAX_MESSAGE).$method(request).await })
                }).await
            })*
        }
    };
}

/// Largest message that a client accepts, in bytes.
pub const MAX_MESSAGE: usize = 16 << 20;

calls! {
    leader_call submit_job(v1::jobs_client::JobsClient<Transport>, v1::SubmitJobRequest) -> v1::SubmitJobReply;
    leader_call cancel_job(v1::jobs_client::JobsClient<Transport>, v1::CancelJobRequest) -> v1::CancelJobReply;
    leader_call hold_job(v1::jobs_client::JobsClient<Transport>, v1::SteerJobRequest) -> v1::SteerJobReply;
    leader_call release_job(v1::jobs_client::JobsClient<Transport>, v1::SteerJobRequest) -> v1::SteerJobReply;
    leader_call requeue_job(v1::jobs_client::JobsClient<Transport>, v1::SteerJobRequest) -> v1::SteerJobReply;
    leader_call record_checkpoint(v1::jobs_client::JobsClient<Transport>, v1::RecordCheckpointRequest) -> v1::RecordCheckpointReply;
    read_call get_job(v1::jobs_client::JobsClient<Transport>, v1::GetJobRequest) -> v1::Job;
    read_call why_job(v1::jobs_client::JobsClient<Transport>, v1::WhyJobRequest) -> v1::Why;
    read_call preview_job(v1::jobs_client::JobsClient<Transport>, v1::SubmitJobRequest) -> v1::Why;
    read_call list_jobs(v1::jobs_client::JobsClient<Transport>, v1::ListJobsRequest) -> v1::ListJobsReply;
    read_call watch_job(v1::jobs_client::JobsClient<Transport>, v1::WatchJobRequest) -> tonic::Streaming<v1::Job>;
    read_call get(v1::keyspace_client::KeyspaceClient<Transport>, v1::GetRequest) -> v1::GetReply;
    read_call watch(v1::keyspace_client::KeyspaceClient<Transport>, v1::WatchRequest) -> tonic::Streaming<v1::WatchReply>;
    leader_call open_session(v1::locks_client::LocksClient<Transport>, v1::OpenSessionRequest) -> v1::OpenSessionReply;
    leader_call keep_alive(v1::locks_client::LocksClient<Transport>, v1::KeepAliveRequest) -> v1::KeepAliveReply;
    leader_call end_session(v1::locks_client::LocksClient<Transport>, v1::EndSessionRequest) -> v1::EndSessionReply;
    leader_call acquire(v1::locks_client::LocksClient<Transport>, v1::AcquireRequest) -> v1::AcquireReply;
    read_call validate(v1::locks_client::LocksClient<Transport>, v1::ValidateRequest) -> v1::ValidateReply;
    leader_call release(v1::locks_client::LocksClient<Transport>, v1::ReleaseRequest) -> v1::ReleaseReply;
    read_call status(v1::cluster_client::ClusterClient<Transport>, v1::StatusRequest) -> v1::StatusReply;
    leader_call add_replica(v1::cluster_client::ClusterClient<Transport>, v1::AddReplicaRequest) -> v1::AddReplicaReply;
    leader_call promote_replica(v1::cluster_client::ClusterClient<Transport>, v1::ReplicaRequest) -> v1::ReplicaReply;
    leader_call remove_replica(v1::cluster_client::ClusterClient<Transport>, v1::ReplicaRequest) -> v1::ReplicaReply;
    leader_call transfer_leader(v1::cluster_client::ClusterClient<Transport>, v1::ReplicaRequest) -> v1::ReplicaReply;
    read_call list_nodes(v1::cluster_client::ClusterClient<Transport>, v1::ListNodesRequest) -> v1::ListNodesReply;
    leader_call confirm_dead(v1::cluster_client::ClusterClient<Transport>, v1::ConfirmDeadRequest) -> v1::ConfirmDeadReply;
    leader_call set_node_admin(v1::cluster_client::ClusterClient<Transport>, v1::SetNodeAdminRequest) -> v1::SetNodeAdminReply;
    leader_call set_tenant(v1::tenants_client::TenantsClient<Transport>, v1::SetTenantRequest) -> v1::SetTenantReply;
    leader_call remove_tenant(v1::tenants_client::TenantsClient<Transport>, v1::RemoveTenantRequest) -> v1::RemoveTenantReply;
    read_call list_tenants(v1::tenants_client::TenantsClient<Transport>, v1::ListTenantsRequest) -> v1::ListTenantsReply;
    leader_call set_priority(v1::tenants_client::TenantsClient<Transport>, v1::SetPriorityRequest) -> v1::SetPriorityReply;
    leader_call set_policy(v1::tenants_client::TenantsClient<Transport>, v1::SetPolicyRequest) -> v1::SetPolicyReply;
    read_call get_policy(v1::tenants_client::TenantsClient<Transport>, v1::GetPolicyRequest) -> v1::Policy;
    leader_call remove_priority(v1::tenants_client::TenantsClient<Transport>, v1::RemovePriorityRequest) -> v1::RemovePriorityReply;
    read_call list_priorities(v1::tenants_client::TenantsClient<Transport>, v1::ListPrioritiesRequest) -> v1::ListPrioritiesReply;
    leader_call create_reservation(v1::reservations_client::ReservationsClient<Transport>, v1::CreateReservationRequest) -> v1::CreateReservationReply;
    leader_call delete_reservation(v1::reservations_client::ReservationsClient<Transport>, v1::DeleteReservationRequest) -> v1::DeleteReservationReply;
    read_call list_reservations(v1::reservations_client::ReservationsClient<Transport>, v1::ListReservationsRequest) -> v1::ListReservationsReply;
    leader_call mark_state(v1::audit_client::AuditClient<Transport>, v1::MarkStateRequest) -> v1::MarkStateReply;
    read_call save_snapshot(v1::audit_client::AuditClient<Transport>, v1::SaveSnapshotRequest) -> tonic::Streaming<v1::SnapshotPart>;
    leader_call register(v1::agents_client::AgentsClient<Transport>, v1::RegisterRequest) -> v1::RegisterReply;
    leader_call report(v1::agents_client::AgentsClient<Transport>, v1::ReportRequest) -> v1::ReportReply;
    leader_call report_health(v1::agents_client::AgentsClient<Transport>, v1::ReportHealthRequest) -> v1::ReportHealthReply;
    leader_call fetch_bodies(v1::agents_client::AgentsClient<Transport>, v1::FetchBodiesRequest) -> v1::FetchBodiesReply;
}

/// A fresh request id: 16 bytes of a UUIDv7.
pub fn request_id() -> Bytes {
    Bytes::copy_from_slice(uuid::Uuid::now_v7().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(reason: reason::Reason) -> Option<Error> {
        Some(Failure::from(crate::error::refusal(reason, "no")).into())
    }

    /// Answers by the number of the try; `None` = none at all.
    async fn call(client: &Client, to_leader: bool, answer: impl Fn(u32) -> Option<Status>) -> Result<u32, Error> {
        let tries = std::sync::atomic::AtomicU32::new(0);
        let ask = |_| {
            let number = tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let answer = answer(number);
            async move {
                match answer {
                    Some(status) if status.code() == Code::Ok => Ok(Response::new(number)),
                    Some(status) => Err(status),
                    None => std::future::pending().await,
                }
            }
        };
        if to_leader { client.leader_call(ask).await } else { client.read_call(ask).await }
    }

    fn client(call_ms: u64) -> Client {
        let servers = vec!["127.0.0.1:1".to_owned(), "127.0.0.1:2".to_owned()];
        let patience = Patience { call: Duration::from_millis(call_ms), attempt: Duration::from_secs(5) };
        Client::new(servers, Identity::default()).with_patience(patience)
    }

    #[tokio::test]
    async fn a_leader_over_a_bound_is_still_the_leader() {
        for over in [reason::BUSY, reason::DISK_FULL] {
            let client = client(400);
            call(&client, true, |_| Some(Status::ok(""))).await.unwrap();
            let leader = client.leader();
            assert!(leader.is_some());
            let refused =
                call(&client, true, |_| Some(crate::error::retry_later(over, "over", Duration::from_millis(50)))).await;
            assert_eq!(refused.unwrap_err().reason(), over.name);
            assert_eq!(client.leader(), leader);
        }
    }

    #[tokio::test]
    async fn what_a_read_met_does_not_make_the_leader_forgotten() {
        let client = client(2_000);
        call(&client, true, |_| Some(Status::ok(""))).await.unwrap();
        let stopping = || crate::error::refusal(reason::STOPPING, "stopping");
        let answer = |number| Some(if number == 0 { stopping() } else { Status::ok("") });
        assert_eq!(call(&client, false, answer).await.unwrap(), 1);
        assert!(client.leader().is_some());
    }

    #[tokio::test]
    async fn a_call_outlives_one_frozen_replica() {
        let client = client(1_000);
        let answer = |number| (number > 0).then(|| Status::ok(""));
        assert_eq!(call(&client, true, answer).await.unwrap(), 1);
    }

    #[test]
    fn a_request_that_never_left_is_no_unknown_outcome() {
        for text in ["tcp connect error: Connection refused", "dns error: Name or service not known"] {
            let failure = Failure::from(Status::unavailable(text));
            assert_eq!(classify(&failure), Some(Event::Unreachable), "{text}");
        }
        assert_eq!(classify(&Failure::from(Status::unavailable("broken pipe"))), Some(Event::Lost));
    }

    #[test]
    fn a_call_that_found_no_leader_has_no_quorum() {
        let servers = ["a:1".to_owned(), "b:2".to_owned()];
        let error = give_up(refused(reason::NOT_LEADER), false, &servers);
        assert_eq!((error.reason(), error.to_string().contains("a:1, b:2")), (reason::NO_QUORUM.name, true));
        assert_eq!(give_up(refused(reason::BUSY), false, &servers).reason(), reason::BUSY.name);
        assert!(matches!(give_up(refused(reason::NOT_LEADER), true, &servers), Error::Unknown(_)));
        let unheard = give_up(Some(Error::Unreachable("why".to_owned())), false, &servers);
        assert!(matches!(unheard, Error::Unreachable(text) if text.contains("why (asked a:1, b:2)")));
    }
}
