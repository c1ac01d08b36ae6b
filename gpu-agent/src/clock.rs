//! The one clock of leases on a machine: CLOCK_BOOTTIME in milliseconds, which counts the time a machine was suspended.
//! The pure steps take `now` as an argument; only the shells around them read it here.

use planted::{Bug, planted};
use rustix::time::{ClockId, clock_gettime};

/// Milliseconds since boot, suspended time included.
pub fn boot_ms() -> u64 {
    let ms = |clock| {
        let now = clock_gettime(clock);
        now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000
    };
    of_deadlines(|| ms(ClockId::Boottime) + leap::ms(), || ms(ClockId::Monotonic))
}

/// What tests of a suspended machine need: CLOCK_BOOTTIME leaps by as many ms as stand in the file that this variable
/// names, whenever it changes. Agent, shim and ranks find it in their environment; no release build reads it.
pub const LEAP_FILE: &str = "ARES_TEST_CLOCK_LEAP_FILE";

#[cfg(debug_assertions)]
pub mod leap {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    use rustix::time::Timespec;

    /// How late a sleeper may notice that its clock leapt: a real timer of CLOCK_BOOTTIME fires at the waking.
    const NOTICED: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };

    fn file() -> Option<&'static PathBuf> {
        static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
        FILE.get_or_init(|| std::env::var_os(super::LEAP_FILE).map(PathBuf::from)).as_ref()
    }

    pub fn ms() -> u64 {
        file().and_then(|path| std::fs::read_to_string(path).ok()?.trim().parse().ok()).unwrap_or(0)
    }

    /// When a sleep must end at the latest to see a leap; `None` = no leap is to come.
    pub fn wake() -> Option<Timespec> {
        file().map(|_| NOTICED)
    }
}

#[cfg(not(debug_assertions))]
pub mod leap {
    use rustix::time::Timespec;

    pub fn ms() -> u64 {
        0
    }

    pub fn wake() -> Option<Timespec> {
        None
    }
}

/// Which of a machine's clocks deadlines are counted by: the one that counts the time in suspension.
pub fn of_deadlines<T>(boot: impl FnOnce() -> T, monotonic: impl FnOnce() -> T) -> T {
    if planted(Bug::MonotonicClock) { monotonic() } else { boot() }
}

/// Milliseconds since 1970, for display only.
pub fn wall_ms() -> u64 {
    let now = clock_gettime(ClockId::Realtime);
    now.tv_sec as u64 * 1_000 + now.tv_nsec as u64 / 1_000_000
}
