//! How far the log is durable, noted after each sync in a file of its own, `durable`. It is never synced, so it costs
//! next to nothing and may be behind, but never ahead: what it names was on disk. So a last segment that was cut short,
//! damaged at its very end, or lost is told from a write that never finished. Without a readable note nothing is lost
//! but this check.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"ARESSYNC";
/// The format's version: the day on which it was fixed.
const VERSION: u32 = 20261125;
/// Magic, version, segment u32, offset u64, crc32 of all before.
const LEN: usize = 28;

/// Everything before this offset of this segment was durable; segment 0: nothing is known. Only grows: what takes entries
/// away is written behind them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Known {
    pub segment: u32,
    pub offset: u64,
}

pub(super) struct Witness {
    path: PathBuf,
    /// `None` if it cannot be made, as on a full disk.
    file: Option<File>,
}

impl Witness {
    fn path(dir: &Path) -> PathBuf {
        dir.join("durable")
    }

    pub(super) fn look(dir: &Path) -> Option<Known> {
        let path = Witness::path(dir);
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the note of what was durable cannot be read");
                return None;
            }
        };
        let known = decode(&bytes);
        if known.is_none() {
            tracing::warn!(path = %path.display(), "the note of what was durable is not whole");
        }
        known
    }

    pub(super) fn open(dir: &Path) -> Witness {
        let path = Witness::path(dir);
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path).ok();
        Witness { path, file }
    }

    pub(super) fn note(&self, known: Known) {
        let written = self.file.as_ref().map_or(Ok(()), |file| file.write_all_at(&encode(known), 0));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "the note of what is durable cannot be written");
        }
    }
}

fn encode(known: Known) -> [u8; LEN] {
    let mut out = [0; LEN];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12..16].copy_from_slice(&known.segment.to_le_bytes());
    out[16..24].copy_from_slice(&known.offset.to_le_bytes());
    let crc = crc32fast::hash(&out[..24]);
    out[24..].copy_from_slice(&crc.to_le_bytes());
    out
}

fn decode(bytes: &[u8]) -> Option<Known> {
    let bytes: &[u8; LEN] = bytes.try_into().ok()?;
    let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    if &bytes[..8] != MAGIC || half(8) != VERSION || half(24) != crc32fast::hash(&bytes[..24]) {
        return None;
    }
    Some(Known { segment: half(12), offset: u64::from_le_bytes(bytes[16..24].try_into().expect("eight bytes")) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_the_note_stay() {
        let known = Known { segment: 3, offset: 500 };
        let bytes = encode(known);
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "4152455353594e430529350103000000f4010000000000000e84ed23");
        assert_eq!(decode(&bytes), Some(known));
        assert_eq!(decode(&bytes[1..]), None);
    }
}
