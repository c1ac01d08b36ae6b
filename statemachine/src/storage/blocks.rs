//! The format of a snapshot's files: rows in blocks of about 64 KiB, each with its CRC, and a trailer that counts them.
//! Every file of a snapshot has it but the MANIFEST.
//!
//! | part | layout (integers little-endian) |
//! |---|---|
//! | head | `ARESSNP1` |
//! | block | length u32, crc32 u32 of length and payload, payload: rows of (tag u8, key length, length, key, bytes) |
//! | trailer | length u32 = 24 with the top bit set, crc32 u32, rows u64, check u128 |

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::codec::Tag;
use super::error::{At, StorageError};
use super::pages::{RowReader, put_row};

const MAGIC: &[u8; 8] = b"ARESSNP1";
const BLOCK: usize = 64 << 10;
/// A block is at most one row above [`BLOCK`].
const BLOCK_LIMIT: usize = BLOCK + super::codec::RECORD_LIMIT + 1_024;
const TRAILER: u32 = 1 << 31;
const TRAILER_LEN: usize = 24;

/// What a finished file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub size: u64,
    pub sha256: [u8; 32],
}

/// Gets (tag byte, key, canonical bytes) of a row.
pub(crate) type EachRow<'a> = &'a mut dyn FnMut(u8, &[u8], &[u8]) -> Result<(), StorageError>;

pub(crate) struct BlockWriter {
    path: PathBuf,
    file: BufWriter<File>,
    sha: Sha256,
    size: u64,
    block: Vec<u8>,
    rows: u64,
}

impl BlockWriter {
    pub fn create(path: &Path) -> Result<Self, StorageError> {
        let file = BufWriter::with_capacity(256 << 10, File::create(path).at(path, "create")?);
        let mut writer = Self { path: path.into(), file, sha: Sha256::new(), size: 0, block: Vec::new(), rows: 0 };
        writer.put(MAGIC)?;
        Ok(writer)
    }

    pub fn push(&mut self, tag: Tag, key: &[u8], canonical: &[u8]) -> Result<(), StorageError> {
        // The tag travels as the first byte of the key.
        put_row(&mut self.block, &[&[tag as u8], key].concat(), canonical);
        self.rows += 1;
        if self.block.len() >= BLOCK { self.end_block() } else { Ok(()) }
    }

    /// Writes the trailer and syncs the file.
    pub fn finish(mut self, check: u128) -> Result<Written, StorageError> {
        if !self.block.is_empty() {
            self.end_block()?;
        }
        let trailer = [&self.rows.to_le_bytes()[..], &check.to_le_bytes()].concat();
        self.put_framed(TRAILER | TRAILER_LEN as u32, &trailer)?;
        let file = self.file.into_inner().map_err(|err| err.into_error()).at(&self.path, "write")?;
        file.sync_all().at(&self.path, "sync")?;
        Ok(Written { size: self.size, sha256: self.sha.finalize().into() })
    }

    fn end_block(&mut self) -> Result<(), StorageError> {
        let block = std::mem::take(&mut self.block);
        self.put_framed(block.len() as u32, &block)?;
        self.block = block;
        self.block.clear();
        Ok(())
    }

    fn put_framed(&mut self, length: u32, payload: &[u8]) -> Result<(), StorageError> {
        self.put(&length.to_le_bytes())?;
        self.put(&crc(length, payload).to_le_bytes())?;
        self.put(payload)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), StorageError> {
        self.sha.update(bytes);
        self.size += bytes.len() as u64;
        self.file.write_all(bytes).at(&self.path, "write")
    }
}

fn crc(length: u32, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length.to_le_bytes());
    hasher.update(payload);
    hasher.finalize()
}

/// Calls `each` with every row; returns the trailer's check.
pub(crate) fn read_rows(path: &Path, each: EachRow) -> Result<u128, StorageError> {
    let mut file = BufReader::with_capacity(256 << 10, File::open(path).at(path, "open")?);
    let mut offset = 0u64;
    let mut head = [0u8; 8];
    read_exactly(&mut file, path, &mut offset, &mut head)?;
    if head != *MAGIC {
        return Err(StorageError::damaged(path, "read", "it does not begin as a snapshot file"));
    }
    let mut rows = 0u64;
    let mut block = Vec::new();
    loop {
        let at = offset;
        let mut frame = [0u8; 8];
        read_exactly(&mut file, path, &mut offset, &mut frame)?;
        let length = u32::from_le_bytes(frame[..4].try_into().expect("4 bytes"));
        let stored = u32::from_le_bytes(frame[4..].try_into().expect("4 bytes"));
        let size = (length & !TRAILER) as usize;
        if size > BLOCK_LIMIT {
            return Err(StorageError::damaged(path, "read", format!("block at offset {at} claims {size} bytes")));
        }
        block.resize(size, 0);
        read_exactly(&mut file, path, &mut offset, &mut block)?;
        if crc(length, &block) != stored {
            return Err(StorageError::damaged(path, "read", format!("block at offset {at} has a wrong checksum")));
        }
        if length & TRAILER != 0 {
            return end(path, &mut file, &block, rows);
        }
        for row in RowReader(&block) {
            let (key, canonical) =
                row.map_err(|text| StorageError::damaged(path, "read", format!("block at offset {at}: {text}")))?;
            let (tag, key) = key.split_first().ok_or_else(|| {
                StorageError::damaged(path, "read", format!("block at offset {at}: a row lacks its tag"))
            })?;
            rows += 1;
            each(*tag, key, canonical)?;
        }
    }
}

fn end(path: &Path, file: &mut impl Read, trailer: &[u8], rows: u64) -> Result<u128, StorageError> {
    let counted = trailer.get(..8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
    let check = trailer.get(8..TRAILER_LEN).and_then(|bytes| bytes.try_into().ok()).map(u128::from_le_bytes);
    let (Some(counted), Some(check)) = (counted, check) else {
        return Err(StorageError::damaged(path, "read", "its trailer is too short"));
    };
    if counted != rows {
        return Err(StorageError::damaged(path, "read", format!("{rows} rows, its trailer counts {counted}")));
    }
    if file.read(&mut [0u8]).at(path, "read")? != 0 {
        return Err(StorageError::damaged(path, "read", "bytes follow its trailer"));
    }
    Ok(check)
}

fn read_exactly(file: &mut impl Read, path: &Path, offset: &mut u64, into: &mut [u8]) -> Result<(), StorageError> {
    match file.read_exact(into) {
        Ok(()) => {
            *offset += into.len() as u64;
            Ok(())
        }
        Err(err) if err.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(StorageError::damaged(path, "read", format!("it ends behind offset {offset}, inside a block")))
        }
        Err(err) => Err(err).at(path, "read"),
    }
}

/// Size and SHA-256 of a file as it is on disk.
pub(crate) fn weigh_file(path: &Path) -> Result<Written, StorageError> {
    let mut file = File::open(path).at(path, "open")?;
    let mut sha = Sha256::new();
    let mut buffer = vec![0u8; 256 << 10];
    let mut size = 0u64;
    loop {
        match file.read(&mut buffer).at(path, "read")? {
            0 => return Ok(Written { size, sha256: sha.finalize().into() }),
            len => {
                sha.update(&buffer[..len]);
                size += len as u64;
            }
        }
    }
}
