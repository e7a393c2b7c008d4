"""`MultiQueryAttention`: the attention layer on its own, for models that are not ours (arXiv 1911.02150, 2305.13245).

Legend: B batch, S new tokens, K keys (past and new), D d_model, H query heads of this rank, G key/value heads of this
rank, P width of a head.
"""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.attention.alibi import alibi_slopes
from moe_dist.attention.kv_cache import KVCache
from moe_dist.attention.rotary import apply_rotary, rotary_table
from moe_dist.config.model import HeadSizes
from moe_dist.kernels.attention.backend import attention, describe_attention
from moe_dist.kernels.attention.pattern import Dropout, PackedSequences, Pattern
from moe_dist.kernels.attention.reference import attend_with_weights
from moe_dist.kernels.random import RandomKey
from moe_dist.parallel.collectives import (
    copy_to_group,
    gather_from_group,
    gather_sequence,
    own_slice,
    reduce_from_group,
    scatter_sequence,
)
from moe_dist.parallel.heads import HeadAssignment
from moe_dist.parallel.mesh import Group
from moe_dist.standalone.base import Layer, device_of, drawn_seed
from moe_dist.standalone.multi_query.inputs import Past, check_bias, check_lengths, check_mask, check_past, extend
from moe_dist.standalone.multi_query.norms import Norm
from moe_dist.standalone.multi_query.options import check_options, check_sizes
from moe_dist.standalone.multi_query.parts import Part, initialize_part, logical_state, qkv_part, sum_shared


