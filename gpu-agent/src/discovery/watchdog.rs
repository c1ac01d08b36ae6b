//! One thread that owns what may block for ever, and a deadline for whoever asks it.
//!
//! A GPU driver can hang for minutes in any call. The calls run on a thread of their own, one at a time; the caller waits at most the
//! limit and then goes on without the answer. While a call hangs, later ones fail at once when the few waiting places are taken.

use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use super::BackendError;

/// Callers that may wait for the thread: inventory, topology, processes, and one more.
const PLACES: usize = 4;

type Work<T> = Box<dyn FnOnce(&mut T) + Send>;

/// A handle to the thread that owns a `T`. The thread ends when the handle is dropped and its last call returns.
pub struct Guarded<T> {
    work: SyncSender<Work<T>>,
    limit: Duration,
}

impl<T: 'static> Guarded<T> {
    /// Starts the thread; `make` runs on it, so that a `T` that blocks while it opens is guarded too.
    pub fn start(
        name: &str,
        limit: Duration,
        make: impl FnOnce() -> T + Send + 'static,
    ) -> std::io::Result<Guarded<T>> {
        let (work, inbox) = mpsc::sync_channel::<Work<T>>(PLACES);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut owned = make();
            while let Ok(work) = inbox.recv() {
                work(&mut owned);
            }
        })?;
        Ok(Guarded { work, limit })
    }

    /// Runs `f` on the thread and waits for its result, at most the limit.
    pub fn call<R: Send + 'static>(
        &self,
        call: &'static str,
        f: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> Result<R, BackendError> {
        let unresponsive = BackendError::Unresponsive { call, seconds: self.limit.as_secs() };
        let (reply, answer) = mpsc::sync_channel(1);
        let work: Work<T> = Box::new(move |owned| {
            // The caller may have left.
            let _ = reply.send(f(owned));
        });
        match self.work.try_send(work) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(unresponsive),
            Err(TrySendError::Disconnected(_)) => return Err(ended(call)),
        }
        match answer.recv_timeout(self.limit) {
            Ok(result) => Ok(result),
            Err(RecvTimeoutError::Timeout) => Err(unresponsive),
            Err(RecvTimeoutError::Disconnected) => Err(ended(call)),
        }
    }
}

/// The thread panicked: a defect, told as an error.
fn ended(call: &'static str) -> BackendError {
    BackendError::Call { call, reason: "the driver thread has ended".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_hangs_is_given_up_and_the_next_one_answers() {
        let guarded = Guarded::start("test", Duration::from_millis(500), || 7).unwrap();
        assert_eq!(guarded.call("first", |n| *n), Ok(7));
        let (release, held) = mpsc::channel::<()>();
        let hung = guarded.call("hung", move |_| held.recv().is_ok());
        assert_eq!(hung, Err(BackendError::Unresponsive { call: "hung", seconds: 0 }));
        release.send(()).unwrap();
        assert_eq!(guarded.call("next", |n| *n + 1), Ok(8));
    }

    #[test]
    fn while_a_call_hangs_few_wait_and_the_others_fail_at_once() {
        let guarded = Guarded::start("test", Duration::from_millis(300), || ()).unwrap();
        let (_release, held) = mpsc::channel::<()>();
        assert!(guarded.call("hung", move |_| held.recv().is_ok()).is_err());
        let refused = (0..PLACES + 2).map(|_| {
            let start = std::time::Instant::now();
            assert!(guarded.call("behind", |_| ()).is_err());
            start.elapsed() < Duration::from_millis(300)
        });
        assert!(refused.filter(|at_once| *at_once).count() >= 2);
    }

    #[test]
    fn a_thread_that_died_is_an_error() {
        let guarded = Guarded::start("test", Duration::from_secs(5), || ()).unwrap();
        let died = guarded.call("dies", |_| panic!("planted"));
        assert!(matches!(died, Err(BackendError::Call { call: "dies", .. })), "{died:?}");
    }
}
