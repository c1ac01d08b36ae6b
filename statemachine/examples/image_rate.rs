//! How many new jobs a second the image keeps up with: replicas in one process, each with a thread that changes its
//! state as apply would at a submission, and one that writes cuts. Prints JSON.
//!
//! `cargo run --release -p statemachine --example image_rate -- [--replicas 3] [--seconds 20] [--rate 0] [--dir DIR]
//! [--churn] [--noise]`: rate 0 is as fast as it goes; with churn, jobs also end and leave memory when 50,000 are alive;
//! with noise, their commands don't compress.
#![allow(clippy::disallowed_methods, clippy::disallowed_types, reason = "a measurement needs the clock")]

use std::path::PathBuf;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use statemachine::record::*;
use statemachine::spec::{Retry, Shape};
use statemachine::storage::{self, BEHIND_RECORDS, CUT_MS, CUT_RECORDS, Cut, LogBounds, Persisted};
use statemachine::*;

/// Commands of an entry under load.
const ENTRY: u64 = 200;
const ALIVE: u64 = 50_000;

fn main() {
    let options = Options::parse();
    let before = Usage::now();
    let replicas: Vec<_> = (0..options.replicas)
        .map(|number| {
            let options = options.clone();
            std::thread::spawn(move || replica(&options, number))
        })
        .collect();
    let results: Vec<Tally> = replicas.into_iter().map(|thread| thread.join().expect("a replica's thread")).collect();
    let seconds = results.iter().map(|tally| tally.seconds).fold(0.0, f64::max);
    let after = Usage::now();

    let begin = Instant::now();
    let last = LogPosition { index: u64::MAX, ..LogPosition::default() };
    let recovered = storage::open(&options.dir.join("0"), LogBounds { purged: None, last: Some(last) });
    let restart_ms = begin.elapsed().as_millis() as u64;
    let mut restored = recovered.expect("a good image").state;
    assert_eq!(restored.meta.next_job, results[0].jobs, "not the last cut");
    assert_eq!(restored.digest(), restored.digest_from_scratch());

    let slowest = results.iter().map(|tally| tally.jobs).min().unwrap_or(0);
    let jobs: u64 = results.iter().map(|tally| tally.jobs).sum();
    let sum = |of: fn(&Tally) -> u64| results.iter().map(of).sum::<u64>();
    let report = serde_json::json!({
        "replicas": options.replicas,
        "churn": options.churn,
        "noise": options.noise,
        "seconds": seconds,
        "jobs_per_s": slowest as f64 / seconds,
        "cuts": sum(|tally| tally.cuts),
        "records_per_cut": sum(|tally| tally.records) / sum(|tally| tally.cuts).max(1),
        "values_per_job": sum(|tally| tally.values) as f64 / jobs as f64,
        "logical_bytes_per_job": sum(|tally| tally.bytes) as f64 / jobs as f64,
        "disk_bytes_per_job": (after.written - before.written) as f64 / jobs as f64,
        "disk_mb_per_s": (after.written - before.written) as f64 / 1e6 / seconds,
        "cpu_us_per_job": (after.cpu_us - before.cpu_us) as f64 / jobs as f64,
        "cores_used": (after.cpu_us - before.cpu_us) as f64 / 1e6 / seconds,
        "cpu_us_per_job_apply": sum(|tally| tally.apply_us) as f64 / jobs as f64,
        "cpu_us_per_job_writer": sum(|tally| tally.writer_us) as f64 / jobs as f64,
        "refused_ms": results.iter().map(|tally| tally.refused_ms).max(),
        "longest_cut_ms": results.iter().map(|tally| tally.longest_cut_ms).max(),
        "longest_digest_ms": results.iter().map(|tally| tally.longest_digest_ms).max(),
        "image_mb": results.iter().map(|tally| tally.image_bytes).sum::<u64>() as f64 / 1e6,
        "peak_resident_mb": after.peak_mb,
        "restart_ms": restart_ms,
        "restart_jobs": restored.jobs.len(),
    });
    println!("{report:#}");
}

#[derive(Default)]
struct Tally {
    /// Until the last cut was on disk.
    seconds: f64,
    jobs: u64,
    cuts: u64,
    records: u64,
    values: u64,
    bytes: u64,
    apply_us: u64,
    writer_us: u64,
    refused_ms: u64,
    longest_cut_ms: u64,
    longest_digest_ms: u64,
    image_bytes: u64,
}

impl Tally {
    fn count(&mut self, persisted: &Persisted, ms: u64) {
        self.cuts += 1;
        self.records += persisted.records as u64;
        self.values += persisted.values as u64;
        self.bytes += persisted.bytes as u64;
        self.longest_cut_ms = self.longest_cut_ms.max(ms);
    }
}

