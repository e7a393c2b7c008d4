"""One thread, because the tensors here are too small to share; and the same random numbers in any order of tests.

Without a GPU the Triton kernels run in Triton's interpreter. Triton asks for the variable where `triton.jit` decorates,
also in its own library while it is first imported; so it is set here, before any test module imports a kernel.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

if not torch.cuda.is_available():
    late = "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ
    assert not late, "triton was imported before it was told to interpret: set TRITON_INTERPRET=1 for this run"
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        from tests.unit.interpreter import quicken

        quicken()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, or integers that fit nowhere."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **settings: Any) -> Tensor:
            tensor = make(*args, **settings)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(torch.int32).min // 2)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
