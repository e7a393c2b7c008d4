"""The report: numbers that can be checked by hand, and files that do not change."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from moe_dist.study.figure import draw, x_places

from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.study.answer import dropped_by_chance
from moe_dist.study.cells import Cell, cells
from moe_dist.study.command import study as command_line
from moe_dist.study.grid import CAPACITY
from moe_dist.study.ledger import Ledger
from moe_dist.study.report import markdown, spread, table, write_report
from moe_dist.study.runner import Runner
from tests.unit.study.helpers import STUDY, Pretend, toy_study, write_study


def test_the_table_by_hand(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    Runner(study, Pretend(tmp_path)).run(study.points)
    head, _, half, dropless = table(study, cells(study, Ledger(study.ledger).latest()))

    def row(line: str) -> dict[str, str]:
        return dict(zip(*([cell.strip() for cell in text.split("|")[1:-1]] for text in (head, line)), strict=True))

    assert row(half) == {
        "capacity_factor": "0.5",
        "seeds": "2",
        "validation loss": "3.0000 ± 0.7071",  # 2.5 and 3.5
        "minus dropless": "+0.5000",  # 2.5 - 2 and 3.5 - 3
        "validation bits/byte": "4.0000",
        "training loss": "7.0000 ± 0.7071",
        "dropped, end": "50.00 %",
        "by chance": f"{100 * dropped_by_chance(study.points[0].config, 1):.2f} %",
        "dropped, whole run": "87.50 %",
        "fullest expert": "1.50",
        "step": "1125.0 ms",
        "rows to experts": "4.500 MB",
        "crossing ranks": "0.000 MB",
    }
    assert row(dropless)["capacity_factor"] == "dropless"
    assert row(dropless)["validation loss"] == "2.5000 ± 0.7071"
    assert row(dropless)["minus dropless"] == "–"


def test_runs_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Seed 0 failed under the limit, seed 1 without one: by position 3.5 and 4.5 would stand against 2 and 4."""
    study = toy_study(tmp_path, STUDY.replace("seeds: [0, 1]", "seeds: [0, 1, 2]"))
    trouble = "if (factor, seed) in ((0.5, 0), (None, 1)): sys.exit('no luck')"
    assert Runner(study, Pretend(tmp_path, trouble)).run(study.points) == 1
    grid = cells(study, Ledger(study.ledger).latest())
    assert [cell.values("validation_loss") for cell in grid] == [[3.5, 4.5], [2.0, 4.0]]
    head, _, half, _ = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table(study, grid))
    assert half[head.index("minus dropless")] == "+0.5000"  # of seed 2 alone
    assert half[head.index("seeds")] == "2"


def test_a_thin_line_joins_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = [
        Cell({CAPACITY: x}, [{"seed": s, "validation_loss": 10 * s + x, "drop_rate": 0.0} for s in seeds])
        for x, seeds in ((0.5, (1, 2, 3)), (1.0, (0, 2, 3)), (2.0, (0, 1, 2, 3)))
    ]
    drawn: list[tuple[list[float], list[float]]] = []
    plot = Axes.plot

    def note(axes: Axes, x: Any, y: Any, *args: Any, **how: Any) -> Any:
        if how.get("alpha") == 0.5 and axes.get_ylabel() == "" and y[0] > 1:
            drawn.append((list(x), list(y)))
        return plot(axes, x, y, *args, **how)

    monkeypatch.setattr(Axes, "plot", note)
    draw(grid, CAPACITY, [])
    assert drawn == [([0.5, 1.0, 2.0], [20.5, 21.0, 22.0]), ([0.5, 1.0, 2.0], [30.5, 31.0, 32.0])]


