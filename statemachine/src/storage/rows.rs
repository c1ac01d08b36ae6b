//! The tables of a state as bytes see them: one list of all tables with their tags, and row-wise access by encoded key.
//! A new table is added to the state, to `Tag` and here, and is then digested, imaged and in snapshots.

use std::ops::Bound;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::codec::{self, CodecError, StoredKey, Tag};
use crate::state::State;
use crate::table::Table;

/// Gets (encoded key, canonical bytes) of one row.
pub(crate) type EachRow<'a> = &'a mut dyn FnMut(&[u8], &[u8]);

/// A table without its types.
pub(crate) trait Rows {
    /// Encoded keys that changed since the last cut, in order.
    fn uncut_keys(&self) -> Vec<Vec<u8>>;
    fn uncut(&self) -> usize;
    fn forget_uncut(&mut self);
    /// Counts as changed since the last cut, too, what is so in another state of the same table.
    fn change_again(&mut self, other: &dyn Rows);
    /// Encodes the rows from `from` (or the first) up to, and without, `to` (or the last), and notes their hashes.
    fn encode_range(&self, tag: Tag, from: Option<&[u8]>, to: Option<&[u8]>, each: EachRow) -> Result<(), CodecError>;
    /// Puts back one row of an empty table.
    fn restore(&mut self, tag: Tag, key: &[u8], canonical: &[u8]) -> Result<(), CodecError>;
    fn undigested(&self) -> usize;
    /// Brings up to `limit` changed rows into the sum; says how many.
    fn digest(&mut self, tag: Tag, limit: usize) -> usize;
    fn sum(&self) -> u128;
    /// The sum computed from all rows anew, without anything remembered.
    fn sum_from_scratch(&self, tag: Tag) -> u128;
}

impl<K: StoredKey, V: Clone + Serialize + DeserializeOwned> Rows for Table<K, V> {
    fn uncut_keys(&self) -> Vec<Vec<u8>> {
        self.uncut.iter().map(StoredKey::bytes).collect()
    }

    fn uncut(&self) -> usize {
        self.uncut.len()
    }

    fn forget_uncut(&mut self) {
        self.uncut = Default::default();
    }

    fn change_again(&mut self, other: &dyn Rows) {
        let keys = other.uncut_keys();
        self.uncut.extend(keys.iter().map(|key| K::take(key).expect("encoded by a table of the same type")));
    }

    fn encode_range(&self, tag: Tag, from: Option<&[u8]>, to: Option<&[u8]>, each: EachRow) -> Result<(), CodecError> {
        let decode = |bytes: &[u8]| K::take(bytes).ok_or(CodecError::Key { tag: tag as u8, len: bytes.len() });
        let from = from.map(decode).transpose()?.map_or(Bound::Unbounded, Bound::Included);
        let to = to.map(decode).transpose()?.map_or(Bound::Unbounded, Bound::Excluded);
        let (mut key, mut bytes) = (Vec::new(), Vec::new());
        for (row_key, row) in self.shared_range((from, to)) {
            key.clear();
            bytes.clear();
            row_key.put(&mut key);
            codec::canonical::<V>(row, &mut bytes);
            if row.known_hash().is_none() {
                row.set_hash(codec::hash_row(tag, &key, &bytes));
            }
            each(&key, &bytes);
        }
        Ok(())
    }

    fn restore(&mut self, tag: Tag, key: &[u8], canonical: &[u8]) -> Result<(), CodecError> {
        let hash = codec::hash_row(tag, key, canonical);
        let row_key = K::take(key).ok_or(CodecError::Key { tag: tag as u8, len: key.len() })?;
        self.restore(row_key, codec::decode_record(canonical)?, hash);
        Ok(())
    }

    fn undigested(&self) -> usize {
        self.undigested.len()
    }

    fn digest(&mut self, tag: Tag, limit: usize) -> usize {
        let (mut key, mut bytes) = (Vec::new(), Vec::new());
        let all = limit >= self.undigested.len();
        let keys: Vec<K> = self.undigested.iter().take(limit).cloned().collect();
        for row_key in &keys {
            let Some(row) = self.shared(row_key) else { continue };
            let hash = row.known_hash().unwrap_or_else(|| {
                key.clear();
                bytes.clear();
                row_key.put(&mut key);
                codec::canonical::<V>(row, &mut bytes);
                let hash = codec::hash_row(tag, &key, &bytes);
                row.set_hash(hash);
                hash
            });
            self.sum = self.sum.wrapping_add(hash);
        }
        if all {
            self.undigested = Default::default();
        } else {
            for row_key in &keys {
                self.undigested.remove(row_key);
            }
        }
        keys.len()
    }

    fn sum(&self) -> u128 {
        self.sum
    }

    fn sum_from_scratch(&self, tag: Tag) -> u128 {
        self.iter().fold(0, |sum, (row_key, value)| {
            let mut bytes = Vec::new();
            codec::canonical(value, &mut bytes);
            sum.wrapping_add(codec::hash_row(tag, &row_key.bytes(), &bytes))
        })
    }
}

macro_rules! tables {
    ($($tag:ident $field:ident;)*) => {
        /// Every stored table but Meta, which is one record, in the order of the tags.
        pub(crate) const TAGS: &[Tag] = &[$(Tag::$tag),*];

        pub(crate) fn all(state: &State) -> Vec<(Tag, &dyn Rows)> {
            vec![$((Tag::$tag, &state.$field as &dyn Rows)),*]
        }

        pub(crate) fn all_mut(state: &mut State) -> Vec<(Tag, &mut dyn Rows)> {
            vec![$((Tag::$tag, &mut state.$field as &mut dyn Rows)),*]
        }

        /// The table of a tag byte; `None` for Meta, history, events and unknown tags.
        pub(crate) fn of_tag(state: &mut State, tag: u8) -> Option<(Tag, &mut dyn Rows)> {
            $(if tag == Tag::$tag as u8 {
                return Some((Tag::$tag, &mut state.$field as &mut dyn Rows));
            })*
            None
        }
    };
}

tables! {
    Job jobs;
    Body bodies;
    Task tasks;
    Lease leases;
    Node nodes;
    Alloc allocs;
    Class classes;
    Tenant tenants;
    Queue queues;
    Session sessions;
    Lock locks;
    Request requests;
    Ended ended;
    Bucket buckets;
    Name names;
    GpuToken gpu_tokens;
    Priority priorities;
    Claim claims;
    Reservation reservations;
    Runs runs;
}
