//! Times and parents as people write them: `now+1h`, `08:30`, `2026-11-25T08:30`, `afterok:12`.

use jiff::civil::{DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use proto::v1;

use super::spec::duration_ms;
use crate::exit::Failure;

/// The Unix time in ms that an option names; 0 for an empty one.
pub fn unix_ms(option: &str, text: &str) -> Result<i64, Failure> {
    if text.is_empty() {
        return Ok(0);
    }
    at(option, text, Timestamp::now(), &TimeZone::system())
}

fn at(option: &str, text: &str, now: Timestamp, zone: &TimeZone) -> Result<i64, Failure> {
    if let Some(later) = text.strip_prefix("now+") {
        let ms = i64::try_from(duration_ms(option, later)?).unwrap_or(i64::MAX);
        return Ok(now.as_millisecond().saturating_add(ms));
    }
    if text == "now" {
        return Ok(now.as_millisecond());
    }
    let named = text.parse::<Timestamp>().ok().or_else(|| local(text, zone)).or_else(|| next_clock(text, now, zone));
    named.map(Timestamp::as_millisecond).ok_or_else(|| {
        Failure::usage(format!("{option} {text:?} is no time"))
            .advise("write such as now+1h, 08:30, 2026-11-25T08:30 or 2026-11-25T07:30:00Z")
    })
}

/// A date and time of this machine's zone.
fn local(text: &str, zone: &TimeZone) -> Option<Timestamp> {
    zone.to_timestamp(text.parse::<DateTime>().ok()?).ok()
}

/// The next time at which this machine's clock shows it.
fn next_clock(text: &str, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    let today = zone.to_datetime(now);
    let at = today.date().to_datetime(text.parse::<Time>().ok()?);
    let at = if at <= today { at.checked_add(1.day()).ok()? } else { at };
    zone.to_timestamp(at).ok()
}

/// `afterok:12:13,afterany:14`, also in several options.
pub fn after(given: &[String]) -> Result<Vec<v1::After>, Failure> {
    let mut parents = Vec::new();
    for text in given {
        let mut words = text.split(':');
        let kind = words.next().unwrap_or_default();
        let known = ["afterok", "afterany", "afternotok", "aftercorr"].contains(&kind);
        let ids: Option<Vec<u64>> = words.map(|word| word.parse().ok()).collect();
        match ids.filter(|ids| known && !ids.is_empty()) {
            Some(ids) => parents.extend(ids.into_iter().map(|job_id| v1::After { kind: kind.to_owned(), job_id })),
            None => {
                return Err(Failure::usage(format!("--after {text:?} names no job and how it must end"))
                    .advise("write such as afterok:12, afterany:12:13, afternotok:12 or aftercorr:12"));
            }
        }
    }
    Ok(parents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        let now: Timestamp = "2026-11-25T07:00:00Z".parse().expect("a time");
        let zone = TimeZone::fixed(jiff::tz::offset(1));
        for (text, wanted) in [
            ("now", "2026-11-25T07:00:00Z"),
            ("now+1h30m", "2026-11-25T08:30:00Z"),
            ("now+90", "2026-11-25T07:01:30Z"),
            ("2026-11-25T08:30", "2026-11-25T07:30:00Z"),
            ("2026-11-25T08:30:00Z", "2026-11-25T08:30:00Z"),
            ("08:30", "2026-11-25T07:30:00Z"),
            ("08:00", "2026-11-26T07:00:00Z"),
        ] {
            let wanted: Timestamp = wanted.parse().expect("a time");
            let read = at("--begin", text, now, &zone).map_err(|failure| failure.message);
            assert_eq!(read, Ok(wanted.as_millisecond()), "{text}");
        }
        for text in ["soon", "now+", "now-1h", "25:00", "2026-13-01"] {
            assert!(at("--begin", text, now, &zone).is_err(), "{text}");
        }
    }

    #[test]
    fn parents_are_read_as_slurm_writes_them() {
        let read = after(&["afterok:1:2".into(), "afterany:3".into()]).map_err(|failure| failure.message);
        let pairs: Vec<(String, u64)> =
            read.expect("good ones").into_iter().map(|after| (after.kind, after.job_id)).collect();
        assert_eq!(pairs, [("afterok".into(), 1), ("afterok".into(), 2), ("afterany".into(), 3)]);
        for text in ["afterok", "afterok:", "afterok:x", "before:1", "1"] {
            assert!(after(&[text.into()]).is_err(), "{text}");
        }
    }
}
