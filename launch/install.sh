#!/usr/bin/env bash
# Makes .venv with moe_dist in it: launch/install.sh [EXTRAS], for example `launch/install.sh dev,bench,study`.
# Returns at once when nothing changed. Needs python3 with venv, and a C++ compiler for DeepSpeed's optimizers.
#
#   PYTHON            interpreter that makes .venv (default: python3)
#   TORCH_INDEX_URL   package index to take torch from (default: pip's own). PyPI's torch for x86 Linux carries CUDA;
#                     name PyTorch's CPU index here to leave those gigabytes out, or the index of another CUDA version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
device=cpu torch="torch==2.13.0"
if nvidia-smi -L >/dev/null 2>&1; then
  device=cuda torch="torch>=2.11,<2.14"
fi

stamp=".venv/.installed-${extras:-base}"
wanted="$(cksum <pyproject.toml) $device ${TORCH_INDEX_URL:-}"
if [[ -x .venv/bin/python && -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
  exit 0
fi

python="${PYTHON:-python3}"
if [[ -x .venv/bin/python ]]; then
  python=.venv/bin/python
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "$python is $("$python" --version 2>/dev/null || echo missing); moe_dist needs Python 3.11 or newer." >&2
  echo "Name one with PYTHON=/path/to/python3.11, after removing .venv if there is an old one." >&2
  exit 1
fi
if [[ ! -x .venv/bin/python ]]; then
  "$python" -m venv .venv || { rm -rf .venv; exit 1; }
fi

echo "Installing $torch for $device; this can take minutes."
.venv/bin/python -m pip install --quiet ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"

echo "Installing moe_dist${extras:+ with $extras}."
# The constraint keeps the torch of the step above, whatever the other packages would like.
.venv/bin/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >.venv/constraints.txt
.venv/bin/python -m pip install --quiet --constraint .venv/constraints.txt --editable ".${extras:+[$extras]}"

echo "$wanted" >"$stamp"
