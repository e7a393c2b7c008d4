"""Which tests may run beside others when pytest-xdist spreads them over workers, as `launch/test.sh` does; and that no
test is told by an earlier one which rank it is.

Those outside `tests/unit` and `tests/gpu` start ranks, Slurm or whole programs, and some of them watch the clock: one
worker takes those of `tests/dist`, one the others, each in the order of their files.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BESIDE_OTHERS = ("tests/unit/", "tests/gpu/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ProcessesInTwoQueues(LoadScopeScheduling):
        """Tests of one scope go to one worker, the largest scope first."""

        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(BESIDE_OTHERS):
                return nodeid
            return "ranks" if nodeid.startswith("tests/dist/") else "programs"

    return ProcessesInTwoQueues(config, log)


@pytest.fixture(autouse=True)
def _launcher_variables() -> Iterator[None]:
    """A run inside this process sets them, and processes that a later test starts would inherit them."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
