//! What an agent finds when it starts: shims that outlived its predecessor, ends that were not acknowledged, and attempts
//! of which nothing is left.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::v1::DesiredLease;

use super::attempts::{Attempts, Kept, is_held};
use super::core::Core;
use super::cores::Cores;
use super::fence::{Fence, Found, Live};
use super::part::{Part, Rank};
use super::shims::{SWEEP, Shims};
use crate::clock::boot_ms;
use crate::shim::contain;
use crate::shim::record::{self, Containment, Ended};

/// A shim that was started in its predecessor's last moment writes who it is within a few ms.
const SHIM_APPEARS: Duration = Duration::from_secs(5);
/// What survives its own SIGKILL for longer than this hangs in the kernel.
const SWEEP_LIMIT: Duration = Duration::from_secs(10);

pub struct Site<'a> {
    pub attempts: &'a Attempts,
    pub shims: &'a Shims,
    pub boot: &'a str,
    /// How the fence file was found.
    pub found: Found,
}

/// Must be called within the runtime. Numbers of attempts found running, and of all found.
pub fn attach_all(site: &Site, fence: &mut Fence, cores: &mut Cores, core: &mut Core) -> io::Result<(usize, usize)> {
    let mut tokens = site.attempts.tokens()?;
    tokens.extend(fence.content.live.keys());
    tokens.sort_unstable();
    tokens.dedup();
    let mut running = 0;
    for token in &tokens {
        let Some(kept) = kept(site, fence, *token) else {
            core.leave_alone(*token);
            continue;
        };
        let settled = site.found == Found::Intact && !fence.content.live.contains_key(token);
        let Some(part) = part(site, *token, &kept)? else {
            core.leave_alone(*token);
            continue;
        };
        if part.is_alive() {
            running += 1;
            cores.adopt(*token, kept.cpus.clone());
        }
        if !settled {
            fence.add(
                *token,
                Live { job_id: kept.job_id, first_rank: kept.first_rank, ranks: kept.ranks, gpus: kept.gpus },
            );
        }
        let deadline = site.shims.deadline(*token).unwrap_or(0);
        core.adopt(*token, part, deadline, settled, boot_ms());
    }
    fence.save()?;
    Ok((running, tokens.len()))
}

/// A token in the fence file without a directory never got as far as a shim.
fn kept(site: &Site, fence: &Fence, token: u64) -> Option<Kept> {
    match (site.attempts.kept(token), fence.content.live.get(&token)) {
        (Ok(kept), _) => Some(kept),
        (Err(_), Some(live)) => {
            let lease = DesiredLease {
                job_id: live.job_id,
                first_rank: live.first_rank,
                ranks: live.ranks,
                gpu_uuids: live.gpus.clone(),
                ..Default::default()
            };
            Some(Kept::of(&lease, 0, false, "", Containment::Weak))
        }
        (Err(error), None) => {
            tracing::warn!(token, %error, "an attempt's directory can't be read");
            None
        }
    }
}

/// `None`: something of it is alive that can't be killed: the leader is not told that it is dead, and waits.
fn part(site: &Site, token: u64, kept: &Kept) -> io::Result<Option<Part>> {
    let lease = DesiredLease {
        token,
        job_id: kept.job_id,
        first_rank: kept.first_rank,
        ranks: kept.ranks,
        gpu_uuids: kept.gpus.clone(),
        ttl_ms: kept.ttl_ms,
        kill_grace_ms: kept.grace_ms,
        ..Default::default()
    };
    let mut part = Part::new(&lease, Rank::Vanished);
    for local in 0..kept.ranks {
        let rank = kept.first_rank + local;
        let dir = site.attempts.rank_dir(token, rank);
        let containment = kept.containment.of_rank(token, rank);
        let state = if kept.boot == site.boot {
            await_shim(&dir);
            site.shims.attach((token, local), &dir, containment.clone())?
        } else {
            Ended::read(&dir)?.map_or(Rank::Vanished, |ended| Rank::Ended(ended.outcome))
        };
        let gone = state != Rank::Vanished || kept.boot != site.boot || sweep(site, token, &dir, &containment);
        if !gone {
            tracing::error!(token, rank, "processes of an attempt whose shim is gone can't be killed");
            return Ok(None);
        }
        part.ranks[local as usize] = state;
    }
    part.port = kept.port;
    part.open = kept.open || part.ranks.contains(&Rank::Started);
    Ok(Some(part))
}

/// The lock is held from before the shim's process is made; who holds it is written a little later.
fn await_shim(dir: &Path) {
    let began = Instant::now();
    let unknown = || is_held(dir) && !dir.join(record::PID).exists() && !dir.join(record::EXIT).exists();
    while unknown() && began.elapsed() < SHIM_APPEARS {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The shim is gone: true when its lock is free and nothing of the rank is left.
fn sweep(site: &Site, token: u64, dir: &Path, containment: &Containment) -> bool {
    let began = Instant::now();
    while is_held(dir) || !contain::sweep(containment, &site.attempts.dir(token)) {
        if began.elapsed() > SWEEP_LIMIT {
            return false;
        }
        std::thread::sleep(SWEEP);
    }
    true
}
