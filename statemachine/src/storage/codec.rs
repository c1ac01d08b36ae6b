//! Bytes of entries and records: the only place that names bincode. One fixed configuration, ordered maps only, so
//! equal content is equal bytes on every replica. Where the bytes are kept is for `image` and `snapshot` to say.
//!
//! | what | layout (integers little-endian) |
//! |---|---|
//! | log entry | codec u8, schema u16, payload |
//! | stored value | codec u8, schema u16, hash u128 of (tag, key, codec, schema, payload), payload |
//! | key | tag u8, then the record's key, big-endian |

use serde::Serialize;
use serde::de::DeserializeOwned;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::command::{Cmd, Entry};
use crate::id::*;
use crate::record::NameKey;

/// bincode 2 `standard()` (little-endian, variable-length integers), the only codec so far.
pub const CODEC: u8 = 1;
/// Schema of the commands and records of level 1.
pub const SCHEMA: u16 = 1;

/// Bytes of an encoded entry. The door packs at most 320 KiB; a plan's or registration's own bound lies far below it.
pub const ENTRY_LIMIT: usize = 4 << 20;
/// Bytes of one stored record. The largest are a lease of 2,048 parts with all exits and a 256 KiB body.
pub const RECORD_LIMIT: usize = 16 << 20;

const ENTRY_HEAD: usize = 3;
const VALUE_HEAD: usize = ENTRY_HEAD + 16;

/// Why bytes are not what they should be: damage, or written by a newer binary. Never caused by a client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("{len} bytes are fewer than the {least} of a header")]
    Short { len: usize, least: usize },
    #[error("{len} bytes are more than the limit of {limit}")]
    Long { len: usize, limit: usize },
    #[error("codec {0} is unknown to this binary (it knows {CODEC})")]
    Codec(u8),
    #[error("schema {0} is newer than this binary's {SCHEMA}")]
    Schema(u16),
    #[error("checksum is {found:032x}, should be {stored:032x}")]
    Checksum { stored: u128, found: u128 },
    #[error("payload does not decode: {0}")]
    Payload(String),
    #[error("{0} bytes are left after the payload")]
    Trailing(usize),
    #[error("key of table {tag} does not decode ({len} bytes)")]
    Key { tag: u8, len: usize },
}

/// Which table a record belongs to: the first byte of its key. Numbers are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Tag {
    Meta = 0,
    Job = 1,
    Body = 2,
    Task = 3,
    Lease = 4,
    Node = 5,
    Alloc = 6,
    Class = 7,
    Tenant = 8,
    Queue = 9,
    Session = 10,
    Lock = 11,
    Request = 12,
    Ended = 13,
    Bucket = 14,
    Name = 15,
    GpuToken = 16,
    /// Jobs that left memory; key (bucket, job).
    History = 17,
    Event = 18,
    Priority = 19,
    Claim = 20,
    Reservation = 21,
    Runs = 22,
}

// ------------------------------------------------------------------------------------------------------- log entries

/// The payload of one log entry.
pub fn encode_entry(entry: &Entry) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    put_head(&mut out);
    canonical(entry, &mut out);
    out
}

/// What an entry holds beside its commands; see [`Entry`].
#[derive(Clone, Copy, Debug, Serialize)]
pub struct EntryHead {
    pub level: u16,
    pub clock_ms: u64,
    pub wall_ms: i64,
    pub salt: u64,
}

/// A command as an entry holds it, so that it is encoded before it is known which entry takes it.
#[derive(Clone, Debug)]
pub struct EncodedCmd(Vec<u8>);

impl EncodedCmd {
    pub fn new(cmd: &Cmd) -> Self {
        let mut bytes = Vec::with_capacity(512);
        canonical(cmd, &mut bytes);
        Self(bytes)
    }

