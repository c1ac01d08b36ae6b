//! The figures as one self-contained page: a table, and plots of waits, of what was allocated and of who waited. No script,
//! nothing from elsewhere; light or dark as the reader's system says.

use scheduling::simulate::course::{Course, Figures};
use scheduling::simulate::trace::Trace;

use super::plots::{Axis, Series, bars, escaped, lines, rounded_up};
use super::report::grouped;
use super::{Experiment, Made};

const STYLE: &str = "\
:root{color-scheme:light dark;--ink:#1d2330;--soft:#667085;--grid:#e7e9ee;--paper:#fff;--card:#fafbfc}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaf0;--soft:#98a1b3;--grid:#2b3140;--paper:#12151c;--card:#181c25}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1120px;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.5rem;margin:0}header p{color:var(--soft);margin:.25rem 0 1.75rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;margin-bottom:1.5rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.4rem .7rem;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{color:var(--soft);font-weight:500;font-size:.85rem}
td.best{font-weight:650}
main{display:grid;grid-template-columns:repeat(12,1fr);gap:1rem}
figure{grid-column:span 6;margin:0;padding:1rem 1.1rem;background:var(--card);border:1px solid var(--grid);border-radius:10px}
figure.small{grid-column:span 4}@media(max-width:860px){figure,figure.small{grid-column:span 12}}
figcaption{color:var(--soft);font-size:.9rem;margin-bottom:.5rem}figcaption b{color:var(--ink);font-weight:600}
p.y{margin:0;color:var(--soft);font-size:.75rem}svg{width:100%;height:auto;display:block;font:17px system-ui,sans-serif}.small svg{font-size:12px}
.grid{stroke:var(--grid)}.axis{stroke:var(--soft)}.tick,.label{fill:var(--soft)}.value{fill:var(--ink)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}.bar{fill:var(--c)}
.legend{margin:.4rem 0 0;font-size:.85rem}.legend span{margin-right:1rem;white-space:nowrap}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:3px;background:var(--c);margin-right:.35rem;vertical-align:-1px}
.s0{--c:#2f6fde}.s1{--c:#e07b00}.s2{--c:#1a9a78}.s3{--c:#c2418f}.s4{--c:#8a63d2}
.s5{--c:#b59b00}.s6{--c:#0e9bbd}.s7{--c:#d1433f}.s8{--c:#6b7a90}.s9{--c:#5a9e1f}
footer{color:var(--soft);font-size:.85rem;margin-top:1.5rem}";

/// Points along the time axis.
const MOMENTS: usize = 180;

pub(super) fn page(experiment: &Experiment) -> String {
    let trace = &experiment.trace;
    let gpus: u64 = trace.machines.iter().map(|machine| u64::from(machine.gpus)).sum();
    let (machines, jobs) = (grouped(trace.machines.len() as u64), grouped(trace.jobs.len() as u64));
    let about = format!("Jobs: {jobs}. Machines: {machines}, GPUs: {}. Seed: {}.", grouped(gpus), experiment.seed);
    let runs: Vec<(&str, &Course, &Figures)> = experiment
        .results
        .iter()
        .filter_map(|result| match &result.made {
            Made::OverTime { course, figures, .. } => Some((result.policy.name, course, figures)),
            Made::Filled(_) => None,
        })
        .collect();
    let (table, plots) = if runs.is_empty() {
        (filled_table(experiment), vec![filled(experiment), left_idle(experiment)])
    } else {
        (table(&runs), over_time(trace, &runs, gpus))
    };
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>ares simulate</title>\
         <style>{STYLE}</style></head><body><header><h1>ares simulate</h1><p>{}</p></header>\
         <div class=\"wide\">{table}</div><main>{}</main><footer>Bounded slowdown: max(1, (wait + run) / max(run, 10 s)). \
         JCT: from submission to end.</footer></body></html>\n",
        escaped(&about),
        plots.concat()
    )
}

fn table(runs: &[(&str, &Course, &Figures)]) -> String {
    let seconds = |value: u64| grouped(value / 1_000);
    let ratio = |value: u64| format!("{:.2}", value as f64 / 1_000.0);
    type Column<'a> = (&'a str, fn(&Figures) -> u64, &'a dyn Fn(u64) -> String, bool);
    let columns: [Column<'_>; 9] = [
        ("jobs", |figures| figures.jobs, &|value| grouped(value), false),
        ("mean JCT, s", |figures| figures.jct_mean, &seconds, true),
        ("p99 JCT, s", |figures| figures.jct_p99, &seconds, true),
        ("mean wait, s", |figures| figures.wait_mean, &seconds, true),
        ("bounded slowdown", |figures| figures.bounded_slowdown_mean, &ratio, true),
        ("worst", |figures| figures.bounded_slowdown_max, &ratio, true),
        ("makespan, s", |figures| figures.makespan, &seconds, true),
        ("preemptions", |figures| figures.preemptions, &|value| grouped(value), false),
        ("Jain, tenants", |figures| figures.jain_tenants, &ratio, false),
    ];
    let heads: String = columns.iter().map(|(head, ..)| format!("<th>{head}</th>")).collect();
    let row = |(name, _, figures): &(&str, &Course, &Figures)| {
        let cell = |(_, value, write, less_is_better): &Column<'_>| {
            let least = runs.iter().map(|(_, _, figures)| value(figures)).min();
            let best = *less_is_better && runs.len() > 1 && least == Some(value(figures));
            format!("<td{}>{}</td>", if best { " class=\"best\"" } else { "" }, write(value(figures)))
        };
        format!("<tr><td>{}</td>{}</tr>", escaped(name), columns.iter().map(cell).collect::<String>())
    };
    format!("<table><tr><th>policy</th>{heads}</tr>{}</table>", runs.iter().map(row).collect::<String>())
}

