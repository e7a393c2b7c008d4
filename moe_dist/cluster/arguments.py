"""What follows `moe-dist status`, `submit` and `cancel`. Light: help and mistakes come without torch."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config import Config
from moe_dist.config.arguments import with_config
from moe_dist.config.flags import Parser
from moe_dist.config.values import user_path
from moe_dist.train.arguments import add_train_flags

_STATUS = """Print in one line how far a run is: none, running, interrupted (its process is gone), finished, preempted
or failed, with its last step and its loss, or how it ended; in a second one its effective training time ratio: seconds
in steps that were kept over those since it was first submitted or started, the queue apart.

RUN is the folder of a run; CONFIG with its flags is what `moe-dist train` takes, and names the same run. What is known
comes from status.json, metrics.jsonl and the starts of the run. For a folder ROOT that holds runs, or without anything
for runs/, a table of all of them: state, step, loss, time left, restarts, effective training time ratio (ETTR), last
job. The points of a study in it are one line.
"""
_SUBMIT = """Check a configuration for so many ranks, and hand slurm/train.sbatch to sbatch, each value as an argument.

  moe-dist submit configs/quickstart.yaml --nodes 2 --gpus-per-node 8 --time 4:00:00 --run.name mine
  moe-dist submit configs/quickstart.yaml --nodes 2 --ranks-per-node 1 -- --mem=0 --exclusive

Any other option of sbatch stands behind --, as --NAME=VALUE.

The run's folder gets slurm/JOB.out, what the job says, and history.jsonl, every start with what ended it.
"""
_CANCEL = """Have a job of a run save, and end: it is asked to save as before its time limit, is not queued again, and
is cancelled when it has not ended --seconds later.

JOB is the number of a job in Slurm; RUN the folder of a run, whose last job is taken.
"""
_SITE = "as sbatch takes it (default: the site's)"
_OF_SBATCH = {
    "time": ("H:MM:SS", "after which the job is ended; as sbatch takes it (default: the site's)"),
    "partition": ("NAME", _SITE),
    "account": ("NAME", _SITE),
    "qos": ("NAME", _SITE),
    "reservation": ("NAME", _SITE),
    "exclude": ("NODES", "as sbatch takes it (default: none)"),
    "array": (
        "0-9%1",
        "jobs one after the other, where the site queues no job again; each continues the run (default: one job)",
    ),
}
"""Options that go to sbatch as they are: what each takes, and its help."""
_OWN = ("--nodes", "--ntasks", "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task", "--wrap")
_SPARE = "more of them, for the place of one that is lost; the job then outlives a lost node"
_GPUS = "GPUs of each; as many ranks, unless --ranks-per-node says otherwise"
_RANKS = "processes on each (default: --gpus-per-node, or 1)"
_HARDWARE = (
    "what the nodes are (h100, h200, a100, b200, or a file of moe-dist plan --measure): a run that is planned not to "
    "fit into their memory is refused, with what to change (default: not asked)"
)
_SITE_FILE = "a file to source in the job: modules, containers, network; see slurm/site.sh.example (default: none)"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of `moe-dist submit`. train: what follows `moe-dist train` in the job. sbatch: options by their
    long names. more: those that were written for sbatch itself. hardware: what the nodes are, where it was said."""

    config: Config
    train: tuple[str, ...]
    nodes: int
    spare: int
    ranks: int
    gpus: int
    sbatch: dict[str, str]
    more: tuple[str, ...]
    site: Path | None
    hardware: str | None
    show: bool

    @property
    def world(self) -> int:
        return self.nodes * self.ranks


def submit_arguments(args: Sequence[str]) -> Request:
    """Raises ValueError for what makes no sense whatever the configuration says."""
    words, more = _at_dashes(list(args))
    parser = _submit_parser()
    own, config = with_config(parser, words, "--nodes N --gpus-per-node G [...] [-- OPTIONS OF sbatch]", _SUBMIT)
    if words[0].startswith("-"):
        raise ValueError("command line: name the file of a configuration first: moe-dist submit CONFIG --nodes N ...")
    ranks = own.ranks_per_node if own.ranks_per_node is not None else own.gpus_per_node or 1
    if own.nodes is None:
        raise ValueError("command line: --nodes is missing: on how many machines is this to train?")
    for name, value, low in (
        ("--nodes", own.nodes, 1),
        ("--spare-nodes", own.spare_nodes, 0),
        ("--gpus-per-node", own.gpus_per_node, 0),
        ("--ranks-per-node", ranks, 1),
    ):
        if value < low:
            raise ValueError(f"command line: {name} {value} is below {low}")
    if own.array is not None and not own.array.endswith("%1"):
        raise ValueError(
            f"command line: --array {own.array}: all jobs of an array train the same run, so they must come one after "
            f"the other; write {own.array.partition('%')[0]}%1"
        )
    if own.site is not None and not own.site.is_file():
        raise ValueError(f"command line: --site {own.site} is no file")
    _refuse_what_is_no_option(more)
    _, flags = parser.parse_known_args(words[1:])
    kept = [f"--{name}={value}" for name in ("override", "device") if (value := getattr(own, name)) is not None]
    return Request(
        config,
        (str(user_path(words[0]).absolute()), *flags, *kept),
        own.nodes,
        own.spare_nodes,
        ranks,
        own.gpus_per_node,
        {name: value for name in _OF_SBATCH if (value := getattr(own, name)) is not None},
        tuple(more),
        own.site.absolute() if own.site is not None else None,
        own.hardware,
        own.print,
    )


