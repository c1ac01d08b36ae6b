//! The one place where a task's state changes, as a pure function. What surrounds a change (leases, results, queues,
//! events) is done by the callers.

use crate::id::Token;
use crate::record::{Phase, TaskOutcome, VerdictKind};

/// What happens to a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// A plan placed it.
    Grant { token: Token },
    /// A cancel or a deadline, of a task without a lease.
    Cancel,
    /// A job that it needed did not end as needed.
    Skip,
    /// The wait before its next attempt is over.
    BackoffOver,
    /// The last part of its lease was released.
    Close { verdict: VerdictKind, facts: CloseFacts },
}

/// What decides the way of a task whose lease closes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CloseFacts {
    /// A cancel was accepted: it never overrides a result, it replaces a way back to the queue.
    pub stop: bool,
    /// The job wants this exit retried, and a retry is left.
    pub retry_left: bool,
    /// Excused attempts reached their cap with this one.
    pub excused_out: bool,
    /// When a next attempt may start, in cluster time.
    pub not_before_ms: u64,
}

/// Which counter of `Used` an attempt is charged to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Burn {
    Retry,
    Lost,
    Launch,
    GpuFault,
    Preempted,
    Timeout,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Next {
    pub phase: Phase,
    pub burns: Option<Burn>,
    /// Put the job on hold: its excused attempts are used up.
    pub hold: bool,
}

/// The task's next phase; `None` where nothing of the kind may happen to a task in this phase.
pub(crate) fn next(from: &Phase, by: By) -> Option<Next> {
    use TaskOutcome::*;
    let to = |phase, burns| Some(Next { phase, burns, hold: false });
    let end = |outcome, burns| to(Phase::Ended { outcome }, burns);
    match (from, by) {
        (Phase::Pending, By::Grant { token }) => to(Phase::Leased { token }, None),
        (Phase::Pending | Phase::Retrying { .. }, By::Cancel) => end(Cancelled, None),
        (Phase::Pending | Phase::Retrying { .. }, By::Skip) => end(Skipped, None),
        (Phase::Retrying { .. }, By::BackoffOver) => to(Phase::Pending, None),
        (Phase::Leased { .. }, By::Close { verdict, facts }) => {
            let again = Phase::Retrying { not_before_ms: facts.not_before_ms };
            match (verdict, facts) {
                (VerdictKind::Succeeded, _) => end(Succeeded, None),
                (VerdictKind::Cancelled, _) => end(Cancelled, None),
                (VerdictKind::TimedOut, _) => end(TimedOut, Some(Burn::Timeout)),
                (VerdictKind::Failed | VerdictKind::LaunchJob, CloseFacts { retry_left: false, .. }) => {
                    end(Failed, None)
                }
                (_, CloseFacts { stop: true, .. }) => end(Cancelled, None),
                (VerdictKind::Failed | VerdictKind::LaunchJob, _) => to(again, Some(Burn::Retry)),
                (VerdictKind::Preempted, _) => to(Phase::Pending, Some(Burn::Preempted)),
                (VerdictKind::Lost | VerdictKind::LaunchNode | VerdictKind::GpuFault, facts) => {
                    let burns = match verdict {
                        VerdictKind::Lost => Burn::Lost,
                        VerdictKind::GpuFault => Burn::GpuFault,
                        _ => Burn::Launch,
                    };
                    let phase = if facts.excused_out { Phase::Pending } else { again };
                    Some(Next { phase, burns: Some(burns), hold: facts.excused_out })
                }
            }
        }
        (Phase::Pending, By::BackoffOver | By::Close { .. })
        | (Phase::Retrying { .. }, By::Grant { .. } | By::Close { .. })
        | (Phase::Leased { .. }, By::Grant { .. } | By::Cancel | By::Skip | By::BackoffOver)
        | (Phase::Ended { .. }, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FACTS: CloseFacts = CloseFacts { stop: false, retry_left: true, excused_out: false, not_before_ms: 7 };
    const AGAIN: Phase = Phase::Retrying { not_before_ms: 7 };

    fn close(verdict: VerdictKind, facts: CloseFacts) -> (Phase, Option<Burn>, bool) {
        let leased = Phase::Leased { token: Token(1) };
        let next = next(&leased, By::Close { verdict, facts }).expect("a lease may always close");
        (next.phase, next.burns, next.hold)
    }

    fn end(outcome: TaskOutcome) -> Phase {
        Phase::Ended { outcome }
    }

    #[test]
    fn nothing_happens_to_a_task_that_has_ended() {
        let ended = end(TaskOutcome::Failed);
        let close = By::Close { verdict: VerdictKind::Succeeded, facts: FACTS };
        for by in [By::Grant { token: Token(2) }, By::Cancel, By::Skip, By::BackoffOver, close] {
            assert_eq!(next(&ended, by), None);
        }
    }

    #[test]
    fn each_verdict_has_its_way_and_its_price() {
        use VerdictKind::*;
        assert_eq!(close(Succeeded, FACTS), (end(TaskOutcome::Succeeded), None, false));
        assert_eq!(close(Cancelled, FACTS), (end(TaskOutcome::Cancelled), None, false));
        assert_eq!(close(TimedOut, FACTS), (end(TaskOutcome::TimedOut), Some(Burn::Timeout), false));
        assert_eq!(close(Failed, FACTS), (AGAIN, Some(Burn::Retry), false));
        assert_eq!(close(LaunchJob, FACTS), (AGAIN, Some(Burn::Retry), false));
        assert_eq!(close(LaunchNode, FACTS), (AGAIN, Some(Burn::Launch), false));
        assert_eq!(close(GpuFault, FACTS), (AGAIN, Some(Burn::GpuFault), false));
        assert_eq!(close(Lost, FACTS), (AGAIN, Some(Burn::Lost), false));
        assert_eq!(close(Preempted, FACTS), (Phase::Pending, Some(Burn::Preempted), false));
    }

    #[test]
    fn a_stop_overrides_no_result_but_every_way_back() {
        use VerdictKind::*;
        let stop = CloseFacts { stop: true, ..FACTS };
        for verdict in [Failed, LaunchJob, LaunchNode, GpuFault, Lost, Preempted] {
            assert_eq!(close(verdict, stop).0, end(TaskOutcome::Cancelled), "{verdict:?}");
        }
        assert_eq!(close(Succeeded, stop).0, end(TaskOutcome::Succeeded));
        assert_eq!(close(TimedOut, stop).0, end(TaskOutcome::TimedOut));
        assert_eq!(close(Failed, CloseFacts { retry_left: false, ..stop }).0, end(TaskOutcome::Failed));
    }

    #[test]
    fn used_up_excuses_hold_the_job_and_failures_do_not() {
        let out = CloseFacts { excused_out: true, ..FACTS };
        assert_eq!(close(VerdictKind::Lost, out), (Phase::Pending, Some(Burn::Lost), true));
        assert_eq!(close(VerdictKind::Failed, out), (AGAIN, Some(Burn::Retry), false));
    }
}
