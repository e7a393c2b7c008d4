"""Triton kernels say no to CPU tensors, and nobody who does not ask for them needs Triton."""

import os
import subprocess
import sys

CALLS = """
import torch
from moe_dist.kernels.attention.triton import attend
from moe_dist.kernels.norm.triton import rms_norm
from moe_dist.kernels.permute.order import RowOrder
from moe_dist.kernels.permute.triton import combine_rows, gather_rows, sort_rows
from moe_dist.kernels.top_k.triton import top_k_experts

x, index = torch.ones(2, 2), torch.zeros(2, 1, dtype=torch.int64)
order = RowOrder.of(index, index == 0, 1)
for call in (
    lambda: top_k_experts(x, 1),
    lambda: sort_rows(index, None, 1),
    lambda: gather_rows(x, order),
    lambda: combine_rows(x, None, order),
    lambda: rms_norm(x, x[0], 1e-5),
    lambda: attend(x[None, None], x[None, None], x[None, None]),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import moe_dist.kernels.registry, moe_dist.models.decoder, moe_dist.kernels.top_k.reference
import moe_dist.kernels.norm.reference, moe_dist.kernels.permute.reference
"""


def run(code: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    child = subprocess.run([sys.executable, "-c", code], env=environment | path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


def test_cpu_tensors_are_refused_in_one_line() -> None:
    lines = run(CALLS)
    assert [line.split(":")[0] for line in lines] == [
        *("top_k_experts", "sort_rows", "gather_rows", "combine_rows", "rms_norm", "attention")
    ]
    assert all("the tensor is on cpu: use kernels=torch" in line for line in lines[:-1])
    assert "the tensor is on cpu: use the attention backend torch or flash" in lines[-1]


def test_nothing_else_imports_triton() -> None:
    assert run(WITHOUT_TRITON) == []
