#!/usr/bin/env bash
# From a bare machine to a trained model: launch/quickstart.sh [FLAGS], for example `--train.steps 50`.
# One rank per GPU (a power of two, at most 8), or two ranks on CPU, with the experts spread over all of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/install.sh

gpus="$(.venv/bin/python -c 'import torch; print(torch.cuda.device_count())')"
ranks=2
if ((gpus > 0)); then
  ranks=1
  while ((ranks * 2 <= gpus && ranks < 8)); do
    ranks=$((ranks * 2))
  done
fi

# A run of its own each time: nothing is overwritten.
name="quickstart-$(date +%Y%m%d-%H%M%S)"
exec bash launch/torchrun.sh "$ranks" configs/quickstart.yaml --parallel.ep "$ranks" --run.name "$name" "$@"
