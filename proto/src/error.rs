//! How a refusal crosses the wire: a gRPC status with google.rpc details, built by servers and read by clients.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

use crate::reason::{self, Reason};

/// `ErrorInfo.domain` of every refusal.
pub const DOMAIN: &str = "ares";
/// Metadata key of NOT_LEADER: the leader's address.
pub const LEADER: &str = "leader";

/// A refusal with the status code that its reason travels with.
pub fn refusal(reason: Reason, message: impl Into<String>) -> Status {
    Status::with_error_details(reason.code, message, details(reason, HashMap::new()))
}

/// NOT_LEADER, with the leader's address where it is known.
pub fn not_leader(leader: Option<&str>) -> Status {
    let message = match leader {
        Some(addr) => format!("this replica is not the leader; the leader is {addr}"),
        None => "this replica is not the leader, and knows of none right now".to_owned(),
    };
    let metadata = leader.map(|addr| (LEADER.to_owned(), addr.to_owned())).into_iter().collect();
    Status::with_error_details(reason::NOT_LEADER.code, message, details(reason::NOT_LEADER, metadata))
}

/// A refusal that says when to try again.
pub fn retry_later(reason: Reason, message: impl Into<String>, after: Duration) -> Status {
    let mut details = details(reason, HashMap::new());
    details.set_retry_info(Some(after));
    Status::with_error_details(reason.code, message, details)
}

/// Field errors named in one refusal, and characters of each: a status travels in headers, which are small.
const FIELDS: usize = 16;
const FIELD_CHARS: usize = 256;

/// All field errors of a request at once: (field, what is wrong with its value and which limit holds). Of very many,
/// or very long ones, the beginning.
pub fn invalid_fields(fields: &[(String, String)]) -> Status {
    let short = |text: &String| text.chars().take(FIELD_CHARS).collect::<String>();
    let mut shown: Vec<(String, String)> =
        fields.iter().take(FIELDS).map(|(field, what)| (short(field), short(what))).collect();
    if fields.len() > FIELDS {
        shown.push(("...".to_owned(), format!("and {} more", fields.len() - FIELDS)));
    }
    let fields = shown.as_slice();
    let mut details = details(reason::INVALID_ARGUMENT, HashMap::new());
    details.set_bad_request(
        fields.iter().map(|(field, what)| FieldViolation::new(field.clone(), what.clone())).collect::<Vec<_>>(),
    );
    let message = fields.iter().map(|(field, what)| format!("{field}: {what}")).collect::<Vec<_>>().join("; ");
    Status::with_error_details(Code::InvalidArgument, message, details)
}

fn details(reason: Reason, metadata: HashMap<String, String>) -> ErrorDetails {
    let mut details = ErrorDetails::new();
    details.set_error_info(reason.name, DOMAIN, metadata);
    details
}

/// What a client can say of a call that did not succeed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// An expected answer: the server decided, and nothing changed.
    #[error("{message}")]
    Refused { reason: String, code: Code, message: String, retry_after: Option<Duration> },
    /// It may have taken effect, or not: repeat it with the same request id to learn.
    #[error("the outcome is unknown: {0}")]
    Unknown(String),
    /// No replica could be asked.
    #[error("no replica answered: {0}")]
    Unreachable(String),
}

impl Error {
    /// The refusal's word; empty for the other kinds.
    pub fn reason(&self) -> &str {
        match self {
            Error::Refused { reason, .. } => reason,
            _ => "",
        }
    }
}

/// A status as the retry logic and people need it.
#[derive(Clone, Debug)]
pub struct Failure {
    pub code: Code,
    pub reason: String,
    pub message: String,
    pub leader: Option<String>,
    pub retry_after: Option<Duration>,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let info = status.get_details_error_info();
        let (reason, leader) = match info {
            Some(info) if info.domain == DOMAIN => (info.reason, info.metadata.get(LEADER).cloned()),
            _ => (String::new(), None),
        };
        Failure {
            code: status.code(),
            reason,
            message: describe(&status),
            leader,
            retry_after: status.get_details_retry_info().and_then(|info| info.retry_delay),
        }
    }
}

/// The status's text; where the transport gave only a label, the deepest cause in its chain as well.
fn describe(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    let mut deepest = None;
    while let Some(error) = source {
        deepest = Some(error.to_string());
        source = error.source();
    }
    if let Some(cause) = deepest.filter(|cause| !text.contains(cause.as_str())) {
        text = format!("{text}: {cause}");
    }
    text
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        if failure.reason.is_empty()
            && matches!(failure.code, Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled)
        {
            return Error::Unreachable(failure.message);
        }
        if failure.code == Code::DeadlineExceeded || failure.reason == reason::OUTCOME_UNKNOWN.name {
            return Error::Unknown(failure.message);
        }
        Error::Refused {
            reason: failure.reason,
            code: failure.code,
            message: failure.message,
            retry_after: failure.retry_after,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_of_very_much_stays_small() {
        let fields: Vec<_> = (0..10_000).map(|at| (format!("field {at}"), "x".repeat(200_000))).take(40).collect();
        let status = invalid_fields(&fields);
        assert!(status.message().len() < 8_192, "{}", status.message().len());
        assert!(status.message().ends_with("...: and 24 more"));
    }
}
