//! The frozen list of `ErrorInfo.reason`: the same words on the wire, in JSON and in the command line. A reason is added,
//! never renamed and never reused.

use tonic::Code;

/// One reason: its word, the gRPC status that it travels with, and what the person who reads it can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason {
    pub name: &'static str,
    pub code: Code,
    pub advice: &'static str,
}

macro_rules! reasons {
    ($($konst:ident $code:ident $advice:literal;)*) => {
        $(pub const $konst: Reason = Reason { name: stringify!($konst), code: Code::$code, advice: $advice };)*
        /// Every reason, in the order in which they were frozen.
        pub const ALL: &[Reason] = &[$($konst),*];
    };
}

reasons! {
    // Of the group.
    NOT_LEADER Unavailable "ask the leader that it names; our clients do so by themselves";
    NO_QUORUM Unavailable "a majority of the replicas must be up and see each other: ares cluster status";
    OUTCOME_UNKNOWN Unavailable "repeat the call with the same request id: it takes effect once";
    BUSY ResourceExhausted "wait as long as RetryInfo says and repeat the call with the same request id";
    IMAGE_BEHIND ResourceExhausted "the disk is slower than the load: wait as long as RetryInfo says";
    DISK_FULL ResourceExhausted "free space on the replica's disk; it goes on by itself";
    STOPPING Unavailable "ask another replica";
    CLUSTER_MISMATCH FailedPrecondition "look which cluster the address belongs to: --server and --cluster-id (ARES_SERVER, ARES_CLUSTER) don't go together";
    JOIN_TOKEN_REFUSED Unauthenticated "pass the cluster's join token: it stands in DIR/env of the first replica";
    MEMBERSHIP_REFUSED FailedPrecondition "look at the group: ares cluster members, ares cluster status";
    TOO_LARGE InvalidArgument "make the request smaller than the limit it names";
    INVALID_ARGUMENT InvalidArgument "correct the fields it names";
    NOT_IMPLEMENTED_YET Unimplemented "leave the field out";
    // Of the keyspace.
    COMPACTED OutOfRange "list again and watch from the list's revision";
    REVISION_NOT_LOCAL OutOfRange "ask another replica";
    // Of the state machine: its own codes.
    REQUEST_MISMATCH InvalidArgument "use a new request id for another request";
    REQUEST_EXPIRED FailedPrecondition "look whether the first try took effect; if not, use a new request id";
    REQUEST_FROM_FUTURE FailedPrecondition "set the client's clock";
    REQUESTS_FULL ResourceExhausted "wait: the window of remembered request ids is at its bound";
    TENANT_UNKNOWN NotFound "name an existing tenant";
    QUEUE_UNKNOWN NotFound "name an existing queue";
    NEVER_FITS InvalidArgument "ask for less than the limit it names";
    INVALID_SPEC InvalidArgument "correct the field it names";
    STATE_FULL ResourceExhausted "wait until jobs end, or raise the limit it names";
    NOT_FOUND NotFound "look it up: ares queue, ares nodes";
    ALREADY_ENDED FailedPrecondition "there is nothing left to do for it";
    NOT_OWNER PermissionDenied "let its owner do it";
    TASK_GONE FailedPrecondition "the task is no longer pending";
    ATTEMPT_MOVED FailedPrecondition "the task went on to another attempt";
    NODE_NOT_READY FailedPrecondition "the machine takes no work";
    EPOCH_MOVED FailedPrecondition "the machine registered again";
    GPU_TAKEN FailedPrecondition "another lease holds the GPU";
    GPU_UNHEALTHY FailedPrecondition "the GPU is out of service";
    NO_FIT FailedPrecondition "the machine has not enough left";
    QUOTA ResourceExhausted "the tenant's limit is reached";
    IDENTITY_CONFLICT AlreadyExists "give the agent another --name: a live machine has this one";
    LIMIT ResourceExhausted "the limit it names is reached";
    EPOCH_STALE FailedPrecondition "the agent was superseded: it registers again";
    TOKEN_STALE FailedPrecondition "the attempt is over: a newer token exists";
    ALREADY_DECIDED FailedPrecondition "the lease was decided before";
    NOT_DUE FailedPrecondition "cluster time has not come to it";
    NOT_STUCK FailedPrecondition "only parts of a silent machine can be confirmed dead";
    SESSION_UNKNOWN NotFound "open a new session: this one ended";
    LOCK_NOT_HELD FailedPrecondition "look who holds it: ares get /locks/NAME";
    FUTURE_REVISION OutOfRange "watch from a revision that exists, or from none: then from now on";
    LEVEL_TOO_OLD FailedPrecondition "upgrade the binary";
    DEPENDENCY_UNKNOWN NotFound "name jobs that exist: ares queue --all lists them";
    DEADLINE_TOO_SOON InvalidArgument "name a later --deadline, an earlier --begin or --reservation, or a shorter --time-limit";
    CONFLICT FailedPrecondition "look at what is there, then say it anew";
    NOT_EMPTY FailedPrecondition "wait until what it names has ended, or cancel it";
    QUOTA_PENDING ResourceExhausted "wait until jobs of the tenant have started, or let it have more waiting";
    PRIORITY_UNKNOWN NotFound "name one of ares priority list";
    PRIORITY_DENIED PermissionDenied "use another priority, or let the tenant use it: ares priority set";
    CLAIMED FailedPrecondition "what is free is kept for another task";
    VICTIM_PROTECTED FailedPrecondition "the job may not be ended for this one";
    RESERVED FailedPrecondition "the machine is set aside in that time";
    RESERVATION_UNKNOWN NotFound "name one of ares reservation list";
    RESERVATION_DENIED PermissionDenied "submit without --reservation, or have it made for this tenant or user";
    GENERATION_STALE FailedPrecondition "name a --generation above the backup's, or none";
    HISTORY_DAMAGED DataLoss "ask another replica with --server; look at this one's disk: its row comes back by itself once another replica has it";
}

/// The reason with this word.
pub fn find(name: &str) -> Option<&'static Reason> {
    ALL.iter().find(|reason| reason.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_unique_and_upper_snake() {
        let mut seen = std::collections::BTreeSet::new();
        for reason in ALL {
            assert!(seen.insert(reason.name), "{} stands twice", reason.name);
            assert!(reason.name.chars().all(|c| c.is_ascii_uppercase() || c == '_'), "{}", reason.name);
        }
    }
}
