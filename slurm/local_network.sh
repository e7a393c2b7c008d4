#!/usr/bin/env bash
# A slow network of N virtual nodes on this machine: slurm/local_network.sh start N [--rate R]
#
#   slurm/local_network.sh start 2 --rate 400mbit   # what each cable carries, each way; without --rate no limit
#   slurm/local_network.sh run node1 COMMAND...     # as on a machine of that name
#   slurm/local_network.sh cable node2 down         # pull it; `up` plugs it in again
#   slurm/local_network.sh rate 100mbit             # of all cables from now on; `none` for no limit
#   slurm/local_network.sh status
#   slurm/local_network.sh stop                     # ends what runs on the nodes, and removes them
#
# A node is a network namespace with one interface, eth0, and a name and a hosts file of its own. Its cable (a veth pair)
# leads to a switch: a bridge, in one more namespace. This machine is plugged in too, without a limit, as `host`.
# `tc tbf` limits what a node sends at its own end, and what it receives at the switch's. `address NODE`, `space NODE` and
# `processes NODE` print a node's address, the name of its namespace, and what runs there. Needs root, iproute2 and
# util-linux.
#
#   MOE_DIST_NETWORK   its folder (default: moe_dist-network under ${TMPDIR:-/tmp}); its name is in all other names, so
#                      two networks can live side by side, and `stop` finds all of one, also after a crash
#
# Exit code 3: this machine or container cannot do it.
set -euo pipefail
export PATH="$PATH:/usr/sbin:/sbin"

home="$(realpath -m -- "${MOE_DIST_NETWORK:-${TMPDIR:-/tmp}/moe_dist-network}")"
tag="$(sha256sum <<<"$home" | cut -c1-8)"
prefix="moe_dist-$tag" # of namespaces
uplink="md-$tag"       # this machine's interface; the kernel allows 15 characters

main() {
  case "${1:-} $#" in
    "start 2") start "$2" none ;;
    "start 4") [[ "$3" == --rate ]] || usage; start "$2" "$4" ;;
    run\ [3-9] | run\ [1-9][0-9]*) run "${@:2}" ;;
    "cable 3") cable "$2" "$3" ;;
    "rate 2") set_rate "$2" ;;
    "address 2") address "$2" ;;
    "space 2") check_node "$2"; space "$2" ;;
    "processes 2") check_node "$2"; ip netns pids "$(space "$2")" ;;
    "status 1") status ;;
    "stop 1") stop ;;
    *) usage ;;
  esac
}

start() {
  local nodes="$1" rate="$2" k
  [[ "$nodes" =~ ^[1-9][0-9]?$ ]] || fail "start $nodes: say how many nodes, 1 to 99"
  check_rate "$rate"
  check_machine
  ! is_up || fail "already running in $home: stop it first"
  [[ -z "$(leftovers)" && ! -e "$home" ]] || stop # what a crash left behind
  mkdir -- "$home"
  trap stop EXIT

  ip netns add "$(space switch)" || cannot "ip netns add failed: this machine or container allows no namespaces"
  ip -n "$(space switch)" link add switch mtu 9000 type bridge
  ip -n "$(space switch)" link set switch up
  local subnet
  subnet="$(free_subnet)"
  {
    echo "127.0.0.1 localhost"
    for ((k = 1; k <= nodes; k++)); do echo "$subnet.$k node$k"; done
    echo "$subnet.254 host $(hostname)"
  } >"$home/hosts"
  ip link add "$uplink" mtu 9000 type veth peer name host mtu 9000 netns "$(space switch)"
  ip -n "$(space switch)" link set host master switch up
  ip address add "$subnet.254/24" dev "$uplink"
  ip link set "$uplink" addrgenmode none up
  for ((k = 1; k <= nodes; k++)); do add_node "node$k"; done
  set_rate "$rate" || cannot "tc qdisc add ... tbf failed: this kernel has no token bucket filter (CONFIG_NET_SCH_TBF)"
  trap - EXIT
  echo "$nodes nodes are up in $home, $subnet.1 to $subnet.$nodes"
}

add_node() {
  local node="$1" inside
  inside="$(space "$node")"
  ip netns add "$inside"
  install -D -m 644 "$home/hosts" "/etc/netns/$inside/hosts" # `ip netns exec` lays it over /etc/hosts
  ip -n "$inside" link set lo up
  ip -n "$inside" link add eth0 mtu 9000 type veth peer name "$node" mtu 9000 netns "$(space switch)"
  ip -n "$(space switch)" link set "$node" master switch up
  ip -n "$inside" address add "$(address "$node")/24" dev eth0
  ip -n "$inside" link set eth0 addrgenmode none up # no IPv6 address, which programs might prefer
}

run() {
  local node="$1"
  shift
  check_node "$node"
  # shellcheck disable=SC2016 # the inner shell expands them
  exec ip netns exec "$(space "$node")" unshare --uts -- \
    bash -c 'echo "$0" >/proc/sys/kernel/hostname && exec -- "$@"' "$node" "$@"
}

