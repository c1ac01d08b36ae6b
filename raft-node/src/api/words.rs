//! The words of the wire for the state machine's enums and ids, each in one place.

use statemachine::GpuUuid;
use statemachine::record::{ExitCause, Gpu, KillStrength, PartState, PciClass, TaskOutcome};
use statemachine::spec::AfterKind;
use statemachine::view::ShownState;

pub fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// 32 hex digits, dashes ignored.
pub fn unhex16(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let mut out = [0; 16];
    if digits.len() != 32 {
        return None;
    }
    for (byte, pair) in out.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(out)
}

/// `GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx`, or `MIG-` for a slice, as NVML writes it and CUDA reads it.
pub fn gpu_uuid(gpu: &Gpu) -> String {
    let kind = if gpu.gpu_type.is_slice() { "MIG-" } else { "GPU-" };
    let mut digits = uuid::Uuid::encode_buffer();
    kind.to_owned() + uuid::Uuid::from_bytes(gpu.uuid.0).hyphenated().encode_lower(&mut digits)
}

pub fn parse_gpu_uuid(text: &str) -> Option<GpuUuid> {
    unhex16(text.strip_prefix("GPU-").or_else(|| text.strip_prefix("MIG-"))?).map(GpuUuid)
}

/// A two-way table between an enum and its words.
macro_rules! words {
    ($($(#[$doc:meta])* $to:ident, $from:ident: $ty:ident { $($variant:ident = $word:literal),* $(,)? })*) => {
        $($(#[$doc])*
        pub fn $to(value: $ty) -> &'static str {
            match value { $($ty::$variant => $word),* }
        }

        pub fn $from(word: &str) -> Option<$ty> {
            match word { $($word => Some($ty::$variant),)* _ => None }
        })*
    };
}

words! {
    after, parse_after: AfterKind {
        Ok = "afterok", Any = "afterany", NotOk = "afternotok", Corr = "aftercorr",
    }
    kill, parse_kill: KillStrength { PidNamespace = "pidns", Cgroup = "cgroup", Weak = "weak" }
    cause, parse_cause: ExitCause {
        Own = "OWN", Stopped = "STOPPED", TimeLimit = "TIME_LIMIT", LeaseEnd = "LEASE_END", GpuFault = "GPU_FAULT",
    }
}

/// An ended task's state, as the keyspace shows it too.
pub fn outcome(value: TaskOutcome) -> &'static str {
    ShownState::from(value).name()
}

pub fn part_state(state: PartState) -> &'static str {
    match state {
        PartState::Held => "HELD",
        PartState::Prepared { .. } => "PREPARED",
        PartState::Started => "STARTED",
        PartState::Exited => "EXITED",
        PartState::Released => "RELEASED",
        PartState::Stuck => "STUCK",
    }
}

pub fn pci_class(class: PciClass) -> proto::v1::PciClass {
    match class {
        PciClass::Same => proto::v1::PciClass::Same,
        PciClass::Pix => proto::v1::PciClass::Pix,
        PciClass::Pxb => proto::v1::PciClass::Pxb,
        PciClass::Phb => proto::v1::PciClass::Phb,
        PciClass::Node => proto::v1::PciClass::Node,
        PciClass::Sys => proto::v1::PciClass::Sys,
    }
}

pub fn parse_pci_class(number: i32) -> Option<PciClass> {
    Some(match proto::v1::PciClass::try_from(number).ok()? {
        proto::v1::PciClass::Same => PciClass::Same,
        proto::v1::PciClass::Pix => PciClass::Pix,
        proto::v1::PciClass::Pxb => PciClass::Pxb,
        proto::v1::PciClass::Phb => PciClass::Phb,
        proto::v1::PciClass::Node => PciClass::Node,
        proto::v1::PciClass::Sys => PciClass::Sys,
    })
}

#[cfg(test)]
mod tests {
    use statemachine::GpuTypeId;
    use statemachine::record::GpuHealth;

    use super::*;

    #[test]
    fn a_gpu_uuid_reads_back() {
        let uuid = GpuUuid([0x12, 0x34, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0xff]);
        for (slice, prefix) in [(false, "GPU-"), (true, "MIG-")] {
            let gpu = Gpu {
                uuid,
                gpu_type: GpuTypeId(u16::from(slice) << 15),
                mem_mib: 1,
                numa: 0,
                health: GpuHealth::Ok,
                reason: String::new(),
                xid: 0,
            };
            let text = gpu_uuid(&gpu);
            assert!(text.starts_with(prefix) && parse_gpu_uuid(&text) == Some(uuid), "{text}");
        }
        assert_eq!(parse_gpu_uuid("GPU-123"), None);
    }
}
