"""What follows `moe-dist experts`. Light: its help comes without torch."""

import argparse
import math
from collections.abc import Sequence

from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path

ACTIONS = ("list", "upcycle", "add", "split", "merge", "remove", "open", "close")
_OF: dict[str, tuple[str, ...]] = {
    "evaluate": ("list",),
    "starved": ("list",),
    "alike": ("list",),
    "granularity": ("upcycle",),
    "noise": ("upcycle", "add"),
    "init": ("add",),
    "sources": ("add",),
    "d_ff": ("add",),
    "weights": ("merge",),
    "output": ACTIONS[1:],
    "moments": ACTIONS[1:],
    "no_loss": ACTIONS[1:],
}
"""Which flags are of which actions."""
_MOE = "--model.moe."
_USAGE = "moe-dist experts RUN ACTION [WHICH ...] --output FOLDER [flags]"
_ABOUT = """Change the experts of a trained model, from one checkpoint to another, without training.

  moe-dist experts RUN list                                starved experts, experts that are alike, closed ones
  moe-dist experts RUN upcycle 8 --model.moe.top-k 2       a dense model: 8 copies of each feed-forward
  moe-dist experts RUN upcycle 16 --granularity 4 ...      4 copies of each, cut into 4 narrower ones each
  moe-dist experts RUN add 2                               closed copies: outputs stay the same, to the bit
  moe-dist experts RUN open 8,9                            tokens may go to them from here on
  moe-dist experts RUN close 3
  moe-dist experts RUN remove 3                            a closed one: outputs stay the same, to the bit
  moe-dist experts RUN split 2                             each expert into 2 halves, of which twice as many are chosen
  moe-dist experts RUN merge 0,5 2,3                       two experts become one, the mean of their weights

RUN is a run folder, whose newest whole checkpoint is taken, or one checkpoint in it. Nothing in it changes. --output
becomes a run folder with one checkpoint of the same step. `moe-dist train OUTPUT/config.yaml --resume --train.steps N`
continues it, and `--train.init-from OUTPUT` begins another run with its weights.

WHICH names experts in every MoE layer, as 3 or 0,4,5; 1:0,4 means those of layer 1 (a number of `list`) alone.

Adam's moments follow the weights (--moments carry), as each expert's gradient will be after the change:
  upcycle       of c copies, each has 1/c of the dense layer's mean and 1/c^2 of its mean square; routers begin at 0
  split         a part has those of its hidden units; where weights are multiplied by s, 1/s and 1/s^2 of them
  merge         the mean, weighted as the weights are
  add           0 for what is added
  remove, open, close    all that is left keeps its own
--moments zero: those of routers and experts in changed layers are 0. A checkpoint of weights alone begins with 0.

The loss on the run's validation data is shown before and after (--no-loss leaves it out)."""


def experts_arguments(args: Sequence[str]) -> argparse.Namespace:
    """run, action, which and the flags; moe: flags of model.moe, for upcycle. Raises ValueError for a mistake."""
    first = next((at for at, word in enumerate(args) if word.startswith("-")), len(args))
    words, flags = list(args[:first]), list(args[first:])
    parser = _parser()
    own, rest = parser.parse_known_args(flags)
    if len(words) < 2:
        raise ValueError("moe-dist experts needs a run and what to do: moe-dist experts RUN list; --help tells more")
    own.run, own.action, own.which = user_path(words[0]), words[1], words[2:]
    if own.action not in ACTIONS:
        raise ValueError(f"moe-dist experts: {own.action!r} is no action; choose {', '.join(ACTIONS)}")
    own.moe = rest if own.action == "upcycle" else []
    wrong = [word for word in rest if word.startswith("--") and not word.startswith(_MOE)]
    if wrong or (rest and not own.moe):
        word = wrong[0] if wrong else rest[0]
        raise ValueError(
            f"moe-dist experts {own.action}: {word} is no flag of it; RUN, {own.action} and WHICH come first, "
            "flags follow; --help lists them"
        )
    for name, actions in _OF.items():
        if getattr(own, name) != parser.get_default(name) and own.action not in actions:
            raise ValueError(f"--{name.replace('_', '-')} is of {', '.join(actions)}, not of {own.action}")
    _check(own)
    return own


