#!/usr/bin/env bash
# Trains on RANKS processes of this machine: launch/torchrun.sh RANKS CONFIG [FLAGS].
# For example: launch/torchrun.sh 2 configs/quickstart.yaml --parallel.ep 2 --train.steps 100
# It stays in the folder you are in, so that CONFIG and the paths in it mean what they say.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [[ $# -lt 2 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/torchrun.sh RANKS CONFIG [FLAGS]" >&2
  exit 2
fi
ranks="$1"
shift

# shellcheck source=launch/env.sh
source "$root/launch/env.sh" "$ranks"
exec "$root/.venv/bin/torchrun" --standalone --nproc_per_node "$ranks" -m moe_dist.cli train "$@"
