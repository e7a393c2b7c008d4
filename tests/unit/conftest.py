"""One thread, because the tensors here are too small to share; and the same random numbers in any order of tests."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
