//! sled, and nothing above it: one tree, atomic batches, values packed (LZ4) and cut into chunks, and the one way to
//! make it durable. The only place that names sled. What keys and values mean is for `image` and `history`.
//!
//! sled's own `flush` does not survive a power cut on Linux (it never syncs), and a message of more than a quarter of a
//! segment goes to a file of its own that nobody syncs. So: large segments, small values, and [`Store::persist`].
//!
//! Damage in sled's own pages shows when they are read, maybe long after the start. Nothing can be mended in such a store, so it is given
//! up: a note in it makes the next [`Store::open`] refuse it, and recovery builds another one.

use std::fs::{self, File};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::codec::{self, Tag};
use super::error::{At, Cause, StorageError};

/// Fixed when the image is created. Values up to 240 KB stay inside the main file with it.
const SEGMENT: usize = 16 << 20;
/// A hint to sled: pages written last stay in memory.
const CACHE: u64 = 64 << 20;
/// Payloads above this are cut into chunks.
const VALUE_LIMIT: usize = 128 << 10;
const CHUNK: usize = 64 << 10;
/// Set in the tag byte of a chunk's key.
const CHUNK_BIT: u8 = 0x80;

/// The note: why the store must not be opened again.
const GIVEN_UP: &str = "given-up";

/// First byte of a value's payload, and of the joined chunks of a value.
const WHOLE: u8 = 0;
const CHUNKED: u8 = 1;
/// Length u32 little-endian, then an LZ4 block.
const PACKED: u8 = 2;

/// Gets key, payload and number of chunks of a value; says whether to go on.
pub(crate) type EachValue<'a> = &'a mut dyn FnMut(&[u8], Vec<u8>, u16) -> Result<bool, StorageError>;

/// Gets the key of a value and its payload with the number of chunks, or why that can't be read; says whether to go on.
pub(crate) type EachRead<'a> =
    &'a mut dyn FnMut(&[u8], Result<(Vec<u8>, u16), StorageError>) -> Result<bool, StorageError>;

pub(crate) struct Store {
    dir: PathBuf,
    db: sled::Db,
    tree: sled::Tree,
}

/// Changes that reach the disk together or not at all.
#[derive(Default)]
pub(crate) struct Batch {
    inner: sled::Batch,
    /// Keys and values, in bytes.
    pub bytes: usize,
    pub values: usize,
}

impl Batch {
    /// Stores a payload under tag + key; returns the chunks it needed beside its head.
    pub fn put(&mut self, tag: Tag, key: &[u8], payload: &[u8]) -> u16 {
        let full = stored_key(tag, key);
        let packed = pack(payload);
        if packed.len() <= VALUE_LIMIT {
            self.insert(full, codec::seal(tag, key, &packed));
            return 0;
        }
        let mut chunks = 0u16;
        for chunk in packed.chunks(CHUNK) {
            self.insert(chunk_key(tag, key, chunks), codec::seal(tag, &chunk_suffix(key, chunks), chunk));
            chunks += 1;
        }
        // The head names count and hash: chunks of another version of the value would be found out.
        let mut head = vec![CHUNKED];
        head.extend_from_slice(&chunks.to_le_bytes());
        head.extend_from_slice(&codec::hash_row(tag, key, &packed).to_le_bytes());
        self.insert(full, codec::seal(tag, key, &head));
        chunks
    }

    pub fn remove(&mut self, tag: Tag, key: &[u8], chunks: u16) {
        self.inner.remove(stored_key(tag, key));
        for number in 0..chunks {
            self.inner.remove(chunk_key(tag, key, number));
        }
    }

    fn insert(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.bytes += key.len() + value.len();
        self.values += 1;
        self.inner.insert(key, value);
    }
}

fn stored_key(tag: Tag, key: &[u8]) -> Vec<u8> {
    [&[tag as u8], key].concat()
}

fn chunk_suffix(key: &[u8], number: u16) -> Vec<u8> {
    [key, &number.to_be_bytes()].concat()
}

fn chunk_key(tag: Tag, key: &[u8], number: u16) -> Vec<u8> {
    [&[tag as u8 | CHUNK_BIT], key, &number.to_be_bytes()].concat()
}

