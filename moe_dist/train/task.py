"""What differs between training a language model and a classifier: data, model, evaluation. The loop is the same.

`B` batch · `S` sequence · `C` classes
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig
from moe_dist.data import (
    Corpus,
    LabelledCorpus,
    LabelledSplit,
    SequenceSampler,
    bits_per_byte,
    load_corpus,
    load_labelled,
    micro_batch,
    validation_batches,
)
from moe_dist.data.blending import BlendSampler
from moe_dist.data.frequency import Frequencies, token_counts
from moe_dist.data.sampler import in_batches
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.data.tokenizers import BYTES, IN_RUN, save_tokenizer
from moe_dist.data.validation import document_ends, validation_windows
from moe_dist.engine.base import Engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.classifier import Classifier
from moe_dist.models.decoder import Decoder
from moe_dist.models.flops import classifier_flops_per_token, train_flops_per_token
from moe_dist.models.parameters import ParameterCounts, classifier_parameter_counts, parameter_counts
from moe_dist.models.trainable import Trainable
from moe_dist.moe.causality import causality_notes
from moe_dist.moe.learning import learning_notes
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.step import DocumentEnds, StepContext
from moe_dist.train.record.confusion import accuracy, macro_f1, write_confusion
from moe_dist.train.record.progress import short_number
from moe_dist.train.record.run_folder import RunFolder

Phase = Literal["dropless", "eval"]
_BITS = {"byte": "validation_bits_per_byte", "token": "validation_bits_per_token"}


class Task(Protocol):
    """model: the configured one, completed by what the data says. digest: of all data. tokenizer: which one, or its
    digest.

    num_places, width: what the sampler takes as the number of tokens and the length of a sequence; a place is where a
    sequence starts. real_share: share of a batch's tokens that are no padding. frequencies: of the
    training split's tokens. text_tokenizer: what the model's ids mean as text; None where nobody knows, or asks.
    ends: what a forward pass does at the ends of documents.
    """

    model: ModelConfig
    digest: str
    tokenizer: str
    num_places: int
    width: int
    real_share: float
    frequencies: Frequencies
    text_tokenizer: Tokenizer | None
    ends: DocumentEnds | None

    def sampler(self, global_batch: int, seed: int) -> SequenceSampler | BlendSampler:
        """The places of each step."""

    def build(self, model: ModelConfig, mesh: Mesh) -> Trainable:
        """The model on this rank. model: with its backends resolved."""

    def batch(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens [B, S] and targets of the training split."""

    def evaluate(self, engine: Engine, shape: BatchShape, step: int) -> dict[str, float]:
        """On the validation split, for metrics.jsonl; every rank must call."""

    def finish(
        self, engine: Engine, shape: BatchShape, step: int, folder: RunFolder, say: Callable[[str], None]
    ) -> dict[str, float]:
        """The last step's extra, after `evaluate`; every rank must call. say: takes a line for the person who
        watches."""

    def documents(self, places: np.ndarray) -> int:
        """How many documents (texts) the training sequences at these places touch, each counted once."""

    def prepare(self, folder: RunFolder) -> None:
        """What the run folder must hold of the data. Rank 0 alone."""

    def flops_per_token(self, model: ModelConfig) -> float:
        """Of training, forward and backward."""

    def parameter_counts(self, model: ModelConfig) -> ParameterCounts:
        """Logical parameters of the model."""

    def describe(self) -> str:
        """The data in a line."""

    def data_record(self) -> dict[str, Any]:
        """The data for environment.json: how much each split has, and what was left out."""

    def notes(self, model: ModelConfig) -> list[str]:
        """What a person should know of this configuration."""

    def summary(self, last: dict[str, Any]) -> dict[str, str]:
        """Names and values of an evaluation, for the table at the end. last: the last record of metrics.jsonl."""


def make_task(config: Config) -> Task:
    """Reads the data. Raises ValueError when it cannot be used."""
    return Classification(config) if config.task == "classification" else LanguageModelling(config)


def phases(config: Config) -> list[tuple[Phase, str]]:
    """(phase, suffix of its metrics) of an evaluation: without dropping, and capped if eval_capacity_factor is set."""
    capped: list[tuple[Phase, str]] = [("eval", "_capped")]
    layers = (config.model.moe, config.model.attention.moe)
    return [("dropless", ""), *(capped if any(moe.eval_capacity_factor is not None for moe in layers) else [])]


