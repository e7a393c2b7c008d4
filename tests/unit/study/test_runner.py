"""The runner, with a training command that pretends and counts its calls."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_dist.disk import locked
from moe_dist.study.design.grid import Study, load_study
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.run.runner import Runner, train_command
from moe_dist.study.run.state import state
from moe_dist.study.run.whereabouts import lock_of
from tests.unit.study.helpers import STUDY, Pretend, toy_study, write_study


def states(study_path: Path) -> list[str]:
    study = load_study(study_path)
    return [state(point, Ledger(study.ledger).latest()).split(" ")[0].rstrip(":") for point in study.points]


def test_every_point_runs_once_and_is_written_down(tmp_path: Path) -> None:
    study, command = toy_study(tmp_path), Pretend(tmp_path)
    names = [point.name for point in study.points]
    assert states(study.path) == ["waiting"] * 4
    assert Runner(study, command).run(study.points) == 0
    assert Runner(study, command).run(study.points) == 0
    assert command.trained() == names
    assert states(study.path) == ["finished"] * 4
    record = Ledger(study.ledger).records()[1]
    started, run = record.pop("started"), record.pop("run")
    assert started.endswith("+00:00") and run == str(study.points[1].run)
    assert record.pop("parameters") > record.pop("active_parameters") > 0
    expected = {
        "point": "capacity_factor=0.5-seed=1",
        "axes": {"model.moe.capacity_factor": 0.5},
        "seed": 1,
        "seeds": {"weights": 1, "data": 1},
        "attempt": 1,
        "status": "finished",
        "steps": 8,
        "loss": 4.0 + 3.5,  # all 8 steps: 4 + (7 + ... + 0) / 8
        "validation_loss": 3.5,
        "validation_bits_per_byte": 4.0,
        "drop_rate": 0.5,  # the last 2 of 8 steps
        "drop_rate_whole_run": (6 * 1.0 + 2 * 0.5) / 8,
        "load_max_over_mean": 1.5,
        "step_seconds": 0.25 * 4.5,
        "tokens_per_second": (100 / 4 + 100 / 5) / 2,
        "dispatch_rows_bytes": 4.5e6,
        "dispatch_bytes": 0.0,
        "seconds": 0.25 * 36,
        "device": "cpu",
        "revision": "abc",
    }
    assert {name: record[name] for name in expected} == expected


def test_one_point_alone(tmp_path: Path) -> None:
    study, command = toy_study(tmp_path), Pretend(tmp_path)
    assert Runner(study, command).run([study.point(2)]) == 0
    assert command.trained() == ["capacity_factor=null-seed=0"]
    assert states(study.path) == ["waiting", "waiting", "finished", "waiting"]


def test_a_failed_point_is_written_down_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = toy_study(tmp_path)
    command = Pretend(tmp_path, "if seed == 0: sys.exit('no luck')")
    assert Runner(study, command).run(study.points) == 1
    assert states(study.path) == ["failed", "finished", "failed", "finished"]
    failed = Ledger(study.ledger).records()[0]
    assert failed["status"] == "failed" and failed["reason"].startswith("exit code 1; ")
    assert failed["reason"].endswith("ends with: no luck") and "no luck" in capsys.readouterr().out
    command.mend("(run / 'status.json').write_text(json.dumps(dict(state='failed', reason='nan'))); sys.exit(1)")
    assert Runner(study, command).run([study.point(0)]) == 1
    assert Ledger(study.ledger).records()[-1]["reason"] == "nan"
    command.mend()
    assert Runner(study, command).run(study.points) == 0
    names = [point.name for point in study.points]
    assert command.trained() == [*names, names[0], names[0], names[2]]


def test_a_killed_command_is_a_failure_with_its_signal(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    assert Runner(study, Pretend(tmp_path, "os.kill(os.getpid(), 9)")).run([study.point(0)]) == 1
    assert Ledger(study.ledger).records()[0]["reason"].startswith("killed by SIGKILL")


def test_a_run_that_finished_behind_the_runner_is_only_read(tmp_path: Path) -> None:
    study, command = toy_study(tmp_path), Pretend(tmp_path)
    Runner(study, command).run(study.points)
    study.ledger.unlink()
    assert states(study.path) == ["trained,"] * 4
    assert Runner(study, command).run(study.points) == 0
    assert len(command.trained()) == len(Ledger(study.ledger).records()) == 4


def test_a_run_that_cannot_be_measured_has_not_finished(tmp_path: Path) -> None:
    """By these words a job of Slurm knows whether to end well."""
    study, command = toy_study(tmp_path), Pretend(tmp_path)
    command.mend("(run / 'status.json').write_text(json.dumps(dict(state='finished', step=8))); sys.exit(0)")
    assert Runner(study, command).run([study.point(0)]) == 1
    said = state(study.point(0), Ledger(study.ledger).latest())
    assert said.startswith("failed: trained, but cannot be measured: ")


def test_other_settings_are_refused(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    Runner(study, Pretend(tmp_path)).run([study.point(0)])
    changed = load_study(write_study(tmp_path, STUDY.replace("steps: 8", "steps: 9")))
    with pytest.raises(ValueError, match=r"train\.steps 8, now 9"):
        Runner(changed).run(changed.points)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("{0: 2.0, 4: 0.5}", "{0: 2.0, 4: 1.0}", r"capacity_schedule\.4 0\.5, now 1\.0"),
        ("{0: 2.0, 4: 0.5}", "{0: 2.0}", r"capacity_schedule\.4 0\.5, now not set"),
        ("{0: 2.0}", "{0: 2.0, 4: null}", r"capacity_schedule\.4 not set, now null"),
    ],
)
def test_another_schedule_is_another_setting(tmp_path: Path, before: str, after: str, said: str) -> None:
    def scheduled(schedule: str) -> Study:
        overrides = "overrides: {model.moe.eval_capacity_factor: 1.0, model.moe.capacity_schedule: "
        return toy_study(tmp_path, STUDY.replace("overrides: {", f"{overrides}{schedule}, "))

    study = scheduled(before)
    assert Runner(study, Pretend(tmp_path)).run([study.point(0)]) == 0
    assert Runner(scheduled(before), Pretend(tmp_path)).run([study.point(0)]) == 0
    changed = scheduled(after)
    with pytest.raises(ValueError, match=rf"other settings \(model\.moe\.{said}\)"):
        Runner(changed).run([changed.point(0)])


def test_other_settings_of_a_finished_point_are_refused_without_its_folder(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    Runner(study, Pretend(tmp_path)).run([study.point(0)])
    shutil.rmtree(study.point(0).folder)
    assert Runner(study, Pretend(tmp_path)).run([study.point(0)]) == 0  # finished, by the ledger
    changed = load_study(write_study(tmp_path, STUDY.replace("steps: 8", "steps: 9")))
    with pytest.raises(ValueError, match=r"other settings \(config_hash [0-9a-f]{12}, now [0-9a-f]{12}\)"):
        Runner(changed).run(changed.points)


def test_a_point_in_other_hands_is_waited_for_last(tmp_path: Path) -> None:
    study, command = toy_study(tmp_path), Pretend(tmp_path)
    names = [point.name for point in study.points]
    held = threading.Event()

    def hold() -> None:
        with locked(lock_of(study.points[1])):
            held.set()
            while len(command.trained()) < 3:
                time.sleep(0.01)
            assert states(study.path)[1] == "running"

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    assert Runner(study, command).run(study.points) == 0
    other.join()
    assert command.trained() == [names[0], names[2], names[3], names[1]]


def test_two_runners_share_the_points(tmp_path: Path) -> None:
    study, command = toy_study(tmp_path), Pretend(tmp_path, "time.sleep(0.3)")
    script = "import sys; from pathlib import Path; from moe_dist.study.design.grid import Study, load_study\n"
    script += "from moe_dist.study.run.runner import Runner; from tests.unit.study.helpers import Pretend\n"
    script += "study = load_study(sys.argv[1]); command = Pretend(Path(sys.argv[2]), 'time.sleep(0.3)')\n"
    script += "sys.exit(Runner(study, command).run(study.points))"
    other = subprocess.Popen([sys.executable, "-c", script, str(study.path), str(tmp_path)])
    assert Runner(study, command).run(study.points) == 0
    assert other.wait() == 0
    assert sorted(command.trained()) == [point.name for point in study.points]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_lets_the_point_save_and_stops_the_study(tmp_path: Path, number: signal.Signals) -> None:
    study = toy_study(tmp_path)
    save = "(run / 'status.json').write_text(json.dumps(dict(state='preempted', step=3, signal=n)))"
    trouble = f"import signal\ndef leave(n, f):\n    {save}\n    sys.exit(75)\n"
    trouble += "for n in (signal.SIGUSR2, signal.SIGTERM): signal.signal(n, leave)\n"
    trouble += "Path(run / 'ready').touch()\nwhile True: time.sleep(0.01)"
    command = Pretend(tmp_path, trouble)

    def interrupt() -> None:
        while not (study.points[0].run / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    assert Runner(study, command).run(study.points) == os.EX_TEMPFAIL
    assert states(study.path) == ["preempted", "waiting", "waiting", "waiting"]
    assert Ledger(study.ledger).records() == []
    command.mend()
    assert Runner(study, command).run(study.points) == 0


def test_the_command_of_several_ranks_is_torchrun() -> None:
    alone, pair = (train_command(Path("x.yaml"), ranks) for ranks in (1, 2))
    assert alone[1:] == ["-m", "moe_dist.cli", "train", "x.yaml", "--resume", "auto"]
    assert pair[1:3] == ["-m", "moe_dist.parallel.torchrun"] and pair[pair.index("--nproc_per_node") + 1] == "2"
    assert pair[-6:] == alone[-6:]