cable() {
  check_node "$1"
  [[ "$2" == up || "$2" == down ]] || fail "cable $1 $2: say up or down"
  ip -n "$(space switch)" link set "$1" "$2" # at the switch's end: the node keeps its address and loses the carrier
}

set_rate() {
  local rate="$1" node burst
  check_rate "$rate"
  check_up
  burst="$(burst_of "$rate")"
  for node in $(nodes); do
    limit "$rate" "$burst" "$(space "$node")" eth0 || return 1
    limit "$rate" "$burst" "$(space switch)" "$node" || return 1
  done
  echo "$rate" >"$home/rate"
}

limit() {
  if [[ "$1" == none ]]; then
    tc -n "$3" qdisc delete dev "$4" root 2>/dev/null || true # there may be none
  else
    tc -n "$3" qdisc replace dev "$4" root tbf rate "$1" burst "$2" latency 50ms
  fi
}

# Bytes that may go at once after a pause: 4 ms of the rate, so that a processor that comes late loses nothing, and at
# least 64 KiB, the most that TCP hands over in one piece.
burst_of() {
  local rate="$1" bits=0
  case "$rate" in
    *kbit) bits="${rate%kbit}000" ;;
    *mbit) bits="${rate%mbit}000000" ;;
    *gbit) bits="${rate%gbit}000000000" ;;
  esac
  local bytes=$((bits / 8 / 250))
  echo $((bytes > 65536 ? bytes : 65536))
}

address() {
  check_up
  awk -v name="$1" '$2 == name { print $1; found = 1 } END { exit !found }' "$home/hosts" ||
    fail "no $1 in $home: choose one of $(nodes | xargs) host"
}

status() {
  check_up
  local node carrier
  for node in $(nodes); do
    carrier="$(ip -n "$(space switch)" -o link show "$node" | grep -qw LOWER_UP && echo up || echo down)"
    echo "$node $(address "$node") cable $carrier, rate $(<"$home/rate")"
  done
}

stop() {
  [[ -n "$(leftovers)" || -e "$home" ]] || { echo "nothing in $home"; return; }
  ((EUID == 0)) || fail "run this as root"
  local inside tick pids
  for inside in $(leftovers); do
    for ((tick = 0; tick < 50; tick++)); do
      pids="$(ip netns pids "$inside" 2>/dev/null || true)" # a start that died may leave a name without a namespace
      [[ -n "$pids" ]] || break
      xargs --no-run-if-empty kill -KILL <<<"$pids" 2>/dev/null || true
      sleep 0.1
    done
    ip netns delete "$inside" # its ends of cables go with it
  done
  ip link delete "$uplink" 2>/dev/null || true
  rm -rf -- /etc/netns/"$prefix"-*
  rmdir --ignore-fail-on-non-empty /etc/netns 2>/dev/null || true
  rm -f -- "$home/hosts" "$home/rate"
  [[ ! -e "$home" ]] || rmdir -- "$home" # which fails where somebody has put something of his own
  echo "stopped, and removed $home"
}

check_machine() {
  ((EUID == 0)) || cannot "run this as root: others may make no network namespaces"
  local tool missing=()
  for tool in ip tc unshare; do
    command -v "$tool" >/dev/null || missing+=("$tool")
  done
  ((${#missing[@]} == 0)) || cannot "no ${missing[*]} here; Debian and Ubuntu: apt-get install iproute2 util-linux"
}

check_rate() {
  [[ "$1" == none || "$1" =~ ^[1-9][0-9]{0,5}(kbit|mbit|gbit)$ ]] ||
    fail "rate $1: say a number and kbit, mbit or gbit, for example 400mbit, or none"
}

check_up() { [[ -f "$home/hosts" ]] || fail "no network in $home: start one, or set MOE_DIST_NETWORK"; }
check_node() {
  check_up
  nodes | grep -qxF -- "$1" || fail "no $1 in $home: choose one of $(nodes | xargs)"
}

# 198.18.0.0/15 is set aside for measuring networks (RFC 2544); another network of this script has another part of it.
free_subnet() {
  local first="$((16#$tag % 256))" n
  for ((n = first; n < first + 256; n++)); do
    if [[ -z "$(ip -4 route show root "198.18.$((n % 256)).0/24")" ]]; then
      echo "198.18.$((n % 256))"
      return
    fi
  done
  fail "no free /24 in 198.18.0.0/16: stop other networks"
}

is_up() { [[ -f "$home/rate" && -e "/run/netns/$(space switch)" ]]; }
leftovers() { find /run/netns -maxdepth 1 -name "$prefix-*" -printf '%f\n' 2>/dev/null || true; }
nodes() { awk '$2 ~ /^node[0-9]+$/ { print $2 }' "$home/hosts"; }
space() { echo "$prefix-$1"; }
usage() { fail "usage: slurm/local_network.sh start N [--rate R] | run NODE COMMAND... | cable NODE down|up | rate R | status | stop"; }
cannot() { echo "$*" >&2; exit 3; }
fail() { echo "$*" >&2; exit 1; }

main "$@"