fn over_time(trace: &Trace, runs: &[(&str, &Course, &Figures)], gpus: u64) -> Vec<String> {
    let values = |of: fn(&Figures) -> u64| -> Vec<(String, f64)> {
        runs.iter().map(|(name, _, figures)| ((*name).to_owned(), of(figures) as f64 / 1_000.0)).collect()
    };
    vec![
        bars("Mean JCT", "submission to end", &values(|figures| figures.jct_mean), span),
        bars("Mean wait", "submission to start", &values(|figures| figures.wait_mean), span),
        bars("Bounded slowdown", "mean", &values(|figures| figures.bounded_slowdown_mean), |value| {
            format!("{value:.1}")
        }),
        waits(trace, runs),
        slowdowns(trace, runs),
        allocation(trace, runs, gpus),
        waiting(trace, runs),
    ]
}

/// What part of the jobs waited at most so long.
fn waits(trace: &Trace, runs: &[(&str, &Course, &Figures)]) -> String {
    let of = |course: &Course| -> Vec<f64> {
        (0..trace.jobs.len()).filter_map(|job| course.wait_s(trace, job)).map(|wait| wait as f64).collect()
    };
    let series = runs.iter().map(|(name, course, _)| distribution(name, of(course))).collect::<Vec<_>>();
    let x = Axis { label: "wait".to_owned(), from: 1.0, to: longest(&series), log: true, write: span };
    lines("How long jobs waited", "part of the jobs that waited at most so long", &x, &percent(), &series)
}

fn slowdowns(trace: &Trace, runs: &[(&str, &Course, &Figures)]) -> String {
    let of = |course: &Course| {
        let jobs = trace.jobs.iter().enumerate();
        jobs.filter_map(|(at, job)| Some((course.wait_s(trace, at)?, job.duration_s)))
            .map(|(wait, run)| ((wait + run) as f64 / run.max(10) as f64).max(1.0))
            .collect::<Vec<f64>>()
    };
    let series = runs.iter().map(|(name, course, _)| distribution(name, of(course))).collect::<Vec<_>>();
    let write = |value: f64| grouped(value as u64);
    let x = Axis { label: "bounded slowdown".to_owned(), from: 1.0, to: longest(&series), log: true, write };
    lines("How much longer than alone", "part of the jobs slowed down at most so much", &x, &percent(), &series)
}

fn percent() -> Axis {
    Axis { label: "% of jobs".to_owned(), from: 0.0, to: 100.0, log: false, write: |value| format!("{value:.0}") }
}

fn longest(series: &[Series]) -> f64 {
    let ends = series.iter().filter_map(|series| series.points.last());
    ends.map(|(value, _)| *value).fold(10.0, f64::max)
}

