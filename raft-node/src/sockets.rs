//! The sockets between replicas: this machine's. In a simulation, `simulated` has others in their place.

use std::io;

use futures::{Stream, StreamExt};
use tokio::net::TcpStream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Channel, Endpoint};

pub use tokio::net::TcpListener;

/// A connection that is made when it is first used.
pub fn connect_lazy(endpoint: &Endpoint) -> Channel {
    endpoint.connect_lazy()
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
