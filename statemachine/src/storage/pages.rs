//! Pages: rows of neighbouring keys stored as one value, because sled's cost is per key (about 15 us) and a job is many
//! small records. This file owns the page's format and the directory of pages (which key ranges are one page), and
//! decides which ranges a cut must write again. Contents always come from the state's clone: nothing is read back.
//!
//! The pages of a table partition its keys: a page holds the rows from its own bound up to the next page's. A page's
//! bound is the key of its first row when it was made.

use std::collections::BTreeMap;

/// Bytes of a full page. Small enough that one changed row in a page costs little, large enough that sled's cost per
/// key vanishes; also sled rewrites whole leaves of 16 values now and then.
pub(crate) const PAGE: usize = 16 << 10;

// --------------------------------------------------------------------------------------------------------- the format

/// Appends one row: lengths as LEB128, key, canonical bytes.
pub(crate) fn put_row(out: &mut Vec<u8>, key: &[u8], canonical: &[u8]) {
    put_len(out, key.len());
    put_len(out, canonical.len());
    out.extend_from_slice(key);
    out.extend_from_slice(canonical);
}

fn put_len(out: &mut Vec<u8>, mut len: usize) {
    while len >= 0x80 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
}

fn take_len(bytes: &mut &[u8]) -> Option<usize> {
    let mut len = 0usize;
    for shift in (0..35).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        len |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(len);
        }
    }
    None
}

/// Reads the rows of a page, one after the other; stops with an error text at the first that is cut off.
pub(crate) struct RowReader<'a>(pub &'a [u8]);

impl<'a> Iterator for RowReader<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let left = self.0.len();
        let row = take_len(&mut self.0).zip(take_len(&mut self.0)).and_then(|(key_len, len)| {
            let (key, rest) = self.0.split_at_checked(key_len)?;
            let (canonical, rest) = rest.split_at_checked(len)?;
            self.0 = rest;
            Some((key, canonical))
        });
        if row.is_none() {
            self.0 = &[];
        }
        Some(row.ok_or_else(|| format!("a row is cut off, {left} bytes before the end")))
    }
}

// ------------------------------------------------------------------------------------------------------ the directory

/// The pages of one table: bound -> chunks that the page's value needs beside its head (0 for nearly all).
#[derive(Default)]
pub(crate) struct Pages {
    bounds: BTreeMap<Vec<u8>, u16>,
}

/// Neighbouring pages that are written again together: keys from `from` (or the first) up to, and without, `to`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub from: Option<Vec<u8>>,
    pub to: Option<Vec<u8>>,
}

impl Pages {
    pub fn add(&mut self, bound: Vec<u8>, chunks: u16) {
        self.bounds.insert(bound, chunks);
    }

    /// The runs that cover all changed keys (given in order), each page in at most one.
    pub fn runs(&self, changed: &[Vec<u8>]) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for key in changed {
            if let Some(last) = runs.last_mut() {
                match &last.to {
                    None => continue,
                    Some(to) if key < to => continue,
                    Some(to) => {
                        let end = self.after(to);
                        if end.as_ref().is_none_or(|end| key < end) {
                            last.to = end;
                            continue;
                        }
                    }
                }
            }
            runs.push(self.page_of(key));
        }
        runs
    }

    /// The page that a key belongs to; keys below the first bound belong to the first page.
    fn page_of(&self, key: &[u8]) -> Run {
        let mut up_to = self.bounds.range::<[u8], _>((std::ops::Bound::Unbounded, std::ops::Bound::Included(key)));
        let from = up_to.next_back().map(|(bound, _)| bound);
        let is_first = up_to.next_back().is_none();
        let start = from.or_else(|| self.bounds.keys().next());
        Run { from: from.filter(|_| !is_first).cloned(), to: start.and_then(|start| self.after(start)) }
    }

    /// The bound that follows `bound`; `None` when it is the last.
    pub fn after(&self, bound: &[u8]) -> Option<Vec<u8>> {
        let above = (std::ops::Bound::Excluded(bound), std::ops::Bound::Unbounded);
        self.bounds.range::<[u8], _>(above).next().map(|(next, _)| next.clone())
    }

    /// Takes the pages of a run out; their bounds and chunks.
    pub fn remove(&mut self, run: &Run) -> Vec<(Vec<u8>, u16)> {
        let from = run.from.as_deref().map_or(std::ops::Bound::Unbounded, std::ops::Bound::Included);
        let to = run.to.as_deref().map_or(std::ops::Bound::Unbounded, std::ops::Bound::Excluded);
        let gone: Vec<_> =
            self.bounds.range::<[u8], _>((from, to)).map(|(bound, chunks)| (bound.clone(), *chunks)).collect();
        for (bound, _) in &gone {
            self.bounds.remove(bound);
        }
        gone
    }
}

// --------------------------------------------------------------------------------------------------------- the filler

