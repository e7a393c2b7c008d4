"""What a layer keeps for itself where no trainer does: a seed, and the number of its forward pass."""

from typing import Protocol

import torch


class Counting(Protocol):
    """A layer that counts its forward passes in training."""

    training: bool
    step: int


def drawn_seed(seed: int | None, ranks: int = 1) -> int:
    """`seed`, or one from torch's generator. Raises ValueError where `ranks` would draw different ones."""
    if seed is None:
        if ranks > 1:
            raise ValueError(f"seed=None on {ranks} ranks, which must draw the same weights: give a seed")
        return int(torch.randint(2**63 - 1, (), device="cpu"))
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is outside 0 <= seed < 2**63")
    return seed


def step_of(layer: Counting, given: int | None) -> int:
    """The step of this forward pass: the one given, or the layer's own, which is then counted.

    Raises ValueError where a pass is run again and has not been told which one it was.
    """
    if given is not None:
        return given
    if layer.training and runs_again():
        raise ValueError(
            "this forward pass is run again inside a backward pass (activation checkpointing), and would draw "
            "other random numbers: give forward the same `step` both times"
        )
    step = layer.step
    layer.step += int(layer.training)
    return step


def runs_again() -> bool:
    """Whether this is inside a backward pass: a forward pass there is a recomputation."""
    return bool(torch._C._current_graph_task_id() != -1)
