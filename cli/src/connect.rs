//! From the global options to a client.

use std::time::Duration;

use proto::{Client, Identity, Patience};

use crate::Global;
use crate::exit::Failure;

/// Where a replica listens when nothing else is said.
pub const DEFAULT_SERVER: &str = "127.0.0.1:7401";

/// A client of the cluster that the options name.
pub fn client(global: &Global) -> Result<Client, Failure> {
    client_with_token(global, "")
}

/// The same for calls that join: they carry the join token.
pub fn client_with_token(global: &Global, join_token: &str) -> Result<Client, Failure> {
    let servers = servers(global)?;
    let mut client = Client::new(servers, Identity::new(&global.cluster_id, join_token)?);
    let call = Duration::from_secs(global.timeout.max(1));
    client.patience = Patience { call, attempt: call.min(Duration::from_secs(5)) };
    Ok(client)
}

pub fn servers(global: &Global) -> Result<Vec<String>, Failure> {
    let given: Vec<String> =
        global.server.iter().map(|server| server.trim().to_owned()).filter(|server| !server.is_empty()).collect();
    let servers = if given.is_empty() { vec![DEFAULT_SERVER.to_owned()] } else { given };
    servers.iter().map(|server| address(server)).collect()
}

/// Checks the form host:port early, so that a slip is a usage error and no time-out.
pub fn address(text: &str) -> Result<String, Failure> {
    let port = text.rsplit_once(':').filter(|(host, _)| !host.is_empty()).and_then(|(_, port)| port.parse::<u16>().ok());
    match port {
        Some(_) if !text.contains("//") => Ok(text.to_owned()),
        _ => Err(Failure::usage(format!("{text:?} is no address")).advise("write host:port, such as 127.0.0.1:7401")),
    }
}

/// The runtime of a client command: one thread is enough.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// The name that the cluster shows for submissions; not believed by anyone.
pub fn user() -> String {
    std::env::var("USER").or_else(|_| std::env::var("LOGNAME")).unwrap_or_default()
}
