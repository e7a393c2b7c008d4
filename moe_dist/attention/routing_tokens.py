"""Which tokens of a sequence take part in routed attention: coordinate descent against learned routing tokens.

The sequence is cut into windows of w tokens. Window 0 is not routed. For each later window and each expert, a few of
its queries are chosen, and a few keys among all windows before it (CoLT5, arXiv 2303.09752, section 3.1; CoDA, arXiv
2304.04947). Scores are fp32. A chosen token's weight is 1, with the gradient of its score (straight-through).

Legend: B batch, S sequence, T = B * S, D d_model, E experts, N windows, M = N - 1 windows that are routed, w tokens of
a window, L = M * w tokens that may be keys, C tokens chosen in one window by one expert.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.config.model import RoutedAttentionConfig
from moe_dist.kernels.coordinate_descent.backend import Descent
from moe_dist.kernels.coordinate_descent.schedule import Schedule
from moe_dist.parallel.collectives import copy_to_group
from moe_dist.parallel.mesh import Group
from moe_dist.parallel.sharding import ParamSpec, parameter

_FETCH_RATIO = 9 / 8  # the scores sum to this times the tokens wanted, so that those next to the last one learn too
_COSINE_SCALE = 8.0
_CHOSEN = 0.5  # a query is chosen by a threshold from this score on


@dataclass(frozen=True)
class Queries:
    """rows_EBMC: rows of x_TD. weights_EBMC: 1 with the score's gradient; 0 where the row only fills up. kept_EBMw:
    which tokens of each window were chosen."""

    rows_EBMC: Tensor
    weights_EBMC: Tensor
    kept_EBMw: Tensor


@dataclass(frozen=True)
class KeyValues:
    """The same of keys. live_EBMC: False where the row only fills up; None: all are live."""

    rows_EBMC: Tensor
    weights_EBMC: Tensor
    live_EBMC: Tensor | None


class RoutingTokens(nn.Module):
    """One token for each expert and side; a score is its product with x, or `cosine` times 8, whatever their lengths.

    Under tp every rank chooses the same from the same x, and has a part of the heads' gradients: those of the tokens
    are summed here, that of x where the tensor-parallel region was entered.
    """

    def __init__(self, d_model: int, routed: RoutedAttentionConfig, descend: Descent, tp: Group) -> None:
        super().__init__()
        self.routed = routed
        self.descend = descend
        self.schedule = Schedule()
        self.tp = tp
        self.window = routed.routed_window or routed.local_window
        shape = (routed.num_experts, d_model)
        self.query = parameter(shape, ParamSpec(shape, std=d_model**-0.5))
        self.key_value = parameter(shape, ParamSpec(shape, std=d_model**-0.5))

    def forward(self, x_TD: Tensor, shape: tuple[int, int], queries: int, key_values: int) -> tuple[Queries, KeyValues]:
        """shape: (B, S) with S above the window. queries, key_values: how many each expert chooses for a window."""
        (batch, length), window = shape, self.window
        windows = -(-length // window)
        scores_2EBS = self._scores(x_TD).view(batch, length, 2, -1).permute(2, 3, 0, 1)
        padded_2EBNw = F.pad(scores_2EBS, (0, windows * window - length)).unflatten(-1, (windows, window))
        there_Nw = (torch.arange(windows * window, device=x_TD.device) < length).view(windows, window)
        return (
            self._choose_queries(padded_2EBNw[0], there_Nw, queries, length),
            self._choose_key_values(padded_2EBNw[1, :, :, :-1].flatten(-2), windows - 1, key_values, length),
        )

    def _scores(self, x_TD: Tensor) -> Tensor:
        """[T, 2 E]: of queries, then of keys."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            tokens_ED = torch.cat([copy_to_group(t, self.tp) for t in (self.query, self.key_value)]).to(wide)
            x_TD = x_TD.to(wide)
            if not self.routed.cosine_routing:
                return F.linear(x_TD, tokens_ED)
            # Dividing the few scores, not the many x, by the length of x.
            norm_T1 = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True).clamp(min=1e-12)
            return F.linear(x_TD, F.normalize(tokens_ED, dim=-1) * _COSINE_SCALE) / norm_T1

    def _choose_queries(self, s_EBNw: Tensor, there_Nw: Tensor, wanted: int, length: int) -> Queries:
        there_Mw = there_Nw[1:]
        if wanted >= self.window:
            kept_EBMw = there_Mw.expand_as(s_EBNw[:, :, 1:])
            y_EBMw = torch.ones_like(s_EBNw[:, :, 1:])
        elif self.routed.causal_routing:
            kept_EBMw, y_EBMw = self._by_threshold_of_window_before(s_EBNw, there_Mw, wanted)
        else:
            kept_EBMw, y_EBMw = self._best_of_window(s_EBNw[:, :, 1:], there_Mw, wanted)
        # Those chosen first, in the order of their positions; what comes after them fills up.
        positions_EBMC = (~kept_EBMw).byte().argsort(dim=-1, stable=True)[..., : min(wanted, self.window)]
        live_EBMC = kept_EBMw.gather(-1, positions_EBMC)
        weights_EBMC = straight_through(y_EBMw.gather(-1, positions_EBMC)) * live_EBMC
        starts_M1 = torch.arange(1, s_EBNw.shape[2], device=s_EBNw.device)[:, None] * self.window
        return Queries(_rows(positions_EBMC + starts_M1, length), weights_EBMC, kept_EBMw)

    def _by_threshold_of_window_before(self, s_EBNw: Tensor, there_Mw: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Causal: coordinate descent over the window before gives the threshold; a query whose score under it is at
        least 1/2 is chosen, first come first served, until `wanted` are."""
        k = min(wanted * _FETCH_RATIO, self.window)
        _, a_EBM1 = self.descend(s_EBNw[:, :, :-1], k, None, self.schedule)
        y_EBMw = ((s_EBNw[:, :, 1:] + a_EBM1).clamp(max=0.0) / self.schedule.eps).exp()
        kept_EBMw = (y_EBMw >= _CHOSEN) & there_Mw
        return kept_EBMw & (kept_EBMw.cumsum(-1) <= wanted), y_EBMw

    def _best_of_window(self, s_EBMw: Tensor, there_Mw: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """As published: the `wanted` highest of the window, which a later token can push an earlier one out of."""
        k_M = there_Mw.sum(-1).clamp(max=wanted * _FETCH_RATIO).to(s_EBMw.dtype)
        y_EBMw, _ = self.descend(s_EBMw, k_M.expand(s_EBMw.shape[:-1]), there_Mw, self.schedule)
        best_EBMC = highest(s_EBMw.detach(), there_Mw, wanted)
        return torch.zeros_like(s_EBMw, dtype=torch.bool).scatter(-1, best_EBMC, True) & there_Mw, y_EBMw

    def _choose_key_values(self, s_EBL: Tensor, windows: int, wanted: int, length: int) -> KeyValues:
        """The `wanted` highest of all windows before: complete ones, so this looks at no future."""
        ends_M = torch.arange(1, windows + 1, device=s_EBL.device) * self.window
        before_ML = torch.arange(s_EBL.shape[-1], device=s_EBL.device) < ends_M[:, None]
        s_EBML = s_EBL[:, :, None].expand(-1, -1, windows, -1)
        k_M = ends_M.clamp(max=wanted * _FETCH_RATIO).to(s_EBL.dtype)
        y_EBML, _ = self.descend(s_EBML, k_M.expand(s_EBML.shape[:-1]), before_ML, self.schedule)
        positions_EBMC = highest(s_EBML.detach(), before_ML, wanted)
        weights_EBMC = straight_through(y_EBML.gather(-1, positions_EBMC))
        live_EBMC = None
        if wanted > self.window:  # the first pools hold fewer
            live_EBMC = before_ML.expand_as(s_EBML).gather(-1, positions_EBMC)
            weights_EBMC = weights_EBMC * live_EBMC
        return KeyValues(_rows(positions_EBMC, length), weights_EBMC, live_EBMC)


def highest(s_RN: Tensor, mask_RN: Tensor, wanted: int) -> Tensor:
    """Positions of the `wanted` highest, best first; among equals the earlier, so the length of a row changes nothing.

    That is the order of coordinate descent's scores too, but for those that reached 1, which are all the same there.
    Scores are compared in steps of 2^-16: equal tokens, whose scores differ by what products round, stay equals.
    """
    s_RN = (s_RN * 2**16).round()
    return s_RN.masked_fill(~mask_RN, -torch.inf).argsort(dim=-1, descending=True, stable=True)[..., :wanted]


def straight_through(y: Tensor) -> Tensor:
    """Exactly 1, with the gradient of y."""
    return 1.0 + (y - y.detach())


def _rows(positions_EBMC: Tensor, length: int) -> Tensor:
    """Positions in a sequence -> rows of x_TD, never of another sequence: padding behind the end, which only fills up,
    becomes the last token."""
    first_B = torch.arange(positions_EBMC.shape[1], device=positions_EBMC.device) * length
    return positions_EBMC.clamp(max=length - 1) + first_B[:, None, None]
