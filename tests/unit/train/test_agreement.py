from dataclasses import replace
from pathlib import Path

import pytest

from moe_dist.config import Config
from moe_dist.config.schema import EngineConfig, OptimConfig, TrainConfig
from moe_dist.train import agreement
from moe_dist.train.agreement import differences, source_digest, start_of


def test_what_differs_is_named_with_its_ranks() -> None:
    base = Config()
    other = replace(base, optim=OptimConfig(lr=0.5, weight_decay=0.0), train=TrainConfig(seed=7))
    bf16 = replace(base, engine=EngineConfig(precision="bf16"))
    assert differences([start_of(base)] * 3) == []
    assert differences([start_of(config) for config in (base, other, bf16, other)]) == [
        'engine.precision is "fp32" on ranks 0, 1 and 3, "bf16" on rank 2',
        "optim.lr is 0.001 on ranks 0 and 2, 0.5 on ranks 1 and 3",
        "optim.weight_decay is 0.1 on ranks 0 and 2, 0.0 on ranks 1 and 3",
        "train.seed is 0 on ranks 0 and 2, 7 on ranks 1 and 3",
    ]
    many = [start_of(base)] * 6 + [start_of(other)]
    assert differences(many)[0] == "optim.lr is 0.001 on ranks 0, 1 and 4 more, 0.5 on rank 6"


def test_packages_and_sources_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = start_of(Config())
    assert mine["torch"][0].isdigit() and mine["the source of moe_dist"] == source_digest()
    copy = tmp_path / "moe_dist"
    copy.mkdir()
    (copy / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(agreement.moe_dist, "__file__", str(copy / "__init__.py"))
    before = source_digest()
    (copy / "__init__.py").write_text("a = 2\n")
    assert source_digest() != before != mine["the source of moe_dist"]
