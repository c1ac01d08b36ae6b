//! The fence file: what keeps an agent from starting an attempt twice, or an older one after a newer. It is on disk,
//! synced, before any process of an attempt starts; one write serves all starts of a reconcile.
//!
//! Its shape: a line `ares-fence VERSION CRC32`, then JSON. Written whole, renamed into place, directory synced.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use planted::{Bug, planted};
use serde::{Deserialize, Serialize};

use crate::shim::record::replace;

const FILE: &str = "fence";
const VERSION: u32 = 1;

/// A part that was started or prepared, and whose end the leader has not acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Live {
    pub job_id: u64,
    pub first_rank: u32,
    pub ranks: u32,
    pub gpus: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Boot in which it was written last.
    pub boot: String,
    /// Highest desired set acted on: (incarnation, index).
    pub incarnation: u32,
    pub index: u64,
    pub max_token: u64,
    /// Tokens up to this one whose records were removed: never started again.
    pub floor: u64,
    /// Highest token of each GPU.
    pub gpus: BTreeMap<String, u64>,
    pub live: BTreeMap<u64, Live>,
}

impl Content {
    /// Whether this attempt may be started here; changes nothing.
    pub fn check(&self, token: u64, gpus: &[String]) -> Result<(), Refusal> {
        if self.live.contains_key(&token) {
            return Err(Refusal::StartedBefore { token });
        }
        if token <= self.floor {
            return Err(Refusal::BelowFloor { token, floor: self.floor });
        }
        for gpu in gpus {
            match self.gpus.get(gpu) {
                Some(newer) if *newer > token => {
                    return Err(Refusal::GpuNewer { token, gpu: gpu.clone(), newer: *newer });
                }
                Some(same) if *same == token => return Err(Refusal::StartedBefore { token }),
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes the attempt up; It must be saved before it starts.
    pub fn add(&mut self, token: u64, live: Live) {
        for gpu in &live.gpus {
            self.gpus.insert(gpu.clone(), token);
        }
        self.max_token = self.max_token.max(token);
        self.live.insert(token, live);
    }

    /// The leader has the end of this attempt. On disk with the next save: until then it is only told again.
    pub fn forget(&mut self, token: u64) {
        self.live.remove(&token);
    }
}

/// How the file was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Intact.
    Intact,
    /// There was none, in a directory that never had an agent.
    Fresh,
    /// It was damaged or gone: what runs here may be unknown, and the leader is told so.
    Damaged,
}

/// Why a start is refused for good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("token {token} was started here before")]
    StartedBefore { token: u64 },
    #[error("token {token} is not above {floor}, the highest whose records were removed")]
    BelowFloor { token: u64, floor: u64 },
    #[error("token {token} is older than {newer}, which had GPU {gpu} after it")]
    GpuNewer { token: u64, gpu: String, newer: u64 },
}

pub struct Fence {
    dir: PathBuf,
    pub content: Content,
}

impl Fence {
    /// `fresh`: the directory was made just now. A damaged file is moved aside, and said loudly.
    pub fn open(dir: &Path, boot: &str, fresh: bool) -> io::Result<(Self, Found)> {
        let path = dir.join(FILE);
        let (content, found) = match fs::read(&path) {
            Ok(bytes) => match decode(&bytes) {
                Ok(content) => (content, Found::Intact),
                Err(what) => {
                    let aside = dir.join(format!("{FILE}.damaged-{}", crate::clock::wall_ms()));
                    fs::rename(&path, &aside)?;
                    tracing::error!(
                        file = %path.display(), kept_as = %aside.display(), what,
                        "the fence file is damaged: the leader is told that attempts may run here unknown"
                    );
                    (Content::default(), Found::Damaged)
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound && fresh => (Content::default(), Found::Fresh),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                tracing::error!(file = %path.display(), "the fence file is gone: the leader is told");
                (Content::default(), Found::Damaged)
            }
            Err(error) => return Err(error),
        };
        let mut fence = Self { dir: dir.to_owned(), content };
        fence.content.boot = boot.to_owned();
        fence.save()?;
        Ok((fence, found))
    }

    /// Whether this attempt may be started here; changes nothing.
    pub fn check(&self, token: u64, gpus: &[String]) -> Result<(), Refusal> {
        self.content.check(token, gpus)
    }

    /// Takes the attempt up; [`Fence::save`] must follow before it starts.
    pub fn add(&mut self, token: u64, live: Live) {
        self.content.add(token, live);
    }

    /// The leader has the end of this attempt. On disk with the next save: until then it is only told again.
    pub fn forget(&mut self, token: u64) {
        self.content.forget(token);
    }

    /// Syncs file and directory.
    pub fn save(&self) -> io::Result<()> {
        replace(&self.dir.join(FILE), &encode(&self.content)?, !planted(Bug::FenceNotSynced))
    }
}

fn encode(content: &Content) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(content)?;
    let mut bytes = format!("ares-fence {VERSION} {:08x}\n", crc32fast::hash(&json)).into_bytes();
    bytes.extend(json);
    Ok(bytes)
}

fn decode(bytes: &[u8]) -> Result<Content, String> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("no header line")?;
    let header = std::str::from_utf8(&bytes[..end]).map_err(|_| "the header is not text")?;
    let json = &bytes[end + 1..];
    let wanted = format!("ares-fence {VERSION} {:08x}", crc32fast::hash(json));
    if header != wanted {
        return Err(format!("header {header:?}, but its content has {wanted:?}"));
    }
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn live(gpus: &[&str]) -> Live {
        Live { job_id: 1, first_rank: 0, ranks: 1, gpus: gpus.iter().map(|gpu| (*gpu).to_owned()).collect() }
    }

