//! What one more waiting job takes in memory, exact: submissions as the replicas apply them, under an allocator that counts.
//!
//!     cargo run --release -p statemachine --example pending_memory
//!
//! Each job has a 300-byte command, which is part of what is counted. An allocator rounds up to its size classes and leaves holes; resident
//! memory of real replicas is what `jepsen-style-tests/figures memory` measures.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use statemachine::command::{SubmitJob, default_retry};
use statemachine::settings::Settings;
use statemachine::spec::{Body, JobSpec, Shape};
use statemachine::storage::codec::{self, EncodedCmd, EntryHead};
use statemachine::{Cmd, Command, Outcome, RequestId, State};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const COMMAND_BYTES: usize = 300;
const ENTRY: u64 = 25;
const ROUNDS: usize = 4;
const JOBS: u64 = 100_000;

fn main() {
    let mut state = State::new([1; 16], Settings::default());
    let (mut number, mut held) = (0, HELD.load(Ordering::Relaxed));
    for round in 1..=ROUNDS {
        while number < JOBS * round as u64 {
            let cmds: Vec<EncodedCmd> = (number..number + ENTRY).map(|job| EncodedCmd::new(&submission(job))).collect();
            number += ENTRY;
            let head =
                EntryHead { level: statemachine::LEVEL, clock_ms: number, wall_ms: wall_ms(number), salt: number };
            let entry = codec::decode_entry(&codec::encode_entry_of(&head, &cmds)).expect("just encoded");
            let outcomes = state.apply(&entry).expect("of this level");
            assert!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Done(_))), "{outcomes:?}");
        }
        // As after a digest and a cut of the image: nothing is noted as changed.
        state.digest();
        drop(state.cut());
        let now = HELD.load(Ordering::Relaxed);
        let each = (now - held) / JOBS as usize;
        held = now;
        println!("{number} jobs: {each} bytes a job more, {} beyond its command", each - COMMAND_BYTES);
    }
}

fn wall_ms(number: u64) -> i64 {
    1_764_000_000_000 + (number / 17) as i64
}

fn submission(number: u64) -> Cmd {
    let shape = Shape {
        nodes: 1,
        ranks_per_node: 1,
        gpus_per_rank: 1,
        gpu_types: [].into(),
        mix_types: false,
        cores_per_rank: 0,
        mem_mib_per_rank: 0,
        min_bandwidth_mbps: 0,
        topology: None,
        machines: None,
    };
    let spec = JobSpec {
        name: "bench".into(),
        priority: 0,
        shape,
        limit_ms: 0,
        lease_ttl_ms: 30_000,
        kill_grace_ms: 5_000,
        retry: default_retry(),
        labels: BTreeMap::new(),
        terms: None,
    };
    let submit = SubmitJob {
        tenant: "default".into(),
        queue: "default".into(),
        gpu_types: vec!["none".into()],
        spec,
        body: Body { argv: vec!["x".repeat(COMMAND_BYTES)], ..Body::default() },
        hold: false,
        priority_class: String::new(),
    };
    Cmd { request: Some(request_id(number)), actor: "bench".into(), body: Command::SubmitJob(Box::new(submit)) }
}

/// As a UUIDv7: 17 ids a millisecond, then bits that look random.
fn request_id(number: u64) -> RequestId {
    let mut id = [0; 16];
    id[..6].copy_from_slice(&wall_ms(number).to_be_bytes()[2..]);
    id[6..14].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
    id[6] = 0x70 | id[6] & 0xf;
    id[8] = 0x80 | id[8] & 0x3f;
    RequestId(id)
}
