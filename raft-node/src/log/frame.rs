//! The bytes of a segment: its header and its frames. Owns encoding, checksums and the search for valid frames behind
//! damage; leaves files, order and meaning to the rest of the log.
//!
//! All integers are little-endian.
//! ```text
//! segment = header, base frame, frames
//! header  = "ARES-LOG", version u32, crc32 of the 12 bytes before it
//! frame   = magic u32, length of body u32, crc32 u32, body
//! body    = synced u64, kind u8, tag u8, index u64, term u64, node u64, data
//! ```
//! The checksum of a frame covers the segment's number and the frame's own offset too: a frame copied elsewhere (a
//! misdirected write, or a frame's image inside a client's payload) is not a frame there.

use super::EntryId;

/// The format's version: the day on which it was fixed.
pub(super) const VERSION: u32 = 20261125;
pub(super) const FILE_HEADER: usize = 16;
const FILE_MAGIC: &[u8; 8] = b"ARES-LOG";

const MAGIC: u32 = 0x5EC0_A7E5;
/// Magic, length, checksum.
pub(super) const PREFIX: usize = 12;
/// The body without its data.
const FIXED: usize = 34;
/// Bytes that a frame adds to its data.
pub(super) const OVERHEAD: usize = PREFIX + FIXED;
/// Most data in one frame. The door packs at most 128 KiB into an entry; the rest is room for membership and for odd
/// single commands.
pub const MAX_DATA: usize = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// First frame of each segment: what the log was when the segment began. Id: purged. Data: [`Base`].
    Base = 1,
    /// An entry. Tag and data are the caller's.
    Entry = 2,
    /// Entries after the id are gone.
    Truncate = 3,
    /// Entries up to the id are gone.
    Purge = 4,
    /// No change: carries the commit point, and a newer `synced` once the log is quiet.
    Mark = 5,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        [Kind::Base, Kind::Entry, Kind::Truncate, Kind::Purge, Kind::Mark].into_iter().find(|k| *k as u8 == byte)
    }
}

/// One frame, as written or as found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame<'a> {
    /// Offset in this segment below which everything was known durable when the frame was written.
    pub synced: u64,
    pub kind: Kind,
    pub tag: u8,
    pub id: EntryId,
    pub data: &'a [u8],
}

/// Tags of the frames whose id may be absent.
const ABSENT: u8 = 0;
const PRESENT: u8 = 1;

impl<'a> Frame<'a> {
    /// A frame of a kind whose id may be absent.
    pub(super) fn with_optional_id(kind: Kind, synced: u64, id: Option<EntryId>, data: &'a [u8]) -> Frame<'a> {
        let tag = if id.is_some() { PRESENT } else { ABSENT };
        Frame { synced, kind, tag, id: id.unwrap_or_default(), data }
    }

    pub(super) fn optional_id(&self) -> Option<EntryId> {
        (self.tag == PRESENT).then_some(self.id)
    }

    /// Bytes of the whole frame.
    pub(super) fn len(&self) -> usize {
        OVERHEAD + self.data.len()
    }

    /// Appends the frame to `out`; it will lie at `offset` of `segment`.
    pub(super) fn encode(&self, segment: u32, offset: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&((FIXED + self.data.len()) as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.synced.to_le_bytes());
        out.extend_from_slice(&[self.kind as u8, self.tag]);
        push_id(self.id, out);
        out.extend_from_slice(self.data);
        let crc = checksum(segment, offset, &out[start + 4..start + 8], &out[start + PREFIX..]);
        out[start + 8..start + PREFIX].copy_from_slice(&crc.to_le_bytes());
    }

    /// The frame at the head of `bytes`, which lie at `offset` of `segment`; `None` if there is no whole valid frame.
    pub(super) fn decode(bytes: &'a [u8], segment: u32, offset: u64) -> Option<Frame<'a>> {
        let body_len = body_len(bytes)?;
        let body = bytes.get(PREFIX..PREFIX + body_len)?;
        if u32_at(bytes, 8) != checksum(segment, offset, &bytes[4..8], body) {
            return None;
        }
        Some(Frame {
            synced: u64_at(body, 0),
            kind: Kind::from_byte(body[8])?,
            tag: body[9],
            id: id_at(body, 10),
            data: &body[FIXED..],
        })
    }
}

/// Length of the frame's body if `bytes` begin with a plausible prefix.
pub(super) fn body_len(bytes: &[u8]) -> Option<usize> {
    if bytes.len() < PREFIX || u32_at(bytes, 0) != MAGIC {
        return None;
    }
    let len = u32_at(bytes, 4) as usize;
    (FIXED..=FIXED + MAX_DATA).contains(&len).then_some(len)
}

/// Whether any valid frame in `bytes[from..]` (the segment from its first byte on) was written when an offset above
/// `bad` was durable: then the bytes at `bad` are damage, not a write that never finished.
pub(super) fn synced_beyond(bytes: &[u8], segment: u32, from: usize, bad: u64) -> bool {
    let magic = MAGIC.to_le_bytes();
    let mut at = from;
    while let Some(found) = bytes.get(at..).and_then(|rest| rest.windows(4).position(|w| w == magic)) {
        at += found;
        if let Some(frame) = Frame::decode(&bytes[at..], segment, at as u64)
            && frame.synced > bad
        {
            return true;
        }
        at += 1;
    }
    false
}

/// What the log was when a segment began; with the base frame's id, the purged one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Base {
    /// Index of the first live entry.
    pub first: u64,
    /// The last entry, or the purged one.
    pub last: Option<EntryId>,
}

impl Base {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(33);
        out.extend_from_slice(&self.first.to_le_bytes());
        out.push(self.last.is_some() as u8);
        push_id(self.last.unwrap_or_default(), &mut out);
        out
    }

