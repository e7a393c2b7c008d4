"""The points of a study, and what it refuses."""

from pathlib import Path

import pytest

from moe_dist.study.design.grid import axis_names, load_study
from tests.unit.study.helpers import STUDY, toy_study, write_study


def test_points_have_readable_names_and_their_settings(tmp_path: Path) -> None:
    study = toy_study(tmp_path)
    assert [point.name for point in study.points] == [
        "capacity_factor=0.5-seed=0",
        "capacity_factor=0.5-seed=1",
        "capacity_factor=null-seed=0",
        "capacity_factor=null-seed=1",
    ]
    last = study.points[-1]
    assert (last.index, last.seed, last.axes) == (3, 1, {"model.moe.capacity_factor": None})
    assert last.config.model.moe.capacity_factor is None
    assert (last.config.train.seed, last.config.train.steps, last.config.train.seq_len) == (1, 8, 32)
    assert last.run == tmp_path / "root/toy/capacity_factor=null-seed=1/run"
    assert str(last.run) == f"{last.config.run.root}/{last.config.run.name}"


def test_axes_multiply(tmp_path: Path) -> None:
    axes = "axes: {model.moe.top_k: [1, 2], model.tie_embeddings: [true, false], model.activation: [gelu]}"
    study = toy_study(tmp_path, f"name: toy\nbase: base.yaml\n{axes}\n")
    assert [point.name for point in study.points] == [
        f"top_k={top_k}-tie_embeddings={tie}-activation=gelu-seed=0" for top_k in (1, 2) for tie in ("true", "false")
    ]


def test_an_axis_may_be_of_the_run(tmp_path: Path) -> None:
    study = toy_study(tmp_path, "name: toy\nbase: base.yaml\naxes: {run.eval_sequences: [16, 64]}\n")
    assert [point.config.run.eval_sequences for point in study.points] == [16, 64]


def test_names_of_axes_are_as_short_as_they_can_be() -> None:
    assert axis_names(["model.d_ff", "model.moe.d_ff", "optim.lr"]) == {
        "model.d_ff": "model.d_ff",
        "model.moe.d_ff": "moe.d_ff",
        "optim.lr": "lr",
    }


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("axes:", "axis:", "axis: unknown key; did you mean axes?"),
        ("name: toy", "", "name: missing"),
        ("seeds: [0, 1]", "seeds: [0, x]", "seeds.1: 'x' is not an integer"),
        ("seeds: [0, 1]", "seeds: []", "seeds is empty"),
        ("seeds: [0, 1]", "seeds: [1, 1]", "seeds has 1 2 times: its points would be the same; list every seed once"),
        ("seeds: [0, 1]", "ranks: 0", "ranks=0 is below 1"),
        ("name: toy", "name: ../toy", "name='../toy' is not a simple file name"),
        ("capacity_factor:", "capacty_factor:", "moe.capacty_factor: unknown key; did you mean capacity_factor?"),
        (
            "[0.5, null]",
            "[1, 1.0]",
            "capacity_factor=1.0-seed=0: is capacity_factor=1-seed=0 over again: values such as 1 and 1.0 are equal",
        ),
        ("[0.5, null]", "[0.5, none]", "capacity_factor: 'none' is not a number or a list; write null for none"),
        ("[0.5, null]", "[0.5, -1]", "capacity_factor=-1-seed=0: capacity_factor=-1.0 is not above 0"),
        ("train.steps: 8", "train.steps: 0", "study.yaml: steps=0 is below 1"),
        ("[0.5, null]", "[]", "axes.model.moe.capacity_factor is empty"),
        ("train.steps: 8", "train.seed: 8", "train.seed is set by the study itself; list seeds"),
        ("train.steps: 8", "train: 8", "train: is a section; name one of its keys, such as train.steps"),
        ("train.steps: 8", "train.steps.x: 8", "train.steps.x: steps is a value, not a section"),
        ("train.steps: 8", "model.moe.capacity_factor: 1", "both in axes and in overrides"),
        ("base.yaml", "other.yaml", "other.yaml: no such file"),
    ],
)
def test_mistakes_are_named_once(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    with pytest.raises(ValueError) as error:
        load_study(write_study(tmp_path, STUDY.replace(old, new)))
    assert str(error.value).count(message) == 1, error.value


def test_a_point_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="point 4 is not one of 0 to 3"):
        toy_study(tmp_path).point(4)


def test_a_tilde_is_the_home_folder_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_study(tmp_path, STUDY.replace("base: base.yaml", "base: ~/base.yaml"))
    path.write_text(path.read_text().replace(f"root: {tmp_path}/root", "root: ~/studies"))
    study = load_study("~/study.yaml")
    assert study.folder == tmp_path / "studies/toy"
    assert study.points[0].run.is_relative_to(tmp_path / "studies/toy")


def test_seeds_apart_are_every_pair(tmp_path: Path) -> None:
    text = STUDY.replace("seeds: [0, 1]", "seeds: {weights: [3, 4], data: [5, 6]}")
    points = toy_study(tmp_path, text).points[:4]
    assert [(point.seed, point.seeds) for point in points] == [
        (0, {"weights": 3, "data": 5}),
        (1, {"weights": 3, "data": 6}),
        (2, {"weights": 4, "data": 5}),
        (3, {"weights": 4, "data": 6}),
    ]
    assert [(point.config.train.seed, point.config.train.data_seed) for point in points] == [
        (3, 5),
        (3, 6),
        (4, 5),
        (4, 6),
    ]
    assert points[1].name == "capacity_factor=0.5-weights=3-data=6"


def test_seeds_together_leave_the_data_to_the_seed(tmp_path: Path) -> None:
    (point, *_) = toy_study(tmp_path, STUDY.replace("[0, 1]", "[7]")).points
    assert (point.seed, point.seeds, point.config.train.data_seed) == (7, {"weights": 7, "data": 7}, None)


def test_one_checkpoint_is_evaluated_with_and_without_drops(tmp_path: Path) -> None:
    def factors(overrides: str) -> list[object]:
        text = STUDY.replace("{train.steps: 8}", f"{{train.steps: 8, {overrides}}}") + "evaluations: 4\n"
        points = toy_study(tmp_path, text).points[::2]
        assert [point.config.run.evaluations for point in points] == [4, 4]
        return [
            (point.config.model.moe.eval_capacity_factor, point.config.model.attention.moe.eval_capacity_factor)
            for point in points
        ]

    assert factors("optim.lr: 0.1") == [(0.5, None), (None, None)]
    assert factors("model.moe.eval_capacity_factor: 3.0") == [(3.0, None), (3.0, None)]  # as asked for
    switch = "model.attention: {kind: switch, moe: {num_experts: 2, top_k: 1, capacity_factor: 1.5}}"
    assert factors(switch) == [(0.5, 1.5), (None, 1.5)]
