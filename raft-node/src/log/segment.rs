//! One segment file: its name, its creation, reading a frame from it. Leaves what frames mean to recovery and the
//! writer.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::frame::{self, Base, Frame, Kind};
use super::{EntryId, LogError, Record};

/// An open segment; shared with readers, who may outlive its name in the directory.
#[derive(Debug)]
pub(super) struct SegmentFile {
    pub number: u32,
    pub path: PathBuf,
    pub file: File,
}

impl SegmentFile {
    pub(super) fn path(dir: &Path, number: u32) -> PathBuf {
        dir.join(format!("{number:012}.log"))
    }

    /// The number of the segment with this file name.
    pub(super) fn number(name: &str) -> Option<u32> {
        let digits = name.strip_suffix(".log")?;
        (digits.len() == 12).then(|| digits.parse().ok()).flatten()
    }

    pub(super) fn open(dir: &Path, number: u32) -> Result<SegmentFile, LogError> {
        let path = SegmentFile::path(dir, number);
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(LogError::io("open", &path))?;
        Ok(SegmentFile { number, path, file })
    }

    /// Makes a segment durable, with its header and base frame, and its name too. Returns it and its length. A failure
    /// leaves no file.
    pub(super) fn create(
        dir: &Path,
        number: u32,
        purged: Option<EntryId>,
        base: Base,
    ) -> io::Result<(SegmentFile, u64)> {
        let path = SegmentFile::path(dir, number);
        let data = base.encode();
        let mut bytes = frame::file_header().to_vec();
        Frame::with_optional_id(Kind::Base, 0, purged, &data).encode(number, frame::FILE_HEADER as u64, &mut bytes);
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        let made = file.write_all_at(&bytes, 0).and_then(|()| file.sync_all()).and_then(|()| sync_dir(dir));
        if let Err(error) = made {
            std::fs::remove_file(&path).ok();
            return Err(error);
        }
        Ok((SegmentFile { number, path, file }, bytes.len() as u64))
    }
}

/// Makes names in `dir` durable: those made, and those removed.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Reads entries that lie behind each other with few system calls.
#[derive(Default)]
pub(super) struct EntryCursor {
    segment: u32,
    start: u64,
    bytes: Bytes,
}

/// Bytes read at once: a few dozen small entries.
const READ_AHEAD: usize = 64 << 10;

impl EntryCursor {
    /// Entry `index`, which lies at `offset` of `from`.
    pub(super) fn read(&mut self, from: &SegmentFile, offset: u64, index: u64) -> Result<Record, LogError> {
        let prefix = self.fill(from, offset, frame::PREFIX)?;
        let len = frame::body_len(&prefix).map_or(0, |body| frame::PREFIX + body);
        let bytes = self.fill(from, offset, len)?;
        match Frame::decode(&bytes, from.number, offset) {
            Some(found) if found.kind == Kind::Entry && found.id.index == index => {
                Ok(Record { id: found.id, tag: found.tag, data: bytes.slice_ref(found.data) })
            }
            _ => Err(LogError::damaged(&from.path, offset, format!("entry {index} is not there any more"))),
        }
    }

    /// `len` bytes from `offset` on; fewer only at the end of the file.
    fn fill(&mut self, from: &SegmentFile, offset: u64, len: usize) -> Result<Bytes, LogError> {
        let end = self.start + self.bytes.len() as u64;
        if self.segment != from.number || offset < self.start || offset + len as u64 > end {
            let mut bytes = vec![0; len.max(READ_AHEAD)];
            let got = read_up_to(&from.file, &mut bytes, offset).map_err(LogError::io("read", &from.path))?;
            bytes.truncate(got);
            (self.segment, self.start, self.bytes) = (from.number, offset, bytes.into());
        }
        let at = (offset - self.start) as usize;
        Ok(self.bytes.slice(at..self.bytes.len().min(at + len)))
    }
}

fn read_up_to(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < bytes.len() {
        match file.read_at(&mut bytes[got..], offset + got as u64) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}
