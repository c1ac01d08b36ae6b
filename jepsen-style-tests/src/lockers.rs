//! Clients of user locks, each section a `begin` and an `end` in a file of the lock. Locks of lasting sessions must exclude: their calls
//! are in the history, and no two sections may overlap. Sessions of 2 s that fall silent for 5 s lose their locks in the middle of a
//! section: there the overlap is measured, and the fence at a second file must refuse each late write.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use gpu_agent::fencing;
use proto::{Client, v1};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::history::{History, RETIRED};
use crate::verdict::Verdict;

/// Of each kind.
pub const LOCKERS: usize = 3;
/// A lock has another name after so many sections: no history is too long to be searched.
const SECTIONS_A_NAME: u64 = 20;
/// Who waits longer leaves the queue.
const PATIENCE: Duration = Duration::from_secs(15);
const SECTION: Duration = Duration::from_millis(60);
/// Longer than any run: such a session does not end by itself.
const LASTING_MS: u64 = 6 * 3_600_000;
const BRIEF_MS: u64 = 2_000;
/// How long a holder of a brief session falls silent, at times.
const SILENCE: Duration = Duration::from_secs(5);

pub struct Lockers {
    stop: Arc<AtomicBool>,
    clients: JoinSet<()>,
}

/// What all clients of one kind of session share.
struct Shared {
    dir: PathBuf,
    /// Begins the names of their locks.
    prefix: &'static str,
    ttl_ms: u64,
    sections: AtomicU64,
    stop: Arc<AtomicBool>,
    history: Arc<History>,
}

struct Locker {
    client: Client,
    shared: Arc<Shared>,
    process: usize,
    session: u64,
    rng: StdRng,
}

impl Lockers {
    /// Processes are numbered from `first`; files are left in `dir`.
    pub fn start(
        clients: &[Client],
        dir: &Path,
        history: &Arc<History>,
        first: usize,
        on: &tokio::runtime::Handle,
    ) -> Result<Self, String> {
        // What an earlier run left there is not this one's.
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir).map_err(|error| format!("{}: {error}", dir.display()))?;
        let mut lockers = Self { stop: Arc::default(), clients: JoinSet::new() };
        let mut process = first;
        for (prefix, ttl_ms) in [("lasting", LASTING_MS), ("brief", BRIEF_MS)] {
            let (stop, history) = (lockers.stop.clone(), history.clone());
            let shared = Shared { dir: dir.to_owned(), prefix, ttl_ms, sections: AtomicU64::new(0), stop, history };
            let shared = Arc::new(shared);
            for client in clients.iter().cycle().take(LOCKERS) {
                let rng = StdRng::seed_from_u64(process as u64);
                let locker = Locker { client: client.clone(), shared: shared.clone(), process, session: 0, rng };
                lockers.clients.spawn_on(locker.work(), on);
                process += 1;
            }
        }
        Ok(lockers)
    }

    pub async fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        while self.clients.join_next().await.is_some() {}
    }
}

impl Locker {
    async fn work(mut self) {
        while !self.shared.stop.load(Ordering::Relaxed) {
            if self.session == 0 && !self.open_session().await {
                tokio::time::sleep(Duration::from_millis(300)).await;
                continue;
            }
            let turn = self.shared.sections.fetch_add(1, Ordering::Relaxed);
            let name = format!("{}-{}", self.shared.prefix, turn / SECTIONS_A_NAME);
            let Some(token) = self.wait_for(&name).await else {
                self.give_back(&name, true).await;
                continue;
            };
            if let Err(error) = self.section(&name, token).await {
                self.shared.history.add("harness", "info", "section", &name, json!(error));
            }
            self.give_back(&name, false).await;
            tokio::time::sleep(Duration::from_millis(self.rng.random_range(0..300))).await;
        }
        if self.session != 0 {
            let end = v1::EndSessionRequest { request_id: proto::request_id(), session_id: self.session };
            let _ = self.client.end_session(end).await;
        }
    }

    async fn open_session(&mut self) -> bool {
        let open = v1::OpenSessionRequest {
            request_id: proto::request_id(),
            owner: format!("locker {}", self.process),
            ttl_ms: self.shared.ttl_ms,
        };
        self.session = self.client.open_session(open).await.map_or(0, |reply| reply.session_id);
        self.session != 0
    }

