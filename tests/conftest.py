"""Which tests may run beside others when pytest-xdist spreads them over workers, as `launch/test.sh` does; and that no
test is told by an earlier one which rank it is.

Those that start ranks use all cores, and some of them watch the clock: one worker takes them all, in the order of their
files. Those that start Slurm and whole programs mostly wait: another worker takes them.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.dist.nodes import CannotError, Network

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
QUEUES = {"tests/dist/": "ranks", "tests/faults/": "ranks", "tests/slurm/": "programs", "tests/examples/": "programs"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class TwoQueues(LoadScopeScheduling):
        """Tests of one scope go to one worker, the largest scope first."""

        def _split_scope(self, nodeid: str) -> str:
            return next((queue for folder, queue in QUEUES.items() if nodeid.startswith(folder)), nodeid)

    return TwoQueues(config, log)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Two nodes, and cables of 200 Mbit/s; who pulls one plugs it in again."""
    try:
        with Network(tmp_path_factory.mktemp("network") / "two", nodes=2, rate="200mbit") as network:
            yield network
    except CannotError as reason:
        pytest.skip(f"NO NETWORK IS TESTED: {reason}")


@pytest.fixture(autouse=True)
def _launcher_variables() -> Iterator[None]:
    """A run inside this process sets them, and processes that a later test starts would inherit them."""
    before = {name: os.environ.get(name) for name in LAUNCHER}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
