//! Generates the wire's code with a pure-Rust compiler: a build needs no protoc.

use std::error::Error;
use std::path::Path;

const FILES: [&str; 11] = [
    "common",
    "jobs",
    "keyspace",
    "locks",
    "cluster",
    "agents",
    "agentlogs",
    "peer",
    "tenants",
    "reservations",
    "audit",
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = std::env::var("CARGO_MANIFEST_DIR")?;
    let root = Path::new(&root);
    let files: Vec<_> = FILES.iter().map(|name| root.join("ares/v1").join(format!("{name}.proto"))).collect();
    for file in &files {
        println!("cargo:rerun-if-changed={}", file.display());
    }
    let descriptors = protox::compile(&files, [root])?;
    tonic_prost_build::configure().bytes(".ares.v1").compile_fds(descriptors)?;
    Ok(())
}
