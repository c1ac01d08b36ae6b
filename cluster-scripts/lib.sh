# shellcheck shell=bash
# What the scripts of a local cluster share: where it lives, which processes are its own, and how they are started and stopped.
# Sourced, never run.
#
#   DIR/env             to source: addresses, cluster id, join token, PATH
#   DIR/rN/             a replica: data/ (its own), log, pid
#   DIR/agents/NAME/    an agent: data/ (its own, with the output of jobs), log, pid, start (how it was started)
#
# A pid file holds the process's start time and the machine's boot id beside its number: a number that another process has by now
# is never signalled.
# The scripts need bash, coreutils, util-linux (setsid, flock) and python3 (for JSON); no root, no network.
set -euo pipefail

REPO=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
SCRIPTS=$REPO/cluster-scripts
BOOT=$(</proc/sys/kernel/random/boot_id)

# Below the ephemeral ports (32768 and up), so that no outgoing connection takes a stopped replica's port, and below those of
# MASTER_PORT (29500 and up).
FIRST_PORT=20000
LAST_PORT=29499

# Of the caller's shell, for another cluster perhaps: each script speaks of the cluster in its directory.
GIVEN_TOKEN=${ARES_JOIN_TOKEN:-}
unset ARES_SERVER ARES_CLUSTER ARES_JOIN_TOKEN ARES_OUTPUT WORKER_ID

say() { printf '%s\n' "$*" >&2; }

die() {
  say "${0##*/}: $*"
  exit 1
}

# A slip on the command line.
misuse() {
  say "${0##*/}: $* (${0##*/} --help tells more)"
  exit 2
}

