"""`moe-dist config`: what it prints is what a run has."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from moe_dist.cli import main
from moe_dist.config import Config
from moe_dist.config.load import load_config
from moe_dist.config.model import MoEConfig
from moe_dist.config.parse import field_types
from moe_dist.train.show_config import as_yaml

MINE = """
model: {d_model: 32, num_heads: 4, num_layers: 2, d_ff: 48, moe: {num_experts: 4, capacity_schedule: {10: 2.0}}}
data: {kind: text, paths: [a.txt, b.txt]}
train: {global_batch: 8, accumulation: 2}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINE, encoding="utf-8")
    return path


def shown(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(["config", *map(str, args)]) == 0
    return capsys.readouterr().out


def test_all_of_it_and_what_differs_read_back_the_same(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = mine.with_name("printed.yaml")
    flags = ("--model.moe.top-k", "1")
    for how in ((), ("--diff",)):
        printed.write_text(shown(capsys, mine, *flags, *how), encoding="utf-8")
        assert load_config(printed) == load_config(mine, flags)
    told = yaml.safe_load(printed.read_text(encoding="utf-8"))
    assert told["train"] == {"global_batch": 8, "accumulation": 2}
    assert told["model"]["moe"] == {"num_experts": 4, "top_k": 1, "capacity_schedule": {10: 2.0}}
    assert shown(capsys, "--diff") == "{}\n"
    assert len(load_flat(yaml.safe_load(shown(capsys)))) == len(field_types(Config))


def load_flat(values: dict, home: str = "") -> dict:
    flat: dict = {}
    for key, value in values.items():
        path = f"{home}.{key}".lstrip(".")
        flat |= load_flat(value, path) if isinstance(value, dict) and value else {path: value}
    return flat


def test_what_is_settled_is_settled_by_a_run_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run writes what it has settled into its folder."""
    flags = "--model.d-model 32 --model.num-layers 2 --model.d-ff 48 --model.moe.num-experts 4 --train.seq-len 16 "
    flags += f"--train.global-batch 4 --train.steps 1 --run.eval-sequences 4 --run.root {tmp_path}"
    text = shown(capsys, *flags.split(), "--resolve", "--device", "cpu")
    assert main(["train", *flags.split(), "--device", "cpu"]) == 0
    path = tmp_path / "told.yaml"
    path.write_text(text, encoding="utf-8")
    told, run = load_config(path), load_config(tmp_path / "default" / "config.yaml")
    assert told.model.moe.balance == "loss" and told.model.moe.cpu_products in ("onednn", "mkl")
    moe = replace(told.model.moe, balance="auto", cpu_products="auto")  # a run settles these later, where they are used
    assert replace(told, model=replace(told.model, moe=moe)) == run
    lines = {line.strip() for line in text.splitlines()}
    assert {"dispatch: local  # auto", "micro_batch: null  # 4 on 1 rank", "d_ff: null  # 48"} <= lines


def test_it_is_settled_for_so_many_ranks(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (mine, "--resolve", "--device", "cpu", "--parallel.ep", "2")
    text = shown(capsys, *flags, "--ranks", "2")
    assert "dispatch: all_to_all  # auto" in text and "micro_batch: null  # 2 on 2 ranks" in text
    assert main(["config", *map(str, flags)]) == 2
    said = capsys.readouterr().err
    assert "ep=2 does not divide world size 1" in said and "--ranks W" in said


def test_a_key_is_explained(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, mine, "model.moe.num-experts", "model.moe.overflow", "model.moe.capacity_schedule")
    assert "model.moe.num_experts\n    Experts in each MoE layer." in text
    assert "type     INTEGER\n    default  8\n    here     4\n    flag     --model.moe.num-experts" in text
    assert "values   drop | reroute\n    default  drop\n    here     drop, the default" in text
    assert 'here     {"10": 2.0}' in text
    assert "default  1.25" in shown(capsys, "model.moe.capacity_factor")
    whole = shown(capsys, "model.attention")
    assert whole.startswith("model.attention: Attention of every block.")
    assert "model.attention.kind\n" in whole and "model.attention.routed.num_experts\n" not in whole
    assert "here     local" in shown(capsys, "model.moe.dispatch", "--resolve", "--device", "cpu")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("model.moe.topk",), "model.moe.topk: no such section or key; did you mean model.moe.top_k"),
        (("mine.yaml", "top_k"), "did you mean model.moe.top_k"),
        (("absent.yaml",), "absent.yaml: no such file"),
        (("mine.yaml", "model", "--diff"), "--diff prints and a KEY explains"),
        (("mine.yaml", "--ranks", "2"), "give --resolve too"),
        (("mine.yaml", "--resolve", "--ranks", "0"), "--ranks 0 is below 1"),
        (("mine.yaml", "--model.moe.top-kk", "1"), "did you mean top_k?"),
    ],
)
def test_mistakes(
    args: tuple[str, ...], words: str, mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mine.parent)
    assert main(["config", *args]) == 2
    assert words in capsys.readouterr().err


def test_comments_stand_behind_their_own_keys() -> None:
    values = {"model": {"moe": asdict(MoEConfig())}, "train": {"d_ff": [1, 2]}}
    text = as_yaml(values, {"model.moe.d_ff": "a note", "train.d_ff": "another"})
    assert text.count("#") == 2
    assert "    d_ff: null  # a note\n" in text and "  d_ff:  # another\n" in text
    assert yaml.safe_load(text)["train"] == {"d_ff": [1, 2]}
