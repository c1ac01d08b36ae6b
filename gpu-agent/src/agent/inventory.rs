//! Looks at the machine's GPUs again while the agent runs. A GPU that vanished becomes a health event by the backend's own
//! look; one that is new is only told in the log: it is registered at the agent's next start.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use crate::discovery::GpuBackend;
use crate::discovery::machine::Gpu;

/// Between two looks.
pub const EVERY: Duration = Duration::from_secs(60);

/// Looks for as long as the task lives. `known`: UUIDs that were registered.
pub async fn watch(backend: Arc<dyn GpuBackend>, known: impl Iterator<Item = String>, every: Duration) {
    let mut seen = Seen { known: known.collect(), failing: false };
    loop {
        tokio::time::sleep(every).await;
        let looking = Arc::clone(&backend);
        let look = tokio::task::spawn_blocking(move || looking.inventory()).await;
        let Ok(look) = look else { return };
        seen.judge(look.map(|inventory| inventory.gpus).map_err(|error| error.to_string()));
    }
}

struct Seen {
    known: BTreeSet<String>,
    failing: bool,
}

impl Seen {
    /// Tells each thing once; the answer is what was new to tell.
    fn judge(&mut self, look: Result<Vec<Gpu>, String>) -> Vec<String> {
        let gpus = match look {
            Ok(gpus) => gpus,
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::warn!(error, "the GPUs can't be looked at; trying on");
                }
                return Vec::new();
            }
        };
        if std::mem::take(&mut self.failing) {
            tracing::info!("the GPUs can be looked at again");
        }
        let new: Vec<String> =
            gpus.into_iter().map(|gpu| gpu.uuid).filter(|uuid| self.known.insert(uuid.clone())).collect();
        for gpu in &new {
            tracing::warn!(gpu, "a GPU is new here: restart the agent to register it; jobs go on meanwhile");
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::Notify;

    use crate::discovery::machine::{Host, Inventory};
    use crate::discovery::{BackendError, GpuProcess, HealthEvent, Selection, Topology, open};

    fn machine() -> Arc<dyn GpuBackend> {
        open(&Selection::parse(Some("sim:rtx4090x8"), None).unwrap(), "n1", 7).unwrap().backend
    }

    #[test]
    fn a_new_gpu_and_a_failing_look_are_told_once() {
        let gpus = machine().inventory().unwrap().gpus;
        let known = gpus[1..].iter().map(|gpu| gpu.uuid.clone()).collect();
        let mut seen = Seen { known, failing: false };
        assert_eq!(seen.judge(Ok(gpus.clone())), [gpus[0].uuid.clone()]);
        assert!(seen.judge(Err("no answer in 30 s".into())).is_empty() && seen.failing);
        assert!(
            seen.judge(Ok(gpus[2..].to_vec())).is_empty() && !seen.failing,
            "a missing one is the backend's to tell"
        );
        assert!(seen.judge(Ok(gpus)).is_empty());
    }

    /// Counts the looks at a simulated machine.
    struct Counting(Arc<dyn GpuBackend>, AtomicUsize);

    impl GpuBackend for Counting {
        fn inventory(&self) -> Result<Inventory, BackendError> {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.inventory()
        }

        fn topology(&self) -> Result<Topology, BackendError> {
            self.0.topology()
        }

        fn processes(&self) -> Result<Vec<GpuProcess>, BackendError> {
            self.0.processes()
        }

        fn drain_health(&self) -> Vec<HealthEvent> {
            self.0.drain_health()
        }

        fn health_signal(&self) -> Arc<Notify> {
            self.0.health_signal()
        }

        fn host(&self) -> Result<Host, BackendError> {
            self.0.host()
        }

        fn source(&self) -> String {
            self.0.source()
        }

        fn is_simulated(&self) -> bool {
            true
        }
    }

    #[tokio::test]
    async fn it_looks_again_and_again() {
        let backend = Arc::new(Counting(machine(), AtomicUsize::new(0)));
        let watching = tokio::spawn(watch(backend.clone(), std::iter::empty(), Duration::from_millis(1)));
        while backend.1.load(Ordering::Relaxed) < 3 {
            assert!(!watching.is_finished());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        watching.abort();
    }
}
