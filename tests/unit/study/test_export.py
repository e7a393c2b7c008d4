"""Tables for other tools, read back and compared with what they were made of, number by number."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_dist.cli import main
from moe_dist.study.design.grid import Study
from moe_dist.study.ledger.columns import Columns
from moe_dist.study.ledger.export import as_kind, export, kind_of, tidy
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.ledger.measurements import FILE, write_measurements
from tests.unit.study.helpers import toy_study
from tests.unit.study.test_measure import lines_by_hand, records_of

NESTED = {"versions": {"torch": "2.13", "apex": None}, "expert_capacity": [86, 171], "machine": {"threads": 3}}


def finished(folder: Path, points: int = 3) -> tuple[Study, dict[str, list[dict[str, Any]]]]:
    """A study of four points, the first of which have finished; the measurements of each."""
    study, measured = toy_study(folder), {}
    for number, point in enumerate(study.points[:points]):
        measured[point.name] = lines_by_hand(records_of(number), [(0.3, 3), (1.0, 10)])
        point.folder.mkdir(parents=True)
        write_measurements(point.folder / FILE, measured[point.name])
        line = {"point": point.name, "axes": point.axes, "seed": point.seed, "status": "finished", "loss": 2.5 + number}
        Ledger(study.ledger).append(line | NESTED)
    failed = {"point": study.points[3].name, "axes": {}, "seed": 1, "status": "failed", "reason": "out of memory"}
    Ledger(study.ledger).append(failed)
    return study, measured


def rows_by_hand(study: Study, measured: dict[str, list[dict[str, Any]]]) -> dict[tuple[Any, ...], float]:
    rows = {}
    for point in study.points:
        for line in measured.get(point.name, []):
            own = (point.name, point.axes["model.moe.capacity_factor"], point.seed, line["fraction"], line["step"])
            own += (line["layer"], line.get("kind"))
            for name, value in line.items():
                if name not in ("fraction", "step", "layer", "kind"):
                    for index, number in enumerate(value) if isinstance(value, list) else [(None, value)]:
                        if number is not None:
                            rows[own + (name, index)] = number
    return rows


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return rows


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_number_has_its_row(form: Any, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    study, measured = finished(tmp_path)
    ledger, measurements = export(study, form, tmp_path / "out")
    expected, found = rows_by_hand(study, measured), read(measurements)
    assert list(found[0]) == [
        *("point", "model.moe.capacity_factor", "seed"),
        *("fraction", "step", "layer", "kind", "measure", "index", "value"),
    ]
    assert {tuple(list(row.values())[:-1]): row["value"] for row in found} == expected
    assert len(found) == len(expected)
    lines = read(ledger)
    assert [line["point"] for line in lines] == [point.name for point in study.points]
    assert [line["loss"] for line in lines] == [2.5, 3.5, 4.5, None]
    assert lines[0]["axes.model.moe.capacity_factor"] == 0.5 and lines[3]["reason"] == "out of memory"
    assert lines[0]["versions.torch"] == "2.13" and lines[0]["versions.apex"] is None
    assert lines[0]["expert_capacity"] == "[86, 171]" and lines[3]["expert_capacity"] is None
    assert lines[0]["machine.threads"] == 3


def test_a_point_is_a_row_group_of_its_own(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    study, _ = finished(tmp_path)
    _, path = export(study, "parquet", tmp_path / "out")
    file = parquet.ParquetFile(path)
    assert file.num_row_groups == 3
    for number, point in enumerate(study.points[:3]):
        assert set(file.read_row_group(number, ["point"])["point"].to_pylist()) == {point.name}
    types = {field.name: str(field.type) for field in file.schema_arrow}
    assert types["seed"] == types["layer"] == types["index"] == "int64" and types["value"] == "double"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_flops_beyond_64_bits(form: Any, tmp_path: Path) -> None:
    if form == "parquet":
        pytest.importorskip("pyarrow")
    study, _ = finished(tmp_path)
    line = Ledger(study.ledger).latest()[study.points[0].name]
    Ledger(study.ledger).append(line | {"flops": 3 * 10**19})
    path, _ = export(study, form, tmp_path / "out")
    assert read(path)[-1]["flops"] == 3e19 and read(path)[0]["flops"] is None


def test_seeds_have_the_number_that_the_study_gives_them_now(tmp_path: Path) -> None:
    study, _ = finished(tmp_path)
    line = Ledger(study.ledger).latest()[study.points[1].name]
    Ledger(study.ledger).append(line | {"seed": 7})
    Ledger(study.ledger).append(line | {"seed": 7, "point": "gone"})
    ledger, measurements = export(study, "jsonl", tmp_path / "out")
    assert [row["seed"] for row in read(ledger)] == [0, 1, 0, 1, 1, 7]
    assert {(row["point"], row["seed"]) for row in read(measurements)} == {(p.name, p.seed) for p in study.points[:3]}


def test_what_is_not_finite_has_no_row() -> None:
    lines = lines_by_hand(records_of(), [(0.3, 3), (1.0, 10)])
    lines[0]["loss"] = None
    blocks = {(block.same["measure"], block.same["kind"]): block for block in tidy(Columns.of(lines))}
    assert blocks["loss", None].columns["step"].tolist() == [10]
    assert blocks["drop_rate", None].columns["step"].tolist() == [3, 10]


def test_kinds_of_columns() -> None:
    for values, kind, kept in (
        ([1, None, 2], "int", [1, None, 2]),
        ([1, 2.5, None], "float", [1.0, 2.5, None]),
        ([2**63 - 1, -(2**63)], "int", [2**63 - 1, -(2**63)]),
        ([1, 2**63], "float", [1.0, 2.0**63]),
        ([True, False], "bool", [True, False]),
        ([True, 1], "text", ["true", "1"]),
        (["a", 1, None], "text", ["a", "1", None]),
        ([None], "float", [None]),
    ):
        assert kind_of(values) == kind and [as_kind(value, kind) for value in values] == kept


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study, _ = finished(tmp_path)
    assert main(["study", "export", str(study.path)]) == 0
    written = [study.folder / "export" / name for name in ("ledger.jsonl", "measurements.jsonl")]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert main(["study", "export", str(study.path), "--jsonl", str(tmp_path / "there")]) == 0
    assert (tmp_path / "there" / "measurements.jsonl").read_bytes() == written[1].read_bytes()


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study, _ = finished(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["study", "export", str(study.path), "--parquet", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'moe_dist[study]'; or export with --jsonl" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    (study.points[0].folder / FILE).unlink()
    with pytest.raises(ValueError, match=r"measurements\.jsonl is missing, which an older version did not write"):
        export(study, "jsonl", tmp_path / "out")
    assert not (tmp_path / "out" / "measurements.jsonl").exists()
    study.ledger.unlink()
    with pytest.raises(ValueError, match="no point has finished yet; start `moe-dist study run` first"):
        export(study, "jsonl", tmp_path / "out")
