//! The identities of the model: what names a record, and nothing about what the record holds.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(/// A job, minted by apply from a counter that starts at 1; below 2^48, the high bits are reserved for federation.
    JobId(u64));
id!(/// A tenant; 0 is the default tenant.
    TenantId(u32));
id!(/// An interned user name.
    UserId(u32));
id!(/// A queue; 0 is the default queue.
    QueueId(u16));
id!(/// A GPU machine, interned by its name and never reused.
    NodeId(u32));
id!(/// A machine class: the link facts that equal machines share.
    ClassId(u32));
id!(/// An interned GPU type slug such as `h100`.
    GpuTypeId(u16));
id!(/// A client session, the owner of locks.
    SessionId(u64));
id!(/// A window of wall time in which machines are set aside; never reused.
    ReservationId(u64));
id!(/// One per command that changed the keyspace; grows by one.
    Revision(u64));

impl GpuTypeId {
    /// The highest bit: types of slices of GPUs. So nobody needs the name to tell.
    const SLICE: u16 = 1 << 15;
    /// Types of each of the two kinds that ids can name.
    pub(crate) const MOST: u16 = Self::SLICE - 1;

    /// The next type of this name.
    pub(crate) fn named(name: &str, next: u16) -> Self {
        Self(if is_slice_name(name) { next | Self::SLICE } else { next })
    }

    /// Of slices (MIG instances), which a job gets that names their type, one for each rank.
    pub fn is_slice(self) -> bool {
        self.0 & Self::SLICE != 0
    }
}

/// The name of a type of slices ends with NVIDIA's name of a MIG profile: `h100-1g.10gb`, `a100-1g.5gb.me` for one with media engines,
/// `a100-1c.3g.20gb` for a part of its compute slices.
pub fn is_slice_name(name: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((_, profile)) = name.rsplit_once('-') else { return false };
    let part = profile.split_once("c.").filter(|(compute, _)| number(compute));
    let mut parts = part.map_or(profile, |(_, whole)| whole).splitn(3, '.');
    let compute = parts.next().and_then(|part| part.strip_suffix('g'));
    let memory = parts.next().and_then(|part| part.strip_suffix("gb"));
    compute.is_some_and(number) && memory.is_some_and(number)
}

/// A client's name for one mutation; the same id is the same effect. Sixteen bytes, a UUIDv7 from our own clients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RequestId(pub [u8; 16]);

impl RequestId {
    /// The Unix time in milliseconds inside a UUIDv7; `None` for an id of another kind, which carries no time.
    pub fn unix_ms(&self) -> Option<i64> {
        (self.0[6] >> 4 == 7).then(|| self.0[..6].iter().fold(0i64, |ms, byte| ms << 8 | i64::from(*byte)))
    }
}

/// 16 bytes of a NVML UUID, the identity of a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GpuUuid(pub [u8; 16]);

/// The fencing token of one attempt, and the name of its lease: 24 bits of generation (a restore starts a new one),
/// 40 bits of counter. Strictly grows over the cluster's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Token(pub u64);

impl Token {
    const COUNTER_BITS: u32 = 40;

    /// The highest generation.
    pub const GENERATION_MAX: u32 = (1 << 24) - 1;

    /// Where the counter of a generation begins: the token before its first.
    pub fn first_of(generation: u32) -> Self {
        Self(u64::from(generation.min(Self::GENERATION_MAX)) << Self::COUNTER_BITS)
    }

    /// The first 24 bits: which life of the cluster minted it.
    pub fn generation(self) -> u32 {
        (self.0 >> Self::COUNTER_BITS) as u32
    }

    /// The last 40 bits.
    pub fn counter(self) -> u64 {
        self.0 & ((1 << Self::COUNTER_BITS) - 1)
    }

    /// The next token of the same generation; `None` once 2^40 were minted, so that a token is never reused.
    pub fn next(self) -> Option<Self> {
        (self.counter() + 1 < 1 << Self::COUNTER_BITS).then(|| Self(self.0 + 1))
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The unit that waits, is placed, leased and retried. A plain job, and so each task of an array that has started, has exactly
/// index 0; with its index, a task of an array is named that has not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TaskKey {
    pub job: JobId,
    pub index: u32,
}

impl TaskKey {
    /// The one task of a plain job.
    pub fn only(job: JobId) -> Self {
        Self { job, index: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_of_slices_is_told_by_its_name_and_then_by_its_id() {
        for name in
            ["h100-1g.10gb", "a100-7g.40gb", "a100-1g.5gb.me", "gh200-1g.12gb", "h100-nvl-2g.24gb", "a100-1c.3g.20gb"]
        {
            assert!(is_slice_name(name) && GpuTypeId::named(name, 7).is_slice(), "{name}");
        }
        for name in ["h100", "rtx6000-ada", "1g.5gb", "a100-1g", "a100-1g.gb", "a100-xg.5gb", "a100-1g.5gbx", "a100-"] {
            assert!(!is_slice_name(name) && !GpuTypeId::named(name, 7).is_slice(), "{name}");
        }
        assert_ne!(GpuTypeId::named("h100", 7), GpuTypeId::named("h100-1g.10gb", 7));
    }
}
