"""`SwitchClassifier`, also called `Model`: the classifier on its own, for programs that have a training loop.

Legend: B batch, S sequence, C classes.
"""

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.config.model import ModelConfig, MoEConfig
from moe_dist.config.parse import parse_as
from moe_dist.config.rules.moe import moe_rules
from moe_dist.config.rules.parts import refuse
from moe_dist.config.rules.task import encoder_rules
from moe_dist.config.schema import ParallelConfig
from moe_dist.models.backends import resolve_backends
from moe_dist.models.classifier import Classifier
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.standalone.base import KeepsStep, Layer, Loads, device_of, drawn_seed
from moe_dist.step import StepContext
from moe_dist.surgery.layers import add_experts, close_experts, open_experts, remove_experts
from moe_dist.surgery.models import change_experts


class SwitchClassifier(KeepsStep, Layer):
    """Token and position embedding, post-norm encoder blocks with a Switch layer each, mean over tokens, linear head.

    num_experts, embed_dim, ff_dim (hidden width of one expert), vocab_size, dropout_rate: as in the document this came
    from. num_heads: query heads, which share one key/value head. max_len: longest sequence. top_k: experts of a token.
    pad_id: the token that is padding, unless `forward` is given a mask. token_dropout: share of the tokens that
    training takes for padding. capacity_factor: in training an expert takes at most
    ceil(factor * top_k * tokens / num_experts) tokens, padding not counted; None, and evaluation, drop nothing.
    activation: of the experts. seed: of weights and of everything random; None draws one from torch's generator.
    options: any other field of MoEConfig, such as router or balance_loss_coef.

    Random numbers are a function of (seed, step, place in the batch); step counts forward passes in training. Both are
    part of the state dict. Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        num_experts: int,
        embed_dim: int,
        ff_dim: int,
        vocab_size: int,
        dropout_rate: float = 0.1,
        *,
        num_classes: int = 2,
        num_heads: int = 4,
        num_layers: int = 1,
        max_len: int = 256,
        top_k: int = 1,
        pad_id: int = 0,
        token_dropout: float = 0.0,
        capacity_factor: float | None = 1.25,
        activation: Literal["gelu", "relu", "relu2", "swiglu", "geglu", "clamped_swiglu", "gelu_tanh"] = "gelu",
        seed: int | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(drawn_seed(seed))
        device = device_of(device)
        if max_len < 1 or not 0 <= pad_id < vocab_size:
            raise ValueError(f"max_len={max_len} must be 1 or more, and pad_id={pad_id} below vocab_size={vocab_size}")
        options |= dict(num_experts=num_experts, top_k=top_k, capacity_factor=capacity_factor)
        model = ModelConfig(
            vocab_size=vocab_size,
            d_model=embed_dim,
            num_layers=num_layers,
            num_heads=num_heads,
            d_ff=ff_dim,
            activation=activation,
            num_classes=num_classes,
            dropout=dropout_rate,
            token_dropout=token_dropout,
            moe=parse_as(MoEConfig, options, "SwitchClassifier"),
        )
        _check(model)
        self.max_len = max_len
        model = resolve_backends(model, 1, device.type)
        with device:
            self.core = Classifier(model, single_process_mesh(), max_len, self.seed, pad_id)
        self.loads = Loads(None)
        self.to(device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.loads.forget()

    def _initialize(self) -> None:
        initialize(self.core, self.seed)  # by the names that parameters have in a run

    @torch._disable_dynamo  # as of `MixtureOfExperts`
    def forward(self, ids: Tensor, mask: Tensor | None = None, *, step: int | None = None) -> tuple[Tensor, Tensor]:
        """ids: [B, S], S <= max_len -> (logits [B, C], the weighted balancing and z-loss). mask: [B, S], true or 1
        where a token is no padding; None: where it is not pad_id. Raises ValueError for other shapes, and for ids and
        masks of other values."""
        if ids.dim() != 2 or not 1 <= ids.shape[1] <= self.max_len or not len(ids):
            raise ValueError(f"ids have shape {tuple(ids.shape)}, but must be [B, S] with 1 <= S <= {self.max_len}")
        size = self.core.config.vocab_size
        if ids.dtype not in (torch.int32, torch.int64) or not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(
                f"ids are {ids.dtype} from {ids.min()} to {ids.max()}, but must be int32 or int64 with 0 <= id < {size}"
            )
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, but ids {tuple(ids.shape)}: give one for each id")
        if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must be bool, or hold 0 and 1 alone: 1 where a token is no padding")
        mask_BS = ids != self.core.pad_id if mask is None else mask.bool()
        step = self.pass_of(step)
        phase: Literal["train", "eval"] = "train" if self.training else "eval"
        context = StepContext(self.key_of("classifier", step), phase, step=step)
        logits_BC, stats = self.core.classify(ids, mask_BS, context)
        self.loads.count([layer.tally for layer in stats], self.training)
        aux_loss = torch.stack([layer.aux_loss for layer in stats]).sum()
        return logits_BC, aux_loss

    @torch.no_grad()
    def predict(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities [B, C], as in evaluation whatever the mode, which stays as it is."""
        training = self.training
        self.eval()
        try:
            return self(ids, mask)[0].softmax(-1)
        finally:
            self.train(training)

    def balance(self, group: dist.ProcessGroup | None = None) -> None:
        """Where a bias balances (`balance`), once an optimizer step, in every layer: as `MixtureOfExperts.balance`."""
        self.loads.balance([layer.router for layer in self.moe_layers], group)

    @property
    def moe_layers(self) -> list[MoE]:
        """One for each block."""
        return self.core.moe_layers()

    @property
    def num_experts(self) -> int:
        return self.moe_layers[0].config.num_experts

    @property
    def expert_counts(self) -> Tensor:
        """[layers, E]: assignments to each expert in the last forward pass, before dropping; zeros before one."""
        return self.loads.of_last_pass(len(self.moe_layers), self.num_experts)

    def add_experts(self, n: int, init: Literal["clone", "random", "split"] = "clone", **options: Any) -> list[int]:
        """n closed experts in every layer, outputs unchanged until `open_experts`; returns their numbers. Options are
        those of surgery/layers.py. Clones are of the experts most loaded in the last forward pass, unless `sources`
        says otherwise. Rebuild the optimizer after any surgery."""

        def grown(layer: MoE) -> list[int]:
            own = dict(options)
            if init == "clone" and self.loads.last is not None and not {"sources", "load_E"} & own.keys():
                own["load_E"] = self.loads.last[layer.layer]
            if init == "random":
                own = {"seed": self.seed, "name": f"blocks.{layer.layer}.feed_forward."} | own
            return add_experts(layer, n, init, **own)

        added: Any = change_experts(self.core, grown)
        self.loads.forget()
        return list(added[0])

    def open_experts(self, ids: list[int]) -> None:
        """Let tokens go to added experts, in every layer."""
        for layer in self.moe_layers:
            open_experts(layer, ids)

    def close_experts(self, ids: list[int]) -> None:
        """Let no token go to these experts, in any layer."""
        for layer in self.moe_layers:
            close_experts(layer, ids)

    def remove_experts(self, ids: list[int]) -> list[int]:
        """Take experts out of every layer; returns the former numbers of those that stay. Closed ones leave the outputs
        unchanged; one that is open but never chosen has a share of the router's softmax, which goes to the others."""
        stay: Any = change_experts(self.core, lambda layer: remove_experts(layer, ids))
        self.loads.forget()
        return list(stay[0])


Model = SwitchClassifier


def _check(model: ModelConfig) -> None:
    """The rules of the layers, in one ValueError."""
    sizes = ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads")
    problems = [f"{name}={getattr(model, name)} is below 1" for name in sizes if getattr(model, name) < 1]
    if model.moe.num_experts < 1:
        problems.append(f"num_experts={model.moe.num_experts} is below 1")
    if model.num_heads >= 1 and model.d_model % model.num_heads:
        problems.append(
            f"embed_dim={model.d_model} is not divisible by num_heads={model.num_heads}; change one of them"
        )
    if model.moe.layer_count(model.num_layers) < model.num_layers or model.moe.d_ff is not None:
        problems.append("every block has an MoE layer of width ff_dim: leave out every, first and d_ff")
    alone = ParallelConfig()
    problems += moe_rules(model.moe, alone, d_ff=model.d_ff, num_layers=model.num_layers, section="")
    refuse([*problems, *encoder_rules(model, alone, experts="")])
