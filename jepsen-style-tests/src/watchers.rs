//! Watchers of the keyspace that go on at another replica when theirs is gone, and what they must have seen in the end: the same events
//! as everybody, each once, in the order of revisions, all of one revision together.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::{Client, v1};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio_stream::StreamExt;

use crate::checks;
use crate::cluster::Cluster;
use crate::verdict::Verdict;

pub const WATCHERS: usize = 2;
const FILE: &str = "watched.json";
/// Longer without any message and the stream is taken for dead: progress comes each 5 s.
const SILENT: Duration = Duration::from_secs(10);
/// How long the watchers may take to see what the replicas have, in the end.
const CATCH_UP: Duration = Duration::from_secs(40);

/// All changes of one revision, as they came in one message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    pub revision: u64,
    /// Key, and whether it is gone.
    pub keys: Vec<(String, bool)>,
}

/// What one watcher saw, and how often it began anew.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seen {
    pub told: Vec<Told>,
    pub streams: u64,
}

/// What is judged in the end: what watchers saw and replicas tell, by name, and the keys that are there with their newest revisions.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Watched {
    seen: BTreeMap<String, Seen>,
    keys: BTreeMap<String, u64>,
}

pub struct Watchers {
    stop: Arc<AtomicBool>,
    clients: JoinSet<Seen>,
}

impl Watchers {
    pub fn start(replicas: &[Client], on: &tokio::runtime::Handle) -> Self {
        let mut watchers = Self { stop: Arc::default(), clients: JoinSet::new() };
        for at in 0..WATCHERS {
            let mut replicas = replicas.to_vec();
            let turn = at % replicas.len();
            replicas.rotate_left(turn);
            let stop = watchers.stop.clone();
            watchers.clients.spawn_on(watch_on(replicas, stop), on);
        }
        watchers
    }

    /// Lets them see up to the newest revision, and compares them with what each replica tells from its beginning.
    pub async fn finish(mut self, cluster: &Cluster, out: &Path, verdict: &mut Verdict) {
        let mut watched = Watched::default();
        for at in cluster.running_replicas() {
            match truth(&cluster.client_at(at)).await {
                Ok(seen) => drop(watched.seen.insert(format!("replica-{at}"), seen)),
                Err(error) => {
                    verdict.violations.push(format!("watch: replica {at} does not tell what it has: {error}"))
                }
            }
        }
        match checks::keys(&cluster.client(), "/", false, v1::ReadMode::Linearizable).await {
            // Shown as create revision, newest revision, value.
            Ok(found) => watched.keys.extend(
                found.pairs.into_iter().filter_map(|(key, shown)| Some((key, shown.split(' ').nth(1)?.parse().ok()?))),
            ),
            Err(error) => verdict.empty.push(error),
        }
        let newest = watched.keys.values().max().copied().unwrap_or_default();
        self.stop.store(true, Ordering::Relaxed);
        let mut number = 0;
        while let Some(seen) = self.clients.join_next().await {
            watched.seen.insert(format!("watcher-{number}"), seen.expect("it does not panic"));
            number += 1;
        }
        let saved = serde_json::to_vec(&watched).map_err(|error| error.to_string());
        let saved = saved.and_then(|text| fs::write(out.join(FILE), text).map_err(|error| error.to_string()));
        verdict.empty.extend(saved.err().map(|error| format!("{FILE}: {error}")));
        // Who never caught up has a gap at its end, which the comparison can't see.
        for (name, seen) in watched.seen.iter().filter(|(name, _)| name.starts_with("watcher")) {
            let last = seen.told.last().map_or(0, |told| told.revision);
            if last < newest {
                verdict
                    .violations
                    .push(format!("watch: {name} saw nothing behind revision {last}, the newest is {newest}"));
            }
        }
        judge_all(&watched, verdict);
    }
}

/// Judges what an earlier run's watchers saw.
pub fn judge(out: &Path, verdict: &mut Verdict) {
    let path = out.join(FILE);
    let watched = fs::read(&path).map_err(|error| error.to_string());
    match watched.and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string())) {
        Ok(watched) => judge_all(&watched, verdict),
        Err(error) => verdict.empty.push(format!("{}: {error}", path.display())),
    }
}

