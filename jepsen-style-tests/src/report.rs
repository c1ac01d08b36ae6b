//! The page of a run, one file that needs nothing else: the verdict, what it rests on, and over one axis of time the faults, the rate and
//! the latency of calls, and each client's slow and unanswered ones. Made from the history's lines; it judges nothing.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::history::RETIRED;
use crate::reads;
use crate::verdict::Verdict;

const WIDTH: f64 = 1_080.0;
const LEFT: f64 = 90.0;
const PLOT: f64 = 130.0;
const LANE: f64 = 12.0;
/// Columns of a plot, at most.
const BINS: f64 = 540.0;
/// A call that took longer is shown in its client's lane.
const SLOW_S: f64 = 1.0;
/// Latencies are shown from 1 ms to 100 s, each power of ten as high as the other.
const LATENCIES_S: (f64, f64) = (0.001, 100.0);

/// A fault from its beginning to its end.
struct Strike {
    name: String,
    target: String,
    from: f64,
    to: f64,
    took_effect: bool,
}

/// A client's call.
struct Call {
    /// Of the client, whatever number it went on with.
    lane: u64,
    f: String,
    from: f64,
    to: f64,
    /// ok, fail or info.
    kind: String,
}

/// What happened, in seconds since the run began.
#[derive(Default)]
struct Story {
    strikes: Vec<Strike>,
    calls: Vec<Call>,
    /// Of each line of the history by its number, for violations that name it.
    times: BTreeMap<u64, f64>,
    end: f64,
}

/// Writes the page beside the history of a run: where it is.
pub fn write(out: &Path, title: &str, verdict: &Verdict) -> Result<PathBuf, String> {
    let story = story(&reads::load(&out.join("history.jsonl"))?);
    let path = out.join("report.html");
    std::fs::write(&path, page(title, verdict, &story)).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(path)
}

fn story(events: &[Value]) -> Story {
    let mut story = Story::default();
    let mut open: BTreeMap<String, &Value> = BTreeMap::new();
    for event in events {
        let at = seconds(event);
        story.end = story.end.max(at);
        story.times.insert(event["i"].as_u64().unwrap_or_default(), at);
        let (who, f) = (event["p"].to_string(), text(event, "f"));
        if event["type"] == "invoke" {
            open.insert(who, event);
            continue;
        }
        let Some(began) = open.remove(&who) else { continue };
        let (from, to) = (seconds(began), at);
        match event["p"].as_u64() {
            Some(process) => {
                let lane = process % RETIRED as u64;
                story.calls.push(Call { lane, f, from, to, kind: text(event, "type") });
            }
            None => {
                let took_effect = event["value"]["took_effect"] == true;
                story.strikes.push(Strike { name: f, target: text(event, "key"), from, to, took_effect });
            }
        }
    }
    story
}

fn seconds(event: &Value) -> f64 {
    event["t"].as_u64().unwrap_or_default() as f64 / 1e9
}

fn text(event: &Value, field: &str) -> String {
    event[field].as_str().unwrap_or_default().to_owned()
}

fn page(title: &str, verdict: &Verdict, story: &Story) -> String {
    let (word, class) = if verdict.is_valid() { ("VALID", "good") } else { ("INVALID", "bad") };
    let mut out = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{word}: {0}</title><style>{STYLE}</style>\
         <h1><span class=\"{class}\">{word}</span> {0}</h1>",
        escaped(title)
    );
    list(&mut out, "Violations", "bad", &verdict.violations);
    list(&mut out, "Why it is no evidence", "bad", &verdict.empty);
    list(&mut out, "Faults that never took effect", "bad", &verdict.idle);
    let marks = marks(verdict, story);
    let _ = write!(out, "<h2>Faults</h2>{}", timeline(story, &marks));
    let _ = write!(
        out,
        "<h2>Calls a second</h2><p><i class=\"ok\"></i> answered <i class=\"info\"></i> of unknown outcome</p>{}",
        rates(story, &marks)
    );
    let _ = write!(
        out,
        "<h2>Latency of answered calls</h2><p><i class=\"ok\"></i> median <i class=\"p99\"></i> 99 of 100</p>{}",
        latencies(story, &marks)
    );
    let _ = write!(
        out,
        "<h2>Clients</h2><p>Calls of more than 1 s: <i class=\"slow\"></i> answered <i class=\"info\"></i> of unknown outcome</p>{}",
        lanes(story, &marks)
    );
    let _ = write!(
        out,
        "<h2>By kind of fault</h2>{}<h2>By call</h2>{}<h2>Figures</h2><table>",
        strikes_table(story),
        calls_table(story)
    );
    for (name, value) in &verdict.figures {
        let _ = write!(out, "<tr><td>{}<td>{}", escaped(name), escaped(value));
    }
    out.push_str("</table></html>\n");
    out
}

