"""Seeing every routing and dropping decision, and telling a real difference from a tie.

The single process writes its scores and decisions on a tape. A layout decides by the tape's scores where its own equal
them within rounding, so a near tie cannot send it down another path; its own choice is compared first, and what would
have flipped is counted and reported. Where scores differ by more, it decides by its own, and the difference shows.

Legend: T tokens, K top_k, E experts.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_dist.step import Site


@dataclass
class Tape:
    """One run's decisions, by (step, micro-step, site), in global token order."""

    scores: dict[tuple[int, int, Site, str], Tensor] = field(default_factory=dict)
    experts: dict[tuple[int, int, Site], Tensor] = field(default_factory=dict)
    kept: dict[tuple[int, int, Site], Tensor] = field(default_factory=dict)

    def dropped(self) -> int:
        return sum(int((~kept).sum()) for kept in self.kept.values())


class Recorder:
    """The reference's witness of one micro-step. What it keeps goes to other ranks, whose device is not this one's."""

    def __init__(self, tape: Tape, step: int, micro: int) -> None:
        self.tape, self.at = tape, (step, micro)

    def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
        self.tape.scores[*self.at, site, what] = scores.to("cpu", copy=True)
        return scores

    def decided(self, site: Site, experts_TK: Tensor, kept_TK: Tensor) -> None:
        self.tape.experts[*self.at, site] = experts_TK.cpu()
        self.tape.kept[*self.at, site] = kept_TK.cpu()


@dataclass
class Differences:
    """What a layout decided otherwise, on this rank."""

    near_ties: int = 0
    routed: int = 0
    dropped: int = 0


class Comparer:
    """A layout's witness of one micro-step on one rank."""

    def __init__(
        self, tape: Tape, step: int, micro: int, rank: int, top_k: int, tolerance: float, found: Differences
    ) -> None:
        self.tape, self.at, self.rank = tape, (step, micro), rank
        self.top_k, self.tolerance, self.found = top_k, tolerance, found

    def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
        reference = self.tape.scores[*self.at, site, what].to(scores.device)
        if what == "router":
            reference = self._own(reference, len(scores))
        close = (scores - reference).abs() <= self.tolerance
        settled = torch.where(close, reference, scores)
        if what == "router":
            own, other = (s.topk(self.top_k, dim=-1).indices for s in (scores, settled))
            self.found.near_ties += int((own != other).any(-1).sum())
        elif self.rank == 0:
            own, other = (s.argsort(descending=True, stable=True) for s in (scores, settled))
            self.found.near_ties += int((own != other).sum())
        return settled

    def decided(self, site: Site, experts_TK: Tensor, kept_TK: Tensor) -> None:
        experts, kept = self.tape.experts[*self.at, site], self.tape.kept[*self.at, site]
        size = len(experts_TK)
        self.found.routed += int((experts_TK.cpu() != self._own(experts, size)).sum())
        self.found.dropped += int((kept_TK.cpu() != self._own(kept, size)).sum())

    def _own(self, whole: Tensor, size: int) -> Tensor:
        return whole[self.rank * size : (self.rank + 1) * size]
