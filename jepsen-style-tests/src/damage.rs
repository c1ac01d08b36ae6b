//! Damage to the files of a replica that does not run, and what its next start must make of it: a log or a vote that lost something is
//! refused with the file's name, an image or a snapshot that can't be read is set aside and had from elsewhere, and nobody serves what
//! was damaged. What the group must still promise afterwards is `checks`'.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rand::RngExt;
use rand::rngs::StdRng;

use crate::cluster::{Cluster, SOON};

/// Of a file whose bytes are replaced in many places, one in so many.
const SPREAD: u64 = 512;

/// A kind of damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Damage {
    /// One bit of what the log had made durable
    BitInLog,
    /// The second half of the log
    LogCutOff,
    /// An older piece of the log in the place of a newer one
    OldPieceInLog,
    /// One of the two copies of the vote
    OneVote,
    /// Both of them
    BothVotes,
    /// One bit of the image
    BitInImage,
    /// Bytes all over the image
    Image,
    /// The image, and one bit of the newest snapshot
    ImageAndSnapshot,
    /// The image and all snapshots
    ImageAndAllSnapshots,
}

/// What a start made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ended, and said which file and where.
    Refused,
    /// It serves, and said what it could not read.
    Rebuilt,
    /// It serves and said nothing: the bits mean nothing to anybody.
    Unnoticed,
}

impl Damage {
    pub const ALL: [Damage; 9] = [
        Damage::BitInLog,
        Damage::LogCutOff,
        Damage::OldPieceInLog,
        Damage::OneVote,
        Damage::BothVotes,
        Damage::BitInImage,
        Damage::Image,
        Damage::ImageAndSnapshot,
        Damage::ImageAndAllSnapshots,
    ];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Damage::BitInLog => "a flipped bit in the log",
            Damage::LogCutOff => "a log that is cut off",
            Damage::OldPieceInLog => "an old piece in the log",
            Damage::OneVote => "one copy of the vote",
            Damage::BothVotes => "both copies of the vote",
            Damage::BitInImage => "a flipped bit in the image",
            Damage::Image => "the image",
            Damage::ImageAndSnapshot => "the image and the newest snapshot",
            Damage::ImageAndAllSnapshots => "the image and all snapshots",
        }
    }

    /// Whether a start may make this of it.
    pub fn allows(self, outcome: &Outcome) -> bool {
        match self {
            Damage::BitInLog | Damage::LogCutOff | Damage::OldPieceInLog | Damage::BothVotes => {
                *outcome == Outcome::Refused
            }
            Damage::OneVote | Damage::Image | Damage::ImageAndSnapshot | Damage::ImageAndAllSnapshots => {
                *outcome == Outcome::Rebuilt
            }
            // A page that nothing refers to any more, or a row of history that is mended when it is read.
            Damage::BitInImage => *outcome != Outcome::Refused,
        }
    }

    /// Damages the directory of a replica that does not run: the files. An error: there is nothing yet to damage so.
    pub fn strike(self, dir: &Path, rng: &mut StdRng) -> Result<Vec<PathBuf>, String> {
        let log = dir.join("log");
        match self {
            Damage::BitInLog => flip(&newest_segment(&log)?, rng),
            Damage::LogCutOff => {
                let (segment, end) = newest_segment(&log)?;
                let file = open(&segment)?;
                file.set_len(end / 2).map_err(at(&segment))?;
                Ok(vec![segment])
            }
            Damage::OldPieceInLog => {
                let (segment, end) = newest_segment(&log)?;
                let (file, mut piece) = (open(&segment)?, vec![0; 256.min(end as usize / 4)]);
                file.read_exact_at(&mut piece, end / 8).map_err(at(&segment))?;
                file.write_all_at(&piece, end / 2).map_err(at(&segment))?;
                Ok(vec![segment])
            }
            Damage::OneVote => {
                let copy = log.join(["vote-a", "vote-b"][rng.random_range(0..2)]);
                flip(&(copy.clone(), length(&copy)?), rng)
            }
            Damage::BothVotes => {
                let copies = [log.join("vote-a"), log.join("vote-b")];
                copies.iter().map(|copy| flip(&(copy.clone(), length(copy)?), rng)).collect::<Result<Vec<_>, _>>()?;
                Ok(copies.to_vec())
            }
            Damage::BitInImage => {
                let image = largest(&dir.join("image"))?;
                flip(&(image.clone(), length(&image)?), rng)
            }
            Damage::Image => spoil(&files(&dir.join("image"))?),
            Damage::ImageAndSnapshot => {
                let newest = snapshots(dir)?.pop().ok_or("no snapshot yet")?;
                let state = largest(&newest)?;
                spoil(&files(&dir.join("image"))?)?;
                flip(&(state.clone(), length(&state)?), rng)
            }
            Damage::ImageAndAllSnapshots => {
                let all: Vec<PathBuf> =
                    snapshots(dir)?.iter().map(|one| files(one)).collect::<Result<Vec<_>, _>>()?.concat();
                if all.is_empty() {
                    return Err("no snapshot yet".to_owned());
                }
                spoil(&files(&dir.join("image"))?)?;
                spoil(&all)
            }
        }
    }
}

