//! Reader of `nvidia-smi topo -m` text.
//!
//! ```text
//! text  -> lines without escapes and comments   (text)
//!       -> device names and affinity titles     (header)
//!       -> one row a device: cells, affinities  (rows, tail)
//!       -> the legend of NIC names              (legend)
//!       -> facts                                (facts)
//! ```
//! A matrix has one reading or none: what can't be understood is a [`MatrixError`] with line and column. Nothing is guessed, and no
//! text makes the reader panic. What the classes mean in bandwidth is not decided here.

mod facts;
mod header;
mod legend;
mod rows;
mod tail;
mod text;

use std::fmt;
use std::path::Path;

use serde::{Serialize, Serializer};

pub use facts::{Facts, Keyed, Nearest, NicColumn};

/// Larger files are no matrix of one machine.
const MAX_BYTES: usize = 1 << 20;

/// How two devices of a machine are joined, as nvidia-smi classes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The device itself (`X`).
    Own,
    /// A bonded set of so many NVLinks (`NV#`).
    NvLink(u32),
    /// At most one PCIe bridge.
    Pix,
    /// Several PCIe bridges, no host bridge.
    Pxb,
    /// A PCIe host bridge.
    Phb,
    /// The interconnect of host bridges in one NUMA node.
    Node,
    /// The interconnect of NUMA nodes (older drivers: `SOC`).
    Sys,
}

impl fmt::Display for Class {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = match self {
            Class::Own => "X",
            Class::NvLink(links) => return write!(out, "NV{links}"),
            Class::Pix => "PIX",
            Class::Pxb => "PXB",
            Class::Phb => "PHB",
            Class::Node => "NODE",
            Class::Sys => "SYS",
        };
        out.write_str(word)
    }
}

impl Serialize for Class {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Why a text is no matrix: the place (both 1-based, in the original text) and what was expected there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct MatrixError {
    pub line: usize,
    pub column: usize,
    pub message: String,
}

/// Why a matrix file gives no facts.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{path}: {source}")]
    Read { path: String, source: std::io::Error },
    #[error("{path}: {source}")]
    Matrix { path: String, source: MatrixError },
}

/// Reads the facts of a matrix.
pub fn parse(text: &str) -> Result<Facts, MatrixError> {
    if text.len() > MAX_BYTES {
        return Err(MatrixError {
            line: 1,
            column: 1,
            message: format!("expected at most {MAX_BYTES} bytes, found {}", text.len()),
        });
    }
    let lines = text::lines(text);
    let header = header::find(&lines)?;
    let (rows, legend_at) = rows::read(&lines, &header)?;
    if rows.is_empty() {
        let line = &lines[header.index];
        return Err(line.refuse(0, "expected rows below this header, found none"));
    }
    rows::check_symmetry(&rows, &header)?;
    rows::check_end(&lines[legend_at..])?;
    let names = legend::read(&lines[legend_at..], &header)?;
    Ok(facts::collect(&header, &rows, &names))
}

/// Reads the facts of a matrix from the bytes of a file: UTF-8, or UTF-16 with its mark.
pub fn parse_bytes(bytes: &[u8]) -> Result<Facts, MatrixError> {
    parse(&text::decode(bytes))
}

/// Reads the facts of a matrix file.
pub fn read(path: &Path) -> Result<Facts, FileError> {
    let shown = path.display().to_string();
    let bytes = std::fs::read(path).map_err(|source| FileError::Read { path: shown.clone(), source })?;
    parse_bytes(&bytes).map_err(|source| FileError::Matrix { path: shown, source })
}

/// The comment lines (`# ...`) of a matrix file, without their mark: where a collector wrote which machine it is.
pub fn comments(text: &str) -> impl Iterator<Item = &str> {
    text.trim_start_matches('\u{feff}').lines().filter_map(|line| line.strip_prefix('#')).map(str::trim)
}

/// The text of a matrix file, decoded as [`parse_bytes`] does.
pub fn decode(bytes: &[u8]) -> String {
    text::decode(bytes)
}
