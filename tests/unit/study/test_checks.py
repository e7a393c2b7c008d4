"""Every check of the design, violated once; and the exit code of `--check`."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from moe_dist.study.command import study as command_line
from moe_dist.study.design.grid import CAPACITY, Study, load_study
from moe_dist.study.ledger.cells import cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.page.model import Notice
from moe_dist.study.report.answer import answer
from moe_dist.study.report.checks import check
from moe_dist.study.report.costs import counted_as_equal, same_cost
from moe_dist.study.report.finding import Finding
from moe_dist.study.report.report import check_study, page_of
from moe_dist.study.run.runner import Runner
from tests.unit.study.helpers import STUDY as TOY
from tests.unit.study.helpers import Pretend, toy_study, write_study
from tests.unit.study.synthetic import QUESTION, STUDY, plant, planted_losses, planted_study

LOSS = planted_losses({0.5: 0.03, 1.0: 0.0, 0.75: 0.0, None: 0.0})
FIRST = "capacity_factor=0.5-seed=0"


def findings(study: Study, change: Any = None, spoil: str = "") -> list[Finding]:
    """spoil: a line that is none, at the end."""
    plant(study, LOSS, change=change)
    with study.ledger.open("a") as file:
        file.write(spoil)
    ledger = Ledger(study.ledger)
    latest, grid = ledger.latest(), cells(study, ledger.latest())
    return check(study, grid, latest, answer(study, grid).families, ledger.read()[1])


def only(name: str, **fields: Any) -> Any:
    return lambda point: fields if point.name == name else {}


def capped(**fields: Any) -> Any:
    return lambda point: fields if point.axes[CAPACITY] is not None else {}


def test_a_whole_study_keeps_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = planted_study(tmp_path)
    assert findings(study) == []
    assert command_line(["report", str(study.path), "--check"]) == 0
    assert capsys.readouterr().out == "The design supports the question.\n"


def test_times_that_spread_over_seeds_are_told(tmp_path: Path) -> None:
    """By hand: log times of each point are -0.1, 0, 0.1, 0, 0 over its seeds, so s = 0.0707 with 4 degrees for each of
    3 points: t(0.975, 12) 0.0707 sqrt(2 / 5) = 2.179 * 0.0447 = 0.0974, a factor of 1.102."""
    study = planted_study(tmp_path)
    logs = dict(enumerate([-0.1, 0.0, 0.1, 0.0, 0.0]))
    found = findings(study, lambda point: {"step_seconds": math.exp(logs[point.seed])})
    assert [(each.level, each.check) for each in found] == [("warning", "times")]
    assert "times within 10% count as equal" in found[0].what
    grid = cells(study, Ledger(study.ledger).latest())
    assert len(grid) == 3 and same_cost(grid, "time") == pytest.approx(0.1023, abs=2e-4)
    assert same_cost(grid, "flops") == 0.0
    assert same_cost(grid, "memory") == 0.01  # which the seeds of a point share to the byte
    for cell in grid:
        for record in cell.records:
            record["memory_bytes"] *= math.exp(logs[record["seed"]])
    assert same_cost(grid, "memory") == pytest.approx(0.1023, abs=2e-4)
    assert counted_as_equal({"time": 0.02, "memory": 0.1, "flops": 0.0}) == (
        " Times within 2% and amounts of memory within 10% count as equal."
    )
    assert counted_as_equal({"flops": 0.0}) == ""
    (useless,) = findings(study, lambda point: {"step_seconds": math.exp(10 * logs[point.seed])})
    assert "times tell nothing here" in useless.what and "decide_by: flops, bytes or memory" in useless.remedy


@pytest.mark.parametrize(
    ("change", "name", "said", "points"),
    [
        (only(FIRST, status="failed", reason="no luck"), "finished", "1 point failed and is left out", (FIRST,)),
        (
            only(FIRST, config_hash="0123456789abcdef"),
            "settings",
            "1 point had other settings than the study gives now: config_hash 0123456789ab, now ",
            (FIRST,),
        ),
        (only(FIRST, config_hash=None), "settings", "lines of an older version do not say with which", (FIRST,)),
        (only(FIRST, validation_loss=None), "pairs", "seeds 0 of capacity_factor 0.5 or its baseline lack", (FIRST,)),
        (
            capped(tokens=51_712),
            "budget",
            "capacity_factor 0.5 was trained on 51712 tokens and its baseline on 51200",
            5,
        ),
        (only(FIRST, steps=99), "schedule", "ended at another step than the schedule does", (FIRST,)),
        (
            capped(schedule={"steps": 100, "warmup_steps": 10, "evaluations": 4}),
            "schedule",
            "capacity_factor 0.5 has warm-up over steps 0.1 and its baseline 0.02",
            5,
        ),
        (
            capped(schedule={"steps": 100, "warmup_steps": 2, "evaluations": 8}),
            "schedule",
            "capacity_factor 0.5 has evaluations 8 and its baseline 4",
            5,
        ),
        (lambda point: {"validation_loss": None}, "evaluations", "there is no dropless validation loss", 15),
        (only(FIRST, validation_loss_capped=None), "evaluations", "no validation loss with the capacity", (FIRST,)),
        (only(FIRST, skipped_steps=1), "steadiness", "skipped steps", (FIRST,)),
        (only(FIRST, roll_backs=2), "steadiness", "were rolled back", (FIRST,)),
        (only(FIRST, revision="def"), "software", "revision differs: def of 1 point, abc of 14 points", (FIRST,)),
        (only(FIRST, versions={"torch": "2.8", "moe_dist": "1"}), "software", "torch differs", (FIRST,)),
        (
            only(FIRST, machine={"host": "h", "cpu": "c", "threads": 1, "device": "cpu"}),
            "machine",
            "threads differs: 1 of 1 point, 2 of 14 points",
            (FIRST,),
        ),
        (only(FIRST, device="cuda"), "machine", "device differs: cuda of 1 point", (FIRST,)),
        (only(FIRST, data_digest="d1"), "data", "data digest differs: d1 of 1 point", (FIRST,)),
        (
            only(FIRST, seeds={"weights": 0, "data": 7}),
            "same start",
            "seed 0 stands for seeds 0, 7 of data, so nothing is paired",
            2,
        ),
    ],
)
def test_each_is_seen_and_told(
    tmp_path: Path, change: Any, name: str, said: str, points: tuple[str, ...] | int
) -> None:
    study = planted_study(tmp_path)
    (found,) = [each for each in findings(study, change) if each.check == name and said in each.what][:1]
    assert len(found.points) == points if isinstance(points, int) else found.points == points
    assert found.remedy and said in found.line
    exit_code = command_line(["report", str(study.path), "--check"])
    assert exit_code == (0 if found.level == "warning" else 1)


def test_missing_points_few_seeds_and_bad_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = planted_study(tmp_path, STUDY.replace("[0, 1, 2, 3, 4]", "[0, 1]") + QUESTION)
    found = findings(study, spoil="{broken\n")
    assert [each.check for each in found] == ["ledger", "seeds"]
    assert "line 7 cannot be read" in found[0].what and found[1].what == "2 of each point, and an interval needs 3"
    lines = study.ledger.read_text().splitlines()
    study.ledger.write_text("\n".join(lines[1:6]) + "\n")
    assert command_line(["report", str(study.path), "--check"]) == 1
    out = capsys.readouterr().out
    assert f"violation: finished: 1 point has no result yet ({FIRST}); run `moe-dist study run {study.path}`" in out
    more = planted_study(tmp_path / "more")
    plant(more, LOSS)
    more.ledger.write_text("".join(more.ledger.read_text().splitlines(keepends=True)[3:]))
    assert command_line(["report", str(more.path), "--check"]) == 1
    assert "seeds: fewer than 3 have finished" in capsys.readouterr().out


def test_a_point_without_a_baseline_is_named(tmp_path: Path) -> None:
    """None of the grid has the baseline's other key."""
    text = STUDY.replace("axes:", "axes:\n  model.moe.top_k: [1, 2]")
    study = planted_study(tmp_path, text + QUESTION)
    alone = [point for point in study.points if point.axes != {"model.moe.top_k": 2, CAPACITY: None}]
    study = Study(study.path, study.file, tuple(alone))
    found = findings(study)
    (lonely,) = (each for each in found if each.what.startswith("the grid has no baseline"))
    assert lonely.points == ("top_k 2, capacity_factor 0.5", "top_k 2, capacity_factor 1.0")
    assert lonely.level == "violation"
    asked = planted_study(tmp_path, text + QUESTION + "  compare: {model.moe.top_k: [1]}\n")
    (lonely,) = findings(Study(asked.path, asked.file, tuple(alone)))
    assert (lonely.level, lonely.check, len(lonely.points)) == ("warning", "pairs", 2)


