"""From a dense feed-forward to an MoE layer whose experts are copies of it (sparse upcycling, Komatsuzaki et al.,
arXiv 2212.05055). `surgery/models.py` does it to a whole decoder.

Equal experts give y = (sum of the token's weights) * dense(x), so the layer starts as the dense one where the weights
sum to 1, whatever the router says:

| router                                      | router starts | routed_scale | as the weights of a token are        |
|---------------------------------------------|---------------|--------------|--------------------------------------|
| softmax, sigmoid with renormalize, top_k > 1 | random       | 1            | divided by their sum                 |
| noisy with top_k > 1; hash                  | random; none  | 1            | softmax over the chosen; 1 / top_k   |
| softmax, not renormalised (Switch: top_k=1) | nearly zero   | E / top_k    | 1 / E each                           |
| sigmoid, not renormalised                   | nearly zero   | 2 / top_k    | 1 / 2 each                           |
| sinkhorn                                    | like sigmoid at top_k = 1, else like softmax                        |

Nearly zero is small enough for the weights to be equal to 1e-6, and not zero, or all tokens would go to expert 0. This
is about the same tokens being kept, hence dropless; what capacity drops is missing, as always.

Legend: E experts, F hidden width, D d_model.
"""

from dataclasses import replace

import torch

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.rules.parts import refuse
from moe_dist.config.schema import ParallelConfig
from moe_dist.kernels.random import RandomKey
from moe_dist.models.backends import resolve_backends
from moe_dist.models.block import moe_layer
from moe_dist.moe.layer import MoE
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize, spec_of

_NEARLY_ZERO = {"softmax": 2e-7, "sigmoid": 6e-7}  # standard deviation of the logits for inputs of unit size


def upcycle(
    dense: FeedForward,
    model: ModelConfig,
    *,
    layer: int = 0,
    noise: float = 0.0,
    seed: int = 0,
    name: str = "",
    preserve: bool = True,
) -> MoE:
    """An MoE layer as `model.moe` says, every expert a copy of `dense`, on one process: its checkpoint loads into any
    layout. Raises ValueError where they do not fit.

    noise: normal noise on each expert's matrices, relative to their standard deviation; 0 keeps the function.
    preserve: set router and routed_scale by the table above, and refuse what cannot be the dense layer; False: a random
    router and the config as it is. seed, name: of the random router, as in `initialize`.
    """
    check_rules(model)
    model = resolve_backends(upcycled_config(model) if preserve else model, ep=1)
    std = spec_of(dense.down.weight).std
    moe = moe_layer(model, layer, single_process_mesh(), std).to(dense.up.weight)
    initialize(moe, seed, name)
    become(moe, dense, noise=noise, seed=seed, name=name, preserve=preserve)
    return moe


@torch.no_grad()
def become(moe: MoE, dense: FeedForward, *, noise: float, seed: int, name: str, preserve: bool) -> None:
    """Make a newly initialised layer's experts copies of `dense`."""
    _check_fit(dense, moe)
    held = {"w_gate": dense.gate, "w_up": dense.up, "w_out": dense.down}
    for matrix, linear in held.items():
        if linear is not None:
            # One matrix for every expert: both are one hidden unit after the other.
            weight_EFD = getattr(moe.experts, matrix).copy_(linear.weight)
            if noise > 0.0:
                key, size = RandomKey.of(seed, name, "upcycle", matrix), noise * linear.weight.double().std()
                index = torch.arange(weight_EFD.numel(), device=weight_EFD.device).view_as(weight_EFD)
                weight_EFD += (size * key.normal(index)).to(weight_EFD.dtype)
    if preserve and not sums_to_one(moe.config):
        for param in moe.router.parameters():
            param.mul_(_NEARLY_ZERO[moe.router.score])  # the logits' standard deviation was 1


def check_rules(model: ModelConfig) -> None:
    refuse(moe_rules(model.moe, ParallelConfig(), d_ff=model.d_ff, num_layers=model.num_layers))


def sums_to_one(moe: MoEConfig) -> bool:
    """Whether the weights of a token sum to 1 for any router weight."""
    if moe.router == "hash":
        return True
    return moe.renormalizes or (moe.top_k > 1 and moe.router == "noisy")


def upcycled_config(model: ModelConfig) -> ModelConfig:
    """`model` with the routed_scale that makes upcycled layers equal to the dense ones."""
    moe = model.moe
    if moe.num_experts < 1:
        raise ValueError(f"num_experts={moe.num_experts}: upcycling makes MoE layers; set moe.num_experts above 0")
    if moe.routed_scale != 1.0:
        raise ValueError(
            f"routed_scale={moe.routed_scale}: upcycling sets it so that the layer stays the same; leave it at 1 "
            "or say preserve=False"
        )
    if moe.num_shared_experts > 0:
        raise ValueError(
            f"num_shared_experts={moe.num_shared_experts} would be added to the dense layer's function; set it to 0 "
            "or say preserve=False"
        )
    if moe.router == "expert_choice" or (moe.router == "noisy" and moe.top_k == 1):
        raise ValueError(
            f"router={moe.router} with top_k={moe.top_k} gives tokens weights of different sums, so no scale makes "
            "the layer equal; use router=softmax or say preserve=False"
        )
    if sums_to_one(moe):
        return model
    half = moe.router == "sigmoid" or (moe.router == "sinkhorn" and moe.top_k == 1)  # sigmoid(0)
    return replace(model, moe=replace(moe, routed_scale=(2 if half else moe.num_experts) / moe.top_k))


def _check_fit(dense: FeedForward, moe: MoE) -> None:
    if dense.mesh.tp.size > 1:
        raise ValueError(
            f"the dense layer is cut over tp={dense.mesh.tp.size}: load its checkpoint on one process first"
        )
    if dense.out_bias is not None:
        raise ValueError(
            "ff_bias=true: upcycling copies matrices, and the dense layer has biases beside them; train a dense model "
            "with model.ff_bias false"
        )
    (width, d_model), held = dense.up.weight.shape, moe.experts
    if held.d_model != d_model or held.activation != dense.activation:
        raise ValueError(
            f"model has d_model={held.d_model}, activation={held.activation}, but the dense layer {d_model}, "
            f"{dense.activation}: upcycle with the config of the dense model"
        )
    if set(held.logical) != {width}:
        raise ValueError(
            f"experts of width {sorted(set(held.logical))} cannot be copies of a dense layer of d_ff={width}; "
            "leave moe.d_ff null"
        )
