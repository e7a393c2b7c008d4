#!/usr/bin/env bash
# A real Slurm with N virtual nodes on this machine, to try job scripts on: slurm/local_cluster.sh start N | stop | status
#
#   slurm/local_cluster.sh start 2
#   export SLURM_CONF=...            # `start` prints this line
#   sbatch slurm/train.sbatch configs/quickstart.yaml
#   slurm/local_cluster.sh stop      # ends its jobs and daemons, and removes its folder
#
# Needs root, and the daemons: apt-get install slurmctld slurmd slurm-client munge (Debian 12, Ubuntu 22.04 or newer).
# It has its own key, sockets and ports, and does not touch another Slurm or munge of this machine.
#
#   MOE_DIST_CLUSTER        its folder (default: moe_dist-slurm under ${TMPDIR:-/tmp})
#   MOE_DIST_CLUSTER_PORT   its first port, of N + 1 (default: 17000)
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

home="${MOE_DIST_CLUSTER:-${TMPDIR:-/tmp}/moe_dist-slurm}"
port="${MOE_DIST_CLUSTER_PORT:-17000}"
export SLURM_CONF="$home/slurm.conf"

main() {
  case "${1:-} $#" in
    "start 2") start "$2" ;;
    "stop 1") stop ;;
    "status 1") status ;;
    *) fail "usage: slurm/local_cluster.sh start N | stop | status" ;;
  esac
}

start() {
  local nodes="$1"
  [[ "$nodes" =~ ^[1-9][0-9]?$ ]] || fail "start $nodes: say how many nodes, 1 to 99"
  check_machine
  if controller_answers; then
    echo "already running in $home: $(node_count) nodes"
    show_export
    return
  fi
  [[ ! -e "$home" ]] || stop # what a crash left behind
  install -d -m 755 "$home" "$home/log" "$home/state" "$home/spool"
  trap 'say_logs; stop' ERR

  (umask 077 && dd if=/dev/urandom of="$home/munge.key" bs=128 count=1 status=none)
  munged --force --key-file="$home/munge.key" --socket="$home/munge.socket" \
    --pid-file="$home/munged.pid" --log-file="$home/log/munged.log" --seed-file="$home/munge.seed"
  write_conf "$nodes"
  slurmctld -c
  local k
  for ((k = 1; k <= nodes; k++)); do
    slurmd -N "node$k"
  done
  wait_until 30 all_idle "$nodes"
  trap - ERR
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
  find "$home" -mindepth 1 ! -path "$SLURM_CONF" -delete # a folder with slurm.conf in it can still be stopped again
  rm -rf -- "$home"
  echo "stopped, and removed $home"
}

status() {
  controller_answers || fail "no local cluster answers in $home"
  sinfo --Node --format="%N %T"
  squeue
  show_export
}

check_machine() {
  ((EUID == 0)) || fail "run this as root: slurmd starts the tasks of other users"
  local tool missing=()
  for tool in munged slurmctld slurmd sbatch; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  ((${#missing[@]} == 0)) ||
    fail "no ${missing[*]} here; Debian and Ubuntu: apt-get install slurmctld slurmd slurm-client munge"
}

write_conf() {
  local nodes="$1" host cpus k
  host="$(hostname)"
  cpus="$(getconf _NPROCESSORS_ONLN)" # nproc follows OMP_NUM_THREADS
  {
    cat <<CONF
ClusterName=moe_dist
SlurmctldHost=$host(127.0.0.1)
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
SlurmdTimeout=10
ReturnToService=2
MailProg=/bin/true
CONF
    for ((k = 1; k <= nodes; k++)); do
      echo "NodeName=node$k NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + k)) CPUs=$cpus State=UNKNOWN"
    done
    echo "PartitionName=all Nodes=ALL Default=YES State=UP"
  } >"$SLURM_CONF"
}

controller_answers() { [[ -f "$SLURM_CONF" ]] && timeout 5 scontrol ping 2>/dev/null | grep -q "is UP"; }
node_count() { sinfo --noheader --Node --format=%N | wc -l; }
all_idle() { [[ "$(sinfo --noheader --Node --states=idle --format=%N 2>/dev/null | wc -l)" == "$1" ]]; }
no_jobs() { [[ -z "$(squeue --noheader 2>/dev/null)" ]]; }
is_gone() { ! kill -0 "$1" 2>/dev/null; }

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

show_export() { echo "export SLURM_CONF=$(printf %q "$SLURM_CONF")"; }
say_logs() { tail -n 20 "$home"/log/*.log >&2 || true; }
fail() { echo "$*" >&2; exit 1; }

main "$@"
