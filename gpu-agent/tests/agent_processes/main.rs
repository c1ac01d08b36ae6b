//! The agent with real processes: a leader played by the test, agents and shims in processes of their own, which are
//! killed and stopped. The binary is agent, shim and test at once, so it brings its own small harness: names are
//! sentences, arguments filter them.

mod attach;
mod basics;
mod leader;
mod leases;
mod site;

use std::ffi::OsString;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

type Test = (&'static str, fn());

/// Runs an async test in a runtime of its own.
fn block_on(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(test);
}

#[macro_export]
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        pub const TESTS: &[(&str, fn())] = &[$((stringify!($name), || $crate::block_on($name()))),*];
    };
}

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    match args.first().and_then(|arg| arg.to_str()) {
        Some(site::SHIM) => std::process::exit(gpu_agent::shim::main(&args[1..])),
        Some(site::AGENT) => {
            let words: Vec<String> = args[1..].iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
            std::process::exit(site::agent_main(&words))
        }
        _ => {}
    }
    let filters: Vec<String> =
        args.iter().map(|arg| arg.to_string_lossy().into_owned()).filter(|arg| !arg.starts_with('-')).collect();
    let all: Vec<Test> = [basics::TESTS, attach::TESTS, leases::TESTS].concat();
    if args.iter().any(|arg| arg == "--list") {
        all.iter().for_each(|(name, _)| println!("{name}: test"));
        return ExitCode::SUCCESS;
    }
    let chosen: Vec<Test> = all
        .into_iter()
        .filter(|(name, _)| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str())))
        .collect();
    let mut failed = Vec::new();
    for (name, test) in &chosen {
        let began = Instant::now();
        let ok = catch_unwind(AssertUnwindSafe(test)).is_ok();
        println!("test {name} ... {} ({} ms)", if ok { "ok" } else { "FAILED" }, began.elapsed().as_millis());
        if !ok {
            failed.push(*name);
        }
    }
    println!("\ntest result: {} passed; {} failed", chosen.len() - failed.len(), failed.len());
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
