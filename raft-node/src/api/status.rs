//! From refusals to gRPC statuses: one place that knows which reason says what.

use std::time::Duration;

use proto::error;
use proto::reason::{self, Reason};
use statemachine::Rejection;
use tonic::Status;

use super::Api;
use crate::door::ProposeError;
use crate::members::MemberError;
use crate::read::ReadError;

/// When a client may come again after a full disk or a stopped quorum.
const SOON: Duration = Duration::from_millis(500);

/// A state machine's refusal in the wire's form. Its code's name is in the frozen list; a test holds that.
pub fn rejected(rejection: &Rejection) -> Status {
    let reason: Reason = reason::find(rejection.code.name()).copied().unwrap_or(reason::INVALID_ARGUMENT);
    error::refusal(reason, rejection.detail.clone())
}

/// A command that has no outcome.
pub fn not_proposed(api: &Api, error: ProposeError) -> Status {
    let text = error.to_string();
    match error {
        ProposeError::NotLeader(_) => error::not_leader(api.leader_addr().as_deref()),
        ProposeError::Busy { retry_ms } => error::retry_later(reason::BUSY, text, Duration::from_millis(retry_ms)),
        ProposeError::ImageBehind { retry_ms } => {
            error::retry_later(reason::IMAGE_BEHIND, text, Duration::from_millis(retry_ms))
        }
        ProposeError::DiskFull => error::retry_later(reason::DISK_FULL, text, SOON),
        ProposeError::TooLarge { .. } => error::refusal(reason::TOO_LARGE, text),
        ProposeError::Unknown => error::refusal(reason::OUTCOME_UNKNOWN, text),
        ProposeError::Stopped => error::refusal(reason::STOPPING, text),
    }
}

/// A read that can't be answered here and now.
pub fn not_read(api: &Api, error: ReadError) -> Status {
    let text = error.to_string();
    match error {
        ReadError::NoLeader => error::not_leader(api.leader_addr().as_deref()),
        ReadError::NoQuorum | ReadError::Behind { .. } => error::refusal(reason::NO_QUORUM, text),
        ReadError::Busy => error::retry_later(reason::BUSY, text, SOON),
        ReadError::Stopped => error::refusal(reason::STOPPING, text),
    }
}

/// A change of the group that was not made.
pub fn membership(api: &Api, error: MemberError) -> Status {
    let text = error.to_string();
    match error {
        MemberError::NotLeader(_) => error::not_leader(api.leader_addr().as_deref()),
        MemberError::Refused(_) => error::refusal(reason::MEMBERSHIP_REFUSED, text),
        MemberError::Unknown => error::refusal(reason::OUTCOME_UNKNOWN, text),
        MemberError::Stopped => error::refusal(reason::STOPPING, text),
    }
}
