"""The examples for several ranks run from start to end on two. Each compares its losses with those of one process."""

import os
import runpy
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dist.nursery import close_nurseries, nursery_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "with_ddp.py": ("whole layers: losses", "experts over ranks: losses"),
    "with_deepspeed.py": ("DeepSpeed: losses",),
    "with_fsdp2.py": ("FSDP2: losses",),
}


@dataclass(frozen=True)
class Script:
    """`python path`, with the environment that torchrun gives, forked from a nursery."""

    path: str
    environment: dict[str, str]

    def run(self) -> None:
        os.environ.update(self.environment)
        sys.path.insert(0, str(EXAMPLES))
        runpy.run_path(self.path, run_name="__main__")


@pytest.mark.parametrize("name", SAYS)
def test_example_on_two_ranks(name: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    outputs, nurseries = [tmp_path / f"rank-{rank}" for rank in range(2)], [nursery_of(rank) for rank in range(2)]
    for rank, (nursery, output) in enumerate(zip(nurseries, outputs, strict=True)):
        where = dict(MASTER_ADDR="localhost", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
        with output.open("wb") as file:
            nursery.begin(
                Script(str(EXAMPLES / name), where | dict(RANK=str(rank), LOCAL_RANK=str(rank))), file.fileno()
            )
        nursery.child()
    try:
        codes = [nursery.ended()[0] for nursery in nurseries]
    finally:
        if any(nursery.busy for nursery in nurseries):
            close_nurseries()
    said = [output.read_text() for output in outputs]
    assert codes == [0, 0], "\n".join(said)
    assert all(words in said[0] for words in SAYS[name])
