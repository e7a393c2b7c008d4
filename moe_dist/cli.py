"""moe-dist: the command line. COMMANDS is the table that usage and dispatch are made of."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import moe_dist
from moe_dist.process import interrupts_held, output_never_fatal

if TYPE_CHECKING:
    from moe_dist.config.flags import Parser


@dataclass(frozen=True, slots=True)
class Command:
    """A command of moe-dist. run and arguments: places of functions, `module:function`, loaded when they are needed."""

    name: str
    takes: str
    about: str
    run: str
    """Of what `arguments` makes of the words behind the name, else of the words themselves. Returns the exit code."""
    arguments: str = ""
    """Reads the words without loading torch, so that help and mistakes come at once."""

    def __call__(self, words: list[str]) -> int:
        own = _load(self.arguments)(words) if self.arguments else words
        with interrupts_held():
            run = _load(self.run)
        code: int = run(own)
        return code


_ALL = (
    Command(
        "train",
        "CONFIG [flags]",
        "train a Mixture-of-Experts language model or text classifier",
        "moe_dist.train.start:train",
    ),
    Command(
        "status",
        "[RUN | ROOT | CONFIG]",
        "how far that run is, or all runs under a folder",
        "moe_dist.cluster.status:status",
        "moe_dist.cluster.arguments:status_arguments",
    ),
    Command(
        "submit",
        "CONFIG --nodes N ...",
        "that run as a job of Slurm, which survives what happens to it",
        "moe_dist.cluster.submit:submit",
        "moe_dist.cluster.arguments:submit_arguments",
    ),
    Command(
        "cancel",
        "RUN | JOB",
        "have such a job save, and end",
        "moe_dist.cluster.cancel:cancel",
        "moe_dist.cluster.arguments:cancel_arguments",
    ),
    Command(
        "watch",
        "[RUN | STUDY]",
        "loss, drops and expert loads in the terminal while it runs",
        "moe_dist.study.run.watch:watch",
    ),
    Command(
        "plan",
        "CONFIG [flags]",
        "memory, bytes and time of a run before it is paid for; search, dry run, measuring",
        "moe_dist.plan.command:plan",
        "moe_dist.plan.arguments:plan_arguments",
    ),
    Command(
        "study",
        "ACTION STUDY",
        "a grid of runs over capacity factors and seeds: plan, run, submit, list, report, export",
        "moe_dist.study.command:study",
    ),
    Command(
        "compare",
        "RUN... [flags]",
        "a page that shows a few runs side by side",
        "moe_dist.study.compare.command:compare",
        "moe_dist.study.compare.arguments:compare_arguments",
    ),
    Command(
        "data",
        "ACTION ...",
        "prepare and inspect corpora, learn a tokenizer",
        "moe_dist.data.command:data",
        "moe_dist.data.arguments:data_arguments",
    ),
    Command(
        "generate",
        "RUN [flags]",
        "text from the model of a run",
        "moe_dist.generate.command:generate_text",
        "moe_dist.generate.arguments:generate_arguments",
    ),
    Command(
        "import",
        "hf PATH ...",
        "a run of a Hugging Face model",
        "moe_dist.interop.command:import_model",
        "moe_dist.interop.arguments:import_arguments",
    ),
    Command(
        "export",
        "hf RUN ...",
        "a Hugging Face folder of the model of a run",
        "moe_dist.interop.command:export_model",
        "moe_dist.interop.arguments:export_arguments",
    ),
    Command(
        "chaos",
        "CONFIG [flags]",
        "break that run on purpose, again and again, and prove that nothing was lost",
        "moe_dist.chaos.command:chaos",
        "moe_dist.chaos.arguments:chaos_arguments",
    ),
    Command(
        "experts",
        "RUN ACTION",
        "list, upcycle, add, split, merge, remove, open or close the experts of a model",
        "moe_dist.surgery.command:experts",
        "moe_dist.surgery.arguments:experts_arguments",
    ),
    Command(
        "checkpoint",
        "ACTION PATH",
        "inspect, verify, convert or diff checkpoints",
        "moe_dist.checkpoint.command:checkpoint",
        "moe_dist.checkpoint.arguments:checkpoint_arguments",
    ),
    Command(
        "verify",
        "[flags]",
        "prove that training means the same in every layout, on this machine",
        "moe_dist.verify.command:verify_as_asked",
        "moe_dist.verify.arguments:verify_arguments",
    ),
    Command(
        "config",
        "CONFIG [KEY ...]",
        "that configuration with its defaults and what `auto` means; what a key means",
        "moe_dist.train.show_config:show_config",
        "moe_dist.train.arguments:config_arguments",
    ),
    Command(
        "doctor",
        "[flags]",
        "what is on this machine and whether training can run here, to paste into an issue",
        "moe_dist.doctor.command:doctor",
        "moe_dist.doctor.arguments:doctor_arguments",
    ),
    Command(
        "completion",
        "SHELL",
        "a script that completes all this in bash, zsh or fish",
        "moe_dist.cli:print_completion",
        "moe_dist.completion:completion_arguments",
    ),
    Command("version", "", "", "moe_dist.cli:print_version"),
)
COMMANDS = {command.name: command for command in _ALL}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a failed check, 2 a wrong input; others: train/exit_codes.py."""
    _print_any_text()
    os.umask(os.umask(0o022) | 0o022)  # what is written, others may read where the user lets them, and never change
    name, *words = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in COMMANDS:
        return _exit_code(COMMANDS[name], words)
    if name in ("help", "-h", "--help"):
        print(usage())
        return 0
    print(f"moe-dist: unknown command {name!r}\n{usage()}" if name else usage(), file=sys.stderr)
    return 2


