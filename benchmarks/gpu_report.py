"""Everything that one CUDA GPU can tell about moe_dist, in a few minutes: `launch/gpu.sh [--minutes M]`.

Sections run one after the other, those that only compare numbers side by side; the most important come first. Each has
a time limit, and what one leaves goes to those after it. At its limit a section is interrupted, so that it can write
what it has, then killed. One that fails or is stopped leaves what it had found so far, and the others go on. In FOLDER
(default gpu-report): report.md, report.json, and a log and JSON of each section.

Exit code 0 when all sections that ran passed, 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # each starts its own
TESTS = ("tests/gpu", "tests/unit/kernels", "tests/unit/moe/test_layer_triton.py")
REHEARSED_TESTS = ("tests/unit/kernels/test_norm_triton.py",)
CORES = len(os.sched_getaffinity(0))
OUTCOME = re.compile(r"(?:%\] |::.* )(PASSED|FAILED|ERROR|SKIPPED)(?: |$)")  # of a test, with xdist and without
SPARE = 8.0  # seconds for what comes before and after the sections
GRACE = 10.0  # seconds between an interrupt and the end


@dataclass(frozen=True)
class Section:
    """share: of the whole time. group: sections of one group run side by side. page: whether its output is Markdown."""

    letter: str
    name: str
    title: str
    share: float
    group: int
    page: bool = True

    def command(self, folder: Path, rehearse: bool) -> list[str]:
        python, json_file = sys.executable, ["--json", str(folder / f"{self.name}.json")]
        if self.name == "tests":
            workers = ["-n", str(min(8, CORES))] if find_spec("xdist") and not rehearse else []
            paths = REHEARSED_TESTS if rehearse else TESTS
            told = ["-v", "--tb=short", "--durations=15", f"--junitxml={folder}/tests.xml"]
            return [python, "-m", "pytest", *told, "-p", "no:cacheprovider", "-p", "no:benchmark", *workers, *paths]
        if self.name == "verify":
            axes = ["ep=1,2,4", "tp=1,2", "zero=native,1,3"]
            small = ["--layouts", "ep=1,2", "tp=1", "zero=native", "--ranks", "2", "--steps", "2"]
            whole = ["--layouts", *axes, "--ranks", "4", "--steps", "5", "--device", "cuda"]
            return [python, "-m", "moe_dist.cli", "verify", *(small if rehearse else whole)]
        script = {"attention": "attention.py"}.get(self.name, f"gpu_{self.name}.py")
        return [python, str(HERE / script), *json_file, *(["--rehearse"] if rehearse else [])]

    @property
    def threads(self) -> int:
        """Of each process: several run side by side, and the tests have a process on each of up to eight cores."""
        return 1 if self.name == "tests" else max(1, CORES // 8)


SECTIONS = (
    Section("a", "machine", "Machine", 0.02, 0),
    Section("b", "tests", "Tests of every kernel, fp32 and bf16", 0.45, 1, page=False),
    Section("c", "training", "The quickstart's configuration", 0.45, 1),
    Section("d", "verify", "The same in every layout, 4 ranks on one GPU over gloo", 0.45, 1, page=False),
    Section("e", "layer", "One MoE layer beside other systems', bf16, forward and backward", 0.36, 2),
    Section("f", "attention", "Attention beside SDPA", 0.08, 3, page=False),
    Section("g", "waits", "Where a step waits for the host, and where its time goes", 0.10, 4),
    Section("i", "graph", "Steps replayed as CUDA graphs", 0.10, 5),
    Section("h", "tune", "Blocks of the experts' Triton kernels", 0.20, 6),
)
USUAL = "abcdefgi"


@dataclass
class Result:
    section: Section
    code: int | None
    seconds: float
    output: str
    found: Any

    @property
    def verdict(self) -> str:
        if self.code is None:
            return f"stopped at its limit after {self.seconds:.0f} s"
        return f"{'ok' if self.code == 0 else f'FAILED with exit code {self.code}'}, {self.seconds:.0f} s"


def run(section: Section, folder: Path, seconds: float, rehearse: bool) -> Result:
    """One section in a process group of its own, stopped as a whole before its time is up."""
    log, began, code = folder / f"{section.name}.log", time.monotonic(), None
    path = os.pathsep.join([str(ROOT), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment = ours | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    environment |= {"OMP_NUM_THREADS": str(section.threads)}
    grace = min(GRACE, seconds / 4)
    for left_before in (f"{section.name}.json", f"{section.name}.xml"):
        (folder / left_before).unlink(missing_ok=True)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            section.command(folder, rehearse),
            cwd=ROOT,
            env=environment,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds - grace)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=grace)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = log.read_text(encoding="utf-8", errors="replace")
    found = found_by(section, folder, output, stopped=code is None)
    return Result(section, code, time.monotonic() - began, output, found)


def found_by(section: Section, folder: Path, output: str, stopped: bool) -> Any:
    """The numbers that a section left, perhaps not all of them."""
    if section.name == "tests":
        return counts_in(output) if stopped else counts_of(folder / "tests.xml")
    file = folder / f"{section.name}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def counts_of(file: Path) -> dict[str, Any] | None:
    """Passed, failed and skipped tests from pytest's XML, which is written at the end."""
    try:
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}.{case.get('name')}" for case in bad]
    return {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped, "failures": names}


