"""`moe-dist generate`: text from a run's checkpoint, on one process or in any layout."""

import argparse
import os
import sys
import time
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.checkpoint.find import run_config, run_of, whole_checkpoint
from moe_dist.checkpoint.layout import Manifest
from moe_dist.checkpoint.reshard import load_weights
from moe_dist.config import Config, validate
from moe_dist.config.schema import ParallelConfig
from moe_dist.config.values import user_path
from moe_dist.data.tokenizer import ByteTokenizer, GrowingText, Tokenizer
from moe_dist.data.tokenizers import BYTES, IN_RUN, load_tokenizer
from moe_dist.engine.base import compute_dtype
from moe_dist.generate.decode import CachedDecoder, generate
from moe_dist.generate.sampling import Sampling
from moe_dist.models.backends import describe_backends, resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.moe.causality import causality_notes
from moe_dist.parallel.launch import rank_from_environment, said_once, start, stop
from moe_dist.parallel.mesh import create_mesh
from moe_dist.parallel.objects import broadcast_json


def generate_text(own: argparse.Namespace) -> int:
    """Returns the exit code. own: of generate_arguments. Raises ValueError for what a user got wrong."""
    sampling = Sampling(temperature=own.temperature, top_k=own.top_k, top_p=own.top_p)
    rank = rank_from_environment(os.environ)
    device = start(rank, own.device)
    with said_once(rank):
        config = run_config(own.run)
        if config.task != "language_modelling":
            raise ValueError(f"{own.run} was trained for {config.task}: only a language model writes text")
        config = in_layout(config, rank.world, own.ep, own.tp)
        _check_context(own.context, config.model.max_positions)
        prompts = _same_on_all_ranks(own)
        checkpoint = whole_checkpoint(own.run, _say if rank.rank == 0 else _keep_quiet)
        tokenizer = tokenizer_of(checkpoint)
        decoder = load_decoder(checkpoint, config, device)
    show = _Screen(tokenizer, prompts, own.stream) if rank.rank == 0 else None
    if show is not None:
        _describe(checkpoint, config, decoder, rank.world)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    # A cache is as long as the context, so no longer than what it can come to hold.
    needed = max(max(map(len, ids)) + own.max_new_tokens, config.train.seq_len)
    context = min(own.context, needed) if own.context else config.train.seq_len
    began, first, drawn = time.monotonic(), 0.0, 0
    going = set() if tokenizer.kind == BYTES else set(range(len(ids)))  # texts that may come to their end
    for tokens in generate(CachedDecoder(decoder, device), ids, own.max_new_tokens, context, own.seed, sampling):
        first, drawn = first or time.monotonic() - began, drawn + 1
        if show is not None:
            show.add(tokens)
        if tokenizer.end_id in tokens and going:
            going -= {row for row in going if tokens[row] == tokenizer.end_id}
            if not going:
                break
    seconds = time.monotonic() - began
    if show is not None:
        show.end()
        _say(_speed(sum(map(len, ids)), len(prompts), drawn, first, seconds))
    stop()
    return 0


