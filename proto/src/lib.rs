//! The wire of Ares: messages and services generated from `ares/v1/*.proto`, the frozen list of error reasons, and the
//! one typed client. It knows no domain type.

pub mod client;
pub mod error;
pub mod reason;
pub mod retry;
mod wire;

/// Messages and services, as generated.
pub mod v1 {
    #![allow(clippy::all, clippy::pedantic)]
    tonic::include_proto!("ares.v1");
}

pub use client::{Client, Identity, Patience, request_id};
pub use error::{Error, Failure};
