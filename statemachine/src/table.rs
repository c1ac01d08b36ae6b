//! One table of the live state: an ordered persistent map with O(1) clones that remembers what changed since the last
//! digest and since the last cut of the image. It knows keys and values, not how they are encoded (that is `storage`).

use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use imbl::ordmap::DiffItem;
use imbl::{OrdMap, OrdSet};

/// Ordered records of one kind. Cloning is O(1); a clone and its origin share rows until one of them changes.
#[derive(Clone, Debug)]
pub struct Table<K: Ord + Clone, V> {
    rows: OrdMap<K, Shared<V>>,
    /// Keys changed since the last digest. A row whose key is not here is in `sum`, and its hash is known.
    pub(crate) undigested: OrdSet<K>,
    /// Keys changed since the last cut of the image.
    pub(crate) uncut: OrdSet<K>,
    /// Wrapping sum of the hashes of all rows that are not in `undigested`.
    pub(crate) sum: u128,
}

/// One record, shared by every clone of its table that has it: reads like the record itself.
#[derive(Debug)]
pub struct Shared<V>(Arc<Row<V>>);

/// The hash stands beside the record, and not in a map of its own, because that costs a quarter of the memory and lets
/// the image's thread, which encodes the record anyway, hand its hash to apply's thread.
#[derive(Debug)]
struct Row<V> {
    record: V,
    /// Hash of this content, once somebody needed it: two halves of a u128, so that it aligns to 8 bytes.
    hash: OnceLock<[u64; 2]>,
}

impl<V> Shared<V> {
    fn new(record: V) -> Self {
        Self(Arc::new(Row { record, hash: OnceLock::new() }))
    }

    /// The record's hash if it was taken before.
    pub(crate) fn known_hash(&self) -> Option<u128> {
        self.0.hash.get().map(|[high, low]| u128::from(*high) << 64 | u128::from(*low))
    }

    /// Remembers the record's hash, which the caller computed from this very content.
    pub(crate) fn set_hash(&self, hash: u128) {
        let halves = [(hash >> 64) as u64, hash as u64];
        debug_assert_eq!(self.0.hash.get().unwrap_or(&halves), &halves, "one content, one hash");
        // Another thread may have been first, with the same hash.
        let _ = self.0.hash.set(halves);
    }
}

impl<V> Clone for Shared<V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<V> Deref for Shared<V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.0.record
    }
}

impl<V> AsRef<V> for Shared<V> {
    fn as_ref(&self) -> &V {
        self
    }
}

/// The very same row, not one of the same content.
impl<V> PartialEq for Shared<V> {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<V: Clone> Clone for Row<V> {
    /// A copy is made in order to be changed, so it starts without a hash.
    fn clone(&self) -> Self {
        Self { record: self.record.clone(), hash: OnceLock::new() }
    }
}

impl<K: Ord + Clone, V> Default for Table<K, V> {
    fn default() -> Self {
        Self { rows: OrdMap::new(), undigested: OrdSet::new(), uncut: OrdSet::new(), sum: 0 }
    }
}

impl<K: Ord + Clone, V: Clone> Table<K, V> {
    pub fn get(&self, key: &K) -> Option<&V> {
        self.rows.get(key).map(Shared::as_ref)
    }

    /// The shared row, for a reader that outlives the borrow.
    pub fn get_arc(&self, key: &K) -> Option<Shared<V>> {
        self.rows.get(key).cloned()
    }

    pub fn contains(&self, key: &K) -> bool {
        self.rows.contains_key(key)
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// True when nothing was changed between the two clones, in O(1); false may also mean "changed back".
    pub fn is_same(&self, other: &Self) -> bool {
        self.rows.ptr_eq(&other.rows)
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Keys whose rows were put there, changed or removed between two clones, in order. Costs as much as was changed: what both share is
    /// passed over. A row that was changed back is told, too.
    pub fn changed_since<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a K> {
        before.rows.diff(&self.rows).map(|item| match item {
            DiffItem::Add(key, _) | DiffItem::Remove(key, _) | DiffItem::Update { new: (key, _), .. } => key,
        })
    }

    /// Rows in key order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.rows.iter().map(|(key, row)| (key, row.as_ref()))
    }

    /// Rows of a key range, in key order.
    pub fn range<R: std::ops::RangeBounds<K>>(&self, range: R) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.shared_range(range).map(|(key, row)| (key, row.as_ref()))
    }

