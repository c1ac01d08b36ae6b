//! raft-node
