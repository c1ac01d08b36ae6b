//! `ares lock`: named locks. A lock ends with its session: what only the token does is keep a late writer out.

use std::process::ExitCode;
use std::time::Duration;

use proto::{Client, v1};
use serde_json::json;

use super::spec::duration_ms;
use crate::Global;
use crate::connect::{client, runtime, user};
use crate::exit::{CONFLICT, Failure, INTERRUPTED, NOT_FOUND, Outcome, TIMED_OUT, UNAVAILABLE};
use crate::output::{self, Format};
use crate::signals::Signals;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
A lock is a hint that ends with its session: a holder that is frozen or cut off loses it after the TTL and may not know.
The token is the exclusion: pass it with each write and let the storage refuse a lower one. For files, \
`ares fence run PATH --token $ARES_LOCK_TOKEN -- COMMAND` does that.")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Hold the lock while a command runs; it finds the token in ARES_LOCK_TOKEN
    Run {
        /// The lock, 1 to 256 bytes
        name: String,
        /// The session's life without contact
        #[arg(long, default_value = "15s", value_name = "TIME")]
        ttl: String,
        /// Give up waiting for the lock after this time
        #[arg(long, value_name = "TIME")]
        wait: Option<String>,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Open a session and acquire; prints session and token. Keep it alive with `keep-alive`
    Acquire {
        /// The lock, 1 to 256 bytes
        name: String,
        /// The session's life without contact
        #[arg(long, default_value = "60s", value_name = "TIME")]
        ttl: String,
        /// Give up waiting for the lock after this time
        #[arg(long, value_name = "TIME")]
        wait: Option<String>,
    },
    /// Extend a session
    KeepAlive {
        /// As acquire printed it
        session: u64,
    },
    /// Is this token the holder's? Exit code 5 when it is not
    Validate {
        /// The lock
        name: String,
        /// The token to judge
        token: u64,
    },
    /// Release a lock and end its session
    Release {
        /// The lock
        name: String,
        /// As acquire printed it
        session: u64,
    },
}

pub fn run(args: Args, global: Global) -> Outcome {
    let client = client(&global)?;
    runtime()?.block_on(async {
        match args.verb {
            Verb::Run { name, ttl, wait, command } => {
                let ttl_ms = duration_ms("--ttl", &ttl)?;
                hold_and_run(&client, &name, ttl_ms, wait_ms(wait)?, &command).await
            }
            Verb::Acquire { name, ttl, wait } => {
                let (ttl_ms, wait_ms) = (duration_ms("--ttl", &ttl)?, wait_ms(wait)?);
                let session_id = open(&client, ttl_ms).await?;
                let token = acquire(&client, session_id, &name, wait_ms).await?;
                match global.output {
                    Format::Table | Format::Name => println!("session {session_id} token {token}"),
                    _ => output::json(&json!({ "session": session_id, "token": token.to_string() })),
                }
                Ok(ExitCode::SUCCESS)
            }
            Verb::KeepAlive { session } => {
                let ttl_ms = client.keep_alive(v1::KeepAliveRequest { session_id: session }).await?.ttl_ms;
                if matches!(global.output, Format::Json | Format::Jsonl) {
                    output::json(&json!({ "session": session, "ttl_ms": ttl_ms }));
                }
                Ok(ExitCode::SUCCESS)
            }
            Verb::Validate { name, token } => {
                let reply = client.validate(v1::ValidateRequest { name: name.clone(), token }).await?;
                match global.output {
                    Format::Table | Format::Name => println!("{}", if reply.held { "held" } else { "not held" }),
                    _ => output::json(&json!({
                        "held": reply.held,
                        "holder_token": crate::json::token(reply.holder_token),
                        "revision": reply.revision,
                    })),
                }
                Ok(if reply.held { ExitCode::SUCCESS } else { ExitCode::from(CONFLICT) })
            }
            Verb::Release { name, session } => {
                release(&client, session, &name).await?;
                if matches!(global.output, Format::Json | Format::Jsonl) {
                    output::json(&json!({ "released": name, "session": session }));
                }
                Ok(ExitCode::SUCCESS)
            }
        }
    })
}

fn wait_ms(text: Option<String>) -> Result<Option<u64>, Failure> {
    text.map(|text| duration_ms("--wait", &text)).transpose()
}

async fn open(client: &Client, ttl_ms: u64) -> Result<u64, Failure> {
    let request = v1::OpenSessionRequest { request_id: proto::request_id(), owner: user(), ttl_ms };
    Ok(client.open_session(request).await?.session_id)
}

/// Waits in line while the session is kept alive; a session that gets nothing is ended.
async fn acquire(client: &Client, session_id: u64, name: &str, wait_ms: Option<u64>) -> Result<u64, Failure> {
    let waiting = stand_in_line(client, session_id, name);
    let answer = match wait_ms {
        None => waiting.await,
        Some(ms) => tokio::time::timeout(Duration::from_millis(ms), waiting).await.unwrap_or_else(|_| {
            let what = format!("lock {name:?} was not granted within {ms} ms");
            Err(Failure::new(TIMED_OUT, what).advise(format!("ares get /locks/{name} shows who holds it")))
        }),
    };
    if answer.is_err() {
        end_session(client, session_id).await;
    }
    answer
}

