//! The vote, in two checksummed files, both written and synced one after the other before any answer. So one bad copy
//! is either a write that nobody was told of, or damage beside an equal copy: the good one counts. The files are
//! overwritten in place, which needs no space: a replica on a full disk can still save a vote.
//!
//! They are made, without a vote, before the first segment: a log without them has lost its vote, not never had one.
//!
//! A vote says too how far the log was durable when it was saved. Unlike the note in `durable`, that was synced: a log
//! that ends before it has lost entries, whatever became of the note.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::segment::sync_dir;
use super::witness::Known;
use super::{LogError, Vote};

const NAMES: [&str; 2] = ["vote-a", "vote-b"];
const MAGIC: &[u8; 8] = b"ARESVOTE";
/// The format's version: the day on which it was fixed.
const VERSION: u32 = 20261126;
/// Magic, version, has a vote u8, committed u8, term u64, node u64, durable segment u32 and offset u64, crc32 of all
/// before.
const LEN: usize = 46;

#[derive(Debug)]
pub(super) struct VoteFiles {
    copies: [(PathBuf, File); 2],
}

/// What lies on disk.
pub(super) enum Found {
    /// At least one good copy, and the end of what was durable with it.
    Vote(Option<Vote>, Known),
    /// No good copy, and at most one that was ever written: the state before the first start was over.
    Blank,
    /// Both copies were written and both are bad.
    Bad,
}

impl VoteFiles {
    /// Looks at the copies of `dir`; changes nothing.
    pub(super) fn look(dir: &Path) -> Result<Found, LogError> {
        let mut written = 0;
        let mut good = Vec::new();
        for name in NAMES {
            let path = dir.join(name);
            let bytes = match std::fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(LogError::io("read", &path)(error)),
            };
            written += usize::from(!bytes.is_empty());
            match decode(&bytes) {
                Some((VERSION, vote, known)) => good.push((vote, known)),
                Some((found, ..)) => return Err(LogError::Format { path, found, known: VERSION }),
                None => tracing::warn!(path = %path.display(), "a copy of the vote is not readable"),
            }
        }
        Ok(match good.into_iter().max() {
            Some((vote, known)) => Found::Vote(vote, known),
            None if written < NAMES.len() => Found::Blank,
            None => Found::Bad,
        })
    }

    /// Opens both copies, made if absent, and makes `vote` durable in both: what a look found may be in the page cache
    /// only.
    pub(super) fn open(dir: &Path, vote: Option<Vote>, known: Known) -> Result<VoteFiles, LogError> {
        let open = |name: &str| {
            let path = dir.join(name);
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
            Ok((path.clone(), file.map_err(LogError::io("open", &path))?))
        };
        let files = VoteFiles { copies: [open(NAMES[0])?, open(NAMES[1])?] };
        files.save(vote, known)?;
        sync_dir(dir).map_err(LogError::io("sync", dir))?;
        Ok(files)
    }

    /// `known`: up to where the log is durable for sure.
    pub(super) fn save(&self, vote: Option<Vote>, known: Known) -> Result<(), LogError> {
        let bytes = encode(vote, known);
        for (path, file) in &self.copies {
            file.write_all_at(&bytes, 0).map_err(LogError::io("write", path))?;
            file.sync_data().map_err(LogError::io("sync", path))?;
        }
        Ok(())
    }
}

fn encode(vote: Option<Vote>, known: Known) -> [u8; LEN] {
    let mut out = [0; LEN];
    let Vote { term, node, committed } = vote.unwrap_or_default();
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[12] = vote.is_some() as u8;
    out[13] = committed as u8;
    out[14..22].copy_from_slice(&term.to_le_bytes());
    out[22..30].copy_from_slice(&node.to_le_bytes());
    out[30..34].copy_from_slice(&known.segment.to_le_bytes());
    out[34..42].copy_from_slice(&known.offset.to_le_bytes());
    let crc = crc32fast::hash(&out[..42]);
    out[42..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Version and contents of a whole copy.
fn decode(bytes: &[u8]) -> Option<(u32, Option<Vote>, Known)> {
    let bytes: &[u8; LEN] = bytes.try_into().ok()?;
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let half = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    if &bytes[..8] != MAGIC || half(42) != crc32fast::hash(&bytes[..42]) {
        return None;
    }
    let vote = Vote { term: word(14), node: word(22), committed: bytes[13] == 1 };
    let known = Known { segment: half(30), offset: word(34) };
    Some((half(8), (bytes[12] == 1).then_some(vote), known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_the_vote_stay() {
        let vote = Some(Vote { term: 7, node: 9, committed: true });
        let known = Known { segment: 3, offset: 500 };
        let bytes = encode(vote, known);
        assert_eq!(decode(&bytes), Some((VERSION, vote, known)));
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "41524553564f54450629350101010700000000000000090000000000000003000000f401000000000000901026f2");
    }
}
