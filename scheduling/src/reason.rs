//! The reasons for which a task waits: structured, with numbers, each with a stable code and a line of text. Finding
//! the one that binds is `explain`'s.

use std::fmt;

use statemachine::JobId;
use statemachine::account::QuotaHit;
use statemachine::cut::Nearest;
use statemachine::domain::Level;
use statemachine::record::Holds;
use statemachine::spec::AfterKind;

use crate::predict::gbps;

/// Why a task does not start. `code()` names it, `Display` is one line with the numbers, `CODES` says what to do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    NoNodes,
    NoSuchGpuType {
        wanted: Vec<String>,
        present: Vec<String>,
    },
    Never {
        needs: Needs,
        lack: Lack,
    },
    /// The machines that it may be on could not run it: so many of those that it needs are among them, so many among the others.
    Constraint {
        needs: Needs,
        /// What it says of its machines.
        text: String,
        able: u32,
        others: u32,
    },
    NodesOut {
        needs: Needs,
        able: u32,
        out: u32,
        silent: u32,
        /// The domain whose machines these are, where the gang must be in one; else empty.
        domain: String,
    },
    GpusBusy {
        needs: Needs,
        ready: u32,
        best: Best,
        unhealthy: u32,
        away: u32,
    },
    CoresBusy {
        needs: Needs,
        ready: u32,
        best: Best,
        away: u32,
    },
    /// `best` in MiB.
    MemBusy {
        needs: Needs,
        ready: u32,
        best: Best,
        away: u32,
    },
    LeasesFull {
        needs: Needs,
        limit: u32,
    },
    /// `best` in MB/s.
    Bandwidth {
        needs: Needs,
        ready: u32,
        best: Best,
        wanted_mbps: u32,
    },
    /// Enough machines have room, but not those of one domain: how many of each have, the most first, and how many domains are
    /// not named.
    Topology {
        needs: Needs,
        rooms: Vec<(String, u32)>,
        more: u32,
        away: u32,
    },
    /// What it could have is kept for `job`; with a limit of `fits_ms` or less it would end before that starts.
    Reserved {
        needs: Needs,
        job: JobId,
        starts_in_ms: Option<u64>,
        fits_ms: Option<u64>,
    },
    /// What it could have is set aside by a reservation; with a limit of `fits_ms` or less it would end before that begins.
    SetAside {
        needs: Needs,
        name: String,
        maintenance: bool,
        /// 0 = it has begun.
        starts_in_ms: u64,
        ends_in_ms: u64,
        fits_ms: Option<u64>,
    },
    /// Its own reservation has not begun.
    ReservationAhead {
        name: String,
        in_ms: u64,
    },
    ReservationGone {
        name: String,
    },
    /// So many leases end to make room for it.
    Preempting {
        needs: Needs,
        victims: u32,
    },
    Held {
        holds: Holds,
    },
    Quota {
        hit: QuotaHit,
        text: String,
    },
    Dependency {
        first: (AfterKind, JobId),
        parents: u32,
    },
    BeginTime {
        in_ms: u64,
    },
    Backoff {
        attempt: u32,
        in_ms: u64,
    },
    /// So many tasks of the array are under way, its limit.
    ArrayLimit {
        open: u32,
        limit: u32,
    },
    Soon,
}

