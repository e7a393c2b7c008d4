"""The record of a run: exactly one line a step, whatever happens."""

import io
import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from moe_dist.disk import lines_backwards
from moe_dist.moe.losses import MoEStats
from moe_dist.step import Site
from moe_dist.train.record.board import board_scalars
from moe_dist.train.record.history import last_logged_step, recent_losses
from moe_dist.train.record.metrics import MetricsWriter, moe_record

LOST = (
    "dropped_by_expert",
    "dropped_by_place",
    "over_budget_by_pool",
    "dropped_by_micro_step_place",
    "dropped_by_frequency",
)


def layer_load(site: Site, load_E: list[int], kept_E: list[int], sent_bytes: int = 0, **changes: float) -> MoEStats:
    numbers = {"aux_loss": 0.0, "entropy": 1.0, "balance_loss": 1.0, "z_loss": 0.5, "unserved": 0.0} | changes
    loads = {"load_E": torch.tensor(load_E), "kept_E": torch.tensor(kept_E)}
    lost = loads["load_E"] - loads["kept_E"]
    places = torch.tensor([0] * 15 + [int(lost.sum())])
    loads |= {"dropped_E": lost, "dropped_S": places, "over_P": lost.sum()[None]}  # one pool
    rare = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0])
    loads |= {"dropped_M": places, "dropped_F": rare * lost.sum(), "load_F": rare * loads["load_E"].sum()}
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
        "over_budget_rows": 2,
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
            "dropped_by_expert": [2, 0],
            "dropped_by_place": [0] * 15 + [2],
            "dropped_by_micro_step_place": [0] * 15 + [2],
            "dropped_by_frequency": [2] + [0] * 7,
            "load_by_frequency": [8] + [0] * 7,
            "over_budget_by_pool": [2],
        },
        {
            "layer": 3,
            "kind": "feed_forward",
            "drop_rate": 0.0,
            "unserved_rate": 0.0,
            "load_max_over_mean": 1.0,
            "entropy": 0.75,
            "load": [4, 4],
            "dropped_by_expert": [0, 0],
            "dropped_by_place": [0] * 16,
            "dropped_by_micro_step_place": [0] * 16,
            "dropped_by_frequency": [0] * 8,
            "load_by_frequency": [8] + [0] * 7,
            "over_budget_by_pool": [0],
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


def test_a_kill_while_rewinding_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = written(tmp_path, 3)

    def killed(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        writer.rewind(1)
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_the_end_of_a_long_record_is_all_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of 10 MB before those that are asked for are never touched; all questions of a start are answered."""
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 9):
            padding = "x" * 10_000_000 if step < 5 else ""
            file.write(json.dumps({"step": step, "loss": step / 2, "note": padding}) + "\n")
    read, true_open = [], io.open

    def counting(*args: Any, **how: Any) -> Any:
        file = true_open(*args, **how)
        true_read = file.read
        proxy = mock.MagicMock(wraps=file)
        proxy.__enter__.return_value = proxy
        proxy.read = lambda size=-1: (read.append(size), true_read(size))[1]
        return proxy

    monkeypatch.setattr(io, "open", counting)
    assert last_logged_step(tmp_path) == 8
    assert recent_losses(tmp_path, 3) == [3.0, 3.5, 4.0]
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.rewind(6)
    monkeypatch.undo()
    assert recent_losses(tmp_path, 2) == [2.5, 3.0]
    assert read and min(read) > 0 and sum(read) < 2_000_000
    writer.close()
    assert path.stat().st_size > 40_000_000 and path.read_bytes().endswith(b'{"step": 6, "loss": 3.0, "note": ""}\n')


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a\n", b"a\nbc", b"\n\na\n", b"one\n\ntwo\nthree\n"])
def test_lines_backwards_are_the_lines(tmp_path: Path, text: bytes, block: int) -> None:
    (tmp_path / "file").write_bytes(text)
    found = list(lines_backwards(tmp_path / "file", block))
    assert [line for _, line in found][::-1] == (text.removesuffix(b"\n").split(b"\n") if text else [])
    assert all(text[start : start + len(line)] == line for start, line in found)


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
    """Where it is come by."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with pytest.raises(ValueError, match=r"byte 12: not a JSON record: .*st"):
        writer.rewind(2)
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
        "moe/over_budget_rows": 1,
        "moe/load_max_over_mean": 1.5,
        "moe/balance_loss": 1.0,
        "moe/z_loss": 0.5,
        "moe/router_entropy": 1.0,
        "moe/dispatch_rows_bytes": 30,
        "moe/dispatch_bytes": 0,
        "moe/layer_3/drop_rate": 0.25,
        "moe/layer_3/load_max_over_mean": 1.5,
        "moe/layer_3/entropy": 1.0,
        "moe/layer_3/over_budget_rows": 1,
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
    bars = {name: board.Histograms(f"moe/layer_0/{name}")[0].histogram_value.bucket for name in LOST}
    later = {LOST[3]: [0.0] * 15 + [1.0], LOST[4]: [1.0] + [0.0] * 7}
    assert bars == {LOST[0]: [1.0, 0.0, 0.0], LOST[1]: [0.0] * 15 + [1.0], LOST[2]: [1.0], **later}


def test_a_board_that_cannot_be_written_is_told_once_and_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()  # a file where its folder should be
    said: list[str] = []
    writer = MetricsWriter(tmp_path, tensorboard=True, say=said.append)
    for step in (1, 2):
        writer.log({"step": step, "loss": 1.0})
        writer.sync()
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert len(said) == 1 and said[0].startswith(f"warning: {tmp_path}/tensorboard is no longer written ("), said


def test_a_board_that_fails_on_the_way_is_told_once_and_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said: list[str] = []
    writer = MetricsWriter(tmp_path, tensorboard=True, say=said.append)
    with mock.patch("torch.utils.tensorboard.SummaryWriter.add_scalar", side_effect=OSError("No space left")) as add:
        for step in (1, 2):
            writer.log({"step": step, "loss": 1.0})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2] and add.call_count == 1
    assert len(said) == 1 and "No space left" in said[0], said
