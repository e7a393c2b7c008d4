"""What a changed model is compared by: its loss on the run's own validation data, and where its tokens go.

One process, the run's own windows, nothing dropped: of a model that nothing changed it is the loss that the run has
said. Loads count assignments, of all windows.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.config import Config
from moe_dist.data import load_corpus, load_labelled, micro_batch, validation_starts
from moe_dist.data.validation import document_ends, validation_windows
from moe_dist.disk import lines_backwards
from moe_dist.kernels.random import RandomKey
from moe_dist.models.decoder import DecoderOutput
from moe_dist.models.trainable import Trainable
from moe_dist.step import StepContext

Loads = dict[int, list[int]]
"""Number of a block -> assignments of each of its experts."""
_TOKENS = 8192  # of a batch, about
_RECORDS = 100


@dataclass(frozen=True)
class Measured:
    """loss: nats per token, of a classifier per text."""

    loss: float
    loads: Loads


class Yardstick:
    """The validation data of a run. Raises ValueError where it cannot be read."""

    def __init__(self, config: Config) -> None:
        self.config = config
        model, train, limit = config.model, config.train, config.run.eval_sequences
        self.ends = None
        if config.task == "classification":
            part = load_labelled(config.data, model.vocab_size, train.seq_len).validation
            starts = validation_starts(len(part.labels_N) + 1, 1, limit)
            self.rows, self.unit = (part.tokens_NS[starts], part.labels_N[starts]), "text"
            self.weights_N = np.ones(len(starts))
        else:
            corpus = load_corpus(config.data, model.vocab_size, train.seq_len)
            self.ends, self.unit = document_ends(config.data, corpus.tokenizer), "token"
            starts, self.weights_N = validation_windows(corpus, config.data, train.seq_len, limit)
            tokens_NS, targets_NS = micro_batch(corpus.validation, starts, train.seq_len)
            self.rows = tokens_NS.numpy(), targets_NS.numpy()

    def describe(self) -> str:
        return f"{len(self.weights_N)} validation {'texts' if self.unit == 'text' else 'sequences'}"

    @torch.no_grad()
    def measure(self, model: Trainable) -> Measured:
        total, weight = 0.0, 0.0
        loads: dict[int, Tensor] = {}
        for index, (rows, each) in enumerate(self._batches()):
            tokens_BS, targets = (torch.from_numpy(values[rows]) for values in self.rows)
            context = StepContext(RandomKey.of(self.config.train.seed, "validation", index), "dropless", ends=self.ends)
            output = model(tokens_BS, targets, context)
            assert isinstance(output, DecoderOutput), "what a model gives that is asked for its loss"
            total += float(output.nll) * each * len(tokens_BS)
            weight += each * len(tokens_BS)
            for stats in output.stats:
                if stats.site.kind == "feed_forward":
                    loads[stats.site.layer] = loads.get(stats.site.layer, 0) + stats.load_E
        return Measured(total / weight, {layer: load_E.tolist() for layer, load_E in loads.items()})

    def _batches(self) -> Iterator[tuple[slice, float]]:
        """(rows, the weight of each of them)."""
        size, first = max(1, _TOKENS // self.config.train.seq_len), 0
        for weight, run in groupby(self.weights_N.tolist()):
            last = first + sum(1 for _ in run)
            for start in range(first, last, size):
                yield slice(start, min(start + size, last)), weight
            first = last


def recorded_loads(run: Path) -> tuple[Loads, int]:
    """(summed over the last steps on record, how many steps that are); ({}, 0) where none is."""
    found: dict[int, Counter[int]] = {}
    steps = 0
    for _, line in lines_backwards(run / "metrics.jsonl"):
        record: dict[str, Any] = json.loads(line)
        rows = [row for row in record.get("layers", []) if row.get("kind", "feed_forward") == "feed_forward"]
        if steps == _RECORDS or not rows:
            break
        steps += 1
        for row in rows:
            found.setdefault(row["layer"], Counter()).update(dict(enumerate(row["load"])))
    return {layer: [load[expert] for expert in sorted(load)] for layer, load in found.items()}, steps
