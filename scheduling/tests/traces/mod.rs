//! The files of $ARES_TEST_DATA/traces, packed or not. Needs gzip.

/// The text of a file there; `None` without it.
pub fn unpacked(name: &str) -> Option<String> {
    let path = format!("{}/traces/{name}", std::env::var("ARES_TEST_DATA").ok()?);
    let output = std::process::Command::new("gzip").args(["-dcf", &path]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}
