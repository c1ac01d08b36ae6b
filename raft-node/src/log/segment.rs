//! One segment file: its name, its creation, its room for writes that need no journal, reading a frame from it. Leaves what frames mean to recovery and the
//! writer.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::frame::{self, Base, Frame, Kind};
use super::space::{is_ample, is_full, write_zeros};
use super::spare::SpareFile;
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
}

/// A segment, and what decides when it may go.
#[derive(Clone, Debug)]
pub(super) struct Segment {
    pub file: Arc<SegmentFile>,
    /// Bytes of valid frames.
    pub len: u64,
    /// Bytes of the file, in the last segment: zeros behind the frames are room for more of them.
    pub size: u64,
    /// `synced` of its last frame.
    pub recorded: u64,
    /// Highest index of an entry in it.
    pub max_index: Option<u64>,
}

impl Segment {
    /// Makes a segment durable, with its header and base frame, and its name too; from the spare file if there is one. A
    /// failure leaves no file.
    pub(super) fn create(
        dir: &Path,
        number: u32,
        purged: Option<EntryId>,
        base: Base,
        spare: Option<SpareFile>,
    ) -> io::Result<Segment> {
        let head = head(number, purged, base);
        let len = head.len() as u64;
        let path = SegmentFile::path(dir, number);
        let (file, size) = match spare {
            Some(spare) => (name_when_begun(spare.file, &head, &spare.path, &path)?, spare.bytes.max(len)),
            None => {
                let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
                (name_when_begun(file, &head, &path, &path)?, len)
            }
        };
        let file = Arc::new(SegmentFile { number, path, file });
        Ok(Segment { file, len, size, recorded: 0, max_index: None })
    }

    /// Extends the file with zeros, if there is space for it, and makes that durable. Blocks for a while.
    pub(super) fn extend(&mut self, dir: &Path, size: u64) -> io::Result<()> {
        if self.size >= size || !is_ample(dir, size)? {
            return Ok(());
        }
        let file = &self.file.file;
        match write_zeros(file, self.size..size).and_then(|()| file.sync_data()) {
            Ok(()) => self.size = size,
            Err(error) if is_full(&error) => file.set_len(self.size)?,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Writes at the end of the frames, or leaves the file as it was.
    pub(super) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let end = self.len + bytes.len() as u64;
        let file = &self.file.file;
        if let Err(error) = file.write_all_at(bytes, self.len) {
            file.set_len(self.size)?;
            write_zeros(file, self.len..self.size.min(end))?;
            return Err(error);
        }
        self.len = end;
        self.size = self.size.max(end);
        Ok(())
    }

    /// Cuts off the room that is not used: behind the frames of a closed segment there is nothing. Mostly there is none.
    pub(super) fn close(&mut self) -> io::Result<()> {
        if self.size > self.len {
            self.file.file.set_len(self.len)?;
            self.file.file.sync_all()?;
            self.size = self.len;
        }
        Ok(())
    }
}

fn head(number: u32, purged: Option<EntryId>, base: Base) -> Vec<u8> {
    let mut bytes = frame::file_header().to_vec();
    let data = base.encode();
    Frame::with_optional_id(Kind::Base, 0, purged, &data).encode(number, frame::FILE_HEADER as u64, &mut bytes);
    bytes
}

/// Writes the head of a file that is called `from`, syncs it, and only then calls it `to`, which may be the same.
fn name_when_begun(file: File, head: &[u8], from: &Path, to: &Path) -> io::Result<File> {
    let written = file.write_all_at(head, 0).and_then(|()| file.sync_data());
    let named = written.and_then(|()| std::fs::rename(from, to)).and_then(|()| sync_dir(to.parent().unwrap_or(to)));
    if let Err(error) = named {
        std::fs::remove_file(from).ok();
        std::fs::remove_file(to).ok();
        return Err(error);
    }
    Ok(file)
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
