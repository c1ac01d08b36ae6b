//! The agent: joins a cluster, takes up attempts, keeps their leases, reports their ends. All its decisions are in the
//! pure [`core`]; the rest of this module is the IO around it.

pub mod attach;
pub mod attempts;
pub mod core;
pub mod cores;
pub mod environment;
pub mod fence;
pub mod health;
pub mod identity;
pub mod inventory;
pub mod launcher;
pub mod lease;
pub mod logs;
pub mod machine;
pub mod part;
pub mod ports;
pub mod reconcile;
pub mod rights;
pub mod session;
pub mod shims;

mod run;

#[cfg(test)]
mod core_tests;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;

pub use run::run;

use crate::shim::record::Containment;

/// Ended attempts whose logs are kept.
pub const KEEP_ATTEMPTS: usize = 200;

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// `host:port` of one replica or more.
    pub servers: Vec<String>,
    /// Its own; kept over restarts.
    pub dir: PathBuf,
    /// The node's name; `None` = the host's.
    pub name: Option<String>,
    /// Of the log service; port 0 = any free one.
    pub listen: SocketAddr,
    /// Host by which others reach this machine; `None` = the address listened on, or the host's name when that is every
    /// address.
    pub advertise: Option<String>,
    /// What `--gpus` said: `sim:NAME`, `sim:FILE`; `None` = what is here.
    pub gpus: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub join_token: String,
    /// Hex; empty = that of the replicas.
    pub cluster: String,
    /// User of the jobs, where the agent is root.
    pub run_as: Option<String>,
    /// Jobs may run as root.
    pub allow_root_jobs: bool,
    /// Listening on other addresses than loopback, without TLS, is meant.
    pub insecure: bool,
    /// The command that is a shim; the rank's directory is appended.
    pub shim: Vec<OsString>,
    /// `None` = the strongest that works here.
    pub containment: Option<Containment>,
    /// Where MASTER_PORT is looked for.
    pub ports: RangeInclusive<u16>,
    pub keep_attempts: usize,
}

impl Options {
    /// The defaults: a loopback listener, the binary itself as the shim.
    pub fn new(servers: Vec<String>, dir: PathBuf) -> Self {
        Self {
            servers,
            dir,
            name: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            advertise: None,
            gpus: None,
            labels: BTreeMap::new(),
            join_token: String::new(),
            cluster: String::new(),
            run_as: None,
            allow_root_jobs: false,
            insecure: false,
            shim: vec!["/proc/self/exe".into(), "shim".into()],
            containment: None,
            ports: ports::DEFAULT,
            keep_attempts: KEEP_ATTEMPTS,
        }
    }
}

/// Why the agent left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Left {
    /// It was asked to. Jobs go on under their shims.
    Stopped,
    /// Another agent registered this node later, or the cluster went back; jobs go on.
    Superseded(String),
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Identity(#[from] identity::Error),
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("--listen {0}: anybody who reaches it could read the jobs' output; pass --insecure if that is meant")]
    Exposed(SocketAddr),
    #[error("{0}")]
    Rights(String),
    #[error("{0}")]
    Gpus(String),
    /// Jobs that run go on; a new agent takes over.
    #[error("the launching thread ended: {0} attempts can't be started")]
    Launcher(usize),
    #[error("the cluster refused this agent: {0}")]
    Refused(proto::Error),
}

impl Error {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source }
    }
}
