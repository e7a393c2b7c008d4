"""Every figure's data equals the ledger's and the measurements', by sums of our own."""

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
from scipy import stats

from moe_dist.study.design.grid import Study
from moe_dist.study.ledger.columns import Columns
from moe_dist.study.page.model import Figure
from moe_dist.study.report.figures.against import Line, Stop, against
from moe_dist.study.report.figures.canvas import places_of, spread_over
from moe_dist.study.report.figures.drops_by_place import Tokens, drop_rates, drops_by_place, place_shares
from moe_dist.study.report.figures.drops_split import split_layers
from moe_dist.study.report.figures.loads import over_means
from moe_dist.study.report.reduced import Reduced, late_in_words, reduce_columns, together
from moe_dist.study.report.report import page_of, write_report
from moe_dist.study.report.theory import Competition
from moe_dist.study.statistics.drops import drops_of_shares, uniform_drops
from tests.dist.helpers import tiny_config
from tests.unit.study.synthetic import (
    QUESTION,
    STUDY,
    plant,
    plant_measurements,
    planted_losses,
    planted_study,
)

LAYERS, EXPERTS, FRACTIONS = 2, 8, 4


class Written:
    """A report of 15 points with measurements: its tables, ledger, and lines by (cell, seed)."""

    def __init__(self, folder: Path) -> None:
        self.study: Study = planted_study(folder)
        plant(self.study, planted_losses({0.5: 0.05, 1.0: 0.004, None: 0.0}))
        self.lines: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
        for point in self.study.points:
            factor = point.config.model.moe.capacity_factor
            drop = 0.0 if factor is None else 0.1 / float(factor)  # type: ignore[arg-type]
            name = "dropless" if factor is None else f"capacity_factor {factor}"
            self.lines[name].append(plant_measurements(point, LAYERS, EXPERTS, FRACTIONS, point.index, drop))
        self.files = write_report(self.study)
        self.ledger = [json.loads(line) for line in self.study.ledger.read_text().splitlines()]

    def table(self, name: str) -> list[dict[str, str]]:
        with (self.study.folder / "data" / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))

    def late(self, name: str, layer: int | None = None) -> Iterator[dict[str, Any]]:
        """Layer lines of the last quarter: of four fractions the last."""
        for lines in self.lines[name]:
            for line in lines:
                if line["fraction"] == 1.0 and line["layer"] is not None and layer in (None, line["layer"]):
                    yield line


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("study"))


def test_every_figure_has_its_drawing_and_its_data(written: Written) -> None:
    names = {path.stem for path in written.files if path.suffix == ".svg"}
    assert names == {"against", "drops-over-run", "drops-split", "drops-by-place", "loads", "pareto"}
    assert all((written.study.folder / "data" / f"{name}.csv").stat().st_size > 100 for name in names)
    assert {path.name for path in written.files} > {"report.html", "report.md", "comparisons.csv", "points.csv"}


def test_losses_are_the_ledgers(written: Written) -> None:
    rows = written.table("against")
    labels = {0.5: "0.5", 1.0: "1.0", None: "dropless"}
    for metric in ("validation_loss", "validation_loss_capped", "loss", "drop_rate"):
        of_it = [row for row in rows if row["metric"] == metric]
        assert {(row["capacity_factor"], int(row["seed"])): float(row["value"]) for row in of_it} == {
            (labels[line["axes"]["model.moe.capacity_factor"]], line["seed"]): line[metric] for line in written.ledger
        }
    half = [line["validation_loss"] for line in written.ledger if line["axes"]["model.moe.capacity_factor"] == 0.5]
    none = [line["validation_loss"] for line in written.ledger if line["axes"]["model.moe.capacity_factor"] is None]
    row = next(row for row in rows if row["metric"] == "minus_baseline" and row["capacity_factor"] == "0.5")
    interval = stats.ttest_rel(half, none).confidence_interval()
    assert [float(row[key]) for key in ("mean", "low", "high")] == pytest.approx(
        [np.mean(half) - np.mean(none), interval.low, interval.high]
    )


