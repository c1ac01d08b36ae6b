//! Arrays on the command line: `--array 0-99%8`, and `17_5` for the task of index 5 of array 17.

use std::fmt;
use std::str::FromStr;

use proto::{Client, v1};

use super::wait::known;
use crate::exit::{Failure, NOT_FOUND};

/// Ranges of one array, at most: the cluster's limit.
const RANGES: usize = 64;

/// A job by its id, or the task of an array by the array's id and its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobRef {
    id: u64,
    index: Option<u32>,
}

impl FromStr for JobRef {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, index) = match text.split_once('_') {
            Some((id, index)) => (id, Some(index)),
            None => (text, None),
        };
        let job = || format!("{text:?} is no job: write its id, such as 17, or 17_5 for task 5 of array 17");
        let id = id.parse().map_err(|_| job())?;
        Ok(Self { id, index: index.map(str::parse).transpose().map_err(|_| job())? })
    }
}

impl fmt::Display for JobRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.index {
            Some(index) => write!(f, "{}_{index}", self.id),
            None => self.id.fmt(f),
        }
    }
}

impl JobRef {
    /// The id of the job that is meant: an array's tasks have theirs behind its own.
    pub async fn resolve(self, client: &Client) -> Result<u64, Failure> {
        let Some(index) = self.index else { return Ok(self.id) };
        let request = v1::GetJobRequest { job_id: self.id, read: v1::ReadMode::Stale as i32 };
        let fresh = v1::GetJobRequest { read: v1::ReadMode::Linearizable as i32, ..request };
        let job = match client.get_job(request).await {
            Ok(job) => job,
            Err(_) => client.get_job(fresh).await.map_err(|error| known(error, self.id))?,
        };
        let Some(array) = job.spec.and_then(|spec| spec.array) else {
            return Err(Failure::usage(format!("{self}: job {} is no array", self.id)));
        };
        let nth = nth_of(&array.ranges, index).ok_or_else(|| {
            Failure::new(NOT_FOUND, format!("array {} has no task {index}", self.id))
                .advise(format!("its indexes are {}", indexes(&array.ranges)))
        })?;
        Ok(self.id + 1 + u64::from(nth))
    }
}

fn nth_of(ranges: &[v1::IndexRange], index: u32) -> Option<u32> {
    let mut before = 0;
    for range in ranges {
        if (range.first..=range.last).contains(&index) {
            return Some(before + (index - range.first));
        }
        before += range.last - range.first + 1;
    }
    None
}

/// Reads `0-99`, `1,4,7-9`, `0-15:4` (each fourth), with `%N` for at most N at a time.
pub fn parse(text: &str) -> Result<v1::Array, Failure> {
    let wrong = |what: String| {
        Failure::usage(format!("--array {text:?}: {what}")).advise("write such as 0-99, 1,4,7-9, 0-15:4 or 0-999%50")
    };
    let number =
        |text: &str| text.parse::<u32>().map_err(|_| wrong(format!("{text:?} is no index of 0 to {}", u32::MAX)));
    let (list, throttle) = match text.split_once('%') {
        None => (text, 0),
        Some((list, limit)) => match limit.parse() {
            Ok(limit) if limit > 0 => (list, limit),
            _ => return Err(wrong(format!("the limit {limit:?} is no number from 1 on"))),
        },
    };
    let mut ranges = Vec::new();
    for item in list.split(',') {
        let (span, step) = match item.split_once(':') {
            None => (item, 1),
            Some((span, step)) => match step.parse::<u32>() {
                Ok(step) if step > 0 => (span, step),
                _ => return Err(wrong(format!("the step {step:?} is no number from 1 on"))),
            },
        };
        let (first, last) = span.split_once('-').unwrap_or((span, span));
        let (first, last) = (number(first)?, number(last)?);
        if last < first {
            return Err(wrong(format!("{span} ends before it begins")));
        }
        match step {
            1 => ranges.push(v1::IndexRange { first, last }),
            step => {
                let each = (first..=last).step_by(step as usize).take(RANGES + 1);
                ranges.extend(each.map(|index| v1::IndexRange { first: index, last: index }));
            }
        }
    }
    ranges.sort_unstable_by_key(|range| range.first);
    if let Some(pair) = ranges.windows(2).find(|pair| pair[1].first <= pair[0].last) {
        return Err(wrong(format!("index {} is named twice", pair[1].first)));
    }
    // Neighbours are one range.
    ranges.dedup_by(|next, range| {
        let joins = range.last.checked_add(1) == Some(next.first);
        if joins {
            range.last = next.last;
        }
        joins
    });
    if ranges.len() > RANGES {
        return Err(wrong(format!("it has more than {RANGES} ranges, the limit")));
    }
    Ok(v1::Array { ranges, throttle })
}

