"""All-to-all behind the experts: a rank's experts in consecutive parts, the rows of one travel while another computes.

Forward, with 3 parts ("<" starts an exchange, ">" waits for it):

    there    <0 >0 <1          >1 <2          >2
    compute            E0             E1           E2
    back                  <0             <1           <2  >0 >1 >2

The backward pass is this read from right to left, which is also the order in which autograd takes nodes that are
ready: latest first. Rows stay in shared buffers, where each part is a range, so nothing is cut or joined; what autograd
sees is a token for each exchange, so that starting and waiting are nodes of their own. Every rank makes the same nodes
in the same order, also for parts without rows, so exchanges meet.

Legend: T tokens on this rank, K top_k, D d_model, Y rows sent, X rows of one part that arrived, w ranks of the ep
group, e experts of each, n parts. sent_wwe[i, j, k]: rows that rank i sends to expert k of rank j.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from moe_dist.kernels.permute.order import RowOrder
from moe_dist.moe.choice import Choice, DispatchPlan
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher, DirectTrip
from moe_dist.moe.dispatch.base import RowExperts
from moe_dist.moe.dispatch.blocks import departure
from moe_dist.moe.dispatch.counts import order_of, sent_rows, to_device
from moe_dist.moe.dispatch.wire import Wire
from moe_dist.parallel.collectives import graph_node


@runtime_checkable
class PartedExperts(Protocol):
    """Experts that can be had in parts."""

    def parts(self, number: int) -> list[RowExperts]:
        """Consecutive ones, equally many in each part."""


class OverlappedDispatcher:
    """What `direct` does, in `parts` parts."""

    def __init__(self, direct: AllToAllDispatcher, parts: int) -> None:
        self.direct = direct
        self.parts = parts

    def carry(self, x_TD: Tensor, choice: Choice, experts: RowExperts) -> tuple[Tensor, int]:
        assert isinstance(experts, PartedExperts), "only feed-forward experts are overlapped"
        permute, wire = self.direct.permute, self.direct.wire
        # 1. Gather kept assignments sorted by part, then by rank, then by expert; each part travels on its own.
        ways = self._ways_of_blocks if self.direct.knows_sizes(choice.plan, x_TD) else self._ways
        home, trips, orders, sizes = ways(choice.plan, x_TD.device)
        rows_YD = permute.gather_rows(x_TD, home)
        voyage = _Voyage(trips, sizes, wire)
        # 2. There, compute, back.
        tokens = voyage.load(rows_YD)
        on_the_way, sent_home = voyage.start(0, tokens[0]), []
        for i, part in enumerate(experts.parts(self.parts)):
            x_XD = voyage.arrive(i, on_the_way)
            if i + 1 < self.parts:
                on_the_way = voyage.start(i + 1, tokens[i + 1])
            sent_home.append(voyage.start_home(i, part(x_XD, None, orders[i])))
        y_TD = permute.combine_rows(voyage.unload(sent_home), choice.weights_TK, home)
        return y_TD, sum(wire.sent_bytes(trip, x_TD) for trip in trips)

    def _ways(self, plan: DispatchPlan, device: torch.device) -> "_Ways":
        ep = self.direct.ep
        sent_wwe = sent_rows(plan, ep)
        place_E = to_device(places(ep.size, sent_wwe.shape[2], self.parts), device)
        home = order_of(plan, self.direct.permute, int(sent_wwe[ep.rank].sum()), place_E)
        sent_nwwe = sent_wwe.unflatten(2, (self.parts, -1)).permute(2, 0, 1, 3)
        trips, orders = zip(*(self.direct.trip(sent, device) for sent in sent_nwwe), strict=True)
        return _Ways(home, list(trips), list(orders), sent_nwwe[:, ep.rank].sum((1, 2)).tolist())

    def _ways_of_blocks(self, plan: DispatchPlan, device: torch.device) -> "_Ways":
        """`_ways` that never wait for the host."""
        held_we = self.direct.held(plan)
        pools = held_we.shape[1] // plan.pool
        assert pools % self.parts == 0, "config/rules/moe.py: parts are of whole pools"
        home = departure(plan, self.direct.permute, to_device(places(len(held_we), pools, self.parts), device))
        parts = [self.direct.trip_of_blocks(plan, held) for held in held_we.chunk(self.parts, 1)]
        trips, orders = zip(*parts, strict=True)
        return _Ways(home, list(trips), list(orders), [sum(trip.send) for trip in trips])


class _Ways(NamedTuple):
    """The order in which rows leave; of each part, how it travels, the order in which it arrives, and rows sent."""

    home: RowOrder
    trips: list[DirectTrip]
    orders: list[RowOrder]
    sizes: list[int]


def places(ranks: int, local: int, parts: int) -> Tensor:
    """Where rows for each expert (or pool), `local` of each rank, stand among those that leave: [ranks * local].

    Two ranks with four experts each, 0 to 3 and 4 to 7, in 2 parts: rows for 0 1 4 5 leave first, then those for
    2 3 6 7, so the places of experts 0 to 7 are 0 1 4 5 2 3 6 7.
    """
    return torch.arange(ranks * local).view(parts, ranks, local // parts).transpose(0, 1).flatten()


class _Voyage:
    """Buffers and exchanges of all parts. Each public method is one node of autograd's graph, with what it does forward
    and what it does backward; tokens tie the nodes together and carry no numbers."""

    def __init__(self, trips: list[DirectTrip], sizes: list[int], wire: Wire) -> None:
        self.trips = trips
        self.sizes = sizes
        self.wire = wire
        # Rows or gradients of all parts at home, and exchanges that were started: `there` goes from home to experts.
        self.home: dict[str, tuple[Tensor, ...]] = {}
        self.whole: dict[str, Tensor] = {}
        self.there: dict[int, Callable[[], Tensor]] = {}
        self.back: dict[int, Callable[[], Tensor]] = {}

    def load(self, rows_YD: Tensor) -> tuple[Tensor, ...]:
        def forward(rows_YD: Tensor) -> tuple[Tensor, ...]:
            self._keep("rows", rows_YD)
            return tuple(rows_YD.new_zeros(()) for _ in self.sizes)

        def backward(*_: Tensor) -> Tensor:
            return self._drop("grads")

        return graph_node(forward, backward, rows_YD)

    def start(self, i: int, token: Tensor) -> Tensor:
        def forward(token: Tensor) -> Tensor:
            self.there[i] = self.trips[i].start_there(self.home["rows"][i], self.wire.out)
            if i + 1 == len(self.sizes):
                self._drop("rows")
            return token.clone()

        def backward(token: Tensor) -> Tensor:
            self.back.pop(i)()  # its gradients are now in "grads"
            return token

        return graph_node(forward, backward, token)

    def arrive(self, i: int, token: Tensor) -> Tensor:
        def forward(token: Tensor) -> Tensor:
            return self.there.pop(i)()

        def backward(grad_XD: Tensor) -> Tensor:
            if "grads" not in self.home:
                self._keep("grads", grad_XD.new_empty(sum(self.sizes), grad_XD.shape[1]))
            self.back[i] = self.trips[i].start_back(grad_XD, self.wire.rest, self.home["grads"][i])
            return grad_XD.new_zeros(())

        return graph_node(forward, backward, token)

    def start_home(self, i: int, y_XD: Tensor) -> Tensor:
        def forward(y_XD: Tensor) -> Tensor:
            if "results" not in self.home:
                self._keep("results", y_XD.new_empty(sum(self.sizes), y_XD.shape[1]))
            self.back[i] = self.trips[i].start_back(y_XD, self.wire.rest, self.home["results"][i])
            return y_XD.new_zeros(())

        def backward(_: Tensor) -> Tensor:
            return self.there.pop(i)()

        return graph_node(forward, backward, y_XD)

    def unload(self, tokens: list[Tensor]) -> Tensor:
        def forward(*tokens: Tensor) -> Tensor:
            for i in range(len(tokens)):
                self.back.pop(i)()
            return self._drop("results")

        def backward(grad_YD: Tensor) -> tuple[Tensor, ...]:
            # All of them now: there is nothing to compute before the last part's gradients are with its experts.
            parts = grad_YD.split(self.sizes)
            for i in reversed(range(len(parts))):
                self.there[i] = self.trips[i].start_there(parts[i], self.wire.rest)
            return tuple(grad_YD.new_zeros(()) for _ in parts)

        return graph_node(forward, backward, *tokens)

    def _keep(self, name: str, whole_YD: Tensor) -> None:
        self.whole[name], self.home[name] = whole_YD, whole_YD.split(self.sizes)

    def _drop(self, name: str) -> Tensor:
        """Buffers must not outlive their use: results that know this graph would keep it alive in a circle."""
        del self.home[name]
        return self.whole.pop(name)
