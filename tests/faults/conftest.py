"""Ranks of these tests share few cores: one thread each, also in the processes they start."""

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from moe_dist.chaos.series import Series
from tests.dist.programs import forked_ranks
from tests.faults.helpers import series

if TYPE_CHECKING:
    from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Series]:
    """The run of so many steps that nothing has disturbed."""
    made: dict[int, Series] = {}
    folder: Path = tmp_path_factory.mktemp("reference")

    def of(steps: int) -> Series:
        if steps not in made:
            made[steps] = series(folder / str(steps), steps)
            with forked_ranks():
                assert made[steps].start().codes == [0, 0], made[steps].starts[0].said
        return made[steps]

    return of


@pytest.fixture
def forked() -> Iterator[None]:
    """Ranks that have imported everything: for faults that come later."""
    with forked_ranks():
        yield