# The value of option $1 out of what is left of the command line.
value_of() {
  [[ $# -ge 2 && -n $2 ]] || misuse "$1 needs a value"
  printf '%s' "$2"
}

# A path as a shell reads it, quoted only where it must be.
quoted() { printf '%q' "$1"; }

# ---------------------------------------------------------------------------------------------------- the cluster's place

# Sets DIR, absolute and without symbolic links: the processes carry it in their command lines.
use_dir() {
  DIR=$(realpath -m -- "${1:-${ARES_DIR:-$REPO/cluster}}")
  AGENTS=$DIR/agents
}

# One script at a time changes a cluster.
lock_dir() {
  mkdir -p -- "$AGENTS"
  : >>"$DIR/.ares-cluster"
  exec 9>>"$DIR/.ares-cluster"
  flock -w 60 9 || die "another script has been at work on $DIR for a minute"
}

need_cluster() {
  [[ -e $DIR/.ares-cluster ]] || die "there is no cluster in $DIR; cluster-scripts/up starts one, --dir or ARES_DIR names another place"
}

# ARES_* of this cluster, for the client commands of a script.
load_env() {
  need_cluster
  [[ -r $DIR/env ]] || die "$DIR/env is missing; cluster-scripts/up writes it"
  # shellcheck disable=SC1091
  source "$DIR/env"
}

release_binary() { printf '%s/release/ares' "${CARGO_TARGET_DIR:-$REPO/target}"; }

# Sets ARES, the binary; builds it when there is none.
use_binary() {
  ARES=${ARES_BIN:-$(release_binary)}
  if [[ -z ${ARES_BIN:-} && ! -x $ARES ]]; then
    build_release
  fi
  [[ -x $ARES && ! -d $ARES ]] || die "$ARES is no program (ARES_BIN names the ares binary to use)"
  ARES=$(realpath -- "$ARES")
}

build_release() {
  command -v cargo >/dev/null || die "cargo is not there, and ARES_BIN names no ares binary: install Rust from https://rustup.rs"
  say "Building the release binary: some minutes at the first time."
  (cd -- "$REPO" && cargo build --release --package cli) >&2 || die "the build failed"
}

# ------------------------------------------------------------------------------------------------------------- processes

# Sets STATE (a letter), PARENT and START (ticks since boot) of process $1; fails when it is gone or a zombie.
look_at() {
  local line=''
  { IFS= read -r -d '' line <"/proc/$1/stat"; } 2>/dev/null || [[ -n $line ]] || return 1
  local -a field
  # The name, in brackets, may hold anything: what counts comes after the last bracket.
  read -r -a field <<<"${line##*) }"
  STATE=${field[0]-} PARENT=${field[1]-} START=${field[19]-}
  [[ -n $START && $STATE != [ZX] ]]
}

# Sets PID when the process of pid file $1 runs, and is still the same.
is_running() {
  local start boot
  { read -r PID start boot <"$1"; } 2>/dev/null || return 1
  [[ $boot == "$BOOT" ]] && look_at "$PID" && [[ $START == "$start" ]]
}

# Starts a daemon with home directory $1 in a session of its own; its output is appended to the log there.
spawn() {
  local home=$1
  shift
  setsid -- "$@" </dev/null >>"$home/log" 2>&1 9>&- &
  local pid=$!
  disown
  look_at "$pid" || die "$1 ended at once: $(tail -n 3 -- "$home/log")"
  printf '%s %s %s\n' "$pid" "$START" "$BOOT" >"$home/pid"
}

# Bytes of a log, to tell new lines from old ones.
log_size() { stat -c %s -- "$1/log" 2>/dev/null || echo 0; }

# What stands in the log of $1 after byte $2.
log_since() { tail -c "+$(($2 + 1))" -- "$1/log"; }

# Repeats a command until it succeeds, for $1 seconds.
within() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

# Stops daemons by their homes: SIGTERM, also to a paused one, then SIGKILL after $1 seconds.
stop_all() {
  local seconds=$1 home
  shift
  for home in "$@"; do
    is_running "$home/pid" || continue
    kill -TERM "$PID" 2>/dev/null || true
    kill -CONT "$PID" 2>/dev/null || true
  done
  within "$seconds" none_runs "$@" || for home in "$@"; do
    if is_running "$home/pid"; then
      say "${home##*/} did not stop within $seconds s: killed."
      kill -KILL "$PID" 2>/dev/null || true
    fi
  done
  within 10 none_runs "$@" || die "a process does not die: $(processes)"
  for home in "$@"; do
    rm -f -- "$home/pid"
  done
}

none_runs() {
  local home
  for home in "$@"; do
    ! is_running "$home/pid" || return 1
  done
}

# Pids of this cluster's daemons and shims ($1: which, such as "shim" or "server agent shim"), found by their command lines.
daemons() {
  local proc arg
  local -a args
  for proc in /proc/[0-9]*; do
    { mapfile -d '' -t args <"$proc/cmdline"; } 2>/dev/null || continue
    [[ ${#args[@]} -ge 3 && " $1 " == *" ${args[1]} "* ]] || continue
    for arg in "${args[@]:2}"; do
      if [[ $arg == "$DIR"/* ]] && look_at "${proc#/proc/}"; then
        echo "${proc#/proc/}"
        break
      fi
    done
  done
}

# Pids of jobs' processes: their output goes to a file of an agent, or they descend from a shim.
job_processes() {
  local line pid
  local -a seeds=()
  while IFS= read -r line; do
    if [[ $line == *" -> $AGENTS/"*/data/attempts/* ]]; then
      pid=${line#/proc/}
      seeds+=("${pid%%/*}")
    fi
  done < <(QUOTING_STYLE=literal stat -c %N /proc/[0-9]*/fd/[12] 2>/dev/null || true)
  mapfile -t -O "${#seeds[@]}" seeds < <(daemons shim)
  descendants "${seeds[@]}"
}

# The given processes and all that descend from them.
descendants() {
  [[ $# -gt 0 ]] || return 0
  local proc pid grown=1
  local -A parents=() found=()
  for proc in /proc/[0-9]*; do
    pid=${proc#/proc/}
    if look_at "$pid"; then parents[$pid]=$PARENT; fi
  done
  for pid in "$@"; do
    if [[ -n ${parents[$pid]-} ]]; then found[$pid]=1; fi
  done
  while ((grown)); do
    grown=0
    for pid in "${!parents[@]}"; do
      if [[ -z ${found[$pid]-} && -n ${found[${parents[$pid]}]-} ]]; then
        found[$pid]=1
        grown=1
      fi
    done
  done
  [[ ${#found[@]} -eq 0 ]] || printf '%s\n' "${!found[@]}"
}

# Pids of everything that belongs to this cluster.
processes() {
  { daemons "server agent shim" && job_processes; } | sort -nu
}

# ---------------------------------------------------------------------------------------------------- replicas and agents

# Names of the replicas, r1 first.
replicas() {
  local home
  for home in "$DIR"/r[0-9]*/; do
    home=${home%/}
    if [[ ${home##*/} =~ ^r[0-9]+$ && -d $home ]]; then echo "${home##*/}"; fi
  done | sort -V
}

agents() {
  local home
  for home in "$AGENTS"/*/; do
    home=${home%/}
    if [[ -e $home/start ]]; then echo "${home##*/}"; fi
  done
}

# Where replica $1 serves clients and agents; nothing before its first start.
api_address() {
  # The file has no line end, and sed would leave it out too.
  { cat -- "$DIR/$1/data/addresses.json" || true; echo; } 2>/dev/null | sed -n 's/.*"api":"\([^"]*\)".*/\1/p'
}

# Addresses of all replicas, comma-separated.
api_addresses() {
  local name
  for name in $(replicas); do
    api_address "$name"
  done | paste -sd, -
}

# Home directory of a target by its name: r1, leader, or an agent's name.
home_of() {
  need_cluster
  local name=$1
  if [[ $name == leader ]]; then
    name=$(leader) || die "there is no leader now; cluster-scripts/status shows who is there"
  fi
  if [[ $name =~ ^r[0-9]+$ && -d $DIR/$name ]]; then
    printf '%s' "$DIR/$name"
  elif [[ $name == "${name//\//}" && -e $AGENTS/$name/start ]]; then
    printf '%s' "$AGENTS/$name"
  else
    die "there is no ${name@Q} in $DIR: replicas $(replicas | paste -sd' ' -), agents $(agents | paste -sd' ' -)"
  fi
}

# The group as its leader of the highest term sees it: the leader's address, then each voter's. Fails while there is none.
group() {
  "$ARES" cluster status --timeout 2 -o json 2>/dev/null | python3 -c '
import json, sys
try:
    replicas = json.load(sys.stdin)
except ValueError:
    sys.exit(1)
leaders = [replica for replica in replicas if replica["role"] == "LEADER"]
if not leaders:
    sys.exit(1)
leader = max(leaders, key=lambda replica: replica["term"])
answering = {replica["address"] for replica in replicas if replica["role"] != "DOWN"}
voters = [member["api"] for member in leader["members"] if member["voter"] and member["api"] in answering]
print(leader["address"], *voters)
'
}

# Name of the replica that leads.
leader() {
  local seen name
  seen=$(group) || return 1
  for name in $(replicas); do
    if [[ $(api_address "$name") == "${seen%% *}" ]]; then
      echo "$name"
      return
    fi
  done
  return 1
}

# Epoch of node $1 when it is ready, which grows at each registration; 0 when it is not there.
node_epoch() {
  "$ARES" nodes --timeout 5 -o json 2>/dev/null | python3 -c '
import json, sys
try:
    nodes = json.load(sys.stdin)
except ValueError:
    nodes = []
print(next((node["epoch"] for node in nodes if node["name"] == sys.argv[1] and node["state"] == "READY"), 0))
' "$1"
}

# Starts agent $1 as its file `start` says, and waits until it has registered.
start_agent() (
  local home=$AGENTS/$1 before offset
  offset=$(log_size "$home")
  local servers='' token='' mock=''
  local -a options=()
  # shellcheck disable=SC1091
  source "$home/start"
  export ARES_SERVER=$servers ARES_CLUSTER='' ARES_JOIN_TOKEN=$token ARES_MOCK_GPU=$mock
  before=$(node_epoch "$1")
  spawn "$home" "$ARES" agent --dir "$home/data" --name "$1" "${options[@]}"
  if within 30 registered_or_gone "$home" "$1" "$before" && is_running "$home/pid"; then
    return 0
  fi
  say "Agent $1 did not register; the end of $home/log:"
  log_since "$home" "$offset" | tail -n 5 >&2
  stop_all 5 "$home"
  return 1
)

registered_or_gone() {
  is_running "$1/pid" || return 0
  (($(node_epoch "$2") > $3))
}

# ------------------------------------------------------------------------------------------------------ starting replicas

# The port of replica $2 for clients (api) or replicas (peer).
port_of() {
  sed -n "s/.*\"$1\":\"[^\"]*:\([0-9]*\)\".*/\1/p" < <(cat -- "$DIR/$2/data/addresses.json" && echo)
}

# Names of the replicas that are spoken of, and how much of their logs was there before they were started.
REPLICAS=()
STARTED=()
declare -A OFFSET=()

# Two ports that nobody listens on.
free_ports() {
  python3 -c '
import random, socket, sys
first, last = int(sys.argv[1]), int(sys.argv[2])
found = []
for port in random.sample(range(first, last + 1), 200):
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
    found.append(port)
    if len(found) == 2:
        break
print(*found)
' "$FIRST_PORT" "$LAST_PORT"
}

# Starts replica $1; more arguments go to ares server.
start_replica() {
  local home=$DIR/$1 ports
  local -a listen=() own_group=()
  if [[ ! -e $home/data/addresses.json ]]; then
    ports=$(free_ports)
    listen=(--listen "127.0.0.1:${ports% *}" --peer-listen "127.0.0.1:${ports#* }")
  else
    ports="$(port_of api "$1") $(port_of peer "$1")"
  fi
  # What it sends can then be told from what others send, by its port's number: `partition` drops it.
  if ((EUID == 0)) && command -v setpriv >/dev/null; then own_group=(setpriv --regid "${ports#* }" --keep-groups); fi
  OFFSET[$1]=$(log_size "$home")
  spawn "$home" "${own_group[@]}" "$ARES" server --dir "$home/data" "${listen[@]}" "${@:2}"
  STARTED+=("$1")
}

# Each replica says in one line that it serves.
await_serving() {
  local name
  for name in "$@"; do
    if within 30 serves_or_gone "$name" && is_running "$DIR/$name/pid"; then continue; fi
    say "Replica $name did not start; the end of $DIR/$name/log:"
    log_since "$DIR/$name" "${OFFSET[$name]}" | tail -n 5 >&2
    exit 1
  done
}

serves_or_gone() {
  is_running "$DIR/$1/pid" || return 0
  log_since "$DIR/$1" "${OFFSET[$1]}" | grep -q '^replica [0-9]* of cluster'
}

# All of REPLICAS are voters that answer.
all_vote() {
  local -a seen
  read -r -a seen <<<"$(group)"
  local name
  for name in "${REPLICAS[@]}"; do
    [[ " ${seen[*]:1} " == *" $(api_address "$name") "* ]] || return 1
  done
}

# What a shell sources. ARES_DIR makes the other scripts speak of this cluster, and DIR/bin has the binary under its own name.
write_env() {
  local name group=''
  for name in "${REPLICAS[@]}"; do
    if [[ -r $DIR/$name/data/env ]]; then
      group=$(grep -E '^export ARES_(CLUSTER|JOIN_TOKEN)=' "$DIR/$name/data/env")
      break
    fi
  done
  mkdir -p -- "$DIR/bin"
  ln -sfn -- "$ARES" "$DIR/bin/ares"
  (
    umask 077
    {
      echo "export ARES_SERVER=$(api_addresses)"
      echo "$group"
      echo "export ARES_DIR=$(quoted "$DIR")"
      if [[ -n ${ARES_BIN:-} ]]; then echo "export ARES_BIN=$(quoted "$ARES")"; fi
      echo "case :\$PATH: in *:$(quoted "$DIR/bin"):*) ;; *) export PATH=$(quoted "$DIR/bin"):\$PATH ;; esac"
    } >"$DIR/env.new"
  )
  mv -- "$DIR/env.new" "$DIR/env"
}

# ----------------------------------------------------------------------------------------------------------------- links

# Rules of this cluster carry its directory's mark.
links_mark() { printf 'ares:%s' "$(printf '%s' "$DIR" | cksum | cut -d' ' -f1)"; }

# Rules of broken links, as iptables writes them; none without iptables.
broken_links() {
  local mark
  mark=$(links_mark)
  { iptables -w -S OUTPUT || true; } 2>/dev/null | grep -F -e "--comment \"$mark\"" -e "--comment $mark " || true
}

# Makes all links of this cluster whole; tells how many rules were in the way.
heal_links() {
  local rule count=0
  local -a words
  HEALED=0
  ((EUID == 0)) || return 0
  while IFS= read -r rule; do
    [[ -n $rule ]] || continue
    read -r -a words <<<"${rule//\"/}"
    iptables -w -D "${words[@]:1}"
    count=$((count + 1))
  done < <(broken_links)
  HEALED=$count
}

# --------------------------------------------------------------------------------------------------- scripts with a target

# The command line `TARGET [--dir DIR]`; sets TARGET and TARGET_HOME. $1 prints the help.
read_target() {
  local usage=$1 dir=''
  shift
  TARGET=''
  while [[ $# -gt 0 ]]; do
    case $1 in
      --dir) dir=$(value_of "$@"); shift 2 ;;
      -h | --help) "$usage" && exit ;;
      -*) misuse "${1@Q} is no option of this script" ;;
      *) [[ -z $TARGET ]] || misuse "${1@Q}: one target at a time"
         TARGET=$1 && shift ;;
    esac
  done
  [[ -n $TARGET ]] || misuse "a target is needed: r1, leader, or an agent's name"
  use_dir "$dir"
  if [[ $TARGET == leader ]]; then
    use_binary
    load_env
  fi
  TARGET_HOME=$(home_of "$TARGET")
}

# Sends a signal to the target's process, and says so.
signal_target() {
  local name=${TARGET_HOME##*/}
  is_running "$TARGET_HOME/pid" || die "$name does not run; cluster-scripts/status shows who does"
  kill -s "$1" "$PID"
  if [[ $1 == KILL ]]; then
    within 10 none_runs "$TARGET_HOME" || die "$name (process $PID) does not die"
    rm -f -- "$TARGET_HOME/pid"
  fi
  if [[ $TARGET == leader ]]; then name+=", which led"; fi
  echo "SIG$1 to $name (process $PID)."
}
