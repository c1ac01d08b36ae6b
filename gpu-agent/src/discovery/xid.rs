//! XIDs, the error numbers of NVIDIA's driver, and what follows from one of them.
//!
//! A pure table after NVIDIA's catalog (docs.nvidia.com/deploy/xid-errors). It judges one event by itself; what depends on history (the
//! third job in a day, a reboot that did not help) is decided where the history is.

use serde::{Serialize, Serializer};

/// One thing that follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The job fails as its own fault.
    FailJob,
    /// The job on the GPU is requeued without penalty.
    Requeue,
    /// Every job with a part on the GPU is requeued without penalty.
    RequeueAll,
    /// No new job on this GPU.
    DrainGpu,
    /// No new job on this GPU once it is idle.
    DrainGpuWhenIdle,
    /// Reset the GPU after its jobs end.
    ResetGpu,
    /// Reset the GPU when it is idle next.
    ResetGpuWhenIdle,
    /// No new job on the machine.
    DrainNode,
    RebootNode,
    /// A person must look, or replace the part.
    Human,
    /// Do what the driver's recovery-action field says.
    AskDriver,
}

/// A set of actions, small and ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Actions(u16);

const ALL: [Action; 11] = [
    Action::FailJob,
    Action::Requeue,
    Action::RequeueAll,
    Action::DrainGpu,
    Action::DrainGpuWhenIdle,
    Action::ResetGpu,
    Action::ResetGpuWhenIdle,
    Action::DrainNode,
    Action::RebootNode,
    Action::Human,
    Action::AskDriver,
];

impl Actions {
    pub const NONE: Actions = Actions(0);

    pub fn of(actions: &[Action]) -> Actions {
        Actions(actions.iter().fold(0, |bits, action| bits | 1 << *action as u16))
    }

    pub fn contains(self, action: Action) -> bool {
        self.0 & 1 << action as u16 != 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn iter(self) -> impl Iterator<Item = Action> {
        ALL.into_iter().filter(move |action| self.contains(*action))
    }
}

impl Serialize for Actions {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

/// What an XID means and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Judgement {
    pub meaning: &'static str,
    pub actions: Actions,
}

/// A GPU that answers no call or left the enumeration: as XID 79, without waiting for it.
pub const LOST: Judgement = Judgement { meaning: "GPU lost", actions: GONE };

const GONE: Actions =
    Actions(1 << Action::RequeueAll as u16 | 1 << Action::DrainNode as u16 | 1 << Action::RebootNode as u16);

/// The judgement of one XID. Unknown numbers mean nothing by themselves: they are for the log.
pub fn judge(xid: u32) -> Judgement {
    use Action::{
        AskDriver, DrainGpu, DrainGpuWhenIdle, DrainNode, FailJob, Human, Requeue, RequeueAll, ResetGpu,
        ResetGpuWhenIdle,
    };
    let (meaning, actions): (&'static str, &[Action]) = match xid {
        11 | 13 | 25 | 31 | 32 | 69 | 80 => ("engine exception or bad address of the program", &[FailJob]),
        43 | 45 => ("channel stopped or cleaned up after another error", &[]),
        109 => ("context switch timeout", &[Requeue, ResetGpu]),
        8 | 39..=41 | 60 | 68 | 70..=72 | 75..=77 | 82..=86 | 88 | 89 | 96..=105 | 126..=135 | 139 => {
            ("copy, video or engine error", &[Requeue])
        }
        14 | 37 | 38 | 44 | 66 | 67 | 93 | 106..=108 | 137 | 141 | 152 | 153 => ("note of driver or firmware", &[]),
        46 | 62 | 110 | 136 | 140 | 143 | 158 => ("GPU or its firmware halted", &[Requeue, DrainGpu, ResetGpu]),
        48 => ("double-bit memory error", &[Requeue, DrainGpu, ResetGpu]),
        63 => ("memory row remap or page retirement recorded", &[ResetGpuWhenIdle]),
        64 => ("memory row remap or page retirement failed", &[Requeue, DrainGpu, ResetGpu]),
        92 => ("high rate of corrected memory errors", &[DrainGpuWhenIdle]),
        94 => ("contained memory error", &[Requeue, ResetGpuWhenIdle]),
        95 => ("uncontained memory error", &[RequeueAll, DrainGpu, ResetGpu]),
        74 | 144..=150 | 155 => ("NVLink error", &[RequeueAll, DrainGpu, ResetGpu]),
        119 | 120 => ("GPU system processor does not answer", &[Requeue, DrainGpu, ResetGpu]),
        79 => return Judgement { meaning: "GPU fell off the bus", actions: GONE },
        54 => ("auxiliary power not connected", &[DrainNode, Human]),
        121 => ("chip-to-chip link error corrected", &[]),
        151 | 159 | 167 | 168 => ("key, interconnect, PCIe or memory fault", &[DrainNode, Human]),
        78 | 142 | 162..=166 | 169 | 170 => ("note of a virtual GPU or a newer unit", &[]),
        154 => ("recovery action changed", &[AskDriver]),
        156 | 160 => ("resource or channel retired", &[ResetGpuWhenIdle]),
        157 | 161 => ("resource or channel retirement failed", &[DrainGpu, Human]),
        _ => ("unknown", &[]),
    };
    Judgement { meaning, actions: Actions::of(actions) }
}

#[cfg(test)]
mod tests {
    use super::{Action, Actions, judge};

    #[test]
    fn a_gpu_off_the_bus_takes_the_machine_out() {
        let actions = judge(79).actions;
        assert_eq!(actions.iter().collect::<Vec<_>>(), [Action::RequeueAll, Action::DrainNode, Action::RebootNode]);
        assert_eq!(serde_json::to_string(&actions).unwrap(), r#"["requeue_all","drain_node","reboot_node"]"#);
    }

    #[test]
    fn a_programs_own_fault_never_touches_the_gpu() {
        for xid in [11, 13, 25, 31, 32, 69, 80] {
            assert_eq!(judge(xid).actions, Actions::of(&[Action::FailJob]), "{xid}");
        }
    }

    /// No number fails a job and excuses it at once, and a drained GPU is reset, or a person is called.
    #[test]
    fn every_number_has_one_consistent_judgement() {
        for xid in 0..=300 {
            let actions = judge(xid).actions;
            let excused = actions.contains(Action::Requeue) || actions.contains(Action::RequeueAll);
            assert!(!(actions.contains(Action::FailJob) && excused), "{xid}");
            if actions.contains(Action::DrainGpu) {
                assert!(actions.contains(Action::ResetGpu) || actions.contains(Action::Human), "{xid}");
            }
            assert_eq!(actions.is_empty(), actions.iter().next().is_none());
        }
        assert!(judge(9_999).actions.is_empty());
        assert_eq!(judge(95).actions, Actions::of(&[Action::RequeueAll, Action::DrainGpu, Action::ResetGpu]));
        assert_eq!(judge(63).actions, Actions::of(&[Action::ResetGpuWhenIdle]));
    }
}
