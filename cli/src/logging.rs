//! Logs go to stderr: text on a terminal, JSON lines otherwise. Client commands are quiet unless asked.

use std::io::IsTerminal;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::prelude::*;

pub fn start(filter: &str, daemon: bool) {
    let fallback = std::env::var("LOG_LEVEL").unwrap_or_default().to_ascii_lowercase();
    let wanted = match (filter, fallback.as_str(), daemon) {
        ("", "", true) => "info,openraft=error,h2=warn,hyper=warn,tower=warn",
        ("", "", false) => "error",
        ("", level, _) => level,
        (filter, _, _) => filter,
    };
    let filter = wanted.parse().unwrap_or_else(|error| {
        eprintln!("ares: the log filter {wanted:?} is not understood ({error}); logging at info.");
        Targets::new().with_default(LevelFilter::INFO)
    });
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let done = if std::io::stderr().is_terminal() {
        let lines = lines.with_ansi(std::env::var_os("NO_COLOR").is_none());
        tracing_subscriber::registry().with(lines).with(filter).try_init()
    } else {
        tracing_subscriber::registry().with(lines.json().flatten_event(true)).with(filter).try_init()
    };
    if let Err(error) = done {
        eprintln!("ares: no logging: {error}");
    }
}
