"""The task of a decoder: the next byte, or token, of a corpus.

`B` batch · `C` corpora of the validation split · `S` sequence · `N` places · `V` vocabulary
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig
from moe_dist.data import Corpus, SequenceSampler, bits_per_byte, load_corpus, micro_batch
from moe_dist.data.blending import BlendSampler
from moe_dist.data.frequency import Frequencies, token_counts
from moe_dist.data.sampler import in_batches
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.data.tokenizers import BYTES, IN_RUN, save_tokenizer
from moe_dist.data.validation import corpora_apart, document_ends, validation_windows
from moe_dist.engine.base import Engine
from moe_dist.kernels.random import RandomKey
from moe_dist.models.decoder import Decoder
from moe_dist.models.flops import train_flops_per_token
from moe_dist.models.parameters import ParameterCounts, parameter_counts
from moe_dist.moe.causality import causality_notes
from moe_dist.moe.learning import learning_notes
from moe_dist.parallel.collectives import all_reduce
from moe_dist.parallel.mesh import Mesh
from moe_dist.step import DocumentEnds, StepContext
from moe_dist.train.record.progress import losses_by_corpus, short_number
from moe_dist.train.record.run_folder import RunFolder
from moe_dist.train.tasks.task import Phase, device_of, phases

_BITS = {"byte": "validation_bits_per_byte", "token": "validation_bits_per_token"}


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
        self._apart = corpora_apart(self.corpus, config.data)
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

    def evaluate(self, engine: Engine, shape: BatchShape, step: int) -> dict[str, Any]:
        record: dict[str, Any] = {}
        for phase, suffix in phases(self.config):
            sums_C3 = self._validation_sums(engine, shape, phase, step)
            loss, bytes_per_token = (float(sums_C3[:, part].sum() / sums_C3[:, 1].sum()) for part in (0, 2))
            record[f"validation_loss{suffix}"] = loss
            if suffix:
                continue
            record[f"validation_bits_per_{self.corpus.unit}"] = bits_per_byte(loss, 1, 1)
            if bytes_per_token > 0:
                record["validation_bits_per_byte"] = bits_per_byte(loss, 1, 1) / bytes_per_token
            if self._apart:
                named = zip(self._apart, (sums_C3[:, 0] / sums_C3[:, 1]).tolist(), strict=True)
                record["validation_loss_by_corpus"] = {path: nats for (path, _), nats in named}
        return record

    def _validation_sums(self, engine: Engine, shape: BatchShape, phase: Phase, step: int) -> Tensor:
        """[C, 3] float64 of each corpus: sums of weight * nats, of weights, and of weight * bytes of text that a token
        stands for, which is 0 where that cannot be told."""
        split, mesh, device = self.corpus.validation, engine.mesh, device_of(engine)
        ends_C = np.cumsum([length for _, length in self._apart] or [len(split)])
        total_C3 = torch.zeros(len(ends_C), 3, dtype=torch.float64, device=device)
        windows = validation_windows(self.corpus, self.config.data, self.width, self.config.run.eval_sequences)
        batches = in_batches(*windows, shape.micro_batch, mesh.layout.dp, mesh.dp.rank)
        for index, (starts, weights) in enumerate(batches):
            tokens_BS, targets_BS = micro_batch(split, starts, self.width)
            key = RandomKey.of(self.config.train.seed, "validation", index)
            context = StepContext(key, phase, step=step, ends=self.ends)
            losses_BS = engine.evaluate(tokens_BS.to(device), targets_BS.to(device), context, "token_losses")
            of_B = np.searchsorted(ends_C, starts, side="right")
            weights_CB = torch.from_numpy(weights * (of_B == np.arange(len(ends_C))[:, None])).to(device, torch.float64)
            total_C3[:, 0] += (losses_BS.double().mean(1) * weights_CB).sum(1)
            total_C3[:, 1] += weights_CB.sum(1)
            if self._bytes_V is not None:
                bytes_B = torch.from_numpy(self._bytes_V[targets_BS.numpy()].mean(1)).to(device, torch.float64)
                total_C3[:, 2] += (bytes_B * weights_CB).sum(1)
        return all_reduce(total_C3, mesh.dp)

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
        if "validation_loss_by_corpus" in last:
            rows["validation, each"] = losses_by_corpus(last)
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
