//! `ares tenant` and `ares share`: who pays, for how much, and who is owed what.

use std::collections::HashMap;
use std::process::ExitCode;

use proto::v1;
use serde_json::{Value, json};

use super::show::read_mode;
use super::spec::{duration_ms, size_mib};
use crate::Global;
use crate::connect::{client, runtime};
use crate::exit::{Failure, NOT_FOUND, Outcome};
use crate::output::{self, Format, Row};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// Make a tenant
    Create(Set),
    /// Change what is named, leave the rest
    Set(Set),
    /// Everything about a tenant
    Show {
        /// Its name
        tenant: String,
    },
    /// The tree of tenants, with what they use and may use
    List,
    /// Take away a tenant without jobs and without tenants below it
    Remove {
        /// Its name
        tenant: String,
    },
}

#[derive(Debug, clap::Args)]
struct Set {
    /// Its name: 1 to 64 of a-z 0-9 . _ -
    tenant: String,
    /// The tenant above it; "" for a top one
    #[arg(long, value_name = "TENANT")]
    parent: Option<String>,
    /// Share among the tenants of one parent [default: 1]
    #[arg(long, value_name = "N")]
    weight: Option<u32>,
    /// GPUs that nobody else keeps it from, by type, such as h100:8,a100:4; "" for none
    #[arg(long, value_name = "TYPE:N")]
    guarantee: Option<String>,
    /// Never more GPUs of a type than this; "" for no limit
    #[arg(long, value_name = "TYPE:N")]
    limit_types: Option<String>,
    /// Never more GPUs of all types than this, or none
    #[arg(long, value_name = "N")]
    limit_gpus: Option<String>,
    /// Never more cores than this, or none
    #[arg(long, value_name = "N")]
    limit_cores: Option<String>,
    /// Never more memory than this, such as 4TiB, or none
    #[arg(long, value_name = "SIZE")]
    limit_mem: Option<String>,
    /// May use more than its guarantee while nobody else needs it [default: true]
    #[arg(long, value_name = "true|false")]
    may_borrow: Option<bool>,
    /// Time limit of jobs that name none, or none
    #[arg(long, value_name = "TIME")]
    default_limit: Option<String>,
    /// Longest time limit of its jobs and of those of tenants below it, or none; jobs without one get it
    #[arg(long, value_name = "TIME")]
    max_limit: Option<String>,
    /// Jobs that may wait; 0 = no limit
    #[arg(long, value_name = "N")]
    max_pending: Option<u64>,
}

pub fn run(args: Args, global: Global) -> Outcome {
    match args.verb {
        Verb::Create(set) => change(set, true, &global),
        Verb::Set(set) => change(set, false, &global),
        Verb::Show { tenant } => show(&tenant, &global),
        Verb::List => list(&global),
        Verb::Remove { tenant } => {
            let request = v1::RemoveTenantRequest { request_id: proto::request_id(), name: tenant.clone() };
            runtime()?.block_on(client(&global)?.remove_tenant(request))?;
            done(&global, &tenant, "is gone")
        }
    }
}

fn done(global: &Global, name: &str, what: &str) -> Outcome {
    eprintln!("Tenant {name} {what}.");
    match global.output {
        Format::Json | Format::Jsonl => output::json(&json!({ "tenant": name })),
        Format::Name => println!("{name}"),
        Format::Table => {}
    }
    Ok(ExitCode::SUCCESS)
}

fn change(set: Set, create: bool, global: &Global) -> Outcome {
    let name = set.tenant.clone();
    let request = request(set, create)?;
    runtime()?.block_on(client(global)?.set_tenant(request))?;
    done(global, &name, if create { "exists" } else { "is changed" })
}

fn request(set: Set, create: bool) -> Result<v1::SetTenantRequest, Failure> {
    let types = |option: &str, text: Option<String>| {
        text.map(|text| Ok::<_, Failure>(v1::TypeCounts { counts: counts(option, &text)? })).transpose()
    };
    let limit_mem = set.limit_mem.map(|text| bound(&text, |text| size_mib("--limit-mem", text))).transpose()?;
    let limit_ms = |option: &str, text: Option<&str>| match text {
        None => Ok::<_, Failure>(None),
        Some("none" | "0") => Ok(Some(0)),
        Some(text) => duration_ms(option, text).map(Some),
    };
    let default_limit_ms = limit_ms("--default-limit", set.default_limit.as_deref())?;
    let max_limit_ms = limit_ms("--max-limit", set.max_limit.as_deref())?;
    Ok(v1::SetTenantRequest {
        request_id: proto::request_id(),
        name: set.tenant,
        create,
        parent: set.parent,
        weight: set.weight,
        guaranteed: types("--guarantee", set.guarantee)?,
        limit_by_type: types("--limit-types", set.limit_types)?,
        limit_gpus: set.limit_gpus.map(|text| bound(&text, |text| number("--limit-gpus", text))).transpose()?,
        limit_cores: set.limit_cores.map(|text| bound(&text, |text| number("--limit-cores", text))).transpose()?,
        limit_mem_mib: limit_mem,
        may_borrow: set.may_borrow,
        default_limit_ms,
        max_limit_ms,
        max_pending: set.max_pending,
    })
}

