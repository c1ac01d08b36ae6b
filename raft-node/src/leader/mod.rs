//! What only the leader does: it remembers who was heard, plans, ends silent leases, ticks, and keeps the agents' desired
//! sets. Everything here lives for one term of office and is forgotten with it; what must last is in the state.

pub mod beats;
pub mod desired;
pub mod duties;
pub mod keeper;
mod links;
mod planner;
pub mod settled;
pub mod touched;

/// The state machine's own small cluster to tell stories with.
#[cfg(test)]
#[path = "../../../statemachine/tests/world/mod.rs"]
mod world;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use planted::{Bug, planted};
use scheduling::plan::Cache;
use statemachine::{NodeId, State};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

pub use beats::Beat;
pub use links::{Link, LinkEnd};

use crate::door::wall_ms;
use crate::office::Office;
use crate::read::ReadError;
use crate::replica::Replica;
use keeper::Keeper;
use links::Links;

/// Which clock a term measures silence by, both in ms since it began: the one that nobody can set.
pub fn of_silence(monotonic: impl FnOnce() -> u64, wall: impl FnOnce() -> u64) -> u64 {
    if planted(Bug::LeaseByWallClock) { wall() } else { monotonic() }
}

/// The desk of one term of office: what the API's leader calls and the loops share.
pub struct Desk {
    pub office: Office,
    pub replica: Replica,
    pub keeper: Mutex<Keeper>,
    pub links: Links,
    beats: beats::Tray,
    /// Rings when a node was heard that the planner could not use before.
    heard: Notify,
    closed: watch::Sender<bool>,
    opened: Instant,
    opened_wall_ms: i64,
}

impl Desk {
    fn new(office: Office, replica: Replica) -> Self {
        let keeper = Keeper::new(&replica.state(), 0);
        Self {
            office,
            replica,
            keeper: Mutex::new(keeper),
            links: Links::default(),
            beats: beats::Tray::default(),
            heard: Notify::new(),
            closed: watch::Sender::new(false),
            opened: Instant::now(),
            opened_wall_ms: wall_ms(),
        }
    }

    /// Ms of this term's own monotonic clock.
    pub fn now_ms(&self) -> u64 {
        let monotonic = || self.opened.elapsed().as_millis() as u64;
        of_silence(monotonic, || u64::try_from(wall_ms() - self.opened_wall_ms).unwrap_or(0))
    }

    pub fn keeper(&self) -> MutexGuard<'_, Keeper> {
        self.keeper.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Nodes that the planner must not use now.
    pub fn unheard(&self, state: &State) -> BTreeSet<NodeId> {
        self.keeper().unheard(state, self.now_ms())
    }

    /// Resolves when the term of office is over.
    pub async fn over(&self) {
        let mut closed = self.closed.subscribe();
        // An error means that the desk itself is gone: over as well.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// A quorum check of this replica's own leadership, begun after the call; from then on its state holds all that was acknowledged
    /// before. Another leader's word is no check: this replica's memory would extend what that leader is about to end.
    pub async fn check_quorum(&self) -> Result<(), ReadError> {
        let index = self.replica.reads().leader_index().await?;
        self.replica.reads().wait_applied(index).await
    }

    /// A heartbeat came in; it is answered behind the next quorum check.
    pub fn receive(&self, beat: Beat) {
        if self.keeper().hear(&self.replica.state(), beat.node, beat.epoch, self.now_ms()) {
            self.heard.notify_one();
        }
        self.beats.put(beat);
    }
}

/// Where the desk of the current term stands, if this replica leads.
#[derive(Clone, Default)]
pub struct Board(Arc<RwLock<Option<Arc<Desk>>>>);

impl Board {
    pub fn desk(&self) -> Option<Arc<Desk>> {
        self.0.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    fn put(&self, desk: Option<Arc<Desk>>) {
        *self.0.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = desk;
    }
}

/// How often a replica that does not lead brings the planner's cache up to its state.
const FOLLOW: Duration = Duration::from_secs(10);

/// The planner's cache, between two terms of office.
type Kept = Arc<Mutex<Cache>>;

/// Opens a desk for each term of office and closes it at its end; returns when the replica stops.
pub async fn run(replica: Replica, board: Board) {
    let mut leadership = replica.leadership();
    let kept = Kept::default();
    loop {
        let office = leadership.borrow_and_update().clone();
        if let Some(office) = office {
            serve(office, &replica, &board, &mut leadership, &kept).await;
            continue;
        }
        tokio::select! {
            changed = leadership.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(FOLLOW) => follow(&replica, &kept),
        }
    }
}

/// Nobody waits for it but a planner that begins meanwhile.
fn follow(replica: &Replica, kept: &Kept) {
    let (state, kept) = (replica.state(), kept.clone());
    tokio::task::spawn_blocking(move || {
        // Who panicked in it left it as nobody knows: it stays where it is.
        if let Ok(mut cache) = kept.lock() {
            cache.follow(&state);
        }
    });
}

/// One term of office, until leadership changes in any way.
async fn serve(
    office: Office,
    replica: &Replica,
    board: &Board,
    leadership: &mut watch::Receiver<Option<Office>>,
    kept: &Kept,
) {
    tracing::info!(term = office.term, "took office");
    let desk = Arc::new(Desk::new(office, replica.clone()));
    board.put(Some(desk.clone()));
    let mut loops = JoinSet::new();
    loops.spawn(beats::run(desk.clone()));
    loops.spawn(duties::run(desk.clone()));
    loops.spawn(links::run(desk.clone()));
    loops.spawn(planner::run(desk.clone(), kept.clone()));
    let _ = leadership.changed().await;
    board.put(None);
    desk.closed.send_replace(true);
    loops.shutdown().await;
    tracing::info!(term = desk.office.term, "left office");
}