const STYLE: &str = "body{font:14px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em;color:#222;background:#fff}\
h1{font-size:1.4em}h2{font-size:1.1em;margin:1.6em 0 .3em}p{margin:.2em 0}svg{display:block;width:100%;height:auto}\
table{border-collapse:collapse}td,th{padding:.15em 1em .15em 0;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}\
.good,.bad{padding:.1em .5em;border-radius:.3em;color:#fff}.good{background:#18794e}.bad{background:#c62a2f}li.bad{margin:.3em 0;white-space:pre-wrap}\
.band{fill:#e5484d;opacity:.14}.idle{fill:#888;opacity:.14}.name{font-size:9px;fill:#333}.axis{stroke:#bbb}.mark{stroke:#c62a2f;stroke-width:2}\
i{display:inline-block;width:1em;height:.6em;margin-left:1em}i.ok{background:#2b6cb0}i.info{background:#c62a2f}i.p99{background:#d97706}i.slow{background:#d97706}\
.ok{stroke:#2b6cb0;fill:none}.p99{stroke:#d97706;fill:none}rect.info{fill:#c62a2f}rect.slow{fill:#d97706}";

fn list(out: &mut String, heading: &str, class: &str, texts: &[String]) {
    if texts.is_empty() {
        return;
    }
    let _ = write!(out, "<h2>{heading}</h2><ul>");
    for text in texts {
        let _ = write!(out, "<li class=\"{class}\">{}", escaped(text));
    }
    out.push_str("</ul>");
}

/// When the lines of the history were written that violations name: `event 12`, `events 12 to 15`.
fn marks(verdict: &Verdict, story: &Story) -> Vec<f64> {
    let mut found = Vec::new();
    for violation in &verdict.violations {
        let words: Vec<&str> = violation.split(|letter: char| !letter.is_ascii_alphanumeric()).collect();
        let named = words.windows(2).filter(|two| two[0].starts_with("event"));
        found.extend(named.filter_map(|two| story.times.get(&two[1].parse().ok()?).copied()));
    }
    found
}

// ---------------------------------------------------------------------------------------------------------------- plots

fn x(story: &Story, at: f64) -> f64 {
    LEFT + at / story.end.max(1.0) * (WIDTH - LEFT)
}

/// A drawing of this height over the axis of time, with the faults as bands and the violations as lines behind it.
fn drawing(story: &Story, marks: &[f64], height: f64, inside: &str) -> String {
    let mut out = format!("<svg viewBox=\"0 0 {WIDTH} {}\">", height + 16.0);
    for strike in &story.strikes {
        let (from, to) = (x(story, strike.from), x(story, strike.to));
        let class = if strike.took_effect { "band" } else { "idle" };
        let _ = write!(
            out,
            "<rect class=\"{class}\" x=\"{from:.1}\" y=\"0\" width=\"{:.1}\" height=\"{height}\"><title>{} of {}, {:.1} to {:.1} s{}</title></rect>",
            (to - from).max(1.0),
            escaped(&strike.name),
            escaped(&strike.target),
            strike.from,
            strike.to,
            if strike.took_effect { "" } else { ", without effect" },
        );
    }
    out.push_str(inside);
    for mark in marks {
        let at = x(story, *mark);
        let _ = write!(out, "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"0\" y2=\"{height}\"/>");
    }
    let _ = write!(out, "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{height}\" y2=\"{height}\"/>");
    for step in 0..=6 {
        let at = story.end * f64::from(step) / 6.0;
        let anchor = if step == 6 { "end" } else { "middle" };
        let _ = write!(
            out,
            "<text class=\"name\" text-anchor=\"{anchor}\" x=\"{:.1}\" y=\"{}\">{at:.0} s</text>",
            x(story, at),
            height + 12.0
        );
    }
    out.push_str("</svg>");
    out
}

