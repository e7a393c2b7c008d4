"""`SwitchMultiQueryAttention`: switch attention on its own, for models that are not ours.

Legend: B batch, S sequence, T = B * S tokens, D d_model, H heads, P width of a head, E experts.
"""

from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.attention.positions import Positions
from moe_dist.attention.rotary import rotary_table
from moe_dist.attention.switch import SwitchAttention
from moe_dist.config.model import AttentionConfig, HeadSizes, MoEConfig
from moe_dist.config.parse import parse_as
from moe_dist.config.rules.parts import refuse
from moe_dist.config.rules.switch import NOT_OF_ATTENTION, switch_rules
from moe_dist.config.schema import ParallelConfig
from moe_dist.models.backends import resolve_attention, resolve_kernels
from moe_dist.parallel.collectives import own_slice
from moe_dist.parallel.mesh import Mesh, single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.standalone.base import KeepsStep, Layer, Loads, WithAuxLoss, device_of, drawn_seed, refuse_unknown
from moe_dist.standalone.masks import added_by
from moe_dist.step import StepContext


class SwitchMultiQueryAttention(KeepsStep, Layer):
    """Each token goes to top_k of num_experts attention experts, which have num_heads query heads each and an output
    projection; they share one key/value head over the whole causal sequence, with rotary positions (arXiv 2210.05144).

    dropout: of the attention weights, in training. capacity_factor: in training an expert takes at most
    ceil(factor * top_k * tokens / num_experts) tokens; a token that all its experts refuse gets zero. None is dropless,
    and so is evaluation. load_loss_coef: weight of the load-balancing loss. head_dim: width of a head, d_model /
    num_heads if None; of an odd head the last number has no position. seed, mesh, device and what is random: as
    `MixtureOfExperts`; with tp, every rank of a tp group takes the same sequences. options: any field of MoEConfig that
    is not of feed-forwards alone, such as router, drop_policy, z_loss_coef, eval_capacity_factor.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_experts: int,
        dropout: float = 0.0,
        capacity_factor: float | None = 1.0,
        top_k: int = 2,
        load_loss_coef: float = 1e-2,
        *,
        head_dim: int | None = None,
        rope_theta: float = 10000.0,
        seed: int | None = None,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        given, mesh, device = mesh, mesh or single_process_mesh(), device_of(device)
        super().__init__(drawn_seed(seed, mesh.world.size), given)
        self.d_model, self.rope_theta = d_model, rope_theta
        options |= dict(num_experts=num_experts, top_k=top_k, capacity_factor=capacity_factor)
        options |= dict(balance_loss_coef=load_loss_coef)
        attention = _checked(d_model, num_heads, head_dim, dropout, options, mesh)
        sizes = HeadSizes.of(d_model, num_heads, 1, head_dim)
        attention = resolve_attention(attention, sizes, mesh.ep.size, device.type, section="")
        with device:
            self.attention = SwitchAttention(sizes, attention, mesh, 0, resolve_kernels("auto", device.type))
        self.loads = Loads(given)
        initialize(self, self.seed)
        self.to(device)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.loads.forget()

    @torch._disable_dynamo  # as of `MixtureOfExperts`
    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        return_aux_loss: bool = False,
        *,
        token_ids: Tensor | None = None,
        step: int | None = None,
    ) -> Tensor | WithAuxLoss:
        """x: [B, S, D] -> the same; with return_aux_loss (y, the weighted balancing and z-loss), also in evaluation.

        attn_mask: zeros are masked, beside the future. [B, S] are keys; [S, S], [B, S, S] or [B, H, S, S] are queries
        and keys. A query that sees nothing gets zero. token_ids: [B, S], for router=hash.
        """
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be [batch, sequence, d_model={self.d_model}]")
        self.check_wrapping()
        context = self._context(x, token_ids, step)
        positions_S = torch.arange(x.shape[1], device=x.device)[None]
        positions_S = positions_S.double() if x.dtype == torch.float64 else positions_S
        rotary = rotary_table(positions_S, self.attention.head_dim // 2 * 2, self.rope_theta)
        bias = None
        if attn_mask is not None:
            bias = added_by(attn_mask != 0, x.shape[0], self.attention.heads, x.shape[1], x.shape[1])
        positions = Positions(rotary=rotary, bias=bias)
        y_TD, stats = self.attention(x.reshape(-1, self.d_model), x.shape[:2], positions, context)
        self.loads.count([stats.tally], self.training)
        y = y_TD.view(x.shape)
        return WithAuxLoss(y, stats.aux_loss) if return_aux_loss else y

    @property
    def expert_counts(self) -> Tensor:
        """[E]: assignments to each expert in the last forward pass, of all ranks, before dropping; zeros before one."""
        return self.loads.of_last_pass(1, self.attention.config.moe.num_experts)[0]

    def balance(self, group: dist.ProcessGroup | None = None) -> None:
        """Where a bias balances (`balance`), once an optimizer step: as `MixtureOfExperts.balance`."""
        self.loads.balance([self.attention.router], group)

    def extra_repr(self) -> str:
        moe = self.attention.config.moe
        return f"num_experts={moe.num_experts}, top_k={moe.top_k}, heads={self.attention.heads}, router={moe.router}"

    def _context(self, x: Tensor, token_ids: Tensor | None, step: int | None) -> StepContext:
        step = self.pass_of(step)
        tp, ids_T = self.attention.tp, None if token_ids is None else token_ids.reshape(-1)
        return StepContext(
            self.key_of("switch attention", step),
            "train" if self.training else "eval",
            step=step,
            seq_len=x.shape[1],
            token_ids_T=None if ids_T is None else own_slice(ids_T, tp),
        )


def _checked(
    d_model: int, num_heads: int, head_dim: int | None, dropout: float, options: dict[str, Any], mesh: Mesh
) -> AttentionConfig:
    """The options as a section that keeps its rules."""
    known = {field.name for field in fields(MoEConfig)} - NOT_OF_ATTENTION.keys()
    refuse_unknown(options, known)
    sizes = dict(d_model=d_model, num_heads=num_heads, head_dim=head_dim)
    problems = [f"{name}={size} is below 1" for name, size in sizes.items() if size is not None and size < 1]
    if head_dim is None and not problems and d_model % num_heads:
        problems.append(f"d_model={d_model} is not divisible by num_heads={num_heads}: change one, or give head_dim")
    if not 0.0 <= dropout < 1.0:
        problems.append(f"dropout={dropout} is outside 0 <= dropout < 1")
    moe = parse_as(MoEConfig, options, "SwitchMultiQueryAttention")
    # With dropout the plain maths: it draws by global index, the fused kernels as they like.
    attention = AttentionConfig(kind="switch", backend="torch" if dropout else "auto", dropout=dropout, moe=moe)
    parallel = ParallelConfig(ep=mesh.layout.ep, etp=mesh.etp, tp=mesh.tp.size)
    refuse([*problems, *switch_rules(attention, parallel, num_layers=1, section="", inner="")])
    return attention
