//! The gRPC server for clients and agents: one listener, all services, health and message limits.

use std::net::SocketAddr;
use std::time::Duration;

use futures::TryStreamExt;
use proto::v1::agents_server::AgentsServer;
use proto::v1::audit_server::AuditServer;
use proto::v1::cluster_server::ClusterServer;
use proto::v1::jobs_server::JobsServer;
use proto::v1::keyspace_server::KeyspaceServer;
use proto::v1::locks_server::LocksServer;
use proto::v1::reservations_server::ReservationsServer;
use proto::v1::tenants_server::TenantsServer;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

use super::Api;
use super::together::Accepted;

/// Largest request, in bytes; a job's body is at most 256 KiB of it.
const MAX_REQUEST: usize = 4 << 20;
/// A peer that is gone without a word is noticed after twice this.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// A running server.
pub struct Served {
    pub addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    task: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
}

impl Served {
    /// Stops accepting and lets calls end, at most so long; streams are cut after it.
    pub async fn stop(mut self, patience: Duration) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if tokio::time::timeout(patience, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

/// Serves on an already bound listener, so that the caller knows the port.
pub fn serve(listener: TcpListener, api: Api) -> std::io::Result<Served> {
    let addr = listener.local_addr()?;
    let (stop, stopped) = oneshot::channel::<()>();
    // tonic's own option does nothing for connections that it did not accept itself.
    let incoming = TcpListenerStream::new(listener).map_ok(|stream| {
        let _ = stream.set_nodelay(true);
        Accepted::new(stream)
    });
    let server = Server::builder()
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(JobsServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(KeyspaceServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(LocksServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(ClusterServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(AuditServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(TenantsServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(ReservationsServer::new(api.clone()).max_decoding_message_size(MAX_REQUEST))
        .add_service(AgentsServer::new(api).max_decoding_message_size(MAX_REQUEST));
    let task = tokio::spawn(server.serve_with_incoming_shutdown(incoming, async {
        let _ = stopped.await;
    }));
    Ok(Served { addr, stop: Some(stop), task })
}