class LanguageModelling:
    """A decoder on the next byte, or token, of a corpus."""

    text_tokenizer: Tokenizer | None
    ends: DocumentEnds | None

    real_share = 1.0

    def __init__(self, config: Config) -> None:
        self.config, self.model, self.width = config, config.model, config.train.seq_len
        self.corpus: Corpus = load_corpus(config.data, config.model.vocab_size, config.train.seq_len)
        self.digest, self.num_places = self.corpus.digest, len(self.corpus.train)
        self.frequencies = Frequencies.of(token_counts(self.corpus.train, config.model.vocab_size))
        self.text_tokenizer = found = self.corpus.tokenizer
        self.tokenizer = (
            "that of the indexed files" if found is None else BYTES if found.kind == BYTES else found.digest
        )
        if config.run.sample_tokens and found is None:
            raise ValueError(
                f"run.sample_tokens={config.run.sample_tokens} asks for text, but nothing tells what the ids of "
                f"{self.corpus.name} mean: name the tokenizer in data.tokenizer, or set run.sample_tokens to 0"
            )
        self.ends = document_ends(config.data, found)
        sizes_V = None if found is None or self.corpus.unit == "byte" else found.bytes_per_token()
        self._bytes_V = None if sizes_V is None else np.pad(sizes_V, (0, max(0, self.model.vocab_size - len(sizes_V))))

    def sampler(self, global_batch: int, seed: int) -> SequenceSampler | BlendSampler:
        blend, lengths = list(self.config.data.blend.values()), self.corpus.lengths
        if not blend or lengths is None:
            return SequenceSampler(self.num_places, self.width, global_batch, seed)
        return BlendSampler(lengths[0], blend, self.width, global_batch, seed)

    def build(self, model: ModelConfig, mesh: Mesh) -> Decoder:
        return Decoder(model, mesh, self.config.train.seed)

    def batch(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        return micro_batch(self.corpus.train, places, self.width)

    def documents(self, places: np.ndarray) -> int:
        first_N, last_N = (self.corpus.document_of(places + offset) for offset in (0, self.width - 1))
        touched = [np.arange(first, last + 1) for first, last in zip(first_N, last_N, strict=True)]
        return len(np.unique(np.concatenate(touched)))

    def evaluate(self, engine: Engine, shape: BatchShape, step: int) -> dict[str, float]:
        record = {}
        for phase, suffix in phases(self.config):
            loss, bytes_per_token = self._validation_loss(engine, shape, phase, step)
            record[f"validation_loss{suffix}"] = loss
            if not suffix:
                record[f"validation_bits_per_{self.corpus.unit}"] = bits_per_byte(loss, 1, 1)
            if not suffix and bytes_per_token > 0:
                record["validation_bits_per_byte"] = bits_per_byte(loss, 1, 1) / bytes_per_token
        return record

    def _validation_loss(self, engine: Engine, shape: BatchShape, phase: Phase, step: int) -> tuple[float, float]:
        """(nats per token, bytes of text that a token stands for); the latter 0 where that cannot be told."""
        split, mesh, device = self.corpus.validation, engine.mesh, device_of(engine)
        total = torch.zeros(3, dtype=torch.float64, device=device)
        windows = validation_windows(self.corpus, self.config.data, self.width, self.config.run.eval_sequences)
        batches = in_batches(*windows, shape.micro_batch, mesh.layout.dp, mesh.dp.rank)
        for index, (starts, weights) in enumerate(batches):
            tokens_BS, targets_BS = micro_batch(split, starts, self.width)
            key = RandomKey.of(self.config.train.seed, "validation", index)
            context = StepContext(key, phase, step=step, ends=self.ends)
            losses_BS = engine.evaluate(tokens_BS.to(device), targets_BS.to(device), context, "token_losses")
            weights_B = torch.from_numpy(weights).to(device, torch.float64)
            total[:2] += torch.stack(((losses_BS.double().mean(1) * weights_B).sum(), weights_B.sum()))
            if self._bytes_V is not None:
                total[2] += float((self._bytes_V[targets_BS.numpy()].mean(1) * weights).sum())
        total = all_reduce(total, mesh.dp)
        return float(total[0] / total[1]), float(total[2] / total[1])

    def finish(
        self, engine: Engine, shape: BatchShape, step: int, folder: RunFolder, say: Callable[[str], None]
    ) -> dict[str, float]:
        return {}

    def prepare(self, folder: RunFolder) -> None:
        if self.text_tokenizer is not None:
            save_tokenizer(self.text_tokenizer, folder.path / IN_RUN)

    def flops_per_token(self, model: ModelConfig) -> float:
        return train_flops_per_token(model, self.width)

    def parameter_counts(self, model: ModelConfig) -> ParameterCounts:
        return parameter_counts(model)

    def notes(self, model: ModelConfig) -> list[str]:
        corpus, left_out = self.corpus, self.corpus.left_out.describe()
        large = "is large: parts of it were hashed, and its ids are checked as they are read"
        sampled = [f"{path} {large}" for path in corpus.sampled]
        data = self.config.data
        share = None if data.validation_paths else corpus.share_note(data.validation_fraction)
        of_data = [note for note in (left_out, share) if note]
        return [*of_data, *self._blend_notes(), *sampled, *causality_notes(model), *learning_notes(model)]

    def _blend_notes(self) -> list[str]:
        """The share of each corpus, and how often a run of all steps reads it."""
        blend, train, corpus = self.config.data.blend, self.config.train, self.corpus
        if not blend or corpus.lengths is None:
            return []
        whole, tokens = sum(blend.values()), train.steps * train.global_batch * train.seq_len
        parts = [
            f"{path} {weight / whole:.1%}, read {tokens * weight / whole / length:.2g} times"
            for (path, weight), length in zip(blend.items(), corpus.lengths[0], strict=True)
        ]
        return [f"blend: {'; '.join(parts)}"]

    def summary(self, last: dict[str, Any]) -> dict[str, str]:
        rows = {}
        if "validation_loss" in last:
            bits = (f"{last[name]:.3f} bits/{unit}" for unit, name in _BITS.items() if name in last)
            rows["validation"] = ", ".join([f"{last['validation_loss']:.4f} nats/token", *bits])
        if "validation_loss_capped" in last:
            rows["validation, capped"] = f"{last['validation_loss_capped']:.4f} nats/token"
        return rows

    def data_record(self) -> dict[str, Any]:
        return self.corpus.record() | {"digest": self.digest, "frequencies": self.frequencies.record()}

    def describe(self) -> str:
        corpus = self.corpus
        return (
            f"{corpus.name}: {short_number(len(corpus.train))} train and "
            f"{short_number(len(corpus.validation))} validation {corpus.unit}s "
            f"({corpus.validation_share:.1%}) of {corpus.num_files} {corpus.made_of}"
        )


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


def device_of(engine: Engine) -> torch.device:
    return next(engine.model.parameters()).device


def _rows(part: LabelledSplit, places: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.tokens_NS[places]), torch.from_numpy(part.labels_N[places])