    /// Asks until the lock is its own: the token. `None`: it gives up, or does not know.
    async fn wait_for(&mut self, name: &str) -> Option<u64> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end && !self.shared.stop.load(Ordering::Relaxed) {
            let acquire =
                v1::AcquireRequest { request_id: proto::request_id(), session_id: self.session, name: name.to_owned() };
            let (client, session) = (self.client.clone(), self.session);
            let answer = self
                .call(
                    "acquire",
                    name,
                    json!({ "session": session }),
                    client.acquire(acquire),
                    |reply| json!({ "token": reply.token }),
                )
                .await?;
            if answer["token"] != 0 {
                return answer["token"].as_u64();
            }
            if self.shared.ttl_ms == BRIEF_MS {
                client.keep_alive(v1::KeepAliveRequest { session_id: session }).await.ok()?;
            }
            let validate = v1::ValidateRequest { name: name.to_owned(), token: 0 };
            self.call(
                "validate",
                name,
                json!({ "session": session }),
                client.validate(validate),
                |reply| json!({ "holder": reply.holder_token }),
            )
            .await?;
            tokio::time::sleep(Duration::from_millis(150)).await;
        }
        None
    }

    /// What the lock is for.
    async fn section(&mut self, name: &str, token: u64) -> Result<(), String> {
        let silent = self.shared.ttl_ms == BRIEF_MS && self.rng.random_range(0..4) == 0;
        let (file, fenced) = (self.shared.dir.join(name), self.shared.dir.join(format!("{name}.fenced")));
        append(&file, &format!("begin {token}"))?;
        tokio::time::sleep(if silent { SILENCE } else { SECTION }).await;
        let write = move || -> Result<&'static str, String> {
            let target = fencing::Target::at(&fenced).map_err(|error| error.to_string())?;
            match target.admit(token, Some(Duration::from_secs(10))) {
                Ok(held) => {
                    append(&fenced, &format!("{token}"))?;
                    drop(held);
                    Ok("end")
                }
                Err(fencing::Error::Stale { .. }) => Ok("refused"),
                Err(error) => Err(error.to_string()),
            }
        };
        let how = tokio::task::spawn_blocking(write).await.map_err(|error| error.to_string())??;
        append(&file, &format!("{how} {token}"))
    }

    /// Gives the lock back, or its place in the queue. A session that does not know where it stands ends, and its holder is another
    /// process from then on.
    async fn give_back(&mut self, name: &str, doubtful: bool) {
        let (client, session) = (self.client.clone(), self.session);
        if session == 0 {
            return;
        }
        let asked = json!({ "session": session });
        if !doubtful && self.shared.ttl_ms != BRIEF_MS {
            let release =
                v1::ReleaseRequest { request_id: proto::request_id(), session_id: session, name: name.to_owned() };
            if self.call("release", name, asked.clone(), client.release(release), |_| Value::Null).await.is_some() {
                return;
            }
        }
        // The end of a session gives back what it has.
        let end = v1::EndSessionRequest { request_id: proto::request_id(), session_id: session };
        self.session = 0;
        self.call("release", name, asked, client.end_session(end), |_| Value::Null).await;
    }

    /// One call, in the history if the lock's sessions last; `None`: refused, or of unknown outcome.
    async fn call<T>(
        &mut self,
        f: &str,
        name: &str,
        asked: Value,
        call: impl Future<Output = Result<T, proto::Error>>,
        shown: impl Fn(&T) -> Value,
    ) -> Option<Value> {
        let told = self.shared.ttl_ms == LASTING_MS;
        let add = |process: usize, kind: &str, value: Value| {
            if told {
                self.shared.history.add(process, kind, f, name, value);
            }
        };
        add(self.process, "invoke", asked);
        match call.await {
            Ok(reply) => {
                let value = shown(&reply);
                add(self.process, "ok", value.clone());
                Some(value)
            }
            Err(error) => {
                let refused = ["SESSION_UNKNOWN", "LOCK_NOT_HELD", "LIMIT"].contains(&error.reason());
                add(self.process, if refused { "fail" } else { "info" }, json!(error.to_string()));
                if !refused {
                    self.process += RETIRED;
                }
                None
            }
        }
    }
}

fn append(path: &Path, line: &str) -> Result<(), String> {
    let opened = OpenOptions::new().create(true).append(true).open(path);
    opened.and_then(|mut file| writeln!(file, "{line}")).map_err(|error| format!("{}: {error}", path.display()))
}

// -------------------------------------------------------------------------------------------------------------- judging