    /// Bytes that it adds to an entry.
    #[expect(clippy::len_without_is_empty, reason = "no command is empty")]
    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// What [`encode_entry`] writes for an entry of this head and these commands.
pub fn encode_entry_of(head: &EntryHead, cmds: &[EncodedCmd]) -> Vec<u8> {
    const HEAD_AT_MOST: usize = 64;
    let mut out = Vec::with_capacity(HEAD_AT_MOST + cmds.iter().map(EncodedCmd::len).sum::<usize>());
    put_head(&mut out);
    // A struct is its fields one after the other, and a list is its length as a u64 and its items.
    canonical(head, &mut out);
    canonical(&(cmds.len() as u64), &mut out);
    for cmd in cmds {
        out.extend_from_slice(&cmd.0);
    }
    out
}

/// Reads what [`encode_entry`] wrote. Memory stays within a small multiple of the bytes' length, whatever they hold.
pub fn decode_entry(bytes: &[u8]) -> Result<Entry, CodecError> {
    if bytes.len() > ENTRY_LIMIT {
        return Err(CodecError::Long { len: bytes.len(), limit: ENTRY_LIMIT });
    }
    decode_canonical::<Entry, ENTRY_LIMIT>(after_head(bytes, ENTRY_HEAD)?)
}

// ------------------------------------------------------------------------------------------------------ stored values

/// A record as it is stored under `key` of table `tag`.
pub fn encode_value<T: Serialize>(tag: Tag, key: &[u8], value: &T) -> Vec<u8> {
    let mut payload = Vec::with_capacity(256);
    canonical(value, &mut payload);
    seal(tag, key, &payload)
}

/// Reads what [`encode_value`] wrote under the same tag and key.
pub fn decode_value<T: DeserializeOwned>(tag: Tag, key: &[u8], bytes: &[u8]) -> Result<T, CodecError> {
    decode_record(open_sealed(tag, key, bytes)?)
}

/// Wraps a payload as a stored value: codec, schema and a hash that also covers tag and key.
pub fn seal(tag: Tag, key: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(VALUE_HEAD + payload.len());
    put_head(&mut out);
    let hash = hash_parts([&[tag as u8], key, &out[..], payload]);
    out.extend_from_slice(&hash.to_le_bytes());
    out.extend_from_slice(payload);
    out
}

/// The payload inside a stored value. The checksum is verified first: an unknown codec or schema under a good checksum
/// was written by a newer binary, and is not damage.
pub fn open_sealed<'a>(tag: Tag, key: &[u8], bytes: &'a [u8]) -> Result<&'a [u8], CodecError> {
    if bytes.len() < VALUE_HEAD {
        return Err(CodecError::Short { len: bytes.len(), least: VALUE_HEAD });
    }
    let (head, payload) = (&bytes[..ENTRY_HEAD], &bytes[VALUE_HEAD..]);
    let stored = u128::from_le_bytes(bytes[ENTRY_HEAD..VALUE_HEAD].try_into().expect("a slice of 16 bytes"));
    let found = hash_parts([&[tag as u8], key, head, payload]);
    if stored != found {
        return Err(CodecError::Checksum { stored, found });
    }
    after_head(bytes, VALUE_HEAD)
}

/// Hash of a record: xxh3-128 over table tag, key bytes and canonical bytes, in this order.
pub fn hash_row(tag: Tag, key: &[u8], canonical: &[u8]) -> u128 {
    hash_parts([&[tag as u8], key, canonical])
}

fn hash_parts<const N: usize>(parts: [&[u8]; N]) -> u128 {
    const INLINE: usize = 1_024;
    let len = parts.iter().map(|part| part.len()).sum();
    if len > INLINE {
        let mut hasher = Xxh3::new();
        parts.iter().for_each(|part| hasher.update(part));
        return hasher.digest128();
    }
    // A flat buffer spares small records, nearly all of them, the set-up of the streaming hasher.
    let mut flat = [0u8; INLINE];
    let mut end = 0;
    for part in parts {
        flat[end..end + part.len()].copy_from_slice(part);
        end += part.len();
    }
    xxh3_128(&flat[..len])
}

/// Appends the canonical bytes of `value`.
pub fn canonical<T: Serialize>(value: &T, out: &mut Vec<u8>) {
    bincode::serde::encode_into_std_write(value, out, CONFIG)
        .expect("records hold only types that bincode can write, and a Vec takes every byte");
}

