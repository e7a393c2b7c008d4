"""The quickstart's configuration on the GPU: beside the CPU, in bf16, under ZeRO-1, resumed bit by bit, and as text.

Each line starts `moe-dist train` as a user would, one rank, several at once. Prints Markdown; `--json FILE` keeps the
numbers; exit code 1 when something that must hold does not. A part of launch/gpu.sh.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ("--engine.name", "native", "--engine.zero-stage", "0")
TINY = ("--model.d-model", "32", "--model.num-layers", "2", "--model.d-ff", "32", "--train.seq-len", "32")
FIRST = 5  # steps in which losses must be near the CPU's: rounding grows while training goes on
LOSS_TOLERANCE = {"fp32": 2e-4, "bf16": 5e-2}  # nats


@dataclass
class Bench:
    """Where runs lie, and how they are shortened in a rehearsal."""

    folder: Path
    gpu: str
    steps: int
    whole: int
    extra: tuple[str, ...]
    rehearsed: bool = False
    problems: list[str] = field(default_factory=list)

    def train(self, name: str, device: str, *flags: str, steps: int | None = None) -> list[dict[str, Any]]:
        """The records of metrics.jsonl. Raises RuntimeError with the end of what a failed run said."""
        steps = steps or self.steps
        short = ["--train.steps", str(steps), "--optim.warmup-steps", str(min(40, steps // 2)), "--parallel.ep", "1"]
        short += ["--run.name", name, "--run.root", str(self.folder), "--run.sample-tokens", "0"]
        short += ["--run.save-every", str(max(1, steps // 2)), "--run.eval-every", str(steps)]
        self.command("train", str(ROOT / "configs/quickstart.yaml"), "--device", device, *short, *self.extra, *flags)
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def command(self, *args: str) -> str:
        path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
        if "cpu" in args:  # DeepSpeed and Triton must not look for the GPU
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
        call = [sys.executable, "-m", "moe_dist.cli", *args]
        done = subprocess.run(call, env=environment, capture_output=True, text=True, encoding="utf-8", cwd=self.folder)
        if done.returncode:
            raise RuntimeError("\n".join([" ".join(args), *(done.stdout + done.stderr).splitlines()[-25:]]))
        return done.stdout

    def must(self, holds: bool, what: str) -> None:
        if not holds:
            self.problems.append(what)


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


def farthest(one: list[dict[str, Any]], other: list[dict[str, Any]], steps: int | None = None) -> float:
    return max(abs(a - b) for a, b in zip(losses(one)[:steps], losses(other)[:steps], strict=True))


def against_cpu(bench: Bench) -> dict[str, Any]:
    """The same steps on the CPU, and on the GPU in several ways."""
    variants: dict[str, tuple[str, ...]] = {
        "fp32": NATIVE,
        "fp32, kernels torch": (*NATIVE, "--model.kernels", "torch"),
        "fp32, ZeRO-1": ("--engine.zero-stage", "1"),
        "bf16": (*NATIVE, "--engine.precision", "bf16"),
        "bf16, experts triton": (*NATIVE, "--engine.precision", "bf16", "--model.moe.experts", "triton"),
        "bf16, ZeRO-1": ("--engine.zero-stage", "1", "--engine.precision", "bf16"),
        "bf16, ZeRO-3": ("--engine.zero-stage", "3", "--engine.precision", "bf16"),
    }
    if bench.rehearsed:
        variants = {name: variants[name] for name in ("fp32", "bf16, ZeRO-1")}
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(4) as pool:
        cpu = pool.submit(bench.train, "cpu", "cpu", *NATIVE, "--model.kernels", "torch")
        jobs = {
            name: pool.submit(bench.train, name.replace(" ", "-").replace(",", ""), bench.gpu, *flags)
            for name, flags in variants.items()
        }
        reference = cpu.result()
        for name, job in jobs.items():
            records = guarded(bench, name, job.result)
            if records is None:
                continue
            off, limit = farthest(reference, records, FIRST), LOSS_TOLERANCE[name[:4]]
            bench.must(off <= limit, f"{name}: first losses differ from the CPU's by {off:.1e}, more than {limit:.0e}")
            far = farthest(reference, records)
            found[name] = {"first_difference": off, "largest_difference": far, "last_loss": losses(records)[-1]}
    return {"cpu_last_loss": losses(reference)[-1], "steps": len(reference), "variants": found}


def resumed(bench: Bench) -> dict[str, Any]:
    """Under train.deterministic, a run resumed from its middle ends as the one that was not stopped, bit by bit."""
    flags = ("--engine.precision", "bf16", "--train.deterministic")
    straight = bench.train("straight", bench.gpu, *NATIVE, *flags)
    again = bench.folder / "again"
    shutil.copytree(bench.folder / "straight", again)
    (again / "status.json").unlink()
    checkpoints = sorted((again / "checkpoints").iterdir())
    shutil.rmtree(checkpoints[-1])
    records = bench.train("again", bench.gpu, *NATIVE, *flags, "--resume")
    equal = losses(straight) == losses(records)
    bench.must(equal, "a resumed run's losses differ from those of the run that was not stopped")
    left, right = (sorted((bench.folder / name / "checkpoints").iterdir())[-1] for name in ("straight", "again"))
    try:
        bench.command("checkpoint", "diff", str(left), str(right))
        same = True
    except RuntimeError as error:
        same = False
        bench.must(False, f"a resumed run's checkpoint differs: {error}")
    return {"losses_bit_equal": equal, "checkpoints_bit_equal": same, "resumed_from": checkpoints[0].name}


def whole_job(bench: Bench) -> dict[str, Any]:
    """The quickstart to its end, how fast it was, and what the model writes on the GPU and on the CPU."""
    began = time.monotonic()
    records = bench.train("whole", bench.gpu, steps=bench.whole)
    seconds = time.monotonic() - began
    last = records[-1]
    steady = sorted(record["tokens_per_second"] for record in records[len(records) // 2 :])
    text = ("generate", str(bench.folder / "whole"), "--prompt", "def ", "--max-new-tokens", "60", "--temperature", "0")
    ours = guarded(bench, "generate", lambda: bench.command(*text, "--device", bench.gpu)) or ""
    cpu = guarded(bench, "generate on the CPU", lambda: bench.command(*text, "--device", "cpu")) or ""
    common = next((i for i, (a, b) in enumerate(zip(ours, cpu, strict=False)) if a != b), min(len(ours), len(cpu)))
    return {
        "steps": last["step"],
        "seconds": seconds,
        "validation_bits_per_byte": last.get("validation_bits_per_byte"),
        "tokens_per_second": steady[len(steady) // 2],
        "text": ours,
        "same_as_on_cpu": f"{common} of {len(cpu)} characters",
    }


def guarded(bench: Bench, name: str, call: Callable[[], Any]) -> Any:
    """A failure is told and does not hide what comes after it."""
    try:
        return call()
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        bench.problems.append(f"{name}: {error}")
        return None


def page(found: dict[str, Any], problems: list[str]) -> str:
    lines = []
    if found.get("against_cpu"):
        against = found["against_cpu"]
        lines += [f"{against['steps']} steps; the CPU's last loss is {against['cpu_last_loss']:.5f}.", ""]
        lines += [
            f"| on the GPU | last loss | farthest from the CPU, first {FIRST} steps | any step |",
            "|---|---|---|---|",
        ]
        for name, row in against["variants"].items():
            far = f"{row['first_difference']:.1e} | {row['largest_difference']:.1e}"
            lines.append(f"| {name} | {row['last_loss']:.5f} | {far} |")
    if found.get("resumed"):
        lines += ["", "Resumed under train.deterministic: " + json.dumps(found["resumed"])]
    if found.get("whole_job"):
        whole = dict(found["whole_job"])
        text = whole.pop("text")
        lines += ["", "The whole job (DeepSpeed ZeRO-1, fp32): " + json.dumps(whole), "", "```", text.strip(), "```"]
    for problem in problems:
        lines += ["", "**Problem**", "", "```", problem, "```"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, also on CPU")
    parser.add_argument("--json", type=Path)
    own = parser.parse_args()
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="moe_dist-gpu-") as folder:
        bench = Bench(Path(folder), gpu, *((4, 4, TINY, True) if own.rehearse else (40, 500, ())))
        for part in (against_cpu, resumed, whole_job):
            found[part.__name__] = guarded(bench, part.__name__, lambda part=part: part(bench))
            if own.json:
                kept = found | {"problems": bench.problems}
                own.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print(page(found, bench.problems))
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
