"""How far a corpus is, and what it was begun with: FOLDER/state.json, by which the work is taken up again."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.data.index_writer import Written
from moe_dist.data.prepare.blocks import Place
from moe_dist.disk import replace_text


@dataclass(frozen=True)
class Mark:
    """How far it is: sources that are done, the place in the next one, what is written. read: bytes of all sources.
    bad, empty: how many records of each reason are left out. bad_bytes: of bad.jsonl."""

    source: int = 0
    place: Place = field(default_factory=Place)
    written: Written = field(default_factory=Written)
    read: int = 0
    bad_bytes: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    empty: int = 0

    @staticmethod
    def of(record: dict[str, Any]) -> "Mark":
        parts = {"place": Place(**record["place"]), "written": Written(**record["written"])}
        return Mark(**(record | parts))


def read_state(folder: Path, settings: dict[str, Any]) -> tuple[Mark, bool]:
    """(the last mark, whether all was done by then)."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Mark(), False
    except ValueError as error:
        raise ValueError(f"{folder}/state.json is damaged: {error}; remove {folder}") from None
    if differ := [name for name, value in settings.items() if state["settings"].get(name) != value]:
        raise ValueError(
            f"{folder} was begun with other {' and '.join(differ)}: continue it as it was begun, or remove it"
        )
    return Mark.of(state["mark"]), state["complete"]


def write_state(folder: Path, settings: dict[str, Any], mark: Mark, complete: bool) -> None:
    state = {"settings": settings, "mark": asdict(mark), "complete": complete}
    replace_text(folder / "state.json", json.dumps(state, indent=1))
