//! The planted bug of this module: acknowledge without fsync. The power-cut gate must fail with it, or the gate shows
//! nothing. Exists only in builds with the feature `planted`, which no release has.

/// True if this process was told to leave out the syncs, by `ARES_PLANTED=ack_without_fsync`.
#[cfg(feature = "planted")]
pub(super) fn ack_without_fsync() -> bool {
    static ON: std::sync::LazyLock<bool> =
        std::sync::LazyLock::new(|| std::env::var("ARES_PLANTED").is_ok_and(|bug| bug == "ack_without_fsync"));
    *ON
}

#[cfg(not(feature = "planted"))]
pub(super) const fn ack_without_fsync() -> bool {
    false
}
