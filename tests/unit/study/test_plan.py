"""What a plan says, beside sums done by hand; one real probe."""

import json
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moe_dist.cli import main
from moe_dist.study.design.family import comparisons
from moe_dist.study.design.grid import load_study
from moe_dist.study.design.probe import extremes, write_probe
from moe_dist.study.ledger.cells import cells
from moe_dist.study.ledger.ledger import Ledger
from moe_dist.study.plan.plan import Plan, make_plan
from moe_dist.study.plan.text import few_seeds, print_plan, quantity
from moe_dist.study.statistics.power import minimum_detectable, power
from moe_dist.study.statistics.samples import FEWEST_SEEDS
from tests.unit.study.test_budget import probe_of
from tests.unit.study.test_study_file import SIZES, write

CAPACITY, EXPERTS = "model.moe.capacity_factor", "model.moe.num_experts"
SMALL = {"model.d_model": 32, "model.num_heads": 2, "model.num_layers": 1, "train.threads": 1}
QUESTION = {"baseline": {CAPACITY: None}, "spread": 0.01, "smallest_difference": 0.02}


def text_of(plan: Plan) -> str:
    out = StringIO()
    print_plan(plan, Console(file=out, width=100, highlight=False, markup=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    return "\n".join(line.rstrip() for line in lines)


def plan_of(folder: Path, **keys: Any) -> Plan:
    return make_plan(write(folder, **({"overrides": SMALL} | keys)), None)


def test_a_plan_without_a_probe_or_a_question(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    said = text_of(plan)
    assert said.startswith("toy: 12 points, 6 combinations with 2 seeds\n")
    assert "model.moe.capacity_factor: 0.5, 1.0, null" in said and "seeds: 0, 1" in said
    assert "time      not known: nothing has been timed; leave out --no-probe" in said
    assert "none is stated: the report will be exploratory only" in said
    assert "  2 seeds: the report gives intervals and verdicts from 3 on; add seeds to the study's file" in said
    assert few_seeds(load_study(write(tmp_path, seeds=[0, 1, 2])).file) is None
    assert plan.seconds is None and plan.effect is None and not (tmp_path / "root").exists()


def test_what_is_left_out_and_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rule = {CAPACITY: 0.5, EXPERTS: 8}
    axes = {CAPACITY: [0.5, -1], EXPERTS: [4, 8]}
    path = write(
        tmp_path, axes=axes, exclude=[rule], vary_together={"size": SIZES}, overrides=SMALL | {"optim.eps": 1e-6}
    )
    path.write_text(path.read_text().replace("model.d_model: 32", "model.d_ff: 64"))
    assert main(["study", "plan", str(path), "--no-probe"]) == 1
    said = capsys.readouterr().out
    assert "toy: 4 points, 2 combinations with 2 seeds" in said and "4 points are left out by exclude" in said
    assert "8 points are refused; study run will not start before they are mended or left out with exclude:" in said
    assert said.count("capacity_factor=-1.0 is not above 0; raise") == 1 and "  all of them: capacity_factor=-1" in said
    assert main(["study", "run", str(path)]) == 2
    assert "8 of 12 points are refused" in capsys.readouterr().err


def test_a_baseline_that_is_refused_is_told_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = {"baseline": {CAPACITY: -1}, "smallest_difference": 0.01}
    path = write(tmp_path, axes={CAPACITY: [-1, 1.0]}, seeds=[0, 1, 2], question=question)
    assert main(["study", "plan", str(path), "--no-probe"]) == 1
    said = capsys.readouterr().out
    assert "3 points are refused" in said and "capacity_factor=-1.0 is not above 0; raise" in said
    assert "question  validation_loss, 0 comparisons, 3 seeds each" in said
    assert "not known: what the question compares, or its baseline, is among the points refused" in said


def test_a_long_grid_is_cut_and_json_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = {"optim.lr": [number / 1000 for number in range(1, 41)]}
    path = write(tmp_path, axes=axes, overrides=SMALL, question={"baseline": {"optim.lr": 0.001}, "spread": 0.1})
    assert main(["study", "plan", str(path), "--no-probe"]) == 0
    said = capsys.readouterr().out
    shown = [line.split()[0] for line in said.splitlines() if re.match(r"0\.0\d+ ", line)]
    assert shown == [f"{number / 1000}" for number in [*range(1, 17), *range(37, 41)]] and "... 20 more" in said
    assert main(["study", "plan", str(path), "--no-probe", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [point["axes"]["optim.lr"] for point in values["points"]] == [
        lr for lr in axes["optim.lr"] for _ in range(2)
    ]
    assert values["untimed"] and values["probe"] is None and values["effect"]["comparisons"] == 39
    assert values["effect"]["missing"] == f"fewer than {FEWEST_SEEDS} seeds show nothing; list more"


def test_time_is_summed_over_points(tmp_path: Path) -> None:
    keys = dict(axes={"model.moe.top_k": [1, 2]}, seeds=[0, 1, 2], evaluations=4, at_once=2, overrides=SMALL)
    draft = load_study(write(tmp_path, **keys), planning=True)
    configs = [point.config for point in draft.points]
    probe = probe_of(draft.folder, extremes(configs, 1), [0.5, 0.9])
    plan = make_plan(draft.path, None)
    each = [3.0 + 8 * step + 4 * 0.5 for step in (0.5, 0.9)]
    assert plan.probe == probe and [point.seconds for point in plan.points] == pytest.approx(
        np.repeat(each, 3).tolist()
    )
    assert plan.seconds == plan.seconds_left == pytest.approx(3 * sum(each) / 2)
    assert "time      32s at 2 points at once" in text_of(plan)  # 31.8 s; as in the table of study run
    done = draft.points[0]
    Ledger(draft.ledger).append({"point": done.name, "axes": done.axes, "seed": 0, "status": "finished"})
    Ledger(draft.ledger).append({"point": draft.points[1].name, "axes": done.axes, "seed": 1, "status": "failed"})
    again = make_plan(draft.path, None)
    assert again.finished == 1 and again.seconds == plan.seconds
    assert again.seconds_left == pytest.approx(3 * sum(each) / 2 - each[0] / 2)
    assert "1 of them finished" in text_of(again)
    assert plan_of(tmp_path, **(keys | {"at_once": 100})).seconds == pytest.approx(max(each))  # of the longest point


def test_disk_counts_the_checkpoints_that_stay(tmp_path: Path) -> None:
    def checkpoints(**run: Any) -> float:
        overrides = SMALL | {f"run.{name}": value for name, value in run.items()}
        plan = plan_of(tmp_path, axes={CAPACITY: [1.0, None]}, seeds=[0], overrides=overrides)
        (size,) = {point.checkpoint_bytes for point in plan.points}
        return size / (12 * parameters)

    # an embedding of 256 x 32; attention 2 x 32 x 32 and one head of 16 for keys and values; a router; 8 experts
    heads, norms = 2 * 32 * 32 + 2 * 16 * 32, 3 * 32
    experts = 8 * 3 * 32 * load_study(write(tmp_path, overrides=SMALL)).points[0].config.model.d_ff
    parameters = 256 * 32 + heads + norms + 8 * 32 + experts
    assert checkpoints(save_every=100) == 1  # that at the end of 8 steps
    assert checkpoints(save_every=1, keep_last=3) == 3
    assert checkpoints(save_every=2, keep_last=3) == 3
    assert checkpoints(save_every=2, keep_last=1, keep_every=4) == 2  # steps 4 and 8
    assert checkpoints(save_every=2, eval_every=2, keep_last=1, keep_best=True) == 2


def test_the_family_is_what_the_question_names(tmp_path: Path) -> None:
    def family(question: dict[str, Any], **keys: Any) -> list[tuple[Any, ...]]:
        study = load_study(write(tmp_path, question=question, overrides=SMALL, **keys))
        assert study.file.question is not None
        return [(*axes.values(), *other.values()) for axes, other in comparisons(study.file.question, study.cells)]

    dropless = {CAPACITY: None}
    assert family({"baseline": dropless}) == [
        (0.5, 4, None, 4),
        (0.5, 8, None, 8),
        (1.0, 4, None, 4),
        (1.0, 8, None, 8),
    ]
    assert family({"baseline": dropless, "compare": {CAPACITY: [1.0], EXPERTS: [8]}}) == [(1.0, 8, None, 8)]
    two = {"baseline": {CAPACITY: None, EXPERTS: 4}}
    assert {pair[2:] for pair in family(two)} == {(None, 4)} and len(family(two)) == 5
    rule = {CAPACITY: None, EXPERTS: 8}
    assert family({"baseline": dropless}, exclude=[rule]) == [(0.5, 4, None, 4), (1.0, 4, None, 4)]


def test_the_smallest_effect_before_there_is_a_pilot(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, question=QUESTION, seeds=[0, 1, 2, 3, 4])
    effect = plan.effect
    assert effect is not None and (effect.comparisons, effect.seeds, effect.source) == (4, 5, "question")
    assert effect.detectable == minimum_detectable(0.01, 5, comparisons=4)
    assert effect.power == power(0.02, 0.01, 5, comparisons=4)
    needed = next(n for n in range(3, 99) if minimum_detectable(0.01, n, comparisons=4) <= 0.02)
    assert effect.seeds_needed == needed > 5
    said = text_of(plan)
    assert f"{effect.detectable:.4g}" in said and f"{effect.power:.0%}" in said and f"80% take {needed} seeds" in said


def test_simulated_studies_show_the_smallest_effect_in_80_of_100(tmp_path: Path) -> None:
    """Of a family of four, of which one has the effect and Holm takes the first step at 5% / 4."""
    effect = plan_of(tmp_path, question=QUESTION, seeds=[0, 1, 2, 3, 4]).effect
    assert effect is not None and effect.detectable is not None
    differences = np.random.default_rng(0).normal(effect.detectable, 0.01, (20_000, 5))
    t = differences.mean(1) / differences.std(1, ddof=1) * np.sqrt(5)
    assert (t > 4.3147).mean() == pytest.approx(0.8, abs=0.01)  # Student's t at 1 - 0.05 / 8, 4 degrees of freedom


def test_the_spread_of_finished_points_goes_before_what_was_expected(tmp_path: Path) -> None:
    path = write(tmp_path, question=QUESTION, overrides=SMALL, seeds=[0, 1, 2, 3])
    study, rng = load_study(path), np.random.default_rng(1)
    losses = {point.name: float(rng.normal()) for point in study.points}
    ledger = Ledger(study.ledger)
    for point in study.points:
        record = {"point": point.name, "axes": point.axes, "seed": point.seed, "validation_loss": losses[point.name]}
        ledger.append(record | {"status": "failed" if (point.seed, point.axes[EXPERTS]) == (3, 8) else "finished"})
    squares, degrees = 0.0, 0
    for experts, seeds in ((4, (0, 1, 2, 3)), (8, (0, 1, 2))):
        for factor in ("0.5", "1.0"):
            name = "capacity_factor={}-num_experts={}-seed={}"
            pairs = [losses[name.format(f, experts, s)] for s in seeds for f in (factor, "null")]
            differences = np.subtract(pairs[::2], pairs[1::2])
            squares += float(((differences - differences.mean()) ** 2).sum())
            degrees += len(seeds) - 1
    effect = make_plan(path, None).effect
    assert effect is not None and effect.source == "pilot"
    assert effect.spread == pytest.approx(np.sqrt(squares / degrees), rel=1e-12)
    assert len(cells(study, ledger.latest())) == 6


def test_a_spread_that_nobody_knows_is_said(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, question={"baseline": {CAPACITY: None}}, seeds=[0, 1, 2])
    assert "not known: how differences spread over seeds; run some points, or give question.spread" in text_of(plan)
    unreachable = plan_of(tmp_path, question=QUESTION | {"spread": 10.0}, seeds=[0, 1, 2])
    assert unreachable.effect is not None and unreachable.effect.seeds_needed is None
    assert "80% take more than 1000 seeds" in text_of(unreachable)


def test_a_probe_that_fails_says_why(tmp_path: Path) -> None:
    path = write(tmp_path, overrides=SMALL)
    plan = make_plan(path, lambda config, ranks: ["python3", "-c", "import sys; sys.exit('no room')"])
    assert plan.untimed == "the probe's run ended with exit code 1: no room" and plan.points
    assert not (tmp_path / "root/toy/probe.json").exists()


def test_times_of_another_machine_are_measured_anew_until_a_point_has_begun(tmp_path: Path) -> None:
    keys = dict(axes={"model.moe.top_k": [1, 2]}, overrides=SMALL | {"train.steps": 200}, equal="time", seeds=[0])
    path = write(tmp_path, **keys)
    draft = load_study(path, planning=True)
    probe = probe_of(draft.folder, extremes([point.config for point in draft.points], 1), [0.01, 0.02])
    assert make_plan(path, None).probe == probe
    elsewhere = replace(probe, machine="another")
    write_probe(draft.folder, elsewhere)
    plan = make_plan(path, lambda config, ranks: ["python3", "-c", "import sys; sys.exit('no room')"])
    assert plan.probe is None and plan.untimed is not None and "no room" in plan.untimed
    draft.points[0].folder.mkdir()
    assert make_plan(path, lambda config, ranks: ["false"]).probe == elsewhere


def test_a_real_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes; the second plan takes what the first has measured, and equal times follow from it."""
    text = tmp_path / "text.txt"
    text.write_text("a few words, again and again. " * 400)
    data = {"data.kind": "text", "data.paths": [str(text)], "train.steps": 400, "run.eval_sequences": 8}
    sizes = {"small": {"model.d_ff": 16, "model.d_model": 16}, "large": {"model.d_ff": 256, "model.d_model": 128}}
    overrides = {key: value for key, value in (SMALL | data).items() if key != "model.d_model"}
    keys = dict(axes={CAPACITY: [1.0]}, vary_together={"size": sizes}, overrides=overrides, equal="time", seeds=[0])
    path = write(tmp_path, **keys)
    assert main(["study", "plan", str(path), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    small, large = first["probe"]["points"]
    assert 0 < small["flops"] < large["flops"] and small["step_seconds"] > 0 and large["start_seconds"] > 0.3
    assert 0 < small["evaluation_seconds"] < 60 and small["bytes_per_step"] > 100
    assert [point["axes"]["size"] for point in first["points"]] == ["small", "large"]
    steps, timed = [point["steps"] for point in first["points"]], [small["step_seconds"], large["step_seconds"]]
    if timed[0] < timed[1]:  # else the machine was busy, and both are taken for their mean
        assert steps[0] * timed[0] == pytest.approx(steps[1] * timed[1], rel=0.04)
    assert first["residual"] < 0.02
    measured = (tmp_path / "root/toy/probe.json").stat().st_mtime_ns
    assert main(["study", "plan", str(path)]) == 0
    assert f"timed on {first['probe']['machine']}" in capsys.readouterr().out
    assert (tmp_path / "root/toy/probe.json").stat().st_mtime_ns == measured
    assert [point.config.train.steps for point in load_study(path).points] == [p["steps"] for p in first["points"]]


def test_words_for_numbers() -> None:
    assert [quantity(value, "B") for value in (0, 999, 1_230_000, 5e18)] == ["0 B", "999 B", "1.23 MB", "5 EB"]
