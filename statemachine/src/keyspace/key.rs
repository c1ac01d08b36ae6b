//! Names of keys: text to what it names and back. One text names one thing: leading zeros, signs and other spellings
//! name nothing.

use std::fmt;

use crate::event::QueuePlace;
use crate::id::*;

/// What a key names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    Job(JobId),
    State(JobId),
    /// The tenant by name.
    Queue {
        tenant: String,
        priority: i32,
        seq: u64,
        job: JobId,
    },
    Lease(Token),
    JobFence(JobId),
    GpuFence(GpuUuid),
    Node(String),
    Lock(String),
    Result(JobId),
    Retry(JobId),
}

impl Key {
    pub(super) fn queue(tenant: &str, place: &QueuePlace) -> Self {
        Key::Queue { tenant: tenant.into(), priority: place.priority, seq: place.seq, job: place.task.job }
    }

    /// `None` for a text that names nothing.
    pub fn parse(text: &str) -> Option<Self> {
        let (collection, rest) = Collection::ALL.iter().find_map(|collection| {
            let rest = text.strip_prefix(collection.prefix())?;
            Some((*collection, rest))
        })?;
        let job = || number(rest).map(JobId);
        let key = match collection {
            Collection::Jobs => Key::Job(job()?),
            Collection::State => Key::State(job()?),
            Collection::JobFences => Key::JobFence(job()?),
            Collection::Results => Key::Result(job()?),
            Collection::Retry => Key::Retry(job()?),
            Collection::Leases => Key::Lease(Token(number(rest)?)),
            Collection::GpuFences => Key::GpuFence(GpuUuid::parse(rest)?),
            Collection::Topology => Key::Node(rest.into()),
            Collection::Locks => Key::Lock(rest.into()),
            Collection::Queue => {
                let mut parts = rest.rsplitn(4, '/');
                let (job, seq, priority) = (parts.next()?, parts.next()?, parts.next()?);
                Key::Queue {
                    tenant: parts.next()?.into(),
                    priority: priority.parse().ok()?,
                    seq: number(seq)?,
                    job: JobId(number(job)?),
                }
            }
        };
        (key.to_string() == text).then_some(key)
    }

    pub(super) fn collection(&self) -> Collection {
        match self {
            Key::Job(_) => Collection::Jobs,
            Key::State(_) => Collection::State,
            Key::Queue { .. } => Collection::Queue,
            Key::Lease(_) => Collection::Leases,
            Key::JobFence(_) => Collection::JobFences,
            Key::GpuFence(_) => Collection::GpuFences,
            Key::Node(_) => Collection::Topology,
            Key::Lock(_) => Collection::Locks,
            Key::Result(_) => Collection::Results,
            Key::Retry(_) => Collection::Retry,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.collection().prefix())?;
        match self {
            Key::Job(id) | Key::State(id) | Key::JobFence(id) | Key::Result(id) | Key::Retry(id) => id.fmt(f),
            Key::Queue { tenant, priority, seq, job } => write!(f, "{tenant}/{priority}/{seq}/{job}"),
            Key::Lease(token) => token.fmt(f),
            Key::GpuFence(uuid) => uuid.fmt(f),
            Key::Node(name) | Key::Lock(name) => f.write_str(name),
        }
    }
}

fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}

/// The folders of the keyspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Collection {
    GpuFences,
    JobFences,
    Jobs,
    Leases,
    Locks,
    Queue,
    Results,
    Retry,
    State,
    Topology,
}

impl Collection {
    /// In the order in which a range gives them: that of their names.
    pub(super) const ALL: [Collection; 10] = [
        Collection::GpuFences,
        Collection::JobFences,
        Collection::Jobs,
        Collection::Leases,
        Collection::Locks,
        Collection::Queue,
        Collection::Results,
        Collection::Retry,
        Collection::State,
        Collection::Topology,
    ];

    pub(super) fn prefix(self) -> &'static str {
        match self {
            Collection::GpuFences => "/fencing/gpu/",
            Collection::JobFences => "/fencing/job/",
            Collection::Jobs => "/jobs/",
            Collection::Leases => "/leases/",
            Collection::Locks => "/locks/",
            Collection::Queue => "/queue/pending/",
            Collection::Results => "/results/",
            Collection::Retry => "/retry/",
            Collection::State => "/state/",
            Collection::Topology => "/topology/",
        }
    }
}

impl GpuUuid {
    /// The text that NVML writes: `GPU-` and five groups of hex digits. `None` for any other.
    pub fn parse(text: &str) -> Option<Self> {
        let hex: Vec<u8> = text.strip_prefix("GPU-")?.bytes().filter(|byte| *byte != b'-').collect();
        if hex.len() != 32 || !hex.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let raw = u128::from_str_radix(std::str::from_utf8(&hex).ok()?, 16).ok()?;
        Some(Self(raw.to_be_bytes()))
    }
}

impl fmt::Display for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 0 | 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// The numbers whose decimal text begins with `digits`, as inclusive ranges in rising order.
pub(super) fn numbers_with_prefix(digits: &str) -> Vec<(u64, u64)> {
    if digits.is_empty() {
        return vec![(0, u64::MAX)];
    }
    let Ok(first) = digits.parse::<u64>() else { return Vec::new() };
    if first.to_string() != digits {
        return Vec::new();
    }
    if first == 0 {
        return vec![(0, 0)];
    }
    let (mut ranges, mut low, mut width) = (Vec::new(), first, 1u64);
    loop {
        ranges.push((low, low.saturating_add(width - 1)));
        let (Some(next), Some(wider)) = (low.checked_mul(10), width.checked_mul(10)) else { return ranges };
        (low, width) = (next, wider);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_reads_as_it_was_written() {
        for text in [
            "/jobs/1",
            "/state/18446744073709551615",
            "/queue/pending/team/a/-5/17/3",
            "/leases/9",
            "/fencing/job/4",
            "/fencing/gpu/GPU-01020304-0506-0708-090a-0b0c0d0e0f10",
            "/topology/n1",
            "/locks/a/b",
            "/results/1",
            "/retry/1",
        ] {
            assert_eq!(Key::parse(text).map(|key| key.to_string()).as_deref(), Some(text));
        }
        for text in
            ["/jobs/", "/jobs/01", "/jobs/+1", "/jobs/x", "/user/a", "", "/queue/pending/1/2", "/fencing/gpu/GPU-1"]
        {
            assert_eq!(Key::parse(text), None, "{text}");
        }
    }

    #[test]
    fn numbers_with_a_prefix_are_found_in_rising_order() {
        assert_eq!(numbers_with_prefix("12")[..3], [(12, 12), (120, 129), (1_200, 1_299)]);
        assert_eq!(numbers_with_prefix("0"), [(0, 0)]);
        assert_eq!(numbers_with_prefix("012"), []);
        assert_eq!(numbers_with_prefix("9").last(), Some(&(9_000_000_000_000_000_000, 9_999_999_999_999_999_999)));
        assert_eq!(numbers_with_prefix("2").last(), Some(&(2_000_000_000_000_000_000, 2_999_999_999_999_999_999)));
        assert_eq!(numbers_with_prefix("1").last(), Some(&(10_000_000_000_000_000_000, u64::MAX)));
    }
}
