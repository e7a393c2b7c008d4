"""What differs between training a language model and a classifier: data, model, evaluation. The loop is the same.

`B` batch · `S` sequence
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from moe_dist.config import BatchShape, Config
from moe_dist.config.model import ModelConfig
from moe_dist.data import SequenceSampler
from moe_dist.data.blending import BlendSampler
from moe_dist.data.frequency import Frequencies
from moe_dist.data.tokenizer import Tokenizer
from moe_dist.engine.base import Engine
from moe_dist.models.parameters import ParameterCounts
from moe_dist.models.trainable import Trainable
from moe_dist.parallel.mesh import Mesh
from moe_dist.step import DocumentEnds
from moe_dist.train.record.run_folder import RunFolder

Phase = Literal["dropless", "eval"]


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

    def evaluate(self, engine: Engine, shape: BatchShape, step: int) -> dict[str, Any]:
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


def phases(config: Config) -> list[tuple[Phase, str]]:
    """(phase, suffix of its metrics) of an evaluation: without dropping, and capped if eval_capacity_factor is set."""
    capped: list[tuple[Phase, str]] = [("eval", "_capped")]
    layers = config.model.moe_sections
    return [("dropless", ""), *(capped if any(moe.eval_capacity_factor is not None for moe in layers) else [])]


def device_of(engine: Engine) -> torch.device:
    return next(engine.model.parameters()).device
