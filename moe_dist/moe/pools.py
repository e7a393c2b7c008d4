"""How many rows experts may take: limits of single experts, and of pools of neighbours that share one.

With `capacity_pool` n, experts 0 to n - 1 are the first pool, n to 2n - 1 the second, and so on; the experts of a pool
take n * C rows together, with C of `capacity.py`. A pool of 1 is an expert with a limit of its own. Of each expert the
first F = ceil(pool_floor * C) rows are sure: no neighbour takes their place. Closed experts (surgery/layers.py) bring
nothing: a pool of n with m open experts takes m * C rows.

| system                                                      | shared by                | who stays                   |
|-------------------------------------------------------------|--------------------------|-----------------------------|
| Switch (arXiv 2101.03961): capacity_pool 1                  | nobody                   | first tokens                |
| Megatron-core 0.19, `moe_expert_rank_capacity_factor`       | the experts of a rank    | drops, raises or runs again |
| OLMo-core 3                                                 | the experts of a rank    | low expert numbers first    |
| marin's EP kernel: pools of G with a floor of C             | G neighbours             | C each, then low numbers    |
| here                                                        | `capacity_pool` of them  | `drop_policy`, `pool_floor` |

A pool is counted in experts, so `num_experts / ep`, which is what a rank's budget is, means the same under another ep.
What a rank receives is at most C times its experts, whatever the pool.

Legend: E experts, n experts of a pool, P = E / n pools, X who has limits of their own: all ranks together, X = 1, or
each of the W ranks.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from moe_dist.config.model import MoEConfig
from moe_dist.step import Site

_DIGITS = 10_000  # of a factor that is named: four decimals


@dataclass(frozen=True)
class Pools:
    """The limits in force, none of which is asked for by the host. size: n. rows_P: what each pool takes.
    sure_E: F of each expert; None where nothing is sure, or all that an expert has is its own (n = 1)."""

    size: int
    rows_P: Tensor
    sure_E: Tensor | None

    @staticmethod
    def of(moe: MoEConfig, floor: tuple[int, int], limit: int, open_e: Tensor | None, device: torch.device) -> "Pools":
        """floor: pool_floor as a ratio of integers. limit: C. open_e: of the experts that take part; None: all."""
        open_E = torch.ones(moe.num_experts, dtype=torch.int64, device=device)
        if open_e is not None:
            open_E = torch.zeros_like(open_E).index_fill(0, open_e, 1)
        sure = -(-floor[0] * limit // floor[1]) if moe.capacity_pool > 1 else 0
        rows_P = limit * open_E.view(-1, moe.capacity_pool).sum(1)
        return Pools(moe.capacity_pool, rows_P, sure * open_E if sure else None)

    def together(self, counts_XE: Tensor) -> Tensor:
        """[..., P], of all the experts of a pool."""
        return counts_XE if self.size == 1 else counts_XE.unflatten(-1, (-1, self.size)).sum(-1)

    def left(self, kept_XE: Tensor) -> Tensor:
        """[X, P] rows that are still free."""
        return self.rows_P - self.together(kept_XE)

    def over(self, asked_XE: Tensor) -> Tensor:
        """[P] rows asked for beyond the limits, of all X."""
        return (self.together(asked_XE) - self.rows_P).clamp(min=0).sum(0)

    def refuse_over(self, asked_XE: Tensor, limit: int, rows_of_one: Fraction, site: Site) -> None:
        """Raises ValueError that names the pool which would have needed the largest factor, if any is asked for more
        than it takes. Waits for the device, once. rows_of_one: C at a factor of 1, before it is rounded up. Every rank
        knows what all were asked for, so all of them raise, or none."""
        *asked_XP, rows_P = torch.cat([self.together(asked_XE), self.rows_P[None]]).tolist()
        over = [
            (ceil(Fraction(asked * limit, rows)), x, pool)
            for x, asked_P in enumerate(asked_XP)
            for pool, (asked, rows) in enumerate(zip(asked_P, rows_P, strict=True))
            if asked > rows
        ]
        if not over:
            return
        needed, x, pool = max(over, key=lambda found: found[0])
        factor = ceil(needed / rows_of_one * _DIGITS) / _DIGITS
        first, last = pool * self.size, (pool + 1) * self.size - 1
        kind = "attention experts" if site.kind == "attention" else "experts"
        members = f"expert {first}" if self.size == 1 else f"experts {first} to {last}"
        where = "" if len(asked_XP) == 1 else f" on rank {x}"
        raise ValueError(
            f"over_budget=error: in layer {site.layer}, pool {pool} of the {kind} ({members}) was asked for "
            f"{asked_XP[x][pool]} rows{where}, and its limit is {rows_P[pool]}; a capacity_factor of {factor} would "
            "have been enough: raise it, or set over_budget to drop"
        )
