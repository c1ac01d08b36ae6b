//! `ares simulate`: what it prints and writes, and what it says to files that are wrong.

mod cluster;

use std::fs;
use std::path::{Path, PathBuf};

use cluster::{Ran, ares, run};
use serde_json::Value;

const JOBS: &str = "id,submit_s,duration_s,gpus,requested_s,tenant\n\
                    a,0,100,6,100,x\nb,1,50,8,50,x\nc,2,90,4,99,y\nd,3,20,2,200,y\ne,4,20,2,96,x\n";
const NODES: &str = "name,gpus\nn,10\n";

/// A directory with both lists.
struct Lists(tempfile::TempDir);

impl Lists {
    fn of(jobs: &str, nodes: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("jobs.csv"), jobs).expect("written");
        fs::write(dir.path().join("nodes.csv"), nodes).expect("written");
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn simulate(&self, args: &[&str]) -> Ran {
        simulate(&self.path("jobs.csv"), &self.path("nodes.csv"), args)
    }
}

fn simulate(jobs: &Path, nodes: &Path, args: &[&str]) -> Ran {
    let files = ["simulate", "--jobs", jobs.to_str().expect("text"), "--nodes", nodes.to_str().expect("text")];
    run(ares(&[&files, args].concat()))
}

#[test]
fn one_policy_is_an_object_and_several_stand_side_by_side() {
    let lists = Lists::of(JOBS, NODES);
    let easy = lists.simulate(&["--policy", "easy", "--seed", "3", "-o", "json"]).json();
    let is = |key: &str, value: Value| assert_eq!(easy[key], value, "{key} of {easy}");
    is("policy", "easy".into());
    is("seed", 3.into());
    is("jobs", 5.into());
    is("preemptions", 0.into());
    // Waits 0, 99, 148, 0, 0 and runs 100, 50, 90, 20, 20.
    is("wait_mean_s", 49.4.into());
    is("jct_mean_s", 105.4.into());
    is("jct_p99_s", 238.0.into());
    is("makespan_s", 240.0.into());
    is("bounded_slowdown_max", 2.98.into());
    is("bounded_slowdown_mean", 1.724.into());
    assert!(easy["planner_s"].is_f64() && easy["jain_tenants"].is_f64(), "{easy}");

    let both = lists.simulate(&["--policy", "fifo", "--policy", "fifo-skip", "-o", "json"]).json();
    let names: Vec<&str> = both.as_array().expect("a list").iter().filter_map(|one| one["policy"].as_str()).collect();
    assert_eq!(names, ["fifo", "fifo-skip"]);
    lists.simulate(&["--policy", "easy", "--policy", "default"]).ok().shows(&[
        "POLICY",
        "WAIT MEAN",
        "easy",
        "default",
    ]);
    lists.simulate(&["-o", "name"]).ok().shows(&["default"]);
}

#[test]
fn a_pool_of_tenants_tells_what_they_lacked() {
    let nodes = "name,gpus,gpu_type\nm,5,x\nn,5,y\n";
    let lists = Lists::of("id,submit_s,duration_s,gpus,tenant\na,0,9000,10,x\nb,2000,100,5,y\nc,2000,100,5,x\n", nodes);
    // Without preemption y lacks its 5 GPUs for 7,000 s, of 91,000 GPU seconds demanded.
    let pooled = lists.simulate(&["--pooled", "--policy", "default", "--policy", "fifo-skip", "-o", "json"]).json();
    assert_eq!((&pooled[0]["shortfall_pct"], &pooled[0]["preemptions"]), (&0.0.into(), &1.into()));
    assert_eq!(pooled[1]["shortfall_pct"], 38.46);
    lists.simulate(&["--pooled"]).ok().shows(&["SHORTFALL", "0.00 %"]);
    let apart = lists.simulate(&["-o", "json"]).json();
    assert_eq!((&apart["never_started"], apart.get("shortfall_pct")), (&1.into(), None));
    lists.simulate(&[]).ok().says(&["1 jobs fit on no machine of the list"]);
}

#[test]
fn waits_are_written_for_each_job() {
    let lists = Lists::of(JOBS, NODES);
    let written = lists.path("waits.csv");
    let path = written.to_str().expect("text");
    lists.simulate(&["--policy", "easy", "--waits", path]).ok();
    assert_eq!(fs::read_to_string(&written).expect("written"), "id,wait_s\na,0\nb,99\nc,148\nd,0\ne,0\n");
    lists.simulate(&["--policy", "easy", "--policy", "fifo", "--waits", path]).ok();
    let text = fs::read_to_string(&written).expect("written");
    assert!(text.starts_with("id,wait_s:easy,wait_s:fifo\na,0,0\nb,99,99\n"), "{text}");
}

