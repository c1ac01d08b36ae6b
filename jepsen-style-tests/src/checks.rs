//! What must hold of the replicas after faults, by the names of the invariants. Each check says what it found wrong, as
//! a text a person can follow; nothing here injects or repairs anything.

use std::collections::BTreeMap;

use proto::{Client, v1};

use crate::cluster::Cluster;
use crate::load::Ack;

/// `nothing_lost`: every acknowledged job is found by a linearizable read at every running replica.
pub async fn nothing_lost(cluster: &Cluster, acks: &[Ack]) -> Result<(), String> {
    for at in cluster.running_replicas() {
        let found = keys(&cluster.client_at(at), "/jobs/", true, v1::ReadMode::Linearizable).await?;
        let missing: Vec<u64> =
            acks.iter().map(|ack| ack.job_id).filter(|id| !found.pairs.contains_key(&format!("/jobs/{id}"))).collect();
        if let Some(first) = missing.first() {
            return Err(format!(
                "nothing_lost: replica {at} lacks {} of {} acknowledged jobs, the first is {first}",
                missing.len(),
                acks.len()
            ));
        }
    }
    Ok(())
}

/// `request_once`: each of these submissions, sent again, answers with the same job.
pub async fn request_once(client: &Client, acks: &[Ack]) -> Result<(), String> {
    for ack in acks {
        let again = client.submit_job(ack.request.clone()).await;
        let again = again.map_err(|error| format!("a submission that is sent again is not answered: {error}"))?;
        if again.job_id != ack.job_id || !again.replayed {
            return Err(format!(
                "request_once: a request id that was acknowledged as job {} is job {} when it is sent again",
                ack.job_id, again.job_id
            ));
        }
    }
    Ok(())
}

/// `replicas_equal`: once they have applied the same index, all running replicas show the same keyspace, byte for byte,
/// and digests that were published at one index are one.
pub async fn replicas_equal(cluster: &Cluster, digests: &mut Digests) -> Result<(), String> {
    let mut first: Option<(usize, Keys)> = None;
    cluster.try_settle().await?;
    for at in cluster.running_replicas() {
        digests.see(cluster, at).await?;
        let found = keys(&cluster.client_at(at), "/", false, v1::ReadMode::Stale).await?;
        let Some((other, known)) = &first else {
            first = Some((at, found));
            continue;
        };
        if found.revision != known.revision {
            return Err(format!(
                "the replicas have not settled: {other} is at revision {}, {at} at {}",
                known.revision, found.revision
            ));
        }
        if let Some(key) = first_difference(&known.pairs, &found.pairs) {
            return Err(format!(
                "replicas_equal: {key} differs at revision {}: replica {other} has {:?}, replica {at} has {:?}",
                found.revision,
                known.pairs.get(&key),
                found.pairs.get(&key)
            ));
        }
    }
    Ok(())
}

fn first_difference(one: &BTreeMap<String, String>, other: &BTreeMap<String, String>) -> Option<String> {
    let differs = |key: &&String| one.get(*key) != other.get(*key);
    one.keys().chain(other.keys()).find(differs).cloned()
}

/// Digests by the index at which they were published, over a whole run: replicas publish at the same indexes, and a
/// replica that replays its log publishes the same again.
#[derive(Debug, Default)]
pub struct Digests {
    published: BTreeMap<u64, (usize, String)>,
}

impl Digests {
    /// Notes what a replica publishes; an error if it differs from what was published at that index before.
    pub async fn see(&mut self, cluster: &Cluster, at: usize) -> Result<(), String> {
        let status = cluster.status(at).await.map_err(|error| format!("replica {at} does not answer: {error}"))?;
        if status.digest.is_empty() {
            return Ok(());
        }
        self.add(at, status.digest_index, status.digest)
    }

    fn add(&mut self, at: usize, index: u64, digest: String) -> Result<(), String> {
        let (first, known) = self.published.entry(index).or_insert_with(|| (at, digest.clone()));
        if *known == digest {
            return Ok(());
        }
        Err(format!("replicas_equal: at index {index} replica {first} published {known}, replica {at} {digest}"))
    }

    /// Indexes with a digest.
    pub fn count(&self) -> usize {
        self.published.len()
    }
}

/// Keys with values (empty without them), and the revision at which they were read.
#[derive(Debug)]
pub struct Keys {
    pub pairs: BTreeMap<String, String>,
    pub revision: u64,
}

/// All keys below a prefix. Of the replica behind the client; several pages are of one revision only while nothing
/// changes.
pub async fn keys(client: &Client, prefix: &str, keys_only: bool, read: v1::ReadMode) -> Result<Keys, String> {
    let mut found = Keys { pairs: BTreeMap::new(), revision: 0 };
    let mut after = String::new();
    loop {
        let request = v1::GetRequest {
            key: prefix.to_owned(),
            prefix: true,
            keys_only,
            limit: 10_000,
            after: after.clone(),
            read: read as i32,
        };
        let reply = client.get(request).await.map_err(|error| format!("{prefix} can't be read: {error}"))?;
        found.revision = reply.revision;
        after = reply.kvs.last().map(|kv| kv.key.clone()).unwrap_or_default();
        // The revisions belong to what must be equal.
        let shown = |kv: v1::KeyValue| (kv.key, format!("{} {} {}", kv.create_revision, kv.mod_revision, kv.value));
        found.pairs.extend(reply.kvs.into_iter().map(shown));
        if !reply.more {
            return Ok(found);
        }
    }
}

/// Jobs that a linearizable read finds.
pub async fn count_jobs(client: &Client) -> Result<usize, String> {
    Ok(keys(client, "/jobs/", true, v1::ReadMode::Linearizable).await?.pairs.len())
}

/// A token minted now: of a lock that is acquired and released at once.
pub async fn mint_token(client: &Client) -> Result<u64, proto::Error> {
    let open = v1::OpenSessionRequest { request_id: proto::request_id(), owner: "mint".into(), ttl_ms: 60_000 };
    let session_id = client.open_session(open).await?.session_id;
    let name = format!("mint-{session_id}");
    let acquire = v1::AcquireRequest { request_id: proto::request_id(), session_id, name };
    let token = client.acquire(acquire).await?.token;
    let end = v1::EndSessionRequest { request_id: proto::request_id(), session_id };
    client.end_session(end).await?;
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_digest_at_one_index_must_be_the_first() {
        let mut digests = Digests::default();
        digests.add(0, 4_096, "a".into()).expect("the first");
        digests.add(1, 4_096, "a".into()).expect("the same");
        digests.add(1, 8_192, "b".into()).expect("another index");
        let wrong = digests.add(2, 4_096, "b".into()).expect_err("it differs");
        assert!(wrong.contains("index 4096"), "{wrong}");
        assert_eq!(digests.count(), 2);
    }

    #[test]
    fn a_key_that_is_missing_or_another_is_a_difference() {
        let one = BTreeMap::from([("/a".to_owned(), "1".to_owned()), ("/b".to_owned(), "2".to_owned())]);
        assert_eq!(first_difference(&one, &one.clone()), None);
        let mut other = one.clone();
        other.insert("/c".to_owned(), "3".to_owned());
        assert_eq!(first_difference(&one, &other).as_deref(), Some("/c"));
        other.remove("/c");
        other.insert("/b".to_owned(), "9".to_owned());
        assert_eq!(first_difference(&one, &other).as_deref(), Some("/b"));
    }
}
