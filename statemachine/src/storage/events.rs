//! The ring of recent events in the image: pages of neighbouring events, so that a watch can go on where it was after a
//! restart of all replicas. A cut adds the events since the one before and takes out the pages that the ring has run
//! past, in the batch of the records. What is an event, and when one is forgotten, is for `event` to say.
//!
//! A value holds consecutive events: key = revision u64 and sub u16 of the first one, big-endian; rows as in `pages`.

use std::collections::VecDeque;
use std::sync::Arc;

use imbl::Vector;

use super::codec::{self, StoredKey, Tag};
use super::error::{At, StorageError};
use super::pages::{Filler, PAGE, RowReader};
use super::store::{Batch, Store};
use crate::event::Event;
use crate::id::Revision;

/// Orders all events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct EventKey {
    rev: Revision,
    sub: u16,
}

impl EventKey {
    pub fn of(event: &Event) -> Self {
        Self { rev: event.rev, sub: event.sub }
    }
}

impl StoredKey for EventKey {
    fn put(&self, out: &mut Vec<u8>) {
        self.rev.0.put(out);
        out.extend_from_slice(&self.sub.to_be_bytes());
    }

    fn take(bytes: &[u8]) -> Option<Self> {
        let (rev, sub) = bytes.split_at_checked(8)?;
        Some(Self { rev: Revision(u64::take(rev)?), sub: u16::from_be_bytes(sub.try_into().ok()?) })
    }
}

/// Which events are stored, and in which pages.
#[derive(Default)]
pub(super) struct EventPages {
    /// Oldest first.
    pages: VecDeque<Page>,
    last: Option<EventKey>,
}

struct Page {
    first: EventKey,
    bytes: usize,
    /// That its value needs beside its head.
    chunks: u16,
}

impl EventPages {
    /// Makes the stored ring that of a cut.
    pub fn put(&mut self, ring: &Vector<Arc<Event>>, batch: &mut Batch) {
        self.drop_run_past(ring, batch);
        let newest = ring.back().map(|event| EventKey::of(event));
        if newest <= self.last {
            return;
        }
        // Small pages of small cuts grow until they are worth their key.
        let reopened = self.pages.pop_back_if(|page| page.bytes < PAGE / 2);
        if let Some(page) = &reopened {
            batch.remove(Tag::Event, &page.first.bytes(), page.chunks);
        }
        let last = self.last;
        let unstored = |event: &Event| {
            let key = EventKey::of(event);
            reopened.as_ref().is_some_and(|page| key >= page.first) || Some(key) > last
        };
        self.append(&ring.skip(first_where(ring, unstored)), batch);
        self.last = newest;
    }

    fn drop_run_past(&mut self, ring: &Vector<Arc<Event>>, batch: &mut Batch) {
        let first = ring.front().map(|event| EventKey::of(event));
        while let Some(oldest) = self.pages.front() {
            let runs_to_ring = match (self.pages.get(1), first) {
                (Some(next), Some(first)) => next.first > first,
                (None, Some(first)) => self.last >= Some(first),
                (_, None) => false,
            };
            if runs_to_ring {
                return;
            }
            batch.remove(Tag::Event, &oldest.first.bytes(), oldest.chunks);
            self.pages.pop_front();
        }
    }

    fn append(&mut self, events: &Vector<Arc<Event>>, batch: &mut Batch) {
        let mut emit = |bound: Vec<u8>, page: &[u8]| {
            let chunks = batch.put(Tag::Event, &bound, page);
            let first = EventKey::take(&bound).expect("the key of an event, encoded below");
            self.pages.push_back(Page { first, bytes: page.len(), chunks });
        };
        let mut filler = Filler::default();
        let mut bytes = Vec::with_capacity(256);
        for event in events {
            bytes.clear();
            codec::canonical(event.as_ref(), &mut bytes);
            filler.push(&EventKey::of(event).bytes(), &bytes, &mut emit);
        }
        filler.finish(&mut emit);
    }

    /// Reads the stored events, in order.
    pub fn load(&mut self, store: &Store) -> Result<Vec<Arc<Event>>, StorageError> {
        let mut events = Vec::new();
        let damaged = |what: String| StorageError::damaged(store.dir(), "read events of", what);
        store.scan(Tag::Event, &[], &mut |key, payload, chunks| {
            let first = EventKey::take(key).ok_or_else(|| damaged(format!("{key:02x?} is no key of events")))?;
            for row in RowReader(&payload) {
                let (_, bytes) = row.map_err(damaged)?;
                events.push(Arc::new(codec::decode_record(bytes).at(store.dir(), "read events of")?));
            }
            self.pages.push_back(Page { first, bytes: payload.len(), chunks });
            Ok(true)
        })?;
        self.last = events.last().map(|event| EventKey::of(event));
        Ok(events)
    }
}

/// The place of the first event that fits; those that do are the last ones.
fn first_where(ring: &Vector<Arc<Event>>, fits: impl Fn(&Event) -> bool) -> usize {
    let (mut low, mut high) = (0, ring.len());
    while low < high {
        let middle = low.midpoint(high);
        if ring.get(middle).is_some_and(|event| fits(event)) { high = middle } else { low = middle + 1 }
    }
    low
}