def _submit_parser() -> Parser:
    parser = Parser("moe-dist submit", add_help=False)
    add = parser.add_argument
    add("--nodes", type=int, metavar="N", help="machines to train on; needed")
    add("--spare-nodes", type=int, default=0, metavar="N", help=_SPARE)
    add("--gpus-per-node", type=int, default=0, metavar="G", help=_GPUS)
    add("--ranks-per-node", type=int, metavar="N", help=_RANKS)
    for name, (takes, text) in _OF_SBATCH.items():
        add(f"--{name}", metavar=takes, help=text)
    add("--hardware", metavar="NAME", help=_HARDWARE)
    add("--site", type=user_path, metavar="FILE", help=_SITE_FILE)
    add("--print", action="store_true", help="show the call of sbatch, and hand in nothing")
    add("--override", metavar="NAME,..", help="as `moe-dist train` takes it (default: nothing)")
    add("--device", choices=["cpu", "cuda"], help="as `moe-dist train` takes it (default: cuda where there is any)")
    return parser


def status_arguments(args: Sequence[str]) -> argparse.Namespace:
    """folder: of the run that is configured, else of one run or of several; all; configured. Raises ValueError for
    what is neither a folder nor a configuration."""
    words, usage = list(args), "moe-dist status [RUN | ROOT | CONFIG] [--all] [--KEY VALUE ...]"
    parser = Parser("moe-dist status", add_help=False, usage=usage)
    points = "of a folder with studies in it: a line for each of their points (default: one line a study)"
    parser.add_argument("--all", action="store_true", help=points)
    add_train_flags(parser, shown=False)
    named = bool(words) and not words[0].startswith("-")
    folder = user_path(words[0]) if named else Path("runs")
    if folder.is_dir() and (named or not set(words) - {"--all"}):
        other = next((word for word in words[named:] if word != "--all"), None)
        if other is not None:
            raise ValueError(f"{folder} is the folder of a run, and takes no {other}: flags go with a configuration")
        return argparse.Namespace(folder=folder, all="--all" in words, configured=False)
    own, config = with_config(parser, words, "", _STATUS)
    own.folder, own.configured = config.run.folder, True
    return own


def cancel_arguments(args: Sequence[str]) -> argparse.Namespace:
    parser = Parser("moe-dist cancel", _CANCEL)
    parser.add_argument("what", metavar="RUN|JOB", help="folder of a run, or the number of a job")
    parser.add_argument("--seconds", type=int, default=120, metavar="S", help="given to save, before it is cancelled")
    own = parser.parse_args(list(args))
    if own.seconds < 0:
        raise ValueError(f"command line: --seconds {own.seconds} is below 0")
    return own


def _at_dashes(args: list[str]) -> tuple[list[str], list[str]]:
    """What stands before the first `--`, and behind."""
    at = args.index("--") if "--" in args else len(args)
    return args[:at], args[at + 1 :]


def _refuse_what_is_no_option(more: Sequence[str]) -> None:
    """sbatch would take a word that is none for the script to run, and the beginning of an option's name for that
    option. What says how the run is cut is ours."""
    for word in more:
        name = word.partition("=")[0]
        if not word.startswith("--") or name == "--":
            raise ValueError(f"command line: {word!r} behind --: write options of sbatch as --NAME=VALUE, or as --NAME")
        if name != "--gpus" and any(own.startswith(name) for own in _OWN):
            raise ValueError(f"command line: {name} behind --: moe-dist submit sets it itself; leave it out")
        if "--array".startswith(name):
            raise ValueError("command line: --array behind --: write it before, where it is checked")