/// Every code: its name, what it means, and what a person can do.
pub const CODES: &[(&str, &str, &str)] = &[
    ("NO_NODES", "no machine has joined the cluster", "join one: ares agent"),
    (
        "NO_SUCH_GPU_TYPE",
        "no machine has GPUs of an accepted type",
        "accept another --gpu-type, or join such a machine",
    ),
    ("NEVER", "the machines could not run it, were they all idle", "ask for less, or join larger machines"),
    (
        "CONSTRAINT",
        "too few of the machines that its --constraint, --nodelist and --exclude leave could run it",
        "leave one of them out, or give a machine the label: ares agent --label",
    ),
    ("NODES_OUT", "enough machines could run it, but too few are in service", "resume or repair them: ares nodes"),
    ("GPUS_BUSY", "too few machines have the GPUs free", "wait, or ask for fewer"),
    ("CORES_BUSY", "machines with the GPUs free lack cores", "wait, or ask for fewer --cores"),
    ("MEM_BUSY", "machines with the GPUs and cores free lack memory", "wait, or ask for less --mem"),
    ("LEASES_FULL", "the machines with room hold as many leases as a machine may", "wait"),
    ("BANDWIDTH", "the GPUs that are free are linked too slowly", "wait, or ask for a lower --min-bandwidth"),
    (
        "TOPOLOGY",
        "enough machines have room, but not in one block, rack or switch, as it requires",
        "wait, or prefer the level: --topology LEVEL:prefer",
    ),
    (
        "RESERVED",
        "what is free is kept for a job before it in the order, and it would not end in time",
        "wait, or give it a --time-limit that ends before that job starts",
    ),
    (
        "MAINTENANCE",
        "what is free is kept for a maintenance, and it would not end before that begins",
        "wait, or give it a --time-limit that ends before",
    ),
    (
        "SET_ASIDE",
        "what is free is kept for a reservation of others, and it would not end before that begins",
        "wait, or give it a --time-limit that ends before; ares reservation list shows whose it is",
    ),
    ("RESERVATION_AHEAD", "the reservation that it runs in has not begun", "wait"),
    (
        "RESERVATION_GONE",
        "the reservation that it was to run in has ended or was deleted",
        "ares cancel and submit it without --reservation, or have one of that name made anew",
    ),
    (
        "PREEMPTING",
        "jobs end to make room for it; what they held is kept for it",
        "nothing: it starts once they are gone",
    ),
    (
        "HELD",
        "a person's word, 20 excused attempts in a row, a restore, or a machine that still runs an attempt without a lease",
        "ares release ends the first two; the others end by themselves",
    ),
    ("QUOTA", "its tenant, or one above it, uses all that it may", "wait, ask for less, or have the limit raised"),
    ("DEPENDENCY", "jobs that it was told to wait for have not ended", "wait, or ask why they do: ares why"),
    ("BEGIN_TIME", "it was told to start later", "wait"),
    ("BACKOFF", "it failed, and the wait before its next attempt is not over", "wait, or ares requeue"),
    (
        "ARRAY_LIMIT",
        "as many tasks of the array have started and not ended as its %LIMIT allows",
        "wait, or submit it with a higher limit",
    ),
    ("SOON", "it fits; the planner starts it, or one before it in the order, next", "nothing"),
];

/// What the gang asks for, as far as the reason needs it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Needs {
    /// 0 = as few as hold the GPUs in equal parts.
    pub machines: u32,
    /// GPUs on each.
    pub gpus: u32,
    /// Accepted types; empty = any.
    pub types: Vec<String>,
    /// Cores and MiB on the machine that `best` names.
    pub cores: u32,
    pub mem_mib: u64,
    /// All in one domain of it.
    pub within: Option<Level>,
    /// Machines that it may be on, where it says which, and all.
    pub allowed: Option<(u32, u32)>,
}

/// The machine that comes nearest, and how much of the scarce thing it has.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Best {
    pub node: String,
    pub has: u64,
}

/// What even an idle cluster lacks.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lack {
    Gpus(Best),
    Cores(Best),
    /// In MiB.
    Memory(Best),
    /// In MB/s.
    Bandwidth(Best),
    /// So many machines could hold a part.
    Machines {
        able: u32,
    },
    /// The domain with the most such machines, and how many; empty where no such machine names its domain.
    Domain {
        domain: String,
        able: u32,
    },
    /// Machines with as many GPUs each as the parts would have: the next counts that could be cut.
    Cut(Nearest),
}

