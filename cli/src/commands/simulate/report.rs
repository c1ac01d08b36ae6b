//! The figures as a table and as JSON. Times are seconds with three decimals.

use serde_json::{Map, Value, json};

use super::{Experiment, Made, Tried};
use crate::output;

/// One object for one policy, an array for several.
pub(super) fn document(experiment: &Experiment) -> Value {
    let mut documents = documents(experiment);
    if documents.len() == 1 { documents.remove(0) } else { Value::Array(documents) }
}

pub(super) fn documents(experiment: &Experiment) -> Vec<Value> {
    experiment.results.iter().map(|result| of(experiment, result)).collect()
}

/// What a filling experiment has no time for is null.
fn of(experiment: &Experiment, result: &Tried) -> Value {
    let mut document = json!({
        "policy": result.policy.name,
        "seed": experiment.seed,
        "planner_s": (result.planner_s * 1e6).round() / 1e6,
    });
    let more = match &result.made {
        Made::OverTime { figures, .. } => json!({
            "jobs": figures.jobs,
            "never_started": figures.never_started,
            "jct_mean_s": thousandths(figures.jct_mean),
            "jct_p99_s": thousandths(figures.jct_p99),
            "wait_mean_s": thousandths(figures.wait_mean),
            "wait_max_s": thousandths(figures.wait_max),
            "bounded_slowdown_mean": thousandths(figures.bounded_slowdown_mean),
            "bounded_slowdown_max": thousandths(figures.bounded_slowdown_max),
            "makespan_s": thousandths(figures.makespan),
            "preemptions": figures.preemptions,
            "jain_tenants": thousandths(figures.jain_tenants),
        }),
        Made::Filled(filled) => {
            let percent =
                |(arrived, allocated): &(u32, u32)| (arrived.to_string(), json!(f64::from(*allocated) / 100.0));
            json!({
                "jobs": filled.placed + filled.dropped,
                "never_started": filled.dropped,
                "jct_mean_s": null,
                "jct_p99_s": null,
                "wait_mean_s": null,
                "wait_max_s": null,
                "bounded_slowdown_mean": null,
                "bounded_slowdown_max": null,
                "makespan_s": null,
                "preemptions": 0,
                "jain_tenants": null,
                "alloc_pct": filled.alloc.iter().map(percent).collect::<Map<String, Value>>(),
            })
        }
    };
    if let (Value::Object(document), Value::Object(more)) = (&mut document, more) {
        document.extend(more);
    }
    if let Made::OverTime { shortfall: Some(shortfall), .. } = result.made {
        document["shortfall_pct"] = json!(shortfall as f64 / 100.0);
    }
    document
}

fn thousandths(value: u64) -> Value {
    json!(value as f64 / 1_000.0)
}

pub(super) fn table(experiment: &Experiment) {
    let filled = experiment.results.iter().any(|result| matches!(result.made, Made::Filled(_)));
    let heads: &[&str] = if filled {
        &["POLICY", "JOBS", "PLACED", "DROPPED", "AT 90 %", "AT 100 %", "AT 110 %", "AT 120 %", "AT 130 %", "PLANNER"]
    } else {
        &[
            "POLICY",
            "JOBS",
            "JCT MEAN",
            "JCT P99",
            "WAIT MEAN",
            "WAIT MAX",
            "SLOWDOWN",
            "WORST",
            "MAKESPAN",
            "PREEMPTIONS",
            "JAIN",
            "PLANNER",
        ]
    };
    let pooled = |result: &Tried| matches!(result.made, Made::OverTime { shortfall: Some(_), .. });
    let shortfall = experiment.results.iter().any(pooled).then_some("SHORTFALL");
    let heads: Vec<&str> = heads.iter().copied().chain(shortfall).collect();
    output::table(&heads, experiment.results.iter().map(cells));
    let left_out = experiment.results.iter().find_map(|result| match &result.made {
        Made::OverTime { figures, .. } if figures.never_started > 0 => Some(figures.never_started),
        _ => None,
    });
    if let Some(jobs) = left_out {
        eprintln!("ares: {jobs} jobs fit on no machine of the list even when it is empty; they are in no figure.");
    }
}

fn cells(result: &Tried) -> Vec<String> {
    let mut cells = vec![result.policy.name.to_owned()];
    match &result.made {
        Made::OverTime { figures, .. } => {
            let seconds = |value: u64| format!("{} s", grouped(value / 1_000));
            let ratio = |value: u64| format!("{:.2}", value as f64 / 1_000.0);
            cells.extend([
                grouped(figures.jobs),
                seconds(figures.jct_mean),
                seconds(figures.jct_p99),
                seconds(figures.wait_mean),
                seconds(figures.wait_max),
                ratio(figures.bounded_slowdown_mean),
                ratio(figures.bounded_slowdown_max),
                seconds(figures.makespan),
                grouped(figures.preemptions),
                ratio(figures.jain_tenants),
            ]);
        }
        Made::Filled(filled) => {
            let at = |percent: u32| {
                let found = filled.alloc.iter().find(|(arrived, _)| *arrived == percent);
                found.map_or("-".to_owned(), |(_, alloc)| format!("{:.2} %", f64::from(*alloc) / 100.0))
            };
            let count = |count: usize| grouped(count as u64);
            cells.extend([count(filled.placed + filled.dropped), count(filled.placed), count(filled.dropped)]);
            cells.extend([90, 100, 110, 120, 130].map(at));
        }
    }
    cells.push(format!("{:.2} s", result.planner_s));
    if let Made::OverTime { shortfall: Some(shortfall), .. } = result.made {
        cells.push(format!("{:.2} %", shortfall as f64 / 100.0));
    }
    cells
}

/// `1,234,567`.
pub(super) fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn thousands_have_commas() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }
}
