//! From a failing run to the few faults that it takes: delta debugging over its schedule; and the file that keeps them. What a run is, is
//! the tiers'.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The fewest faults found that still fail, with at most `left` runs; what is left of them afterwards.
pub fn least<T: Clone>(faults: &[T], left: &mut usize, fails: impl Fn(&[T]) -> bool) -> Vec<T> {
    let mut best = faults.to_vec();
    let mut chunks = 2;
    while best.len() > 1 && *left > 0 {
        let size = best.len().div_ceil(chunks);
        let mut smaller = None;
        for from in (0..best.len()).step_by(size) {
            if *left == 0 {
                break;
            }
            *left -= 1;
            let mut candidate = best.clone();
            candidate.drain(from..(from + size).min(best.len()));
            if fails(&candidate) {
                smaller = Some(candidate);
                break;
            }
        }
        match smaller {
            Some(smaller) => {
                best = smaller;
                chunks = (chunks - 1).max(2);
            }
            None if size == 1 => break,
            None => chunks = (chunks * 2).min(best.len()),
        }
    }
    best
}

/// Writes `DIR/<invariant>-<hash>.json`.
pub fn keep(found: &impl Serialize, invariant: &str, dir: &Path) -> io::Result<PathBuf> {
    let mut json = serde_json::to_vec_pretty(found)?;
    json.push(b'\n');
    let path = dir.join(format!("{invariant}-{:08x}.json", xxhash_rust::xxh3::xxh3_64(&json) as u32));
    fs::create_dir_all(dir)?;
    fs::write(&path, json)?;
    Ok(path)
}

/// What was kept in a directory, by the names of its files.
pub fn kept<C: DeserializeOwned>(dir: &Path) -> io::Result<Vec<(PathBuf, C)>> {
    let mut files: Vec<PathBuf> =
        dir.read_dir()?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    let read = |path: PathBuf| {
        let wrong = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let found = fs::read(&path).and_then(|json| Ok(serde_json::from_slice(&json)?)).map_err(wrong)?;
        Ok((path, found))
    };
    files.into_iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn what_fails_together_is_found_and_no_run_is_made_beyond_the_limit() {
        let faults: Vec<u32> = (0..40).collect();
        let (runs, mut left) = (Cell::new(0), 200);
        let fails = |some: &[u32]| {
            runs.set(runs.get() + 1);
            some.contains(&7) && some.contains(&31)
        };
        assert_eq!(least(&faults, &mut left, fails), [7, 31]);
        assert_eq!(runs.get() + left, 200);
        let mut few = 3;
        assert!(least(&faults, &mut few, fails).len() > 2 && few == 0);
    }
}
