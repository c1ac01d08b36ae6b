//! docs/CLI.md says what the program says. With ARES_WRITE_DOCS set, its generated parts are written instead.

mod cluster;

use std::path::Path;

use cluster::{ares, run};

#[test]
fn the_page_has_the_codes_variables_and_reasons_of_the_program() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/CLI.md");
    let page = std::fs::read_to_string(&path).expect("docs/CLI.md is there");
    let help = |topic: &str| format!("```text\n{}```\n", run(ares(&["help", topic])).ok().out);
    let mut wanted = page.clone();
    for (mark, text) in [
        ("exit-codes", help("exit-codes")),
        ("environment", help("environment")),
        ("why", codes()),
        ("reasons", reasons()),
    ] {
        wanted = with_part(&wanted, mark, &text);
    }
    if std::env::var_os("ARES_WRITE_DOCS").is_some() {
        std::fs::write(&path, &wanted).expect("docs/CLI.md is written");
        return;
    }
    assert!(
        page == wanted,
        "docs/CLI.md is behind the program: run this test with ARES_WRITE_DOCS=1 and look at the change"
    );
}

#[test]
fn every_command_and_topic_has_help() {
    let top = run(ares(&["help"])).ok();
    let names = top.out.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names: Vec<&str> =
        names.filter(|line| !line.starts_with("   ")).filter_map(|line| line.split_whitespace().next()).collect();
    assert!(names.len() >= 19 && names.contains(&"dev"), "{names:?}");
    let page = include_str!("../../docs/CLI.md");
    for name in names {
        run(ares(&["help", name])).ok().shows(&[&format!("Usage: ares {name}")]);
        assert_eq!(run(ares(&["help", name])).out, run(ares(&[name, "-h"])).ok().out);
        assert!(page.contains(&format!("`{name}")), "docs/CLI.md does not tell of {name}");
    }
    run(ares(&["help", "lock", "run"])).ok().shows(&["Usage: ares lock run"]);
}

/// A variable's flag is promised beside it: the flag is there.
#[test]
fn every_flag_beside_a_variable_exists() {
    let environment = run(ares(&["help", "environment"])).ok().out;
    let flags: Vec<&str> = environment.split_whitespace().filter(|word| word.starts_with("--")).collect();
    assert!(flags.len() >= 7, "{flags:?}");
    let helps = ["submit", "server", "agent"].map(|command| run(ares(&[command, "--help"])).ok().out);
    for flag in flags {
        let named = |help: &String| help.split_whitespace().any(|word| word == flag);
        assert!(helps.iter().any(named), "no command has {flag}");
    }
}

/// The page with the part behind this mark replaced, up to the next heading or the end.
fn with_part(page: &str, mark: &str, text: &str) -> String {
    let mark = format!("<!-- {mark} -->\n");
    let (before, after) = page.split_once(&mark).unwrap_or_else(|| panic!("docs/CLI.md has no {mark:?}"));
    let rest = after.find("\n## ").map(|at| &after[at..]).unwrap_or_default();
    format!("{before}{mark}{text}{rest}")
}

fn codes() -> String {
    let mut table = "| code | what keeps the job waiting | what to do |\n|---|---|---|\n".to_owned();
    for (code, meaning, advice) in scheduling::reason::CODES {
        table.push_str(&format!("| {code} | {meaning} | {advice} |\n"));
    }
    table
}

fn reasons() -> String {
    let mut table = "| reason | status | what to do |\n|---|---|---|\n".to_owned();
    for reason in proto::reason::ALL {
        table.push_str(&format!("| {} | {:?} | {} |\n", reason.name, reason.code, reason.advice));
    }
    table
}
