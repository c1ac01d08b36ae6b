//! The openraft instance: types, network, state machine adapter.

pub mod types;
