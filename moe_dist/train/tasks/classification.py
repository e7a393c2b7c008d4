"""The task of a classifier: the label of a text.

`B` batch · `S` sequence · `N` texts · `C` classes
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig
from moe_dist.data import LabelledCorpus, LabelledSplit, SequenceSampler, load_labelled, validation_batches
from moe_dist.data.frequency import Frequencies
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.engine.base import Engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.classifier import Classifier
from moe_dist.models.flops import classifier_flops_per_token
from moe_dist.models.parameters import ParameterCounts, classifier_parameter_counts
from moe_dist.moe.learning import learning_notes
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.step import DocumentEnds, StepContext
from moe_dist.train.record.confusion import accuracy, macro_f1, write_confusion
from moe_dist.train.record.run_folder import RunFolder
from moe_dist.train.tasks.task import Phase, device_of, phases


class Classification:
    """An encoder on the label of a text."""

    width = 1  # a sequence is one text, and a place its number
    text_tokenizer: Tokenizer | None = None
    ends: DocumentEnds | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.corpus: LabelledCorpus = load_labelled(config.data, config.model.vocab_size, config.train.seq_len)
        classes = len(self.corpus.labels)
        if config.model.num_classes not in (None, classes):
            raise ValueError(
                f"num_classes={config.model.num_classes}, but {self.corpus.name} has {classes} labels: "
                "set model.num_classes to null"
            )
        self.model, self.digest = replace(config.model, num_classes=classes), self.corpus.digest
        self.tokenizer = hashlib.sha256(self.corpus.subwords.dumps().encode()).hexdigest()
        # The sampler's windows are one token and its target wide, so that its last token starts none.
        self.num_places = len(self.corpus.train.labels_N) + 1
        self.real_share = float((self.corpus.train.tokens_NS != 0).mean())
        counts_V = np.bincount(self.corpus.train.tokens_NS.flatten(), minlength=config.model.vocab_size)
        counts_V[0] = 0  # padding
        self.frequencies = Frequencies.of(counts_V)

    def sampler(self, global_batch: int, seed: int) -> SequenceSampler:
        return SequenceSampler(self.num_places, self.width, global_batch, seed)

    def build(self, model: ModelConfig, mesh: Mesh) -> Classifier:
        return Classifier(model, mesh, self.config.train.seq_len, self.config.train.seed)

    def batch(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        return _rows(self.corpus.train, places)

    def documents(self, places: np.ndarray) -> int:
        return len(np.unique(places))

    def evaluate(self, engine: Engine, shape: BatchShape, step: int) -> dict[str, float]:
        limit = self.config.run.eval_sequences
        return self._measure(engine, shape, step, "validation", self.corpus.validation, limit)[0]

    def finish(
        self, engine: Engine, shape: BatchShape, step: int, folder: RunFolder, say: Callable[[str], None]
    ) -> dict[str, float]:
        record, counts_CC = self._measure(engine, shape, step, "test", self.corpus.test, len(self.corpus.test.labels_N))
        if engine.mesh.rank == 0:
            title = f"{len(self.corpus.test.labels_N)} test texts, {accuracy(counts_CC):.1%} right"
            problem = write_confusion(folder.path, counts_CC, self.corpus.labels, title)
            if problem is not None:
                say(problem)
        return record

    def prepare(self, folder: RunFolder) -> None:
        folder.write_text("tokenizer.json", self.corpus.subwords.dumps())

    def flops_per_token(self, model: ModelConfig) -> float:
        return classifier_flops_per_token(model, self.config.train.seq_len)

    def parameter_counts(self, model: ModelConfig) -> ParameterCounts:
        return classifier_parameter_counts(model, self.config.train.seq_len)

    def notes(self, model: ModelConfig) -> list[str]:
        return list(learning_notes(model))

    def summary(self, last: dict[str, Any]) -> dict[str, str]:
        rows = {}
        for part, suffix in product(("validation", "test"), ("", "_capped")):
            if f"{part}_accuracy{suffix}" in last:
                right, f1, loss = (last[f"{part}_{what}{suffix}"] for what in ("accuracy", "macro_f1", "loss"))
                name = part + suffix.replace("_", ", ")
                rows[name] = f"accuracy {right:.2%}, macro-F1 {f1:.4f}, {loss:.4f} nats/text"
        return rows

    def data_record(self) -> dict[str, Any]:
        return self.corpus.record() | {"digest": self.digest, "frequencies": self.frequencies.record()}

    def describe(self) -> str:
        corpus = self.corpus
        sizes = list(corpus.sizes.values())
        return (
            f"{corpus.name}: {sizes[0]} train, {sizes[1]} validation ({sizes[1] / sum(sizes):.1%}) and {sizes[2]} test "
            f"({sizes[2] / sum(sizes):.1%}) texts of "
            f"{len(corpus.labels)} classes, {corpus.num_copies} copies left out; "
            f"{corpus.subwords.vocab_size} subwords, {1 - self.real_share:.0%} padding, "
            f"{corpus.num_truncated} texts cut at {self.config.train.seq_len}"
        )

    def _measure(
        self, engine: Engine, shape: BatchShape, step: int, name: str, part: LabelledSplit, limit: int
    ) -> tuple[dict[str, float], np.ndarray]:
        """({loss, accuracy, macro_f1 of each phase}, confusion [C, C] without dropping)."""
        record: dict[str, float] = {}
        first = np.empty(0)
        for phase, suffix in phases(self.config):
            loss, counts_CC = self._confusion(engine, shape, step, part, limit, phase)
            record[f"{name}_loss{suffix}"] = loss
            record[f"{name}_accuracy{suffix}"] = accuracy(counts_CC)
            record[f"{name}_macro_f1{suffix}"] = macro_f1(counts_CC)
            first = counts_CC if not suffix else first
        return record, first

    def _confusion(
        self, engine: Engine, shape: BatchShape, step: int, part: LabelledSplit, limit: int, phase: Phase
    ) -> tuple[float, np.ndarray]:
        """(mean loss in nats, counts [C, C])."""
        mesh, device, classes = engine.mesh, device_of(engine), len(self.corpus.labels)
        total = torch.zeros(classes * classes + 1, dtype=torch.float64, device=device)
        batches = validation_batches(len(part.labels_N) + 1, 1, limit, shape.micro_batch, mesh.layout.dp, mesh.dp.rank)
        for index, (places, weights) in enumerate(batches):
            tokens_BS, labels_B = (values.to(device) for values in _rows(part, places))
            context = StepContext(RandomKey.of(self.config.train.seed, "evaluation", index), phase, step=step)
            logits_BC = engine.evaluate(tokens_BS, None, context, "logits").double()
            weights_B = torch.from_numpy(weights).to(device, torch.float64)
            total.index_add_(0, labels_B * classes + logits_BC.argmax(1), weights_B)
            total[-1] += (F.cross_entropy(logits_BC, labels_B, reduction="none") * weights_B).sum()
        values = all_reduce(total, mesh.dp).cpu().numpy()
        counts_CC = values[:-1].round().astype(np.int64).reshape(classes, classes)
        return float(values[-1] / counts_CC.sum()), counts_CC


def _rows(part: LabelledSplit, places: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.tokens_NS[places]), torch.from_numpy(part.labels_N[places])
