"""What docs/studies.md says of studies that were run: every answer follows from the ledger that lies beside it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.study.design.grid import Study, load_study
from moe_dist.study.ledger.cells import cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.report.answer import answer

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "docs/studies"
PAGE = (ROOT / "docs/studies.md").read_text(encoding="utf-8")
NAMES = sorted(path.name for path in FOLDER.iterdir())


def committed(name: str) -> Study:
    study = load_study(ROOT / f"configs/studies/{name}.yaml")
    return replace(study, file=replace(study.file, root=str(FOLDER)))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_ledger(name: str) -> None:
    study = committed(name)
    latest = Ledger(study.ledger).latest()
    assert {record["status"] for record in latest.values()} == {"finished"}
    assert latest.keys() == {point.name for point in study.points}
    said = " ".join(answer(study, cells(study, latest)).sentences)
    assert f"\n> {said}\n" in PAGE
    assert f"\n{said}\n" in (FOLDER / name / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_of_the_report(name: str) -> None:
    """Those with an uncertainty, in a study's own part of the page: `132 ± 13`, `0.0373 (0.0284 to 0.0463)`."""
    (part,) = (part for part in PAGE.split("\n## ") if f"study run configs/studies/{name}.yaml" in part)
    part = " ".join(part.split())
    report = (FOLDER / name / "report.md").read_text(encoding="utf-8")
    known = report + "".join(path.read_text(encoding="utf-8") for path in (FOLDER / name / "data").glob("*.csv"))
    numbers = re.findall(r"[+-]?\d[\d.]* ± [\d.]+", part)
    intervals = re.findall(r"(-?\d[\d.]*) \((-?\d[\d.]*) to (-?\d[\d.]*)\)", part)
    assert numbers and [number for number in numbers if number not in known] == []
    for mean, low, high in intervals:
        cells = " | ".join(number if number.startswith("-") else f"+{number}" for number in (mean, low, high))
        assert f"{mean} ({low} to {high})" in report or f"| {cells} |" in report
