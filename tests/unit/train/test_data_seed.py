"""train.data_seed changes the order of the data and nothing else; a resumed run must agree on it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moe_dist.checkpoint.layout import Manifest
from moe_dist.config import Config
from moe_dist.data import SequenceSampler
from moe_dist.train.health.signals import StopGuard
from moe_dist.train.loop import Trainer
from moe_dist.train.resume import as_configured
from tests.dist.helpers import tiny_config
from tests.unit.checkpoint.helpers import alone


def config_of(folder: Path, seed: int, data_seed: int | None) -> Config:
    text = folder / "text.txt"
    text.write_text(" ".join(str(number * number) for number in range(1000)))
    return tiny_config(
        data__kind="text",
        data__paths=[str(text)],
        train__steps=2,
        train__seed=seed,
        train__data_seed=data_seed,
        run__root=str(folder),
        run__tensorboard=False,
    )


def trainer_of(folder: Path, seed: int, data_seed: int | None) -> Trainer:
    return Trainer(config_of(folder, seed, data_seed), torch.device("cpu"), Console(quiet=True))


def test_the_order_of_the_data_has_a_seed_of_its_own(tmp_path: Path) -> None:
    with alone():
        together, apart, other = (trainer_of(tmp_path, *seeds) for seeds in ((3, None), (3, 5), (5, None)))

    def order(seed: int) -> list[int]:
        places = together.task.num_places
        return SequenceSampler(places, 16, 8, seed).indices(1).tolist()

    assert [each.sampler.indices(1).tolist() for each in (together, apart, other)] == [order(3), order(5), order(5)]
    weights = [torch.cat([p.flatten() for p in each.engine.model.parameters()]) for each in (together, apart, other)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])
    assert together.key.value == apart.key.value != other.key.value  # of random dropping


def test_a_resumed_run_agrees_on_it(tmp_path: Path) -> None:
    with alone():
        trainer = trainer_of(tmp_path, 3, 5)
        with StopGuard() as guard:
            trainer.run(None, guard)
        newest = trainer.checkpoint_to_continue("must")
        assert newest is not None
        manifest = Manifest.load(newest)
        assert (manifest.data_position.seed, manifest.random_state.seed) == (5, 3)
        for other in (None, 6):
            with pytest.raises(ValueError, match=f"data_seed=5, not {other}.*--override data_seed"):
                trainer_of(tmp_path, 3, other).checkpoint_to_continue("must")
        assert trainer_of(tmp_path, 3, 6).checkpoint_to_continue("must", ["data_seed"]) == newest
    assert as_configured(trainer.folder.path, trainer.config)
    assert not as_configured(trainer.folder.path, config_of(tmp_path, 3, 6))


def test_a_checkpoint_from_before_it_goes_on(tmp_path: Path) -> None:
    """It says nothing of a seed of the data, which then is the seed."""
    with alone():
        trainer = trainer_of(tmp_path, 3, None)
        with StopGuard() as guard:
            trainer.run(None, guard)
        newest = trainer.checkpoint_to_continue("must")
        assert newest is not None
        manifest = Manifest.load(newest)
        assert (manifest.data_position.seed, manifest.random_state.seed) == (3, 3)
        older = replace(manifest, run={name: value for name, value in manifest.run.items() if name != "data_seed"})
        (newest / "manifest.json").write_text(older.dumps())
        assert trainer.checkpoint_to_continue("must") == newest
        assert trainer_of(tmp_path, 3, 3).checkpoint_to_continue("must") == newest  # the same, spelled out
        with pytest.raises(ValueError, match="data_seed=None, not 4"):
            trainer_of(tmp_path, 3, 4).checkpoint_to_continue("must")
