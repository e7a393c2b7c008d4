"""What happens to jobs of a real Slurm, and what their supervisor makes of it: ranks are pretended, Slurm is not.

`lose`, `return` and `--preempt` are of slurm/local_cluster.sh.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_dist.cluster import history
from moe_dist.train.record.status import read_status
from tests.slurm import pretended_ranks
from tests.slurm.jobs import Run, Runs, virtual_nodes

pytestmark = pytest.mark.timeout(600)
CONFIG = f"""
train: {{steps: {pretended_ranks.STEPS}}}
run: {{root: FOLDER/runs}}
parallel: {{ep: 2}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("supervise")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -ES {pretended_ranks.__file__} "$@"\n')
    python.chmod(0o755)
    variables = {"MOE_DIST_PYTHON": str(python), "MOE_DIST_HOST_PYTHON": sys.executable}
    with virtual_nodes(folder, CONFIG, patience=150.0, **variables) as runs:
        yield runs


def ends_well(run: Run) -> None:
    details = run.over()
    assert details["JobState"] == "COMPLETED", run.log.read_text()
    assert read_status(run.folder) == {"state": "finished", "step": pretended_ranks.STEPS}
    steps = [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, pretended_ranks.STEPS + 1))


def test_a_run_is_handed_in_once_and_finishes(runs: Runs) -> None:
    run = runs.submit("plain", "--site", str(site(runs)))
    assert f"is in job {run.job} already" in runs.cli(
        "submit", runs.config, "--nodes", "2", "--run.name", "plain", refused=True
    )
    ends_well(run)
    assert run.story() == [("finished", "stop")] and run.nodes() == [["node1", "node2"]]
    assert sorted(path.name for path in run.folder.glob("within-*")) == ["within-node1", "within-node2"]


def site(runs: Runs) -> Path:
    """A hook whose words precede what each node runs, as those of a container would."""
    inside = runs.root.parent / "inside"
    inside.write_text(f'#!/bin/sh\ntouch {runs.root}/plain/within-$SLURMD_NODENAME\nexec "$@"\n')
    inside.chmod(0o755)
    path = runs.root.parent / "site $(touch canary).sh"
    path.write_text(f"within=({inside})\nsrun_options=(--cpu-bind=none)\n")
    return path


def test_ranks_that_die_or_stand_still_are_started_again_in_the_job(runs: Runs) -> None:
    run = runs.submit("ranks", "--spare-nodes", "1")
    run.goes_on()
    (run.folder / "die-1").touch()
    run.ended(1)
    run.goes_on()
    (run.folder / "stall").touch()
    ends_well(run)
    assert run.story() == [("rank died", "restart"), ("stalled", "restart"), ("finished", "stop")]
    assert run.nodes() == [["node1", "node2"], ["node1", "node3"], ["node1", "node3"]]
    assert runs.cluster.details(run.job)["Restarts"] == "0"


def test_a_lost_node_is_replaced_by_a_spare_one(runs: Runs) -> None:
    run = runs.submit("spare", "--spare-nodes", "1")
    run.goes_on()
    runs.lose("node2")
    ends_well(run)
    runs.come_back("node2")
    assert run.story() == [("node lost", "restart"), ("finished", "stop")]
    assert run.nodes() == [["node1", "node2"], ["node1", "node3"]]
    assert runs.cluster.details(run.job)["Restarts"] == "0"


@pytest.mark.slow
def test_without_spare_nodes_the_job_is_queued_again(runs: Runs) -> None:
    run = runs.submit("requeued")
    run.goes_on()
    lost = run.nodes()[0][1]
    runs.lose(lost)
    run.ended(1)
    ends_well(run)
    runs.come_back(lost)
    assert run.story() == [("node lost", "requeue"), ("finished", "stop")]
    assert lost not in run.nodes()[1] and runs.cluster.details(run.job)["Restarts"] == "1"


@pytest.mark.slow
def test_a_job_that_loses_the_node_of_its_script_is_queued_again(runs: Runs) -> None:
    run = runs.submit("headless", "--spare-nodes", "1")
    run.goes_on()  # by then another node watches
    lost = run.nodes()[0][0]
    runs.lose(lost)
    run.wait(lambda: runs.cluster.details(run.job)["Restarts"] == "1")
    runs.come_back(lost)
    ends_well(run)
    assert run.story()[0] == ("node lost", "requeue") and run.story()[-1] == ("finished", "stop")


@contextmanager
def standing_still(run: Run) -> Iterator[None]:
    """What is slower than a pretended run is waited for."""
    (run.folder / "slow").touch()
    yield
    (run.folder / "slow").unlink()


@pytest.mark.slow
def test_a_run_gives_way_five_times_and_comes_back(runs: Runs) -> None:
    run = runs.submit("preempted")
    for preempted in range(1, 6):
        run.goes_on(5)
        with standing_still(run):
            runs.preempt()
            run.ended(preempted)
    ends_well(run)
    assert run.story() == [("preempted", "requeue")] * 5 + [("finished", "stop")]
    assert runs.cluster.details(run.job)["Restarts"] == "5"


def test_a_cancelled_run_has_saved_and_goes_on_when_handed_in_again(runs: Runs) -> None:
    run = runs.submit("cancelled")
    run.goes_on(5)
    with standing_still(run):
        assert f"job {run.job} has ended" in runs.cli("cancel", run.folder)
        assert read_status(run.folder)["state"] == "preempted" and run.story() == [("cancelled", "stop")]
        assert runs.cluster.details(run.job)["Restarts"] == "0"
    again = runs.submit("cancelled")
    again.goes_on(5)
    with standing_still(run):
        runs.cluster.run("scancel", again.job)  # by hand: ranks save in the seconds that Slurm leaves them
        again.ended(2)
        assert again.story()[1] == ("cancelled", "stop") and read_status(run.folder)["state"] == "preempted"
        again.over()
    ends_well(runs.submit("cancelled"))
    assert history.starts(history.read(run.folder)) == 3


def test_a_job_near_its_time_limit_saves_and_is_queued_again(runs: Runs) -> None:
    """The limit comes once the run goes on: Slurm counts it in minutes, looks at it every 30 s, and may signal those
    30 s early, so that of a job of one minute the ranks may not have been there to hear it."""
    run = runs.submit("limited", "--time", "10", sbatch=("--signal=USR2@50",))
    run.goes_on(5)
    with standing_still(run):
        run.limit(run.minutes() + 0.75)
        run.ended(1)
    run.limit(None)
    ends_well(run)
    assert run.story() == [("time limit", "requeue"), ("finished", "stop")]
