"""Arrays for sbatch, with commands of Slurm that pretend and keep what they were called with."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from moe_dist.cli import main
from moe_dist.study.design.grid import Study, load_study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.run.submit import arrays, ranges
from tests.unit.study.helpers import STUDY, write_study

ROOT = Path(__file__).parents[3]
SEVEN = STUDY.replace("seeds: [0, 1]", "seeds: [0, 1, 2, 3, 4, 5, 6]").replace("[0.5, null]", "[0.5]")
SLURM = """executor: slurm
at_once: 2
slurm: {time: "1:00:00", exclusive: true}
"""


class Pretended:
    """sbatch, squeue and scontrol of a cluster whose jobs wait until they are forgotten."""

    def __init__(self, folder: Path, size: int) -> None:
        self.calls, self.queue = folder / "calls", folder / "queue"
        self.queue.touch()
        self.calls.touch()
        scripts = {
            "sbatch": f'n=$(( $(wc -l <"{self.calls}") + 40 )); echo "$@" >>"{self.calls}"\n'
            f'echo "$MOE_DIST_ROOT $MOE_DIST_PYTHON" >"{folder}/environment"; echo "$n;cluster"',
            "squeue": f'echo "$@" >"{folder}/asked"; cat "{self.queue}"',
            "scontrol": f'echo "MaxArraySize            = {size}"',
        }
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    def submitted(self) -> list[list[str]]:
        return [shlex.split(line) for line in self.calls.read_text().splitlines()]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretended:
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.delenv("MOE_DIST_PYTHON", raising=False)
    monkeypatch.setenv("MOE_DIST_ROOT", str(ROOT))
    return Pretended(tools, size=3)


def slurm_study(folder: Path, text: str = SEVEN + SLURM) -> Study:
    return load_study(write_study(folder, text))


def array_of(call: list[str]) -> str:
    return next(word.removeprefix("--array=") for word in call if word.startswith("--array="))


def finish(study: Study, *indices: int) -> None:
    for index in indices:
        Ledger(study.ledger).append({"point": study.points[index].name, "status": "finished"})


def test_ranges_and_arrays() -> None:
    for numbers, text in (([], ""), ([4], "4"), ([3, 2, 0, 1, 5, 8, 7], "0-3,5,7-8")):
        assert ranges(numbers) == text
    assert [(each.offset, each.tasks) for each in arrays([0, 2, 3, 8], 3)] == [(0, (0, 2)), (3, (0,)), (6, (2,))]
    every = [index for each in arrays(range(2500), 1001) for index in each.points]
    assert every == list(range(2500)) and max(max(each.tasks) for each in arrays(range(2500), 1001)) == 1000


def test_points_that_have_not_finished_are_handed_in_by_arrays(
    cluster: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = slurm_study(tmp_path)
    finish(study, 1, 6)
    assert main(["study", "submit", str(study.path), "--", "--time", "2:00:00", "--gpus-per-node=1"]) == 0
    first, second = cluster.submitted()
    script, path = str(ROOT / "slurm/study.sbatch"), str(study.path)
    given = ["--job-name=toy", f"--output={study.folder}/slurm/%A_%a.out", "--time=1:00:00", "--exclusive"]
    given += ["--time", "2:00:00", "--gpus-per-node=1", "--parsable"]  # the last one counts
    assert first == [*given, "--array=0,2%2", script, path]
    assert second == [*given, "--array=0-2%2", "--dependency=afterany:40", script, path, "3"]
    assert (tmp_path / "tools/environment").read_text().split()[0] == str(ROOT)
    assert (study.folder / "slurm").is_dir()
    said = capsys.readouterr().out
    assert "job 40: points 0,2 of toy, at most 2 at once" in said and "job 41: points 3-5 of toy" in said
    assert "moe-dist watch" in said and "squeue" in said


def test_points_in_the_queue_are_not_handed_in_twice(
    cluster: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = slurm_study(tmp_path)
    submit = ["study", "submit", str(study.path), "--at-once", "5"]
    assert main(submit) == 0
    assert [array_of(call) for call in cluster.submitted()] == ["0-2%5", "0-2%5", "0%5"]
    cluster.queue.write_text("40 0\n40 1\n40 2\n41 0\n41 1\n41 2\n42 0\n7 1\n")
    assert main(submit) == 2
    assert "all 7 points left wait or run already" in capsys.readouterr().err
    assert len(cluster.submitted()) == 3
    assert "--jobs=40,41,42" in (tmp_path / "tools/asked").read_text()

    cluster.queue.write_text("40 1\n41 2\n42 N/A\n")
    finish(study, 0)
    assert main(submit) == 0
    again = cluster.submitted()[3:]
    assert [array_of(call) for call in again] == ["2%5", "0-1%5", "0%5"]
    waits = [[word for word in call if word.startswith("--dependency=")] for call in again]
    assert waits == [["--dependency=afterany:40:41"], ["--dependency=afterany:43"], ["--dependency=afterany:44"]]
    assert "job 41: points 5 wait or run already, and are not handed in again" in capsys.readouterr().out

    (tmp_path / "tools/squeue").write_text("#!/bin/sh\necho 'error: Invalid job id specified' >&2; exit 1\n")
    finish(study, 1, 2, 3, 4, 5)
    assert main(submit) == 0 and cluster.submitted()[-1][-1] == "6"
    finish(study, 6)
    assert main(submit) == 0 and len(cluster.submitted()) == 7
    assert "all 7 points have finished" in capsys.readouterr().out


def test_a_dry_run_hands_in_nothing(cluster: Pretended, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = slurm_study(tmp_path)
    assert main(["study", "submit", str(study.path), "--dry-run"]) == 0
    printed = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in printed] == ["sbatch"] * 3 and "--dependency=afterany:THE_JOB_BEFORE" in printed[2]
    assert cluster.submitted() == [] and not (study.folder / "jobs.jsonl").exists()


def test_what_is_wrong_is_said(
    cluster: Pretended, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*command: str) -> str:
        assert main(["study", *command]) == 2
        return capsys.readouterr().err

    study = slurm_study(tmp_path)
    path = str(study.path)
    assert f"hand it in with moe-dist study submit {path}" in said("run", path)
    assert "study list takes nothing after --" in said("list", path, "--", "--time=3")
    assert "--at-once 0 is below 1" in said("submit", path, "--at-once", "0")
    (tmp_path / "tools/scontrol").write_text("#!/bin/sh\necho MaxArraySize = 0\n")
    assert "takes no job arrays (MaxArraySize 0)" in said("submit", path)
    (tmp_path / "tools/scontrol").write_text("#!/bin/sh\necho MaxArraySize = 9\n")
    (tmp_path / "tools/sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2; exit 1\n")
    assert "failed: sbatch: error: invalid partition" in said("submit", path)
    monkeypatch.setenv("MOE_DIST_ROOT", str(tmp_path))
    assert f"{tmp_path} is not the repository: submit from its root, or set MOE_DIST_ROOT" in said("submit", path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert f"no sbatch on the PATH: submit where Slurm is, or: moe-dist study run {path}" in said("submit", path)


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    wrong = (
        "at_once: 0\nretries: -1\nslurm: {t: 1, --time: 2, array: 0-3, wait: true, partition: null, exclusive: false}\n"
    )
    with pytest.raises(ValueError) as caught:
        slurm_study(tmp_path, STUDY.replace("retries: 0\n", "") + wrong)
    said = str(caught.value)
    for part in ("at_once=0 is below 1", "retries=-1 is below 0", "slurm.--time is not the long name"):
        assert part in said
    for part in ("slurm.array is set by", "slurm.wait is set by", "slurm.partition=null", "slurm.exclusive=false"):
        assert part in said


@pytest.mark.parametrize(("offset", "task"), [("a[$(touch canary)]", "0"), ("0", "a[$(touch canary)]"), ("0;x", "1")])
def test_numbers_of_an_array_are_numbers(offset: str, task: str, tmp_path: Path) -> None:
    """bash would run what stands in them where it reckons."""
    environ = os.environ | {"SLURM_ARRAY_TASK_ID": task, "MOE_DIST_ROOT": str(ROOT), "SLURM_SUBMIT_DIR": str(tmp_path)}
    script = ["bash", str(ROOT / "slurm/study.sbatch"), "study.yaml", offset]
    done = subprocess.run(script, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "usage: sbatch" in done.stderr and not (tmp_path / "canary").exists()