/// Pages of similar jobs shrink to a fraction, and sled writes each about three times: packing saves more time than it
/// takes. What doesn't shrink by an eighth stays as it is.
fn pack(payload: &[u8]) -> Vec<u8> {
    const HEAD: usize = 5;
    let mut packed = vec![PACKED; HEAD + lz4_flex::block::get_maximum_output_size(payload.len())];
    packed[1..HEAD].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    match lz4_flex::block::compress_into(payload, &mut packed[HEAD..]) {
        Ok(len) if len < payload.len() - payload.len() / 8 => {
            packed.truncate(HEAD + len);
            packed
        }
        _ => [&[WHOLE], payload].concat(),
    }
}

fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    match packed.split_first()? {
        (&WHOLE, payload) => Some(payload.to_vec()),
        (&PACKED, rest) => {
            let (len, block) = rest.split_at_checked(4)?;
            let len = u32::from_le_bytes(len.try_into().ok()?) as usize;
            lz4_flex::block::decompress(block, len).ok().filter(|payload| payload.len() == len)
        }
        _ => None,
    }
}

impl Store {
    /// Opens the store in `dir`, or makes it. A panic inside sled becomes an error.
    pub fn open(dir: &Path) -> Result<Self, StorageError> {
        if let Ok(why) = fs::read_to_string(dir.join(GIVEN_UP)) {
            return Err(StorageError::damaged(dir, "open the image in", format!("it was given up: {why}")));
        }
        remove_unfinished_snapshots(dir)?;
        let opened = catch_unwind(AssertUnwindSafe(|| open_patiently(dir)));
        let (db, tree) = match opened {
            Ok(result) => result.at(dir, "open the image in")?,
            Err(panic) => return Err(StorageError::damaged(dir, "open the image in", panic_text(&*panic))),
        };
        let store = Self { dir: dir.into(), db, tree };
        store.persist_names()?;
        Ok(store)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn apply(&self, batch: Batch) -> Result<(), StorageError> {
        self.guarded("write a batch to", || self.tree.apply_batch(batch.inner))
    }

    /// Makes everything applied so far survive a power cut. The only place where durability is made.
    pub fn persist(&self) -> Result<(), StorageError> {
        self.guarded("flush", || self.tree.flush())?;
        for file in self.data_files()? {
            match File::open(&file) {
                Ok(open) => open.sync_data().at(&file, "sync")?,
                // sled replaces its `snap.*` now and then.
                Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
                Err(err) => return Err(err).at(&file, "open to sync"),
            }
        }
        self.assert_no_blobs()
    }

    /// What a store needs once: its configuration file, and the directory entries of all of it. Done at each opening,
    /// because a crash may have come between the creation and this.
    fn persist_names(&self) -> Result<(), StorageError> {
        self.persist()?;
        let conf = self.dir.join("conf");
        File::open(&conf).and_then(|file| file.sync_all()).at(&conf, "sync")?;
        sync_dir(&self.dir)?;
        self.dir.parent().map_or(Ok(()), sync_dir)
    }

    fn data_files(&self) -> Result<Vec<PathBuf>, StorageError> {
        let mut files = vec![self.dir.join("db")];
        for entry in fs::read_dir(&self.dir).at(&self.dir, "list")? {
            let entry = entry.at(&self.dir, "list")?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("snap.") && !name.ends_with(".generating") {
                files.push(entry.path());
            }
        }
        Ok(files)
    }

    fn assert_no_blobs(&self) -> Result<(), StorageError> {
        let blobs = self.dir.join("blobs");
        match fs::read_dir(&blobs) {
            Ok(mut entries) => match entries.next() {
                None => Ok(()),
                Some(_) => Err(StorageError::damaged(&blobs, "persist", "a value went to a file that is never synced")),
            },
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(err) => Err(err).at(&blobs, "list"),
        }
    }

    /// The payload under tag + key, checksum verified and chunks joined, with the number of chunks.
    pub fn get(&self, tag: Tag, key: &[u8]) -> Result<Option<(Vec<u8>, u16)>, StorageError> {
        let value = self.guarded("read", || self.tree.get(stored_key(tag, key)))?;
        value.map(|value| self.unpack(tag, key, &value)).transpose()
    }

    /// Calls `each` with (key, payload, chunks) for every value of a table whose key begins with `prefix`, in order.
    pub fn scan(&self, tag: Tag, prefix: &[u8], each: EachValue) -> Result<(), StorageError> {
        self.scan_past_damage(tag, prefix, &mut |key, read| {
            let (payload, chunks) = read?;
            each(key, payload, chunks)
        })
    }

    /// [`Store::scan`] that leaves a damaged value to `each`, and goes on behind it.
    pub fn scan_past_damage(&self, tag: Tag, prefix: &[u8], each: EachRead) -> Result<(), StorageError> {
        let mut found = self.tree.scan_prefix(stored_key(tag, prefix));
        while let Some((key, value)) = self.guarded("read", || found.next().transpose())? {
            if !each(&key[1..], self.unpack(tag, &key[1..], &value))? {
                break;
            }
        }
        Ok(())
    }

    /// Calls `each` for every value of a table whose key is below `below`, the highest first.
    pub fn scan_down(&self, tag: Tag, below: &[u8], each: EachRead) -> Result<(), StorageError> {
        let mut found = self.tree.range(stored_key(tag, &[])..stored_key(tag, below));
        while let Some((key, value)) = self.guarded("read", || found.next_back().transpose())? {
            if !each(&key[1..], self.unpack(tag, &key[1..], &value))? {
                break;
            }
        }
        Ok(())
    }

    /// The first key of a table that is at or above `from`.
    pub fn first_key_from(&self, tag: Tag, from: &[u8]) -> Result<Option<Vec<u8>>, StorageError> {
        let range = stored_key(tag, from)..vec![tag as u8 + 1];
        let found = self.guarded("read", || self.tree.range(range).next().transpose())?;
        Ok(found.map(|(key, _)| key[1..].to_vec()))
    }

    /// Removes every value of a table whose key begins with `prefix`; in steps, so not atomically.
    pub fn remove_prefix(&self, tag: Tag, prefix: &[u8]) -> Result<(), StorageError> {
        const STEP: usize = 1_024;
        for first in [tag as u8, tag as u8 | CHUNK_BIT] {
            let start = [&[first], prefix].concat();
            loop {
                let mut batch = sled::Batch::default();
                let mut count = 0;
                for key in self.tree.scan_prefix(&start).keys().take(STEP) {
                    batch.remove(self.guarded("read", || key)?);
                    count += 1;
                }
                self.guarded("write a batch to", || self.tree.apply_batch(batch))?;
                if count < STEP {
                    break;
                }
            }
        }
        Ok(())
    }

    fn unpack(&self, tag: Tag, key: &[u8], value: &[u8]) -> Result<(Vec<u8>, u16), StorageError> {
        let payload = codec::open_sealed(tag, key, value).at(&self.dir, "read a value of")?;
        let (payload, chunks) = match payload.split_first() {
            Some((&CHUNKED, head)) if head.len() == 18 => {
                let chunks = u16::from_le_bytes([head[0], head[1]]);
                let joined = self.join(tag, key, chunks)?;
                if codec::hash_row(tag, key, &joined).to_le_bytes() != head[2..] {
                    return Err(self.damaged(tag, key, "its chunks are not of one version"));
                }
                (unpack(&joined), chunks)
            }
            _ => (unpack(payload), 0),
        };
        let payload = payload.ok_or_else(|| self.damaged(tag, key, "it does not unpack"))?;
        Ok((payload, chunks))
    }

    fn join(&self, tag: Tag, key: &[u8], chunks: u16) -> Result<Vec<u8>, StorageError> {
        let mut joined = Vec::with_capacity(usize::from(chunks) * CHUNK);
        for number in 0..chunks {
            let chunk = self.guarded("read", || self.tree.get(chunk_key(tag, key, number)))?;
            let chunk =
                chunk.ok_or_else(|| self.damaged(tag, key, format!("chunk {number} of {chunks} is missing")))?;
            let payload =
                codec::open_sealed(tag, &chunk_suffix(key, number), &chunk).at(&self.dir, "read a chunk of")?;
            joined.extend_from_slice(payload);
        }
        Ok(joined)
    }

    fn damaged(&self, tag: Tag, key: &[u8], what: impl std::fmt::Display) -> StorageError {
        StorageError::damaged(&self.dir, "read", format!("value of table {tag:?}, key {key:02x?}: {what}"))
    }

    /// Runs a call into sled: its error, or its panic, becomes ours.
    fn guarded<T>(&self, operation: &'static str, call: impl FnOnce() -> sled::Result<T>) -> Result<T, StorageError> {
        let cause = match catch_unwind(AssertUnwindSafe(call)) {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => Cause::from(error),
            Err(panic) => Cause::Damaged(panic_text(&*panic)),
        };
        let cause = match cause {
            Cause::Damaged(what) => Cause::Damaged(self.give_up(operation, what)),
            other => other,
        };
        Err(StorageError { file: self.dir.clone(), operation, cause })
    }

    /// Returns what to say of it.
    fn give_up(&self, operation: &str, what: String) -> String {
        let note = self.dir.join(GIVEN_UP);
        let noted = fs::write(&note, format!("{operation}: {what}")).and_then(|()| File::open(&note)?.sync_all());
        match noted {
            Ok(()) => {
                format!("{what}; restart this replica: it makes a new image from a snapshot or from another replica")
            }
            // The next such read tries again.
            Err(error) => format!("{what} (and {} could not be written: {error})", note.display()),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // sled flushes when the last handle goes; a failure then has nobody to tell, so the owner persists before.
        let _ = catch_unwind(AssertUnwindSafe(|| self.db.flush()));
    }
}

impl From<sled::Error> for Cause {
    fn from(err: sled::Error) -> Self {
        match err {
            sled::Error::Io(err) => Cause::Io(err),
            other => Cause::Damaged(other.to_string()),
        }
    }
}

/// A store that this process just closed may hold its lock for a moment longer, while sled's threads end.
fn open_patiently(dir: &Path) -> sled::Result<(sled::Db, sled::Tree)> {
    const TRIES: u32 = 40;
    let config = sled::Config::new().path(dir).segment_size(SEGMENT).cache_capacity(CACHE).flush_every_ms(None);
    let mut tries = 0;
    let db = loop {
        match config.open() {
            Err(sled::Error::Io(err)) if err.to_string().contains("could not acquire lock") && tries < TRIES => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(50));
            }
            result => break result?,
        }
    };
    let tree = db.open_tree("image")?;
    Ok((db, tree))
}

