//! The file `members.json` of a replica's directory: who belonged to the group when this replica last heard of a change. A hint for one
//! that lost its state and must ask somebody; who votes and who leads is never taken from it.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

use crate::identity::{Home, IdentityError};
use crate::raft::types::Peer;

const FILE: &str = "members.json";

#[derive(Serialize, Deserialize)]
struct Stored {
    /// In decimal, as text: JSON numbers end at 2^53 for some readers.
    id: String,
    peer_addr: String,
    api_addr: String,
}

/// Replaces the file.
pub fn note(home: &Home, members: &BTreeMap<u64, Peer>) -> Result<(), IdentityError> {
    let stored = members.iter().map(|(id, peer)| Stored {
        id: id.to_string(),
        peer_addr: peer.peer_addr.clone(),
        api_addr: peer.api_addr.clone(),
    });
    let stored: Vec<Stored> = stored.collect();
    let text = serde_json::to_string_pretty(&stored).expect("plain fields always encode") + "\n";
    home.replace(FILE, text.as_bytes())
}

/// What was noted last; nothing, with a warning, if it can't be read.
pub fn noted(home: &Home) -> BTreeMap<u64, Peer> {
    let path = home.dir().join(FILE);
    let read = match fs::read(&path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return BTreeMap::new(),
        read => read.map_err(|err| err.to_string()),
    };
    let parsed = read.and_then(|bytes| serde_json::from_slice::<Vec<Stored>>(&bytes).map_err(|err| err.to_string()));
    let stored = parsed.unwrap_or_else(|what| {
        tracing::warn!(path = %path.display(), what, "the other members are not known");
        Vec::new()
    });
    let member = |stored: Stored| {
        let peer = Peer { peer_addr: stored.peer_addr, api_addr: stored.api_addr };
        stored.id.parse().ok().map(|id| (id, peer))
    };
    stored.into_iter().filter_map(member).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_read_as_they_were_noted() {
        let dir = tempfile::tempdir().expect("a directory");
        let home = Home::lock(dir.path()).expect("locked");
        assert!(noted(&home).is_empty());
        let peer = |port| Peer { peer_addr: format!("127.0.0.1:{port}"), api_addr: "localhost:1".to_owned() };
        let members = BTreeMap::from([(u64::MAX, peer(1)), (7, peer(2))]);
        note(&home, &members).expect("written");
        assert_eq!(noted(&home), members);
        fs::write(dir.path().join(FILE), "[{").expect("damaged");
        assert!(noted(&home).is_empty());
    }
}
