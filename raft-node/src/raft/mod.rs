//! The openraft instance: types, settings, network and the state machine adapter. Nothing outside this module, the log's adapter and
//! `replica` names openraft.

pub mod build;
pub mod fetch;
pub mod image;
pub mod machine;
pub mod mark;
pub mod mend;
pub mod network;
pub mod service;
pub mod settings;
pub mod types;
pub mod upkeep;
pub mod wire;

/// Ares' handle to openraft.
pub type Raft = openraft::Raft<types::TypeConfig, machine::Machine>;
