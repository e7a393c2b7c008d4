"""The report's tables by hand, what it says of points without a result, and its command."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.study.command import study as command_line
from moe_dist.study.design.grid import CAPACITY, Study
from moe_dist.study.ledger.cells import Cell, cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.page.model import Table
from moe_dist.study.report.answer import answer
from moe_dist.study.report.metric import lower_is_better, spread
from moe_dist.study.report.report import page_of, write_report
from moe_dist.study.report.tables import costs_table, failed_table, results_table, routing_table, setting_table
from moe_dist.study.report.theory import dropped_by_chance
from moe_dist.study.run.runner import Runner
from tests.unit.study.helpers import STUDY, Pretend, toy_study, write_study
from tests.unit.study.synthetic import QUESTION, plant, planted_study
from tests.unit.study.synthetic import STUDY as PLANTED


def rows_of(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def points_table(study: Study) -> tuple[list[Cell], list[dict[str, Any]], str]:
    grid = cells(study, Ledger(study.ledger).latest())
    baselines = {id(match.cell): match.baseline for match in answer(study, grid).families.others}
    results, routing = results_table(study, grid, baselines, "validation_loss"), routing_table(study, grid)
    rows = [one | other for one, other in zip(rows_of(results), rows_of(routing), strict=True)]
    return grid, rows, results.note


def test_the_table_by_hand(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    Runner(study, Pretend(tmp_path)).run(study.points)
    grid, (half, dropless), _ = points_table(study)
    chance = dropped_by_chance(study.points[0].config, 1)
    assert half.pop("by chance") == pytest.approx(chance) and chance is not None
    told = {name: value for name, value in half.items() if name not in ("C", "tokens per micro-step")}
    assert told == {
        "capacity_factor": "0.5",
        "seeds": 2,
        "validation loss": "3.0000 ± 0.7071",  # 2.5 and 3.5
        "validation loss, capped": "–",
        "minus baseline": "+0.5000",  # 2.5 - 2 and 3.5 - 3
        "validation bits/byte": "4.0000",
        "training loss": "7.0000 ± 0.7071",
        "dropped, end": "50.00 %",
        "dropped, whole run": "87.50 %",
        "fullest expert": "1.50",
    }
    assert dropless["capacity_factor"] == "dropless" and dropless["minus baseline"] == "–"
    assert dropless["validation loss"] == "2.5000 ± 0.7071"
    costs = rows_of(costs_table(grid))[0]
    assert costs["step (ms)"] == pytest.approx(1125.0) and costs["rows to experts (MB a step)"] == pytest.approx(4.5)
    assert costs["time of all steps (s)"] == pytest.approx(9.0)


def test_runs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Seed 0 failed under the limit, seed 1 without one: by position 3.5 and 4.5 would stand against 2 and 4."""
    study = toy_study(tmp_path, STUDY.replace("seeds: [0, 1]", "seeds: [0, 1, 2]"))
    trouble = "if (factor, seed) in ((0.5, 0), (None, 1)): sys.exit('no luck')"
    assert Runner(study, Pretend(tmp_path, trouble)).run(study.points) == 1
    grid, (half, _), _ = points_table(study)
    assert [cell.values("validation_loss") for cell in grid] == [[3.5, 4.5], [2.0, 4.0]]
    assert half["minus baseline"] == "+0.5000" and half["seeds"] == 2  # of seed 2 alone
    failed = failed_table(study, Ledger(study.ledger).latest())
    assert failed is not None
    assert [row["point"] for row in rows_of(failed)] == ["capacity_factor=0.5-seed=0", "capacity_factor=null-seed=1"]
    assert all("no luck" in row["end of its log"] for row in rows_of(failed))


def test_what_was_measured_is_told_by_its_own_name(tmp_path: Path) -> None:
    """Of token ids bits per token; of a classifier accuracies, its own number of parameters, losses by the text."""
    tokens, texts = tmp_path / "tokens", tmp_path / "texts"
    for folder in (tokens, texts):
        folder.mkdir()
    indexed = "overrides: {train.steps: 8, data.kind: indexed, data.paths: [x]}"
    study = toy_study(tokens, STUDY.replace("overrides: {train.steps: 8}", indexed))
    assert Runner(study, Pretend(tokens, validation_bits_per_token=5.5)).run(study.points) == 0
    _, (half, _), note = points_table(study)
    assert half["validation bits/token"] == "5.5000" and "validation bits/byte" not in half
    assert "Losses in nats/token;" in note

    classes = "overrides: {train.steps: 8, task: classification, model.num_classes: 7, model.num_heads: 2}"
    study = toy_study(texts, STUDY.replace("overrides: {train.steps: 8}", classes))
    measured = {"validation_accuracy": 0.75, "validation_macro_f1": 0.5, "test_loss": 3.25, "test_accuracy": 0.625}
    assert Runner(study, Pretend(texts, **measured)).run(study.points) == 0
    record = Ledger(study.ledger).records()[0]
    built = Classifier(resolve_backends(study.points[0].config.model, 1), single_process_mesh(), max_len=32)
    assert record["parameters"] == sum(param.numel() for param in built.parameters())
    grid, (half, _), note = points_table(study)
    assert [half[name] for name in ("validation accuracy", "validation macro-F1", "test accuracy")] == [
        "75.00 %",
        "0.5000",
        "62.50 %",
    ]
    assert "Losses in nats/text;" in note and half["by chance"] is None
    setting = {row["what"]: row["value"] for row in rows_of(setting_table(study, grid))}
    assert setting["training"] == "8 steps of 16 texts of up to 32 tokens"
    assert setting[CAPACITY] == "0.5, dropless" and setting["seeds"] == "0, 1"


