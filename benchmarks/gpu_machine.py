"""What the GPU is and what it can do: versions, and the rates that other sections are measured against.

Prints Markdown; `--json FILE` keeps the numbers. A part of launch/gpu.sh.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from race import device_name, versions

PACKAGES = (
    *("torch", "triton", "deepspeed", "megatron-core", "transformers", "liger-kernel", "flash-attn", "apex"),
    *("scattermoe", "numpy", "safetensors"),
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def seconds_of(call: Callable[[], Any], device: torch.device, rounds: int = 12, warm_up: int = 3) -> float:
    """Median seconds of one call; on CUDA by events, so that the host's time to launch does not count."""
    if device.type == "cpu":
        times = []
        for _ in range(warm_up + rounds):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return statistics.median(times[warm_up:])
    for _ in range(warm_up):
        call()
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(rounds)]
    for begin, end in pairs:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of one square product of random numbers: zeros would run faster."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: left @ right, device)


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes read and written a second by a copy inside the device's memory."""
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def measure(device: torch.device, rehearse: bool) -> dict[str, Any]:
    size = 256 if rehearse else 8192
    rates = {name: matmul_rate(device, dtype, size if name == "bf16" else size // 2) for name, dtype in DTYPES.items()}
    found: dict[str, Any] = {
        "device": device_name(),
        "python": sys.version.split()[0],
        "versions": versions(*PACKAGES),
        "flops_per_second": rates,
        "copy_bytes_per_second": copy_rate(device, 2**16 if rehearse else 2**30),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
        try:
            found["nvidia_smi"] = subprocess.run(
                query, capture_output=True, text=True, encoding="utf-8", check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            found["nvidia_smi"] = f"not asked: {error}"
        found |= {
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    return found


def page(found: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [f"{found['device']}; Python {found['python']}; {packages}"]
    if "cuda" in found:
        lines.append(
            f"{found['memory_bytes'] / 2**30:.0f} GiB, {found['multiprocessors']} multiprocessors, compute capability "
            f"{found['capability']}, CUDA {found['cuda']}; driver, clocks and power limit: {found['nvidia_smi']}"
        )
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in found["flops_per_second"].items())
    lines.append(f"Square products of random numbers: {rates}. Copy: {found['copy_bytes_per_second'] / 1e9:.0f} GB/s.")
    return "\n\n".join(lines)


def section_parser(description: str | None) -> argparse.ArgumentParser:
    """What every section of launch/gpu.sh is asked with."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, also on CPU")
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    parser = section_parser(__doc__)
    own = parser.parse_args()
    found = measure(torch.device("cuda" if torch.cuda.is_available() else "cpu"), own.rehearse)
    if own.json:
        own.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(page(found))


if __name__ == "__main__":
    main()