/// Starts a replica whose files were damaged, and looks what it makes of it. An error: it made what it must not.
pub async fn start_and_look(
    cluster: &mut Cluster,
    at: usize,
    damage: Damage,
    struck: &[PathBuf],
) -> Result<Outcome, String> {
    let before = cluster.replica_log(at).len();
    cluster.restart_replica(at);
    let outcome = match cluster.serves_or_ends(at, SOON).await? {
        Some(code) => {
            let said = cluster.replica_log(at)[before..].to_owned();
            let named = struck.iter().filter_map(|path| path.file_name()?.to_str()).any(|name| said.contains(name));
            if code != 1 || !named {
                return Err(format!(
                    "replica {at} ended with {code} over {} and named no file:\n{said}",
                    damage.name()
                ));
            }
            Outcome::Refused
        }
        None => {
            let said = cluster.replica_log(at)[before..].to_owned();
            let words = ["aside", "not readable", "is damaged", "does not verify"];
            if words.iter().any(|word| said.contains(word)) { Outcome::Rebuilt } else { Outcome::Unnoticed }
        }
    };
    if damage.allows(&outcome) {
        return Ok(outcome);
    }
    let said = cluster.replica_log(at)[before..].to_owned();
    Err(format!("{}, {}: replica {at} may not make of it {outcome:?}:\n{said}", damage.name(), shown(struck)))
}

fn shown(files: &[PathBuf]) -> String {
    files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Flips one bit in the first three quarters of a file that is used up to `end`: what comes last may be what nobody was told of.
fn flip((path, end): &(PathBuf, u64), rng: &mut StdRng) -> Result<Vec<PathBuf>, String> {
    let (file, mut byte) = (open(path)?, [0]);
    let offset = rng.random_range(0..(end * 3 / 4).max(1));
    file.read_exact_at(&mut byte, offset).map_err(at(path))?;
    file.write_all_at(&[byte[0] ^ 1 << rng.random_range(0..8)], offset).map_err(at(path))?;
    Ok(vec![path.clone()])
}

fn spoil(all: &[PathBuf]) -> Result<Vec<PathBuf>, String> {
    for path in all {
        let (file, length) = (open(path)?, length(path)?);
        for offset in (0..length).step_by(SPREAD as usize) {
            file.write_all_at(&[0xa5; 16][..16.min((length - offset) as usize)], offset).map_err(at(path))?;
        }
    }
    Ok(all.to_vec())
}

/// The segment that was written to, and where its frames end: behind it are zeros.
fn newest_segment(log: &Path) -> Result<(PathBuf, u64), String> {
    let mut segments: Vec<PathBuf> = files(log)?.into_iter().filter(|path| path.extension().is_some()).collect();
    segments.sort();
    let segment = segments.pop().ok_or("the log has no segment")?;
    let bytes = fs::read(&segment).map_err(at(&segment))?;
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap_or_default() as u64;
    if end < 4_096 { Err("the newest segment is nearly empty".to_owned()) } else { Ok((segment, end)) }
}

/// Directories of whole snapshots, the newest last.
fn snapshots(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let dir = dir.join("snapshots");
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(&dir).map_err(at(&dir))?.flatten().map(|entry| entry.path());
    let mut all: Vec<(std::time::SystemTime, PathBuf)> = Vec::new();
    for path in entries.filter(|path| path.is_dir()) {
        all.push((fs::metadata(&path).and_then(|meta| meta.modified()).map_err(at(&path))?, path));
    }
    all.sort();
    Ok(all.into_iter().map(|(_, path)| path).collect())
}

/// All files below a directory that hold anything.
fn files(dir: &Path) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let path = entry.map_err(at(dir))?.path();
        if path.is_dir() {
            found.extend(files(&path)?);
        } else if length(&path)? > 0 {
            found.push(path);
        }
    }
    Ok(found)
}

fn largest(dir: &Path) -> Result<PathBuf, String> {
    let all = files(dir)?;
    all.into_iter()
        .max_by_key(|path| length(path).unwrap_or_default())
        .ok_or_else(|| format!("{} is empty", dir.display()))
}

fn length(path: &Path) -> Result<u64, String> {
    Ok(fs::metadata(path).map_err(at(path))?.len())
}

fn open(path: &Path) -> Result<File, String> {
    OpenOptions::new().read(true).write(true).open(path).map_err(at(path))
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> String + use<> {
    let path = path.display().to_string();
    move |error| format!("{path}: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn a_flip_changes_one_bit_that_was_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("file");
        fs::write(&path, [7; 64]).expect("written");
        flip(&(path.clone(), 40), &mut StdRng::seed_from_u64(3)).expect("flipped");
        let bytes = fs::read(&path).expect("read");
        let changed: Vec<usize> = (0..64).filter(|at| bytes[*at] != 7).collect();
        assert!(changed.len() == 1 && changed[0] < 30, "{changed:?}");
        assert_eq!((bytes[changed[0]] ^ 7).count_ones(), 1);
    }

    #[test]
    fn a_log_that_serves_on_over_damage_is_no_allowed_outcome() {
        for damage in Damage::ALL {
            let refuses = damage.allows(&Outcome::Refused);
            assert_ne!(refuses, damage.allows(&Outcome::Rebuilt), "{damage:?}");
            assert_eq!(damage.allows(&Outcome::Unnoticed), damage == Damage::BitInImage);
        }
    }
}