def _parser() -> Parser:
    parser = Parser("moe-dist experts", _ABOUT, usage=_USAGE)
    add = parser.add_argument
    add("--output", type=user_path, metavar="FOLDER", help="the new run folder, not there yet; needed by all but list")
    add("--moments", choices=["carry", "zero"], default="carry", help="Adam's, see above")
    add("--no-loss", action="store_true", help="do not read the run's data")
    add("--noise", type=float, metavar="X", help="upcycle: normal noise on each copy, relative to the deviation of each"
        " matrix (default: 0, which keeps the function); add: on router rows of copies (default: 0.01)")  # fmt: skip
    add("--granularity", type=int, default=1, metavar="G", help="upcycle: narrower experts that a copy is cut into")
    add("--model.moe.KEY", dest="unused", metavar="VALUE", help="upcycle: how new layers route (default: as in train)")
    add("--init", choices=["clone", "random"], default="clone", help="add: what new experts start from")
    add("--sources", metavar="IDS", help="add: which to copy, as 0,4, or loaded: the most loaded (default: the first)")
    add("--d-ff", type=int, metavar="N", help="add --init random: their width (default: that of the others)")
    add("--weights", choices=["equal", "load"], default="equal", help="merge: the mean is weighted by load, or not")
    add("--evaluate", action="store_true", help="list: loads from the validation data, not from metrics.jsonl")
    add("--starved", type=float, default=0.1, metavar="X", help="list: below this part of an even share")
    add("--alike", type=float, default=0.99, metavar="X", help="list: at this cosine or more")
    return parser


def _check(own: argparse.Namespace) -> None:
    """Raises ValueError for values that cannot be."""
    if own.action == "list":
        if own.which:
            raise ValueError(f"list takes no {' '.join(own.which)!r}: it shows all experts")
        return
    if own.output is None:
        raise ValueError(f"{own.action} writes a new run folder: name it by --output FOLDER")
    if own.output.exists():
        raise ValueError(f"--output {own.output} must name a folder that is not there yet")
    if own.output.resolve().is_relative_to(own.run.resolve()):
        raise ValueError(f"--output {own.output} lies in {own.run}, in which nothing changes: name a folder beside it")
    if own.action in ("add", "upcycle", "split"):
        if len(own.which) != 1 or not own.which[0].isdigit():
            what = {"add": "experts to add", "upcycle": "experts in each MoE layer", "split": "parts of each expert"}
            raise ValueError(f"{own.action} takes one number, of {what[own.action]}, not {' '.join(own.which)!r}")
    elif not own.which:
        raise ValueError(f"{own.action} needs to know which experts: {own.action} 3, or 0,4,5")
    else:
        groups = [group for of_layer in parse_which(own.which).values() for group in of_layer]
        if own.action == "merge" and (alone := [group for group in groups if len(group) < 2]):
            raise ValueError(f"merge takes groups of two experts or more, as 0,5, not {alone[0][0]}")
    if own.noise is not None and not 0 <= own.noise < math.inf:
        raise ValueError(f"--noise {own.noise} must be 0 or more, and finite")


Which = dict[int | None, list[list[int]]]
"""Number of a layer, None for all others -> groups of experts."""


def parse_which(words: Sequence[str]) -> Which:
    """["0,5", "1:2,3"] is {None: [[0, 5]], 1: [[2, 3]]}. Raises ValueError for what is neither."""
    found: Which = {}
    for word in words:
        layer, colon, ids = word.rpartition(":")
        try:
            found.setdefault(int(layer) if colon else None, []).append(numbers(ids))
        except ValueError:
            raise ValueError(f"{word!r} names no experts: write 3, or 0,4,5, or 1:0,4 for those of layer 1") from None
    return found


def numbers(text: str) -> list[int]:
    """ "0,4,5". Raises ValueError."""
    return [int(number) for number in text.split(",")]
