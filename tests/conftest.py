"""Which tests may run beside others when pytest-xdist spreads them over workers, as `launch/test.sh` does.

Those outside `tests/unit` and `tests/gpu` start ranks, Slurm or whole programs, and some of them watch the clock: one
worker takes them all, in the order of their files, while the others take the rest.
"""

from typing import Any

import pytest

BESIDE_OTHERS = ("tests/unit/", "tests/gpu/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ProcessesOneByOne(LoadScopeScheduling):
        """Tests of one scope go to one worker, the largest scope first."""

        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.startswith(BESIDE_OTHERS) else "processes"

    return ProcessesOneByOne(config, log)
