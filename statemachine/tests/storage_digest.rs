//! The digest kept incrementally is the digest of the content, whatever the way there was.

mod random_state;

use proptest::prelude::*;
use random_state::Random;
use statemachine::State;

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_incremental_digest_equals_the_one_from_scratch(seed: u64, entries in 1u64..40) {
        let (mut state, mut random) = (State::default(), Random(seed));
        let mut clones = Vec::new();
        for _ in 0..entries {
            random_state::entry(&mut state, &mut random);
            match random.below(5) {
                0 => prop_assert_eq!(state.digest(), state.digest_from_scratch()),
                1 => state.digest_some(random.below(40) as usize),
                2 => clones.push((state.clone(), state.digest_from_scratch())),
                _ => {}
            }
        }
        prop_assert_eq!(state.digest(), state.digest_from_scratch());
        prop_assert_eq!(state.undigested(), 0);
        // Clones went their own ways with rows, and so hashes, shared.
        for (mut clone, expected) in clones {
            prop_assert_eq!(clone.digest(), expected);
            random_state::entry(&mut clone, &mut random);
            prop_assert_eq!(clone.digest(), clone.digest_from_scratch());
        }
    }

    #[test]
    fn the_digest_depends_on_content_alone(seed: u64, entries in 1u64..20) {
        let mut state = random_state::after(seed, entries);
        let mut other = State { meta: state.meta.clone(), ..State::default() };
        macro_rules! copy_backwards {
            ($($table:ident)*) => {
                $(for (key, row) in state.$table.iter().rev() {
                    other.$table.insert(key.clone(), row.clone());
                    other.digest_some(1);
                })*
            };
        }
        copy_backwards!(jobs bodies tasks leases nodes allocs classes tenants queues sessions locks requests ended
            buckets names gpu_tokens);
        prop_assert_eq!(state.digest(), other.digest());
    }

    #[test]
    fn any_change_of_a_record_changes_the_digest(seed: u64) {
        let mut state = random_state::after(seed, 6);
        let before = state.digest();
        let Some(job) = state.jobs.iter().next_back().map(|(id, _)| *id) else { return Ok(()) };
        state.jobs.update(&job, |row| row.version += 1);
        prop_assert_ne!(state.digest(), before);
        state.jobs.update(&job, |row| row.version -= 1);
        prop_assert_eq!(state.digest(), before);
        state.meta.applied.leader += 1;
        prop_assert_ne!(state.digest(), before);
    }
}
