//! CPU and NUMA lists as Linux and nvidia-smi write them: `0-23,48-71`, `0,64`, `7`, or nothing.
//!
//! Owns the grammar. What a list means (which GPU, which node) is its reader's matter.

use std::fmt;

/// No machine has a CPU or node id above this; a larger number in a list is two glued columns.
const MAX_ID: u32 = 65_535;

/// A set of ids: ranges, ascending and apart from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList(Vec<(u32, u32)>);

impl CpuList {
    /// Reads a list; the empty text is the empty set. The error says what was expected.
    pub fn parse(text: &str) -> Result<CpuList, String> {
        let text = text.trim();
        if text.is_empty() {
            return Ok(CpuList::default());
        }
        let ranges = text.split(',').map(range).collect::<Result<Vec<_>, _>>()?;
        Ok(CpuList::of(ranges))
    }

    fn of(mut ranges: Vec<(u32, u32)>) -> CpuList {
        ranges.sort_unstable();
        let mut merged: Vec<(u32, u32)> = Vec::with_capacity(ranges.len());
        for (first, last) in ranges {
            match merged.last_mut() {
                Some(open) if first <= open.1.saturating_add(1) => open.1 = open.1.max(last),
                _ => merged.push((first, last)),
            }
        }
        CpuList(merged)
    }

    /// How many ids are in the set.
    pub fn count(&self) -> usize {
        self.0.iter().map(|(first, last)| (last - first) as usize + 1).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ids, ascending.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().flat_map(|(first, last)| *first..=*last)
    }

    /// The ids that are in both sets.
    pub fn intersection(&self, other: &CpuList) -> CpuList {
        let overlap = |a: &(u32, u32), b: &(u32, u32)| {
            let (first, last) = (a.0.max(b.0), a.1.min(b.1));
            (first <= last).then_some((first, last))
        };
        CpuList::of(self.0.iter().flat_map(|a| other.0.iter().filter_map(move |b| overlap(a, b))).collect())
    }

    /// The ids that are in one of the two sets.
    pub fn union(&self, other: &CpuList) -> CpuList {
        CpuList::of(self.0.iter().chain(&other.0).copied().collect())
    }
}

impl fmt::Display for CpuList {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (first, last)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if first == last {
                write!(out, "{comma}{first}")?;
            } else {
                write!(out, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

fn range(part: &str) -> Result<(u32, u32), String> {
    let (first, last) = part.split_once('-').unwrap_or((part, part));
    let (first, last) = (id(first, part)?, id(last, part)?);
    if first > last {
        return Err(format!("the range {part:?} runs backwards"));
    }
    Ok((first, last))
}

fn id(digits: &str, part: &str) -> Result<u32, String> {
    let expected = || format!("expected numbers and ranges such as 0-23,48-71, found {part:?}");
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(expected());
    }
    match digits.parse::<u32>() {
        Ok(id) if id <= MAX_ID => Ok(id),
        _ => Err(format!("the id {digits} is above {MAX_ID}")),
    }
}

#[cfg(test)]
mod tests {
    use super::CpuList;

    fn list(text: &str) -> CpuList {
        CpuList::parse(text).expect(text)
    }

    #[test]
    fn a_list_counts_its_ids_once() {
        assert_eq!(list("0-23,48-71").count(), 48);
        assert_eq!(list("0,64").count(), 2);
        assert_eq!(list("3,1-4,4").to_string(), "1-4");
        assert_eq!(list("").count(), 0);
        assert_eq!(list("5").ids().collect::<Vec<_>>(), [5]);
    }

    #[test]
    fn sets_intersect_and_unite() {
        assert_eq!(list("0-9,20-29").intersection(&list("5-24")).to_string(), "5-9,20-24");
        assert_eq!(list("0-3").union(&list("4,9")).to_string(), "0-4,9");
        assert!(list("0-3").intersection(&list("4")).is_empty());
    }

    #[test]
    fn other_text_is_refused() {
        for text in ["-23", "0-", "9-3", "a", "0,,1", "1 2", "112-1670000", "0x3", "4294967296"] {
            assert!(CpuList::parse(text).is_err(), "{text}");
        }
    }
}
