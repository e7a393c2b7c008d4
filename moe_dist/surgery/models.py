"""A dense decoder becomes a Mixture-of-Experts decoder, and whole decoders change their experts.

`surgery/upcycle.py` and `surgery/layers.py` do it to one layer and say what stays the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch

from moe_dist.config.model import MoEConfig
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.models.trainable import Trainable
from moe_dist.moe.layer import MoE
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import logical_parameters
from moe_dist.surgery.layers import split_experts
from moe_dist.surgery.upcycle import become, check_rules, upcycled_config


def upcycle_decoder(
    decoder: Decoder,
    moe: MoEConfig,
    layers: Sequence[int] | None = None,
    *,
    noise: float = 0.0,
    seed: int = 0,
    preserve: bool = True,
    granularity: int = 1,
) -> Decoder:
    """A new decoder with the weights of the dense `decoder`, in which the layers of `moe.every`, or `layers`, are MoE
    layers whose experts are copies of the dense feed-forward. Dropless it computes the same, see surgery/upcycle.py.

    layers: counted from 0; a model has MoE on every nth layer, so they must be n-1, 2n-1, ... seed: of the new routers.
    granularity: narrower experts that a copy is cut into, which are chosen together at first (He et al., arXiv
    2410.07524); num_experts and top_k of `moe` count these.
    """
    model = decoder.config
    if model.moe.num_experts > 0:
        raise ValueError(f"the decoder has MoE layers of {model.moe.num_experts} experts: upcycle a dense one")
    if decoder.mesh.tp.size > 1:
        raise ValueError(f"the decoder is cut over tp={decoder.mesh.tp.size}: load its checkpoint on one process first")
    if layers is not None:
        moe = replace(moe, first=None, every=_every(layers, model.num_layers))
    wanted = replace(model, moe=before_cutting(moe, granularity))
    check_rules(wanted)
    wanted = resolve_backends(upcycled_config(wanted) if preserve else wanted, ep=1)
    new = Decoder(wanted, single_process_mesh(), seed=seed).to(decoder.embedding.weight)
    for index, (block, before) in enumerate(zip(new.blocks, decoder.blocks, strict=True)):
        layer, dense, name = block.feed_forward, before.feed_forward, f"blocks.{index}.feed_forward."
        if isinstance(layer, MoE):
            assert isinstance(dense, FeedForward), "a decoder without experts has dense layers only"
            become(layer, dense, noise=noise, seed=seed, name=name, preserve=preserve)
    old = dict(decoder.named_parameters())
    with torch.no_grad():
        for name, param, _ in logical_parameters(new):
            if name in old:
                param.copy_(old[name])
    if granularity > 1:
        change_experts(new, lambda layer: split_experts(layer, granularity))
    return new.train(decoder.training)


def before_cutting(moe: MoEConfig, granularity: int) -> MoEConfig:
    """Of the layer whose experts, each cut into `granularity`, are those of `moe`."""
    if granularity == 1:
        return moe
    for name in ("num_experts", "top_k"):
        if granularity < 1 or getattr(moe, name) % granularity:
            raise ValueError(
                f"granularity={granularity} must divide num_experts={moe.num_experts} and top_k={moe.top_k}: a token "
                "goes to all parts of a copy, or it would not get the dense layer's output"
            )
    top_k = moe.top_k // granularity
    alone = top_k == 1  # among its parts the weights are divided by their sum, so its own is to be 1
    return replace(
        moe,
        num_experts=moe.num_experts // granularity,
        top_k=top_k,
        renormalize=moe.renormalize or alone,
        renormalize_top_1=alone and moe.renormalize and moe.router in ("softmax", "sigmoid"),
    )


def change_experts(decoder: Trainable, change: Callable[[MoE], object]) -> list[object]:
    """Does `change` to every MoE layer, `lambda layer: add_experts(layer, 2)` say, and makes the config of the decoder,
    or classifier, follow. Returns what it returned. All layers must end with the same config: a model has one. An
    engine that holds the model must be built again.
    """
    layers = [block.feed_forward for block in decoder.blocks if isinstance(block.feed_forward, MoE)]
    if not layers:
        raise ValueError("the decoder has no MoE layer; upcycle_decoder makes some")
    results = [change(layer) for layer in layers]
    configs = [layer.config for layer in layers]
    for layer, config in zip(layers, configs, strict=True):
        unlike = [f.name for f in fields(MoEConfig) if getattr(config, f.name) != getattr(configs[0], f.name)]
        if unlike:
            one, other = (
                ", ".join(f"{name}={getattr(each, name)}" for name in unlike) for each in (configs[0], config)
            )
            raise ValueError(
                f"the layers' configs differ now: {one} in layer {layers[0].layer}, {other} in layer {layer.layer}; a "
                "model has one for all: change as many experts in each, in the same way"
            )
    decoder.config = replace(decoder.config, moe=configs[0])
    return results


def _every(layers: Sequence[int], num_layers: int) -> int:
    """The n of which `layers` are n-1, 2n-1, ..."""
    every = min(layers, default=-1) + 1
    if every < 1 or sorted(layers) != list(range(every - 1, num_layers, every)):
        raise ValueError(
            f"layers={list(layers)} of {num_layers}: MoE layers are every nth, n-1, 2n-1, ... counted from 0; "
            f"for n=2 name {list(range(1, num_layers, 2))}"
        )
    return every
