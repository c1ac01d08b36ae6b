//! The engine against a Vec, with reopening at random points.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Op {
    Append {
        count: u64,
        len: usize,
        wait: bool,
    },
    /// Cuts off this many from the end, but nothing committed.
    Truncate(u64),
    /// Purges this share (in percent) of the live entries; over 100: beyond the end.
    Purge(u64),
    Vote,
    Commit,
    ReadSome {
        from: u64,
        count: u64,
        max_bytes: usize,
    },
    Pause,
    Reopen,
    /// As a kill would leave it, once everything is answered.
    Crash,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1..30u64, 0..500usize, any::<bool>()).prop_map(|(count, len, wait)| Op::Append { count, len, wait }),
        2 => (0..40u64).prop_map(Op::Truncate),
        2 => (0..130u64).prop_map(Op::Purge),
        1 => Just(Op::Vote),
        1 => Just(Op::Commit),
        3 => (0..50u64, 0..50u64, 0..4000usize)
            .prop_map(|(from, count, max_bytes)| Op::ReadSome { from, count, max_bytes }),
        1 => Just(Op::Pause),
        1 => Just(Op::Reopen),
        1 => Just(Op::Crash),
    ]
}

#[derive(Default)]
struct Model {
    purged: Option<EntryId>,
    entries: Vec<Record>,
    vote: Option<Vote>,
    committed: Option<EntryId>,
    term: u64,
}

impl Model {
    fn last(&self) -> Option<EntryId> {
        self.entries.last().map(|entry| entry.id).or(self.purged)
    }

    fn next(&self) -> u64 {
        self.last().map_or(0, |id| id.index + 1)
    }
}

fn run(ops: Vec<Op>, options: Options) {
    let mut dir = tempfile::tempdir().expect("a directory");
    let mut log = open(dir.path(), &options);
    let mut model = Model { term: 1, ..Model::default() };
    for op in ops {
        match op {
            Op::Append { count, len, wait } => {
                let new = records(model.next()..model.next() + count, model.term, len);
                model.entries.extend(new.iter().cloned());
                if wait {
                    append(&log, new);
                    assert_eq!(*log.durable_index().borrow(), model.last().map(|id| id.index));
                } else {
                    log.append(new, Box::new(|result| result.expect("append"))).expect("append");
                }
            }
            Op::Truncate(count) => {
                let committed = model.committed.map_or(0, |id| id.index + 1);
                let keep = model.entries.len().saturating_sub(count as usize);
                let may_go = model.entries.iter().position(|entry| entry.id.index >= committed);
                model.entries.truncate(keep.max(may_go.unwrap_or(usize::MAX)));
                model.term += 1;
                log.truncate_after(model.last(), Box::new(|result| result.expect("truncate"))).expect("truncate");
                assert!(*log.durable_index().borrow() <= model.last().map(|id| id.index));
            }
            Op::Purge(percent) => {
                let Some(last) = model.last() else { continue };
                let first = model.purged.map_or(0, |id| id.index + 1);
                let upto = id(first + (last.index + 1 - first) * percent / 100, model.term);
                let upto = model.entries.iter().map(|entry| entry.id).find(|id| id.index == upto.index).unwrap_or(upto);
                model.entries.retain(|entry| entry.id.index > upto.index);
                model.purged = Some(upto);
                log.purge(upto, Box::new(|result| result.expect("purge"))).expect("purge");
            }
            Op::Vote => {
                model.term += 1;
                save_vote(&log, model.term);
                model.vote = Some(Vote { term: model.term, node: 1, committed: true });
            }
            Op::Commit => {
                log.save_committed(model.last()).expect("save");
                model.committed = model.last().or(model.committed);
            }
            Op::ReadSome { from, count, max_bytes } => read_some(&log.reader(), &model, from, count, max_bytes),
            Op::Pause => std::thread::sleep(Duration::from_millis(3)),
            Op::Crash => {
                model.term += 1;
                save_vote(&log, model.term);
                model.vote = Some(Vote { term: model.term, node: 1, committed: true });
                dir = copy(dir.path());
                log = open(dir.path(), &options);
                let committed = log.reader().committed();
                assert!(committed.map(|id| id.index) <= model.committed.map(|id| id.index));
                model.committed = committed;
            }
            Op::Reopen => {
                drop(log);
                log = open(dir.path(), &options);
                let reader = log.reader();
                assert_eq!(reader.committed(), model.committed);
                assert_eq!(*log.durable_index().borrow(), model.last().map(|id| id.index));
            }
        }
        let reader = log.reader();
        assert_eq!((reader.state().purged, reader.state().last), (model.purged, model.last()));
        assert_eq!(reader.vote(), model.vote);
        assert_eq!(all(&reader), model.entries);
    }
}

/// A bounded read is a prefix of the unbounded one, within its bound but for one entry, and never empty without need.
fn read_some(reader: &LogReader, model: &Model, from: u64, count: u64, max_bytes: usize) {
    let from = model.purged.map_or(0, |id| id.index + 1) + from;
    let got = reader.read(from..from + count, max_bytes.max(1)).expect("read");
    let wanted: Vec<_> =
        model.entries.iter().filter(|entry| (from..from + count).contains(&entry.id.index)).cloned().collect();
    assert!(wanted.starts_with(&got));
    assert_eq!(got.is_empty(), wanted.is_empty());
    let all_but_one: usize = got.iter().rev().skip(1).map(|entry| entry.data.len()).sum();
    assert!(all_but_one <= max_bytes);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_log_is_what_was_written(
        ops in proptest::collection::vec(op(), 1..60),
        segment_bytes in 500..20_000u64,
        tail_bytes in 0..10_000usize,
        mark_ms in 1..100u64,
    ) {
        let mark_after = Duration::from_millis(mark_ms);
        run(ops, Options { segment_bytes, tail_bytes, mark_after, reserve_bytes: 4096 });
    }
}
