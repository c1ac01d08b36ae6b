//! The signals that ask a command to stop.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::{Failure, INTERRUPTED, TERMINATED};

/// SIGINT and SIGTERM, none missed from the moment this is made.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub fn listen() -> Result<Self, Failure> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next one; the exit code that it means.
    pub async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => INTERRUPTED,
            _ = self.terminate.recv() => TERMINATED,
        }
    }
}
