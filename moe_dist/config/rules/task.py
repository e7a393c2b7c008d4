"""The rules of the task and its data: `validate` asks for all of them."""

import os
from collections.abc import Iterator

from moe_dist.config.model import AttentionConfig, ModelConfig
from moe_dist.config.rules.parts import at_least, at_most, key, share, shown, unused
from moe_dist.config.schema import Config, DataConfig, ParallelConfig
from moe_dist.config.values import index_prefix

_BYTES = 256
_MOST_SUBWORDS = 2**20  # that a tokenizer is trained for
_OF_DECODERS = (
    "kind position rotary_share rope_scaling qkv_bias out_bias clip_qkv qk_ln qk_norm window score_multiplier sinks "
    "dropout"
).split()
_OF_MODELS = "embedding_multiplier residual_multiplier logits_scaling norm ff_bias block max_positions".split()
_MOST_WEIGHT = 1e12
SMALLEST_SHARE = 1e-4
"""Of a blend: a hundred sequences in a million, so that a whole number of them is 1% from it at most."""
_LABELLED = ("jsonl", "csv")


def task_rules(config: Config) -> Iterator[str]:
    yield from _paths_rules(config.data)
    yield from at_least(1, config.data, "data", "block_lines")
    yield from at_most(config.data, "data", block_lines=1_000_000)
    yield from unused(config.data, "data", {"text_key": ("kind", "jsonl csv"), "label_key": ("kind", "jsonl csv")})
    yield from unused(config.data, "data", {"block_lines": ("kind", "stdlib")})
    yield from unused(config.data, "data", {"blend": ("kind", "indexed"), "validation_paths": ("kind", "indexed")})
    yield from (_classification if config.task == "classification" else _language_modelling)(config)


def encoder_rules(model: ModelConfig, parallel: ParallelConfig, experts: str = "model.moe") -> Iterator[str]:
    """What the classifier's layers cannot do, or what means nothing to them.

    experts: where the fields of `model.moe` stand.
    """
    moe, plain = model.moe, AttentionConfig()
    yield from at_least(2, model, "model", "num_classes")
    yield from share(model, "model", "dropout token_dropout")
    for name in _OF_DECODERS:
        value, only = getattr(model.attention, name), getattr(plain, name)
        if value != only:
            yield f"attention.{name}={shown(value)} is of language models; set model.attention.{name} to {shown(only)}"
    for name in _OF_MODELS:
        value, only = getattr(model, name), getattr(ModelConfig(), name)
        if value != only:
            yield f"{name}={shown(value)} is of language models; set model.{name} to {shown(only)}"
    if model.recompute == "block":
        yield "recompute=block is of language models; set model.recompute to none or activation"
    if parallel.sequence_parallel:
        yield "sequence_parallel=true is of language models; set parallel.sequence_parallel to false"
    if moe.num_experts == 0:
        return
    if moe.router in ("noisy", "sinkhorn"):
        yield f"router={moe.router} counts padding as tokens; set {key(experts, 'router')} to softmax, sigmoid or hash"
    for name in ("balance_scope", "capacity_scope"):
        value = getattr(moe, name)
        if value != "global":
            yield f"{name}={value} counts padding as tokens; set {key(experts, name)} to global"


def _classification(config: Config) -> Iterator[str]:
    data = config.data
    yield from encoder_rules(config.model, config.parallel)
    if data.kind in ("text", "indexed"):
        yield f"data.kind {data.kind} has no labels for task=classification; set data.kind to jsonl, csv or stdlib"
    for name in ("mask_documents", "reset_positions"):
        if getattr(data, name):
            yield f"{name}=true is of language models; set data.{name} to false"
    for name in ("tokenizer", "end_of_text"):
        if getattr(data, name) is not None:
            yield f"{name}={getattr(data, name)} is of language models; set data.{name} to null"
    if config.run.sample_tokens > 0:
        yield f"sample_tokens={config.run.sample_tokens} needs a language model; set run.sample_tokens to 0"
    yield from at_least(3, config.model, "model", "vocab_size")
    yield from at_most(config.model, "model", vocab_size=_MOST_SUBWORDS)
    held_out = data.validation_fraction + data.test_fraction
    if not 0 < data.test_fraction < 1 or held_out >= 1:
        yield (
            f"test_fraction={data.test_fraction} must be above 0, and with validation_fraction="
            f"{data.validation_fraction} below 1; change data.test_fraction"
        )