/// (value, percent of the values up to it), at some hundred places; a logarithmic axis begins at 1.
fn distribution(name: &str, mut values: Vec<f64>) -> Series {
    const PLACES: usize = 400;
    values.sort_by(f64::total_cmp);
    let count = values.len().max(1);
    let ranks = (0..=PLACES).map(|place| (place * count / PLACES).clamp(1, count));
    let mut points: Vec<(f64, f64)> =
        ranks.filter_map(|rank| Some((values.get(rank - 1)?.max(1.0), rank as f64 * 100.0 / count as f64))).collect();
    points.dedup();
    Series { name: name.to_owned(), points }
}

/// First and last second of all runs.
fn bounds(trace: &Trace, runs: &[(&str, &Course, &Figures)]) -> (u64, u64) {
    let first = trace.jobs.iter().map(|job| job.submit_s).min().unwrap_or(0);
    let last = runs.iter().flat_map(|(_, course, _)| &course.spells).map(|spell| spell.until_s).max();
    (first, last.unwrap_or(first).max(first + 1))
}

/// Means of a quantity that is `weight` during each interval, over equal parts of the whole time.
fn means(intervals: impl Iterator<Item = (u64, u64, f64)>, (first, last): (u64, u64)) -> Vec<(f64, f64)> {
    let width = (last - first) as f64 / MOMENTS as f64;
    let mut sums = vec![0.0; MOMENTS];
    for (from, until, weight) in intervals.filter(|(from, until, _)| from < until) {
        let (from, until) = ((from - first) as f64 / width, (until - first) as f64 / width);
        let (first, last) = (from as usize, (until as usize).min(MOMENTS - 1));
        for (at, sum) in sums.iter_mut().enumerate().take(last + 1).skip(first) {
            let within = (until.min(at as f64 + 1.0) - from.max(at as f64)).max(0.0);
            *sum += within * weight;
        }
    }
    sums.into_iter().enumerate().map(|(at, sum)| ((at as f64 + 0.5) * width / 86_400.0, sum)).collect()
}

fn days(bounds: (u64, u64)) -> Axis {
    let to = (bounds.1 - bounds.0) as f64 / 86_400.0;
    let write = |value: f64| if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") };
    Axis { label: "days since the first submission".to_owned(), from: 0.0, to, log: false, write }
}

fn allocation(trace: &Trace, runs: &[(&str, &Course, &Figures)], gpus: u64) -> String {
    let bounds = bounds(trace, runs);
    let scale = 100.0 / (gpus.max(1) as f64 * 1_000.0);
    let of = |course: &Course| {
        let weight = |job: usize| trace.jobs[job].request.total_milli() as f64 * scale;
        means(course.spells.iter().map(|spell| (spell.from_s, spell.until_s, weight(spell.job))), bounds)
    };
    let series: Vec<Series> =
        runs.iter().map(|(name, course, _)| Series { name: (*name).to_owned(), points: of(course) }).collect();
    let y = Axis { label: "% of the GPUs".to_owned(), ..percent() };
    lines("GPUs in use", "mean over equal parts of the time", &days(bounds), &y, &series)
}

fn waiting(trace: &Trace, runs: &[(&str, &Course, &Figures)]) -> String {
    let bounds = bounds(trace, runs);
    let of = |course: &Course| {
        let started = trace.jobs.iter().zip(&course.journeys);
        let waits = started.filter_map(|(job, journey)| Some((job.submit_s, journey.as_ref()?.start_s, 1.0)));
        means(waits, bounds)
    };
    let series: Vec<Series> =
        runs.iter().map(|(name, course, _)| Series { name: (*name).to_owned(), points: of(course) }).collect();
    let most = series.iter().flat_map(|series| &series.points).map(|(_, count)| *count).fold(1.0, f64::max);
    let write = |value: f64| grouped(value as u64);
    let y = Axis { label: "jobs".to_owned(), from: 0.0, to: rounded_up(most), log: false, write };
    lines("Jobs not yet started", "mean over equal parts of the time", &days(bounds), &y, &series)
}

