"""The starts of one run, one after another, and what its ranks wrote down about them.

The committed history of a run is the last execution of each step: what came before was lost with a process, and was
trained again from a checkpoint.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_dist.chaos.fault import Fault, Plan
from moe_dist.chaos.ranks import End, Ranks
from moe_dist.config import Config
from moe_dist.config.load import dump_config

_GRACE = 60.0
"""Seconds that the other ranks of a run that trains have to end after one did. A dead peer raises at once; to leave a
process can take long where many share a core."""
_EARLY_GRACE = 10.0
"""The same where none has come to its first step: ranks that wait for one to join them cannot know that it is dead."""


@dataclass(frozen=True)
class Start:
    """One start. journals: by rank, what each wrote down. began: of `time.time`."""

    began: float
    ends: list[End]
    journals: list[list[dict[str, Any]]]
    log: Path

    @property
    def codes(self) -> list[int]:
        return [end.code for end in self.ends]

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def noted(self, rank: int, what: str, **details: Any) -> list[dict[str, Any]]:
        """Entries of a rank's journal."""
        wanted = {"what": what, **details}
        return [entry for entry in self.journals[rank] if all(entry.get(key) == wanted[key] for key in wanted)]

    @property
    def fired(self) -> list[tuple[Fault, dict[str, Any]]]:
        """The faults that came, with the journal's entry, in order of time."""
        entries = [(Fault(**e["fault"]), e) for rank in range(len(self.ends)) for e in self.noted(rank, "fault")]
        return sorted(entries, key=lambda entry: float(entry[1]["time"]))

    def updates(self) -> list[int]:
        """Steps that rank 0 has trained, in order; those that it went back over again and again."""
        return [entry["step"] for entry in self.noted(0, "phase", phase="update")]

    def first_step(self) -> int | None:
        """The first step that was begun; None where no rank came so far."""
        begun = [entry["step"] for rank in range(len(self.ends)) for entry in self.noted(rank, "phase", phase="data")]
        return min(begun, default=None)


class Series:
    """Starts of `config` on `ranks` ranks; in `folder` are its configuration and, of each start, plan, journals and
    what it printed. The run itself lies where its config says."""

    def __init__(self, config: Config, folder: Path, ranks: int) -> None:
        self.config, self.folder, self.world = config, folder, ranks
        self.run = config.run.folder
        self.checkpoints = self.run / "checkpoints"
        self.starts: list[Start] = []
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")

    def start(
        self,
        faults: Sequence[Fault] = (),
        *flags: str,
        seconds: float = 300,
        watch: Callable[[], object] = lambda: None,
    ) -> Start:
        """Start the ranks and wait for them, as `Ranks.wait`. flags: in place of `--resume auto`."""
        here = self.folder / f"start-{len(self.starts) + 1:03d}"
        here.mkdir()
        paths = [here / f"rank-{rank}.jsonl" for rank in range(self.world)]

        def trains() -> bool:
            return any(path.exists() and b'"phase"' in path.read_bytes() for path in paths)

        plan = Plan(faults=list(faults), journal=str(here), checkpoints=str(self.checkpoints))
        (here / "plan.json").write_text(json.dumps(asdict(plan), indent=1), encoding="utf-8")
        train = ["train", str(self.folder / "config.yaml"), *(flags or ("--resume", "auto"))]
        command = ["moe_dist.chaos.inject", str(here / "plan.json"), *train]
        with Ranks(command, self.world, here / "log.txt") as ranks:
            ends = ranks.wait(seconds, lambda: _GRACE if trains() else _EARLY_GRACE, watch)
        journals = [list(_read(path)) for path in paths]
        self.starts.append(Start(ranks.began, ends, journals, ranks.log))
        return self.starts[-1]

    def samples(self) -> dict[int, list[list[int]]]:
        """Of each step of the committed history: by rank, the places in the data that it read."""
        history: dict[int, list[list[int]]] = {}
        for start in self.starts:
            for rank, journal in enumerate(start.journals):
                for entry in journal:
                    if (entry["what"], entry.get("phase")) == ("phase", "data"):
                        history.setdefault(entry["step"], [[] for _ in range(self.world)])[rank] = []
                    elif entry["what"] == "samples":
                        history[entry["step"]][rank] += entry["starts"]
        return history


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """A journal; empty where the rank did not come so far."""
    for line in path.read_bytes().splitlines() if path.exists() else []:
        yield json.loads(line)
