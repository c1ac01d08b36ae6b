//! Which faults a seed means, and when: drawn before the run. What they do to the group is `drive`'s.

use serde::{Deserialize, Serialize};

use crate::sim::random::Rng;

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident $word:literal $weight:literal;)*) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum Kind {
            $($(#[$doc])* #[serde(rename = $word)] $kind,)*
        }

        impl Kind {
            pub const ALL: &[Kind] = &[$(Kind::$kind),*];

            pub fn name(self) -> &'static str {
                match self {
                    $(Kind::$kind => $word,)*
                }
            }

            /// How often a seed that has it draws it, against its others.
            fn weight(self) -> u64 {
                match self {
                    $(Kind::$kind => $weight,)*
                }
            }
        }
    };
}

kinds! {
    /// The power of one replica fails: each unsynced sector is kept or lost on its own.
    Cut "power-cut" 4;
    /// The power of all fails at once.
    CutAll "power-cut-of-all" 2;
    /// The process of one replica is killed: what it wrote is there.
    Kill "kill" 3;
    /// One replica is away from all others.
    Isolate "isolate" 3;
    /// The replicas are in two halves.
    Halves "halves" 2;
    /// One replica hears the others, who do not hear it.
    Mute "mute" 2;
    /// One replica is heard by the others, and does not hear them.
    Deaf "deaf" 2;
    /// Two halves, and one replica that sees both.
    Bridge "bridge" 2;
    /// What one replica sends and gets is held back, and comes late and all at once.
    Hold "hold" 2;
    /// Messages take long, each its own time: later ones come first.
    Slow "delay-and-reorder" 2;
    /// Links lose what is sent, in bursts.
    Loss "loss" 1;
    /// One disk is slow.
    SlowDisk "slow-sync" 2;
    /// One disk is full.
    FullDisk "full-disk" 1;
    /// One sync fails: the replica stops, and is started again.
    FailedSync "failing-sync" 2;
    /// A replica loses power, and its image.
    LostImage "lost-image" 1;
    /// A replica loses power, and its snapshots.
    LostSnapshots "lost-snapshots" 1;
    /// A replica loses power, its image and its snapshots.
    LostState "lost-state" 1;
    /// The wall clocks leap by up to an hour, and back.
    Leap "clock-leap" 1;
    /// Leadership is handed to another.
    Transfer "transfer" 2;
    /// A replica joins, and becomes a voter.
    Add "add-replica" 2;
    /// A replica is taken out; it runs on for a while.
    Remove "remove-replica" 2;
    /// A snapshot on every replica, and a shorter log.
    Snapshot "snapshot" 2;
}

/// One fault: begins at `at_ms` of the safety phase, is mended after `for_ms`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    pub at_ms: u64,
    pub for_ms: u64,
    pub kind: Kind,
    /// Strikes the leader, if there is one.
    pub leader: bool,
    /// Else this one of the running replicas, counted round; further choices of the fault are drawn from it.
    pub chance: u64,
}

/// Faults within `busy_ms`, of a random subset of the kinds or of these alone; they may overlap.
pub fn draw(seed: u64, busy_ms: u64, only: &[String]) -> Vec<Fault> {
    let mut rng = Rng::new(seed, 2);
    let share = rng.range(150, 600);
    let mut kinds: Vec<Kind> = Kind::ALL.iter().copied().filter(|_| rng.chance(share)).collect();
    if !only.is_empty() {
        kinds = Kind::ALL.iter().copied().filter(|kind| only.iter().any(|name| name == kind.name())).collect();
    } else if kinds.len() < 3 {
        kinds.extend([Kind::Cut, Kind::Isolate, Kind::Transfer]);
    }
    let sum: u64 = kinds.iter().map(|kind| kind.weight()).sum();
    let (gap, longest) = (rng.range(300, 1_500), rng.range(500, 4_000));
    let mut faults = Vec::new();
    let mut at_ms = rng.range(200, 1_500);
    while at_ms < busy_ms {
        let mut drawn = rng.below(sum);
        let kind = *kinds
            .iter()
            .find(|kind| drawn.checked_sub(kind.weight()).map(|left| drawn = left).is_none())
            .unwrap_or(&kinds[0]);
        let for_ms = rng.range(60, longest);
        faults.push(Fault { at_ms, for_ms, kind, leader: rng.chance(500), chance: rng.draw() });
        at_ms += rng.tail(gap);
    }
    faults
}
