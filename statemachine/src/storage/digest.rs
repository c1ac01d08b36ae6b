//! The digest of a state: the wrapping sum of the hashes of all records in memory, kept up to date by rehashing only
//! what changed. It depends on content alone: replicas at one index have one digest. History enters through the sums in
//! its buckets; events, indexes and archived rows are left out.

use super::codec::{Tag, canonical, hash_row};
use super::rows;
use crate::state::State;

impl State {
    /// The digest. Costs about 1 us for each record changed since the last call, less where the image's thread has
    /// encoded the record already.
    pub fn digest(&mut self) -> u128 {
        let meta = self.meta_hash();
        rows::all_mut(self).into_iter().fold(meta, |sum, (tag, table)| {
            table.digest(tag, usize::MAX);
            sum.wrapping_add(table.sum())
        })
    }

    /// Brings at most `limit` changed records into the digest, so that a later [`State::digest`] has less to do: called
    /// now and then by who applies entries, for a digest after a million changes would stall it for a second.
    pub fn digest_some(&mut self, limit: usize) {
        let mut left = limit;
        for (tag, table) in rows::all_mut(self) {
            left -= table.digest(tag, left);
        }
    }

    /// Records that changed since they were last brought into the digest.
    pub fn undigested(&self) -> usize {
        rows::all(self).iter().map(|(_, table)| table.undigested()).sum()
    }

    /// The digest computed from every record anew: what [`State::digest`] must equal.
    pub fn digest_from_scratch(&self) -> u128 {
        rows::all(self)
            .iter()
            .fold(self.meta_hash(), |sum, (tag, table)| sum.wrapping_add(table.sum_from_scratch(*tag)))
    }

    fn meta_hash(&self) -> u128 {
        let mut bytes = Vec::with_capacity(512);
        canonical(&self.meta, &mut bytes);
        hash_row(Tag::Meta, &[], &bytes)
    }
}
