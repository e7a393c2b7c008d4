"""One thread, because the tensors here are too small to share; and the same random numbers in any order of tests.

Without a GPU the Triton kernels run in Triton's interpreter. Triton asks for the variable where `triton.jit` decorates,
also in its own library while it is first imported; so it is set here, before any test module imports a kernel.
"""

import os
import sys

import pytest
import torch

torch.set_num_threads(1)

if not torch.cuda.is_available():
    late = "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ
    assert not late, "triton was imported before it was told to interpret: set TRITON_INTERPRET=1 for this run"
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
