//! The trace of a run: a hash over all its events, and the last of them for people.

use std::collections::VecDeque;

use xxhash_rust::xxh3::Xxh3;

const LAST: usize = 40;

pub struct Trace {
    hash: Xxh3,
    last: VecDeque<(u64, &'static str, u64, u64)>,
    loud: bool,
}

impl Trace {
    /// `loud`: prints each event.
    pub fn new(loud: bool) -> Self {
        Self { hash: Xxh3::new(), last: VecDeque::new(), loud }
    }

    pub fn event(&mut self, now: u64, word: &'static str, a: u64, b: u64) {
        let mut bytes = [0u8; 28];
        bytes[..8].copy_from_slice(&now.to_le_bytes());
        bytes[8..16].copy_from_slice(&a.to_le_bytes());
        bytes[16..24].copy_from_slice(&b.to_le_bytes());
        bytes[24] = word.len() as u8;
        bytes[25] = word.as_bytes()[0];
        self.hash.update(&bytes);
        if self.last.len() == LAST {
            self.last.pop_front();
        }
        self.last.push_back((now, word, a, b));
        if self.loud {
            println!("{:>12.6} {word} {a} {b}", now as f64 / 1e6);
        }
    }

    /// Something that is no event of its own.
    pub fn note(&mut self, word: &'static str, a: u64, b: u64) {
        let now = self.last.back().map_or(0, |last| last.0);
        self.event(now, word, a, b);
    }

    /// For people only.
    pub fn say(&self, now: u64, text: impl FnOnce() -> String) {
        if self.loud {
            println!("{:>12.6} {}", now as f64 / 1e6, text());
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash.digest()
    }

    /// The last events, one a line.
    pub fn tail(&self) -> String {
        let line = |(now, word, a, b): &(u64, &str, u64, u64)| format!("{:>12.6} {word} {a} {b}\n", *now as f64 / 1e6);
        self.last.iter().map(line).collect()
    }
}