#[test]
fn a_cluster_is_filled_until_nothing_fits() {
    let lists = Lists::of("id,submit_s,duration_s,gpus\na,0,1,3\nb,0,1,1\n", "name,gpus\nm,4\nn,4\n");
    let filled = lists.simulate(&["--policy", "best-fit", "--saturate", "1.3", "-o", "json"]).json();
    assert_eq!((&filled["jct_mean_s"], &filled["preemptions"]), (&Value::Null, &0.into()));
    let alloc = filled["alloc_pct"].as_object().expect("by percent");
    assert!(alloc.contains_key("100") && alloc.contains_key("130"), "{filled}");
    assert!(alloc["130"].as_f64().is_some_and(|percent| (75.0..=100.0).contains(&percent)), "{filled}");
}

#[test]
fn the_page_stands_alone() {
    let lists = Lists::of(JOBS, NODES);
    let page = lists.simulate(&["--policy", "easy", "--policy", "default", "-o", "html"]).ok().out;
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"), "{page}");
    assert_eq!(page.matches("<svg").count(), 7);
    assert!(!page.contains("<script") && !page.contains("http"), "nothing from elsewhere");
    let filled = lists.simulate(&["--saturate", "1", "-o", "html"]).ok().out;
    assert_eq!(filled.matches("<svg").count(), 2);
    run(ares(&["queue", "-o", "html"])).refused(2, &["only ares simulate has -o html"]);
}

#[test]
fn wrong_input_is_named_with_file_line_and_column() {
    let wrong = |jobs: &str, words: &[&str]| {
        let lists = Lists::of(jobs, NODES);
        lists.simulate(&[]).refused(2, &[&["jobs.csv, line "], words].concat());
    };
    wrong("id,submit_s,duration_s,gpus\na,0,5,many\n", &["line 2, column gpus: \"many\" is not a number"]);
    wrong("id,submit_s,duration_s,gpus\na,0,5,1\nb,,5,1\n", &["line 3, column submit_s: it is empty"]);
    wrong("id,submit_s,duration_s,gpus\na,0,,1\n", &["line 2, column duration_s: it is empty"]);
    wrong("id,submit_s,duration_s,gpus\n,0,5,1\n", &["line 2, column id: it is empty"]);
    wrong("id,submit_s,gpus\n", &["line 1, column duration_s: the head line does not have it"]);
    wrong("id,submit_s,duration_s,gpus\na,0,5,1,7\n", &["line 2", "5 fields, the head line names 4"]);
    Lists::of(JOBS, "name,gpus\nn,\n").simulate(&[]).refused(2, &["nodes.csv, line 2, column gpus"]);
    Lists::of("id,submit_s,duration_s,gpus\n", NODES).simulate(&[]).refused(2, &["has no job to run"]);
    Lists::of(JOBS, "name,gpus\n").simulate(&[]).refused(2, &["nodes.csv", "no machine"]);

    let lists = Lists::of(JOBS, NODES);
    simulate(Path::new("/nowhere/jobs.csv"), &lists.path("nodes.csv"), &[])
        .refused(3, &["/nowhere/jobs.csv can't be read"]);
    fs::write(lists.path("jobs.csv"), b"id,submit_s\n\xff\xfe").expect("written");
    lists.simulate(&[]).refused(2, &["jobs.csv, line 2", "not UTF-8"]);
    lists.simulate(&["--policy", "best"]).misused(&["no policy has this name; there are default, ratio, easy"]);
    lists.simulate(&["--saturate", "1.333"]).misused(&["such as 1.3"]);
}

/// The published waits through the command, packed as they come.
#[test]
fn published_waits_through_the_command() {
    let Some(data) = std::env::var_os("ARES_TEST_DATA").map(|data| PathBuf::from(data).join("traces")) else {
        eprintln!("SKIPPED: published_waits_through_the_command: ARES_TEST_DATA is not set, no log was read");
        return;
    };
    let lists = Lists::of(JOBS, NODES);
    let written = lists.path("waits.csv");
    let args = ["--policy", "easy", "--waits", written.to_str().expect("text"), "-o", "json"];
    let figures = simulate(&data.join("kth-sp2.jobs.csv.gz"), &data.join("kth-sp2.nodes.csv"), &args).json();
    let slowdown = figures["bounded_slowdown_mean"].as_f64().expect("a number");
    assert!((slowdown - 92.577).abs() < 0.09, "{figures}");
    let packed = data.join("kth-sp2.easy-waits.csv.gz");
    let unpacked = std::process::Command::new("gzip").arg("-dc").arg(packed).output().expect("gzip").stdout;
    let published = String::from_utf8(unpacked).expect("text");
    let ours = fs::read_to_string(written).expect("written");
    let equal = ours.lines().zip(published.lines()).filter(|(ours, published)| ours == published).count();
    assert_eq!(published.lines().count(), 28_482);
    assert!(equal >= 28_453, "{equal} of 28,482 lines agree");
}