/// What the files of a run's locks add up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    pub sections: usize,
    /// Sections of brief sessions that began while another had not ended.
    pub overlaps: usize,
    /// Late writes that the fence refused.
    pub refused: usize,
}

/// Judges the files that the clients of locks left.
pub fn judge(dir: &Path, verdict: &mut Verdict) {
    match read(dir).and_then(|files| sums(&files)) {
        Err(violation) => verdict.violations.push(violation),
        Ok(sums) => {
            let Sums { sections, overlaps, refused } = sums;
            verdict.figure(
                "sections under locks",
                format!("{sections}; {overlaps} overlaps of ended sessions, {refused} late writes refused"),
            );
            if sections == 0 {
                verdict.empty.push("no lock was ever had".to_owned());
            }
        }
    }
}

fn read(dir: &Path) -> Result<BTreeMap<String, String>, String> {
    let wrong = |error: std::io::Error| format!("{}: {error}", dir.display());
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            files.insert(name, std::fs::read_to_string(entry.path()).map_err(wrong)?);
        }
    }
    Ok(files)
}

fn sums(files: &BTreeMap<String, String>) -> Result<Sums, String> {
    let mut sums = Sums::default();
    for (name, text) in files {
        if let Some(lock) = name.strip_suffix(".fenced") {
            fenced(lock, text)?;
        } else {
            sections(name, text, &mut sums)?;
        }
    }
    Ok(sums)
}

/// `token_grows` at a fence: whoever writes has the highest token so far.
fn fenced(lock: &str, text: &str) -> Result<(), String> {
    let mut highest = 0;
    for line in text.lines() {
        let token = line.parse::<u64>().map_err(|_| format!("{line:?} is no token"))?;
        if token < highest {
            return Err(format!(
                "token_grows: a write with token {token} passed the fence of lock {lock} after {highest}"
            ));
        }
        highest = token;
    }
    Ok(())
}

/// `lock_held`: sections of lasting sessions come one after the other, with growing tokens.
fn sections(name: &str, text: &str, sums: &mut Sums) -> Result<(), String> {
    let lasting = name.starts_with("lasting");
    let (mut open, mut highest): (Vec<u64>, u64) = (Vec::new(), 0);
    for line in text.lines() {
        let (word, token) = line.split_once(' ').ok_or_else(|| format!("{line:?} is no line of a lock"))?;
        let token = token.parse::<u64>().map_err(|_| format!("{line:?} names no token"))?;
        if word == "begin" {
            sums.sections += 1;
            if let (true, Some(other)) = (lasting, open.first()) {
                return Err(format!(
                    "lock_held: {name} was held with token {token} while its holder with {other} was at work"
                ));
            }
            if lasting && token <= highest {
                return Err(format!("token_grows: {name} was given with token {token} after {highest}"));
            }
            highest = highest.max(token);
            sums.overlaps += usize::from(!open.is_empty());
            open.push(token);
        } else {
            if lasting && word == "refused" {
                return Err(format!("lock_held: the holder of {name} with token {token} was refused at the fence"));
            }
            sums.refused += usize::from(word == "refused");
            open.retain(|other| *other != token);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(name: &str, text: &str) -> Result<Sums, String> {
        sums(&BTreeMap::from([(name.to_owned(), text.to_owned())]))
    }

    #[test]
    fn sections_one_after_the_other_pass() {
        let sums = judged("lasting-0", "begin 3\nend 3\nbegin 5\nend 5\n").expect("right");
        assert_eq!(sums, Sums { sections: 2, overlaps: 0, refused: 0 });
    }

    #[test]
    fn two_holders_and_tokens_that_fall_are_found() {
        assert!(judged("lasting-0", "begin 3\nbegin 5\nend 5\n").expect_err("both").starts_with("lock_held"));
        assert!(judged("lasting-0", "begin 5\nend 5\nbegin 4\n").expect_err("falls").starts_with("token_grows"));
        assert!(judged("lasting-0", "begin 5\nrefused 5\n").expect_err("refused").starts_with("lock_held"));
        assert!(judged("brief-0.fenced", "3\n5\n4\n").expect_err("passed").contains("token 4"));
    }

    #[test]
    fn overlaps_of_brief_sessions_are_counted() {
        let sums = judged("brief-0", "begin 3\nbegin 5\nend 5\nrefused 3\n").expect("measured");
        assert_eq!(sums, Sums { sections: 2, overlaps: 1, refused: 1 });
    }
}
