"""Triton kernels compiled for an H100/H200 on a machine without one: registers, spills and shared memory of each.

`resources` starts one process that compiles all of them, because with TRITON_INTERPRET set (as the tests here do)
`triton.jit` makes functions that only the interpreter runs.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[3]
SPILL_LIMIT = 8  # bytes a thread: what Triton 3.6 spills in two kernels in which 3.9 spills nothing
SHARED_LIMIT = 227 * 1024  # bytes that one block may have on sm_90


@dataclass(frozen=True)
class Kernel:
    """What to compile: `module:function`, and how it is called.

    signature: argument -> Triton type in order (`*fp32`, `i32`, `fp32`); the rest of the arguments are constexprs. A
    type may end in `:16`: the pointer or integer is a multiple of 16, as Triton finds out at a launch. label: for the
    table, where one kernel is compiled several times.
    """

    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""


@dataclass(frozen=True)
class Resources:
    """Registers of a thread, bytes that each thread spills, bytes of shared memory of a block."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int


def resources(kernels: list[Kernel]) -> list[Resources]:
    """Compile for sm_90, in the order given. A kernel that does not compile raises with the compiler's message."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(kernel) for kernel in kernels]),
        env=environment | {"PYTHONPATH": str(_ROOT)},
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(child.stderr[-4000:])
    return [Resources(**entry) for entry in json.loads(child.stdout.splitlines()[-1])]


def table(found: list[Resources]) -> str:
    width = max(len(entry.name) for entry in found)
    lines = [f"{'kernel, sm_90':{width}}  warps  registers  spill B  shared B"]
    for entry in found:
        numbers = f"{entry.num_warps:5}  {entry.registers:9}  {entry.spill_bytes:7}  {entry.shared_bytes:8}"
        lines.append(f"{entry.name:{width}}  {numbers}")
    return "\n".join(lines)


def _compile(kernel: Kernel) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = kernel.name.partition(":")
    function = getattr(importlib.import_module(module), name)
    while not hasattr(function, "arg_names") or hasattr(function, "configs"):  # under autotune or heuristics
        function = function.fn
    plain, attributes = {}, {}
    for index, argument in enumerate(function.arg_names):
        kind, _, multiple = kernel.signature.get(argument, "constexpr").partition(":")
        plain[argument] = kind
        if multiple:
            attributes[(index,)] = [["tt.divisibility", int(multiple)]]
    compiled = triton.compile(
        ASTSource(function, plain, kernel.constexprs, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernel.num_warps, "num_stages": kernel.num_stages},
    )
    registers, spill = _usage(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin")
    return Resources(kernel.label or name, registers, spill, compiled.metadata.shared, kernel.num_warps)


def _usage(cubin: bytes, tools: Path) -> tuple[int, int]:
    """(registers, spill): what does not fit into registers goes to the stack or to local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found, text
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


if __name__ == "__main__":
    todo = [Kernel(**entry) for entry in json.load(sys.stdin)]
    print(json.dumps([asdict(_compile(kernel)) for kernel in todo]))