fn judge_all(watched: &Watched, verdict: &mut Verdict) {
    let (watchers, replicas): (Vec<_>, Vec<_>) = watched.seen.iter().partition(|(name, _)| name.starts_with("watcher"));
    let events: usize = watchers.iter().map(|(_, seen)| seen.told.len()).sum();
    let streams: u64 = watchers.iter().map(|(_, seen)| seen.streams).sum();
    verdict.figure("watched revisions", format!("{events} in {streams} streams of {} watchers", watchers.len()));
    if events == 0 {
        verdict.empty.push("the watchers saw nothing".to_owned());
    }
    for (name, seen) in &watched.seen {
        verdict.check(in_order(name, &seen.told));
    }
    for (name, seen) in &watchers {
        verdict.check(saw_newest(name, &seen.told, &watched.keys));
        for (replica, truth) in &replicas {
            verdict.check(same(name, &seen.told, replica, &truth.told));
        }
    }
}

/// Revisions grow: nothing is told twice, and nothing late.
fn in_order(name: &str, told: &[Told]) -> Result<(), String> {
    match told.windows(2).find(|two| two[1].revision <= two[0].revision) {
        Some(two) => Err(format!("watch: {name} was told revision {} after {}", two[1].revision, two[0].revision)),
        None => Ok(()),
    }
}

/// Each key that is there was told with its newest revision: reads and watches agree.
fn saw_newest(name: &str, told: &[Told], keys: &BTreeMap<String, u64>) -> Result<(), String> {
    let by_revision: BTreeMap<u64, &Told> = told.iter().map(|told| (told.revision, told)).collect();
    for (key, revision) in keys {
        let told =
            by_revision.get(revision).is_some_and(|told| told.keys.iter().any(|(other, gone)| other == key && !gone));
        if !told {
            return Err(format!("watch: {name} was not told that {key} changed at revision {revision}"));
        }
    }
    Ok(())
}

/// Where both looked, both saw the same.
fn same(name: &str, told: &[Told], replica: &str, truth: &[Told]) -> Result<(), String> {
    let (Some(first), Some(last)) = (truth.first(), told.last()) else { return Ok(()) };
    // The watcher asked for everything, the replica may keep less.
    let start = first.revision;
    let within = |told: &&Told| (start..=last.revision).contains(&told.revision);
    let mut own = told.iter().filter(within);
    for wanted in truth.iter().filter(within) {
        match own.next() {
            Some(seen) if seen == wanted => {}
            Some(seen) if seen.revision == wanted.revision => {
                return Err(format!(
                    "watch: {name} saw {:?} at revision {}, {replica} tells {:?}",
                    seen.keys, seen.revision, wanted.keys
                ));
            }
            seen => {
                let instead = seen.map_or("nothing".to_owned(), |seen| format!("revision {}", seen.revision));
                return Err(format!(
                    "watch: {name} missed revision {} ({:?}) that {replica} tells, and saw {instead}",
                    wanted.revision, wanted.keys
                ));
            }
        }
    }
    match own.next().filter(|seen| truth.last().is_some_and(|last| seen.revision <= last.revision)) {
        Some(seen) => Err(format!("watch: {name} saw revision {} that {replica} does not tell", seen.revision)),
        None => Ok(()),
    }
}

/// Watches from the first revision on, at each replica in turn, until it is told to stop and has heard for a while.
async fn watch_on(replicas: Vec<Client>, stop: Arc<AtomicBool>) -> Seen {
    let (mut seen, mut next, mut at) = (Seen::default(), 1, 0);
    let mut until = None;
    loop {
        if stop.load(Ordering::Relaxed) {
            let end = *until.get_or_insert_with(|| Instant::now() + CATCH_UP);
            if Instant::now() >= end {
                return seen;
            }
        }
        let request = v1::WatchRequest { key: "/".to_owned(), prefix: true, from_revision: next, keys_only: true };
        let opened = replicas[at % replicas.len()].watch(request).await;
        at += 1;
        let Ok(mut stream) = opened else {
            tokio::time::sleep(Duration::from_millis(200)).await;
            continue;
        };
        seen.streams += 1;
        let mut idle = 0;
        while let Ok(Some(Ok(reply))) = tokio::time::timeout(SILENT, stream.next()).await {
            next = next.max(reply.revision + 1);
            idle += u32::from(reply.events.is_empty());
            let told = told(reply);
            if !told.keys.is_empty() {
                seen.told.push(told);
            }
            // The first progress behind the stop: there is nothing more.
            if stop.load(Ordering::Relaxed) && idle > 0 {
                return seen;
            }
            if !stop.load(Ordering::Relaxed) {
                idle = 0;
            }
        }
    }
}