def usage() -> str:
    calls = {f"{command.name} {command.takes}".strip(): command.about for command in COMMANDS.values()}
    width = max(map(len, calls))
    lines = [f"  {call:{width}}  {about}".rstrip() for call, about in calls.items()]
    return "\n".join(["usage: moe-dist COMMAND ...       (each has --help)", "", *lines])


def parser_of(command: Command) -> "Parser":
    """What reads the words behind it."""
    from moe_dist.config.flags import ASK_PARSER, ParserAsked

    try:
        _load(command.arguments or command.run)([ASK_PARSER])
    except ParserAsked as asked:
        return asked.parser
    raise AssertionError(f"{command.name} reads its words with no Parser")


def print_completion(own: argparse.Namespace) -> int:
    from moe_dist.completion import script

    print(script(own.shell, [(each.name, each.about, parser_of(each)) for each in COMMANDS.values()]))
    return 0


def print_version(words: list[str]) -> int:
    from moe_dist.config.flags import Parser

    Parser("moe-dist version", "Print the version of moe_dist.").parse_args(words)
    print(moe_dist.__version__)
    return 0


def _load(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function


def _exit_code(command: Command, words: list[str]) -> int:
    """What ends it for a reason that a user can do something about is told in one line."""
    try:
        return command(words)
    except ValueError as error:
        _complain(str(error))
        return 2
    except OSError as error:  # a disk that is full, rights that are missing: a traceback says no more than this
        from moe_dist.train.exit_codes import FAILED

        _complain(str(error))
        return FAILED
    except RuntimeError as error:
        from moe_dist.parallel.objects import RankFailed
        from moe_dist.train.exit_codes import FAILED

        if not isinstance(error, RankFailed):
            raise
        _complain(str(error))
        return FAILED
    except KeyboardInterrupt:
        from moe_dist.train.exit_codes import INTERRUPTED

        _complain("interrupted")
        return INTERRUPTED


def _complain(text: str) -> None:
    """Also where nobody hears it: the exit code says it too. What could not be printed before is given up."""
    with output_never_fatal():
        print(f"moe-dist: {text}", file=sys.stderr)


def _print_any_text() -> None:
    """A character that the terminal's encoding lacks, or a byte of a file's name that is no text, is shown by its
    number: é in ASCII as \\xe9. Python would raise, and end a run for a line of its progress."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