def test_a_seed_without_the_metric_on_both_sides_is_named(tmp_path: Path) -> None:
    study = planted_study(tmp_path)
    found = findings(study, lambda point: {"validation_loss": None} if point.seed == 3 else {})
    of_pairs = [each for each in found if each.check == "pairs"]
    assert [each.points for each in of_pairs] == [(f"capacity_factor={f}-seed=3",) for f in (0.5, 1.0)]
    assert of_pairs[0].what.startswith("seeds 3 of capacity_factor 0.5 or its baseline lack the validation loss")


def test_a_bad_line_is_no_violation_once_all_have_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = planted_study(tmp_path)
    (found,) = findings(study, spoil="{broken\n")
    assert (found.level, found.check) == ("warning", "ledger") and "line 16 cannot be read" in found.what
    assert found.remedy.startswith("remove this line")
    assert command_line(["report", str(study.path), "--check"]) == 0
    (_, broken) = findings(study, only(FIRST, status="failed", reason="no luck"), spoil="{broken\n")[:2][::-1]
    assert (broken.level, broken.check) == ("violation", "ledger")


def test_expert_choice_needs_no_capped_loss(tmp_path: Path) -> None:
    text = STUDY.replace("[0.5, 1.0, null]", "[0.5, 1.0]").replace(
        "train.steps", "model.moe.router: expert_choice, train.steps"
    )
    study = planted_study(tmp_path, text)
    assert [each.check for each in findings(study, lambda point: {"validation_loss_capped": None})] == []


