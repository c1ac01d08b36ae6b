//! Raft's own runtime: how wide it is, how it ends where a runtime must not be dropped, and where what blocks runs.

use std::io;

use tokio::runtime::{Handle, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinError;

/// Threads of Raft's own runtime, so that its core and its server are never kept waiting by the APIs. It is one task after the other: a
/// second thread pays only where cores are idle, for else the two wake each other in turn.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).clamp(1, 2))
}

/// Runs what blocks on a thread of its own, whatever runtime the caller has.
pub async fn end(work: impl FnOnce() + Send + 'static) {
    let (done, ended) = oneshot::channel();
    std::thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    let _ = ended.await;
}

/// Runs what blocks where it keeps no task waiting. A simulation has one thread and simulated time, in which it takes no time at all.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    #[cfg(not(feature = "simulated"))]
    return tokio::task::spawn_blocking(work).await;
    #[cfg(feature = "simulated")]
    Ok(work())
}

/// Keeps a runtime from being dropped where that is not allowed, until it has found its owner.
pub struct RuntimeGuard(Option<Runtime>);

impl RuntimeGuard {
    pub fn start() -> io::Result<Self> {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(threads()).thread_name("ares-raft").enable_all().build()?;
        Ok(Self(Some(runtime)))
    }

    pub fn handle(&self) -> &Handle {
        self.0.as_ref().expect("kept until `keep`").handle()
    }

    pub fn keep(mut self) -> Runtime {
        self.0.take().expect("kept once")
    }
}

impl Drop for RuntimeGuard {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
