"""The gate: the same tokens through Transformers' model and ours, and their logits compared.

Both models are held whole in fp32 for it. Where weights differ in one place, logits differ everywhere; where two
experts have nearly the same score, rounding may choose another one, so single tokens may differ: no more than one in a
hundred is let through.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_dist.checkpoint.reshard import load_weights
from moe_dist.config.model import ModelConfig
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import plainest
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import StepContext

TOLERANCE = 1e-4
"""Of the largest logit."""
_SHARE = 0.01  # of tokens
_ROWS, _LENGTH = 2, 64


def can_compare() -> bool:
    return find_spec("transformers") is not None


def compared(model: ModelConfig, checkpoint: Path, folder: Path, dtype: torch.dtype | None = None) -> str:
    """A line on how far logits are apart. dtype: what the weights were rounded to on their way to `folder`.

    Raises ValueError when they are not the same.
    """
    length = min(_LENGTH, model.max_positions or _LENGTH)
    ids_BS = torch.randint(model.vocab_size, (_ROWS, length), generator=torch.Generator().manual_seed(0))
    expected, found = _of_theirs(folder, ids_BS), _of_ours(model, checkpoint, dtype, ids_BS)
    largest = float(expected.abs().max())
    apart_BS = (found - expected).abs().amax(-1)
    near_BS = apart_BS <= TOLERANCE * max(largest, 1.0)  # what is not finite is near to nothing
    wrong = 1 - float(near_BS.double().mean())
    worst = float(apart_BS.max())
    said = f"logits of {_ROWS} x {length} tokens differ by {worst:.1e} at most, the largest is {largest:.2f}"
    if wrong > _SHARE:
        raise ValueError(f"{said}: {wrong:.0%} of the tokens are apart, so this is not the same model; nothing is kept")
    return said


@torch.no_grad()
def _of_theirs(folder: Path, ids_BS: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    except Exception as error:  # a config.json that it refuses is told in errors of many kinds
        raise ValueError(f"{folder}: Transformers cannot load it: {error}") from error
    model, info = loaded
    for what in ("missing_keys", "mismatched_keys"):
        if info.get(what):
            raise ValueError(f"{folder}: Transformers finds {what.replace('_', ' ')}: {sorted(map(str, info[what]))}")
    if hasattr(model, "set_experts_implementation"):  # grouped products want widths that are multiples of 16 bytes
        model.set_experts_implementation("eager")
    logits: Tensor = model.eval()(input_ids=ids_BS).logits
    return logits.float()


@torch.no_grad()
def _of_ours(model: ModelConfig, checkpoint: Path, dtype: torch.dtype | None, ids_BS: Tensor) -> Tensor:
    decoder = Decoder(plainest(model), single_process_mesh()).eval()
    load_weights(checkpoint, decoder, checked=True)
    if dtype is not None:
        for param in decoder.parameters():
            param.copy_(param.to(dtype))
    logits = decoder(ids_BS, None, StepContext(RandomKey.of("probe"), "dropless"), "logits")
    assert isinstance(logits, Tensor)
    return logits
