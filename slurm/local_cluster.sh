#!/usr/bin/env bash
# A real Slurm with N virtual nodes on this machine, to try job scripts on: slurm/local_cluster.sh start N | stop | status
#
#   slurm/local_cluster.sh start 2
#   export SLURM_CONF=...            # `start` prints this line
#   sbatch slurm/train.sbatch configs/quickstart.yaml
#   slurm/local_cluster.sh stop      # ends its jobs and daemons, and removes its folder
#
#   slurm/local_cluster.sh start 2 --rate 1gbit   # each node with an address and a slow cable of its own
#   slurm/local_cluster.sh start 2 --preempt      # a partition `urgent` too, whose jobs take the nodes from others'
#   slurm/local_cluster.sh lose node2             # kill -9 of all that runs on it, slurmd too; `return node2` starts slurmd
#   slurm/local_cluster.sh cable node2 down       # with --rate: pull it; `up` plugs it in again
#
# Needs root, and the daemons: apt-get install slurmctld slurmd slurm-client munge (Debian 12, Ubuntu 22.04 or newer).
# With --rate, nodes are those of slurm/local_network.sh, and iproute2 is needed; without, all are this machine.
# It has its own key, sockets and ports, and does not touch another Slurm or munge of this machine.
#
#   MOE_DIST_CLUSTER          its folder (default: moe_dist-slurm under ${TMPDIR:-/tmp})
#   MOE_DIST_CLUSTER_PORT     its first port, of N + 1 (default: 17000)
#   MOE_DIST_CLUSTER_SILENT   seconds after which, at the earliest, a node that is silent is taken for lost (default: 10)
#   MOE_DIST_CLUSTER_GRACE    with --preempt: seconds that a job has to end when its nodes are taken (default: 30)
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

home="${MOE_DIST_CLUSTER:-${TMPDIR:-/tmp}/moe_dist-slurm}"
port="${MOE_DIST_CLUSTER_PORT:-17000}"
export SLURM_CONF="$home/slurm.conf"

main() {
  case "${1:-} $#" in
    start\ [2-5]) start "${@:2}" ;;
    "stop 1") stop ;;
    "status 1") status ;;
    "cable 3") has_network || fail "no cables in $home: start with --rate"; network cable "$2" "$3" ;;
    "lose 2") lose "$2" ;;
    "return 2") check_node "$2"; start_slurmd "$2" ;;
    *) usage ;;
  esac
}

start() {
  local nodes="$1" rate="" preempt=""
  [[ "$nodes" =~ ^[1-9][0-9]?$ ]] || fail "start $nodes: say how many nodes, 1 to 99"
  shift
  while (($#)); do
    case "$1 $#" in
      --rate\ [2-9]) rate="$2"; shift 2 ;;
      --preempt*) preempt=yes; shift ;;
      *) usage ;;
    esac
  done
  check_machine "$rate"
  if controller_answers; then
    [[ -z "$rate$preempt" ]] || fail "already running in $home, perhaps with other flags: stop it first"
    echo "already running in $home: $(node_count) nodes"
    show_export
    return
  fi
  [[ ! -e "$home" ]] || stop # what a crash left behind
  install -d -m 755 "$home" "$home/log" "$home/state" "$home/spool"
  trap 'say_logs; stop' EXIT

  (umask 077 && dd if=/dev/urandom of="$home/munge.key" bs=128 count=1 status=none)
  munged --force --key-file="$home/munge.key" --socket="$home/munge.socket" \
    --pid-file="$home/munged.pid" --log-file="$home/log/munged.log" --seed-file="$home/munge.seed"
  if [[ -n "$rate" ]]; then
    network start "$nodes" --rate "$rate"
    echo "CgroupPlugin=cgroup/v1" >"$home/cgroup.conf" # to look for the version fails in /sys of a namespace
  fi
  write_conf "$nodes" "$preempt"
  slurmctld -c
  local k
  for ((k = 1; k <= nodes; k++)); do start_slurmd "node$k"; done
  wait_until 30 all_idle "$nodes"
  trap - EXIT
  echo "$nodes nodes are up in $home"
  show_export
}

stop() {
  [[ -e "$home" ]] || { echo "nothing in $home"; return; }
  [[ -f "$SLURM_CONF" || -f "$home/munge.key" ]] || fail "$home is not a local cluster: left alone"
  if controller_answers; then
    squeue --noheader --format=%A | sort -u | xargs --no-run-if-empty scancel 2>/dev/null || true
    wait_until 15 no_jobs || true # jobs save and leave on SIGTERM
  fi
  end_processes KILL "$(job_processes)"
  local file
  for file in "$home"/node*.pid "$home/slurmctld.pid" "$home/munged.pid"; do
    [[ ! -f "$file" ]] || end_daemon "$(<"$file")"
  done
  if has_network; then network stop; fi
  find "$home" -mindepth 1 ! -path "$SLURM_CONF" -delete # a folder with slurm.conf in it can still be stopped again
  rm -rf -- "$home"
  echo "stopped, and removed $home"
}

status() {
  controller_answers || fail "no local cluster answers in $home"
  sinfo --Node --format="%N %T" | uniq
  squeue
  if has_network; then network status; fi
  show_export
}

# Its SLURMD_NODENAME is for the keepers that it starts: so all processes of a node carry its name.
start_slurmd() {
  local command=(env "SLURMD_NODENAME=$1" slurmd -N "$1")
  if has_network; then network run "$1" "${command[@]}"; else "${command[@]}"; fi
}

