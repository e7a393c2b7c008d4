"""moe-dist: the command line. `moe-dist train CONFIG [flags]`, `moe-dist verify [flags]`."""

import argparse
import sys
from collections.abc import Sequence

import moe_dist

_TRAIN = """Train a Mixture-of-Experts language model.

CONFIG is a YAML file (configs/ has some); every key of it is a flag too, with the same name and meaning:
  moe-dist train configs/quickstart.yaml --model.moe.top-k 1 --model.moe.capacity-factor None
Under torchrun or as a Slurm step each rank runs this same command:
  torchrun --nproc_per_node 4 -m moe_dist.cli train configs/quickstart.yaml --parallel.ep 4
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a failed check, 2 what the user got wrong."""
    parser = argparse.ArgumentParser(prog="moe-dist", description=__doc__, add_help=False)
    parser.add_argument("command", nargs="?", choices=["train", "verify", "version"])
    args, rest = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv)[:1])
    rest = list(sys.argv[1:] if argv is None else argv)[1:]
    try:
        match args.command:
            case "train":
                return _train(rest)
            case "verify":
                from moe_dist.verify.command import verify

                return verify(rest)
            case "version":
                print(moe_dist.__version__)
                return 0
    except ValueError as error:
        print(f"moe-dist: {error}", file=sys.stderr)
        return 2
    print("usage: moe-dist {train,verify,version} ...   (moe-dist train --help, moe-dist verify --help)")
    return 2


def _train(args: list[str]) -> int:
    from moe_dist.config.load import load_config, override_config

    parser = argparse.ArgumentParser(prog="moe-dist train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    path = args.pop(0) if args and not args[0].startswith("-") else None
    own, flags = parser.parse_known_args(args)
    config = override_config(
        load_config(path), flags, prog="moe-dist train [CONFIG] [--resume] [--device {cpu,cuda}]", description=_TRAIN
    )
    from moe_dist.train.command import train

    train(config, own.resume, own.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