/// (policy, [(arrived percent, allocated percent)]).
fn fillings(experiment: &Experiment) -> Vec<(String, Vec<(f64, f64)>)> {
    let of = |made: &Made| match made {
        Made::Filled(filled) => {
            filled.alloc.iter().map(|(arrived, alloc)| (f64::from(*arrived), f64::from(*alloc) / 100.0)).collect()
        }
        Made::OverTime { .. } => Vec::new(),
    };
    experiment.results.iter().map(|result| (result.policy.name.to_owned(), of(&result.made))).collect()
}

fn filled_table(experiment: &Experiment) -> String {
    let fillings = fillings(experiment);
    let last = fillings.first().and_then(|(_, points)| points.last()).map_or(100.0, |(arrived, _)| *arrived);
    let wanted: Vec<f64> = [90.0, 100.0, 110.0, 120.0, 130.0].into_iter().filter(|arrived| *arrived <= last).collect();
    let heads: String = wanted.iter().map(|arrived| format!("<th>at {arrived} % arrived</th>")).collect();
    let row = |(name, points): &(String, Vec<(f64, f64)>)| {
        let at = |arrived: &f64| points.iter().find(|(at, _)| at == arrived).map_or(0.0, |(_, alloc)| *alloc);
        let cells: String = wanted.iter().map(|arrived| format!("<td>{:.2} %</td>", at(arrived))).collect();
        format!("<tr><td>{}</td>{cells}</tr>", escaped(name))
    };
    format!("<table><tr><th>policy</th>{heads}</tr>{}</table>", fillings.iter().map(row).collect::<String>())
}

/// Whole and, from the point on where policies differ, near.
fn filled(experiment: &Experiment) -> String {
    let series: Vec<Series> = fillings(experiment).into_iter().map(|(name, points)| Series { name, points }).collect();
    let to = longest(&series);
    let write = |value: f64| format!("{value:.0}");
    let x = Axis { label: "GPU demand that arrived, % of the cluster".to_owned(), from: 0.0, to, log: false, write };
    let y = Axis { label: "% of the GPUs allocated".to_owned(), ..percent() };
    lines("Filling the cluster", "nothing ends; what does not fit is dropped", &x, &y, &series)
}

fn left_idle(experiment: &Experiment) -> String {
    const NEAR: f64 = 80.0;
    let near = |(name, points): (String, Vec<(f64, f64)>)| {
        let points = points.into_iter().filter(|(arrived, _)| *arrived >= NEAR);
        Series { name, points: points.map(|(arrived, alloc)| (arrived, 100.0 - alloc)).collect() }
    };
    let series: Vec<Series> = fillings(experiment).into_iter().map(near).collect();
    let most = series.iter().flat_map(|series| &series.points).map(|(_, idle)| *idle).fold(1.0, f64::max);
    let write = |value: f64| format!("{value:.0}");
    let to = longest(&series).max(NEAR + 1.0);
    let x = Axis { label: "GPU demand that arrived, % of the cluster".to_owned(), from: NEAR, to, log: false, write };
    let y = Axis { label: "% of the GPUs idle".to_owned(), from: 0.0, to: rounded_up(most), log: false, write };
    lines("What stays idle", "the same, near the end: lower is better", &x, &y, &series)
}

/// `3 s`, `5 min`, `2 h`, `4 d`.
fn span(seconds: f64) -> String {
    let (value, unit) = match seconds {
        ..60.0 => (seconds, "s"),
        60.0..3_600.0 => (seconds / 60.0, "min"),
        3_600.0..86_400.0 => (seconds / 3_600.0, "h"),
        _ => (seconds / 86_400.0, "d"),
    };
    let text = if value < 9.95 && value.fract() > 0.05 { format!("{value:.1}") } else { format!("{value:.0}") };
    format!("{text} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_add_up_to_the_whole() {
        let points = means([(0, 360, 2.0), (180, 360, 1.0)].into_iter(), (0, 360));
        assert_eq!((points.len(), points[0].1, points[MOMENTS - 1].1), (MOMENTS, 2.0, 3.0));
        let sum: f64 = points.iter().map(|(_, value)| value).sum();
        assert!((sum - 2.5 * MOMENTS as f64).abs() < 1e-6, "{sum}");
    }

    #[test]
    fn spans_for_people() {
        assert_eq!([1.0, 90.0, 3_600.0, 172_800.0].map(span), ["1 s", "1.5 min", "1 h", "2 d"]);
    }
}