def counts_in(output: str) -> dict[str, Any]:
    """The same from the lines that pytest wrote as tests ended: a stopped run's XML also has those that had not."""
    ended: dict[str, list[str]] = {outcome: [] for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    for line in output.splitlines():
        if match := OUTCOME.search(line):
            ended[match[1]].append(line)
    bad = ended["FAILED"] + ended["ERROR"]
    return {"passed": len(ended["PASSED"]), "failed": len(bad), "skipped": len(ended["SKIPPED"]), "failures": bad}


def run_all(sections: Sequence[Section], folder: Path, deadline: float, rehearse: bool) -> Iterator[Result]:
    """Group after group; a group gets its sections' largest share, and what earlier ones left."""
    groups = sorted({section.group for section in sections})
    for group in groups:
        together = [section for section in sections if section.group == group]
        later = sum(max(s.share for s in sections if s.group == g) for g in groups if g > group)
        own = max(section.share for section in together)
        left = deadline - time.monotonic()
        seconds = max(1.0, left * own / (own + later))
        with ThreadPoolExecutor(len(together)) as pool:
            jobs = [pool.submit(run, section, folder, seconds, rehearse) for section in together]
            for job in jobs:
                result = job.result()
                print(f"({result.section.letter}) {result.section.title}: {result.verdict}", flush=True)
                yield result


def page(results: Sequence[Result], minutes: float) -> str:
    lines = [
        "# moe_dist on a GPU",
        "",
        f"{sum(r.seconds for r in results):.0f} s of sections within {minutes:g} min.",
        "",
    ]
    lines += ["| | section | |", "|---|---|---|"]
    lines += [f"| ({r.section.letter}) | {r.section.title} | {r.verdict} |" for r in results]
    for result in results:
        section, output = result.section, result.output.strip()
        lines += ["", f"## ({section.letter}) {section.title}", "", f"{result.verdict}.", ""]
        if section.name == "tests" and result.found:
            lines += [json.dumps({k: v for k, v in result.found.items() if k != "failures"}), ""]
            lines += [f"- {name}" for name in result.found["failures"]] + [""]
        if section.page and result.code == 0:
            lines.append(output)
        else:
            told = [line for line in output.splitlines() if "::" not in line or not line.startswith(("[gw", "tests/"))]
            lines += ["```", "\n".join(told[-60:]), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--sections", default=USUAL, help=f"letters (default {USUAL}; h measures block sizes)")
    parser.add_argument("--folder", type=Path, default=Path("gpu-report"), help="where the report goes")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on CPU, kernels in Triton's interpreter")
    own = parser.parse_args()
    unknown = set(own.sections) - {section.letter for section in SECTIONS}
    if unknown or not own.sections:
        parser.error(f"--sections {own.sections!r}: choose letters of {''.join(s.letter for s in SECTIONS)}")
    if own.minutes <= 0:
        parser.error(f"--minutes {own.minutes:g} must be above 0")
    import torch

    if own.rehearse:
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    elif not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: start on a machine with one, or try with --rehearse")
    # Whatever a shell starts in the background ignores interrupts, and so would the sections.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = own.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [section for section in SECTIONS if section.letter in own.sections]
    deadline = began + 60 * own.minutes - SPARE
    results: list[Result] = []
    for result in run_all(chosen, folder, deadline, own.rehearse):
        results.append(result)
        kept = {r.section.name: {"verdict": r.verdict, "seconds": r.seconds, "found": r.found} for r in results}
        (folder / "report.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(page(results, own.minutes), encoding="utf-8")
    print(f"{folder / 'report.md'}")
    return 0 if all(result.code == 0 for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
