"""`moe-dist plan` as a person and as a program see it."""

import json
from pathlib import Path

import pytest

from moe_dist.cli import main
from moe_dist.plan.hardware import Memory, dump_hardware
from tests.unit.plan.toys import toy_hardware

CONFIG = """
model:
  vocab_size: 256
  d_model: 16
  num_layers: 2
  num_heads: 4
  d_ff: 32
  moe: {num_experts: 4, top_k: 2}
train: {seq_len: 8, global_batch: 8, steps: 1}
"""


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """CONFIG, --hardware and where it is."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "toy.yaml").write_text(dump_hardware(toy_hardware(bandwidth=1e9)))
    return [str(tmp_path / "run.yaml"), "--hardware", str(tmp_path / "toy.yaml")]


def test_a_plan_in_words(paths: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", *paths, "--ranks", "4", "--parallel.ep", "2", "--figures", str(tmp_path / "figures")]) == 0
    said = capsys.readouterr().out
    assert "4 ranks: dp 4 x tp 1; experts on ep 2 x etp 1, 2 copies; 2 ranks a node" in said
    assert "64 tokens a step: micro_batch 2 x accumulation 1 x dp 4 x 8; recompute none" in said
    assert "hardware: toy (datasheet)" in said and "with assumed shares" in said
    for word in ("parameters", "optimizer", "margin for skewed routing", "together with recompute=block", "it fits"):
        assert word in said, word
    assert "rows to experts (forward)" in said and "between nodes" in said
    assert "most time:" in said and "to change:" in said and "tokens/s" in said
    assert "\x1b" not in said and max(map(len, said.split("most time:")[0].splitlines())) <= 120
    figures = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert set(figures) == {"memory.svg", "memory.png", "time.svg", "time.png"}
    assert b"a rank has" in figures["memory.svg"] and b"gradient exchange" in figures["time.svg"]


def test_a_classifier_is_planned_in_words_without_recomputed_blocks(
    paths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["--task", "classification", "--model.num-classes", "3", "--data.kind", "csv", "--data.paths", "x"]
    assert main(["plan", *paths, "--ranks", "4", *texts]) == 0
    said = capsys.readouterr().out
    assert "together with recompute=activation" in said and "recompute=block" not in said


def test_a_plan_for_programs(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *paths, "--ranks", "4", "--ranks-per-node", "4", "--json", "--skew", "1.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layout"] == {"world": 4, "dp": 4, "tp": 1, "ep": 1, "etp": 1, "edp": 4, "ranks_per_node": 4}
    assert told["memory"]["total"] == sum(
        value for part, value in told["memory"].items() if part not in ("total", "moment")
    )
    time = told["time"]
    assert time["seconds"] == pytest.approx(sum(time["parts"].values()) - time["hidden"])
    assert time["tokens_per_second"] == pytest.approx(64 / time["seconds"])
    assert all(each["between"] == 0 for each in told["transfers"])
    assert sum(each["seconds"] for each in told["transfers"]) > 0


def test_what_does_not_fit_is_told_with_a_way_out(
    paths: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "toy.yaml").write_text(dump_hardware(toy_hardware(memory=Memory(bytes=1000, bandwidth=1e9))))
    assert main(["plan", *paths, "--ranks", "1"]) == 1
    assert "IT DOES NOT FIT: " in capsys.readouterr().out


def test_a_search_in_words_and_for_programs(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--ranks", "1", "--search", "--top", "2"]
    assert main(["plan", *paths, *more]) == 0
    said = capsys.readouterr().out
    assert "the fastest, as flags:\n  --parallel.ep 1 --parallel.tp 1" in said
    assert main(["plan", *paths, *more, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["ranked"]) == 2 and told["tried"] == 2 + sum(each["count"] for each in told["fell_out"])
    assert told["ranked"][0]["plan"]["time"]["seconds"] <= told["ranked"][1]["plan"]["time"]["seconds"]
    assert f"{told['tried']} layouts; the 2 fastest of those that are valid and fit 1.0 GiB a rank" in said


def test_prices_of_capacity(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *paths, "--ranks", "1", "--capacity", "0.5,null", "--json"]) == 0
    half, whole = json.loads(capsys.readouterr().out)
    assert (half["capacity_factor"], whole["capacity_factor"]) == (0.5, None)
    assert half["flops_at_most"] < whole["flops_at_most"] == whole["plan"]["time"]["flops"]
    assert main(["plan", *paths, "--ranks", "1", "--capacity", "1,null"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "capacity" and [line.split()[0] for line in lines[1:3]] == ["1", "null"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "plan needs --ranks W"),
        (["--ranks", "0"], "--ranks 0 is below 1"),
        (["--ranks", "2", "--hardware", "h300"], "--hardware 'h300' is none of a100, b200, h100, h200"),
        (["--ranks", "2", "--ranks-per-node", "0"], "--ranks-per-node 0 is below 1"),
        (["--ranks", "2", "--skew", "0.5"], "skew=0.5 is below 1, an even share"),
        (["--ranks", "2", "--skew", "nan"], "skew=nan is no finite number"),
        (["--ranks", "2", "--skew", "inf"], "skew=inf is no finite number"),
        (["--ranks", "2", "--search", "--capacity", "1.0"], "--search and --capacity are two questions"),
        (["--ranks", "2", "--search", "--top", "0"], "--top 0 is below 1"),
        (["--ranks", "2", "--capacity", "1.0,much"], "--capacity 'much' is no capacity factor: write 1.0,1.25,null"),
        (["--ranks", "2", "--capacity", "-1"], "--capacity '-1' is no capacity factor"),
        (
            ["--ranks", "1", "--capacity", "1.0", "--model.moe.num-experts", "0"],
            "a dense model has no capacity to price",
        ),
        (["--ranks", "1", "--figures", __file__], "test_plan_command.py is a file: name a folder"),
        (["--ranks", "3"], "global_batch=8 is not divisible by accumulation*dp=1*3=3"),
        (["--ranks", "2", "--engine.precision", "bf16"], "does not say how fast bf16 products are, but fp32"),
        (["--ranks", "2", "--rank-per-node", "2"], "--rank-per-node: unknown flag; did you mean --ranks-per-node?"),
        (["--measure", "x.yaml"], "--measure takes no"),
    ],
)
def test_mistakes_are_one_line_each(
    paths: list[str], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main(["plan", *paths, *more]) == 2
    assert said in capsys.readouterr().err


def test_hardware_is_asked_for(paths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", paths[0], "--ranks", "2"]) == 2
    assert "plan needs --hardware NAME, such as h100" in capsys.readouterr().err