# What a machine whose power fails looks like from outside.
lose() {
  check_node "$1"
  local tick pids
  for ((tick = 0; tick < 10; tick++)); do
    pids="$(node_processes "$1")"
    [[ -n "$pids" ]] || return 0
    end_processes KILL "$pids"
    sleep 0.1
  done
  fail "cannot end processes $(xargs <<<"$pids") of $1"
}

check_machine() {
  ((EUID == 0)) || fail "run this as root: slurmd starts the tasks of other users"
  ((${#home} <= 68)) || # and the 39 of /spool/node99/node99_1234567.4294967291 are the 107 that a socket's path may have
    fail "$home is too long a path for Slurm's sockets: name one of at most 68 characters with MOE_DIST_CLUSTER"
  local rate="$1" tool missing=()
  for tool in munged slurmctld slurmd sbatch ${rate:+ip tc unshare}; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  ((${#missing[@]} == 0)) ||
    fail "no ${missing[*]} here; Debian and Ubuntu: apt-get install slurmctld slurmd slurm-client munge${rate:+ iproute2 util-linux}"
}

write_conf() {
  local nodes="$1" preempt="$2" host cpus k at
  host="$(hostname)"
  cpus="$(getconf _NPROCESSORS_ONLN)" # nproc follows OMP_NUM_THREADS
  {
    cat <<CONF
ClusterName=moe_dist
SlurmctldHost=$host($(address_of host))
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits until its old credentials are void: two minutes unless said otherwise.
AuthInfo=socket=$home/munge.socket,cred_expire=10
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool/%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/%n.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/%n.log
# Without cgroups, which many containers lack.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdTimeout=${MOE_DIST_CLUSTER_SILENT:-10}
ReturnToService=2
MailProg=/bin/true
CONF
    for ((k = 1; k <= nodes; k++)); do
      at="NodeHostname=$(has_network && echo "node$k" || echo "$host") NodeAddr=$(address_of "node$k")"
      echo "NodeName=node$k $at Port=$((port + k)) CPUs=$cpus State=UNKNOWN"
    done
    if [[ -z "$preempt" ]]; then
      echo "PartitionName=all Nodes=ALL Default=YES State=UP"
    else
      echo "PreemptType=preempt/partition_prio"
      echo "PreemptMode=REQUEUE"
      echo "PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=${MOE_DIST_CLUSTER_GRACE:-30}"
      echo "PartitionName=urgent Nodes=ALL State=UP PriorityTier=2 PreemptMode=OFF"
    fi
  } >"$SLURM_CONF"
}

controller_answers() { [[ -f "$SLURM_CONF" ]] && timeout 5 scontrol ping 2>/dev/null | grep -q "is UP"; }
node_names() { sed -n 's/^NodeName=\(node[0-9]*\) .*/\1/p' "$SLURM_CONF"; }
node_count() { node_names | wc -l; }
all_idle() { [[ "$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | sort -u | wc -l)" == "$1" ]]; }
no_jobs() { [[ -z "$(squeue --noheader 2>/dev/null)" ]]; }
is_gone() { ! kill -0 "$1" 2>/dev/null; }

has_network() { [[ -d "$home/network" ]]; }
network() { MOE_DIST_NETWORK="$home/network" "$(dirname "${BASH_SOURCE[0]}")/local_network.sh" "$@"; }
address_of() { if has_network; then network address "$1"; else echo 127.0.0.1; fi; }

check_node() {
  [[ -f "$SLURM_CONF" ]] || fail "no local cluster in $home"
  grep -q "^NodeName=$1 " "$SLURM_CONF" || fail "no $1 in $home: $(node_names | xargs)"
}

# Processes of jobs, their children and Slurm's keepers of them: all carry this cluster's SLURM_CONF, and either a job's
# number or the keeper's name.
job_processes() {
  local file folder
  grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null | while read -r file; do
    folder="${file%/environ}"
    if grep -qzs "^SLURM_JOB_ID=" "$file" || grep -qsx slurmstepd "$folder/comm"; then
      echo "${folder#/proc/}"
    fi
  done || true
}

node_processes() {
  if has_network; then network processes "$1"; return; fi
  local file
  grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null | while read -r file; do
    ! grep -qzxs "SLURMD_NODENAME=$1" "$file" || basename "${file%/environ}"
  done || true
}

end_processes() {
  local pid
  for pid in $2; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}

# A pid file can outlive its process, and the number then belongs to somebody else: look at the name first.
end_daemon() {
  local pid="$1" name
  name="$(cat "/proc/$pid/comm" 2>/dev/null || true)"
  case "$name" in munged | slurmctld | slurmd) ;; *) return 0 ;; esac
  end_processes TERM "$pid"
  wait_until 10 is_gone "$pid" || end_processes KILL "$pid"
}

wait_until() {
  local seconds="$1" tick
  shift
  for ((tick = 0; tick < seconds * 5; tick++)); do
    if "$@"; then return 0; fi
    sleep 0.2
  done
  return 1
}

usage() { fail "usage: slurm/local_cluster.sh start N [--rate R] [--preempt] | lose NODE | return NODE | cable NODE down|up | status | stop"; }
show_export() { echo "export SLURM_CONF=$(printf %q "$SLURM_CONF")"; }
say_logs() { tail -n 20 "$home"/log/*.log >&2 || true; }
fail() { echo "$*" >&2; exit 1; }

main "$@"
