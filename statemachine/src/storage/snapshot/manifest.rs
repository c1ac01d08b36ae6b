//! The MANIFEST: what a snapshot is of, and what each of its files must be. Two lines: JSON, and the SHA-256 of it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::super::blocks::Written;
use super::super::error::{At, StorageError};
use crate::record::LogPosition;
use crate::state::State;

/// The name of the file that makes a directory a snapshot.
pub const MANIFEST: &str = "MANIFEST";
const FORMAT: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// The last entry that the snapshot holds.
    pub position: LogPosition,
    /// Feature level of the state.
    pub level: u16,
    /// `Meta::membership` in hex: opaque here.
    pub membership: String,
    /// The state's digest in hex.
    pub digest: String,
    /// Every file but the MANIFEST.
    pub files: Vec<FileEntry>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// In hex.
    pub sha256: String,
}

impl Manifest {
    pub(super) fn of(state: &State, digest: u128, files: Vec<FileEntry>) -> Self {
        Self {
            format: FORMAT,
            position: state.meta.applied,
            level: state.meta.level,
            membership: hex(&state.meta.membership),
            digest: format!("{digest:032x}"),
            files,
        }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_string(self).expect("a manifest holds only strings and integers");
        format!("{json}\n{}\n", hex(&Sha256::digest(json.as_bytes()))).into_bytes()
    }

    /// Reads a manifest, its own checksum and the names in it verified.
    pub(super) fn decode(bytes: &[u8], path: &Path) -> Result<Self, StorageError> {
        let damaged = |what: &str| StorageError::damaged(path, "read", what);
        let text = std::str::from_utf8(bytes).map_err(|_| damaged("it is not text"))?;
        let (json, sum) = text
            .strip_suffix('\n')
            .and_then(|text| text.split_once('\n'))
            .ok_or_else(|| damaged("it is cut off: a manifest has two lines"))?;
        if hex(&Sha256::digest(json.as_bytes())) != sum {
            return Err(damaged("its checksum is wrong"));
        }
        let manifest: Manifest = serde_json::from_str(json).map_err(|err| damaged(&err.to_string()))?;
        if manifest.format != FORMAT {
            return Err(damaged(&format!("format {} is unknown to this binary (it knows {FORMAT})", manifest.format)));
        }
        match manifest.files.iter().find(|file| !is_file_name(&file.name)) {
            Some(file) => Err(damaged(&format!("{:?} is no name of a snapshot's file", file.name))),
            None => Ok(manifest),
        }
    }

    pub(super) fn read(dir: &Path) -> Result<Self, StorageError> {
        let path = dir.join(MANIFEST);
        Self::decode(&fs::read(&path).at(&path, "read")?, &path)
    }

    /// Writes and syncs it.
    pub(super) fn write(&self, dir: &Path) -> Result<(), StorageError> {
        let path = dir.join(MANIFEST);
        let mut file = File::create(&path).at(&path, "create")?;
        file.write_all(&self.encode()).at(&path, "write")?;
        file.sync_all().at(&path, "sync")
    }
}

impl FileEntry {
    pub(super) fn new(name: &str, written: Written) -> Self {
        Self { name: name.into(), size: written.size, sha256: hex(&written.sha256) }
    }
}

/// Whether a name is one that a snapshot's file may have: nothing that could leave the directory.
pub(super) fn is_file_name(name: &str) -> bool {
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    match name.strip_prefix("history-") {
        Some(rest) => rest.len() == 43 && rest.split_once('-').is_some_and(|(bucket, sum)| plain(bucket) && plain(sum)),
        None => matches!(name, "live" | "events" | MANIFEST),
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