    pub(super) fn decode(data: &[u8]) -> Option<Base> {
        if data.len() != 33 {
            return None;
        }
        Some(Base { first: u64_at(data, 0), last: (data[8] == 1).then(|| id_at(data, 9)) })
    }
}

pub(super) fn file_header() -> [u8; FILE_HEADER] {
    let mut out = [0; FILE_HEADER];
    out[..8].copy_from_slice(FILE_MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let crc = crc32fast::hash(&out[..12]);
    out[12..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// The version in a segment's header; `None` if the header is not whole.
pub(super) fn file_version(bytes: &[u8]) -> Option<u32> {
    let header = bytes.get(..FILE_HEADER)?;
    (&header[..8] == FILE_MAGIC && u32_at(header, 12) == crc32fast::hash(&header[..12])).then(|| u32_at(header, 8))
}

fn checksum(segment: u32, offset: u64, len: &[u8], body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&segment.to_le_bytes());
    hasher.update(&offset.to_le_bytes());
    hasher.update(len);
    hasher.update(body);
    hasher.finalize()
}

fn push_id(id: EntryId, out: &mut Vec<u8>) {
    for part in [id.index, id.term, id.node] {
        out.extend_from_slice(&part.to_le_bytes());
    }
}

fn id_at(bytes: &[u8], at: usize) -> EntryId {
    EntryId { index: u64_at(bytes, at), term: u64_at(bytes, at + 8), node: u64_at(bytes, at + 16) }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(data: &[u8]) -> Frame<'_> {
        Frame { synced: 77, kind: Kind::Entry, tag: 9, id: EntryId { index: 1, term: 2, node: 3 }, data }
    }

    #[test]
    fn the_bytes_of_the_format_stay() {
        let mut out = file_header().to_vec();
        entry(b"abc").encode(4, 16, &mut out);
        let hex: String = out.iter().map(|b| format!("{b:02x}")).collect();
        let header = "415245532d4c4f470529350155c3fce3";
        let prefix = "e5a7c05e25000000161e6508";
        let body = "4d000000000000000209010000000000000002000000000000000300000000000000616263";
        assert_eq!(hex, [header, prefix, body].concat());
    }

    #[test]
    fn a_frame_is_valid_only_where_it_was_written() {
        let mut out = Vec::new();
        entry(b"payload").encode(4, 16, &mut out);
        assert_eq!(Frame::decode(&out, 4, 16), Some(entry(b"payload")));
        assert_eq!(Frame::decode(&out, 4, 17), None);
        assert_eq!(Frame::decode(&out, 5, 16), None);
        assert_eq!(Frame::decode(&out[..out.len() - 1], 4, 16), None);
    }

    #[test]
    fn every_flipped_bit_of_a_frame_is_seen() {
        let mut out = Vec::new();
        entry(b"payload").encode(4, 16, &mut out);
        for bit in 0..out.len() * 8 {
            out[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Frame::decode(&out, 4, 16), None, "bit {bit}");
            out[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_valid_frame_behind_damage_tells_whether_it_was_synced() {
        let mut bytes = vec![0u8; 100];
        entry(b"x").encode(1, 100, &mut bytes);
        assert!(synced_beyond(&bytes, 1, 0, 76));
        assert!(!synced_beyond(&bytes, 1, 0, 77));
    }
}
