//! What the driver says of GPUs, as facts for the leader. The judgement of an error number is discovery's table; here it
//! becomes the state of a GPU, and whether its jobs are requeued. Pure.

use proto::v1;

use crate::discovery::xid::Action;
use crate::discovery::{Fault, HealthEvent};

/// Facts that follow from one event; none for what concerns the program alone. `gpus`: the machine's, by slot; a fault
/// of the whole machine takes its other GPUs out of scheduling as well.
pub fn facts(event: &HealthEvent, gpus: &[v1::GpuFacts]) -> Vec<v1::GpuHealthFact> {
    let actions = event.judgement.actions;
    let any = |wanted: &[Action]| wanted.iter().any(|action| actions.contains(*action));
    let (xid, lost) = match event.what {
        Fault::Xid { code, .. } => (code, false),
        Fault::Lost => (0, true),
    };
    let machine = any(&[Action::DrainNode, Action::RebootNode]);
    let health = if lost {
        "GONE"
    } else if machine || any(&[Action::DrainGpu, Action::ResetGpu, Action::Human]) {
        "QUARANTINED"
    } else if any(&[Action::DrainGpuWhenIdle, Action::ResetGpuWhenIdle]) {
        "DRAIN_WHEN_IDLE"
    } else {
        "OK"
    };
    let end_lease = any(&[Action::Requeue, Action::RequeueAll]);
    if health == "OK" && !end_lease {
        return Vec::new();
    }
    let reason = match xid {
        0 => event.judgement.meaning.to_owned(),
        xid => format!("XID {xid}: {}", event.judgement.meaning),
    };
    let mut facts = vec![v1::GpuHealthFact {
        slot: event.slot,
        gpu_uuid: event.gpu_uuid.clone(),
        health: health.into(),
        xid,
        reason: reason.clone(),
        end_lease,
    }];
    if machine {
        let others = gpus.iter().enumerate().filter(|(_, gpu)| gpu.uuid != event.gpu_uuid && gpu.health == "OK");
        facts.extend(others.map(|(slot, gpu)| v1::GpuHealthFact {
            slot: slot as u32,
            gpu_uuid: gpu.uuid.clone(),
            health: "QUARANTINED".into(),
            xid: 0,
            reason: format!("the machine needs a reboot: {} has {reason}", event.gpu_uuid),
            end_lease: false,
        }));
    }
    facts
}

/// The machine's record after it: a later registration must not call a sick GPU healthy.
pub fn remember(gpus: &mut [v1::GpuFacts], facts: &[v1::GpuHealthFact]) {
    for fact in facts {
        if let Some(gpu) = gpus.iter_mut().find(|gpu| gpu.uuid == fact.gpu_uuid) {
            gpu.health.clone_from(&fact.health);
            gpu.reason.clone_from(&fact.reason);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::xid;

    fn gpus() -> Vec<v1::GpuFacts> {
        let gpu = |uuid: &str| v1::GpuFacts { uuid: uuid.into(), health: "OK".into(), ..Default::default() };
        vec![gpu("GPU-a"), gpu("GPU-b")]
    }

    fn of(what: Fault, judgement: xid::Judgement) -> Vec<v1::GpuHealthFact> {
        facts(&HealthEvent { gpu_uuid: "GPU-b".into(), slot: 1, what, judgement }, &gpus())
    }

    fn xid_of(code: u32) -> Vec<v1::GpuHealthFact> {
        of(Fault::Xid { code, pid: None }, xid::judge(code))
    }

    #[test]
    fn a_programs_own_error_says_nothing_of_its_gpu() {
        assert_eq!(xid_of(31), vec![]);
        assert_eq!(xid_of(43), vec![]);
    }

    #[test]
    fn a_double_bit_error_quarantines_the_gpu_and_requeues_its_job() {
        let facts = xid_of(48);
        assert_eq!(facts.len(), 1);
        assert_eq!((facts[0].health.as_str(), facts[0].end_lease, facts[0].xid), ("QUARANTINED", true, 48));
    }

    #[test]
    fn a_lost_gpu_takes_its_machine_out() {
        let facts = of(Fault::Lost, xid::LOST);
        assert_eq!((facts[0].health.as_str(), facts[0].end_lease), ("GONE", true));
        assert_eq!((facts[1].gpu_uuid.as_str(), facts[1].health.as_str()), ("GPU-a", "QUARANTINED"));
        assert!(!facts[1].end_lease, "its jobs may end by themselves");
        let mut record = gpus();
        remember(&mut record, &facts);
        assert_eq!((record[0].health.as_str(), record[1].health.as_str()), ("QUARANTINED", "GONE"));
    }
}