fn told(reply: v1::WatchReply) -> Told {
    let keys = reply.events.into_iter().map(|event| (event.key, event.deleted)).collect();
    Told { revision: reply.revision, keys }
}

/// All that a replica tells, from the first revision that it keeps, up to its newest.
async fn truth(replica: &Client) -> Result<Seen, String> {
    let status = replica.status(v1::StatusRequest {}).await.map_err(|error| error.to_string())?;
    let mut from = 1;
    let mut stream = loop {
        let request = v1::WatchRequest { key: "/".to_owned(), prefix: true, from_revision: from, keys_only: true };
        match replica.watch(request).await {
            Ok(stream) => break stream,
            Err(error) if ["COMPACTED", "REVISION_NOT_LOCAL"].contains(&error.reason()) => {
                from = floor(&error.to_string()).filter(|at| *at > from).ok_or_else(|| error.to_string())?;
            }
            Err(error) => return Err(error.to_string()),
        }
    };
    let mut seen = Seen { streams: 1, ..Seen::default() };
    let mut at = 0;
    while at < status.revision {
        let reply = tokio::time::timeout(SILENT, stream.next()).await.map_err(|_| "it is silent".to_owned())?;
        let reply = reply.ok_or("it ends")?.map_err(|error| error.to_string())?;
        at = reply.revision;
        let told = told(reply);
        if !told.keys.is_empty() {
            seen.told.push(told);
        }
    }
    Ok(seen)
}

/// The first revision that is still kept, as the refusal names it beside the one that was asked for.
fn floor(refusal: &str) -> Option<u64> {
    refusal.split(|letter: char| !letter.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(revision: u64, keys: &[&str]) -> Told {
        Told { revision, keys: keys.iter().map(|key| ((*key).to_owned(), false)).collect() }
    }

    fn judged(watcher: Vec<Told>) -> Vec<String> {
        let keys = BTreeMap::from([("/b".to_owned(), 3)]);
        let truth = vec![told(2, &["/a"]), told(3, &["/a", "/b"]), told(5, &["/c"]), told(6, &["/a"])];
        let seen = |told| Seen { told, streams: 1 };
        let seen = BTreeMap::from([("watcher-0".to_owned(), seen(watcher)), ("replica-0".to_owned(), seen(truth))]);
        let mut verdict = Verdict::default();
        judge_all(&Watched { seen, keys }, &mut verdict);
        verdict.violations
    }

    #[test]
    fn a_watch_that_saw_everything_passes_also_where_the_replica_keeps_less() {
        assert!(judged(vec![told(2, &["/a"]), told(3, &["/a", "/b"]), told(5, &["/c"]), told(6, &["/a"])]).is_empty());
        assert!(judged(vec![told(1, &["/z"]), told(2, &["/a"]), told(3, &["/a", "/b"]), told(5, &["/c"])]).is_empty());
    }

    #[test]
    fn a_change_that_reads_show_and_nobody_told_is_found() {
        let found = judged(vec![told(2, &["/a"])]);
        assert!(found.iter().any(|said| said.contains("not told that /b changed at revision 3")), "{found:?}");
    }

    #[test]
    fn a_gap_a_repeat_a_torn_revision_and_an_event_of_nobody_are_found() {
        assert!(
            judged(vec![told(3, &["/a", "/b"]), told(5, &["/c"])])
                .iter()
                .any(|said| said.contains("missed revision 2"))
        );
        assert!(judged(vec![told(2, &["/a"]), told(5, &["/c"])]).iter().any(|said| said.contains("missed revision 3")));
        assert!(
            judged(vec![told(2, &["/a"]), told(2, &["/a"])]).iter().any(|said| said.contains("revision 2 after 2"))
        );
        assert!(judged(vec![told(2, &["/a"]), told(3, &["/a"])]).iter().any(|said| said.contains("at revision 3")));
        assert!(!judged(vec![told(2, &["/a"]), told(3, &["/a", "/b"]), told(4, &["/d"]), told(5, &["/c"])]).is_empty());
    }
}
