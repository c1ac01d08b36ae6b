//! openraft's settings, and why each is what it is. One of them guards against a measured loss of acknowledged writes.

use openraft::{Config, SnapshotPolicy};
use planted::{Bug, planted};

/// Between two heartbeats of the leader, in ms.
pub const HEARTBEAT_MS: u64 = 50;
/// A follower campaigns after the leader's lease (`ELECTION_MAX_MS`) and a random time in this range, in ms: a new leader within
/// ~600 ms of the old one's death, and no election caused by a disk that is slow for 100 ms.
pub const ELECTION_MIN_MS: u64 = 150;
pub const ELECTION_MAX_MS: u64 = 300;
/// A snapshot is made after this many entries, or [`SNAPSHOT_BYTES`] of them.
pub const SNAPSHOT_ENTRIES: u64 = 50_000;
/// Bytes of log after which a snapshot is made.
pub const SNAPSHOT_BYTES: u64 = 256 << 20;
/// Entries in one append to a follower. The door packs at most 320 KiB into an entry, so an append stays below 20 MiB even where the
/// log's own bound of bytes does not hold.
pub const APPEND_ENTRIES: u64 = 64;

/// The settings of a replica. `snapshot_entries` is [`SNAPSHOT_ENTRIES`] but in tests.
pub fn config(cluster: &str, snapshot_entries: u64) -> Result<Config, openraft::ConfigError> {
    let config = Config {
        cluster_name: cluster.to_owned(),
        heartbeat_interval: HEARTBEAT_MS,
        election_timeout_min: ELECTION_MIN_MS,
        election_timeout_max: ELECTION_MAX_MS,
        max_payload_entries: APPEND_ENTRIES,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(snapshot_entries),
        // Openraft must not purge by itself: a log may be purged only below the persisted image too, and `Machine` says when.
        max_in_snapshot_log_to_keep: u64::MAX,
        // A replica back from a partition must not depose a healthy leader with its higher term.
        enable_pre_vote: Some(true),
        // A leader replicates entries before its own disk has them. If it dies there and *resumes* its term, it gives the same log ids
        // to other commands, and log matching can't see it: acknowledged writes were lost that way. It must be elected again.
        enable_leader_restore: Some(planted(Bug::LeaderRestored)),
        ..Config::default()
    };
    config.validate()
}

/// Refuses to run with a setting that loses data. Called with what openraft was really given.
pub fn assert_safe(config: &Config) {
    assert_eq!(
        config.enable_leader_restore,
        Some(planted(Bug::LeaderRestored)),
        "a restarted leader must not resume its term: acknowledged writes would be lost"
    );
    assert_eq!(config.enable_pre_vote, Some(true), "without Pre-Vote a returning replica deposes a healthy leader");
    assert_eq!(
        config.max_in_snapshot_log_to_keep,
        u64::MAX,
        "openraft must not purge the log above the persisted image"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_settings_are_safe_and_valid() {
        assert_safe(&config("c", SNAPSHOT_ENTRIES).expect("valid"));
    }

    #[test]
    #[should_panic(expected = "must not resume its term")]
    fn a_leader_that_would_resume_its_term_is_refused() {
        let mut unsafe_one = config("c", SNAPSHOT_ENTRIES).expect("valid");
        unsafe_one.enable_leader_restore = None;
        assert_safe(&unsafe_one);
    }

    #[test]
    #[should_panic(expected = "Pre-Vote")]
    fn a_group_without_pre_vote_is_refused() {
        let mut unsafe_one = config("c", SNAPSHOT_ENTRIES).expect("valid");
        unsafe_one.enable_pre_vote = None;
        assert_safe(&unsafe_one);
    }
}
