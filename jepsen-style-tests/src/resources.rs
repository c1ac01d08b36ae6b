//! Faults of what a replica lives on: its memory, its descriptors, its clocks, the space on its disk. What each needs of the machine,
//! and the proof that it took effect.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::v1;
use rand::RngExt;
use rand::rngs::StdRng;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

use crate::cluster::{Cluster, SOON, USER, shell_job};
use crate::faults::Struck;
use crate::nemesis::REPLICAS;

/// How long a squeezed replica is given to meet its limit.
const SQUEEZED: Duration = Duration::from_secs(10);
/// How far a wall clock leaps: within what a request id may be off, and beyond, where ids from the future are refused.
const LEAPS_MS: [i64; 3] = [3_600_000, -600_000, -3_600_000];
/// Of the 1 % by which rates may differ under the timing assumption.
const RATE_OFF: f64 = 0.009;
/// It is measured over this time, with the sharpest of so many samples at each end.
const RATE_MEASURED: Duration = Duration::from_secs(15);
const SAMPLES: usize = 30;
/// A group without a limit says so by a number near the largest.
const NO_LIMIT: u64 = 1 << 60;

// -------------------------------------------------------------------------------------------------------------- memory

/// A control group for the memory of one process; gone when dropped, after the process.
struct MemoryGroup {
    dir: PathBuf,
    /// Of the unified hierarchy.
    unified: bool,
}

