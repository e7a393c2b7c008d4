#!/usr/bin/env bash
# What one CUDA GPU has to say about moe_dist, in one command: launch/gpu.sh [--minutes M] [--sections LETTERS]
# Versions, tests, training beside the CPU, layouts compared, layers and attention beside other systems', waits.
# The report is gpu-report/report.md. `--rehearse` goes through all of it on CPU, with tiny shapes.
#
# It needs no network where python3 has torch and the packages of pyproject.toml; otherwise launch/install.sh first.
#   MOE_DIST_PYTHON   the interpreter (default: the one in .venv, else python3)
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

python="${MOE_DIST_PYTHON:-$root/.venv/bin/python}"
if [[ -z "${MOE_DIST_PYTHON:-}" && ! -x "$python" ]]; then
  python=python3
fi
if ! "$python" -c 'import importlib.util as i; exit(i.find_spec("torch") is None)'; then
  echo "$python has no torch: run launch/install.sh, or name an interpreter that has with MOE_DIST_PYTHON" >&2
  exit 1
fi
exec "$python" "$root/benchmarks/gpu_report.py" "$@"
