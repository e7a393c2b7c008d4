"""`moe-dist train` from its words on. Light at first: signals are noted before anything that takes time is imported."""

import argparse
import os

from moe_dist.process import EarlySignals, output_never_fatal

_ABOUT = """Train a Mixture-of-Experts language model, or with `task: classification` a text classifier.

CONFIG is a YAML file (configs/ has some); every key of it is a flag too, with the same name and meaning:
  moe-dist train configs/quickstart.yaml --model.moe.top-k 1 --model.moe.capacity-factor null
Under torchrun or as a Slurm step each rank runs this same command:
  torchrun --nproc_per_node 4 -m moe_dist.cli train configs/quickstart.yaml --parallel.ep 4

With --resume a run is continued with the same data, tokenizer, seed, seq_len, global_batch and model, or refused. What
is changed on purpose is named: --override data,seed.
SIGUSR2, SIGTERM, SIGINT (Ctrl-C) and run.time_limit make it save after the step at hand, and leave with exit code 75
and `preempted` in status.json. A second Ctrl-C ends it at once.

Exit codes; torchrun returns 1 for all but 0, so status.json has the code of a failure too:
  0  done                                       76  diverged: going back to a checkpoint did not help
  1  failed; the reason is in status.json       77  a rank stood still (guard.stall_seconds)
  2  a mistake of the user                      78  copies of a parameter differ (guard.check_replicas)
  75 saved and stopped: run it again            79  start after start gets no further (guard.max_restarts)
"""


def train(words: list[str]) -> int:
    """Returns the exit code, one of exit_codes.py. Raises ValueError for what a user got wrong."""
    first = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    with EarlySignals(speak=first == "0") as early, output_never_fatal():
        from moe_dist.train.arguments import run_arguments

        own, config = run_arguments("train", words, _ABOUT)
        from moe_dist.train.record.status import is_finished
        from moe_dist.train.resume import as_configured

        folder = config.run.folder
        if own.resume == "auto" and is_finished(folder, config.train.steps) and as_configured(folder, config):
            if first == "0":
                print(f"{folder} has finished its {config.train.steps} steps already")
            return 0
        from moe_dist.train.command import train

        return train(config, own.resume, own.device, _overrides(own), early, own.profile)


def _overrides(own: argparse.Namespace) -> list[str]:
    from moe_dist.train.resume import OVERRIDES

    names = own.override.split(",") if own.override else []
    for name in names:
        if name not in OVERRIDES:
            raise ValueError(f"--override {name!r} is none of {', '.join(OVERRIDES)}")
    if names and own.resume == "never":
        raise ValueError("--override changes what a resumed run must agree on: give --resume too")
    return names