/// Cuts a stream of rows into pages of about [`PAGE`] bytes; nothing smaller than half a page but a lone last one.
#[derive(Default)]
pub(crate) struct Filler {
    bytes: Vec<u8>,
    /// Where each buffered row starts, and its key.
    rows: Vec<(usize, Vec<u8>)>,
}

impl Filler {
    /// Adds a row; `emit` gets (bound, rows) of each page that is full by now.
    pub fn push(&mut self, key: &[u8], canonical: &[u8], emit: &mut dyn FnMut(Vec<u8>, &[u8])) {
        self.rows.push((self.bytes.len(), key.to_vec()));
        put_row(&mut self.bytes, key, canonical);
        if self.bytes.len() >= 2 * PAGE {
            self.emit_first(PAGE, emit);
        }
    }

    /// Bytes not emitted yet.
    pub fn waiting(&self) -> usize {
        self.bytes.len()
    }

    /// Emits the rest: as one page, or as two equal ones.
    pub fn finish(mut self, emit: &mut dyn FnMut(Vec<u8>, &[u8])) {
        if self.bytes.len() > PAGE + PAGE / 2 {
            self.emit_first(self.bytes.len() / 2, emit);
        }
        if !self.rows.is_empty() {
            emit(std::mem::take(&mut self.rows[0].1), &self.bytes);
        }
    }

    /// Emits the rows that start below `size` bytes: at least one.
    fn emit_first(&mut self, size: usize, emit: &mut dyn FnMut(Vec<u8>, &[u8])) {
        let count = self.rows.partition_point(|(start, _)| *start < size);
        let end = self.rows.get(count).map_or(self.bytes.len(), |(start, _)| *start);
        emit(std::mem::take(&mut self.rows[0].1), &self.bytes[..end]);
        self.bytes.drain(..end);
        self.rows.drain(..count);
        for (start, _) in &mut self.rows {
            *start -= end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> Vec<u8> {
        vec![number]
    }

    fn pages(bounds: &[u8]) -> Pages {
        let mut pages = Pages::default();
        bounds.iter().for_each(|bound| pages.add(key(*bound), 0));
        pages
    }

    fn run(from: Option<u8>, to: Option<u8>) -> Run {
        Run { from: from.map(key), to: to.map(key) }
    }

    #[test]
    fn the_runs_of_changed_keys_are_whole_pages_and_neighbours_are_one_run() {
        let table = pages(&[10, 20, 30, 40]);
        let runs = |changed: &[u8]| table.runs(&changed.iter().copied().map(key).collect::<Vec<_>>());
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&[5]), [run(None, Some(20))]);
        assert_eq!(runs(&[10, 19]), [run(None, Some(20))]);
        assert_eq!(runs(&[25]), [run(Some(20), Some(30))]);
        assert_eq!(runs(&[20, 35]), [run(Some(20), Some(40))]);
        assert_eq!(runs(&[5, 35]), [run(None, Some(20)), run(Some(30), Some(40))]);
        assert_eq!(runs(&[40, 90]), [run(Some(40), None)]);
        assert_eq!(pages(&[]).runs(&[key(3), key(9)]), [run(None, None)]);
        assert_eq!(pages(&[10]).runs(&[key(3)]), [run(None, None)]);
    }

    #[test]
    fn a_filler_makes_even_pages_and_loses_no_row() {
        for (rows, size) in [(0usize, 10usize), (1, 10), (3, 200_000), (5_000, 37), (1_100, 16), (90, 400)] {
            let mut found = Vec::new();
            let mut sizes = Vec::new();
            let mut emit = |bound: Vec<u8>, page: &[u8]| {
                let keys: Vec<_> = RowReader(page).map(|row| row.expect("a whole row").0.to_vec()).collect();
                assert_eq!(keys[0], bound);
                sizes.push(page.len());
                found.extend(keys);
            };
            let mut filler = Filler::default();
            let keys: Vec<_> = (0..rows as u32).map(|number| number.to_be_bytes().to_vec()).collect();
            keys.iter().for_each(|key| filler.push(key, &vec![7; size], &mut emit));
            filler.finish(&mut emit);
            assert_eq!(found, keys);
            assert!(sizes.len() < 2 || sizes.iter().all(|bytes| *bytes >= PAGE / 2), "{sizes:?}");
            assert!(size > PAGE || sizes.iter().all(|bytes| *bytes <= 2 * PAGE), "{sizes:?}");
        }
    }

    #[test]
    fn a_row_that_is_cut_off_is_an_error() {
        let mut page = Vec::new();
        put_row(&mut page, b"key", &[1; 300]);
        for len in 1..page.len() {
            assert!(RowReader(&page[..len]).any(|row| row.is_err()), "{len} bytes");
        }
        assert!(RowReader(&[0xff; 12]).any(|row| row.is_err()));
    }
}
