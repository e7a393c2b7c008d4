"""Runs for faults: small, on two ranks, on a text that holds more samples than any of them reads."""

from pathlib import Path
from typing import Any

from moe_dist.chaos.series import Series, Start
from moe_dist.config.parse import parse_dict
from tests.dist.helpers import TINY

ZERO1 = {"engine": {"name": "deepspeed", "zero_stage": 1}, "parallel": {"ep": 2}}
BATCH = TINY["train"]["global_batch"]


def series(folder: Path, steps: int, ranks: int = 2, engine: dict[str, Any] = ZERO1, **sections: Any) -> Series:
    """A run that saves every 5 steps and keeps 2. sections: what to change in `run` and `guard`."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text(" ".join(str(number * number) for number in range(4000)))
    run = {"root": str(folder / "runs"), "save_every": 5, "eval_every": 20, "log_every": 5, "eval_sequences": 2}
    values = TINY | {
        "data": {"kind": "text", "paths": [str(text)]},
        "train": TINY["train"] | {"steps": steps, "threads": 1},
        **engine,
        "run": run | {"tensorboard": False} | sections.get("run", {}),
        "guard": {"max_restarts": None} | sections.get("guard", {}),
    }
    return Series(parse_dict(values, "test"), folder / "starts", ranks)


def native(ep: int) -> dict[str, Any]:
    return {"parallel": {"ep": ep}}


def ended_alone(start: Start) -> None:
    """No rank had to be killed from outside."""
    assert not any(end.killed for end in start.ends), start.said
