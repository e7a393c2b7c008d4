"""The quickstart's configuration on the GPU: beside the CPU, in bf16, under ZeRO-1, resumed bit by bit, and as text.

Each run starts `moe-dist train` as a user would, one rank, several runs at once; most of its time is its start. What is
compared with the CPU waits for that run, which starts first. A line of Markdown tells each thing when it has ended;
`--json FILE` keeps the numbers, rewritten each time; exit code 1 when something that must hold does not. A part of
launch/gpu.sh.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_machine import section_parser

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ("--engine.name", "native", "--engine.zero-stage", "0")
TINY = ("--model.d-model", "32", "--model.num-layers", "2", "--model.d-ff", "32", "--train.seq-len", "32")
TOGETHER = 4  # runs at once
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
            self.problem(what)

    def problem(self, what: str) -> None:
        self.problems.append(what)
        print("\n".join(["", "**Problem**", "", "```", what, "```", ""]), flush=True)


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records]


def farthest(one: list[dict[str, Any]], other: list[dict[str, Any]], steps: int | None = None) -> float:
    return max(abs(a - b) for a, b in zip(losses(one)[:steps], losses(other)[:steps], strict=True))


def variants(bench: Bench) -> dict[str, tuple[str, ...]]:
    """Ways to train on the GPU whose first losses must be near the CPU's."""
    ways: dict[str, tuple[str, ...]] = {
        "fp32": NATIVE,
        "bf16": (*NATIVE, "--engine.precision", "bf16"),
        "bf16, ZeRO-1": ("--engine.zero-stage", "1", "--engine.precision", "bf16"),
        "bf16, experts triton": (*NATIVE, "--engine.precision", "bf16", "--model.moe.experts", "triton"),
        "bf16, ZeRO-3": ("--engine.zero-stage", "3", "--engine.precision", "bf16"),
        "fp32, ZeRO-1": ("--engine.zero-stage", "1"),
        "fp32, kernels torch": (*NATIVE, "--model.kernels", "torch"),
    }
    one = "bf16, ZeRO-1"
    return {one: ways[one]} if bench.rehearsed else ways


def on_cpu(bench: Bench) -> list[dict[str, Any]]:
    """The reference."""
    return bench.train("cpu", "cpu", *NATIVE, "--model.kernels", "torch")


def compared(bench: Bench, name: str, flags: tuple[str, ...], cpu: Future[list[dict[str, Any]]]) -> dict[str, float]:
    """The steps of the reference on the GPU, in one way."""
    records = bench.train(name.replace(" ", "-").replace(",", ""), bench.gpu, *flags)
    reference, limit = cpu.result(), LOSS_TOLERANCE[name[:4]]
    off = farthest(reference, records, FIRST)
    bench.must(off <= limit, f"{name}: first losses differ from the CPU's by {off:.1e}, more than {limit:.0e}")
    far = farthest(reference, records)
    return {"first_difference": off, "largest_difference": far, "last_loss": losses(records)[-1]}


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
        bench.problem(f"{name}: {error}")
        return None


def line(name: str, result: Any) -> str:
    """What is printed of one thing that has ended."""
    if name == "cpu":
        return f"- CPU, {len(result)} steps: last loss {losses(result)[-1]:.5f}"
    if name == "resumed":
        return f"- Resumed under train.deterministic: {json.dumps(result)}"
    if name == "whole_job":
        return f"- The whole job (DeepSpeed ZeRO-1, fp32), beside the others: {json.dumps(result)}"
    near = f"{result['first_difference']:.1e} in the first {FIRST} steps, {result['largest_difference']:.1e} in any"
    return f"- {name}: last loss {result['last_loss']:.5f}; farthest from the CPU's {near}"


def run_all(bench: Bench, json_file: Path | None) -> None:
    """All at once, TOGETHER at a time, in this order; each is told and kept when it ends."""
    found: dict[str, Any] = {"variants": {}}
    pool = ThreadPoolExecutor(TOGETHER)
    cpu = pool.submit(on_cpu, bench)
    jobs: dict[Future[Any], str] = {cpu: "cpu"}
    jobs |= {pool.submit(part, bench): part.__name__ for part in (whole_job, resumed)}
    jobs |= {pool.submit(compared, bench, name, flags, cpu): name for name, flags in variants(bench).items()}
    try:
        for job in as_completed(jobs):
            name = jobs[job]
            result = guarded(bench, name, job.result)
            if name == "cpu":
                found["cpu_losses"] = result and losses(result)
            elif name in ("whole_job", "resumed"):
                found[name] = result
            else:
                found["variants"][name] = result
            if result is not None:
                print(line(name, result), flush=True)
            if json_file:
                kept = found | {"problems": bench.problems}
                json_file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> int:
    parser = section_parser(__doc__)
    own = parser.parse_args()
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="moe_dist-gpu-") as folder:
        bench = Bench(Path(folder), gpu, *((4, 4, TINY, True) if own.rehearse else (20, 150, ())))
        run_all(bench, own.json)
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())
