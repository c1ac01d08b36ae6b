//! The client's connections. Small requests travel together: HTTP/2 hands a message of more than 256 bytes to the system by itself where
//! the socket takes several buffers at once, but copies one of up to 1 KiB behind those before it where the socket takes one buffer. A
//! submission is such a message, and a copy costs less than a call of the system and a packet of its own.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};
use tower::util::{MapResponse, ServiceExt};

/// A connection to `endpoint`, made when it is first used, within `patience`.
pub(crate) fn connect_lazy(endpoint: &Endpoint, patience: Duration) -> Channel {
    let mut tcp = HttpConnector::new();
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(patience));
    let connector: MapResponse<_, _> =
        tcp.map_response(|io: TokioIo<TcpStream>| TokioIo::new(OneBuffer(io.into_inner())));
    endpoint.connect_with_connector_lazy(connector)
}

/// A stream that takes one buffer at a time; see the head of this file.
struct OneBuffer(TcpStream);

impl AsyncRead for OneBuffer {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, into)
    }
}

/// `poll_write_vectored` and `is_write_vectored` stay the defaults: that is the point.
impl AsyncWrite for OneBuffer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_takes_one_buffer_at_a_time() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        assert!(stream.is_write_vectored() && !OneBuffer(stream).is_write_vectored());
    }
}