def test_what_was_measured_is_told_by_its_own_name(tmp_path: Path) -> None:
    """Of token ids bits per token; of a classifier accuracies, its own number of parameters, losses by the text."""
    tokens, texts = tmp_path / "tokens", tmp_path / "texts"
    for folder in (tokens, texts):
        folder.mkdir()
    indexed = "overrides: {train.steps: 8, data.kind: indexed, data.paths: [x]}"
    study = toy_study(tokens, STUDY.replace("overrides: {train.steps: 8}", indexed))
    assert Runner(study, Pretend(tokens, validation_bits_per_token=5.5)).run(study.points) == 0
    record = Ledger(study.ledger).records()[0]
    assert record["validation_bits_per_token"] == 5.5 and "validation_bits_per_byte" not in record
    write_report(study, Ledger(study.ledger).latest())
    page = (study.folder / "report.md").read_text()
    assert "| validation bits/token |" in page and "bits/byte" not in page and "Losses are in nats/token;" in page

    classes = "overrides: {train.steps: 8, task: classification, model.num_classes: 7, model.num_heads: 2}"
    study = toy_study(texts, STUDY.replace("overrides: {train.steps: 8}", classes))
    measured = {"validation_accuracy": 0.75, "validation_macro_f1": 0.5, "test_loss": 3.25, "test_accuracy": 0.625}
    assert Runner(study, Pretend(texts, **measured)).run(study.points) == 0
    record = Ledger(study.ledger).records()[0]
    assert {name: record[name] for name in measured} == measured
    built = Classifier(resolve_backends(study.points[0].config.model, 1), single_process_mesh(), max_len=32)
    assert record["parameters"] == sum(param.numel() for param in built.parameters())
    write_report(study, Ledger(study.ledger).latest())
    page, picture = ((study.folder / name).read_text() for name in ("report.md", "toy.svg"))
    assert "| validation accuracy | validation macro-F1 | test accuracy |" in page
    assert "| 75.00 % | 0.5000 | 62.50 % |" in page and "bits" not in page
    assert "Losses are in nats/text;" in page and "8 steps of 16 texts of up to 32 tokens" in page
    assert "dropless validation accuracy (%)" in picture and "(nats/text)" in picture


def test_spread() -> None:
    assert spread([], "{:.1f} %") == "–"
    assert spread([0.5], "{:.1f} %", 100) == "50.0 %"
    assert spread([1, 3], "{:+.1f} s") == "+2.0 ± 1.4 s"


def test_numbers_stand_at_themselves_and_dropless_to_their_right() -> None:
    assert x_places([0.5, 1.0, 2.0, None]) == {0.5: 0.5, 1.0: 1.0, 2.0: 2.0, None: 2.75}
    assert x_places([4, None]) == {4: 4.0, None: 5.0}
    assert x_places(["gelu", "relu"]) == {"gelu": 0.0, "relu": 1.0}
    assert x_places([True, False]) == {True: 0.0, False: 1.0}


def test_the_same_ledger_gives_the_same_files(tmp_path: Path) -> None:
    text = "name: toy\nbase: base.yaml\naxes: {model.moe.top_k: [1, 2], model.moe.capacity_factor: [0.5, 1, null]}\n"
    study = toy_study(tmp_path, text + "overrides: {train.steps: 8}\n")
    assert Runner(study, Pretend(tmp_path)).run(study.points) == 0
    latest = Ledger(study.ledger).latest()
    paths = write_report(study, latest)
    assert [path.name for path in paths] == ["report.md", "toy.png", "toy.svg"]
    first = [path.read_bytes() for path in paths]
    assert first[1].startswith(b"\x89PNG") and b"<svg" in first[2]
    assert [path.read_bytes() for path in write_report(study, latest)] == first


def test_points_without_a_result_are_named(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    assert command_line(["report", str(path)]) == 1
    study = toy_study(tmp_path)
    command = Pretend(tmp_path, "if factor == 0.5: sys.exit('no luck')")
    Runner(study, command).run(study.points[1:])
    page = markdown(study, Ledger(study.ledger).latest())
    assert "2 of 4 points have finished" in page
    assert "- capacity_factor=0.5-seed=0: not run to its end yet" in page
    assert "- capacity_factor=0.5-seed=1: failed exit code 1" in page
    assert command_line(["report", str(path)]) == 0