/// Reads canonical bytes of one record, all of them.
pub fn decode_record<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    if bytes.len() > RECORD_LIMIT {
        return Err(CodecError::Long { len: bytes.len(), limit: RECORD_LIMIT });
    }
    decode_canonical::<T, RECORD_LIMIT>(bytes)
}

const CONFIG: bincode::config::Configuration = bincode::config::standard();

fn decode_canonical<T: DeserializeOwned, const LIMIT: usize>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) = bincode::serde::decode_from_slice::<T, _>(bytes, CONFIG.with_limit::<LIMIT>())
        .map_err(|err| CodecError::Payload(err.to_string()))?;
    if used == bytes.len() { Ok(value) } else { Err(CodecError::Trailing(bytes.len() - used)) }
}

fn put_head(out: &mut Vec<u8>) {
    out.push(CODEC);
    out.extend_from_slice(&SCHEMA.to_le_bytes());
}

fn after_head(bytes: &[u8], head: usize) -> Result<&[u8], CodecError> {
    if bytes.len() < head {
        return Err(CodecError::Short { len: bytes.len(), least: head });
    }
    if bytes[0] != CODEC {
        return Err(CodecError::Codec(bytes[0]));
    }
    let schema = u16::from_le_bytes([bytes[1], bytes[2]]);
    if schema > SCHEMA {
        return Err(CodecError::Schema(schema));
    }
    Ok(&bytes[head..])
}

// --------------------------------------------------------------------------------------------------------------- keys

/// A key of a table: its bytes sort as the key does.
pub trait StoredKey: Ord + Clone {
    fn put(&self, out: &mut Vec<u8>);
    /// `None` when the bytes are no key of this table.
    fn take(bytes: &[u8]) -> Option<Self>;

    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16);
        self.put(&mut out);
        out
    }
}

macro_rules! integer_key {
    ($($key:ty: $inner:ty, $get:expr, $make:expr;)*) => {
        $(impl StoredKey for $key {
            fn put(&self, out: &mut Vec<u8>) {
                let get: fn(&$key) -> $inner = $get;
                out.extend_from_slice(&get(self).to_be_bytes());
            }

            fn take(bytes: &[u8]) -> Option<Self> {
                let make: fn($inner) -> $key = $make;
                Some(make(<$inner>::from_be_bytes(bytes.try_into().ok()?)))
            }
        })*
    };
}

integer_key! {
    u64: u64, |key| *key, |raw| raw;
    u32: u32, |key| *key, |raw| raw;
    JobId: u64, |key| key.0, JobId;
    Token: u64, |key| key.0, Token;
    SessionId: u64, |key| key.0, SessionId;
    ReservationId: u64, |key| key.0, ReservationId;
    NodeId: u32, |key| key.0, NodeId;
    ClassId: u32, |key| key.0, ClassId;
    TenantId: u32, |key| key.0, TenantId;
    UserId: u32, |key| key.0, UserId;
    QueueId: u16, |key| key.0, QueueId;
    RequestId: u128, |key| u128::from_be_bytes(key.0), |raw| RequestId(raw.to_be_bytes());
    GpuUuid: u128, |key| u128::from_be_bytes(key.0), |raw| GpuUuid(raw.to_be_bytes());
}

impl StoredKey for TaskKey {
    fn put(&self, out: &mut Vec<u8>) {
        self.job.put(out);
        self.index.put(out);
    }

    fn take(bytes: &[u8]) -> Option<Self> {
        let (job, index) = bytes.split_at_checked(8)?;
        Some(Self { job: JobId::take(job)?, index: u32::take(index)? })
    }
}

impl StoredKey for String {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }

    fn take(bytes: &[u8]) -> Option<Self> {
        String::from_utf8(bytes.to_vec()).ok()
    }
}

