#!/usr/bin/env bash
# Trains on RANKS processes of this machine: launch/torchrun.sh RANKS CONFIG [FLAGS].
# For example: launch/torchrun.sh 2 configs/quickstart.yaml --parallel.ep 2 --train.steps 100
# It stays in the folder you are in, so that CONFIG and the paths in it mean what they say.
#
# On several machines, start the same command on each, RANKS processes a machine, with
#   NNODES        how many machines (default: 1)
#   NODE_RANK     which one this is, from 0
#   MASTER_ADDR   machine 0, as the others reach it          MASTER_PORT   a free port there (default: 29500)
# As the only task of its node in a Slurm step (srun --ntasks-per-node=1) it knows all but NNODES by itself.
#
# OMP_NUM_THREADS   threads of a rank (default: the CPUs that may be used, divided among RANKS)
#
# `kill -USR2` or `kill` torchrun: the run saves after the step at hand and leaves; --resume continues it.
#
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT   seconds that this may take before ranks are killed (default: 110)
# MOE_DIST_PYTHON                  the interpreter (default: the one in .venv)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [[ $# -lt 2 || ! "$1" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: [NNODES=N NODE_RANK=K MASTER_ADDR=HOST] launch/torchrun.sh RANKS CONFIG [FLAGS]" >&2
  exit 2
fi
ranks="$1"
shift

python="${MOE_DIST_PYTHON:-$root/.venv/bin/python}"
if ! type "$python" >/dev/null 2>&1; then
  echo "$python is not there: run launch/install.sh, or name an interpreter that has moe_dist with MOE_DIST_PYTHON" >&2
  exit 2
fi
# shellcheck source=launch/env.sh
source "$root/launch/env.sh"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"
# torchrun would die of SIGUSR2 and leave its ranks alone. Named here, it passes the signal on and waits for them.
exec "$python" -m moe_dist.parallel.torchrun \
  --nnodes "${NNODES:-1}" --nproc_per_node "$ranks" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR2 -m moe_dist.cli train "$@"