/// A crash while sled wrote one of its own snapshots leaves a file that it refuses to open over.
fn remove_unfinished_snapshots(dir: &Path) -> Result<(), StorageError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(err) => return Err(err).at(dir, "list"),
    };
    for entry in entries {
        let path = entry.at(dir, "list")?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(&path).at(&path, "remove")?;
        }
    }
    Ok(())
}

/// Makes the directory's entries durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<(), StorageError> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    File::open(dir).and_then(|open| open.sync_all()).at(dir, "sync the directory")
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("sled panicked: {}", text.unwrap_or("without a message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).expect("an empty directory");
        (dir, store)
    }

    fn put(store: &Store, tag: Tag, key: &[u8], payload: &[u8]) -> u16 {
        let mut batch = Batch::default();
        let chunks = batch.put(tag, key, payload);
        store.apply(batch).unwrap();
        chunks
    }

    /// Bytes that don't pack (xorshift64).
    fn noise(len: usize) -> Vec<u8> {
        let mut word = 1u64;
        let mut next = || {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            word as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn what_packs_reads_back() {
        for payload in [vec![], vec![1], vec![7; 100_000], noise(100_000), [vec![7; 9_000], noise(700)].concat()] {
            let packed = pack(&payload);
            assert!(packed.len() <= payload.len() + 1);
            assert_eq!(unpack(&packed), Some(payload));
        }
        assert_eq!(pack(&[7; 100_000])[0], PACKED);
        assert_eq!(pack(&noise(100_000))[0], WHOLE);
        assert_eq!(unpack(&[PACKED, 200, 0, 0, 0, 0x10, 1]), None);
    }

    /// sled's own checksums guard its log; these guard against everything between it and us.
    #[test]
    fn a_flipped_bit_in_any_value_is_found_when_it_is_read() {
        let (_dir, store) = store();
        let large = noise(300_000);
        assert_eq!(put(&store, Tag::Job, b"small", b"payload"), 0);
        assert_eq!(put(&store, Tag::Job, b"large", &large), 5);
        assert_eq!(store.get(Tag::Job, b"large").unwrap(), Some((large, 5)));
        let values: Vec<_> = store.tree.iter().map(Result::unwrap).collect();
        assert_eq!(values.len(), 7);
        for (key, good) in values {
            for bit in (0..good.len() * 8).step_by(1 + good.len() / 8) {
                let mut bad = good.to_vec();
                bad[bit / 8] ^= 1 << (bit % 8);
                store.tree.insert(&key, bad).unwrap();
                let read = store.get(Tag::Job, b"small").and(store.get(Tag::Job, b"large"));
                assert!(read.is_err(), "bit {bit} of {key:?}");
            }
            store.tree.insert(&key, good).unwrap();
        }
        assert!(store.get(Tag::Job, b"small").and(store.get(Tag::Job, b"large")).is_ok());
    }

    #[test]
    fn a_value_under_another_key_or_with_chunks_of_another_version_is_found() {
        let (_dir, store) = store();
        put(&store, Tag::Job, b"a", b"payload");
        let value = store.tree.get(stored_key(Tag::Job, b"a")).unwrap().unwrap();
        for key in [stored_key(Tag::Job, b"b"), stored_key(Tag::Task, b"b")] {
            store.tree.insert(key, &value).unwrap();
        }
        assert!(store.get(Tag::Job, b"a").is_ok());
        assert!(store.get(Tag::Job, b"b").is_err() && store.get(Tag::Task, b"b").is_err());

        put(&store, Tag::Body, b"x", &noise(200_000));
        let old = store.tree.get(chunk_key(Tag::Body, b"x", 1)).unwrap().unwrap();
        put(&store, Tag::Body, b"x", &noise(200_001)[1..]);
        store.tree.insert(chunk_key(Tag::Body, b"x", 1), &old).unwrap();
        assert!(store.get(Tag::Body, b"x").is_err());
        store.tree.remove(chunk_key(Tag::Body, b"x", 1)).unwrap();
        assert!(store.get(Tag::Body, b"x").is_err());
    }

    #[test]
    fn a_value_of_a_newer_schema_is_not_called_damage() {
        let (_dir, store) = store();
        let mut newer = codec::seal(Tag::Job, b"a", &pack(b"payload"));
        newer[1] += 1;
        store.tree.insert(stored_key(Tag::Job, b"a"), newer).unwrap();
        let flipped = store.get(Tag::Job, b"a").expect_err("a bit flip");
        assert!(matches!(flipped.cause, Cause::Codec(codec::CodecError::Checksum { .. })), "{flipped}");
    }

    #[test]
    fn removing_a_prefix_takes_the_chunks_along_and_nothing_else() {
        let (_dir, store) = store();
        for bucket in 1..4u32 {
            for number in 0..2_000u16 {
                let key = [&bucket.to_be_bytes()[..], &number.to_be_bytes()].concat();
                put(&store, Tag::History, &key, &noise(if number == 5 { 150_000 } else { 3 }));
            }
        }
        store.remove_prefix(Tag::History, &2u32.to_be_bytes()).unwrap();
        assert_eq!(store.tree.len(), 2 * 2_003);
        assert_eq!(store.first_key_from(Tag::History, &2u32.to_be_bytes()).unwrap().unwrap()[..4], 3u32.to_be_bytes());
        store.remove_prefix(Tag::History, &[]).unwrap();
        assert_eq!(store.tree.len(), 0);
    }

    #[test]
    fn a_large_message_that_sled_would_put_aside_unsynced_is_an_error() {
        let (_dir, store) = store();
        store.tree.insert(b"raw", vec![1; SEGMENT / 2]).unwrap();
        let error = store.persist().expect_err("a blob");
        assert!(error.to_string().contains("blobs"), "{error}");
    }

    #[test]
    fn a_store_whose_pages_are_damaged_is_not_opened_again() {
        let (dir, store) = store();
        store.guarded("read", || Err::<(), _>(sled::Error::Io(std::io::Error::other("cable")))).expect_err("failed");
        assert!(!dir.path().join(GIVEN_UP).exists(), "a disk that fails may work again");
        let corrupt = || sled::Error::Corruption { at: None, bt: () };
        let error = store.guarded("read", || Err::<(), _>(corrupt())).expect_err("damaged").to_string();
        assert!(error.contains("restart this replica"), "{error}");
        drop(store);
        let error = Store::open(dir.path()).err().expect("given up").to_string();
        assert!(error.contains("it was given up: read: "), "{error}");
    }
}
