"""The record of a run: exactly one line a step, whatever happens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dist.moe.losses import MoEStats
from moe_dist.step import Site
from moe_dist.train.record.metrics import MetricsWriter, board_scalars, moe_record


def layer_load(site: Site, load_E: list[int], kept_E: list[int], sent_bytes: int = 0, **changes: float) -> MoEStats:
    numbers = {"aux_loss": 0.0, "entropy": 1.0, "balance_loss": 1.0, "z_loss": 0.5, "unserved": 0.0} | changes
    loads = {"load_E": torch.tensor(load_E), "kept_E": torch.tensor(kept_E)}
    means = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return MoEStats(site, **means, **loads, sent_bytes=sent_bytes)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def written(run_dir: Path, steps: int) -> MetricsWriter:
    writer = MetricsWriter(run_dir, tensorboard=False)
    for step in range(1, steps + 1):
        writer.log({"step": step, "loss": 1 / step})
    return writer


def test_moe_record_by_hand() -> None:
    # 8 assignments a layer: the first drops 2 of its 6 on expert 0, the second none; 2 of 16 in all
    first = layer_load(Site(0), [6, 2], [4, 2], sent_bytes=60, unserved=0.5, entropy=0.25, balance_loss=1.5, z_loss=0.5)
    second = layer_load(Site(3), [4, 4], [4, 4], sent_bytes=20, entropy=0.75, balance_loss=1.0, z_loss=1.5)
    record = moe_record([first, second], row_bytes=10)
    rows = record.pop("layers")
    assert record == {
        "drop_rate": 0.125,
        "unserved_rate": 0.25,
        "load_max_over_mean": 1.5,
        "balance_loss": 1.25,
        "z_loss": 1.0,
        "router_entropy": 0.5,
        "dispatch_rows_bytes": 140,  # 14 kept rows
        "dispatch_bytes": 80,
    }
    assert rows == [
        {
            "layer": 0,
            "kind": "feed_forward",
            "drop_rate": 0.25,
            "unserved_rate": 0.5,
            "load_max_over_mean": 1.5,
            "entropy": 0.25,
            "load": [6, 2],
        },
        {
            "layer": 3,
            "kind": "feed_forward",
            "drop_rate": 0.0,
            "unserved_rate": 0.0,
            "load_max_over_mean": 1.0,
            "entropy": 0.75,
            "load": [4, 4],
        },
    ]


def test_attention_experts_have_rows_and_tags_of_their_own() -> None:
    record = moe_record(
        [layer_load(Site(1), [3, 5], [3, 5]), layer_load(Site(1, "attention"), [6, 2], [4, 2])], row_bytes=10
    )
    assert [(row["layer"], row["kind"], row["drop_rate"]) for row in record["layers"]] == [
        (1, "feed_forward", 0.0),
        (1, "attention", 0.25),
    ]
    scalars = dict(board_scalars(record))
    assert (scalars["moe/layer_1/drop_rate"], scalars["moe/attention_1/drop_rate"]) == (0.0, 0.25)


def test_a_step_of_padding_alone_has_a_record() -> None:
    """No assignments: nothing was dropped, and no expert had more than another."""
    record = moe_record([layer_load(Site(0), [0, 0], [0, 0]), layer_load(Site(1), [4, 2], [3, 2])], row_bytes=10)
    assert [row["drop_rate"] for row in record["layers"]] == [0.0, 1 / 6]
    assert [row["load_max_over_mean"] for row in record["layers"]] == [1.0, 4 / 3]
    assert moe_record([layer_load(Site(0), [0, 0], [0, 0])], row_bytes=10)["drop_rate"] == 0.0


def test_moe_record_of_a_dense_model_is_empty() -> None:
    assert moe_record([], row_bytes=10) == {}


def test_moe_record_refuses_more_kept_than_sent() -> None:
    with pytest.raises(AssertionError):
        moe_record([layer_load(Site(0), [1, 1], [2, 1])], row_bytes=10)


def test_each_record_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new" / "run", tensorboard=False)
    for step in (1, 2):
        writer.log({"step": step, "note": "two\nlines"})
        assert [line["step"] for line in lines(tmp_path / "new" / "run")] == list(range(1, step + 1))
    writer.close()


def test_a_record_needs_a_step(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match="step"):
        writer.log({"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.log({"step": 1, "loss": math.nan, "lr": 0.1, "grad_norm": math.inf, "layers": [{"entropy": -math.inf}]})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {
        "step": 1,
        "loss": None,
        "lr": 0.1,
        "grad_norm": None,
        "layers": [{"entropy": None}],
        "nonfinite": ["loss", "grad_norm", "layers.0.entropy"],
    }


def test_rewind_drops_later_steps_and_logging_goes_on(tmp_path: Path) -> None:
    writer = written(tmp_path, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    writer.rewind(3)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == before[:3]
    writer.log({"step": 4, "loss": 9.0})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert lines(tmp_path)[-1]["loss"] == 9.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_to_zero_forgets_everything(tmp_path: Path) -> None:
    written(tmp_path, 3).rewind(0)
    assert lines(tmp_path) == []


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = written(tmp_path, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.rewind(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_anywhere_never_spoils_the_next(tmp_path: Path, cut: int) -> None:
    written(tmp_path, 2).close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 3}\n'[:cut])
    writer = MetricsWriter(tmp_path, tensorboard=False)
    assert [line["step"] for line in lines(tmp_path)] == ([1, 2, 3] if cut == 11 else [1, 2])  # 11: only \n is lost
    writer.log({"step": 4})
    writer.close()
    assert lines(tmp_path)[-1] == {"step": 4}
    assert path.read_bytes().endswith(b"\n")


def test_a_bad_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        MetricsWriter(tmp_path, tensorboard=False)
    assert path.read_text() == '{"step": 1}\n{"st\n{"step": 3}\n'


def test_board_tags() -> None:
    record = {"step": 7, "loss": 1.0, "mfu": 0.4, "validation_loss": 2.0, "note": "no number"}
    record |= moe_record([layer_load(Site(3), [3, 1], [2, 1])], row_bytes=10)
    assert dict(board_scalars(record)) == {
        "train/loss": 1.0,
        "system/mfu": 0.4,
        "validation/loss": 2.0,
        "moe/drop_rate": 0.25,
        "moe/unserved_rate": 0.0,
        "moe/load_max_over_mean": 1.5,
        "moe/balance_loss": 1.0,
        "moe/z_loss": 0.5,
        "moe/router_entropy": 1.0,
        "moe/dispatch_rows_bytes": 30,
        "moe/dispatch_bytes": 0,
        "moe/layer_3/drop_rate": 0.25,
        "moe/layer_3/load_max_over_mean": 1.5,
        "moe/layer_3/entropy": 1.0,
    }


def test_tensorboard_shows_the_run_once_after_a_rewind(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True, histogram_every=2)
    for step in (1, 2, 3, 4):
        writer.log({"step": step, "loss": float(step)} | moe_record([layer_load(Site(0), [5, 0, 3], [4, 0, 3])], 10))
    writer.rewind(2)
    writer.log({"step": 3, "loss": 30.0})
    writer.close()

    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})  # 0: all of them
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    [histogram] = board.Histograms("moe/layer_0/load")  # step 2; step 4 was rewound
    assert histogram.step == 2
    assert histogram.histogram_value.bucket == [5.0, 0.0, 3.0]
    assert histogram.histogram_value.bucket_limit == [1.0, 2.0, 3.0]