def tokenizer_of(checkpoint: Path) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with. Raises ValueError where it is not there."""
    run, trained = run_of(checkpoint), Manifest.load(checkpoint).run.get("tokenizer", BYTES)
    if trained == BYTES:
        return ByteTokenizer()
    folder = run / IN_RUN
    if not folder.is_dir():
        raise ValueError(
            f"{run} was trained on token ids, and {folder} with their tokenizer is not there: train with data.tokenizer"
        )
    tokenizer = load_tokenizer(str(folder))
    if tokenizer.digest != trained:
        raise ValueError(f"{folder} is not the tokenizer that {checkpoint} was trained with: put that one back")
    return tokenizer


def load_decoder(checkpoint: Path, config: Config, device: torch.device) -> Decoder:
    """The model with the weights of a checkpoint, whose digests have been found right; ready to be asked."""
    parallel = config.parallel
    model = resolve_backends(config.model, parallel.expert_ranks, device.type, config.train.seq_len)
    mesh = create_mesh(parallel.ep, parallel.tp, parallel.etp, sequence_parallel=parallel.sequence_parallel)
    decoder = Decoder(model, mesh, config.train.seed)
    decoder = decoder.to(device, compute_dtype(config.engine.precision)).eval()
    load_weights(checkpoint, decoder, checked=True)
    return decoder


def in_layout(config: Config, world: int, ep: int | None, tp: int | None) -> Config:
    """The trained model in the layout of these ranks; backends are chosen anew, for the device at hand.

    Raises ValueError when they cannot have the layout that was asked for.
    """
    needed = lcm(ep or 1, tp or 1)
    if world == 1 and needed > 1:
        asked = " ".join(f"--{name} {size}" for name, size in (("ep", ep), ("tp", tp)) if size)
        raise ValueError(
            f"{asked} needs {needed} processes or a multiple, and this is one: torchrun --nproc_per_node {needed} "
            f"-m moe_dist.cli generate RUN {asked} ..., or leave it out"
        )
    if world == 1:
        parallel = ParallelConfig()
    else:
        parallel = replace(config.parallel, ep=ep or config.parallel.ep, tp=tp or config.parallel.tp)
        parallel = replace(parallel, sequence_parallel=False, etp=1 if ep else parallel.etp, node_size=None)
    anew: dict[str, Any] = dict(dispatch="auto", experts="auto", wire="ragged", wire_dtype="same", overlap_chunks=1)
    moe, of_attention = replace(config.model.moe, **anew), replace(config.model.attention.moe, **anew)
    attention = replace(config.model.attention, backend="auto", dropout=0.0, moe=of_attention)
    model = replace(config.model, moe=moe, attention=attention, kernels="auto", norm_kernels="same")
    sequences = max(world // parallel.tp, 1)
    train = replace(config.train, global_batch=sequences, micro_batch=None, accumulation=None)
    config = replace(config, model=model, parallel=parallel, train=train)
    validate(config, world)
    return config


def _check_context(context: int | None, max_positions: int | None) -> None:
    if context and max_positions and context > max_positions:
        raise ValueError(
            f"--context {context} is above max_positions={max_positions} of the model, and places past that have no "
            "vector: give at most that many"
        )


def _prompts(own: argparse.Namespace) -> list[str]:
    if bool(own.prompt) == (own.prompts is not None):
        raise ValueError("give the text to continue: either --prompt TEXT, or --prompts FILE with one on each line")
    prompts = own.prompt
    if own.prompts is not None:
        try:
            source = sys.stdin.buffer.read() if own.prompts == "-" else user_path(own.prompts).read_bytes()
        except OSError as error:
            raise ValueError(f"--prompts {own.prompts}: {error.strerror}") from None
        prompts = source.decode("utf-8", errors="surrogateescape").split("\n")
        prompts = [line.removesuffix("\r") for line in prompts]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise ValueError("there is no prompt with text in it: give at least one character to continue")
    if own.stream and len(prompts) > 1:
        raise ValueError(f"--stream shows one text while it grows, but there are {len(prompts)} prompts: leave it out")
    return prompts


def _same_on_all_ranks(own: argparse.Namespace) -> list[str]:
    """Rank 0 reads: standard input is there only once."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = _prompts(own)
        except ValueError as error:
            told[1] = str(error)
    told = broadcast_json(told)
    if told[1] is not None:
        raise ValueError(told[1])
    prompts: list[str] = told[0]
    return prompts


class _Screen:
    """Texts, shown while they grow if there is but one, else at the end: up to the token that ends a text, where there
    is one."""

    def __init__(self, tokenizer: Tokenizer, prompts: list[str], stream: bool) -> None:
        self.tokenizer, self.prompts, self.stream = tokenizer, prompts, stream
        self.texts: list[list[int]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)
        self.growing = GrowingText(tokenizer)
        if stream:
            _write(prompts[0])

    def add(self, tokens: list[int]) -> None:
        for row, token in enumerate(tokens):
            self.ended[row] |= token == self.tokenizer.end_id and self.tokenizer.kind != BYTES
            if self.ended[row]:
                continue
            self.texts[row].append(token)
            if self.stream:
                _write(self.growing.add(token))

    def end(self) -> None:
        if self.stream:
            _write(self.growing.end() + "\n")
            return
        for index, (prompt, ids) in enumerate(zip(self.prompts, self.texts, strict=True), start=1):
            title = f"--- {index}\n" if len(self.prompts) > 1 else ""
            _write(title + prompt + self.tokenizer.decode(ids) + "\n")


def _write(text: str) -> None:
    # A prompt that was not UTF-8 on the command line is shown with replacement characters.
    sys.stdout.write(text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace"))
    sys.stdout.flush()


def _describe(checkpoint: Path, config: Config, decoder: Decoder, world: int) -> None:
    parallel, device = config.parallel, decoder.embedding.weight.device
    backends = ", ".join(f"{k} {v}" for k, v in describe_backends(decoder.config, device.type).items())
    _say(f"{checkpoint}: {world} ranks, ep {parallel.ep}, tp {parallel.tp}, {config.engine.precision}; {backends}")
    for note in causality_notes(config.model):
        _say(f"note: {note}")


def _speed(prompt_tokens: int, rows: int, new_tokens: int, first: float, seconds: float) -> str:
    said = f"{prompt_tokens} prompt tokens and the first new one in {first:.2f}s"
    if new_tokens > 1:
        rate = rows * (new_tokens - 1) / (seconds - first)
        said += f"; {rows * (new_tokens - 1)} more at {rate:.1f} tokens/s ({rate / rows:.1f} a row)"
    return said


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _keep_quiet(line: str) -> None:
    """The other ranks: rank 0 has said it."""
