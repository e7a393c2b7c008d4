"""What the ledger and measurements.jsonl say of a run, beside sums over its records done in loops."""

import hashlib
import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest

from moe_dist.config.load import dump_config
from moe_dist.study.design.grid import Point
from moe_dist.study.ledger import columns
from moe_dist.study.ledger.columns import Columns, read_columns
from moe_dist.study.ledger.measure import measure
from moe_dist.study.ledger.measurements import FILE, LAYER_MEANS, LAYER_SUMS, MODEL, write_measurements
from moe_dist.study.ledger.settings import config_hash
from tests.unit.study.helpers import toy_study

STEPS, EXPERTS = 10, 3
WIDTHS = dict(zip(LAYER_SUMS, (EXPERTS, EXPERTS, 16, 16, 8, 8, EXPERTS), strict=True))
SITES = [(0, "feed_forward"), (1, "attention"), (1, "feed_forward")]
ENVIRONMENT = {
    "python": "3.11",
    "packages": {"torch": "2.13"},
    "host": "node1",
    "cpu": "a CPU",
    "threads_per_rank": 3,
    "device": "cpu (x86_64)",
    "revision": "abc",
    "layout": {"world": 4, "dp": 2},
    "data": {"digest": "d1", "documents_per_micro_step": 7.5},
}
TOKENS = 8 * 32
"""Of a step: 8 sequences of 32."""


def record(step: int, draw: random.Random) -> dict[str, Any]:
    seconds = draw.uniform(0.5, 2.0)
    numbers = {name: draw.random() for name in MODEL} | {"step_seconds": seconds}
    rows = [
        {"layer": layer, "kind": kind}
        | {name: draw.random() for name in LAYER_MEANS}
        | {name: [draw.randrange(1000) for _ in range(width)] for name, width in WIDTHS.items()}
        for layer, kind in SITES
    ]
    more = {"tokens_per_second": TOKENS / seconds, "tflops": 5e-9 * TOKENS / seconds, "memory_bytes": 100 + step % 7}
    more |= {"tflops_executed": 4e-9 * TOKENS / seconds, "dispatch_rows_bytes": step, "dispatch_bytes": 2 * step}
    return {"step": step, **numbers, **more, "layers": rows}


def records_of(seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    records = [record(step, draw) for step in range(1, STEPS + 1)]
    for number in (3, 5, 8, 10):  # ceil(10 / 4), ceil(20 / 4), ...
        records[number - 1] |= {"validation_loss": 5.0 - number / 10, "validation_loss_capped": 6.0 - number / 10}
    records[6] |= {"skipped": "loss nan", "loss": None}
    return records


def written(folder: Path, records: list[dict[str, Any]], evaluations: int | None = 4, **moe: Any) -> Point:
    """The first point of a study, as if it had trained."""
    point = toy_study(folder).points[0]
    config = point.config
    config = replace(
        config,
        train=replace(config.train, steps=STEPS, global_batch=8, accumulation=2),
        run=replace(config.run, evaluations=evaluations),
        model=replace(config.model, num_layers=2, moe=replace(config.model.moe, num_experts=EXPERTS, top_k=2, **moe)),
    )
    point = replace(point, config=config)
    point.run.mkdir(parents=True)
    (point.folder / "point.yaml").write_text(dump_config(config))
    (point.run / "config.yaml").write_text(dump_config(config))
    (point.run / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (point.run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return point


def test_scalars_of_the_ledger(tmp_path: Path) -> None:
    records = records_of()
    point = written(tmp_path, records)
    (point.run / "roll_backs.jsonl").write_text('{"step": 4, "reason": "a"}\n{"step": 6, "reason": "b"}\n')
    line = json.loads(json.dumps(measure(point), allow_nan=False))
    seconds = sorted(record["step_seconds"] for record in records)
    last = records[-2:]
    expected = {
        "status": "finished",
        "steps": STEPS,
        "loss": fmean(record["loss"] for record in records if record["loss"] is not None),
        "validation_loss": 4.0,
        "validation_loss_capped": 5.0,
        "drop_rate": fmean(record["drop_rate"] for record in last),
        "drop_rate_whole_run": fmean(record["drop_rate"] for record in records),
        "router_entropy": fmean(record["router_entropy"] for record in last),
        "step_seconds": median(seconds),
        "step_seconds_low": seconds[2] + (seconds[3] - seconds[2]) * 0.25,  # at 9 / 4 of 0, 1, ..., 9
        "step_seconds_high": seconds[6] + (seconds[7] - seconds[6]) * 0.75,
        "seconds": sum(seconds),
        "flops": STEPS * 5000 * TOKENS,
        "flops_executed": STEPS * 4000 * TOKENS,
        "tflops": median(record["tflops"] for record in records),
        "memory_bytes": 106,
        "dispatch_rows_bytes": 5.5,
        "tokens": 9 * TOKENS,  # one step was left out
        "tokens_per_micro_step": TOKENS // 2,
        "sequences_per_micro_step": 4,
        "documents_per_micro_step": 7.5,
        "skipped_steps": 1,
        "roll_backs": 2,
        "schedule": {"steps": STEPS, "warmup_steps": 2, "evaluations": 4},
        "data_digest": "d1",
        "versions": {"python": "3.11", "torch": "2.13"},
        "machine": {"host": "node1", "cpu": "a CPU", "threads": 3, "device": "cpu (x86_64)"},
    }
    for name, value in expected.items():
        assert line[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.5] * 30 + [0.0] * 30, 49),  # (20 - n) / 2 of a window of 20 is under 0.6 for the first time at n = 19
        ([0.029] * 20, 20),
        ([0.03] * 40, None),
        ([0.0] * 19, None),  # no 20 steps
        ([0.0] * 10 + [None] + [0.0] * 25, 31),  # what was not recorded is in no window
        ([None] * 40, None),
    ],
)
def test_steps_until_few_are_dropped(rates: list[float | None], expected: int | None, tmp_path: Path) -> None:
    records = [{**records_of()[0], "step": step, "drop_rate": rate} for step, rate in enumerate(rates, start=1)]
    assert measure(written(tmp_path, records, evaluations=None))["steps_until_few_drops"] == expected


