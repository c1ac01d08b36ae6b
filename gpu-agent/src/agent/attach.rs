//! What an agent finds when it starts: shims that outlived its predecessor, ends that were not acknowledged, and attempts
//! of which nothing is left. One of which something may be alive that can't be killed, or whose records can't be read, is
//! left alone: nobody hears that it is dead. It is looked at again, with growing waits, until that is settled.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::v1::DesiredLease;
use tokio::sync::mpsc::UnboundedSender;

use super::attempts::{Attempts, Kept, is_held};
use super::core::{Core, Event};
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

/// An attempt that was left alone is looked at again so soon; doubles up to the maximum.
const AGAIN_FIRST: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// Clones share the shims.
#[derive(Clone)]
pub struct Site {
    pub attempts: Attempts,
    pub shims: Shims,
    pub boot: String,
    /// How the fence file was found.
    pub found: Found,
}

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub all: usize,
    pub running: usize,
    /// Attempts to look at again, with what the fence file knows of them.
    pub left_alone: Vec<(u64, Option<Live>)>,
}

/// Must be called within the runtime.
pub fn attach_all(site: &Site, fence: &mut Fence, cores: &mut Cores, core: &mut Core) -> io::Result<Sum> {
    let mut tokens = site.attempts.tokens()?;
    tokens.extend(fence.content.live.keys());
    tokens.sort_unstable();
    tokens.dedup();
    let mut sum = Sum { all: tokens.len(), ..Sum::default() };
    for token in tokens {
        let live = fence.content.live.get(&token).cloned();
        let Some(kept) = kept(site, live.as_ref(), token) else {
            core.leave_alone(token);
            sum.left_alone.push((token, live));
            continue;
        };
        let settled = site.found == Found::Intact && live.is_none();
        if !settled {
            // Before it is looked at: an agent that starts again must know that its end was not acknowledged.
            fence.add(token, kept.live());
        }
        let Some(part) = part(site, token, &kept)? else {
            core.leave_alone(token);
            sum.left_alone.push((token, Some(kept.live())));
            continue;
        };
        if part.is_alive() {
            sum.running += 1;
            cores.adopt(token, kept.cpus.clone());
        }
        let deadline = site.shims.deadline(token).unwrap_or(0);
        core.adopt(token, part, deadline, settled, boot_ms());
    }
    fence.save()?;
    Ok(sum)
}

/// Looks at an attempt that was left alone again and again, until it can be said what became of it.
pub fn look_again(site: Site, token: u64, live: Option<Live>, events: UnboundedSender<Event>) {
    let mut wait = AGAIN_FIRST;
    tokio::spawn(async move {
        while !events.is_closed() {
            tracing::warn!(
                token,
                again_in_s = wait.as_secs(),
                "an attempt's processes can't be killed, or its records can't be read: left alone, and looked at again"
            );
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(AGAIN_MAX);
            let (site, live) = (site.clone(), live.clone());
            let look = move || {
                let Some(kept) = kept(&site, live.as_ref(), token) else { return Ok(None) };
                let part = part(&site, token, &kept)?;
                Ok(part.map(|part| (part, site.shims.deadline(token).unwrap_or(0))))
            };
            // Within the runtime: shims that are alive after all get their watchers.
            let runtime = tokio::runtime::Handle::current();
            let looked: Result<io::Result<_>, _> = tokio::task::spawn_blocking(move || {
                let _inside = runtime.enter();
                look()
            })
            .await;
            match looked {
                Ok(Ok(Some((part, deadline)))) => {
                    tracing::info!(token, "what became of an attempt that was left alone is known now");
                    let _ = events.send(Event::Found { token, part, deadline });
                    return;
                }
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::warn!(token, %error, "looking at an attempt again"),
                Err(error) => tracing::warn!(token, %error, "looking at an attempt again"),
            }
        }
    });
}

/// A token in the fence file without a directory never got as far as a shim.
fn kept(site: &Site, live: Option<&Live>, token: u64) -> Option<Kept> {
    match (site.attempts.kept(token), live) {
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