/// Applies until the time is over; writes cuts beside it.
fn replica(options: &Options, number: u64) -> Tally {
    let dir = options.dir.join(number.to_string());
    let _ = std::fs::remove_dir_all(&dir);
    let recovered = storage::open(&dir, LogBounds::default()).expect("an empty directory");
    let (mut state, image) = (recovered.state, recovered.image);
    let (to_image, cuts) = sync_channel::<Cut>(1);
    let (to_apply, done) = sync_channel::<(Persisted, u64)>(1);
    let writer = std::thread::spawn(move || {
        while let Ok(cut) = cuts.recv() {
            let start = Instant::now();
            let persisted = image.write(cut).expect("a working disk");
            let _ = to_apply.send((persisted, start.elapsed().as_millis() as u64));
        }
        cpu_us("thread-self/stat")
    });

    let mut tally = Tally::default();
    let (start, mut last_cut, mut writing) = (Instant::now(), Instant::now(), false);
    while start.elapsed() < Duration::from_secs(options.seconds) {
        if let Ok((persisted, ms)) = done.try_recv() {
            writing = false;
            state.forget_archived(&persisted);
            tally.count(&persisted, ms);
        }
        let uncut = state.uncut();
        if !writing && (uncut >= CUT_RECORDS || last_cut.elapsed().as_millis() as u64 >= CUT_MS) {
            (last_cut, writing) = (Instant::now(), true);
            to_image.send(state.cut()).expect("the writer is alive");
        }
        let ahead = options.rate > 0 && tally.jobs > start.elapsed().as_millis() as u64 * options.rate / 1_000;
        if uncut >= BEHIND_RECORDS || ahead {
            tally.refused_ms += u64::from(!ahead);
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        entry(&mut state, options);
        tally.jobs += ENTRY;
        state.digest_some(2_000);
        if state.meta.applied.index.is_multiple_of(1_024) {
            let begin = Instant::now();
            state.digest();
            tally.longest_digest_ms = tally.longest_digest_ms.max(begin.elapsed().as_millis() as u64);
        }
    }
    if writing {
        let (persisted, ms) = done.recv().expect("the writer is alive");
        tally.count(&persisted, ms);
    }
    // The rest is part of the time: a rate counts only what is on disk.
    to_image.send(state.cut()).expect("the writer is alive");
    let (persisted, ms) = done.recv().expect("the writer is alive");
    tally.count(&persisted, ms);
    tally.seconds = start.elapsed().as_secs_f64();
    drop(to_image);
    tally.apply_us = cpu_us("thread-self/stat");
    tally.writer_us = writer.join().expect("the writer's thread");
    tally.image_bytes = std::fs::metadata(dir.join("image/db")).map_or(0, |db| db.len());
    tally
}

/// What an entry of submissions changes.
fn entry(state: &mut State, options: &Options) {
    state.meta.applied.index += 1;
    state.meta.clock_ms += 10;
    for _ in 0..ENTRY {
        state.meta.next_job += 1;
        state.meta.rev.0 += 1;
        let (id, rev) = (JobId(state.meta.next_job), state.meta.rev);
        let request = request_id(id.0);
        state.jobs.insert(id, Versioned { create_rev: rev, mod_rev: rev, version: 1, value: job(id, request, state) });
        state.bodies.insert(id, body(id, options.noise));
        let stored = Request { body: u128::from(id.0) << 64, reply: StoredReply::Job(id), bucket: 3 };
        state.requests.insert(request, stored);
        state.index.requests.insert((3, request));
        state.tenants.update(&TenantId(0), |tenant| tenant.live_jobs += 1).unwrap_or_else(|| {
            let tenant = Tenant { name: "default".into(), live_jobs: 1, ..Tenant::default() };
            state.tenants.insert(TenantId(0), tenant);
        });
        if options.churn && id.0 > ALIVE {
            archive(state, JobId(id.0 - ALIVE));
        }
    }
}

fn archive(state: &mut State, id: JobId) {
    let (Some(job), Some(body)) = (state.jobs.remove(&id), state.bodies.remove(&id)) else { return };
    let bucket = (state.meta.clock_ms / 3_600_000) as u32;
    let row = HistoryRow { id, job: (*job).clone(), body: (*body).clone(), task: None, bucket };
    let (hash, bytes) = storage::weigh(&row);
    let mut sums = state.buckets.get(&bucket).copied().unwrap_or_default();
    sums.rows += 1;
    sums.bytes += bytes;
    sums.sum = sums.sum.wrapping_add(hash);
    state.buckets.insert(bucket, sums);
    let mut ended = state.ended.get(&(id.0 / 256)).cloned().unwrap_or_default();
    ended.jobs.insert((id.0 % 256) as u8, (TaskOutcome::Succeeded, bucket));
    state.ended.insert(id.0 / 256, ended);
    state.archived.insert(id, std::sync::Arc::new(row));
}

fn job(id: JobId, request: RequestId, state: &State) -> Job {
    let shape = Shape {
        nodes: 1,
        ranks_per_node: 1,
        gpus_per_rank: 1,
        gpu_types: [GpuTypeId(7)].into(),
        cores_per_rank: 0,
        mem_mib_per_rank: 0,
        mix_types: false,
        min_bandwidth_mbps: 0,
        topology: None,
        machines: None,
    };
    let retry = Retry { max: 3, initial_ms: 1_000, mult_milli: 2_000, max_ms: 300_000, on_exit: [].into() };
    Job {
        spec: JobSpec {
            name: format!("bench-{id}").into(),
            priority: 0,
            shape,
            limit_ms: 3_600_000,
            lease_ttl_ms: 30_000,
            kill_grace_ms: 5_000,
            retry,
            labels: Default::default(),
            terms: None,
        },
        tenant: TenantId(0),
        user: UserId(1),
        queue: QueueId(0),
        request: Some(request),
        submitted_clock_ms: state.meta.clock_ms,
        submitted_wall_ms: 1_764_000_000_000,
        seq: state.meta.rev.0,
        holds: Holds::default(),
        rare: None,
        ended: None,
        unmet: 0,
    }
}

/// A command of about 300 bytes: a path, flags, a number or two of its own; or, with `--noise`, nothing that repeats.
fn body(id: JobId, noise: bool) -> Body {
    let own = scramble(id.0);
    let text = match noise {
        true => (0..15).map(|part| format!("{:020}", scramble(id.0 << 8 | part))).collect(),
        false => format!(
            "cd /srv/projects/vision && exec python3 -m train.main --config configs/resnet50_imagenet.yaml --seed {own} \
             --data /mnt/datasets/imagenet-2012/shards --output /mnt/results/vision/run-{id} --batch-size 256 \
             --precision bf16 --resume latest --log-interval 50 --workers 8"
        ),
    };
    Body { argv: vec!["/bin/sh".into(), "-c".into(), text], env: Default::default(), cwd: String::new() }
}

/// As a UUIDv7: 17 ids a millisecond, then random bits.
fn request_id(number: u64) -> RequestId {
    let ms = 1_764_000_000_000 + number / 17;
    let mut id = [0; 16];
    id[..6].copy_from_slice(&ms.to_be_bytes()[2..]);
    id[6..14].copy_from_slice(&scramble(number).to_be_bytes());
    id[6] = 0x70 | id[6] & 0xf;
    RequestId(id)
}

/// splitmix64's finalizer.
fn scramble(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

#[derive(Clone)]
struct Options {
    replicas: u64,
    seconds: u64,
    rate: u64,
    churn: bool,
    noise: bool,
    dir: PathBuf,
}

impl Options {
    fn parse() -> Self {
        let temporary = std::env::temp_dir().join(format!("image-rate-{}", std::process::id()));
        let mut options = Self { replicas: 3, seconds: 20, rate: 0, churn: false, noise: false, dir: temporary };
        let mut words = std::env::args().skip(1);
        while let Some(word) = words.next() {
            let mut number = || words.next().and_then(|text| text.parse().ok()).expect("a number after the flag");
            match word.as_str() {
                "--replicas" => options.replicas = number(),
                "--seconds" => options.seconds = number(),
                "--rate" => options.rate = number(),
                "--churn" => options.churn = true,
                "--noise" => options.noise = true,
                "--dir" => options.dir = words.next().expect("a path after --dir").into(),
                other => panic!("unknown flag {other}"),
            }
        }
        options
    }
}

impl Drop for Options {
    fn drop(&mut self) {
        if !std::thread::panicking() && std::thread::current().name() == Some("main") {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// What the kernel says of this process.
struct Usage {
    cpu_us: u64,
    written: u64,
    peak_mb: u64,
}

impl Usage {
    fn now() -> Self {
        let field = |file: &str, name: &str| -> u64 {
            let text = std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
        };
        Self {
            cpu_us: cpu_us("self/stat"),
            written: field("io", "write_bytes:"),
            peak_mb: field("status", "VmHWM:") / 1024,
        }
    }
}

/// User and system time of a process or thread.
fn cpu_us(file: &str) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{file}")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name.split_whitespace().skip(11).take(2).filter_map(|word| word.parse::<u64>().ok()).sum::<u64>() * 10_000
}
