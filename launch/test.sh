#!/usr/bin/env bash
# Installs, then checks style, layout, types and numbers: launch/test.sh [PYTEST ARGUMENTS].
# Slow tests are left out; `launch/test.sh -m ''` runs everything. Tests run in 3 to 8 workers, one more than cores;
# `launch/test.sh -n 0` runs them in one process, as plain `pytest` does: with --pdb or -s, for example.
# As root on Debian or Ubuntu it installs Slurm, iproute2 and Chromium from the distribution, for tests/slurm, tests on
# virtual nodes and the tests of pages; elsewhere those tests skip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh dev,bench,study,data,docs,hf,wandb
export PATH="$PWD/.venv/bin:$PATH"

if ! PATH="$PATH:/usr/sbin" type slurmctld slurmd sbatch munged >/dev/null 2>&1; then
  if ((EUID == 0)) && command -v apt-get >/dev/null; then
    echo "Installing Slurm."
    # What starts at once on a real machine belongs to its owner: packages may not start their own daemons.
    { apt-get update -qq && RUNLEVEL=1 DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
      slurmctld slurmd slurm-client munge; } >/dev/null || echo "WARNING: apt-get could not install Slurm" >&2
  fi
  PATH="$PATH:/usr/sbin" type slurmctld slurmd sbatch munged >/dev/null 2>&1 ||
    echo "WARNING: no Slurm here, so tests/slurm SKIP. Install slurmctld slurmd slurm-client munge as root." >&2
fi

if ! PATH="$PATH:/usr/sbin" type ip tc >/dev/null 2>&1; then
  if ((EUID == 0)) && command -v apt-get >/dev/null; then
    echo "Installing iproute2."
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends iproute2; } \
      >/dev/null || echo "WARNING: apt-get could not install iproute2" >&2
  fi
  PATH="$PATH:/usr/sbin" type ip tc >/dev/null 2>&1 ||
    echo "WARNING: no iproute2 here, so tests on virtual nodes SKIP." >&2
fi

if [[ -z "$(type -P chromium chromium-browser google-chrome)" ]]; then
  if ((EUID == 0)) && command -v apt-get >/dev/null; then
    echo "Installing Chromium."
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium; } \
      >/dev/null || echo "WARNING: apt-get could not install Chromium" >&2
  fi
  [[ -n "$(type -P chromium chromium-browser google-chrome)" ]] ||
    echo "WARNING: no Chromium here, so the tests of pages in a browser SKIP." >&2
fi

# Tests start some hundred processes, and workers read the same files: byte code is kept whatever the environment says.
unset PYTHONDONTWRITEBYTECODE

ruff check
ruff format --check
lint-imports
pytest --collect-only -qq >/dev/null 2>&1 & # compiles the tests while another core checks types; what fails, fails below
collecting=$!
mypy
wait "$collecting" || true
cores="$(python -c 'import os; print(len(os.sched_getaffinity(0)))')"
pytest -n "$((cores < 2 ? 3 : cores > 7 ? 8 : cores + 1))" "$@"
