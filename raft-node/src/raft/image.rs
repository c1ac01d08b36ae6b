//! The thread that writes the image behind: takes a cut when enough has changed, waits until the local log is durable up to it (a leader may
//! apply what only the others have synced), writes it, and takes the next one only then. What a cut is, `statemachine::storage` knows.

use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::statvfs;
use statemachine::storage::{CUT_MS, StorageError};
use tokio::sync::watch;

use super::machine::Shared;

/// A replica that ends waits so long for its log to be durable; a full disk may never let it.
const FINISH: Duration = Duration::from_secs(5);
/// No cut is begun with less than this free, in bytes: the log, which has a reserve for that, tells the group that the disk is full, and
/// the replica goes on when there is space. A disk that fills within a cut all the same costs more: the store is opened again then.
const ROOM: u64 = 16 << 20;

/// What the thread is told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Order {
    #[default]
    Run,
    /// Enough has changed: do not wait for the time.
    CutNow,
    /// Write a last cut, then end.
    Finish,
    /// End at once, as a killed process would.
    Abort,
}

/// How others reach the thread.
#[derive(Default)]
pub struct Bell {
    order: Mutex<Order>,
    rung: Condvar,
}

impl Bell {
    /// Whether the replica ends.
    pub fn ends(&self) -> bool {
        matches!(self.order(), Order::Finish | Order::Abort)
    }

    /// Called by apply when enough has changed for a cut.
    pub fn cut_now(&self) {
        self.tell(Order::CutNow, |now| now == Order::Run);
    }

    fn tell(&self, order: Order, instead_of: impl Fn(Order) -> bool) {
        let mut now = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        if instead_of(*now) {
            *now = order;
            self.rung.notify_all();
        }
    }

    fn order(&self) -> Order {
        *self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `deadline` or an order; takes [`Order::CutNow`] back.
    fn wait(&self, deadline: Instant) -> Order {
        let mut now = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if *now != Order::Run || left.is_zero() {
                let taken = *now;
                if taken == Order::CutNow {
                    *now = Order::Run;
                }
                return taken;
            }
            now = self.rung.wait_timeout(now, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The running thread.
pub struct Writer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// `durable`: the last index of the local log that is on disk.
    pub fn start(shared: Arc<Shared>, durable: watch::Receiver<Option<u64>>) -> io::Result<Self> {
        Self::start_with(shared, durable, ROOM)
    }

    pub(super) fn start_with(
        shared: Arc<Shared>,
        durable: watch::Receiver<Option<u64>>,
        room: u64,
    ) -> io::Result<Self> {
        let its = shared.clone();
        #[cfg(feature = "simulated")]
        let thread = {
            tokio::spawn(by_and_by(its, durable, room));
            None
        };
        #[cfg(not(feature = "simulated"))]
        let thread =
            Some(std::thread::Builder::new().name("ares-image".to_owned()).spawn(move || run(&its, durable, room))?);
        Ok(Self { shared, thread })
    }

    /// Writes what has changed, then ends. The log must still run, or the last cut is left out.
    pub fn finish(mut self) {
        self.end(Order::Finish);
    }

    fn end(&mut self, order: Order) {
        self.shared.bell.tell(order, |now| now != Order::Abort);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the image's thread panicked");
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.end(Order::Abort);
    }
}

fn run(shared: &Shared, durable: watch::Receiver<Option<u64>>, room: u64) {
    let mut next = Instant::now() + Duration::from_millis(CUT_MS);
    // A write found the disk full: the store must be opened again before it is written.
    let mut stale = false;
    loop {
        let order = shared.bell.wait(next);
        if order == Order::Abort {
            return;
        }
        let waited = *shared.short_of_room().borrow();
        // Twice as much to go on, else a disk at its edge would be full and not full in turn.
        let mut waits = !has_room(shared.dir(), if waited { 2 * room } else { room });
        if waits {
            if !waited {
                tracing::warn!(dir = %shared.dir().display(), "less than {room} bytes are free: the image waits for more");
            }
        } else {
            let written = if stale { shared.reopen_image() } else { Ok(()) }.and_then(|()| write_cut(shared, &durable));
            match written {
                Ok(()) => stale = false,
                Err(full) if full.is_full() => {
                    tracing::error!(%full, "the disk is full: the image waits for space, and is opened again then");
                    (stale, waits) = (true, true);
                }
                Err(error) => {
                    shared.fail(error.to_string());
                    return;
                }
            }
        }
        shared.say_short_of_room(waits);
        if order == Order::Finish {
            return;
        }
        next = Instant::now() + Duration::from_millis(CUT_MS);
    }
}

/// True also where free space can't be asked for.
fn has_room(dir: &Path, room: u64) -> bool {
    statvfs(dir).map_or(true, |disk| disk.f_bavail.saturating_mul(disk.f_frsize) >= room)
}

/// One cut, if anything was applied since the last one.
fn write_cut(shared: &Shared, durable: &watch::Receiver<Option<u64>>) -> Result<(), StorageError> {
    // Held to the end: a snapshot that is installed meanwhile replaces state and image together.
    let _alone = shared.writing.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(image) = shared.image() else { return Ok(()) };
    let Some(cut) = shared.take_cut() else { return Ok(()) };
    let index = cut.applied().index;
    if !wait_durable(shared, durable, index) {
        return Ok(());
    }
    let persisted = image.write(cut.clone()).inspect_err(|_| shared.take_back(&cut))?;
    shared.cut_written(&persisted);
    Ok(())
}

/// The thread's work without a thread: only cuts up to which the local log is durable already, for nobody may wait.
#[cfg(feature = "simulated")]
async fn by_and_by(shared: Arc<Shared>, durable: watch::Receiver<Option<u64>>, room: u64) {
    while has_room(shared.dir(), room) {
        tokio::time::sleep(Duration::from_millis(CUT_MS)).await;
        while durable.borrow().is_none_or(|durable| durable < shared.applied().borrow().index) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if let Err(error) = write_cut(&shared, &durable) {
            shared.fail(error.to_string());
            return;
        }
    }
    shared.fail("the simulation's own disk is full".to_owned());
}

/// False when the replica ends first.
fn wait_durable(shared: &Shared, durable: &watch::Receiver<Option<u64>>, index: u64) -> bool {
    const LOOK: Duration = Duration::from_millis(10);
    let began = Instant::now();
    loop {
        if durable.borrow().is_some_and(|durable| durable >= index) {
            return true;
        }
        let ends = match shared.bell.order() {
            Order::Abort => true,
            Order::Finish => began.elapsed() > FINISH,
            Order::Run | Order::CutNow => false,
        };
        if ends || durable.has_changed().is_err() {
            return false;
        }
        std::thread::sleep(LOOK);
    }
}