impl StoredKey for NameKey {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            NameKey::User(id) => {
                out.push(0);
                id.0.put(out);
            }
            NameKey::GpuType(id) => {
                out.push(1);
                out.extend_from_slice(&id.0.to_be_bytes());
            }
        }
    }

    fn take(bytes: &[u8]) -> Option<Self> {
        match bytes.split_first()? {
            (0, id) => Some(NameKey::User(UserId(u32::take(id)?))),
            (1, id) => Some(NameKey::GpuType(GpuTypeId(u16::from_be_bytes(id.try_into().ok()?)))),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::command::Command;

    fn entry() -> Entry {
        let owner = "o".repeat(40);
        let cmd = Cmd { request: None, actor: "ann".into(), body: Command::OpenSession { owner, ttl_ms: 1 << 40 } };
        Entry { level: 1, clock_ms: 5, wall_ms: -5, salt: u64::MAX, cmds: vec![cmd; 3] }
    }

    #[test]
    fn an_entry_reads_back_and_every_prefix_and_every_appendix_is_refused() {
        let bytes = encode_entry(&entry());
        assert_eq!(decode_entry(&bytes), Ok(entry()));
        for len in 0..bytes.len() {
            assert!(decode_entry(&bytes[..len]).is_err(), "{len} bytes");
        }
        assert_eq!(decode_entry(&[&bytes[..], &[0]].concat()), Err(CodecError::Trailing(1)));
        assert_eq!(decode_entry(&[&[2], &bytes[1..]].concat()), Err(CodecError::Codec(2)));
        assert_eq!(decode_entry(&[&[1, 2, 0], &bytes[3..]].concat()), Err(CodecError::Schema(2)));
        let long = CodecError::Long { len: ENTRY_LIMIT + 1, limit: ENTRY_LIMIT };
        assert_eq!(decode_entry(&vec![1; ENTRY_LIMIT + 1]), Err(long));
    }

    #[test]
    fn commands_encoded_ahead_make_the_same_entry() {
        for count in [0, 1, 3, 250, 251, 1_000] {
            let entry = Entry { cmds: vec![entry().cmds[0].clone(); count], ..entry() };
            let Entry { level, clock_ms, wall_ms, salt, .. } = entry;
            let cmds: Vec<EncodedCmd> = entry.cmds.iter().map(EncodedCmd::new).collect();
            let head = EntryHead { level, clock_ms, wall_ms, salt };
            assert_eq!(encode_entry_of(&head, &cmds), encode_entry(&entry), "{count} commands");
        }
    }

    #[test]
    fn a_length_that_claims_the_whole_memory_allocates_nothing() {
        // level, clock, wall, salt, then 2^63 commands; and one command whose actor has 2^62 bytes.
        for hostile in [&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0x80][..], &[1, 0, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0x40]] {
            let bytes = [&[CODEC, SCHEMA as u8, 0, 1, 5, 9, 7], hostile].concat();
            assert!(matches!(decode_entry(&bytes), Err(CodecError::Payload(_))));
        }
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_never_panic(bytes: Vec<u8>) {
            let framed = [&[CODEC, SCHEMA as u8, 0], &bytes[..]].concat();
            if let Ok(entry) = decode_entry(&framed) {
                prop_assert!(entry.cmds.len() <= bytes.len());
            }
            let _ = decode_record::<crate::record::Lease>(&bytes);
            let _ = decode_value::<crate::record::Node>(Tag::Node, &[], &bytes);
        }

        #[test]
        fn keys_read_back_and_sort_as_their_bytes(left: (u64, u32), right: (u64, u32), text: String, other: String) {
            let key = |(job, index)| TaskKey { job: JobId(job), index };
            let (left, right) = (key(left), key(right));
            prop_assert_eq!(left.cmp(&right), left.bytes().cmp(&right.bytes()));
            prop_assert_eq!(TaskKey::take(&left.bytes()), Some(left));
            prop_assert_eq!(text.cmp(&other), StoredKey::bytes(&text).cmp(&StoredKey::bytes(&other)));
            prop_assert_eq!(String::take(&StoredKey::bytes(&text)), Some(text));
            let names = [NameKey::User(UserId(left.index)), NameKey::GpuType(GpuTypeId(right.index as u16))];
            prop_assert!(names[0].bytes() < names[1].bytes());
            prop_assert_eq!(names.map(|name| NameKey::take(&name.bytes())), names.map(Some));
            prop_assert_eq!(NameKey::take(&[2, 0, 0]), None);
        }
    }
}
