//! `ares fence` as scripts use it: two attempts of a job, of which the older comes late.

use std::path::Path;
use std::process::{Command, Output};

fn ares(token: u64, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ares"));
    command.args(args).env("ARES_FENCING_TOKEN", token.to_string());
    command
}

fn run(token: u64, args: &[&str]) -> Output {
    ares(token, args).output().expect("ares starts")
}

fn refused(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.trim_end().lines().count(), 1, "one paragraph: {text}");
    assert!(text.contains("[TOKEN_STALE]") && text.contains("nothing was changed"), "{text}");
    text
}

const MAKE: [&str; 4] =
    ["--", "sh", "-c", "mkdir \"$ARES_PUBLISH_PATH\" && echo $ARES_FENCING_TOKEN > \"$ARES_PUBLISH_PATH/by\""];

fn publish(token: u64, path: &str) -> Output {
    run(token, &[&["fence", "publish", path] as &[&str], &MAKE].concat())
}

#[test]
fn an_older_attempt_can_neither_publish_nor_run_a_step() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model dir");
    let target = path.to_str().expect("UTF-8");
    assert!(publish(7, target).status.success());
    assert!(publish(9, target).status.success());
    let text = refused(&publish(7, target));
    assert!(text.contains("token 7 is older than 9"), "{text}");
    assert_eq!(std::fs::read_to_string(path.join("by")).expect("published"), "9\n");
    let mark = dir.path().join("mark");
    refused(&run(8, &["fence", "run", target, "--", "touch", mark.to_str().expect("UTF-8")]));
    assert!(!mark.exists());
    refused(&run(8, &["fence", "check", target]));
    assert!(run(9, &["fence", "check", target]).status.success());
    assert_eq!(run(1, &["fence", "show", target]).stdout, b"9\n");
    assert_eq!(run(10, &["fence", "run", target, "--", "sh", "-c", "exit 42"]).status.code(), Some(42));
    refused(&publish(9, target));
}

#[test]
fn an_attempt_overtaken_while_it_prepares_does_not_publish() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model");
    let target = path.to_str().expect("UTF-8");
    let late =
        "echo late > \"$ARES_PUBLISH_PATH\"; touch \"$0.prepared\"; while [ ! -e \"$0.go\" ]; do sleep 0.02; done";
    let mut old = ares(7, &["fence", "publish", target, "--", "sh", "-c", late, target]);
    let old = old.stderr(std::process::Stdio::piped()).spawn().expect("ares starts");
    wait_for(&dir.path().join("model.prepared"));
    assert!(publish(8, target).status.success(), "the newer one need not wait");
    std::fs::write(dir.path().join("model.go"), "").expect("written");
    refused(&old.wait_with_output().expect("it ends"));
    assert_eq!(std::fs::read_to_string(path.join("by")).expect("published"), "8\n");
}

#[test]
fn a_step_keeps_the_lock_until_its_last_process_is_gone() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model");
    let target = path.to_str().expect("UTF-8");
    // The step's own process ends at once, and leaves one behind.
    let behind = "while [ ! -e \"$0.go\" ]; do sleep 0.02; done > /dev/null 2>&1 & exit 0";
    assert!(run(7, &["fence", "run", target, "--", "sh", "-c", behind, target]).status.success());
    let locked = run(8, &["fence", "run", target, "--wait", "100ms", "--", "true"]);
    assert_eq!(locked.status.code(), Some(7), "{locked:?}");
    std::fs::write(dir.path().join("model.go"), "").expect("written");
    assert!(run(8, &["fence", "run", target, "--wait", "20s", "--", "true"]).status.success());
}

#[test]
fn wrong_uses_say_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let target = dir.path().join("x");
    let target = target.to_str().expect("UTF-8");
    let nothing = run(5, &["fence", "publish", target, "--", "true"]);
    assert!(String::from_utf8_lossy(&nothing.stderr).contains("ARES_PUBLISH_PATH"), "{nothing:?}");
    assert_eq!(run(5, &["fence", "publish", target, "--", "sh", "-c", "exit 9"]).status.code(), Some(9));
    let mut tokenless = ares(1, &["fence", "check", target]);
    let tokenless = tokenless.env_remove("ARES_FENCING_TOKEN").output().expect("ares starts");
    assert_eq!(tokenless.status.code(), Some(2), "{tokenless:?}");
    let nowhere = run(5, &["fence", "run", "/nowhere/at/all", "--", "true"]);
    assert!(
        !nowhere.status.success() && String::from_utf8_lossy(&nowhere.stderr).contains("/nowhere/at"),
        "{nowhere:?}"
    );
    assert_eq!(run(0, &["fence", "check", target]).status.code(), Some(2));
}

/// The example, as two attempts run it: the first stops half-way, the second goes on, and then the first wakes up.
#[test]
fn the_example_goes_on_where_it_was_and_refuses_the_late_attempt() {
    let dir = tempfile::tempdir().expect("a directory");
    let model = dir.path().join("model");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/checkpoint/train.sh");
    let attempt = |token: u64, steps: u32, step_seconds: &str| {
        let mut command = Command::new("sh");
        command.arg(script).arg(&model).env("ARES", env!("CARGO_BIN_EXE_ares"));
        command.env("ARES_FENCING_TOKEN", token.to_string()).env("ARES_ATTEMPT", token.to_string());
        command.env("STEPS", steps.to_string()).env("STEP_SECONDS", step_seconds);
        command.output().expect("sh starts")
    };
    assert!(attempt(1, 2, "0").status.success());
    let second = attempt(2, 4, "0");
    let said = String::from_utf8_lossy(&second.stdout).into_owned();
    assert!(second.status.success() && said.contains("attempt 2 goes on at step 2"), "{second:?}");
    let late = attempt(1, 9, "0");
    refused(&late);
    assert_eq!(std::fs::read_to_string(model.join("step")).expect("a checkpoint"), "4\n");
}

fn wait_for(path: &Path) {
    let began = std::time::Instant::now();
    while !path.exists() {
        assert!(began.elapsed().as_secs() < 20, "{} never came", path.display());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