impl Reason {
    /// The stable name.
    pub fn code(&self) -> &'static str {
        match self {
            Reason::NoNodes => "NO_NODES",
            Reason::NoSuchGpuType { .. } => "NO_SUCH_GPU_TYPE",
            Reason::Never { .. } => "NEVER",
            Reason::Constraint { .. } => "CONSTRAINT",
            Reason::NodesOut { .. } => "NODES_OUT",
            Reason::GpusBusy { .. } => "GPUS_BUSY",
            Reason::CoresBusy { .. } => "CORES_BUSY",
            Reason::MemBusy { .. } => "MEM_BUSY",
            Reason::LeasesFull { .. } => "LEASES_FULL",
            Reason::Bandwidth { .. } => "BANDWIDTH",
            Reason::Topology { .. } => "TOPOLOGY",
            Reason::Reserved { .. } => "RESERVED",
            Reason::SetAside { maintenance: true, .. } => "MAINTENANCE",
            Reason::SetAside { .. } => "SET_ASIDE",
            Reason::ReservationAhead { .. } => "RESERVATION_AHEAD",
            Reason::ReservationGone { .. } => "RESERVATION_GONE",
            Reason::Preempting { .. } => "PREEMPTING",
            Reason::Held { .. } => "HELD",
            Reason::Quota { .. } => "QUOTA",
            Reason::Dependency { .. } => "DEPENDENCY",
            Reason::BeginTime { .. } => "BEGIN_TIME",
            Reason::Backoff { .. } => "BACKOFF",
            Reason::ArrayLimit { .. } => "ARRAY_LIMIT",
            Reason::Soon => "SOON",
        }
    }

    /// What a person can do about it.
    pub fn advice(&self) -> &'static str {
        CODES.iter().find(|(code, ..)| *code == self.code()).map_or("", |(.., advice)| advice)
    }

    /// It may start once others have ended.
    pub(crate) fn ends_for_room(&self) -> bool {
        self.ends_with_time() || matches!(self, Reason::Quota { .. })
    }

    /// It starts once enough of what runs has ended, if nothing else changes.
    pub fn ends_with_time(&self) -> bool {
        matches!(
            self,
            Reason::GpusBusy { .. }
                | Reason::CoresBusy { .. }
                | Reason::MemBusy { .. }
                | Reason::LeasesFull { .. }
                | Reason::Bandwidth { .. }
                | Reason::Topology { .. }
                | Reason::Reserved { .. }
                | Reason::SetAside { .. }
                | Reason::ReservationAhead { .. }
        )
    }
}