def test_drops_over_the_run_are_means_of_seeds(written: Written) -> None:
    rows = {(r["point"], r["layer"], r["fraction"]): float(r["drop_rate"]) for r in written.table("drops-over-run")}
    assert len(rows) == 2 * LAYERS * FRACTIONS  # dropless is not among them
    of_seeds = [
        line["drop_rate"]
        for lines in written.lines["capacity_factor 1.0"]
        for line in lines
        if (line["layer"], line["fraction"]) == (1, 0.5)
    ]
    assert len(of_seeds) == 5 and rows["capacity_factor 1.0", "layer 1", "0.5"] == pytest.approx(fmean(of_seeds))


def test_drops_are_split_by_theory(written: Written) -> None:
    rows = {(row["point"], row["layer"]): row for row in written.table("drops-split")}
    assert len(rows) == 2 * LAYERS
    for (name, layer), row in rows.items():
        number = int(layer.split()[1])
        late = list(written.late(name, number))
        rates = [sum(line["dropped_by_expert"]) / sum(line["load"]) for line in late]
        assert float(row["measured"]) == pytest.approx(fmean(rates)) and len(rates) == 5
        capacity = 64 if name.endswith("0.5") else 128  # of 512 tokens that choose 2 of 8
        assert float(row["chance"]) == pytest.approx(uniform_drops(512, 2, 8, capacity).rate)
        parts = [float(row[part]) for part in ("chance", "imbalance", "rest")]
        assert sum(parts) == pytest.approx(float(row["measured"])) and parts[1] >= 0


def test_drops_by_place_are_over_equal_parts(written: Written) -> None:
    table = written.table("drops-by-place")
    rows = {(row["point"], row["by"], int(row["part"])): float(row["drop_rate"]) for row in table}
    assert len(rows) == 2 * (16 + 16 + 8)
    late = list(written.late("capacity_factor 0.5"))
    load = sum(sum(line["load"]) for line in late)
    for kind, key in (("sequence", "dropped_by_place"), ("micro-step", "dropped_by_micro_step_place")):
        dropped = sum(line[key][3] for line in late)
        assert rows["capacity_factor 0.5", kind, 3] == pytest.approx(dropped / (load / 16))
    dropped, asked = (sum(line[f"{what}_by_frequency"][7] for line in late) for what in ("dropped", "load"))
    assert rows["capacity_factor 0.5", "frequency", 7] == pytest.approx(dropped / asked)


def test_loads_are_over_their_layers_mean(written: Written) -> None:
    rows = {(row["point"], row["layer"], int(row["rank"])): row for row in written.table("loads")}
    assert len(rows) == 3 * LAYERS * EXPERTS
    loads = np.sum([sorted(line["load"], reverse=True) for line in written.late("dropless", 1)], axis=0)
    for rank in range(EXPERTS):
        row = rows["dropless", "layer 1", rank]
        assert float(row["load"]) == loads[rank]
        assert float(row["load_over_mean"]) == pytest.approx(loads[rank] / loads.mean(), abs=1e-6)


def points_of(loads: list[list[int]], fractions: int = 4, dropped: float = 0.3) -> list[Reduced]:
    """One layer's measurements of as many seeds, the same at every fraction."""
    found = []
    for load in loads:
        model = {"fraction": np.arange(1, fractions + 1) / fractions}
        load_FLE = np.tile(np.array(load), (fractions, 1, 1))
        counts = {"load": load_FLE, "dropped_by_expert": np.round(load_FLE * dropped).astype(np.int64)}
        layer = {"layer": np.array([0]), "drop_rate": np.full((fractions, 1), dropped)} | counts
        one = reduce_columns(Columns(model, {"feed_forward": layer}))
        assert one is not None
        found.append(one)
    return found


