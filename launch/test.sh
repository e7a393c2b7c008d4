#!/usr/bin/env bash
# Installs, then checks style, layout, types and numbers: launch/test.sh [PYTEST ARGUMENTS].
# Slow tests are left out; `launch/test.sh -m ''` runs everything.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh dev,bench
export PATH="$PWD/.venv/bin:$PATH"

ruff check
ruff format --check
lint-imports
mypy
pytest "$@"
