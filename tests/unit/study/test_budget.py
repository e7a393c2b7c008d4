"""Equal budgets, against products done by hand and experts counted one by one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import Config
from moe_dist.study.design.budget import Budget, make_budget
from moe_dist.study.design.grid import load_study
from moe_dist.study.design.planned import (
    buffer_rows,
    forward_flops,
    planned_crossing_bytes,
    planned_flops,
    planned_rows_bytes,
    planned_tokens,
)
from moe_dist.study.design.probe import Probe, Probed, digest, extremes, machine, step_flops, write_probe
from tests.dist.helpers import tiny_config
from tests.unit.study.test_study_file import study, write

# tiny_config: D=32, 2 layers of 4 experts of width 48 with three matrices, top-2; 16 tokens x 8 sequences a step.
EXPERT, TOKENS = 3 * 32 * 48, 16 * 8


def by_hand(config: Config, kept: list[list[float]]) -> float:
    """FLOPs of the whole run. kept: for each step, expert rows of a token in each layer."""
    model = config.model
    heads = 2 * 32 * model.head_width * (model.num_heads + model.num_kv_heads)
    outside = 2 * (heads + model.moe.num_experts * 32) + model.vocab_size * 32
    keys = 2 * 4 * model.num_heads * model.head_width * (16 + 1) / 2
    return sum(TOKENS * 3 * (2 * (outside + sum(rows) * EXPERT) + keys) for rows in kept)


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        (dict(capacity_factor=None), [2.0, 2.0]),
        (dict(capacity_factor=1.25), [2.0, 2.0]),
        (dict(capacity_factor=0.5), [1.0, 1.0]),
        (dict(capacity_factor=0.5, min_capacity=48), [1.5, 1.5]),  # 4 * 48 places for 2 * 128 assignments
        (dict(capacity_factor=0.51), [4 * 33 / 128] * 2),  # C = ceil(0.51 * 64) = 33
        (dict(capacity_factor=[0.25, None]), [0.5, 2.0]),
        (dict(capacity_factor=0.5, router="expert_choice"), [1.0, 1.0]),
        (dict(capacity_factor=0.5, overflow="reroute"), [1.0, 1.0]),
        (dict(capacity_factor=0.5, capacity_pool=4), [1.0, 1.0]),
    ],
)
def test_planned_flops_leave_out_what_no_capacity_holds(changes: dict[str, Any], rows: list[float]) -> None:
    moe = {f"model__moe__{name}": value for name, value in changes.items()}
    config = tiny_config(train__steps=10, **moe)
    assert planned_flops(config, 1) == pytest.approx(by_hand(config, [rows] * 10), rel=1e-12)
    assert planned_rows_bytes(config, 1) == pytest.approx(10 * TOKENS * sum(rows) * 32 * 4, rel=1e-12)
    assert planned_tokens(config) == 10 * TOKENS


def test_a_schedule_counts_step_by_step() -> None:
    schedule = {3: 0.5, 7: None, 20: 0.25}
    config = tiny_config(train__steps=10, model__moe__capacity_factor=0.75, model__moe__capacity_schedule=schedule)
    rows = [[1.5, 1.5]] * 3 + [[1.0, 1.0]] * 4 + [[2.0, 2.0]] * 3
    assert planned_flops(config, 1) == pytest.approx(by_hand(config, rows), rel=1e-12)


def test_ranks_that_cap_their_own_tokens_round_on_their_own() -> None:
    """Two ranks with 64 tokens each: C = ceil(0.51 * 2 * 64 / 4) = 17 rows, of which each has 4."""
    config = tiny_config(train__steps=1, model__moe__capacity_factor=0.51, model__moe__capacity_scope="local")
    assert planned_rows_bytes(config, 2) == pytest.approx(2 * 2 * 4 * 17 * 32 * 4, rel=1e-12)


@pytest.mark.parametrize(("wire", "times"), [("same", 2 * 4), ("bf16", 2 * 2), ("fp8", 1 + 2)])
def test_bytes_that_cross(wire: str, times: int) -> None:
    """Of every row that goes to one of four ranks, three quarters leave their own."""
    changes = dict(model__moe__wire_dtype=wire) if wire != "same" else {}
    config = tiny_config(train__steps=1, parallel__ep=4, model__moe__capacity_factor=None, **changes)
    assert planned_crossing_bytes(config, 4) == pytest.approx(2 * 2 * TOKENS * 32 * times * 3 / 4)
    assert planned_crossing_bytes(tiny_config(), 1) == 0


def test_buffers() -> None:
    def places(factor: float | None) -> float:
        return buffer_rows(tiny_config(model__moe__capacity_factor=factor), 1)

    assert places(None) == float("inf") and places(2.0) == 2 and places(0.5) == 0.5


@pytest.mark.parametrize("equal", ["tokens", "flops"])
def test_steps_are_the_nearest_to_the_budget(equal: Any) -> None:
    base = tiny_config(train__steps=200, optim__warmup_steps=20, model__moe__capacity_factor=None)
    budget = make_budget(equal, base, 1)
    spends = {"tokens": planned_tokens, "flops": lambda config: planned_flops(config, 1)}[equal]
    for point in points_of(base):
        fitted = budget.fit(point)
        missed = {n: abs(spends(with_steps(point, n)) - spends(base)) for n in range(1, 700)}
        assert fitted.train.steps == min(missed, key=lambda n: missed[n])
        assert budget.residual(fitted) == pytest.approx(spends(fitted) / spends(base) - 1)
        assert fitted.optim.warmup_steps == round(20 * fitted.train.steps / point.train.steps)
        assert budget.fit(point, scale_warmup=False).optim.warmup_steps == 20
        assert replace(fitted, train=point.train, optim=point.optim) == point  # nothing else changes


def points_of(base: Config) -> Iterator[Config]:
    yield base
    yield replace(base, train=replace(base.train, global_batch=24, steps=5))
    yield replace(base, train=replace(base.train, seq_len=12))
    yield replace(base, model=replace(base.model, moe=replace(base.model.moe, top_k=1)))
    yield replace(base, model=replace(base.model, moe=replace(base.model.moe, capacity_factor=0.25)))
    halves = replace(base.model.moe, capacity_schedule={50: 0.5})
    yield replace(base, model=replace(base.model, moe=halves))


def with_steps(config: Config, steps: int) -> Config:
    return replace(config, train=replace(config.train, steps=steps))


def test_a_budget_that_steps_cannot_meet_is_refused() -> None:
    budget = make_budget("tokens", tiny_config(train__steps=7), 1)
    with pytest.raises(ValueError, match=r"equal=tokens asks for 896, but steps=4 miss that by \+14.3%, more than 2%"):
        budget.fit(tiny_config(train__global_batch=16))


def test_a_run_without_warm_up_gets_none_and_a_short_one_keeps_one() -> None:
    budget = Budget("tokens", 10 * TOKENS, planned_tokens)
    assert budget.fit(tiny_config(optim__warmup_steps=0)).optim.warmup_steps == 0
    assert budget.fit(tiny_config(train__steps=1000, optim__warmup_steps=3)).optim.warmup_steps == 1


def test_equal_tokens_in_a_study(tmp_path: Path) -> None:
    axes = {"train.global_batch": [16, 32, 64], "train.seq_len": [32, 64]}
    loaded = study(tmp_path, axes=axes, equal="tokens", overrides={"train.steps": 128}, seeds=[0], evaluations=4)
    for point in loaded.points:
        train = point.config.train
        assert train.steps * train.global_batch * train.seq_len == 128 * 16 * 32
        assert point.config.optim.warmup_steps == max(1, round(2 * train.steps / 128))
    assert loaded.residuals == dict.fromkeys((point.name for point in loaded.points), 0.0)


def test_an_axis_keeps_its_warm_up(tmp_path: Path) -> None:
    axes = {"train.global_batch": [16, 32], "optim.warmup_steps": [3, 5]}
    loaded = study(tmp_path, axes=axes, equal="tokens", overrides={"train.steps": 100}, seeds=[0])
    found = [(point.config.train.steps, point.config.optim.warmup_steps) for point in loaded.points]
    assert found == [(100, 3), (100, 5), (50, 3), (50, 5)]


def test_points_that_miss_the_budget_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"global_batch=32-seed=0: equal=tokens asks for 5632, but steps=\d+ miss"):
        study(tmp_path, axes={"train.global_batch": [16, 32]}, equal="tokens", overrides={"train.steps": 11})


def test_a_base_that_is_refused_is_no_measure(tmp_path: Path) -> None:
    overrides = {"model.moe.top_k": 9}
    with pytest.raises(
        ValueError, match="equal=flops asks what base with overrides spends, but that is refused: top_k=9"
    ):
        study(tmp_path, axes={"model.moe.num_experts": [8, 16]}, equal="flops", overrides=overrides)


def probe_of(folder: Path, configs: list[Config], seconds: list[float]) -> Probe:
    points = [
        Probed(
            digest=digest(config),
            flops=step_flops(config, 1),
            step_seconds=each,
            evaluation_flops=1e6 * (1 + number),
            evaluation_seconds=0.5,
            start_seconds=3.0,
            bytes_per_step=100.0,
        )
        for number, (config, each) in enumerate(zip(configs, seconds, strict=True))
    ]
    probe = Probe(machine=machine(), measured="2026-01-01T00:00:00+00:00", ranks=1, points=points)
    write_probe(folder, probe)
    return probe


def test_equal_time_needs_a_probe_of_this_study(tmp_path: Path) -> None:
    axes = {"model.moe.num_experts": [8], "model.moe.top_k": [1, 2, 4]}
    keys = dict(axes=axes, equal="time", overrides={"train.steps": 400, "model.moe.capacity_factor": None}, seeds=[0])
    path = write(tmp_path, **keys)
    with pytest.raises(ValueError, match=f"equal=time needs step times .*: moe-dist study plan {path}"):
        load_study(path)
    draft = load_study(path, planning=True)
    assert [point.config.train.steps for point in draft.points] == [400] * 3 and draft.residuals == {}
    small, large = extremes([point.config for point in draft.points], 1)
    assert (small.model.moe.top_k, large.model.moe.top_k) == (1, 4)
    probe = probe_of(draft.folder, [small, large], [0.010, 0.030])
    # FLOPs grow by as much from top-1 to top-2 as half of that from 2 to 4: 10, 10 + 20 / 3 and 30 ms.
    per_step = [0.010, 0.010 + 0.020 / 3, 0.030]
    assert [probe.step_seconds(point.config) for point in draft.points] == pytest.approx(per_step)
    budget = 400 * per_step[1]  # the base has top-2
    found = load_study(path)
    assert [point.config.train.steps for point in found.points] == [round(budget / each) for each in per_step]
    assert max(map(abs, found.residuals.values())) < 0.02
    write_probe(draft.folder, replace(probe, machine="another"))  # as a job of Slurm sees it
    assert load_study(path) == found
    write_probe(draft.folder, replace(probe, points=probe.points[:1]))
    with pytest.raises(ValueError, match="equal=time needs step times"):
        load_study(path)
    (draft.folder / "probe.json").write_text("{}")
    with pytest.raises(ValueError, match=r"probe.json is no probe \(.*missing.*\); remove it and plan again"):
        load_study(path)


def test_adding_points_between_keeps_a_probe(tmp_path: Path) -> None:
    keys = dict(equal="time", overrides={"train.steps": 400, "model.moe.capacity_factor": None}, seeds=[0])
    draft = load_study(write(tmp_path, axes={"model.moe.top_k": [1, 4]}, **keys), planning=True)
    probe_of(draft.folder, extremes([point.config for point in draft.points], 1), [0.010, 0.030])
    before = {point.name: point.config for point in load_study(draft.path).points}
    after = {point.name: point.config for point in study(tmp_path, axes={"model.moe.top_k": [1, 2, 4]}, **keys).points}
    assert before.items() < after.items()


def test_a_probe_never_says_that_more_work_is_quicker(tmp_path: Path) -> None:
    small, large = tiny_config(model__moe__top_k=1), tiny_config(model__moe__top_k=2)
    level = probe_of(tmp_path, [small, large], [0.030, 0.010])
    assert level.step_seconds(small) == level.step_seconds(large) == pytest.approx(0.020)
    same = [tiny_config(model__moe__capacity_factor=factor) for factor in (2.0, None, 1.5)]
    ends = extremes(same, 1)
    assert [each.model.moe.capacity_factor for each in ends] == [1.5, None]  # by the places of experts
    assert len(extremes(same[:1] * 3, 1)) == 1 and extremes([], 1) == []


def test_forward_is_a_third() -> None:
    config = tiny_config(train__steps=1, model__moe__capacity_factor=0.5)  # which evaluation does not look at
    dropless = tiny_config(train__steps=1, model__moe__capacity_factor=None)
    assert forward_flops(config) == pytest.approx(by_hand(dropless, [[2.0, 2.0]]) / TOKENS / 3)
