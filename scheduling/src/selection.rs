//! What a job says of its machines, as a person is told of it. Whether a machine is one of them is `statemachine::fit`'s answer,
//! so that seats, starts to come and room that is made all keep to it.

use std::collections::BTreeSet;

use statemachine::State;
use statemachine::selector::{Constraint, Selector};
use statemachine::spec::Shape;

/// Bytes that a reason says of it.
const TOLD_BYTES: usize = 200;

/// The machines that the shape may be on, where it says which, of all.
pub(crate) fn allowed(state: &State, shape: &Shape) -> Option<(u32, u32)> {
    let selector = shape.machines.as_ref()?;
    let allowed = state.nodes.iter().filter(|(_, node)| selector.allows(&node.value)).count();
    let count = |machines: usize| u32::try_from(machines).unwrap_or(u32::MAX);
    Some((count(allowed), count(state.nodes.len())))
}

/// It in one line of some length.
pub(crate) fn told(selector: &Selector) -> String {
    let text = selector.to_string();
    if text.len() <= TOLD_BYTES {
        return text;
    }
    format!("{}...", &text[..text.floor_char_boundary(TOLD_BYTES)])
}

/// One of the options that say which machines it may be on is left out; then all of them.
pub(crate) fn wider(shape: &Shape) -> Vec<(String, Option<Box<Selector>>)> {
    let Some(selector) = &shape.machines else { return Vec::new() };
    let without = |option: &str, wider: Selector| {
        let changed = wider != **selector && !wider.is_empty();
        changed.then(|| (format!("no {option}"), Some(Box::new(wider))))
    };
    let parts = [
        without("--constraint", Selector { constraint: Constraint::default(), ..(**selector).clone() }),
        without("--nodelist", Selector { only: BTreeSet::new(), ..(**selector).clone() }),
        without("--exclude", Selector { without: BTreeSet::new(), ..(**selector).clone() }),
    ];
    let all = (format!("no {}", told(selector)), None);
    parts.into_iter().flatten().chain([all]).collect()
}
