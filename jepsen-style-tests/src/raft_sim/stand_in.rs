//! Clock and chance of a simulating thread, below everything that asks for them: this program's `getrandom` and `clock_gettime` take
//! the place of the C library's. So no code is told that it is simulated to be asked for its time or its random numbers, and none can be
//! forgotten: hash maps, election timeouts, salts, identities. Other threads get the machine's own.

use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::time::Duration;

/// Where simulated time begins: long after a boot, in Unix time in November 2023.
const MONOTONIC: Duration = Duration::from_secs(100_000);
pub const WALL: Duration = Duration::from_secs(1_700_000_000);

thread_local! {
    /// The state of the numbers; `None` on a thread that simulates nothing.
    static CHANCE: Cell<Option<u64>> = const { Cell::new(None) };
    static NOW: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    static LEAP_MS: Cell<i64> = const { Cell::new(0) };
}

/// From now on this thread's time and chance are simulated, for its life.
pub fn begin(seed: u64) {
    CHANCE.set(Some(seed));
}

/// Simulated time since the beginning.
pub fn set_now(now: Duration) {
    NOW.set(now);
}

/// The wall clocks are off by so much.
pub fn set_leap_ms(leap: i64) {
    LEAP_MS.set(leap);
}

/// The next eight bytes, SplitMix64; `None` on a thread that simulates nothing.
fn next() -> Option<u64> {
    let state = CHANCE.get()?.wrapping_add(0x9e37_79b9_7f4a_7c15);
    CHANCE.set(Some(state));
    let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    Some(mixed ^ (mixed >> 31))
}

fn now(clock: c_int) -> Option<Duration> {
    CHANCE.get()?;
    match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => {
            let wall = WALL + NOW.get();
            let leap = Duration::from_millis(LEAP_MS.get().unsigned_abs());
            Some(if LEAP_MS.get() < 0 { wall - leap } else { wall + leap })
        }
        libc::CLOCK_MONOTONIC | libc::CLOCK_MONOTONIC_RAW | libc::CLOCK_MONOTONIC_COARSE | libc::CLOCK_BOOTTIME => {
            Some(MONOTONIC + NOW.get())
        }
        _ => None,
    }
}

/// Takes the C library's place.
///
/// # Safety
/// As for the C library's: `buffer` has `len` bytes that may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut c_void, len: usize, flags: c_uint) -> isize {
    if CHANCE.get().is_none() {
        // SAFETY: the caller's promise.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, len, flags) } as isize;
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), len) };
    for chunk in bytes.chunks_mut(8) {
        let number = next().unwrap_or_default().to_le_bytes();
        chunk.copy_from_slice(&number[..chunk.len()]);
    }
    len as isize
}

/// Takes the C library's place.
///
/// # Safety
/// As for the C library's: `time` may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: c_int, time: *mut libc::timespec) -> c_int {
    let Some(now) = now(clock) else {
        // SAFETY: the caller's promise.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as c_int;
    };
    let now = libc::timespec { tv_sec: now.as_secs() as i64, tv_nsec: i64::from(now.subsec_nanos()) };
    // SAFETY: the caller's promise.
    unsafe { time.write(now) };
    0
}
