//! The verbs, one file each.

mod agent;
mod array;
mod bench;
mod checkpoint;
mod cluster;
mod dev;
mod fence;
mod get;
mod gpus;
mod help;
mod history;
mod lock;
mod node;
mod policy;
mod priority;
mod queue;
mod reservation;
mod run;
mod server;
mod show;
mod simulate;
mod snapshot;
mod spec;
mod steer;
mod submit;
mod tenant;
mod topology;
mod verify;
mod version;
mod wait;
mod watch;
mod when;
mod why;

use crate::Global;
use crate::exit::Outcome;

pub use array::JobRef;
pub use show::placement;
pub use wait::known as wait_known;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Run a scheduler replica
    Server(server::Args),
    /// Run the agent of a GPU machine
    Agent(agent::Args),
    /// One replica and one agent in one command; with a command after --, run it and exit with its code
    Dev(dev::Args),
    /// Submit a job and print its id
    Submit(submit::Args),
    /// Submit a job, stream its output and exit with its code
    Run(run::Args),
    /// Wait until jobs have ended; exit with the job's code
    Wait(wait::Args),
    /// Print a job's output
    Logs(crate::logs::Args),
    /// Cancel jobs
    Cancel(steer::Args),
    /// Keep jobs from starting
    Hold(steer::Args),
    /// Let held jobs start
    Release(steer::Args),
    /// Send jobs back to their place in the queue; a running attempt is ended
    Requeue(steer::Args),
    /// Everything about a job
    Show(show::Args),
    /// Why a job waits, when it starts, and what would start it sooner
    #[command(after_help = why::AFTER_HELP)]
    Why(show::Args),
    /// Jobs that wait and run, in the order in which the planner looks at them
    Queue(queue::Args),
    /// Tenants: who pays, for how much
    Tenant(tenant::Args),
    /// Named priorities, and who may use them
    Priority(priority::Args),
    /// Machines set aside for a window of time: a maintenance, or some people's jobs
    Reservation(reservation::Args),
    /// The order in which jobs are looked at, and what is protected
    Policy(policy::Args),
    /// Who has used what, and who is owed what
    Share(tenant::ShareArgs),
    /// The GPU machines
    Nodes(node::ListArgs),
    /// Operate one machine: drain, resume, confirm dead
    Node(node::Args),
    /// A machine's GPUs and links: of a node, of this host, or of an nvidia-smi matrix
    Topology(topology::Args),
    /// Read the keyspace
    Get(get::Args),
    /// Follow the keyspace
    Watch(watch::Args),
    /// The cluster's events in a file, for ares verify
    History(history::Args),
    /// Judge the running cluster on every replica, or an exported history
    Verify(verify::Args),
    /// Named locks with fencing tokens
    Lock(lock::Args),
    /// Files and steps that refuse an older attempt, by its fencing token
    Fence(fence::Args),
    /// In a job: its next attempt can go on from here
    Checkpoint(checkpoint::Args),
    /// The Raft group
    Cluster(cluster::Args),
    /// Job traces under named policies, in virtual time: no cluster is needed
    Simulate(simulate::Args),
    /// Measure the cluster
    Bench(bench::Args),
    /// This binary's version, and the replica's
    Version(version::Args),
    /// Exit codes, environment, or a command's options
    Help(help::Args),
}

impl Command {
    /// Daemons log what they do; client commands are quiet.
    pub fn is_daemon(&self) -> bool {
        match self {
            Command::Server(_) | Command::Agent(_) => true,
            Command::Dev(args) => args.is_daemon(),
            _ => false,
        }
    }

    /// Understands `-o html`.
    pub fn draws_pages(&self) -> bool {
        matches!(self, Command::Simulate(_))
    }
}

pub fn run(command: Command, global: Global) -> Outcome {
    match command {
        Command::Server(args) => server::run(args, global),
        Command::Agent(args) => agent::run(args, global),
        Command::Dev(args) => dev::run(args, global),
        Command::Submit(args) => submit::run(args, global),
        Command::Run(args) => run::run(args, global),
        Command::Wait(args) => wait::run(args, global),
        Command::Logs(args) => crate::logs::run(args, global),
        Command::Cancel(args) => steer::run(args, steer::Verb::Cancel, global),
        Command::Hold(args) => steer::run(args, steer::Verb::Hold, global),
        Command::Release(args) => steer::run(args, steer::Verb::Release, global),
        Command::Requeue(args) => steer::run(args, steer::Verb::Requeue, global),
        Command::Show(args) => show::run(args, global),
        Command::Why(args) => why::run(args, global),
        Command::Queue(args) => queue::run(args, global),
        Command::Tenant(args) => tenant::run(args, global),
        Command::Priority(args) => priority::run(args, global),
        Command::Reservation(args) => reservation::run(args, global),
        Command::Policy(args) => policy::run(args, global),
        Command::Share(args) => tenant::share(args, global),
        Command::Nodes(args) => node::list(args, global),
        Command::Node(args) => node::run(args, global),
        Command::Topology(args) => topology::run(args, global),
        Command::Get(args) => get::run(args, global),
        Command::Watch(args) => watch::run(args, global),
        Command::History(args) => history::run(args, global),
        Command::Verify(args) => verify::run(args, global),
        Command::Lock(args) => lock::run(args, global),
        Command::Fence(args) => fence::run(args, global),
        Command::Checkpoint(args) => checkpoint::run(args, global),
        Command::Cluster(args) => cluster::run(args, global),
        Command::Simulate(args) => simulate::run(args, global),
        Command::Bench(args) => bench::run(args, global),
        Command::Version(args) => version::run(args, global),
        Command::Help(args) => help::run(args),
    }
}
