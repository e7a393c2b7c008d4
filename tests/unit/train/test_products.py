"""`cpu_products: measured`: which is fastest is asked once, and a run that goes on does not ask again."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from moe_dist.config import BatchShape
from moe_dist.config.load import dump_config
from moe_dist.kernels.grouped_mm.measure import fastest_turns, seconds_of_products
from moe_dist.kernels.grouped_mm.onednn import CHOICES, Products
from moe_dist.parallel.mesh import Layout
from moe_dist.train import products
from tests.dist.helpers import tiny_config

CPU, SHAPE = torch.device("cpu"), BatchShape(micro_batch=2, accumulation=1, dp=4, global_batch=8, seq_len=64)
SECONDS: dict[Products, float] = {choice: 1.0 / (1 + place) for place, choice in enumerate(CHOICES)}  # the last wins


def test_the_fastest_is_chosen_for_the_rows_of_an_expert(tmp_path: Path) -> None:
    """Two ranks of 128 tokens share four experts, of which every token chooses two: 128 come to each."""
    config, said = tiny_config(run__root=str(tmp_path), model__moe__cpu_products="measured"), list[str]()
    with mock.patch.object(products, "seconds_of_products", return_value=SECONDS) as asked:
        model = products.products_chosen(config.model, config, SHAPE, Layout(4, ep=2), CPU, said.append)
    asked.assert_called_once_with(128, 32, 48, config.model.activation)
    assert model == replace(config.model, moe=replace(config.model.moe, cpu_products=CHOICES[-1]))
    assert len(said) == 1 and f"products  {CHOICES[-1]}: ms of 128 rows" in said[0]


@pytest.mark.parametrize("kept", CHOICES)
def test_a_run_that_goes_on_keeps_what_it_has(kept: Products, tmp_path: Path) -> None:
    config = tiny_config(run__root=str(tmp_path), model__moe__cpu_products="measured")
    before = replace(config, model=replace(config.model, moe=replace(config.model.moe, cpu_products=kept)))
    config.run.folder.mkdir(parents=True)
    (config.run.folder / "config.yaml").write_text(dump_config(before))
    with mock.patch.object(products, "seconds_of_products", side_effect=AssertionError("measured again")):
        model = products.products_chosen(config.model, config, SHAPE, Layout(), CPU, print)
    assert model.moe.cpu_products == kept


def test_where_there_is_nothing_to_measure(tmp_path: Path) -> None:
    config = tiny_config(run__root=str(tmp_path), model__moe__cpu_products="measured")
    with pytest.raises(ValueError, match="cpu_products=measured is of the CPU, which does not train here"):
        products.products_chosen(config.model, config, SHAPE, Layout(), torch.device("cuda"), print)
    named = tiny_config(model__moe__cpu_products=CHOICES[0])
    assert products.products_chosen(named.model, named, SHAPE, Layout(), CPU, print) is named.model


def test_every_choice_takes_its_turn_and_the_first_turn_does_not_count() -> None:
    turns: list[Products] = []

    def turn(choice: Products) -> float:
        """The first turn is the fastest; after it each choice takes longer every time."""
        turns.append(choice)
        number = (len(turns) - 1) // len(CHOICES)
        return 0.0 if number == 0 else float(10 * CHOICES.index(choice) + number)

    seconds = fastest_turns(turn)
    assert [8 * seconds[choice] for choice in CHOICES] == [10 * place + 1 for place in range(len(CHOICES))]
    assert turns == list(CHOICES) * 5


def test_what_is_measured_is_the_experts_loop() -> None:
    found = seconds_of_products(rows=5, d_model=8, d_ff=6, activation="swiglu")
    assert set(found) == set(CHOICES) and all(0 < each < 10 for each in found.values())