// ------------------------------------------------------------------------------------------------------------- texts

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NoNodes => f.write_str("no machine has joined the cluster"),
            Reason::NoSuchGpuType { wanted, present } => no_such_type(f, wanted, present),
            Reason::Never { needs, lack } => never(f, needs, lack),
            Reason::Constraint { needs, text, able, others } => {
                write!(f, "needs {needs} by {text}; {able} of these could run it, {others} of the others")
            }
            Reason::NodesOut { needs, able, out, silent, domain } => {
                let of = if domain.is_empty() { String::new() } else { format!(" of {domain}") };
                write!(f, "needs {needs}; {able}{of} could run it, {out} of them out of service, {silent} silent")
            }
            Reason::GpusBusy { needs, ready, best, unhealthy, away } => {
                write!(f, "needs {needs}; {}", ready_now(needs, *ready))?;
                write!(f, "{} {} free on {}", best_of(*ready), best.has, best.node)?;
                if *unhealthy > 0 {
                    write!(f, "; {unhealthy} {} unhealthy", plural(*unhealthy, "GPU is", "GPUs are"))?;
                }
                write_away(f, *away)
            }
            Reason::CoresBusy { needs, ready, best, away } => {
                write!(f, "needs {} cores on each of {needs}; {}", needs.cores, ready_now(needs, *ready))?;
                write!(f, "{} {} cores free on {}", best_of(*ready), best.has, best.node)?;
                write_away(f, *away)
            }
            Reason::MemBusy { needs, ready, best, away } => {
                write!(f, "needs {} MiB on each of {needs}; {}", needs.mem_mib, ready_now(needs, *ready))?;
                write!(f, "{} {} MiB free on {}", best_of(*ready), best.has, best.node)?;
                write_away(f, *away)
            }
            Reason::LeasesFull { needs, limit } => {
                write!(f, "needs {needs}; the machines with room hold {limit} leases, the limit of a machine")
            }
            Reason::Bandwidth { needs, ready, best, wanted_mbps } => {
                write!(f, "needs {needs} at {} or more; {}", gbps(*wanted_mbps), ready_now(needs, *ready))?;
                write!(f, "{} {} among the free GPUs of {}", best_of(*ready), speed(best), best.node)
            }
            Reason::Topology { needs, rooms, more, away } => {
                let rooms: Vec<String> = rooms.iter().map(|(domain, ready)| format!("{domain} has {ready}")).collect();
                write!(
                    f,
                    "needs {needs}; {} now",
                    if rooms.is_empty() { "none has any".into() } else { rooms.join(", ") }
                )?;
                if *more > 0 {
                    write!(f, ", {more} more not as many")?;
                }
                write_away(f, *away)
            }
            Reason::Reserved { needs, job, starts_in_ms, fits_ms } => {
                write!(f, "needs {needs}; what is free is kept for job {job}, ")?;
                match starts_in_ms {
                    Some(ms) => write!(f, "which starts in {} at the latest", seconds(*ms))?,
                    None => f.write_str("which waits for jobs without a time limit")?,
                }
                write_fits(f, *fits_ms)
            }
            Reason::SetAside { needs, name, maintenance, starts_in_ms, ends_in_ms, fits_ms } => {
                let what = if *maintenance { "maintenance" } else { "reservation" };
                write!(f, "needs {needs}; what is free is kept for {what} {name}, which ")?;
                if *starts_in_ms > 0 {
                    write!(f, "begins in {} and ", seconds(*starts_in_ms))?;
                }
                write!(f, "ends in {}", seconds(*ends_in_ms))?;
                write_fits(f, *fits_ms)
            }
            Reason::ReservationAhead { name, in_ms } => write!(f, "reservation {name} begins in {}", seconds(*in_ms)),
            Reason::ReservationGone { name } => write!(f, "reservation {name} has ended or was deleted"),
            Reason::Preempting { needs, victims: 0 } => write!(f, "needs {needs}; it is kept for it"),
            Reason::Preempting { needs, victims } => {
                write!(f, "needs {needs}; {victims} {} to make room for it", plural(*victims, "job ends", "jobs end"))
            }
            Reason::Held { holds } => f.write_str(held(*holds)),
            Reason::Quota { text, .. } => f.write_str(text),
            Reason::Dependency { first: (kind, job), parents } => {
                write!(f, "waits for job {job} ({})", kind.name())?;
                if *parents > 1 { write!(f, " and {} more", parents - 1) } else { Ok(()) }
            }
            Reason::BeginTime { in_ms } => write!(f, "begins in {}", seconds(*in_ms)),
            Reason::Backoff { attempt, in_ms } => {
                write!(f, "attempt {attempt} may start in {}", seconds(*in_ms))
            }
            Reason::ArrayLimit { open, limit } => {
                write!(f, "{open} of its tasks have started and not ended, at most {limit} may at a time")
            }
            Reason::Soon => f.write_str("fits; its turn comes next"),
        }
    }
}

/// The time limit with which it would end before what is kept begins.
fn write_fits(f: &mut fmt::Formatter<'_>, fits_ms: Option<u64>) -> fmt::Result {
    let fits = |ms: u64| write!(f, "; with a time limit of {} s or less it would fit before", ms / 1_000);
    fits_ms.filter(|ms| *ms >= 1_000).map_or(Ok(()), fits)
}

/// The hold that somebody can end first.
fn held(holds: Holds) -> &'static str {
    if holds.user {
        "on hold until it is released"
    } else if holds.launch {
        "on hold: 20 attempts in a row failed by no fault of the job; see its attempts, then release it"
    } else if holds.restore {
        "on hold: the cluster was restored from a backup, and a machine may still run an attempt that it does not know"
    } else {
        "on hold: a machine still runs an earlier attempt of it without a lease, and is ending it"
    }
}