def test_imbalance_is_each_seeds_own() -> None:
    """One expert of eight has 40%, another in each seed: added up by number the shares would be nearly even."""
    loads = np.full((5, 8), 6000) + np.eye(5, 8, dtype=int) * 22_000
    of = Competition(tokens=512, top_k=1, num_experts=8, capacity=64, pool=1)
    points = points_of(loads.tolist())
    (layer,) = split_layers(points, of)
    chance = uniform_drops(512, 1, 8, 64).rate
    expected = drops_of_shares(512, 1, [0.4, *[0.6 / 7] * 7], 64).rate
    assert layer.split.chance == pytest.approx(chance)
    assert layer.split.imbalance == pytest.approx(expected - chance, abs=1e-3) and layer.split.imbalance > 0.2
    whole = together(points)
    assert over_means(whole)[0].tolist() == pytest.approx([3.2, *[0.6 / 7 * 8] * 7], abs=0.01)
    assert whole.seeds == 5 and not whole.counts.keys() & {"load", "dropped_by_expert"}


@pytest.mark.parametrize(
    ("fractions", "late", "counted"), [(1, 1.0, 1), (2, 0.5, 1), (4, 0.25, 1), (5, 0.2, 1), (8, 0.25, 2), (10, 0.2, 2)]
)
def test_the_last_quarter_has_fractions_that_lie_in_it(fractions: int, late: float, counted: int) -> None:
    """Of five the last alone: the fourth begins at 0.6."""
    (one,) = points_of([[10, 20]], fractions)
    assert one.late == pytest.approx(late) and one.counts["load"][0].tolist() == [10 * counted, 20 * counted]
    assert late_in_words([one]) == f"the last {late:.0%} of the schedule"
    (other,) = points_of([[10, 20]], 4)
    assert late_in_words([other, one]) == (
        "the last 25% of the schedule"
        if late == 0.25
        else f"the last {min(late, 0.25):.0%} to {max(late, 0.25):.0%} of the schedule"
    )


def test_seeds_of_other_fractions_are_told(tmp_path: Path) -> None:
    study = planted_study(tmp_path)
    plant(study, planted_losses({0.5: 0.05, 1.0: 0.004, None: 0.0}))
    for point in study.points:
        plant_measurements(point, LAYERS, EXPERTS, 8 if point.index == 0 else 4)
    write_report(study)
    said = "capacity_factor 0.5 is left out of drops and load: its seeds have measurements of other fractions"
    page = (study.folder / "report.md").read_text()
    assert said in page and "capacity_factor 1.0 is left out of drops" not in page


