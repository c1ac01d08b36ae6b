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
    let mut client = Client::new(servers, Identity::new(cluster_id(global)?, join_token)?);
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
    let plain =
        |host: &str| !host.is_empty() && host.chars().all(|c| c.is_ascii_graphic() && !"/@?#\"<>\\^`{|}".contains(c));
    match text.rsplit_once(':') {
        Some((host, port)) if plain(host) && port.parse::<u16>().is_ok() => Ok(text.to_owned()),
        _ => Err(Failure::usage(format!("{text:?} is no address")).advise("write host:port, such as 127.0.0.1:7401")),
    }
}

/// The cluster that the options name; empty for any.
pub fn cluster_id(global: &Global) -> Result<&str, Failure> {
    let id = global.cluster_id.as_str();
    if id.is_empty() || (id.len() == 32 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))) {
        return Ok(id);
    }
    Err(Failure::usage(format!("--cluster-id {id:?} is no cluster id: it has 32 hex digits"))
        .advise("take it from ares cluster status -o json or a replica's DIR/env, or leave it out"))
}

/// The answer of one replica that is asked by itself, without another one's help.
pub async fn answer_of<T>(
    address: &str,
    within: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, proto::Error> {
    match tokio::time::timeout(within, call).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(proto::Failure::from(status).into()),
        Err(_) => Err(proto::Error::Unreachable(format!("{address} did not answer"))),
    }
}

/// The runtime of a client command: one thread is enough.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// The name that the cluster shows for submissions; not believed by anyone.
pub fn user() -> String {
    let named =
        ["USER", "LOGNAME"].into_iter().find_map(|name| std::env::var(name).ok().filter(|user| !user.is_empty()));
    named.unwrap_or_else(|| {
        let uid = nix::unistd::getuid();
        match nix::unistd::User::from_uid(uid) {
            Ok(Some(user)) => user.name,
            _ => format!("uid {uid}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_host_and_port() {
        for good in ["127.0.0.1:7401", "[::1]:7401", "gpu-1.lan:1"] {
            assert!(address(good).is_ok(), "{good}");
        }
        for bad in ["", "host", ":7401", "host:", "host:99999", "http://host:7401", "a b:1", "host:x"] {
            assert!(address(bad).is_err_and(|failure| failure.code == crate::exit::USAGE), "{bad}");
        }
    }
}
