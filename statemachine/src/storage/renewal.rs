//! A backup becomes the first snapshot of a new life of the cluster: what the state becomes is `apply::restore`'s, who belongs to the new
//! group is the consensus layer's.

use std::fs;
use std::path::Path;

use super::error::{At, StorageError};
use super::recovery::{install, snapshots_dir};
use super::snapshot::{self, Snapshot};
use crate::command::{Cmd, Command, Entry, Outcome, Rejection};
use crate::record::LogPosition;
use crate::state::State;

/// How the new life begins.
pub struct NewLife {
    /// Above the backup's generation.
    pub generation: u32,
    /// The entry that begins it: behind the backup's last one, in a later term.
    pub position: LogPosition,
    /// As [`State::set_membership`] takes it.
    pub membership: Vec<u8>,
    /// Unix time in ms, for display.
    pub wall_ms: i64,
}

/// Makes `dir`, which holds no replica, the directory of one whose newest snapshot is the backup's state after the restore; the state.
/// The backup stays as it is. What a crash or an error leaves behind is no replica's directory: there is no log and no identity in it.
pub fn renew(dir: &Path, backup: &Snapshot, life: &NewLife) -> Result<Result<State, Rejection>, StorageError> {
    let snapshots = snapshots_dir(dir);
    let copied = snapshot::copy(backup, &snapshots)?;
    let (mut state, image) = install(dir, &copied)?;
    let restore =
        Cmd { request: None, actor: "operator".into(), body: Command::Restore { generation: life.generation } };
    let (level, clock_ms) = (state.meta.level, state.meta.clock_ms);
    let entry = Entry { level, clock_ms, wall_ms: life.wall_ms, salt: 0, cmds: vec![restore] };
    let outcomes = state.apply(&entry).unwrap_or_else(|_| unreachable!("the level is the state's own"));
    if let Some(Outcome::Rejected(rejection)) = outcomes.into_iter().next() {
        return Ok(Err(rejection));
    }
    state.set_membership(life.membership.clone());
    state.set_applied(life.position);
    snapshot::write(&snapshots, state.clone(), &image)?;
    // Written anew from the snapshot at the start, for it is the old life's.
    let image_dir = image.dir().to_owned();
    drop(image);
    fs::remove_dir_all(&image_dir).at(&image_dir, "remove")?;
    snapshot::remove(copied.dir())?;
    Ok(Ok(state))
}