def test_a_study_changed_after_its_runs_is_seen(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    assert Runner(study, Pretend(tmp_path)).run(study.points) == 0

    def settings(of: Study) -> list[str]:
        return [each.what for each in check_study(of) if each.check == "settings"]

    assert settings(study) == []
    changed = load_study(write_study(tmp_path, TOY.replace("steps: 8", "steps: 9")))
    (said,) = settings(changed)
    assert said == f"4 points had other settings than the study gives now: train.steps 8, now 9 of {FIRST}"
    lines = Ledger(study.ledger).records()
    study.ledger.write_text("".join(json.dumps(line | {"config_hash": "of another version"}) + "\n" for line in lines))
    assert settings(study) == []  # point.yaml is the same


def test_lines_name_few_points_and_count_the_rest() -> None:
    line = Finding("violation", "steadiness", "skipped steps", tuple("abcdef"), "lower optim.lr").line
    assert line == "steadiness: skipped steps (a, b, c, d and 2 more); lower optim.lr"


def test_the_worst_leads_the_page(tmp_path: Path) -> None:
    study = planted_study(tmp_path)
    plant(study, LOSS, change=only(FIRST, skipped_steps=1, validation_loss_capped=None))
    assert command_line(["report", str(study.path)]) == 0
    page = (study.folder / "report.md").read_text()
    assert page.index("skipped steps") < page.index("no validation loss with the capacity") < page.index("**Does")
    assert json.loads(study.ledger.read_text().splitlines()[0])["point"] == FIRST


def test_many_lines_of_one_check_are_counted(tmp_path: Path) -> None:
    text = STUDY.replace("axes:", "axes:\n  model.moe.top_k: [1, 2]") + QUESTION
    study = planted_study(tmp_path, text)
    plant(study, LOSS, change=capped(tokens=1))
    page = page_of(study)
    assert page is not None and isinstance(page.lead[0], Notice)
    assert len(page.lead[0].lines) == 4 and page.lead[0].lines[3] == "budget: and 1 more, in the table of checks"


def test_seeds_that_share_noise_are_warned_of(tmp_path: Path) -> None:
    """Two seeds of weights by two of data order are no four repetitions."""
    study = planted_study(tmp_path, STUDY.replace("[0, 1, 2, 3, 4]", "{weights: [0, 1], data: [0, 1]}") + QUESTION)
    found = findings(study, lambda point: {"seeds": point.seeds})
    assert [(each.level, each.check) for each in found] == [("warning", "seeds")]
    assert found[0].what.startswith("the 4 repetitions of a point are 2 seeds of weights by 2 of data order")


@pytest.mark.parametrize(("equal", "field", "least"), [("tokens", "tokens", 1.04), ("time", "seconds", 1.1)])
def test_equal_budgets_are_kept(tmp_path: Path, equal: str, field: str, least: float) -> None:
    study = planted_study(tmp_path)
    study.file.equal = equal  # type: ignore[assignment]
    value = {"tokens": 51_200, "seconds": 10.0}[field]
    (found,) = findings(study, only(FIRST, **{field: value * (least + 0.01)}))
    assert found.check == "budget" and found.what.startswith(f"`equal: {equal}` is not kept: ")
    assert findings(study, only(FIRST, **{field: value * (least - 0.01)})) == []


def test_seeds_that_are_copies_are_seen(tmp_path: Path) -> None:
    """Of five, two have the same loss: their interval would be that of five."""
    study = planted_study(tmp_path)
    findings(study)
    lines = {line["point"]: line for line in map(json.loads, study.ledger.read_text().splitlines())}
    lines[FIRST]["loss"] = lines[FIRST.replace("seed=0", "seed=3")]["loss"]
    study.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    (found,) = check_study(study)
    assert (found.level, found.check, found.points) == ("violation", "seeds", (FIRST,))
    assert "the same training loss to the last bit" in found.what


def test_equal_flops_count_what_a_factor_below_one_leaves_out(tmp_path: Path) -> None:
    """All have the same steps, and 0.5 has no place for half of the rows."""
    half, more = planted_study(tmp_path), planted_study(tmp_path / "more", STUDY.replace("0.5", "2.0") + QUESTION)
    half.file.equal = more.file.equal = "flops"
    (found,) = findings(half)
    assert found.what.startswith("`equal: flops` is not kept: ") and found.points[0] == FIRST
    plant(more, lambda point, rng: 3.0 + 0.1 * point.seed + 0.001 * point.index)
    latest = Ledger(more.ledger).latest()
    assert check(more, cells(more, latest), latest, answer(more, cells(more, latest)).families) == []