def _language_modelling(config: Config) -> Iterator[str]:
    data, model = config.data, config.model
    if data.end_of_text is not None and data.tokenizer is None:
        yield f"end_of_text={data.end_of_text} needs data.tokenizer, which is null; set data.end_of_text to null"
    if data.kind != "indexed" and data.tokenizer is None and 1 <= model.vocab_size < _BYTES:
        yield f"vocab_size={model.vocab_size} is below {_BYTES}; {data.kind} is read as bytes: raise model.vocab_size"
    for name in ("mask_documents", "reset_positions"):
        if getattr(data, name) and model.attention.kind == "routed":
            yield f"{name}=true needs attention.kind multi_query or switch, not routed; set data.{name} to false"
    if data.reset_positions and model.attention.position not in ("rotary", "learned"):
        yield (
            f"reset_positions=true needs rotary or learned ones, not attention.position={model.attention.position}; "
            "set data.reset_positions to false"
        )
    if model.num_classes is not None:
        yield f"num_classes={model.num_classes} is of task=classification; set model.num_classes to null"
    for name in ("dropout", "token_dropout"):
        if getattr(model, name) != 0.0:
            yield f"{name}={getattr(model, name)} is of task=classification; set model.{name} to 0"
    for name in ("test_fraction", "block_lines", "label_key"):
        value, default = getattr(data, name), getattr(DataConfig(), name)
        if value != default:
            yield f"{name}={value} is of task=classification; set data.{name} to {default}"


def _paths_rules(data: DataConfig) -> Iterator[str]:
    if data.kind == "indexed":
        yield from _indexed_rules(data)
    elif data.kind != "stdlib" and not data.paths:
        what = "files" if data.kind in _LABELLED else "files or folders"
        yield f"data.kind {data.kind} needs paths; name {what} in data.paths, or set data.kind to stdlib"
    if data.kind == "stdlib" and data.paths:
        yield f"data.kind stdlib takes no paths, got {data.paths}; set data.kind to text or clear data.paths"
    if not 0 < data.validation_fraction < 1:
        yield (
            f"validation_fraction={data.validation_fraction} is outside 0 < validation_fraction < 1; "
            "change data.validation_fraction"
        )


def _prefix(path: str) -> str:
    """Of PREFIX.bin and PREFIX.idx, one for all ways to write it but links."""
    return os.path.abspath(os.path.expanduser(index_prefix(path)))


def _indexed_rules(data: DataConfig) -> Iterator[str]:
    if not data.paths and not data.blend:
        yield "data.kind indexed needs paths; name PREFIX of PREFIX.bin and PREFIX.idx in data.paths or data.blend"
    if data.paths and data.blend:
        yield f"data.blend names corpora with weights, and data.paths names {data.paths} without; clear one of them"
    for path, weight in data.blend.items():
        if not 0 < weight <= _MOST_WEIGHT:
            yield f"blend[{path}]={weight} is outside 0 < weight <= {_MOST_WEIGHT:g}; change data.blend"
    if data.blend and min(data.blend.values()) > 0:
        path = min(data.blend, key=lambda path: data.blend[path])
        share = data.blend[path] / sum(data.blend.values())
        if share < SMALLEST_SHARE:
            yield (
                f"blend[{path}]={data.blend[path]} is a share of {share:.2g}, below {SMALLEST_SHARE:g}, "
                f"which is not kept exactly enough; raise data.blend[{path}], or leave it out"
            )
    trained_on = {_prefix(path) for path in (*data.paths, *data.blend)}
    both = [path for path in data.validation_paths if _prefix(path) in trained_on]
    if both:
        yield f"validation_paths names {both[0]}, which is trained on; take it out of one of them"
    if data.validation_paths and data.validation_fraction != DataConfig().validation_fraction:
        yield (
            f"validation_fraction={data.validation_fraction} means nothing where data.validation_paths names "
            "what is held out; leave it out"
        )