class MultiQueryAttention(Layer):
    """softmax(scale * q k^T + bias) v for every query head, all of them on num_kv_heads heads of keys and values.

    attn_impl: `triton` (ours), `flash` (torch's fused attention), `flash_attn` (the package, in half precision on GPUs)
    or `torch` (plain maths, the only one that returns weights); none becomes another silently. clip_qkv: clamps
    queries, keys and values to [-c, c]. qk_ln: then normalises the queries of a token over all heads, and each
    of its keys over head_dim. softmax_scale: head_dim^-0.5 where None. attn_pdrop: dropout of weights in training.
    device: a GPU where None and there is one.

    head_dim: d_model / heads where None. rotary: turns queries and keys by their position (rope_theta: its base).
    alibi: adds -slope * distance. window: only the nearest keys, a query's own position counted. sinks: a learned score
    for each head that takes part in its softmax and has no value. seed: of initial weights and dropout; None draws one.

    Dropout is a function of (seed, step, global row, head, positions), the same under triton and torch; flash draws
    from torch's generator. `step` counts forward passes in training; it is no part of the state dict, so set it when a
    run resumes.

    tp: query heads are cut over this group. Every rank must call, with the same x (under sequence_parallel: with its
    slice [B, S / tp, D], and it gets that of the output), and ends with the gradients of one process for whatever it
    holds. Caches hold the `held_kv_heads` key/value heads that the rank reads. The state dict is that of one process:
    state_dict() puts it together, so every rank must call it, and load_state_dict takes each rank's part of it.
    """

    def __init__(
        self,
        d_model: int,
        heads: int,
        attn_impl: Literal["triton", "flash", "flash_attn", "torch"] = "triton",
        clip_qkv: float | None = None,
        qk_ln: bool = False,
        softmax_scale: float | None = None,
        attn_pdrop: float = 0.0,
        norm_type: str = "low_precision_layernorm",
        fc_type: str = "torch",
        verbose: int = 0,
        device: torch.device | str | None = None,
        *,
        num_kv_heads: int = 1,
        head_dim: int | None = None,
        rotary: bool = False,
        rope_theta: float = 10000.0,
        alibi: bool = False,
        window: int | None = None,
        sinks: bool = False,
        use_bias: bool = True,
        tp: Group | None = None,
        sequence_parallel: bool = False,
        seed: int | None = None,
    ) -> None:
        tp = tp or Group()
        super().__init__(drawn_seed(seed, tp.size))
        self.tp = tp
        self.sequence_parallel = sequence_parallel
        if device is None and torch.get_default_device().type == "cpu" and torch.cuda.is_available():
            device = "cuda"
        device = device_of(device)
        check_sizes(d_model, heads, num_kv_heads, head_dim, self.tp.size)
        check_options(attn_impl, clip_qkv, attn_pdrop, norm_type, fc_type, window, device.type)
        self.d_model = d_model
        self.heads = heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = HeadSizes.of(d_model, heads, num_kv_heads, head_dim).head_dim
        if rotary and self.head_dim % 2:
            raise ValueError(f"rotary turns pairs of numbers, but head_dim={self.head_dim} is odd")
        self.attn_impl = attn_impl
        self.clip_qkv = clip_qkv
        self.qk_ln = qk_ln
        self.attn_pdrop = attn_pdrop
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.rope_theta = rope_theta if rotary else None
        self.alibi = alibi
        self.window = window
        self.attend = attention(attn_impl)

        self.mine = HeadAssignment.of(heads, num_kv_heads, self.tp)
        self.qkv = qkv_part(self.mine, heads, num_kv_heads, self.head_dim)
        width, first = len(self.mine.queries) * self.head_dim, self.mine.queries.start * self.head_dim
        own = range(first, first + width)
        self.out = Part.of(heads * self.head_dim, [(own, own)], dim=1)
        self.Wqkv = nn.Linear(d_model, len(self.qkv.index_N), use_bias, device)
        self.out_proj = nn.Linear(width, d_model, use_bias, device)
        width = heads * self.head_dim
        self.q_ln = Norm(width, norm_type, device, self.tp, cut=True) if qk_ln else None
        self.k_ln = Norm(self.head_dim, norm_type, device, self.tp) if qk_ln else None
        self.sinks = nn.Parameter(torch.zeros(heads, device=device)) if sinks else None
        if self.tp.size > 1:
            logical_state(self.Wqkv, self.tp, weight=self.qkv, **(dict(bias=self.qkv) if use_bias else {}))
            logical_state(self.out_proj, self.tp, weight=self.out)
        if device.type != "meta":
            self.reset_parameters()
        if verbose:
            runs = describe_attention(attn_impl)
            print(f"MultiQueryAttention({self.extra_repr()}) on {device}: attention by {runs}")

    def reset_parameters(self) -> None:
        self.step = 0
        with torch.no_grad():
            for name, linear, part in (("Wqkv", self.Wqkv, self.qkv), ("out_proj", self.out_proj, self.out)):
                initialize_part(linear, part, RandomKey.of(self.seed, name))
            for norm in (self.q_ln, self.k_ln):
                if norm is not None:
                    norm.reset_parameters()
            if self.sinks is not None:
                self.sinks.zero_()

    def forward(
        self,
        x: Tensor,
        past_key_value: Past = None,
        bias: Tensor | None = None,
        attention_mask: Tensor | None = None,
        causal: bool = True,
        needs_weights: bool = False,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        step: int | None = None,
        first_row: int = 0,
    ) -> tuple[Tensor, Tensor | None, Past]:
        """x [B, S, D] -> (output [B, S, D], weights [B, H of all ranks, S, K] where asked for, the cache). Or x [T, D],
        sequences packed one after the other: cu_seqlens, integers [N + 1], are where they start, and then T.

        past_key_value: None keeps nothing (the third result is None), () starts a cache, the pair (k, v) returned
        feeds the next call; or a KVCache, which is filled and returned. What a cache keeps is detached. bias: added to
        the scores, broadcastable to [B, H, S, K]; longer ones are cut to their last S and K, -inf hides a key.
        attention_mask, or mask: [B, K], the past counted, True or 1 where a key may be seen. A query that sees no key
        attends to nothing: its output is the bias of out_proj. step, first_row: of dropout, where a pass is run again
        (activation checkpointing), and the global number of the first row.

        Raises ValueError for what does not fit, before anything is cached.
        """
        self._check(x, needs_weights, 2 if cu_seqlens is not None else 3)
        if cu_seqlens is not None:
            of_rows = dict(past_key_value=past_key_value, bias=bias, attention_mask=attention_mask, mask=mask)
            return self._packed(x, cu_seqlens, of_rows, causal, needs_weights, (step, first_row)), None, None
        if attention_mask is not None and mask is not None:
            raise ValueError("attention_mask and mask are the same thing: give one of them")
        attention_mask = mask if attention_mask is None else attention_mask
        rows, queries = x.shape[0], x.shape[1] * (self.tp.size if self.sequence_parallel else 1)
        past = check_past(past_key_value, rows, self.held_kv_heads, self.head_dim)
        starts_B = past_key_value.starts() if isinstance(past_key_value, KVCache) else None
        pattern = self._pattern(x, bias, attention_mask, causal, starts_B, queries, past + queries, (step, first_row))

        # 1. Project, clip, normalise; then turn, by positions that count the past.
        q_BHSP, k_BGSP, v_BGSP = self._project(self._enter(x))
        if self.rope_theta is not None:
            starts_B = torch.tensor([past], device=x.device) if starts_B is None else starts_B
            positions_BS = starts_B[:, None] + torch.arange(queries, device=x.device)
            q_BHSP, k_BGSP = self._turn(q_BHSP, k_BGSP, positions_BS)
        # 2. Attend to the past and to what is new.
        k_BGKP, v_BGKP, kept = extend(past_key_value, k_BGSP, v_BGSP)
        y_BHSP, weights = self._attend(q_BHSP, k_BGKP, v_BGKP, pattern, needs_weights)
        # 3. Heads become one vector again.
        return self._leave(y_BHSP.transpose(1, 2).flatten(2)), weights, kept

    @property
    def held_kv_heads(self) -> int:
        """Key/value heads of this rank's caches."""
        return len(self.mine.kv_held)

    def extra_repr(self) -> str:
        names = "d_model heads num_kv_heads head_dim attn_impl".split()
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def _packed(
        self,
        x_TD: Tensor,
        cu_seqlens: Tensor,
        of_rows: dict[str, Any],
        causal: bool,
        needs_weights: bool,
        draw: tuple[int | None, int],
    ) -> Tensor:
        from moe_dist.kernels.attention.varlen import varlen

        tokens = len(x_TD) * (self.tp.size if self.sequence_parallel else 1)
        starts_N, longest = check_lengths(cu_seqlens, tokens, of_rows, needs_weights)
        starts_N = starts_N.to(x_TD.device)
        q_BHSP, k_BGSP, v_BGSP = self._project(self._enter(x_TD[None]))
        if self.rope_theta is not None:
            first_T = starts_N[:-1].repeat_interleave(starts_N.diff())
            positions_T = torch.arange(tokens, device=x_TD.device) - first_T
            q_BHSP, k_BGSP = self._turn(q_BHSP, k_BGSP, positions_T[None])
        pattern = self._pattern(x_TD, None, None, causal, None, longest, longest, draw)
        k_BGSP, v_BGSP = self._read(k_BGSP), self._read(v_BGSP)
        q_THP, k_TGP, v_TGP = (t[0].transpose(0, 1) for t in (q_BHSP, k_BGSP, v_BGSP))
        if tokens:
            packed = PackedSequences.same(starts_N, longest)
            q_THP = varlen(self.attn_impl)(q_THP, k_TGP, v_TGP, packed, pattern, self.softmax_scale)
        return self._leave(q_THP.flatten(1)[None])[0]

    def _check(self, x: Tensor, needs_weights: bool, dims: int) -> None:
        if x.dim() != dims or x.shape[-1] != self.d_model:
            wanted = "[batch, tokens, " if dims == 3 else "with cu_seqlens [tokens, "
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be {wanted}d_model={self.d_model}]")
        if needs_weights and self.attn_impl != "torch":
            raise ValueError(
                f"attn_impl='{self.attn_impl}' never has the weights in memory, so it cannot return them: only "
                "attn_impl='torch' can (same state dict)"
            )

    def _pattern(
        self,
        x: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        starts_B: Tensor | None,
        queries: int,
        keys: int,
        draw: tuple[int | None, int],
    ) -> Pattern:
        keys_BS = check_mask(mask, x.shape[0], keys)
        bias = check_bias(bias, x.shape[0], self.heads, queries, keys, starts_B is not None)
        if bias is not None:
            bias = copy_to_group(bias, self.tp)
            bias = bias if bias.shape[1] == 1 else bias[:, self.mine.queries.start : self.mine.queries.stop]
        if starts_B is not None and not causal:  # what lies past a row's end in the cache has no meaning
            filled_BS = torch.arange(keys, device=x.device) < starts_B[:, None] + queries
            keys_BS = filled_BS if keys_BS is None else keys_BS & filled_BS
        slopes_H = None
        if self.alibi:  # made anew, so that a layer in bf16 keeps its distances exact
            wide = torch.promote_types(x.dtype, torch.float32)
            slopes_H = own_slice(alibi_slopes(self.heads, wide, x.device), self.tp)
        sinks_H = None if self.sinks is None else own_slice(copy_to_group(self.sinks, self.tp), self.tp)
        dropout = self._dropout(*draw)
        return Pattern(causal, self.window, starts_B, keys_BS, slopes_H, bias, sinks_H, dropout)

    def _dropout(self, step: int | None, first_row: int) -> Dropout | None:
        if not self.training or self.attn_pdrop == 0.0:
            return None
        step = self.pass_of(step)
        # Whoever cuts heads over tp or names the first row says themselves which rows these are.
        told = self.tp.size > 1 or first_row > 0
        key = RandomKey.of(self.seed, "attention", step) if told else self.key_of("attention", step)
        return Dropout(self.attn_pdrop, key, first_row, self.mine.queries.start, self.heads)

    def _enter(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_sequence(x.transpose(0, 1), self.tp).transpose(0, 1)
        return copy_to_group(x, self.tp)

    def _leave(self, y: Tensor) -> Tensor:
        if self.tp.size == 1:
            out: Tensor = self.out_proj(y)
            return out
        bias: Tensor | None = self.out_proj.bias
        y = F.linear(y, self.out_proj.weight)
        if self.sequence_parallel:
            y = scatter_sequence(y.transpose(0, 1), self.tp).transpose(0, 1)
            bias = None if bias is None else copy_to_group(bias, self.tp)  # each rank sees its own tokens only
        else:
            y = reduce_from_group(y, self.tp)
        return y if bias is None else y + bias.to(y.dtype)

    def _project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> [B, H, S, P] and twice [B, G, S, P], of one dtype: that of the projection."""
        queries, width = len(self.mine.queries) * self.head_dim, self.held_kv_heads * self.head_dim
        if self.tp.size > 1 and self.mine.shared:
            shared = partial(sum_shared, part=self.qkv, first=queries, tp=self.tp)
            bias = None if self.Wqkv.bias is None else shared(self.Wqkv.bias)
            qkv = F.linear(x_BSD, shared(self.Wqkv.weight), bias)
        else:
            qkv = self.Wqkv(x_BSD)
        if self.clip_qkv is not None:
            qkv = qkv.clamp(-self.clip_qkv, self.clip_qkv)
        q, k, v = qkv.split((queries, width, width), dim=-1)
        q = q if self.q_ln is None else self.q_ln(q).to(qkv.dtype)
        k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (k, v))
        k = k if self.k_ln is None else self.k_ln(k).to(qkv.dtype)
        return q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _turn(self, q_BHSP: Tensor, k_BGSP: Tensor, positions_BS: Tensor) -> tuple[Tensor, Tensor]:
        """By positions [1 or B, S]."""
        assert self.rope_theta is not None
        at_BS = positions_BS.double() if q_BHSP.dtype == torch.float64 else positions_BS
        table = rotary_table(at_BS, self.head_dim, self.rope_theta)
        q_BHSP, k_BGSP = (apply_rotary(t.transpose(1, 2), table).transpose(1, 2) for t in (q_BHSP, k_BGSP))
        return q_BHSP, k_BGSP

    def _read(self, x_BGKP: Tensor) -> Tensor:
        """Keys or values such that equally many query heads read each."""
        return x_BGKP if self.mine.reads is None else x_BGKP[:, list(self.mine.reads)]

    def _attend(
        self, q_BHSP: Tensor, k_BGKP: Tensor, v_BGKP: Tensor, pattern: Pattern, needs_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        k_BGKP, v_BGKP = self._read(k_BGKP), self._read(v_BGKP)
        if q_BHSP.numel() == 0:  # no rows or no tokens: kernels need not know
            shape = (len(q_BHSP), self.heads, q_BHSP.shape[2], k_BGKP.shape[2])
            return q_BHSP, q_BHSP.new_zeros(shape) if needs_weights else None
        if not needs_weights:
            return self.attend(q_BHSP, k_BGKP, v_BGKP, pattern, self.softmax_scale), None
        y_BHSP, weights = attend_with_weights(q_BHSP, k_BGKP, v_BGKP, pattern, self.softmax_scale)
        return y_BHSP, gather_from_group(weights.transpose(0, 1), self.tp).transpose(0, 1)
