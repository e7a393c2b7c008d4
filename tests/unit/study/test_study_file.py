"""A study's file: every rule has a broken file, and sections, labels and questions mean what they say."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_dist.study.design.grid import Study, load_study
from moe_dist.study.design.names import means, value_label

AXES = {"model.moe.capacity_factor": [0.5, 1.0, None], "model.moe.num_experts": [4, 8]}
QUESTION = {"baseline": {"model.moe.capacity_factor": None}}
SIZES = {"small": {"model.d_model": 64, "optim.lr": 1e-3}, "large": {"model.d_model": 128, "optim.lr": 8e-4}}
ATTENTION = [{"kind": "multi_query"}, {"kind": "switch", "moe": {"num_experts": 2, "top_k": 1}}]


def write(folder: Path, **keys: Any) -> Path:
    (folder / "base.yaml").write_text("train: {seq_len: 32, steps: 8}\noptim: {warmup_steps: 2}\n")
    values = {"name": "toy", "base": "base.yaml", "root": str(folder / "root"), "axes": AXES, "seeds": [0, 1]} | keys
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def study(folder: Path, **keys: Any) -> Study:
    return load_study(write(folder, **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(at_once=0), "at_once=0 is below 1; set at_once to 1 or more"),
        (dict(retries=-1), "retries=-1 is below 0"),
        (dict(evaluations=0), "evaluations=0 is below 1"),
        (dict(evaluations=9), "evaluations=9 is above train.steps=8; lower evaluations"),
        (dict(executor="cloud"), "executor: 'cloud' is not one of 'local', 'slurm'"),
        (dict(equal="money"), "equal: 'money' is not one of 'tokens', 'flops', 'time'"),
        (
            dict(slurm={"--time": "1:00"}),
            "slurm.--time is not the long name of an option of sbatch; write time, not -t",
        ),
        (dict(law={"floor": -1.0, "exponent": 0.1}), "law.floor=-1 is below 0"),
        (dict(law={"floor": 1.6, "exponent": 0.0}), "law.exponent=0 is not above 0"),
        (dict(slurm={"array": "0-3"}), "slurm.array is set by moe-dist study submit itself"),
        (dict(slurm={"exclusive": None}), "slurm.exclusive=null says nothing; leave it out"),
        (dict(seeds={"weights": [0]}), "seeds has weights; give a list, or {weights: [0, 1], data: [0, 1]}"),
        (dict(seeds={"weights": [], "data": [0]}), "seeds.weights is empty"),
        (dict(seeds={"weights": [0], "data": [1, 1]}), "seeds.data has 1 2 times"),
        (dict(seeds={"weights": [0], "data": [-1]}), "data_seed=-1 is outside 0"),
        (dict(axes={"train.data_seed": [1, 2]}), "train.data_seed is set by the study itself"),
        (dict(axes={"train": [{"seed": 1}, {"seed": 2}]}), "train.seed is set by the study itself; list seeds"),
        (dict(axes={}), "axes is empty"),
        (dict(axes={"optim.lr": [0.1, 0.1]}), "axes.optim.lr has 0.1 2 times; list every value once"),
        (dict(axes={"data.label_key": ["a/b", "a_b"]}), "2 points would be called label_key=a_b-seed=0"),
        (dict(axes=AXES | {"run.log_every": [1] * 3}), "run.log_every has 1 3 times"),
        (dict(vary_together={"a.b": SIZES}), "vary_together.a.b: 'a.b' cannot name an axis"),
        (dict(vary_together={"seed": SIZES}), "'seed' cannot name an axis"),
        (dict(vary_together={"size": {}}), "vary_together.size is empty"),
        (dict(vary_together={"size": {"a/b": {"optim.lr": 1}}}), "vary_together.size.a/b is not a simple file name"),
        (
            dict(vary_together={"size": SIZES | {"huge": {"model.d_model": 256}}}),
            "vary_together.size.huge and vary_together.size.small set other keys: optim.lr; set it in every one",
        ),
        (
            dict(vary_together={"size": {"a": {"model.moe.num_experts": 4}, "b": {"model.moe.num_experts": 8}}}),
            "model.moe.num_experts is both in axes and in vary_together.size; keep one",
        ),
        (
            dict(vary_together={"size": SIZES}, overrides={"optim.lr": 0.1}),
            "optim.lr is both in vary_together.size and in overrides; keep one",
        ),
        (
            dict(axes={"model.attention": ATTENTION}, overrides={"model.attention.kind": "switch"}),
            "model.attention.kind is both in axes.model.attention and in overrides",
        ),
        (
            dict(axes={"model.attention": ATTENTION, "model.attention.window": [4, 8]}),
            "axes.model.attention.window sets model.attention.window, which is inside the section axes.model.attention",
        ),
        (
            dict(axes={"model.attention": ATTENTION}, vary_together={"w": {"a": {"model.attention.window": 4}}}),
            "vary_together.w sets model.attention.window, which is inside the section axes.model.attention",
        ),
        (
            dict(axes={"train.steps": [4, 8]}, equal="tokens"),
            "equal=tokens sets train.steps, but so does axes.train.steps",
        ),
        (
            dict(vary_together={"size": {"a": {"train.steps": 4}, "b": {"train.steps": 5}}}, equal="flops"),
            "equal=flops sets train.steps, but so does vary_together.size",
        ),
        (dict(axes={"model.attention": ["switch"]}), "model.attention: is a section; name one of its keys"),
        (dict(axes={"model.attention": [{"knd": "switch"}]}), "model.attention.knd: unknown key; did you mean kind?"),
        (dict(exclude=[{}]), "exclude.0 is empty"),
        (dict(exclude=[{"model.moe.top_k": 1}]), "exclude.0.model.moe.top_k is not an axis"),
        (
            dict(exclude=[{"num_experts": 4}]),
            "exclude.0.num_experts is not an axis; did you mean model.moe.num_experts?",
        ),
        (
            dict(exclude=[{"model.moe.num_experts": 5}]),
            "exclude.0.model.moe.num_experts=5 is not on its axis; take one of",
        ),
        (dict(exclude=[{"model.moe.num_experts": [4, 8]}]), "exclude.0 matches every point"),
        (
            dict(exclude=[{"model.moe.num_experts": 4}, {"model.moe.num_experts": 8}]),
            "exclude leaves no point; remove a rule",
        ),
        (dict(question={}), "question.baseline: missing"),
        (dict(question=QUESTION | {"metrc": "loss"}), "question.metrc: unknown key; did you mean metric?"),
        (dict(question={"baseline": {}}), "question.baseline is empty"),
        (dict(question={"baseline": {"model.moe.top_k": 1}}), "question.baseline.model.moe.top_k is not an axis"),
        (
            dict(question={"baseline": {"model.moe.capacity_factor": 2.0}}),
            "question.baseline.model.moe.capacity_factor=2.0 is not on its axis; take one of 0.5, 1.0, null",
        ),
        (
            dict(question={"baseline": {"model.moe.capacity_factor": [0.5, 1.0]}}),
            "question.baseline.model.moe.capacity_factor is a list; name one value",
        ),
        (
            dict(question=QUESTION | {"compare": {"model.moe.capacity_factor": [3]}}),
            "question.compare.model.moe.capacity_factor=3 is not on its axis",
        ),
        (
            dict(question=QUESTION | {"compare": {"model.moe.capacity_factor": []}}),
            "question.compare.model.moe.capacity_factor is empty",
        ),
        (dict(question=QUESTION | {"compare": {"model.moe.capacity_factor": [None]}}), "question compares nothing"),
        (
            dict(question=QUESTION, exclude=[{"model.moe.capacity_factor": None}]),
            "question compares nothing: no point that is left",
        ),
        (dict(question=QUESTION | {"metric": "val_loss"}), "question.metric=val_loss is no number"),
        (
            dict(question=QUESTION | {"metric": "validation_accuracy"}),
            "question.metric=validation_accuracy is only known of task: classification, which no point has",
        ),
        (dict(question=QUESTION | {"metric": "test_loss_capped"}), "question.metric=test_loss_capped is only known of"),
        (dict(question=QUESTION | {"smallest_difference": -0.1}), "question.smallest_difference=-0.1 is not above 0"),
        (dict(question=QUESTION | {"spread": 0}), "question.spread=0.0 is not above 0"),
        (
            dict(question=QUESTION | {"decide_by": "price"}),
            "question.decide_by: 'price' is not one of 'time', 'flops', 'bytes', 'memory'",
        ),
    ],
)
def test_every_rule(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        study(tmp_path, **keys)
    assert str(error.value).count(message) == 1, error.value
    assert all(len(line) < 300 and line.startswith(str(tmp_path)) for line in str(error.value).splitlines())


def test_every_broken_rule_of_exclude_is_named(tmp_path: Path) -> None:
    rules = [{"model.moe.top_k": 1}, {}, {"model.moe.num_experts": 5}, {"model.moe.num_experts": [4, 8]}]
    with pytest.raises(ValueError) as error:
        study(tmp_path, exclude=rules)
    said = str(error.value).splitlines()
    assert len(said) == len(rules), said
    for number, line in enumerate(said):
        assert f": exclude.{number}" in line


def test_sections_are_merged_and_labelled(tmp_path: Path) -> None:
    values = [ATTENTION[1], {}]
    loaded = study(tmp_path, axes={"model.attention": values}, overrides={"model.attention.backend": "torch"})
    labels = ["kind=switch+moe.num_experts=2+moe.top_k=1", "as_base"]
    assert loaded.file.all_axes == {"model.attention": labels}
    assert [point.axes["model.attention"] for point in loaded.points[::2]] == labels
    assert [point.name for point in loaded.points[::2]] == [f"attention={each}-seed=0" for each in labels]
    first, second = (loaded.points[at].config.model.attention for at in (0, 2))
    assert (first.kind, first.moe.num_experts, first.moe.top_k, second.kind) == ("switch", 2, 1, "multi_query")
    assert first.backend == second.backend == "torch"


def test_sections_that_come_to_the_same_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attention=as_base-seed=0: is attention=kind=multi_query-seed=0 over again"):
        study(tmp_path, axes={"model.attention": [{"kind": "multi_query"}, {}]})


def test_a_schedule_of_capacities_is_one_value(tmp_path: Path) -> None:
    key = "model.moe.capacity_schedule"
    loaded = study(tmp_path, axes={key: [{0: 2.0, 4: 0.5}, {0: 1.0, 4: None}]}, seeds=[0])
    first, second = (point.config.model.moe for point in loaded.points)
    assert first.capacity_schedule == {0: 2.0, 4: 0.5} and loaded.points[0].axes[key] == "0=2.0+4=0.5"
    assert (first.eval_capacity_factor, second.eval_capacity_factor) == (0.5, None)  # in force at the end
    assert second.capacity_factor == 1.25 and second.capacity_schedule == {0: 1.0, 4: None}


def test_a_list_is_a_value(tmp_path: Path) -> None:
    axes = {"model.moe.capacity_factor": [[1.0, None], [2.0, 1.0], [None, None]]}
    loaded = study(tmp_path, axes=axes, overrides={"model.num_layers": 2}, seeds=[0])
    assert [point.axes["model.moe.capacity_factor"] for point in loaded.points] == ["1.0+null", "2.0+1.0", "null+null"]
    factors = [point.config.model.moe.eval_capacity_factor for point in loaded.points]
    assert factors == [[1.0, None], [2.0, 1.0], None]


def test_labels_are_short_stable_and_safe() -> None:
    long = {"kind": "routed", "routed": {"num_routed_queries": 16, "num_routed_key_values": 48, "window": "a/b c"}}
    assert str(value_label(long)).startswith("kind=routed+routed.num_routed_queries=16")
    assert len(str(value_label(long))) == 48 and "/" not in str(value_label(long)) and " " not in str(value_label(long))
    assert value_label(long) != value_label(long | {"routed": long["routed"] | {"window": "a/b d"}})  # type: ignore[operator]
    assert value_label(None) is None and value_label(0.5) == 0.5


def test_what_names_a_value() -> None:
    assert means(1, 1.0) and not means(True, 1) and not means("1", 1)
    assert (
        means({"window": 4}, {"window": 4})
        and means("window=4", {"window": 4})
        and not means("window=5", {"window": 4})
    )


def test_axes_that_move_as_one(tmp_path: Path) -> None:
    loaded = study(tmp_path, vary_together={"size": SIZES}, exclude=[{"size": "large", "model.moe.num_experts": 4}])
    assert len(loaded.points) == 3 * (2 * 2 - 1) * 2 and loaded.left_out == 3 * 2
    assert [point.index for point in loaded.points] == list(range(18))
    for point in loaded.points:
        expected = SIZES[str(point.axes["size"])]
        assert point.config.model.d_model == expected["model.d_model"]
        assert point.config.optim.lr == expected["optim.lr"]
        assert (point.axes["size"], point.axes["model.moe.num_experts"]) != ("large", 4)
    assert loaded.points[0].name == "capacity_factor=0.5-num_experts=4-size=small-seed=0"


def test_rules_may_name_sections_labels_and_several_values(tmp_path: Path) -> None:
    axes = {"model.attention": ATTENTION, "model.moe.num_experts": [2, 4, 8]}

    def left(*rules: dict[str, Any]) -> list[tuple[Any, Any]]:
        points = study(tmp_path, axes=axes, exclude=list(rules), seeds=[0]).points
        return [(str(point.axes["model.attention"])[5:8], point.axes["model.moe.num_experts"]) for point in points]

    by_mapping = left({"model.attention": ATTENTION[1], "model.moe.num_experts": [2, 8]})
    by_label = left({"model.attention": value_label(ATTENTION[1]), "model.moe.num_experts": [2, 8]})
    assert by_mapping == by_label == [("mul", 2), ("mul", 4), ("mul", 8), ("swi", 4)]


def test_a_question_has_labels_once_read(tmp_path: Path) -> None:
    question = {"baseline": {"model.attention": ATTENTION[0], "size": "small"}, "compare": {"size": ["large"]}}
    loaded = study(tmp_path, axes={"model.attention": ATTENTION}, vary_together={"size": SIZES}, question=question)
    asked = loaded.file.question
    assert asked is not None and asked.baseline == {"model.attention": "kind=multi_query", "size": "small"}
    assert asked.compare == {"size": ["large"]} and asked.metric == "validation_loss" and asked.decide_by == "time"


def test_points_that_are_refused_are_listed_for_a_plan(tmp_path: Path) -> None:
    axes = {"model.moe.top_k": [1, 6], "model.moe.num_experts": [4, 8]}
    path = write(tmp_path, axes=axes)
    with pytest.raises(ValueError) as error:
        load_study(path)
    reason = "top_k=6 is larger than num_experts=4; lower model.moe.top_k"
    assert str(error.value).splitlines() == [
        f"{path}: top_k=6-num_experts=4-seed=0: {reason}",
        f"{path}: 2 of 8 points are refused (moe-dist study plan lists them); "
        "mend them, or leave them out with exclude",
    ]
    planned = load_study(path, planning=True)
    assert [(each.name, each.reasons) for each in planned.invalid] == [
        (f"top_k=6-num_experts=4-seed={seed}", (reason,)) for seed in (0, 1)
    ]
    assert [point.index for point in planned.points] == list(range(6))
    assert len(study(tmp_path, axes=axes, exclude=[{"model.moe.top_k": 6, "model.moe.num_experts": 4}]).points) == 6