/// `none` lifts a bound.
fn bound(text: &str, read: impl Fn(&str) -> Result<u64, Failure>) -> Result<v1::Bound, Failure> {
    let value = if text == "none" { None } else { Some(read(text)?) };
    Ok(v1::Bound { value })
}

fn number(option: &str, text: &str) -> Result<u64, Failure> {
    text.parse()
        .map_err(|_| Failure::usage(format!("{option} {text:?} is no number")).advise("write a number, or none"))
}

/// `h100:8,a100:4`.
fn counts(option: &str, text: &str) -> Result<HashMap<String, u32>, Failure> {
    let pairs = text.split(',').filter(|pair| !pair.is_empty());
    let one = |pair: &str| {
        let (slug, count) = pair.split_once(':')?;
        Some((slug.to_owned(), count.parse().ok()?)).filter(|_| !slug.is_empty())
    };
    pairs
        .map(|pair| {
            one(pair).ok_or_else(|| {
                Failure::usage(format!("{option} {pair:?} names no type and number"))
                    .advise("write such as h100:8,a100:4")
            })
        })
        .collect()
}

fn tenants(global: &Global) -> Result<v1::ListTenantsReply, Failure> {
    Ok(runtime()?.block_on(client(global)?.list_tenants(v1::ListTenantsRequest { read: read_mode(false) }))?)
}

fn list(global: &Global) -> Outcome {
    let heads = ["TENANT", "WEIGHT", "GUARANTEED", "USES", "LIMIT", "RUN", "WAIT"];
    let all = tenants(global)?;
    let rows = all.tenants.iter().map(|tenant| Row {
        name: tenant.name.clone(),
        cells: vec![
            indented(tenant),
            tenant.weight.to_string(),
            by_type(&tenant.guaranteed),
            uses(tenant),
            limits(tenant),
            tenant.running_jobs.to_string(),
            tenant.live_jobs.saturating_sub(tenant.running_jobs).to_string(),
        ],
        json: document(tenant),
    });
    output::rows(global.output, &heads, rows.collect());
    Ok(ExitCode::SUCCESS)
}