/// Names of faults under each other as far as they would overlap.
fn timeline(story: &Story, marks: &[f64]) -> String {
    let mut rows: Vec<f64> = Vec::new();
    let mut inside = String::new();
    for strike in &story.strikes {
        let at = x(story, strike.from);
        let wide = strike.name.len() as f64 * 5.2 + 8.0;
        let start = at.min(WIDTH - wide);
        let row = rows.iter().position(|end| *end < start).unwrap_or(rows.len());
        if row == rows.len() {
            rows.push(0.0);
        }
        rows[row] = start + wide;
        let _ = write!(
            inside,
            "<text class=\"name\" x=\"{start:.1}\" y=\"{}\">{}</text>",
            row as f64 * 11.0 + 10.0,
            escaped(&strike.name)
        );
    }
    drawing(story, marks, rows.len() as f64 * 11.0 + 6.0, &inside)
}

/// Seconds of one column.
fn bin(story: &Story) -> f64 {
    (story.end / BINS).max(1.0)
}

fn rates(story: &Story, marks: &[f64]) -> String {
    let bin = bin(story);
    let columns = (story.end / bin) as usize + 1;
    let (mut answered, mut unknown) = (vec![0.0; columns], vec![0.0; columns]);
    for call in &story.calls {
        let column = (call.to / bin) as usize;
        *(if call.kind == "info" { &mut unknown[column] } else { &mut answered[column] }) += 1.0 / bin;
    }
    let most = answered.iter().chain(&unknown).copied().fold(1.0, f64::max);
    let y = |rate: f64| PLOT - rate / most * (PLOT - 12.0);
    let mut inside =
        format!("<text class=\"name\" x=\"4\" y=\"12\">{most:.0} a second</text><polyline class=\"ok\" points=\"");
    for (column, rate) in answered.iter().enumerate() {
        let _ = write!(inside, "{:.1},{:.1} ", x(story, column as f64 * bin), y(*rate));
    }
    inside.push_str("\"/>");
    for (column, rate) in unknown.iter().enumerate().filter(|(_, rate)| **rate > 0.0) {
        let _ = write!(
            inside,
            "<rect class=\"info\" x=\"{:.1}\" y=\"{:.1}\" width=\"2\" height=\"{:.1}\"/>",
            x(story, column as f64 * bin),
            y(*rate),
            PLOT - y(*rate)
        );
    }
    drawing(story, marks, PLOT, &inside)
}

fn latencies(story: &Story, marks: &[f64]) -> String {
    let bin = bin(story);
    let mut columns: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
    for call in story.calls.iter().filter(|call| call.kind == "ok") {
        columns.entry((call.to / bin) as usize).or_default().push(call.to - call.from);
    }
    let (least, most) = (LATENCIES_S.0.log10(), LATENCIES_S.1.log10());
    let y = |seconds: f64| PLOT - (seconds.max(LATENCIES_S.0).log10() - least) / (most - least) * PLOT;
    let mut inside = String::new();
    for (power, name) in [(0.01, "10 ms"), (0.1, "0.1 s"), (1.0, "1 s"), (10.0, "10 s")] {
        let _ = write!(
            inside,
            "<line class=\"axis\" stroke-dasharray=\"2 4\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/><text class=\"name\" x=\"4\" y=\"{0:.1}\">{name}</text>",
            y(power)
        );
    }
    for (class, share) in [("ok", 0.5), ("p99", 0.99)] {
        let _ = write!(inside, "<polyline class=\"{class}\" points=\"");
        for (column, all) in &mut columns {
            all.sort_by(f64::total_cmp);
            let _ = write!(inside, "{:.1},{:.1} ", x(story, *column as f64 * bin), y(quantile(all, share)));
        }
        inside.push_str("\"/>");
    }
    drawing(story, marks, PLOT, &inside)
}

/// Of sorted numbers, at least one.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() as f64 * share) as usize).min(sorted.len() - 1)]
}