def test_points_without_a_result_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    assert command_line(["report", str(path)]) == 1
    assert "no point has finished yet" in capsys.readouterr().out
    study = toy_study(tmp_path)
    command = Pretend(tmp_path, "if factor == 0.5: sys.exit('no luck')")
    Runner(study, command).run(study.points[1:])
    page = page_of(study)
    assert page is not None
    (violations,) = (part for part in page.lead if getattr(part, "level", "") == "violation")
    lines = "\n".join(violations.lines)  # type: ignore[union-attr]
    assert "1 point failed and is left out of all numbers (capacity_factor=0.5-seed=1)" in lines
    assert "1 point has no result yet (capacity_factor=0.5-seed=0)" in lines
    assert command_line(["report", str(path), "--output", str(tmp_path / "page")]) == 0
    assert capsys.readouterr().out.split()[-2:] == [str(tmp_path / f"page/report.{kind}") for kind in ("html", "md")]
    assert "2 of 4 points have finished" in (tmp_path / "page/report.md").read_text()


def test_a_study_whose_points_all_failed_has_a_page(tmp_path: Path) -> None:
    path, study = write_study(tmp_path), toy_study(tmp_path)
    assert Runner(study, Pretend(tmp_path, "sys.exit('no luck')")).run(study.points) == 1
    assert command_line(["report", str(path)]) == 0
    text = (study.folder / "report.md").read_text()
    assert "4 points failed and are left out of all numbers" in text and "Failed points" in text and "no luck" in text
    assert "0 of 4 points have finished." in text


@pytest.mark.parametrize("without", [(), ("loss", "drop_rate", "validation_loss", "validation_loss_capped")])
def test_a_metric_that_no_point_has_still_makes_a_page(tmp_path: Path, without: tuple[str, ...]) -> None:
    """With all else that there is; and also where that is nothing, as of losses that were not finite."""
    study = planted_study(tmp_path, PLANTED + QUESTION + "  metric: steps_until_few_drops\n")
    plant(study, lambda point, rng: 3.0)
    lines = [json.loads(line) | dict.fromkeys(without) for line in study.ledger.read_text().splitlines()]
    study.ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = {path.stem for path in write_report(study) if path.suffix == ".svg"}
    page = (study.folder / "report.md").read_text()
    assert names == (set() if without else {"against"})
    assert "No finished point has a steps until under 3% are dropped, so it has no answer yet." in page
    assert "The front of loss and cost is left out: no finished point has a steps until under 3% are dropped." in page
    assert ("Nothing is drawn: no finished point has a loss" in page) == bool(without)


def test_differences_are_written_by_the_size_of_what_differs(tmp_path: Path) -> None:
    study = planted_study(tmp_path, PLANTED + QUESTION + "  metric: flops_executed\n")
    plant(study, lambda point, rng: 3.0, change=lambda p: {"flops_executed": 3e12 + 1e9 * p.index})
    page = page_of(study)
    assert page is not None
    tables = {part.name: part for section in page.sections for part in section.parts if isinstance(part, Table)}
    assert {tables["comparisons"].formats[name] for name in ("minus baseline", "low")} == {"+.4g"}
    assert tables["comparisons-more"].formats["bootstrap, high"] == "+.4g"
    few = [name for name, table in tables.items() if len(table.columns) > 10 and name != "costs"]
    assert not few, "a table that nobody reads"
    assert tables["comparisons"].formats["shown with 80%"] == ".4g"
    assert rows_of(tables["points"])[0]["minus baseline"] == "-1e+10"


def test_spread() -> None:
    assert spread([], "{:.1f} %") == "–"
    assert spread([0.5], "{:.1f} %", 100) == "50.0 %"
    assert spread([1, 3], "{:+.1f} s") == "+2.0 ± 1.4 s"


def test_which_way_is_better() -> None:
    assert all(map(lower_is_better, ("validation_loss", "drop_rate", "step_seconds", "test_loss_capped")))
    assert not any(map(lower_is_better, ("validation_accuracy", "test_macro_f1", "validation_macro_f1_capped")))