impl MemoryGroup {
    fn make() -> Result<Self, String> {
        let root = Path::new("/sys/fs/cgroup");
        let unified = !root.join("memory/memory.limit_in_bytes").is_file();
        let parent = if unified { root.to_owned() } else { root.join("memory") };
        let dir = parent.join(format!("ares-faults-{}", std::process::id()));
        fs::create_dir_all(&dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let group = Self { dir, unified };
        // Without a controller of memory the group has no such file.
        group.usage().map(|_| group)
    }

    fn enter(&self, pid: Pid) -> Result<(), String> {
        self.write("cgroup.procs", &pid.to_string())
    }

    fn usage(&self) -> Result<u64, String> {
        let text = self.read(if self.unified { "memory.current" } else { "memory.usage_in_bytes" })?;
        text.trim().parse().map_err(|error| format!("usage of memory: {error}"))
    }

    /// Sets a limit; refused where the kernel can't free as much.
    fn limit(&self, bytes: u64) -> Result<(), String> {
        self.write(if self.unified { "memory.max" } else { "memory.limit_in_bytes" }, &bytes.to_string())
    }

    /// How often it met its limit.
    fn met(&self) -> u64 {
        if !self.unified {
            return self.read("memory.failcnt").ok().and_then(|text| text.trim().parse().ok()).unwrap_or_default();
        }
        let events = self.read("memory.events").unwrap_or_default();
        events.lines().find_map(|line| line.strip_prefix("max ")?.parse().ok()).unwrap_or_default()
    }

    fn read(&self, name: &str) -> Result<String, String> {
        let path = self.dir.join(name);
        fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn write(&self, name: &str, text: &str) -> Result<(), String> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // The kernel takes its time to part with who was killed in it.
        for _ in 0..100 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Whether memory can be limited here, and why not.
pub fn memory_available() -> Result<(), String> {
    MemoryGroup::make().map(|_| ())
}

/// Takes a replica's memory away until the kernel kills it or it has met its limit for a while.
pub async fn squeeze_memory(cluster: &mut Cluster, rng: &mut StdRng) -> Result<Struck, String> {
    let at = rng.random_range(0..REPLICAS);
    let group = MemoryGroup::make()?;
    cluster.kill_replica(at);
    cluster.restart_replica(at);
    group.enter(cluster.replica(at).pid())?;
    cluster.try_until("the replica answers", SOON, async |cluster| cluster.status(at).await.is_ok()).await?;
    // What is cached goes first, then there is no more to give.
    let mut limit = group.usage()?;
    while group.limit(limit).is_ok() && cluster.replica_runs(at) && limit > 1 << 20 {
        limit -= limit / 16;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let end = Instant::now() + SQUEEZED;
    while Instant::now() < end && cluster.replica_runs(at) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (killed, met) = (!cluster.replica_runs(at), group.met());
    let _ = group.limit(NO_LIMIT);
    cluster.kill_replica(at);
    cluster.restart_replica(at);
    Ok(Struck { target: format!("r{at}"), took_effect: killed || met > 0 })
}

// --------------------------------------------------------------------------------------------------------- descriptors

/// Takes a replica's descriptors away for a while: it accepts nobody and opens nothing. It goes on, or ends with its reason.
pub async fn exhaust_descriptors(cluster: &mut Cluster, rng: &mut StdRng) -> Result<Struck, String> {
    let at = rng.random_range(0..REPLICAS);
    let pid = cluster.replica(at).pid();
    let had = limit_descriptors(pid, Some(8))?;
    // Its known connections go on; a new one is not accepted.
    let refused = cluster.status(at).await.is_err();
    tokio::time::sleep(Duration::from_millis(rng.random_range(1_000..6_000))).await;
    if cluster.replica_runs(at) {
        limit_descriptors(pid, had)?;
    }
    cluster.revive_replica(at);
    cluster.try_until("the replica answers again", SOON, async |cluster| cluster.status(at).await.is_ok()).await?;
    Ok(Struck { target: format!("r{at}"), took_effect: refused })
}

/// What it was before.
fn limit_descriptors(pid: Pid, current: Option<u64>) -> Result<Option<u64>, String> {
    let before = rustix::process::getrlimit(Resource::Nofile);
    let wanted = Rlimit { current, maximum: before.maximum };
    let before = prlimit(Some(pid), Resource::Nofile, wanted);
    Ok(before.map_err(|error| format!("descriptors of process {pid}: {error}"))?.current)
}

// -------------------------------------------------------------------------------------------------------------- clocks

/// The library that makes a process see other clocks, where it is installed.
fn faketime() -> Result<PathBuf, String> {
    let dirs = fs::read_dir("/usr/lib").map_err(|error| error.to_string())?.flatten().map(|entry| entry.path());
    let found = dirs.map(|dir| dir.join("faketime/libfaketimeMT.so.1")).find(|path| path.is_file());
    found.ok_or_else(|| "libfaketime is not installed".to_owned())
}

/// Whether clocks can be changed here, and why not.
pub fn clocks_available() -> Result<(), String> {
    faketime().map(|_| ())
}

/// The environment of a process that sees the clocks as a file says; `all`: the monotonic ones too.
fn other_clocks(file: &Path, all: bool) -> Result<Vec<(String, String)>, String> {
    let mut env = vec![
        ("LD_PRELOAD".to_owned(), faketime()?.display().to_string()),
        ("FAKETIME_TIMESTAMP_FILE".to_owned(), file.display().to_string()),
        ("FAKETIME_CACHE_DURATION".to_owned(), "1".to_owned()),
    ];
    if !all {
        env.push(("FAKETIME_DONT_FAKE_MONOTONIC".to_owned(), "1".to_owned()));
    }
    Ok(env)
}

/// The wall clock of the leader leaps by an hour, forth or back, and returns.
pub async fn leap_wall_clock(cluster: &mut Cluster, rng: &mut StdRng) -> Result<Struck, String> {
    let at = rng.random_range(0..REPLICAS);
    let leap = LEAPS_MS[rng.random_range(0..LEAPS_MS.len())];
    let file = cluster.path().join("wall-clock");
    lead_with_clocks(cluster, at, &file, "+0", false).await?;
    write(&file, &format!("{:+}", leap / 1_000))?;
    // The library looks at its file once a second.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let took_effect = wall_clock_is_off(cluster, leap).await?;
    tokio::time::sleep(Duration::from_millis(rng.random_range(0..3_000))).await;
    write(&file, "+0")?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.stop_replica(at)?;
    cluster.restart_replica(at);
    Ok(Struck { target: format!("r{at} by {leap} ms"), took_effect })
}

/// A job that is submitted now has the wall time of such a leap, or its request id is from the future.
async fn wall_clock_is_off(cluster: &Cluster, leap_ms: i64) -> Result<bool, String> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_err(|error| error.to_string())?;
    let submit =
        v1::SubmitJobRequest { request_id: proto::request_id(), job: Some(shell_job("true")), user: USER.into() };
    let id = match cluster.client().submit_job(submit).await {
        Ok(reply) => reply.job_id,
        Err(error) if leap_ms < 0 && error.to_string().contains("in the future") => return Ok(true),
        Err(error) => return Err(format!("no job is accepted: {error}")),
    };
    let job = cluster.client().get_job(v1::GetJobRequest { job_id: id, ..Default::default() }).await;
    let job = job.map_err(|error| format!("job {id} can't be read: {error}"))?;
    let off = job.submitted_unix_ms - now.as_millis() as i64;
    Ok((off - leap_ms).abs() < leap_ms.abs() / 2)
}

/// All clocks of the leader run by 0.9 % too fast or too slow: within the assumption.
pub async fn skew_clock_rate(cluster: &mut Cluster, rng: &mut StdRng) -> Result<Struck, String> {
    let at = rng.random_range(0..REPLICAS);
    let rate = if rng.random_bool(0.5) { 1.0 + RATE_OFF } else { 1.0 - RATE_OFF };
    let file = cluster.path().join("clock-rate");
    lead_with_clocks(cluster, at, &file, &format!("+0 x{rate}"), true).await?;
    let first = ClockSample::take(cluster, at).await?;
    tokio::time::sleep(RATE_MEASURED).await;
    let (least, most) = first.rate_until(&ClockSample::take(cluster, at).await?);
    let took_effect = if rate > 1.0 { least > 1.0 } else { most < 1.0 };
    cluster.stop_replica(at)?;
    cluster.restart_replica(at);
    Ok(Struck { target: format!("r{at} at {rate}, measured {least:.4} to {most:.4}"), took_effect })
}

/// Cluster time, and between which instants of this process it was that.
struct ClockSample {
    from: Instant,
    to: Instant,
    clock_ms: u64,
}

impl ClockSample {
    /// The sharpest of some.
    async fn take(cluster: &Cluster, at: usize) -> Result<Self, String> {
        let (client, mut best) = (cluster.client_at(at), None::<Self>);
        for _ in 0..SAMPLES {
            // An entry that is written now has the time of now.
            let from = Instant::now();
            let open = v1::OpenSessionRequest { request_id: proto::request_id(), owner: USER.into(), ttl_ms: 1_000 };
            client.open_session(open).await.map_err(|error| format!("no entry is written: {error}"))?;
            let status = client.status(v1::StatusRequest {}).await.map_err(|error| error.to_string())?;
            let clock_ms = status.cluster_clock_ms;
            let sample = Self { from, to: Instant::now(), clock_ms };
            if best.as_ref().is_none_or(|best| sample.to - sample.from < best.to - best.from) {
                best = Some(sample);
            }
        }
        best.ok_or_else(|| "no sample of cluster time".to_owned())
    }

    /// The least and the highest rate of cluster time by this process' clock that both samples allow.
    fn rate_until(&self, later: &Self) -> (f64, f64) {
        let passed = later.clock_ms.saturating_sub(self.clock_ms) as f64 / 1_000.0;
        (passed / (later.to - self.from).as_secs_f64(), passed / (later.from - self.to).as_secs_f64())
    }
}

async fn lead_with_clocks(cluster: &mut Cluster, at: usize, file: &Path, clock: &str, all: bool) -> Result<(), String> {
    write(file, clock)?;
    cluster.stop_replica(at)?;
    cluster.restart_replica_with(at, &other_clocks(file, all)?);
    cluster.let_lead(at).await
}

/// In one step: whoever reads it meanwhile sees the old or the new.
fn write(file: &Path, text: &str) -> Result<(), String> {
    let new = file.with_extension("new");
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, file));
    written.map_err(|error| format!("{}: {error}", file.display()))
}

// ---------------------------------------------------------------------------------------------------------- disk space

/// The leader's disk fills: it says so and hands over; then there is space again.
pub async fn fill_disk(cluster: &mut Cluster) -> Result<Struck, String> {
    let (at, term) = cluster.find_leader(0, SOON).await?;
    cluster.disk(at).fill()?;
    let moved = cluster.try_until("the full replica leads no more", SOON, async |cluster| {
        cluster.leader().await.is_some_and(|(leader, now)| leader != at && now > term)
    });
    let moved = moved.await;
    // One that filled within an image's write stopped, with the reason: documented.
    let full = !cluster.replica_runs(at) || cluster.status(at).await.is_ok_and(|status| status.disk_full);
    cluster.disk(at).empty()?;
    moved?;
    cluster.revive_replica(at);
    let room = cluster.try_until("the replica has space again", SOON, async |cluster| {
        cluster.status(at).await.is_ok_and(|status| !status.disk_full)
    });
    room.await?;
    Ok(Struck { target: format!("r{at}"), took_effect: full })
}