fn lanes(story: &Story, marks: &[f64]) -> String {
    let mut names: BTreeMap<u64, String> = BTreeMap::new();
    for call in &story.calls {
        names.entry(call.lane).or_insert_with(|| format!("{} {}", call.lane, call.f));
    }
    let rows: BTreeMap<u64, usize> = names.keys().enumerate().map(|(row, lane)| (*lane, row)).collect();
    let mut inside = String::new();
    for (lane, name) in &names {
        let _ = write!(
            inside,
            "<text class=\"name\" x=\"4\" y=\"{:.1}\">{}</text>",
            rows[lane] as f64 * LANE + 9.0,
            escaped(name)
        );
    }
    for call in story.calls.iter().filter(|call| call.kind == "info" || call.to - call.from > SLOW_S) {
        let class = if call.kind == "info" { "info" } else { "slow" };
        let (from, to) = (x(story, call.from), x(story, call.to));
        let _ = write!(
            inside,
            "<rect class=\"{class}\" x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{}\"><title>{}: {:.2} s from {:.1} s</title></rect>",
            rows[&call.lane] as f64 * LANE + 3.0,
            (to - from).max(1.0),
            LANE - 5.0,
            escaped(&call.f),
            call.to - call.from,
            call.from,
        );
    }
    drawing(story, marks, rows.len() as f64 * LANE + 4.0, &inside)
}

// --------------------------------------------------------------------------------------------------------------- tables

fn strikes_table(story: &Story) -> String {
    let mut sums: BTreeMap<&str, (u32, u32, f64)> = BTreeMap::new();
    for strike in &story.strikes {
        let sum = sums.entry(&strike.name).or_default();
        *sum = (sum.0 + 1, sum.1 + u32::from(strike.took_effect), sum.2 + strike.to - strike.from);
    }
    let mut out = "<table><tr><th>fault<th>times<th>took effect<th>seconds".to_owned();
    for (name, (times, took, seconds)) in sums {
        let _ = write!(out, "<tr><td>{}<td>{times}<td>{took}<td>{seconds:.1}", escaped(name));
    }
    out + "</table>"
}

fn calls_table(story: &Story) -> String {
    let mut sums: BTreeMap<&str, (u32, u32, u32, Vec<f64>)> = BTreeMap::new();
    for call in &story.calls {
        let sum = sums.entry(&call.f).or_default();
        match call.kind.as_str() {
            "ok" => {
                sum.0 += 1;
                sum.3.push(call.to - call.from);
            }
            "fail" => sum.1 += 1,
            _ => sum.2 += 1,
        }
    }
    let mut out = "<table><tr><th>call<th>answered<th>refused<th>unknown<th>median<th>99 of 100".to_owned();
    for (name, (ok, refused, unknown, mut took)) in sums {
        took.sort_by(f64::total_cmp);
        let at = |share: f64| {
            if took.is_empty() { "none".to_owned() } else { format!("{:.0} ms", 1_000.0 * quantile(&took, share)) }
        };
        let _ =
            write!(out, "<tr><td>{}<td>{ok}<td>{refused}<td>{unknown}<td>{}<td>{}", escaped(name), at(0.5), at(0.99));
    }
    out + "</table>"
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_page_shows_faults_calls_and_where_it_went_wrong() {
        let event = |i: u64, second: u64, p: Value, kind: &str, f: &str, value: Value| json!({ "i": i, "t": second * 1_000_000_000, "p": p, "type": kind, "f": f, "key": "r1 <b>", "value": value });
        let events = [
            event(0, 0, json!(3), "invoke", "read", json!(null)),
            event(1, 1, json!("nemesis"), "invoke", "kill-leader", json!(null)),
            event(2, 4, json!(3), "info", "read", json!("timeout")),
            event(3, 5, json!("nemesis"), "info", "kill-leader", json!({ "took_effect": true })),
            event(4, 6, json!(1_003), "invoke", "read", json!(null)),
            event(5, 8, json!(1_003), "ok", "read", json!({ "found": true })),
        ];
        let verdict =
            Verdict { violations: vec!["token_grows: events 4 to 5: 1 < 2".to_owned()], ..Verdict::default() };
        let story = story(&events);
        let page = page("nemesis & co", &verdict, &story);
        assert_eq!((story.calls.len(), story.strikes.len(), story.calls[1].lane), (2, 1, 3));
        assert_eq!(marks(&verdict, &story), [6.0]);
        for shown in [
            "INVALID</span> nemesis &amp; co",
            "1 &lt; 2",
            "kill-leader of r1 &lt;b&gt;, 1.0 to 5.0 s",
            "<td>kill-leader<td>1<td>1<td>4.0",
            "<td>read<td>1<td>0<td>1<td>2000 ms",
        ] {
            assert!(page.contains(shown), "{shown} in {page}");
        }
        assert!(!page.contains("http"), "it needs nothing else");
    }
}