@pytest.mark.parametrize(
    ("moe", "expected"),
    [
        ({"capacity_factor": None}, None),
        ({"capacity_factor": 1.0}, 86),  # ceil(2 * 128 / 3)
        ({"capacity_factor": 1.1}, 94),
        ({"capacity_factor": 1.0, "capacity_scope": "local"}, 22),  # ceil(2 * 32 / 3), of 4 ranks
        ({"capacity_factor": 1.0, "capacity_schedule": {0: 2.0, 8: 0.5, 10: 3.0}}, 43),  # from step 8 on; 10 is never
        ({"capacity_factor": 0.001, "min_capacity": 5}, 5),
        ({"capacity_factor": [1.0, 2.0]}, [86, 171]),
        ({"capacity_factor": [1.0, None]}, [86, None]),
    ],
)
def test_rows_that_an_expert_takes(moe: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    records = records_of()
    for each in records:
        each["layers"] = [row for row in each["layers"] if row["kind"] == "feed_forward"]
    assert measure(written(tmp_path, records, **moe))["expert_capacity"] == expected


def test_a_dropless_point_has_its_own_loss_as_the_capped_one(tmp_path: Path) -> None:
    """So a question about the capped loss can have a dropless baseline; what ends under a limit is not made up."""
    records = [{k: v for k, v in record.items() if k != "validation_loss_capped"} for record in records_of()]
    limits: dict[str, dict[str, Any]] = {
        "dropless": {"capacity_factor": None},
        "in the end": {"capacity_factor": 1.0, "capacity_schedule": {9: None}},
        "limited": {"capacity_factor": 1.0},
        "of one layer": {"capacity_factor": [None, 1.0]},
        "evaluated": {"capacity_factor": None, "eval_capacity_factor": 1.0},
    }
    found = {}
    for name, moe in limits.items():
        (tmp_path / name).mkdir()
        point = written(tmp_path / name, records, **{"eval_capacity_factor": None} | moe)
        found[name] = measure(point).get("validation_loss_capped")
    assert found == {
        "dropless": 4.0,
        "in the end": 4.0,
        "limited": None,
        "of one layer": None,
        "evaluated": None,
    }


def test_experts_of_attention_have_a_capacity_of_their_own(tmp_path: Path) -> None:
    point = written(tmp_path, records_of(), capacity_factor=1.0)
    assert measure(point)["expert_capacity"] == [86, 40, 86]  # 8 experts at 1.25: ceil(1.25 * 2 * 128 / 8)


def test_the_hash_is_of_the_configuration_and_not_of_its_place(tmp_path: Path) -> None:
    config = written(tmp_path, records_of()).config
    moved = replace(config, run=replace(config.run, name="other", root="elsewhere"))
    assert config_hash(moved) == config_hash(config)
    values = asdict(config)
    values["run"] = {name: value for name, value in values["run"].items() if name not in ("name", "root")}
    assert config_hash(config) == hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    for other in (
        replace(config, train=replace(config.train, seed=9)),
        replace(config, run=replace(config.run, eval_sequences=9)),
    ):
        assert config_hash(other) != config_hash(config)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines_by_hand(records: list[dict[str, Any]], ends: list[tuple[float, int]]) -> list[dict[str, Any]]:
    lines, begin = [], 0
    for fraction, end in ends:
        span, place = records[begin:end], {"fraction": fraction, "step": end}
        values = {name: [record[name] for record in span if record[name] is not None] for name in MODEL}
        said = {name: value for name, value in span[-1].items() if name.startswith("validation")}
        lines.append(place | {"layer": None} | {name: fmean(numbers) for name, numbers in values.items()} | said)
        for number, (layer, kind) in enumerate(SITES):
            rows = [record["layers"][number] for record in span]
            line = place | {"layer": layer, "kind": kind}
            line |= {name: fmean(row[name] for row in rows) for name in LAYER_MEANS}
            for name, width in WIDTHS.items():
                line[name] = [sum(row[name][index] for row in rows) for index in range(width)]
            lines.append(line)
        begin = end
    return lines


@pytest.mark.parametrize("evaluations", [4, None])
def test_measurements_are_sums_since_the_fraction_before(evaluations: int | None, tmp_path: Path) -> None:
    records = records_of()
    point = written(tmp_path, records, evaluations)
    measure(point)
    fractions = [0.25, 0.5, 0.75, 1.0] if evaluations else [0.3, 0.5, 0.8, 1.0]
    found = lines_of(point.folder / FILE)
    expected = lines_by_hand(records, list(zip(fractions, (3, 5, 8, 10), strict=True)))
    assert len(found) == len(expected)
    for line, by_hand in zip(found, expected, strict=True):
        assert line.keys() == by_hand.keys()
        for name, value in by_hand.items():
            assert line[name] == (pytest.approx(value, rel=1e-12) if isinstance(value, float) else value), name
    again = (point.folder / FILE).read_bytes()
    measure(point)
    assert (point.folder / FILE).read_bytes() == again  # a function of the run


def test_a_dense_model_has_lines_of_its_own_alone(tmp_path: Path) -> None:
    records = [{k: v for k, v in record.items() if k not in ("layers", "drop_rate")} for record in records_of()]
    point = written(tmp_path, records)
    line = measure(point)
    assert line["drop_rate"] is line["expert_capacity"] is None
    found = lines_of(point.folder / FILE)
    assert [each["layer"] for each in found] == [None] * 4 and found[0]["drop_rate"] is None
    assert np.isnan(read_columns(point.folder / FILE).model["drop_rate"]).all()


def check_columns(found: Columns, lines: list[dict[str, Any]]) -> None:
    model = [line for line in lines if line["layer"] is None]
    for name in ("fraction", "step", "validation_loss", *MODEL):
        assert found.model[name].tolist() == [line[name] for line in model], name
    assert set(found.layers) == {"feed_forward", "attention"}
    for kind, arrays in found.layers.items():
        own = [line for line in lines if line.get("kind") == kind]
        layers = arrays["layer"].tolist()
        assert layers == [layer for layer, of in SITES if of == kind]
        for number, line in enumerate(own):
            at = divmod(number, len(layers))
            assert line["layer"] == layers[at[1]]
            for name in (*LAYER_MEANS, *LAYER_SUMS):
                assert arrays[name][at].tolist() == line[name], name
        assert all(arrays[name].dtype == np.int64 for name in LAYER_SUMS)


def test_arrays_are_a_view_of_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, path = lines_by_hand(records_of(), [(0.3, 3), (1.0, 10)]), tmp_path / FILE
    write_measurements(path, lines)
    check_columns(Columns.of(lines), lines)
    with monkeypatch.context() as patch:
        patch.setattr(columns, "parse_lines", None)  # not needed
        check_columns(read_columns(path), lines)
    other = lines_by_hand(records_of(1), [(0.3, 3), (1.0, 10)])
    path.write_text("".join(json.dumps(line) + "\n" for line in other))  # by somebody who knows of no arrays
    check_columns(read_columns(path), other)
    write_measurements(path, lines)
    stored = path.with_suffix(".npz")
    whole = stored.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 97)]
    for damaged in (b"", b"PK", whole[:-300], *flipped):
        stored.write_bytes(damaged)
        check_columns(read_columns(path), lines)
    stored.unlink()
    check_columns(read_columns(path), lines)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / FILE
    write_measurements(path, lines_by_hand(records_of(), [(1.0, 10)]))
    with path.open("a") as file:
        file.write('{"fraction": 0.\n')
    with pytest.raises(ValueError, match=r"measurements.jsonl, line 5 is not JSON: b'\{\"fraction\": 0\.'"):
        read_columns(path)


def test_fractions_with_unlike_layers_are_refused() -> None:
    lines = lines_by_hand(records_of(), [(0.3, 3), (1.0, 10)])
    with pytest.raises(ValueError, match=r"not every fraction has a line for each of the feed_forward layers \[0, 1\]"):
        Columns.of(lines[:-1])
    lines[-1] |= {"load": [1, 2]}
    with pytest.raises(ValueError, match="load is not a list of as many numbers in every line"):
        Columns.of(lines)
