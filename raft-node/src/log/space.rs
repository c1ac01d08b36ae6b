//! Disk space: zeros that take it, whether there is enough of it, the error that says there is none.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::statvfs;

/// Zeros written, or compared with, at once.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Overwrites these bytes of the file, and extends it where it is shorter.
pub(super) fn write_zeros(file: &File, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let n = (range.end - at).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..n as usize], at)?;
        at += n;
    }
    Ok(())
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROS.len()).all(|chunk| *chunk == ZEROS[..chunk.len()])
}

/// Whether the disk of `dir` has twice as much to spare. What only makes the log faster, or can wait, must not be what
/// fills a disk.
pub(super) fn is_ample(dir: &Path, bytes: u64) -> io::Result<bool> {
    let disk = statvfs(dir)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize) >= bytes.saturating_mul(2))
}

/// Whether an error says that the disk, or the user's share of it, is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
