"""Commands as README.md and docs/ write them, taken apart by the parsers that they are for.

Commands are the lines of ```bash and those behind `$ ` in ```console. A comment before the block says how far they go:

| comment              | in tests/unit/test_docs.py                                                              |
|----------------------|-----------------------------------------------------------------------------------------|
| none                 | taken apart by the command's own parser, and checked for as many ranks as it starts     |
| <!-- run -->         | that, and run by a slow test, with the others of the page, in their order, in a folder; |
|                      | <!-- run: 75 --> ends with that exit code. ```python may be run too                     |
| <!-- long: WHY -->   | the first, as it takes minutes                                                          |
| <!-- needs: X -->    | the first, as it needs what not every machine has (NEEDS)                               |
| <!-- fails -->       | refused, and with what stands below it                                                  |

```yaml title="NAME" is a file that commands of the page may name. Another configuration, which is the reader's own, is
configs/tiny.yaml here.
"""

import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.cli import COMMANDS
from moe_dist.cluster.arguments import status_arguments
from moe_dist.config.schema import Config
from moe_dist.config.validate import validate
from moe_dist.plan.arguments import check_plan_arguments, measure_arguments, plan_parser
from moe_dist.study.command import _at_dashes as study_at_dashes
from moe_dist.study.command import _parser as study_parser
from moe_dist.study.design.grid import load_study
from moe_dist.study.run.watch import _parser as watch_parser
from moe_dist.train.arguments import run_arguments, with_config

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "configs", "examples", "launch", "moe_dist", "slurm", "tests")
LANGUAGES = {"bash", "console", "json", "python", "text", "toml", "yaml"}
NEEDS = {"gpu", "cluster", "root", "bench"}  # bench: the packages of the extra
ELSEWHERE = set("cd cp curl exit git hf ip kill mkdir pip pre-commit scancel squeue source tensorboard wandb".split())
FENCE = re.compile(r"(?:^<!-- (.+?) -->\n)?^```(\w*) ?(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    mark: str
    language: str
    title: str
    text: str

    def commands(self) -> list[str]:
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        return lines if self.language == "bash" else []


def blocks(page: Path) -> list[Block]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [
        Block(mark or "", language, _title(rest), text) for mark, language, rest, text in (f.groups() for f in found)
    ]


def _title(rest: str) -> str:
    found = re.search(r'title="(.+?)"', rest)
    return found[1] if found else ""


def simple(command: str) -> Iterator[list[str]]:
    """Each simple command of a line, as words: without comments, and without what is set for it."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if re.fullmatch(r"[;&|]+", word):
            if words:
                yield words
            words = []
        else:
            words.append(word)


class Checker:
    """Takes commands apart, in a folder that has what the page gives. Raises where one could not work."""

    def __init__(self, folder: Path, page: Path) -> None:
        self.folder, self.exported = folder, list[str]()
        folder.mkdir(exist_ok=True)
        for name in FOLDERS:
            if not (folder / name).exists():
                (folder / name).symlink_to(ROOT / name)
        for block in blocks(page):
            if block.title and not (folder / block.title).exists():
                (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.title).write_text(block.text, encoding="utf-8")

    def check(self, words: Sequence[str]) -> None:
        outer, words = self._set(words)
        match words:
            case []:
                pass
            case ["moe-dist", *rest] | ["python", "-m", "moe_dist.cli", *rest]:
                self.moe_dist(rest, 1)
            case ["export", *rest]:
                self.exported += rest
            case ["bash", *rest]:
                self.check([*outer, *rest])
            case ["launch/torchrun.sh", ranks, *rest]:
                nodes = dict(each.partition("=")[::2] for each in [*self.exported, *outer]).get("NNODES", "1")
                self.moe_dist(["train", *rest], int(ranks) * int(nodes))
            case ["torchrun", *rest] if "moe_dist.cli" in rest:
                at = rest.index("moe_dist.cli")
                self.moe_dist(rest[at + 1 :], _number(rest[:at], "--nproc_per_node") * _number(rest[:at], "--nnodes"))
            case ["srun", *rest] if "moe-dist" in rest:
                at = rest.index("moe-dist")
                self.moe_dist(rest[at + 1 :], _number(rest[:at], "--nodes") * _number(rest[:at], "--ntasks-per-node"))
            case ["sbatch", *rest] if "slurm/train.sbatch" in rest:
                self.moe_dist(["train", *rest[rest.index("slurm/train.sbatch") + 1 :]], None)
            case ["slurm/local_network.sh", "run", _, *rest]:
                self.check([*outer, *rest])
            case ["python" | "torchrun", *rest]:
                self.script(next(word for word in rest if word.endswith(".py")), rest)
            case ["pytest" | "launch/test.sh" | "ruff" | "mkdocs" | "mypy", *rest]:
                self.exist(word for word in rest if "/" in word and "{" not in word)
            case [script, *rest] if "/" in script:
                self.script(script, rest)
            case [other, *rest]:
                assert other in ELSEWHERE, f"{other}: what is this? ELSEWHERE has commands that are not ours"

    def moe_dist(self, args: Sequence[str], ranks: int | None) -> None:
        """ranks: None where the command does not tell."""
        command, *rest = args
        rest = [self.path(word) for word in rest]
        try:
            config = self.parse(command, rest)
        except SystemExit as done:  # of --help
            assert done.code == 0, args
            return
        if config is not None and command == "train" and ranks is not None:
            validate(config, ranks)

    def parse(self, command: str, rest: list[str]) -> Config | None:
        match command:
            case "version":
                assert not rest
            case "train":
                return run_arguments(command, rest, "")[1]
            case "status":
                assert len(set(rest) - {"--all"}) < 2 or rest[0].endswith(".yaml")
                if rest and rest[0].endswith(".yaml"):
                    status_arguments(rest)
            case "plan" if "--measure" in rest:
                measure_arguments(rest)
            case "plan":
                own, config = with_config(plan_parser(), rest, "", "")
                check_plan_arguments(own)
                validate(config, own.ranks)
            case "study":
                own = study_parser().parse_args(study_at_dashes(rest)[0])
                load_study(own.study)
            case "watch":
                watch_parser().parse_args(rest)
            case _:
                assert command in COMMANDS, f"moe-dist {command}: no such command"
                module, _, name = COMMANDS[command].arguments.partition(":")
                getattr(importlib.import_module(module), name)(rest)
        return None

    def path(self, word: str) -> str:
        """A file of the reader's own, or of a run, is configs/tiny.yaml if the page has none; ours must be there."""
        if word.partition("/")[0] in FOLDERS:
            self.exist([word])
        own = re.fullmatch(r"(runs/)?[\w./-]+\.yaml", word) and not (self.folder / word).exists()
        if own and ("/" not in word or word.startswith("runs/")):
            return "configs/studies/capacity-smoke.yaml" if word == "STUDY.yaml" else "configs/tiny.yaml"
        return word

    def script(self, path: str, args: Sequence[str]) -> None:
        """It is there, and knows its flags."""
        self.exist([path])
        text = (ROOT / path).read_text(encoding="utf-8")
        for flag in (word.partition("=")[0] for word in args if word.startswith("--") and len(word) > 2):
            assert flag in text, f"{path} {flag}"

    def exist(self, paths: Sequence[str] | Iterator[str]) -> None:
        for path in paths:
            assert (self.folder / path).exists(), path

    @staticmethod
    def _set(words: Sequence[str]) -> tuple[list[str], list[str]]:
        at = next((at for at, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
        return list(words[:at]), list(words[at:])


def _number(words: Sequence[str], flag: str) -> int:
    return int(words[words.index(flag) + 1]) if flag in words else 1