async fn stand_in_line(client: &Client, session_id: u64, name: &str) -> Result<u64, Failure> {
    let request = v1::AcquireRequest { request_id: proto::request_id(), session_id, name: name.to_owned() };
    let mut said = false;
    loop {
        let reply = client.acquire(request.clone()).await?;
        if reply.granted {
            return Ok(reply.token);
        }
        // The same id was answered with "in line"; who holds it now is a read.
        let holder = client.get(v1::GetRequest { key: format!("/locks/{name}"), ..Default::default() }).await?;
        if let Some(token) = holder.kvs.first().and_then(|kv| granted_to(&kv.value, session_id)) {
            return Ok(token);
        }
        if !said {
            eprintln!("Waiting for lock {name:?}.");
            said = true;
        }
        client.keep_alive(v1::KeepAliveRequest { session_id }).await?;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Lets go of all that a session has. One that can't be ended now ends with its TTL.
async fn end_session(client: &Client, session_id: u64) {
    let request = v1::EndSessionRequest { request_id: proto::request_id(), session_id };
    if let Err(error) = client.end_session(request).await {
        tracing::warn!(%error, session_id, "the session could not be ended");
    }
}

/// The token when the rendered lock says that this session holds it.
fn granted_to(value: &str, session_id: u64) -> Option<u64> {
    let lock: serde_json::Value = serde_json::from_str(value).ok()?;
    let holder = lock.get("holder")?;
    let session = holder.get("session")?;
    let ours = session.as_u64() == Some(session_id) || session.as_str() == Some(&session_id.to_string());
    ours.then(|| holder.get("token")?.as_str()?.parse().ok()).flatten()
}

async fn release(client: &Client, session_id: u64, name: &str) -> Result<(), Failure> {
    let release = v1::ReleaseRequest { request_id: proto::request_id(), session_id, name: name.to_owned() };
    client.release(release).await?;
    client.end_session(v1::EndSessionRequest { request_id: proto::request_id(), session_id }).await?;
    Ok(())
}

/// Runs the command under the lock; kills it when the session can no longer be kept.
async fn hold_and_run(client: &Client, name: &str, ttl_ms: u64, wait_ms: Option<u64>, command: &[String]) -> Outcome {
    let mut signals = Signals::listen()?;
    let session_id = open(client, ttl_ms).await?;
    let token = tokio::select! {
        token = acquire(client, session_id, name, wait_ms) => token?,
        code = signals.next() => {
            end_session(client, session_id).await;
            return Ok(ExitCode::from(code));
        }
    };
    eprintln!("Lock {name:?} held with token {token}.");
    let spawned = tokio::process::Command::new(&command[0])
        .args(&command[1..])
        .env("ARES_LOCK_NAME", name)
        .env("ARES_LOCK_TOKEN", token.to_string())
        .kill_on_drop(true)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            end_session(client, session_id).await;
            return Err(Failure::new(NOT_FOUND, format!("{}: {error}", command[0])).advise("the lock is released"));
        }
    };
    let keeping = keep(client, session_id, ttl_ms);
    tokio::pin!(keeping);
    let status = loop {
        tokio::select! {
            status = child.wait() => break status?,
            // The lock is held until the command has ended, which hears the signal too.
            code = signals.next() => pass_on(&child, code),
            failure = &mut keeping => {
                child.kill().await?;
                return Err(failure.advise("the command was killed, since the lock can no longer be assumed held"));
            }
        }
    };
    release(client, session_id, name).await?;
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(ExitCode::from((code & 0xff) as u8))
}

/// Sends the signal with this exit code on to the command.
fn pass_on(child: &tokio::process::Child, code: u8) {
    let signal = if code == INTERRUPTED { rustix::process::Signal::INT } else { rustix::process::Signal::TERM };
    if let Some(pid) = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid as i32)) {
        // It may be gone already: then its status comes next.
        let _ = rustix::process::kill_process(pid, signal);
    }
}

/// Keeps the session alive; returns when it can't be any more: refused, or unheard for a TTL since the last success.
async fn keep(client: &Client, session_id: u64, ttl_ms: u64) -> Failure {
    let ttl = Duration::from_millis(ttl_ms);
    let mut good = tokio::time::Instant::now();
    loop {
        tokio::time::sleep_until(good + ttl / 3).await;
        let sent = tokio::time::Instant::now();
        match tokio::time::timeout_at(good + ttl, client.keep_alive(v1::KeepAliveRequest { session_id })).await {
            Ok(Ok(_)) => good = sent,
            Ok(Err(error @ proto::Error::Refused { .. })) => return error.into(),
            Ok(Err(_)) if tokio::time::Instant::now() < good + ttl => continue,
            _ => return Failure::new(UNAVAILABLE, format!("session {session_id} could not be kept alive")),
        }
    }
}
