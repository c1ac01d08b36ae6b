//! The way back from a replica's directory to its log and state, at the start: what the directory gives alone, and else what the other
//! replicas give. The parts are their owners': `log`, `statemachine::storage` and `raft::fetch`; here is their order.

use std::collections::BTreeMap;
use std::sync::Arc;

use proto::v1;
use statemachine::record::LogPosition;
use statemachine::storage::{self, LogBounds, Recovered, Source};

use crate::identity::{Home, Identity, LOG_DIR, Stage};
use crate::log::{EntryId, Log};
use crate::peers;
use crate::raft::fetch;
use crate::raft::machine::Shared;
use crate::raft::network::Pool;
use crate::replica::{Mode, Options, Peer, StartError, group, internal};
use crate::runtime::blocking;

/// Log and vote first, then image and snapshots, then the other replicas: the order of the recovery.
pub async fn recover(
    options: &Options,
    home: &Home,
    identity: Identity,
    pool: &Pool,
) -> Result<(Arc<Log>, Arc<Shared>), StartError> {
    let (log, mut recovered) = recover_alone(options, identity).await?;
    if recovered.source == Source::NeedsLeaderSnapshot {
        let Some(purged) = log.reader().state().purged.map(to_position) else {
            return Err(internal("recover the state")("a whole log needs no snapshot".to_owned()));
        };
        drop(recovered);
        let others = others_of(options, home, identity).await;
        recovered = fetch::from_others(fetch::Lost { dir: &options.dir, purged, others }, pool, &log).await?;
    }
    tracing::info!(source = %recovered.source, applied = recovered.state.meta.applied.index, "the state is recovered");
    let dir = options.dir.clone();
    let shared = blocking(move || Shared::new(&dir, identity.cluster.0, recovered)).await;
    let shared = shared.map_err(|err| internal("recover")(err.to_string()))?;
    let shared = shared.map_err(|err| internal("recover the state")(err.to_string()))?;
    Ok((log, Arc::new(shared)))
}

/// What the directory alone gives.
async fn recover_alone(options: &Options, identity: Identity) -> Result<(Arc<Log>, Recovered), StartError> {
    let (dir, log_options) = (options.dir.clone(), options.log.clone());
    let work = move || {
        let log = Log::open(&dir.join(LOG_DIR), log_options)?;
        let state = log.reader().state();
        if identity.stage == Stage::Member && state.last.is_none() {
            return Err(StartError::LogLost { dir: dir.join(LOG_DIR), replica: identity.replica });
        }
        let bounds = LogBounds { purged: state.purged.map(to_position), last: state.last.map(to_position) };
        Ok((Arc::new(log), storage::open(&dir, bounds)?))
    };
    blocking(work).await.map_err(|err| internal("recover")(err.to_string()))?
}

/// Who may have what this replica lost: the members that it noted, and those that the replica behind `--join` knows of.
async fn others_of(options: &Options, home: &Home, identity: Identity) -> BTreeMap<u64, Peer> {
    let mut others = peers::noted(home);
    if let Mode::Join { addr, token } = &options.mode {
        let asked = async {
            let client = group(addr, &identity.cluster.to_string(), token)?;
            let status = client.status(v1::StatusRequest {}).await;
            status.map_err(|source| StartError::Join { addr: addr.clone(), source })
        };
        match asked.await {
            Ok(status) => others.extend(
                status
                    .members
                    .into_iter()
                    .map(|member| (member.replica_id, Peer { peer_addr: member.peer_addr, api_addr: member.api_addr })),
            ),
            Err(err) => tracing::warn!(%err, "the group's members are not known from there"),
        }
    }
    others.remove(&identity.replica);
    others
}

fn to_position(id: EntryId) -> LogPosition {
    LogPosition { term: id.term, leader: id.node, index: id.index }
}
