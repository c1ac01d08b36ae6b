//! Exit codes and error texts: one paragraph that says what happened and what to do.
//!
//! 0 ok, 1 failure, 2 usage, 3 not found, 4 not allowed, 5 conflict, 6 unavailable, 7 timed out; `run`, `wait` and
//! `dev --` pass on the job's own code, 128 + signal when it was killed, 75 when the infrastructure lost it for good, 124
//! when its time was over and it left no code; 130 on Ctrl-C, 143 on SIGTERM. `ares help exit-codes` tells people.

use std::process::ExitCode;

use proto::{Error, reason};

pub const FAILURE: u8 = 1;
pub const USAGE: u8 = 2;
pub const NOT_FOUND: u8 = 3;
pub const NOT_ALLOWED: u8 = 4;
pub const CONFLICT: u8 = 5;
pub const UNAVAILABLE: u8 = 6;
pub const TIMED_OUT: u8 = 7;
/// The job is lost for good by no fault of its own.
pub const LOST: u8 = 75;
/// The time limit ended the job, which left no code of its own; as timeout(1).
pub const OUT_OF_TIME: u8 = 124;
pub const INTERRUPTED: u8 = 130;
pub const TERMINATED: u8 = 143;

/// Why a command did not succeed, for a person.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    /// The stable word, where the server gave one.
    pub reason: String,
    pub message: String,
    pub advice: String,
}

pub type Outcome = Result<ExitCode, Failure>;

impl Failure {
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, reason: String::new(), message: message.into(), advice: String::new() }
    }

    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(USAGE, message)
    }

    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = advice.into();
        self
    }

    /// Prints the paragraph and gives the code.
    pub fn report(self) -> ExitCode {
        let mut text = format!("ares: {}", self.message.trim_end_matches('.'));
        if !self.reason.is_empty() {
            text.push_str(&format!(" [{}]", self.reason));
        }
        text.push('.');
        if !self.advice.is_empty() {
            text.push_str(&format!(" {}.", sentence(self.advice.trim_end_matches('.'))));
        }
        eprintln!("{text}");
        ExitCode::from(self.code)
    }
}

/// With a capital, unless it begins with a command to type.
fn sentence(text: &str) -> String {
    let mut rest = text.chars();
    match rest.next() {
        Some(first) if !text.starts_with("ares ") => first.to_uppercase().chain(rest).collect(),
        _ => text.to_owned(),
    }
}

/// What to do when nobody answers.
pub const LOOK_FOR_CLUSTER: &str =
    "look whether the cluster is up (cluster-scripts/status) and whether --server or ARES_SERVER names it";

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        use tonic::Code;
        match error {
            Error::Unreachable(text) => {
                Failure::new(UNAVAILABLE, format!("no replica answered: {text}")).advise(LOOK_FOR_CLUSTER)
            }
            Error::Unknown(text) => Failure::new(TIMED_OUT, format!("no answer in time: {text}")).advise(
                "the call may have taken effect: look (ares queue, ares nodes, ares cluster status) before you repeat it",
            ),
            Error::Refused { reason: word, code, message, .. } => {
                let exit = match code {
                    _ if word == reason::NO_QUORUM.name || word == reason::NOT_LEADER.name => UNAVAILABLE,
                    Code::InvalidArgument | Code::Unimplemented => USAGE,
                    Code::NotFound => NOT_FOUND,
                    Code::PermissionDenied | Code::Unauthenticated => NOT_ALLOWED,
                    Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted | Code::OutOfRange => CONFLICT,
                    Code::Unavailable | Code::ResourceExhausted => UNAVAILABLE,
                    Code::DeadlineExceeded => TIMED_OUT,
                    _ => FAILURE,
                };
                let advice = reason::find(&word).map(|reason| reason.advice).unwrap_or_default();
                Failure { code: exit, reason: word, message, advice: advice.to_owned() }
            }
        }
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::new(FAILURE, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_a_sentence_and_a_command_is_as_one_types_it() {
        assert_eq!(sentence("write host:port"), "Write host:port");
        assert_eq!(sentence("ares nodes lists them"), "ares nodes lists them");
        assert_eq!(sentence(""), "");
    }
}