def test_places_have_the_tokens_that_fall_into_them() -> None:
    """Twenty tokens in sixteen parts: every fourth part has two of them, so of even drops twice as many."""
    tokens = [sum(at * 16 // 20 == part for at in range(20)) for part in range(16)]
    assert place_shares(20, 16).tolist() == [each / 20 for each in tokens] and sorted(set(tokens)) == [1, 2]
    counts = {"ranked_load": (np.array([600.0, 400.0]),), "dropped_by_place": (np.array(tokens) * 5.0,)}
    one = Reduced((1.0,), ((0, "feed_forward"),), np.full((1, 1), 0.1), counts, 1.0)
    rates = drop_rates(one, "sequence", Tokens(sequence=20, micro_step=20))
    assert rates is not None and rates.tolist() == pytest.approx([0.1] * 16)
    eight = drop_rates(one, "sequence", Tokens(8, 80))  # of whose parts every second has no token
    assert eight is not None and np.isnan(eight[1::2]).all() and np.isfinite(eight[::2]).all()
    figure = drops_by_place({"a": one}, {"a": Tokens(8, 80)})
    assert figure is not None
    assert [row[2] for row in figure.rows if row[1] == "sequence" and row[3] is None] == list(range(1, 16, 2))
    assert drop_rates(one, "sequence", None) is None  # of a classifier
    assert drops_by_place({"a": one}, {"a": None}) is None
    assert Tokens.of(tiny_config(train__seq_len=20, train__global_batch=4), 1) == Tokens(20, 80)
    assert Tokens.of(tiny_config(task="classification", model__num_classes=2), 1) is None


def test_the_front_is_of_times_and_losses(written: Written) -> None:
    rows = {(row["point"], row["cost"]): row for row in written.table("pareto")}
    assert {cost for _, cost in rows} == {"time"}  # all else costs the same
    assert [float(rows[f"capacity_factor {f}", "time"]["value"]) for f in (0.5, 1.0)] == pytest.approx([10.0, 10.0])
    assert float(rows["dropless", "time"]["value"]) == pytest.approx(12.0)
    assert rows["capacity_factor 0.5", "time"]["standing"] == "dominated"
    assert rows["capacity_factor 0.5", "time"]["against"] == "capacity_factor 1.0"
    assert rows["capacity_factor 1.0", "time"]["standing"] == "front"
    means = fmean(
        line["validation_loss"] for line in written.ledger if line["axes"]["model.moe.capacity_factor"] == 1.0
    )
    assert float(rows["capacity_factor 1.0", "time"]["mean"]) == pytest.approx(means)


def test_the_same_ledger_gives_the_same_files(written: Written) -> None:
    first = [path.read_bytes() for path in written.files]
    assert [path.read_bytes() for path in write_report(written.study)] == first


def test_numbers_stand_at_themselves_and_dropless_to_their_right() -> None:
    assert places_of([0.5, 1.0, 2.0, None]) == {0.5: 0.5, 1.0: 1.0, 2.0: 2.0, None: 2.75}
    assert places_of([4, None]) == {4: 4.0, None: 5.0}
    assert places_of([1.0, 8.0, 1.1, None]) == {1.0: 0.0, 1.1: 1.0, 8.0: 2.0, None: 3.5}
    assert places_of(["gelu", "relu"]) == {"gelu": 0.0, "relu": 1.0}
    assert places_of([True, False]) == {True: 0.0, False: 1.0}


def test_names_with_signs_of_mathematics_are_drawn_as_they_are(tmp_path: Path) -> None:
    values = [r"$\foo$", '$x$ < 1 & "y"', "plain"]
    axes = "axes: {data.tokenizer: " + json.dumps(values) + "}\nseeds: [0, 1, 2]\n"
    question = "question: {baseline: {data.tokenizer: plain}, smallest_difference: 0.1}\n"
    study = planted_study(tmp_path, "name: odd\nbase: base.yaml\n" + axes + question)
    plant(study, lambda point, rng: 3.0 + 0.01 * rng.standard_normal())
    for point in study.points:
        plant_measurements(point, LAYERS, EXPERTS, FRACTIONS, point.index)
    for path in write_report(study):
        if path.suffix == ".svg":
            drawn = "".join(ElementTree.parse(path).getroot().itertext())
            if "plain" in drawn:
                assert [value for value in values if value not in drawn] == [], path.name
    assert values[0] in (study.folder / "figures" / "against.svg").read_text(encoding="utf-8")


def test_names_are_not_joined() -> None:
    """Between `sign` and `quantile` there is nothing that a line could say; between 1.0 and 1.25 there is."""
    stops = [
        Stop(name, x, False, {"loss": {0: 1.0 + x, 1: 1.1, 2: 1.2}}) for name, x in (("sign", 0.0), ("quantile", 1.0))
    ]
    drawn = {
        joined: against([Line("", "", stops, joined)], "balance", {"loss": ("loss", 1.0)}).svg
        for joined in (True, False)
    }
    paths = {joined: len(re.findall(r"<path ", svg)) for joined, svg in drawn.items()}
    assert paths[False] < paths[True]


def test_few_are_drawn_of_many() -> None:
    assert spread_over("abc", 6) == ["a", "b", "c"]
    assert spread_over(range(100), 6) == [0, 20, 40, 59, 79, 99]


LADDER = """
name: ladder
base: base.yaml
axes:
  model.moe.capacity_factor: [1.0, null]
vary_together:
  size:
    s: {train.steps: 100}
    m: {train.steps: 300}
    l: {train.steps: 900}
    xl: {train.steps: 2700}
    xxl: {train.steps: 8100}
seeds: [0, 1, 2, 3]
"""


def test_a_planted_ladder_comes_back(tmp_path: Path) -> None:
    """L = 1.8 + A C^-0.2, of which the capped points get the loss of 0.9 of their compute at 1.2 of the speed."""
    study = planted_study(tmp_path, LADDER + QUESTION)
    common = 0.002 * np.random.default_rng(1).standard_normal(10)

    def loss(point: Any, rng: np.random.Generator) -> float:
        compute = 1e9 * point.config.train.steps * (1.0 if point.config.model.moe.capacity_factor is None else 0.9)
        return float((1.8 + 250 * compute**-0.2) * np.exp(common[point.seed] + 0.0005 * rng.standard_normal()))

    plant(study, loss)
    write_report(study)
    folder = study.folder / "data"

    def table(name: str) -> list[dict[str, str]]:
        with (folder / f"{name}.csv").open() as file:
            return list(csv.DictReader(file))

    (law,) = table("laws")
    assert float(law["a, low"]) <= 0.2 <= float(law["a, high"]) and law["sizes"] == "5"
    assert float(law["L0, low"]) <= 1.8 <= float(law["L0, high"]) and law["95% interval"] == "inside"
    speeds = {row["size"]: row for row in table("speeds")}
    assert list(speeds) == ["s", "m", "l", "xl", "xxl"]
    for row in speeds.values():
        assert float(row["effective compute"]) == pytest.approx(0.9, abs=0.06)
        assert float(row["throughput"]) == pytest.approx(1.2)
        assert float(row["speed, low"]) <= float(row["effective speed"]) <= float(row["speed, high"])
        assert float(row["over L0 and a, least"]) <= float(row["effective speed"]) <= float(row["over L0 and a, most"])
    losses = [row for row in table("ladder") if row["seed"]]
    ledger = [json.loads(line) for line in study.ledger.read_text().splitlines()]
    dropless = [line for line in ledger if line["axes"]["model.moe.capacity_factor"] is None]
    assert sorted(float(row["loss"]) for row in losses) == sorted(line["validation_loss"] for line in dropless)
    (held_out,) = (row for row in table("ladder") if not row["seed"])
    assert float(held_out["loss"]) == pytest.approx(fmean(x["validation_loss"] for x in dropless if x["steps"] == 8100))
    page = (study.folder / "report.md").read_text()
    assert "The law of the smaller sizes predicts" in page and "inside its 95% interval" in page
    terms = {row["term"]: row for row in table("scaling")}
    assert {"exponent of tokens", "capacity factor 1.0"} == set(terms)
    assert float(terms["exponent of tokens"]["value"]) == pytest.approx(-0.2, abs=0.02)


def test_sizes_whose_losses_do_not_fall_have_no_law(tmp_path: Path) -> None:
    """Of two settings one has a ladder, and the other says why it has none."""
    study = planted_study(tmp_path, LADDER.replace("axes:", "axes:\n  model.moe.top_k: [1, 2]") + QUESTION)

    def loss(point: Any, rng: np.random.Generator) -> float:
        falls = 250 * (1e9 * point.config.train.steps) ** -0.2 if point.axes["model.moe.top_k"] == 2 else 0.5
        return 1.8 + falls + 0.001 * float(rng.standard_normal())

    plant(study, loss)
    write_report(study)
    with (study.folder / "data" / "laws.csv").open() as file:
        assert [row["setting"] for row in csv.DictReader(file)] == ["top_k 2"]
    page = (study.folder / "report.md").read_text()
    assert "A law is left out at top_k 1: losses fall by 0.0" in page and "no law of compute can be told" in page


def test_a_given_law_says_what_a_loss_is_worth(tmp_path: Path) -> None:
    """marin's exchange rate without a ladder: ((L - L0) / (L_baseline - L0)) ^ (-1 / a) times throughput."""
    study = planted_study(tmp_path, STUDY + QUESTION + "law: {floor: 1.6, exponent: 0.0941}\n")
    plant(study, planted_losses({0.5: 0.05, 1.0: 0.004, None: 0.0}))
    write_report(study)
    with (study.folder / "data" / "speeds.csv").open() as file:
        rows = {row["point"]: row for row in csv.DictReader(file)}
    lines = [json.loads(line) for line in study.ledger.read_text().splitlines()]
    by_factor = {
        factor: {x["seed"]: x for x in lines if x["axes"]["model.moe.capacity_factor"] == factor}
        for factor in (0.5, 1.0, None)
    }
    assert set(rows) == {"0.5", "1.0"}
    for factor in (0.5, 1.0):
        capped, dropless = by_factor[factor], by_factor[None]
        losses = [(capped[s]["validation_loss"], dropless[s]["validation_loss"]) for s in dropless]
        compute = np.exp(np.mean([np.log((a - 1.6) / (b - 1.6)) / -0.0941 for a, b in losses]))
        faster = np.mean([np.log(capped[s]["tokens_per_second"] / dropless[s]["tokens_per_second"]) for s in dropless])
        row = rows[f"{factor}"]
        assert float(row["effective compute"]) == pytest.approx(compute)
        assert float(row["effective speed"]) == pytest.approx(compute * np.exp(faster))
        assert float(row["over L0 and a, least"]) < float(row["effective speed"]) < float(row["over L0 and a, most"])
    assert "by the given law L0 = 1.6, a = 0.0941" in (study.folder / "report.md").read_text()


def test_a_loss_at_the_floor_of_a_law_is_told(tmp_path: Path) -> None:
    study = planted_study(tmp_path, STUDY + QUESTION + "law: {floor: 3.0, exponent: 0.0941}\n")
    plant(study, planted_losses({0.5: 0.05, 1.0: 0.004, None: 0.0}))
    write_report(study)
    assert not (study.folder / "data" / "speeds.csv").exists()
    least = min(json.loads(line)["validation_loss"] for line in study.ledger.read_text().splitlines())
    said = (
        f"Effective compute and speed are left out: a loss of {least:.4g} is not above L0 = 3, so no compute reaches it"
    )
    assert said in (study.folder / "report.md").read_text()


def test_of_shares_the_panel_says_per_cent(tmp_path: Path) -> None:
    study = planted_study(tmp_path, STUDY + QUESTION + "  metric: drop_rate\n")
    plant(study, lambda point, rng: 3.0)
    page = page_of(study)
    assert page is not None
    (figure,) = (p for s in page.sections for p in s.parts if isinstance(p, Figure) and p.name == "against")
    assert "dropped, end, minus baseline (%)" in figure.svg


def test_what_the_grid_does_not_have_is_left_out_in_words(tmp_path: Path) -> None:
    study = planted_study(tmp_path, STUDY)
    plant(study, planted_losses({0.5: 0.05, 1.0: 0.004, None: 0.0}))
    names = {path.stem for path in write_report(study) if path.suffix == ".svg"}
    page = (study.folder / "report.md").read_text()
    assert names == {"against", "pareto"}
    for said in (
        "the points have no measurements by layer",
        "no axis of the grid has 4 sizes of compute",
        "Scaling is left out: active parameters, experts and tokens are the same in all points",
        "No question was stated before the runs",
        "How to state a question",
    ):
        assert said in page, said
