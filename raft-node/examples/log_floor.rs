//! What the disk can do, and what the log makes of it: bare write + fdatasync beside the log's appends, at 1, 32 and
//! 1,000 entries of 300 bytes a batch, one batch in flight, in turns in one run. Prints one line of JSON.
//!
//! `cargo run --release -p raft-node --example log_floor -- [DIR] [SECONDS PER CELL]`; DIR must be on the disk in
//! question.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use raft_node::log::{EntryId, Log, Options, Record};

const ENTRY_BYTES: usize = 300;
const BATCHES: [usize; 3] = [1, 32, 1000];

fn main() {
    let mut args = std::env::args().skip(1);
    let base = args.next().unwrap_or_else(|| ".".to_owned());
    let seconds: f64 = args.next().map_or(1.0, |text| text.parse().expect("SECONDS PER CELL: a number"));
    let dir = tempfile::tempdir_in(&base).expect("a directory to measure in");
    let mut cells = Vec::new();
    for batch in BATCHES {
        let floor = bare_file(dir.path(), batch, seconds);
        let log = own_log(dir.path(), batch, seconds);
        let of_floor = log.syncs_per_s / floor.syncs_per_s;
        cells.push(serde_json::json!({
            "batch": batch, "floor": floor.to_json(batch), "log": log.to_json(batch), "log_of_floor": round(of_floor),
        }));
    }
    println!("{}", serde_json::json!({ "entry_bytes": ENTRY_BYTES, "seconds_per_cell": seconds, "cells": cells }));
}

struct Cell {
    syncs_per_s: f64,
    p50: Duration,
    p99: Duration,
}

impl Cell {
    /// Times `step` again and again.
    fn measure(seconds: f64, mut step: impl FnMut()) -> Cell {
        let begin = Instant::now();
        let mut times = Vec::new();
        while begin.elapsed().as_secs_f64() < seconds {
            let start = Instant::now();
            step();
            times.push(start.elapsed());
        }
        let syncs_per_s = times.len() as f64 / begin.elapsed().as_secs_f64();
        times.sort();
        Cell { syncs_per_s, p50: times[times.len() / 2], p99: times[times.len() * 99 / 100] }
    }

    fn to_json(&self, batch: usize) -> serde_json::Value {
        serde_json::json!({
            "syncs_per_s": self.syncs_per_s.round(),
            "entries_per_s": (self.syncs_per_s * batch as f64).round(),
            "p50_ms": round(self.p50.as_secs_f64() * 1e3),
            "p99_ms": round(self.p99.as_secs_f64() * 1e3),
        })
    }
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn bare_file(dir: &Path, batch: usize, seconds: f64) -> Cell {
    let path = dir.join("bare");
    let mut file = File::create(&path).expect("create");
    let bytes = vec![7; batch * ENTRY_BYTES];
    let cell = Cell::measure(seconds, || {
        file.write_all(&bytes).expect("write");
        file.sync_data().expect("sync");
    });
    std::fs::remove_file(path).expect("remove");
    cell
}

fn own_log(dir: &Path, batch: usize, seconds: f64) -> Cell {
    let path = dir.join("log");
    let log = Log::open(&path, Options::default()).expect("open");
    let data = Bytes::from(vec![7; ENTRY_BYTES]);
    let (tell, told) = mpsc::channel();
    let mut next = 0;
    let cell = Cell::measure(seconds, || {
        let record = |index| Record { id: EntryId { index, term: 1, node: 1 }, tag: 1, data: data.clone() };
        let records = (next..next + batch as u64).map(record).collect();
        next += batch as u64;
        let tell = tell.clone();
        log.append(records, Box::new(move |result| drop(tell.send(result)))).expect("append");
        told.recv().expect("an answer").expect("durable");
    });
    drop(log);
    std::fs::remove_dir_all(path).expect("remove");
    cell
}
