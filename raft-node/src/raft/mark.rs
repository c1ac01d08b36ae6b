//! The state as it was at the last mark: all replicas meet a mark at the same entry, so what they keep there can be compared. What is
//! made of it is the API's matter.

use std::sync::Arc;
use std::time::Duration;

use statemachine::{Command, Entry, RequestId, State};
use tokio::sync::watch;

/// How long a state is kept for those who ask: every change since costs memory meanwhile.
const KEPT: Duration = Duration::from_secs(60);

/// A state that does not move on.
pub struct Marked {
    /// The mark's name.
    pub request: RequestId,
    pub state: State,
}

#[derive(Default)]
pub struct Mark(watch::Sender<Option<Arc<Marked>>>);

impl Mark {
    /// Keeps the state after an entry that holds a mark.
    pub fn keep(&self, entry: &Entry, state: &State) {
        let marks = entry.cmds.iter().filter(|cmd| matches!(cmd.body, Command::Mark));
        if let Some(request) = marks.filter_map(|cmd| cmd.request).next_back() {
            self.0.send_replace(Some(Arc::new(Marked { request, state: state.clone() })));
        }
    }

    /// The state at the mark of this name, once it is applied here; `None` if that does not come, or was too long ago.
    pub async fn of(&self, request: RequestId, within: Duration) -> Option<Arc<Marked>> {
        let mut kept = self.0.subscribe();
        let wanted = |kept: &Option<Arc<Marked>>| kept.as_ref().is_some_and(|kept| kept.request == request);
        let found = tokio::time::timeout(within, kept.wait_for(wanted)).await.ok()?.ok()?;
        found.clone()
    }

    /// Lets go what was kept long enough; runs until the replica stops.
    pub async fn let_go(shared: Arc<super::machine::Shared>) {
        let mut kept = shared.mark.0.subscribe();
        while kept.wait_for(Option::is_some).await.is_ok() {
            let old = kept.borrow_and_update().as_ref().map(|kept| kept.request);
            tokio::time::sleep(KEPT).await;
            let is_old = |kept: &Option<Arc<Marked>>| kept.as_ref().map(|kept| kept.request) == old;
            let mut gone = None;
            shared.mark.0.send_if_modified(|kept| {
                let over = is_old(kept);
                if over {
                    gone = kept.take();
                }
                over
            });
            // The last owner of a large state frees it for a while: not on a thread that others wait for.
            drop(tokio::task::spawn_blocking(move || drop(gone)));
        }
    }
}