fn show(name: &str, global: &Global) -> Outcome {
    let all = tenants(global)?;
    let Some(tenant) = all.tenants.iter().find(|tenant| tenant.name == name) else {
        return Err(
            Failure::new(NOT_FOUND, format!("there is no tenant {name:?}")).advise("ares tenant list lists them")
        );
    };
    match global.output {
        Format::Json | Format::Jsonl => output::json(&document(tenant)),
        Format::Name => println!("{name}"),
        Format::Table => {
            let limit_of = |ms: u64| if ms == 0 { "none".to_owned() } else { age(ms) };
            let limit = format!("{}, at most {}", limit_of(tenant.default_limit_ms), limit_of(tenant.max_limit_ms));
            let pending = if tenant.max_pending == 0 { "no limit".to_owned() } else { tenant.max_pending.to_string() };
            let parent = if tenant.parent.is_empty() { "none" } else { &tenant.parent };
            for (head, text) in [
                ("Tenant", tenant.name.as_str()),
                ("Parent", parent),
                ("Weight", &tenant.weight.to_string()),
                ("Guaranteed", &by_type(&tenant.guaranteed)),
                ("Uses", &uses(tenant)),
                ("Limit", &limits(tenant)),
                ("May borrow", if tenant.may_borrow { "yes" } else { "no" }),
                ("Time limit", &limit),
                ("May wait", &pending),
                ("Used", &hours(tenant.usage_gpu_ms)),
                ("Owed", &owed(tenant)),
            ] {
                println!("{head:<10} {text}");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn age(ms: u64) -> String {
    output::age(i64::try_from(ms).unwrap_or(i64::MAX))
}

fn indented(tenant: &v1::Tenant) -> String {
    format!("{}{}", "  ".repeat(tenant.depth as usize), tenant.name)
}

/// `4 a100, 8 h100`.
fn by_type(counts: &HashMap<String, u32>) -> String {
    let mut pairs: Vec<(&String, &u32)> = counts.iter().collect();
    pairs.sort();
    let texts: Vec<String> = pairs.iter().map(|(slug, count)| format!("{count} {slug}")).collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(", ") }
}

fn uses(tenant: &v1::Tenant) -> String {
    match (tenant.used_gpus.is_empty(), tenant.used_cores) {
        (true, 0) => "-".to_owned(),
        (true, cores) => format!("{cores} cores"),
        (false, _) => by_type(&tenant.used_gpus),
    }
}

fn limits(tenant: &v1::Tenant) -> String {
    let gpus = tenant.limit_gpus.map(|count| format!("{count} GPUs"));
    let types = (!tenant.limit_by_type.is_empty()).then(|| by_type(&tenant.limit_by_type));
    let cores = tenant.limit_cores.map(|count| format!("{count} cores"));
    let mem = tenant.limit_mem_mib.map(|mib| format!("{mib} MiB"));
    let texts: Vec<String> = [gpus, types, cores, mem].into_iter().flatten().collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(", ") }
}

#[derive(Debug, clap::Args)]
pub struct ShareArgs {}

/// Who has used, and is owed, what: past usage counts half after the half-life.
pub fn share(_: ShareArgs, global: Global) -> Outcome {
    let reply = tenants(&global)?;
    let heads = ["TENANT", "WEIGHT", "FAIR", "USED", "GPU HOURS", "OWED", "USES NOW"];
    let rows = reply.tenants.iter().map(|tenant| Row {
        name: tenant.name.clone(),
        cells: vec![
            indented(tenant),
            tenant.weight.to_string(),
            percent(tenant.fair_ppm),
            percent(tenant.used_ppm),
            hours(tenant.usage_gpu_ms),
            owed(tenant),
            uses(tenant),
        ],
        json: document(tenant),
    });
    output::rows(global.output, &heads, rows.collect());
    if global.output == Format::Table {
        eprintln!("Usage counts half after {}; shares are among the tenants of one parent.", age(reply.half_life_ms));
    }
    Ok(ExitCode::SUCCESS)
}

fn percent(ppm: u32) -> String {
    format!("{:.1} %", f64::from(ppm) / 10_000.0)
}

fn hours(gpu_ms: u64) -> String {
    format!("{:.2}", gpu_ms as f64 / 3_600_000.0)
}

fn owed(tenant: &v1::Tenant) -> String {
    format!("{:+.2}", tenant.owed_gpu_ms as f64 / 3_600_000.0)
}

fn document(tenant: &v1::Tenant) -> Value {
    json!({
        "name": tenant.name,
        "parent": (!tenant.parent.is_empty()).then_some(&tenant.parent),
        "weight": tenant.weight,
        "guaranteed": tenant.guaranteed,
        "limit_gpus": tenant.limit_gpus,
        "limit_by_type": tenant.limit_by_type,
        "limit_cores": tenant.limit_cores,
        "limit_mem_mib": tenant.limit_mem_mib,
        "may_borrow": tenant.may_borrow,
        "default_limit_ms": tenant.default_limit_ms,
        "max_limit_ms": tenant.max_limit_ms,
        "max_pending": tenant.max_pending,
        "used_gpus": tenant.used_gpus,
        "used_cores": tenant.used_cores,
        "used_mem_mib": tenant.used_mem_mib,
        "live_jobs": tenant.live_jobs,
        "running_jobs": tenant.running_jobs,
        "usage_gpu_ms": tenant.usage_gpu_ms,
        "usage_core_ms": tenant.usage_core_ms,
        "fair_ppm": tenant.fair_ppm,
        "used_ppm": tenant.used_ppm,
        "owed_gpu_ms": tenant.owed_gpu_ms,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_type_are_read_and_written() {
        let read = counts("--guarantee", "h100:8,a100:4").map_err(|failure| failure.message);
        assert_eq!(read.as_ref().map(by_type), Ok("4 a100, 8 h100".to_owned()));
        assert!(counts("--guarantee", "").is_ok_and(|counts| counts.is_empty()));
        for text in ["h100", "h100:", ":4", "h100:x"] {
            assert!(counts("--guarantee", text).is_err(), "{text}");
        }
    }
}