    pub fn insert(&mut self, key: K, value: V) {
        let old = self.rows.insert(key.clone(), Shared::new(value));
        self.touch(key, old.map(|row| row.known_hash()));
    }

    /// Changes the row in place (copied first when a snapshot still shares it); `None` when there is no such row.
    pub fn update<T>(&mut self, key: &K, change: impl FnOnce(&mut V) -> T) -> Option<T> {
        let shared = self.rows.get_mut(key)?;
        let old = shared.known_hash();
        let row = Arc::make_mut(&mut shared.0);
        row.hash = OnceLock::new();
        let answer = change(&mut row.record);
        self.touch(key.clone(), Some(old));
        Some(answer)
    }

    pub fn remove(&mut self, key: &K) -> Option<Shared<V>> {
        let row = self.rows.remove(key)?;
        self.touch(key.clone(), Some(row.known_hash()));
        Some(row)
    }

    /// Notes a change. `old` is the hash of the row that was there, if there was one.
    fn touch(&mut self, key: K, old: Option<Option<u128>>) {
        self.uncut.insert(key.clone());
        let was_in_sum = self.undigested.insert(key).is_none();
        if let (true, Some(hash)) = (was_in_sum, old) {
            self.sum = self.sum.wrapping_sub(hash.expect("a digested row keeps its hash"));
        }
    }

    pub(crate) fn shared(&self, key: &K) -> Option<&Shared<V>> {
        self.rows.get(key)
    }

    pub(crate) fn shared_range<R: std::ops::RangeBounds<K>>(
        &self,
        range: R,
    ) -> impl DoubleEndedIterator<Item = (&K, &Shared<V>)> {
        self.rows.range(range)
    }

    /// Puts back a row as it was stored: neither a change to digest nor one to write.
    pub(crate) fn restore(&mut self, key: K, value: V, hash: u128) {
        let row = Shared::new(value);
        row.set_hash(hash);
        self.sum = self.sum.wrapping_add(hash);
        let old = self.rows.insert(key, row);
        debug_assert!(old.is_none(), "a table is restored from empty");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_leaves_clones_as_they_were() {
        let mut table = Table::<u32, String>::default();
        table.insert(1, "a".into());
        let before = table.clone();
        table.update(&1, |text| text.push('b')).expect("row 1");
        table.remove(&2);
        assert_eq!((before.get(&1).unwrap().as_str(), table.get(&1).unwrap().as_str()), ("a", "ab"));
        assert_eq!(table.update(&7, |_| ()), None);
        assert_eq!(table.uncut.iter().copied().collect::<Vec<_>>(), [1], "what did not change is not written");
    }

    #[test]
    fn what_changed_between_two_clones_is_told() {
        let mut table = Table::<u32, String>::default();
        (0..1_000).for_each(|key| table.insert(key, "a".into()));
        let before = table.clone();
        assert_eq!(table.changed_since(&before).count(), 0);
        table.update(&500, |text| text.push('b')).expect("row 500");
        table.insert(2_000, "c".into());
        table.remove(&3);
        table.insert(7, "a".into());
        assert_eq!(table.changed_since(&before).copied().collect::<Vec<_>>(), [3, 7, 500, 2_000]);
        assert_eq!(before.changed_since(&table).copied().collect::<Vec<_>>(), [3, 7, 500, 2_000]);
        assert_eq!(table.changed_since(&Table::default()).count(), 1_000);
    }

    #[test]
    fn a_row_costs_sixteen_bytes_of_hash_and_eight_of_state() {
        assert_eq!(size_of::<Row<[u64; 4]>>(), 32 + 24);
    }

    /// A hundred thousand of them wait: what few jobs have stands in a box. The next size that the allocator knows is 384.
    #[test]
    fn a_waiting_job_fits_a_block_of_320_bytes() {
        const COUNTS_OF_ARC: usize = 16;
        assert!(size_of::<Row<crate::record::Versioned<crate::record::Job>>>() + COUNTS_OF_ARC <= 320);
    }
}
