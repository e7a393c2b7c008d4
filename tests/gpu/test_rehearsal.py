"""`launch/gpu.sh` from end to end on CPU, so that it cannot fail for a typing error where there is a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the report itself runs where there is a GPU")


def report(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MOE_DIST_PYTHON": sys.executable}
    command = [str(ROOT / "launch/gpu.sh"), "--folder", str(folder), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parent)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_section(tmp_path: Path) -> None:
    done = report(tmp_path / "report", "--rehearse", "--minutes", "30", "--sections", "abcdefghi")
    page = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr + page
    found = json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8"))
    assert list(found) == "machine tests training verify layer attention waits graph tune".split()
    assert found["tests"]["found"]["failed"] == 0 and found["tests"]["found"]["passed"] > 0
    training = found["training"]["found"]
    assert training["problems"] == [] and training["resumed"]["checkpoints_bit_equal"]
    contestants = [row for cell in found["layer"]["found"]["cells"].values() for row in cell["contestants"].values()]
    assert contestants and not [row for row in contestants if "failed" in row]
    assert all(name in page for name in ("moe_dist, experts triton", "Resumed under train.deterministic", "all agree"))


def test_a_section_that_is_stopped_leaves_a_report_and_the_next_goes_on(tmp_path: Path) -> None:
    done = report(tmp_path / "report", "--rehearse", "--minutes", "0.001", "--sections", "ae")
    page = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert done.returncode == 1
    assert "(e) One MoE layer" in done.stdout and page.count("stopped at its limit") >= 2


def test_mistakes(tmp_path: Path) -> None:
    for flags, said in ((["--sections", "ax"], "choose letters"), (["--minutes", "0"], "must be above 0")):
        done = report(tmp_path / "report", "--rehearse", *flags)
        assert done.returncode == 2 and said in done.stderr
    if not torch.cuda.is_available():
        done = report(tmp_path / "report")
        assert done.returncode == 2 and "torch sees no CUDA device" in done.stderr
    assert not (tmp_path / "report").exists()
