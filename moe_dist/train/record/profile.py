"""What this machine can do and how much memory we use: the denominators of the run's metrics."""

import os
import re
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense matmul TFLOP/s by the vendor's datasheets: (bf16 and fp16 tensor cores, tf32 tensor cores, fp32). The pattern
# must match the whole device name: a MIG slice, an A10 or a GH200 must not pass for its bigger or smaller namesake.
_DATASHEET: dict[str, tuple[float, float, float]] = {
    r"NVIDIA (H100 \d+GB HBM3|H200|GH200 \d+GB)": (989.4, 494.7, 66.9),
    r"NVIDIA (H100|H200) NVL": (835.5, 417.5, 60.0),
    r"NVIDIA H100 PCIe": (756.0, 378.0, 51.0),
    r"(NVIDIA )?A100((-SXM4|-PCIE)-\d+GB| \d+GB PCIe)": (312.0, 156.0, 19.5),
    r"NVIDIA L40S": (362.05, 183.0, 91.6),
    r"NVIDIA L4": (121.0, 60.0, 30.3),
    r"(NVIDIA )?A40": (149.7, 74.8, 37.4),
    r"(NVIDIA )?A10": (125.0, 62.5, 31.2),
}

_MEASURE_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Peak:
    """The matmul rate that utilization (MFU) is measured against."""

    flops_per_second: float
    """Of one device."""
    source: str
    """Where the number comes from, for a person: a datasheet, or a measurement on this machine."""


def matmul_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The largest matmul rate of one device in one dtype.

    On CUDA by the datasheet of the device's name. On a GPU without an entry, and on CPU, where the rate depends on the
    threads of this process, it is measured in less than half a second. `source` says which. Global random state is
    left alone. Raises ValueError for other kinds of device.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device.type}, expected cpu or cuda")
    if device.type == "cpu":
        where = f"CPU, {torch.get_num_threads()} threads"
    else:
        where = torch.cuda.get_device_name(device)
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        peak = datasheet_peak(where, dtype, tf32=tf32)
        if peak is not None:
            return peak
    return Peak(_measure(device, dtype), f"measured: {where}, {_dtype_name(dtype)}")


def datasheet_peak(name: str, dtype: torch.dtype, *, tf32: bool) -> Peak | None:
    """The dense peak of a GPU by its name, or None if the table lacks it. tf32: fp32 matmuls use those cores."""
    precisions = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32" if tf32 else "fp32"}
    columns = {"bf16": 0, "fp16": 0, "tf32": 1, "fp32": 2}
    precision = precisions.get(dtype)
    if precision is None:
        return None
    for pattern, teraflops in _DATASHEET.items():
        if re.fullmatch(pattern, name):
            return Peak(teraflops[columns[precision]] * 1e12, f"datasheet: {name}, {precision} dense")
    return None


def speed_record(
    seconds: float, tokens: float, nominal: float, executed: float, peak: Peak, ranks: int
) -> dict[str, float]:
    """How fast a step was, for metrics.jsonl. tokens, and FLOPs nominal and executed: of the step, over all ranks."""
    most = peak.flops_per_second * ranks
    return {
        "tokens_per_second": tokens / seconds,
        "step_seconds": seconds,
        "tflops": nominal / seconds / 1e12,
        "mfu": nominal / seconds / most,
        "tflops_executed": executed / seconds / 1e12,
        "mfu_executed": executed / seconds / most,
    }


def memory_bytes(device: torch.device) -> dict[str, int]:
    """Memory of this process: `current` and `peak` bytes.

    On CPU the resident set; `current` is absent where there is no /proc (macOS). On CUDA what torch allocated there.
    """
    if device.type == "cuda":
        return {
            "current": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return {"peak": peak}
    current = int(statm.read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"current": current, "peak": max(peak, current)}


def _measure(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate seen over square matmuls of growing size, until the time is up."""
    sizes = (256, 512, 1024) if device.type == "cpu" else (1024, 2048, 4096)
    generator = torch.Generator(device).manual_seed(0)
    deadline = time.perf_counter() + _MEASURE_SECONDS
    best = 0.0
    for size in sizes:
        left, right = (torch.rand(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        _timed_matmul(left, right)  # warm-up: thread pools, library handles, kernel choice
        for _ in range(10):
            best = max(best, 2 * size**3 / _timed_matmul(left, right))
            if time.perf_counter() > deadline:
                return best
    return best


def _timed_matmul(left: torch.Tensor, right: torch.Tensor) -> float:
    """Seconds of one product."""
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    start = time.perf_counter()
    torch.matmul(left, right)
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - start


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