fn no_such_type(f: &mut fmt::Formatter<'_>, wanted: &[String], present: &[String]) -> fmt::Result {
    match (wanted, present) {
        (_, []) => f.write_str("needs GPUs; no machine has any"),
        ([], present) => {
            write!(f, "needs whole GPUs; the cluster has slices, {}: --gpu-type takes one", present.join(", "))
        }
        (wanted, present) => {
            write!(f, "needs {} GPUs; the cluster has {}", wanted.join(" or "), present.join(", "))
        }
    }
}

fn never(f: &mut fmt::Formatter<'_>, needs: &Needs, lack: &Lack) -> fmt::Result {
    let largest = "no machine could ever run it; the largest,";
    match lack {
        Lack::Gpus(best) => write!(f, "needs {needs}; {largest} {}, has {}", best.node, best.has),
        Lack::Cores(best) => {
            write!(f, "needs {} cores on each of {needs}; {largest} {}, has {}", needs.cores, best.node, best.has)
        }
        Lack::Memory(best) => {
            write!(f, "needs {} MiB on each of {needs}; {largest} {}, has {} MiB", needs.mem_mib, best.node, best.has)
        }
        Lack::Bandwidth(best) => {
            write!(
                f,
                "needs {needs}; no machine links them fast enough, the best, {}, reaches {}",
                best.node,
                speed(best)
            )
        }
        Lack::Domain { domain, able } => {
            let level = needs.within.map_or("", Level::name);
            match domain.as_str() {
                "" => write!(f, "needs {needs}; no such machine names its {level}: ares agent --label {level}=NAME"),
                domain => write!(f, "needs {needs}; the largest, {domain}, has {able}, in service or not"),
            }
        }
        Lack::Cut(nearest) => write!(f, "needs {needs}; no machines could ever hold it so, {nearest}"),
        Lack::Machines { able } => write!(f, "needs {needs}; the cluster has {able} such, in service or not"),
    }
}

impl fmt::Display for Needs {
    /// "8 h100 on one machine", "2 machines with 8 h100 each in one rack among 4 of 20 machines", "one machine".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gpus = match self.types.as_slice() {
            [] => format!("{} {}", self.gpus, plural(self.gpus, "GPU", "GPUs")),
            types => format!("{} {}", self.gpus, types.join(" or ")),
        };
        match (self.machines, self.gpus) {
            (1, 0) => f.write_str("one machine"),
            (1, _) => write!(f, "{gpus} on one machine"),
            (0, _) => write!(f, "{gpus} in equal parts"),
            (machines, 0) => write!(f, "{machines} machines"),
            (machines, _) => write!(f, "{machines} machines with {gpus} each"),
        }?;
        self.within.map_or(Ok(()), |level| write!(f, " in one {}", level.name()))?;
        self.allowed.map_or(Ok(()), |(allowed, all)| write!(f, " among {allowed} of {all} machines"))
    }
}

/// For a gang that finds some of its machines: how many.
fn ready_now(needs: &Needs, ready: u32) -> String {
    if needs.machines == 1 {
        String::new()
    } else {
        format!("{ready} {} now, ", plural(ready, "machine has room", "machines have room"))
    }
}

fn best_of(ready: u32) -> &'static str {
    if ready == 0 { "best has" } else { "best of the others has" }
}

fn write_away(f: &mut fmt::Formatter<'_>, away: u32) -> fmt::Result {
    if away == 0 { Ok(()) } else { write!(f, "; {away} {} out or silent", plural(away, "machine", "machines")) }
}

fn speed(best: &Best) -> String {
    gbps(u32::try_from(best.has).unwrap_or(u32::MAX))
}

fn seconds(ms: u64) -> String {
    format!("{} s", ms.div_ceil(1_000))
}

fn plural(count: u32, one: &'static str, more: &'static str) -> &'static str {
    if count == 1 { one } else { more }
}
