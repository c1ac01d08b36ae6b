//! `ares fence`: files, directories and steps of a script that refuse an older attempt. It asks no replica: the record of
//! the highest token lies beside the target.

use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use gpu_agent::fencing::{Error, Held, Target, remove};
use serde_json::json;

use super::spec::duration_ms;
use crate::Global;
use crate::exit::{CONFLICT, FAILURE, Failure, NOT_FOUND, Outcome, TIMED_OUT};
use crate::output::{self, Format};

/// What `publish` tells its command: where to make the new file or directory.
const NEW: &str = "ARES_PUBLISH_PATH";

#[derive(Debug, clap::Args)]
#[command(after_help = "\
The token is ARES_FENCING_TOKEN, which every attempt of a job has; a later attempt's is higher. The highest one that a \
PATH has seen stands in .NAME.fence beside it, synced to disk. An older token is refused with exit code 5, and nothing \
is changed. All attempts must see the same PATH, on a file system that shares flock(2) between its machines (local \
disks, NFS, Lustre with -o flock); where it does not, only attempts on one machine exclude each other. One PATH belongs \
to one job, or to jobs of one cluster that take turns.")]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Run one step of a script that no older attempt may begin, and none may overlap
    Run {
        #[command(flatten)]
        fence: Fence,
        /// The command and its arguments; it takes this process' place
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Let a command make the new PATH at $ARES_PUBLISH_PATH, then put it in place whole, unless a later attempt came
    Publish {
        #[command(flatten)]
        fence: Fence,
        /// Put this file or directory (of the same file system) in place, instead of what a command makes
        #[arg(long, value_name = "PATH", conflicts_with = "command")]
        from: Option<PathBuf>,
        /// The command and its arguments
        #[arg(last = true, required_unless_present = "from", value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// Has a later attempt come? Exit code 5 when it has; changes nothing
    Check {
        #[command(flatten)]
        fence: Fence,
    },
    /// The highest token that PATH has seen
    Show {
        /// The file or directory
        path: PathBuf,
    },
}

#[derive(Debug, clap::Args)]
struct Fence {
    /// The file or directory; it need not exist, its parent must
    path: PathBuf,
    /// The token of this attempt
    #[arg(long, env = "ARES_FENCING_TOKEN", hide_env_values = true, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    token: u64,
    /// Give up when another step holds PATH for longer than this [default: wait]
    #[arg(long, value_name = "TIME")]
    wait: Option<String>,
}

pub fn run(args: Args, global: Global) -> Outcome {
    match args.verb {
        Verb::Run { fence, command } => step(&fence, &command),
        Verb::Publish { fence, from: Some(from), .. } => publish(&fence, &from),
        Verb::Publish { fence, from: None, command } => make_and_publish(&fence, &command),
        Verb::Check { fence } => {
            fence.target()?.check(fence.token)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Show { path } => show(&path, global.output),
    }
}

impl Fence {
    fn target(&self) -> Result<Target, Failure> {
        Ok(Target::at(&self.path)?)
    }

    fn admit(&self) -> Result<Held, Failure> {
        let wait = self.wait.as_deref().map(|text| duration_ms("--wait", text)).transpose()?;
        Ok(self.target()?.admit(self.token, wait.map(Duration::from_millis))?)
    }
}

/// The lock goes on to the command: it is held as long as one of its processes keeps it.
fn step(fence: &Fence, command: &[String]) -> Outcome {
    let held = fence.admit()?;
    rustix::io::fcntl_setfd(held.as_fd(), rustix::io::FdFlags::empty()).map_err(std::io::Error::from)?;
    let error = Command::new(&command[0]).args(&command[1..]).exec();
    Err(not_started(&command[0], &error))
}

fn publish(fence: &Fence, new: &Path) -> Outcome {
    if new.symlink_metadata().is_err() {
        return Err(Failure::new(NOT_FOUND, format!("{} is not there to publish", new.display())));
    }
    fence.admit()?.publish(new)?;
    Ok(ExitCode::SUCCESS)
}

/// The lock is not held while the command works: a later attempt need not wait for this one, which is refused at the end.
fn make_and_publish(fence: &Fence, command: &[String]) -> Outcome {
    drop(fence.admit()?);
    let new = fence.target()?.staging(fence.token);
    remove(&new)?;
    let outcome = make(fence, &new, command);
    let outcome = outcome.and_then(|code| if code == 0 { publish(fence, &new) } else { Ok(code.into()) });
    if outcome.as_ref().is_ok_and(|code| *code != ExitCode::SUCCESS) || outcome.is_err() {
        // What was not published is nobody's.
        remove(&new)?;
    }
    outcome
}

fn make(fence: &Fence, new: &Path, command: &[String]) -> Result<u8, Failure> {
    let status = Command::new(&command[0]).args(&command[1..]).env(NEW, new).status();
    let status = status.map_err(|error| not_started(&command[0], &error))?;
    // A later attempt removes what this one prepares: that is why it failed, then.
    fence.target()?.check(fence.token)?;
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    if code == 0 && new.symlink_metadata().is_err() {
        return Err(Failure::new(FAILURE, format!("the command made nothing at ${NEW}: {}", new.display()))
            .advise("let it write a file or a directory of that name"));
    }
    Ok((code & 0xff) as u8)
}

fn not_started(program: &str, error: &std::io::Error) -> Failure {
    Failure::new(NOT_FOUND, format!("{program}: {error}"))
}

fn show(path: &Path, format: Format) -> Outcome {
    let target = Target::at(path)?;
    let highest = target.highest()?;
    match (format, highest) {
        (Format::Table | Format::Name, Some(token)) => println!("{token}"),
        (Format::Table | Format::Name, None) => println!("no token yet"),
        _ => output::json(&json!({
            "path": target.path(),
            "record": target.record_path(),
            "token": highest.map(|token| token.to_string()),
        })),
    }
    Ok(ExitCode::SUCCESS)
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (code, advice) = match &error {
            Error::Stale { .. } => (CONFLICT, "end this attempt: what it would write is out of date"),
            Error::Locked { .. } => {
                (TIMED_OUT, "another attempt's step is still at work there; wait longer, or without limit")
            }
            Error::Damaged { .. } => (CONFLICT, ""),
            Error::BadTarget { .. } => (crate::exit::USAGE, "name the file or directory that the attempts share"),
            Error::Io { .. } => (FAILURE, "its directory must exist, and be writable for this user"),
        };
        let reason = if matches!(error, Error::Stale { .. }) { proto::reason::TOKEN_STALE.name } else { "" };
        Failure { reason: reason.to_owned(), ..Failure::new(code, error.to_string()).advise(advice) }
    }
}
