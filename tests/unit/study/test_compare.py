"""Comparisons of runs made by hand, against loops over the lines of their metrics.jsonl."""

import csv
import json
import random
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pytest

from moe_dist.cli import main
from moe_dist.study.compare import figures
from moe_dist.study.compare.figures import POINTS, thinned
from moe_dist.study.compare.page import comparison
from moe_dist.study.compare.runs import Curve, RunRecord, labels, read_run
from moe_dist.study.page.model import Figure, Notice, Page, Prose, Section, Table
from tests.unit.study.made_runs import record_of, write_run


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Drawing takes most of the time: only tests of what it shows ask for `drawn`."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(figures, "svg_of", lambda figure: "<svg></svg>")


@pytest.fixture
def drawn():
    """The test needs its figures."""


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compared(*folders: Path) -> Page:
    runs = [read_run(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    return comparison(runs, Path("out"))


def parts(page: Page) -> dict[str, Figure | Table]:
    found = [part for section in page.sections for part in section.parts]
    return {part.name: part for part in found if isinstance(part, Figure | Table)}


def lead(page: Page) -> str:
    return "\n".join(
        line for part in page.lead for line in (part.lines if isinstance(part, Notice) else part.paragraphs)
    )


def row_of(table: Figure | Table, run: str) -> dict[str, Any]:
    return next(dict(zip(table.columns, row, strict=True)) for row in table.rows if row[0] == run)


def noisy(seed: int):
    """Other numbers at every step, one null, one skipped step, and loads that move."""
    source = random.Random(seed)

    def of_step(step: int) -> dict[str, Any]:
        record = {"loss": source.uniform(2, 5), "step_seconds": source.uniform(0.1, 0.3), "drop_rate": source.random()}
        record |= {"tokens_per_second": source.uniform(1e3, 2e3), "load_max_over_mean": source.uniform(1, 3)}
        record["layers"] = [
            {"layer": layer, "kind": kind, "load": [source.randrange(100) for _ in range(4)]}
            for layer, kind in ((0, "feed_forward"), (1, "attention"), (1, "feed_forward"))
        ]
        if step == 7:
            record |= {"loss": None, "nonfinite": ["loss"], "skipped": "loss is not finite"}
        return record

    return of_step


class TestEnds:
    def test_are_those_of_the_lines(self, tmp_path):
        one, two = (write_run(tmp_path / name, 43, of_step=noisy(seed)) for seed, name in enumerate("ab"))
        table = parts(compared(one, two))["ends"]
        for folder in (one, two):
            lines, row = lines_of(folder), row_of(table, folder.name)
            quarter = lines[-(len(lines) // 4) :]
            assert row["state"] == "finished" and row["step"] == 43 and row["of"] == 40
            assert row["training loss"] == pytest.approx(fmean(line["loss"] for line in lines[-20:]))
            assert row["validation loss"] == 2.05 and row["bits/byte"] == 3.05  # of step 40
            assert row["dropped"] == pytest.approx(fmean(line["drop_rate"] for line in quarter))
            assert row["fullest expert"] == pytest.approx(fmean(line["load_max_over_mean"] for line in quarter))
            assert row["step (ms)"] == pytest.approx(1e3 * median(line["step_seconds"] for line in lines))
            assert row["tokens/s"] == pytest.approx(median(line["tokens_per_second"] for line in lines))
            assert row["memory (MB)"] == 500
            assert row["training (s)"] == pytest.approx(sum(line["step_seconds"] for line in lines))
            assert row["skipped steps"] == 1

    def test_lead_names_the_lowest_loss(self, tmp_path):
        one = write_run(tmp_path / "one", of_step=lambda step: {"validation_loss": 2.25} if step == 40 else {})
        two = write_run(tmp_path / "two", of_step=lambda step: {"validation_loss": 2.125} if step == 40 else {})
        page = compared(one, two)
        assert "**2.1250 nats/token**, of two; one +0.1250." in lead(page)
        assert "One run each" in lead(page) and page.title == "one and two"

    def test_lacking_columns_are_left_out(self, tmp_path):
        run = write_run(tmp_path / "run", evaluate_every=None, experts=0)
        page = compared(run)
        columns = parts(page)["ends"].columns
        assert "validation loss" not in columns and "dropped" not in columns and "skipped steps" not in columns
        assert [section.title for section in page.sections] == ["How they ended", "Loss", "Speed"]
        assert page.title == "run" and "One run each" not in lead(page)


class TestCurves:
    def test_data_are_what_is_drawn(self, tmp_path):
        one, two = write_run(tmp_path / "a", 30, of_step=noisy(0)), write_run(tmp_path / "b", 20, of_step=noisy(1))
        figure = parts(compared(one, two))["loss"]
        expected = []
        for measure in ("loss", "validation_loss"):
            for folder in (one, two):
                known = [line for line in lines_of(folder) if line.get(measure) is not None]
                expected += [(folder.name, measure, line["step"], line[measure], 1) for line in known]
        assert [tuple(row) for row in figure.rows] == expected

    @pytest.mark.parametrize("count", [1, POINTS, POINTS + 1, 1234, 5000])
    def test_thinned_are_means_of_bins(self, count):
        values = np.random.default_rng(0).normal(size=count)
        kept = thinned(Curve(np.arange(1, count + 1), values))
        assert len(kept.values) == min(count, POINTS) and kept.count.sum() == count
        assert kept.count.max() - kept.count.min() <= 1
        begin = 0
        for last, value, size in zip(kept.last, kept.values, kept.count, strict=True):
            assert value == pytest.approx(fmean(values[begin : begin + size]))
            begin += size
            assert last == begin

    def test_long_runs_make_a_small_page(self, tmp_path, drawn):
        folder = write_run(tmp_path / "long", 5000, evaluate_every=100)
        found = parts(compared(folder))
        assert len(found["speed"].rows) == 2 * POINTS
        assert len(found["loss"].rows) == POINTS + 50
        assert sum(len(part.svg) for part in found.values() if isinstance(part, Figure)) < 500_000

    def test_axis_counts_tokens_where_steps_differ(self, tmp_path, drawn):
        small = write_run(tmp_path / "small")
        large = write_run(tmp_path / "large", config={"train.global_batch": 64})
        same = parts(compared(small, write_run(tmp_path / "same")))["loss"]
        other = parts(compared(small, large))["loss"]
        assert "tokens (millions)" in other.svg and ">step<" not in other.svg
        assert ">step<" in same.svg and "tokens (millions)" not in same.svg

    def test_names_are_not_mathematics(self, tmp_path, drawn):
        page = compared(write_run(tmp_path / "a $x_1$ <b>"), write_run(tmp_path / "_b"))
        assert "a $x_1$ &lt;b&gt;" in parts(page)["loss"].svg and "_b<" in parts(page)["loss"].svg


class TestLoad:
    @pytest.mark.parametrize("steps", [1, 3, 43])
    def test_is_that_of_the_last_quarter(self, tmp_path, drawn, steps):
        folder = write_run(tmp_path / "run", steps, of_step=noisy(3))
        figure = parts(compared(folder))["load-map"]
        lines = lines_of(folder)
        expected = []
        for place, (layer, kind) in enumerate(((0, "feed_forward"), (1, "attention"), (1, "feed_forward"))):
            load = [0] * 4
            for line in lines[-max(1, steps // 4) :]:
                for expert in range(4):
                    load[expert] += line["layers"][place]["load"][expert]
            expected += [("run", layer, kind, e, load[e], pytest.approx(load[e] / fmean(load))) for e in range(4)]
        assert [tuple(row) for row in figure.rows] == expected
        assert "1 attention" in figure.svg

    def test_begins_anew_when_experts_are_added(self, tmp_path):
        def of_step(step: int) -> dict[str, Any]:
            return record_of(step, 4 if step < 38 else 6)

        folder = write_run(tmp_path / "run", of_step=of_step)
        rows = parts(compared(folder))["load-map"].rows
        assert [row[4] for row in rows if row[1] == 0] == [3 * 1024] * 5 + [3 * 2048]

    def test_many_layers_are_all_in_the_data(self, tmp_path):
        def of_step(step: int) -> dict[str, Any]:
            return {"layers": [{"layer": layer, "kind": "feed_forward", "load": [1, 3]} for layer in range(40)]}

        figure = parts(compared(write_run(tmp_path / "run", 8, of_step=of_step)))["load-map"]
        assert len(figure.rows) == 80 and "some are drawn" in figure.caption

    def test_dense_runs_are_named(self, tmp_path):
        page = compared(write_run(tmp_path / "a"), write_run(tmp_path / "plain", experts=0))
        section = next(section for section in page.sections if section.title == "Drops and load")
        assert section.parts[0] == Prose(["Without experts, so not in these figures: plain."])
        assert {row[0] for row in parts(page)["drops"].rows} == {"a"}


class TestDifferences:
    def test_of_configurations(self, tmp_path):
        one = write_run(tmp_path / "one", config={"model.moe.capacity_factor": None, "train.seed": 0})
        two = write_run(tmp_path / "two", config={"model.moe.capacity_factor": 1.25, "train.seed": 1})
        three = write_run(tmp_path / "three", config={"model.moe.capacity_factor": 1.25, "model.moe.router": "hash"})
        table = parts(compared(one, two, three))["configuration"]
        assert table.columns == ["key", "one", "two", "three"]
        assert table.rows == [
            ["model.moe.capacity_factor", "null", "1.25", "1.25"],
            ["model.moe.router", None, None, "hash"],
            ["train.seed", "0", "1", "0"],
        ]

    def test_of_versions_and_machines(self, tmp_path):
        one = write_run(tmp_path / "one")
        two = write_run(tmp_path / "two", environment={"device": "NVIDIA H100", "packages": {"torch": "2.12.0"}})
        page = compared(one, two)
        assert parts(page)["environment"].rows == [
            ["device", "cpu (x86_64)", "NVIDIA H100"],
            ["packages.torch", "2.13.0+cpu", "2.12.0"],
            ["packages.apex", "null", None],
        ]
        assert Prose(["Configurations of all runs are the same."]) in differing(page).parts

    def test_few_keys_stand_across(self, tmp_path):
        one = write_run(tmp_path / "one", config={"model.moe.capacity_factor": None})
        table = parts(compared(one, write_run(tmp_path / "two")))["configuration"]
        assert table.columns == ["run", "model.moe.capacity_factor"]
        assert table.rows == [["one", "null"], ["two", "1.0"]]

    def test_none(self, tmp_path):
        page = compared(write_run(tmp_path / "a"), write_run(tmp_path / "b"))
        assert len(differing(page).parts) == 1

    def test_data_that_differ_lead(self, tmp_path):
        one = write_run(tmp_path / "one")
        two = write_run(tmp_path / "two", environment={"data": {"name": "other", "tokens": {"validation": 5}}})
        three = write_run(tmp_path / "three", config={"model.vocab_size": 512})
        assert "(`data.name`, `data.tokens.validation` differ): their losses do not compare." in lead(
            compared(one, two)
        )
        assert "(`model.vocab_size` differ): their losses do not compare." in lead(compared(one, three))
        assert "do not compare" not in lead(compared(one, write_run(tmp_path / "four")))


def differing(page: Page) -> Section:
    return next(section for section in page.sections if section.title == "What differs")


class TestKinds:
    def test_classifiers_stand_apart(self, tmp_path):
        def of_step(step: int) -> dict[str, Any]:
            return {"validation_accuracy": 0.5 + step / 100, "validation_macro_f1": 0.4} if step % 10 == 0 else {}

        text = write_run(tmp_path / "text")
        classifier = write_run(tmp_path / "classifier", config={"task": "classification"}, of_step=of_step)
        page = compared(text, classifier)
        found = parts(page)
        assert {row[0] for row in found["loss"].rows} == {"text"}
        assert {row[0] for row in found["loss-texts"].rows} == {"classifier"}
        assert [row[3] for row in found["scores-texts"].rows][:4] == [0.6, 0.7, 0.8, 0.9]
        assert row_of(found["ends"], "classifier")["validation accuracy"] == 0.9
        assert row_of(found["ends"], "text")["validation accuracy"] is None
        assert "their losses do not compare" in lead(page) and "lowest" not in lead(page)

    def test_a_run_that_goes_on(self, tmp_path):
        folder = write_run(tmp_path / "run", 15, state="running")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 16, "lo')  # being written
        run = read_run(folder, "run")
        assert (run.last, run.steps, run.unreadable) == (15, 15, 0)
        page = compared(folder, write_run(tmp_path / "whole"))
        assert "run has not finished (interrupted, step 15)." in lead(page)  # nobody holds its lock

    def test_damaged_lines_are_counted(self, tmp_path):
        folder = write_run(tmp_path / "run", 20)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        lines[4], lines[9] = "\x00\x00", "[1, 2]"
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        run = read_run(folder, "run")
        assert run.unreadable == 2 and list(run.curves["loss"].steps) == [s for s in range(1, 21) if s not in (5, 10)]
        assert "2 lines of run's metrics.jsonl cannot be read" in lead(compared(folder))

    @pytest.mark.parametrize("text", [None, "{", "[]"])
    def test_an_environment_that_is_missing(self, tmp_path, text):
        folder = write_run(tmp_path / "run")
        (folder / "environment.json").unlink()
        if text is not None:
            (folder / "environment.json").write_text(text)
        page = compared(folder, write_run(tmp_path / "other"))
        assert "run has no environment.json that can be read" in lead(page)
        assert "do not compare" not in lead(page)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a"], ["a"]),
        (["runs/a", "runs/b"], ["a", "b"]),
        (["s/a/run", "s/b/run"], ["a", "b"]),
        (["x/a/1/run", "y/a/2/run"], ["x/a/1", "y/a/2"]),
        (["x/a", "x/a/b"], ["x/a", "x/a/b"]),
        (["x/a/a", "x/a"], ["x/a/a", "x/a"]),
        (["runs/a", "runs/../runs/b/"], ["a", "b"]),
    ],
)
def test_labels(paths, names):
    assert labels([Path(path) for path in paths]) == names


class TestCommand:
    def test_writes_the_page(self, tmp_path, capsys, monkeypatch, drawn):
        for name in ("a", "b"):
            write_run(tmp_path / "runs" / name, of_step=noisy(1))
        monkeypatch.chdir(tmp_path)
        assert main(["compare", "runs/a", "runs/b"]) == 0
        assert capsys.readouterr().out == "comparison/report.html\ncomparison/report.md\n"
        text = (tmp_path / "comparison/report.md").read_text()
        assert "moe-dist compare runs/a runs/b --output comparison" in text
        with (tmp_path / "comparison/data/loss.csv").open() as file:
            assert len(list(csv.reader(file))) == 1 + 2 * (39 + 4)  # a loss is null
        before = {path: path.read_bytes() for path in (tmp_path / "comparison").rglob("*.*")}
        assert main(["compare", "runs/a", "runs/b"]) == 0
        assert before == {path: path.read_bytes() for path in (tmp_path / "comparison").rglob("*.*")}

    def test_mistakes_are_one_line_each(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_run(tmp_path / "a")
        write_run(tmp_path / "empty", 0)
        (write_run(tmp_path / "early") / "metrics.jsonl").unlink()
        (tmp_path / "folder").mkdir()
        for args, said in {
            (): "the following arguments are required: RUN",
            ("folder",): "folder is not the folder of a run, it holds no config.yaml: give root/NAME",
            ("missing",): "missing is not the folder of a run",
            ("early",): "early has no metrics.jsonl yet: wait for the run's first step, or leave it out",
            ("a", "empty"): "empty/metrics.jsonl has no step that can be read yet",
            ("a", "./a"): "a is named twice; name each run once",
            tuple(f"r{i}" for i in range(17)): "17 runs are too many for one page, which shows 16; leave some out",
        }.items():
            assert main(["compare", *args]) == 2
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1 and error.startswith("moe-dist: ")
        assert not (tmp_path / "comparison").exists()


def test_read_run_says_its_folder(tmp_path):
    run = read_run(write_run(tmp_path / "run"), "name")
    assert isinstance(run, RunRecord) and (run.label, run.folder, run.unit) == ("name", tmp_path / "run", "nats/token")
