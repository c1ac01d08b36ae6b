//! What a set of runs must have seen at least once. A run in which the interesting never happened shows nothing.

pub const REQUIRED: &[&str] = &[
    "a leader that was cut off lost its place",
    "a leader went down",
    "a leader went down while the membership was half-way",
    "a leader without a quorum refused a read",
    "a log was truncated",
    "a power cut took what was not synced",
    "a power cut tore what was not synced",
    "a repeated request was answered from the table",
    "a replica had its image alone",
    "a replica lost its image",
    "a replica lost its state",
    "a request was answered after it was repeated",
    "leadership was handed over",
    "the membership was half-way",
    "the outcome of a request was unknown",
    "two leaders alive in different terms",
];
