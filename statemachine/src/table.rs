//! One table of the live state: an ordered persistent map with O(1) clones that remembers what changed since the last
//! digest and since the last cut of the image. It knows keys and values, not how they are encoded (that is `storage`).

use std::sync::Arc;

use imbl::{OrdMap, OrdSet};

/// Ordered records of one kind. Cloning is O(1); a clone and its origin share rows until one of them changes.
#[derive(Clone, Debug)]
pub struct Table<K: Ord + Clone, V> {
    rows: OrdMap<K, Arc<V>>,
    /// Keys changed since the last digest.
    pub(crate) undigested: OrdSet<K>,
    /// Keys changed since the last cut of the image.
    pub(crate) uncut: OrdSet<K>,
    /// Hash of each row as of the last digest, and their wrapping sum.
    pub(crate) hashes: OrdMap<K, u128>,
    pub(crate) sum: u128,
}

impl<K: Ord + Clone, V: Clone> Default for Table<K, V> {
    fn default() -> Self {
        Self { rows: OrdMap::new(), undigested: OrdSet::new(), uncut: OrdSet::new(), hashes: OrdMap::new(), sum: 0 }
    }
}

impl<K: Ord + Clone, V: Clone> Table<K, V> {
    pub fn get(&self, key: &K) -> Option<&V> {
        self.rows.get(key).map(Arc::as_ref)
    }

    /// The shared row, for a reader that outlives the borrow.
    pub fn get_arc(&self, key: &K) -> Option<Arc<V>> {
        self.rows.get(key).cloned()
    }

    pub fn contains(&self, key: &K) -> bool {
        self.rows.contains_key(key)
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Rows in key order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.rows.iter().map(|(key, row)| (key, row.as_ref()))
    }

    /// Rows of a key range, in key order.
    pub fn range<R: std::ops::RangeBounds<K>>(&self, range: R) -> impl DoubleEndedIterator<Item = (&K, &V)> {
        self.rows.range(range).map(|(key, row)| (key, row.as_ref()))
    }

    pub fn insert(&mut self, key: K, value: V) {
        self.touch(&key);
        self.rows.insert(key, Arc::new(value));
    }

    /// Changes the row in place (copied first when a snapshot still shares it); `None` when there is no such row.
    pub fn update<T>(&mut self, key: &K, change: impl FnOnce(&mut V) -> T) -> Option<T> {
        let row = self.rows.get_mut(key)?;
        let answer = change(Arc::make_mut(row));
        self.touch(key);
        Some(answer)
    }

    pub fn remove(&mut self, key: &K) -> Option<Arc<V>> {
        let row = self.rows.remove(key)?;
        self.touch(key);
        Some(row)
    }

    fn touch(&mut self, key: &K) {
        self.undigested.insert(key.clone());
        self.uncut.insert(key.clone());
    }
}