/// `0-9,12`; a long list ends in dots.
fn indexes(ranges: &[v1::IndexRange]) -> String {
    const SHOWN: usize = 4;
    let one = |range: &v1::IndexRange| match range.first == range.last {
        true => range.first.to_string(),
        false => format!("{}-{}", range.first, range.last),
    };
    let shown: Vec<String> = ranges.iter().take(SHOWN).map(one).collect();
    format!("{}{}", shown.join(","), if ranges.len() > SHOWN { ",..." } else { "" })
}

/// How a job is named in tables: `17_5`, and an array by the indexes that have not started: `17_[8-99%4]`.
pub fn label(job: &v1::Job) -> String {
    if job.array_job_id != 0 {
        return format!("{}_{}", job.array_job_id, job.array_index);
    }
    let array = job.spec.as_ref().and_then(|spec| spec.array.as_ref());
    let (Some(array), Some(progress)) = (array, &job.array) else { return job.id.to_string() };
    if progress.left == 0 {
        return job.id.to_string();
    }
    let mut left = Vec::new();
    for range in array.ranges.iter().filter(|range| range.last >= progress.next_index) {
        left.push(v1::IndexRange { first: range.first.max(progress.next_index), last: range.last });
    }
    let limit = if array.throttle == 0 { String::new() } else { format!("%{}", array.throttle) };
    format!("{}_[{}{limit}]", job.id, indexes(&left))
}

/// `100 tasks: 88 not started, 4 under way, 7 succeeded, 1 failed`.
pub fn summary(progress: &v1::ArrayProgress) -> String {
    let counts = [
        (progress.left, "not started"),
        (progress.open, "under way"),
        (progress.succeeded, "succeeded"),
        (progress.failed, "failed"),
        (progress.timed_out, "timed out"),
        (progress.cancelled, "cancelled"),
        (progress.skipped, "skipped"),
    ];
    let told: Vec<String> =
        counts.iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")).collect();
    format!("{}: {}", super::show::counted(progress.tasks, "task"), told.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(Vec<(u32, u32)>, u32), String> {
        let array = parse(text).map_err(|failure| failure.message)?;
        Ok((array.ranges.iter().map(|range| (range.first, range.last)).collect(), array.throttle))
    }

    #[test]
    fn indexes_are_read_as_they_are_written_elsewhere() {
        assert_eq!(read("0-99"), Ok((vec![(0, 99)], 0)));
        assert_eq!(read("7-9,1,4%2"), Ok((vec![(1, 1), (4, 4), (7, 9)], 2)));
        assert_eq!(read("0-15:4"), Ok((vec![(0, 0), (4, 4), (8, 8), (12, 12)], 0)));
        assert_eq!(read("0-4,5-9,10"), Ok((vec![(0, 10)], 0)), "neighbours are one range");
    }

    #[test]
    fn what_can_not_be_read_is_told_with_what_is_wrong() {
        for (text, what) in [
            ("", "\"\" is no index of 0 to 4294967295"),
            ("a-3", "\"a\" is no index of 0 to 4294967295"),
            ("5-3", "5-3 ends before it begins"),
            ("1,1", "index 1 is named twice"),
            ("0-5,5-9", "index 5 is named twice"),
            ("0-9%0", "the limit \"0\" is no number from 1 on"),
            ("0-9:0", "the step \"0\" is no number from 1 on"),
            ("0-999:2", "it has more than 64 ranges, the limit"),
        ] {
            assert_eq!(read(text), Err(format!("--array {text:?}: {what}")));
        }
    }

    #[test]
    fn a_task_is_named_by_its_array_and_index() {
        assert_eq!("17_5".parse(), Ok(JobRef { id: 17, index: Some(5) }));
        assert_eq!("17".parse(), Ok(JobRef { id: 17, index: None }));
        for text in ["17_", "_5", "x", "17_5_6", ""] {
            assert!(text.parse::<JobRef>().is_err(), "{text}");
        }
        let ranges = parse("3-5,9").unwrap_or_default().ranges;
        assert_eq!([3, 5, 9, 6].map(|index| nth_of(&ranges, index)), [Some(0), Some(2), Some(3), None]);
    }

    #[test]
    fn an_array_is_shown_by_what_has_not_started() {
        let spec = v1::JobSpec { array: parse("0-9,20-29%3").ok(), ..Default::default() };
        let progress =
            v1::ArrayProgress { tasks: 20, left: 12, open: 1, succeeded: 7, next_index: 8, ..Default::default() };
        let job = v1::Job { id: 17, spec: Some(spec), array: Some(progress), ..Default::default() };
        assert_eq!(label(&job), "17_[8-9,20-29%3]");
        assert_eq!(summary(&progress), "20 tasks: 12 not started, 1 under way, 7 succeeded");
        assert_eq!(label(&v1::Job { array_job_id: 17, array_index: 4, ..Default::default() }), "17_4");
    }
}