    #[test]
    fn a_token_is_started_once_over_restarts() {
        let dir = tempfile::tempdir().unwrap();
        let (mut fence, found) = Fence::open(dir.path(), "b1", true).unwrap();
        assert_eq!(found, Found::Fresh);
        fence.check(7, &["g0".into()]).unwrap();
        fence.add(7, live(&["g0"]));
        fence.save().unwrap();
        let (mut fence, found) = Fence::open(dir.path(), "b1", false).unwrap();
        assert_eq!(found, Found::Intact);
        assert_eq!(fence.check(7, &["g0".into()]), Err(Refusal::StartedBefore { token: 7 }));
        fence.forget(7);
        assert_eq!(fence.check(7, &["g0".into()]), Err(Refusal::StartedBefore { token: 7 }));
        assert!(matches!(fence.check(6, &["g0".into()]), Err(Refusal::GpuNewer { newer: 7, .. })));
        fence.check(8, &["g0".into()]).unwrap();
        assert_eq!(fence.content.max_token, 7);
    }

    #[test]
    fn a_damaged_file_is_moved_aside_and_told() {
        let dir = tempfile::tempdir().unwrap();
        let (mut fence, _) = Fence::open(dir.path(), "b1", true).unwrap();
        fence.add(7, live(&[]));
        fence.save().unwrap();
        let path = dir.path().join(FILE);
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 3;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        let (fence, found) = Fence::open(dir.path(), "b1", false).unwrap();
        assert_eq!(found, Found::Damaged);
        assert!(fence.content.live.is_empty());
        let kept = fs::read_dir(dir.path()).unwrap().flatten();
        assert!(kept.into_iter().any(|entry| entry.file_name().to_string_lossy().contains("damaged")));
    }

    #[test]
    fn a_file_that_vanished_from_a_used_directory_is_told() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Fence::open(dir.path(), "b1", false).unwrap().1, Found::Damaged);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn no_flipped_bit_is_taken_for_content(at in 0usize..4_096, bit in 0u8..8) {
            let mut content = Content { boot: "b".into(), max_token: 9, ..Content::default() };
            content.live.insert(9, live(&["g0", "g1"]));
            let mut bytes = encode(&content).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
