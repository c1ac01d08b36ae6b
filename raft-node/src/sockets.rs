//! The sockets between replicas: this machine's. In a simulation, `simulated` has others in their place.

use std::io;
use std::time::Duration;

use futures::{Stream, StreamExt};
use hyper_util::client::legacy::connect::HttpConnector;
use tokio::net::TcpStream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Endpoint};

pub use tokio::net::TcpListener;

/// What was sent must arrive at the other machine's kernel within this time: a connection over a cut link is noticed, and made anew.
const ARRIVES: Duration = Duration::from_secs(4);
/// The question whether the peer lives waits, in the kernel's buffers, behind all that was sent before: over a slow link a minute.
pub const KEEP_ALIVE_WITHIN: Duration = Duration::from_secs(60);

/// A connection that is made when it is first used.
pub fn connect_lazy(endpoint: Endpoint) -> Channel {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_tcp_user_timeout(Some(ARRIVES));
    endpoint.keep_alive_timeout(KEEP_ALIVE_WITHIN).connect_with_connector_lazy(http)
}

/// What comes in. The server's own setting is not for connections that are handed to it; without the delay off, answers wait for the
/// peer's ACKs.
pub fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<TcpStream>> {
    TcpListenerStream::new(listener).inspect(|stream| {
        if let Ok(stream) = stream
            && let Err(err) = stream.set_nodelay(true)
        {
            tracing::debug!(%err, "a connection keeps its delay");
        }
    })
}
