//! The API's connections. Answers that are ready together travel together: one entry of the log answers many calls at once, each in a task of
//! its own, and the runtime would let the connection write after each of them. So it waits one turn of the runtime before it
//! writes, in which the other answers join.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::transport::server::Connected;

/// A connection that a client or an agent made.
pub(super) struct Accepted {
    stream: TcpStream,
    /// A turn has passed since the last flush.
    waited: bool,
}

impl Accepted {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, waited: false }
    }
}

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

/// Takes one buffer at a time, as `poll_write_vectored` does by default: HTTP/2 then copies a small message behind those before it.
impl AsyncWrite for Accepted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if !std::mem::replace(&mut self.waited, true) {
            // Waking itself, a task goes behind all that are ready.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
        self.waited = false;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn before_each_flush_a_connection_waits_one_turn() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut accepted = Accepted::new(listener.accept().await.unwrap().0);
        assert!(!accepted.is_write_vectored());
        for _ in 0..2 {
            let mut polls = Vec::new();
            for byte in *b"ab" {
                poll_fn(|cx| {
                    let wrote = Pin::new(&mut accepted).poll_write(cx, &[byte]);
                    polls.push(wrote.is_ready());
                    wrote
                })
                .await
                .unwrap();
            }
            // It woke itself, or this would not have come so far.
            assert_eq!(polls, [false, true, true]);
            poll_fn(|cx| Pin::new(&mut accepted).poll_flush(cx)).await.unwrap();
        }
        let mut read = [0; 4];
        peer.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"abab");
    }
}
