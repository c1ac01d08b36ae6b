//! What `--gpus` says.

use std::fmt;
use std::str::FromStr;

/// How many a job wants or, to `dev` alone, which machine to simulate.
#[derive(Clone, Debug)]
pub(super) enum Gpus {
    Count(Count),
    /// So many of the first of these types that has them.
    Types(Vec<String>, Count),
    Machine(String),
}

impl FromStr for Gpus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with("sim:") {
            return Ok(Gpus::Machine(text.to_owned()));
        }
        if text.contains(':') {
            return by_types(text);
        }
        text.parse().map(Gpus::Count)
    }
}

/// `h100:8|a100:8`.
fn by_types(text: &str) -> Result<Gpus, String> {
    let mut types: Vec<(String, Count)> = Vec::new();
    for part in text.split('|').map(str::trim) {
        let read = part.split_once(':').filter(|(name, _)| !name.is_empty());
        let (name, count) = read.ok_or_else(|| format!("{part:?} is no TYPE:N; write such as 'h100:8|a100:8'"))?;
        types.push((name.to_owned(), count.parse()?));
    }
    let count = types[0].1;
    if let Some((name, other)) = types.iter().find(|(_, other)| *other != count) {
        let first = &types[0].0;
        return Err(format!(
            "{first}:{count} and {name}:{other} differ: a job has as many GPUs and processes whichever type it gets; \
             name one count, or submit a job for each"
        ));
    }
    Ok(Gpus::Types(types.into_iter().map(|(name, _)| name).collect(), count))
}

/// At least so many; at most as many as these doubled some times over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Count {
    pub least: u32,
    pub most: u32,
}

impl Count {
    pub fn exactly(count: u32) -> Self {
        Self { least: count, most: count }
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.least == self.most { write!(f, "{}", self.least) } else { write!(f, "{}..{}", self.least, self.most) }
    }
}

/// `8` or `8..32`.
impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().map_err(|_| format!("a number of GPUs is expected, not {text:?}"));
        let Some((least, most)) = text.split_once("..") else { return number(text).map(Self::exactly) };
        let (least, most): (u32, u32) = (number(least)?, number(most)?);
        let doubled = std::iter::successors(Some(least).filter(|count| *count > 0), |count| count.checked_mul(2));
        match doubled.take_while(|count| *count <= most).last() {
            Some(last) if last == most => Ok(Self { least, most }),
            Some(last) => {
                let below = if last == least { String::new() } else { format!("{least}..{last} or ") };
                let above = last.saturating_mul(2);
                Err(format!("{most} is not {least} doubled some times over; write {below}{least}..{above}"))
            }
            None => Err(format!("{text} begins with no number from 1 up to its second; write such as 8..32")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_of_doublings() {
        for (text, least, most) in [("8", 8, 8), ("0", 0, 0), ("8..8", 8, 8), ("8..32", 8, 32), ("3..12", 3, 12)] {
            assert_eq!(text.parse(), Ok(Count { least, most }), "{text}");
        }
        for (text, wanted) in [
            ("8..24", "24 is not 8 doubled some times over; write 8..16 or 8..32"),
            ("8..12", "12 is not 8 doubled some times over; write 8..16"),
            ("0..8", "0..8 begins with no number from 1 up to its second; write such as 8..32"),
            ("8..4", "8..4 begins with no number from 1 up to its second; write such as 8..32"),
            ("8..", "a number of GPUs is expected, not \"\""),
            ("eight", "a number of GPUs is expected, not \"eight\""),
        ] {
            assert_eq!(text.parse::<Count>(), Err(wanted.to_owned()), "{text}");
        }
    }
}
