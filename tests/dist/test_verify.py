"""`moe-dist verify` over a small covering set of settings and layouts, and its answer to a lie."""

from unittest import mock

import pytest
import torch

from moe_dist.engine.exchange import GradientExchange
from moe_dist.moe.capacity import expert_capacity
from moe_dist.parallel.mesh import Layout
from moe_dist.verify.cases import LayoutCase, Options, Setting
from moe_dist.verify.command import run_cases
from tests.dist.helpers import run_checks

CPU = torch.device("cpu")

# Together they hold every value of every axis; each setting meets layouts that cut something it cares about.
COVER: list[tuple[Setting, tuple[LayoutCase, ...]]] = [
    (
        Setting(top_k="2", drops="position", accumulation="4"),
        (
            LayoutCase(ep="2", tp="2", sp="on"),
            LayoutCase(ep="4", zero="2"),
            LayoutCase(ep="2", tp="2", zero="1", dispatch="padded"),
            LayoutCase(ep="2", tp="2", zero="3"),
        ),
    ),
    (
        Setting(top_k="1", drops="score", recompute="block"),
        (
            LayoutCase(ep="4", tp="2", dispatch="padded"),
            LayoutCase(ep="4", tp="2", sp="on", zero="1"),
            LayoutCase(ep="4", tp="2", sp="on", zero="3"),
        ),
    ),
    (
        Setting(top_k="2", drops="random", experts="bmm"),
        (LayoutCase(ep="2", zero="0"), LayoutCase(ep="4", tp="2", zero="2"), LayoutCase(tp="2")),
    ),
    (
        Setting(top_k="1", drops="dropless", accumulation="4", experts="loop"),
        (LayoutCase(ep="4"), LayoutCase(ep="2", tp="2", sp="on", zero="0"), LayoutCase(ep="1", zero="1")),
    ),
    (
        Setting(router="sigmoid", overflow="reroute", balance_scope="sequence", accumulation="4"),
        (
            LayoutCase(ep="2", tp="2", etp="2", zero="1"),
            LayoutCase(ep="4", tp="2", sp="on", dispatch="hierarchical"),
            LayoutCase(ep="4", zero="2", dispatch="overlap"),
        ),
    ),
    (
        Setting(router="noisy", balance_scope="local", recompute="activation"),
        (LayoutCase(ep="4", dispatch="all_gather"), LayoutCase(ep="1", tp="2", etp="4", zero="3")),
    ),
    (
        Setting(router="expert_choice", recompute="block", experts="loop"),
        (LayoutCase(ep="2", tp="2", dispatch="all_gather", zero="1"), LayoutCase(ep="4", dispatch="hierarchical")),
    ),
    (Setting(router="sinkhorn", drops="score", top_k="1"), (LayoutCase(ep="2", tp="2", sp="on"),)),
    (Setting(router="hash", overflow="reroute"), (LayoutCase(ep="4", tp="2", zero="1"),)),
    (Setting(router="jitter", top_k="1", recompute="block"), (LayoutCase(ep="4", tp="2", sp="on"),)),
    (Setting(router="groups", drops="random", overflow="reroute"), (LayoutCase(ep="4", dispatch="overlap"),)),
    (
        Setting(router="sigmoid", balance="quantile", accumulation="4", recompute="block"),
        (LayoutCase(ep="2", tp="2", sp="on"), LayoutCase(ep="4", tp="2", zero="3")),
    ),
    (Setting(balance="loss+quantile", attention="switch"), (LayoutCase(ep="2", tp="2", zero="1"),)),
    (Setting(balance="sign", freeze="first"), (LayoutCase(ep="2", tp="2"),)),
    (Setting(balance="none", freeze="experts"), (LayoutCase(ep="2", zero="1"),)),
    (Setting(router="sigmoid", balance="loss"), (LayoutCase(ep="2"),)),
    (Setting(attention="options"), (LayoutCase(ep="2", tp="2", sp="on", zero="1"),)),
    (Setting(attention="dropout"), (LayoutCase(ep="4", tp="2", sp="on"),)),
    (Setting(attention="switch", recompute="block"), (LayoutCase(ep="4", tp="2", zero="3"),)),
    (Setting(attention="switch", drops="choice"), (LayoutCase(ep="2", tp="2", sp="on"),)),
    (Setting(drops="choice", overflow="reroute"), (LayoutCase(ep="4", dispatch="overlap"),)),
    (
        Setting(pool="2", drops="score"),
        (LayoutCase(ep="4", tp="2", zero="3"), LayoutCase(ep="2", etp="2", tp="2")),
    ),
    (
        Setting(pool="floor", attention="switch", drops="choice", accumulation="4"),
        (LayoutCase(ep="4", zero="3"), LayoutCase(ep="4", tp="2", sp="on", dispatch="padded")),
    ),
    (Setting(pool="floor", overflow="reroute", recompute="block"), (LayoutCase(ep="2", tp="2", dispatch="overlap"),)),
    (Setting(attention="routed"), (LayoutCase(ep="2", tp="2", sp="on"),)),
    (Setting(family="qwen2_moe", recompute="block"), (LayoutCase(ep="2", tp="2", sp="on"),)),
    (Setting(family="qwen3_moe"), (LayoutCase(ep="2", tp="2", zero="1"),)),
    (Setting(family="olmoe"), (LayoutCase(ep="4", tp="2", sp="on"), LayoutCase(tp="2", zero="3"))),
    (
        Setting(family="gpt_oss", drops="dropless"),
        (LayoutCase(ep="2", tp="2", sp="on"), LayoutCase(ep="4", tp="2", zero="3")),
    ),
    (Setting(router="sigmoid", family="glm4_moe"), (LayoutCase(ep="2", tp="2", sp="on", dispatch="padded"),)),
    (Setting(family="granitemoe", top_k="1"), (LayoutCase(ep="2", tp="2", sp="on"),)),
    (Setting(attention="switch", family="jetmoe", recompute="block"), (LayoutCase(ep="2", tp="2", sp="on"),)),
    (
        Setting(family="gpt_bigcode", recompute="block"),
        (LayoutCase(ep="2", tp="2", sp="on"), LayoutCase(ep="2", tp="2", zero="3")),
    ),
    (Setting(family="falcon"), (LayoutCase(ep="4", tp="2", sp="on"), LayoutCase(ep="2", zero="1"))),
]


def options(setting: Setting, *layouts: LayoutCase, steps: int = 2) -> Options:
    return Options((setting,), layouts, steps)


def check_layouts_agree() -> None:
    for setting, layouts in COVER:
        assert run_cases(options(setting, *layouts), CPU), f"{setting}: see the table"


def check_expert_gradients_twice_too_large_are_found() -> None:
    """The classic: expert gradients summed over edp but divided by another size."""
    true_finish = GradientExchange._finish

    def wrong_finish(exchange: GradientExchange) -> None:
        true_finish(exchange)
        grads = [m.grad for p, m in exchange.masters.items() if p.spec.shard == "expert"]
        if grads:
            torch._foreach_mul_(grads, 2.0)

    with mock.patch.object(GradientExchange, "_finish", wrong_finish):
        assert not run_cases(options(Setting(), LayoutCase(ep="2"), steps=2), CPU)
    assert run_cases(options(Setting(), LayoutCase(ep="2"), steps=2), CPU)


def check_one_more_row_per_expert_is_found() -> None:
    """Only layouts are patched: by a capacity that is counted over more than one rank."""

    def generous(
        factor: tuple[int, int] | None, top_k: int, tokens: int, num_experts: int, min_capacity: int
    ) -> int | None:
        limit = expert_capacity(factor, top_k, tokens, num_experts, min_capacity)
        return limit if limit is None or not patched else limit + 1

    for patched in (True, False):
        with mock.patch("moe_dist.verify.command.compare_layout", side_effect=_with_capacity(generous)):
            assert run_cases(options(Setting(), LayoutCase(ep="2"), steps=1), CPU) is not patched


def _with_capacity(rule):  # type: ignore[no-untyped-def]
    """compare_layout under another capacity rule; the reference, trained before, keeps the true one."""
    from moe_dist.verify.compare import compare_layout

    def compare(*args):  # type: ignore[no-untyped-def]
        with mock.patch("moe_dist.moe.capacity.expert_capacity", rule):
            return compare_layout(*args)

    return compare


def check_unsynchronised_router_gradient_is_found() -> None:
    """Under tp each rank routes its own slice; forgetting to sum the router's gradient changes no forward pass."""
    with mock.patch("moe_dist.moe.router.copy_to_group", lambda x, group: x):
        assert not run_cases(options(Setting(), LayoutCase(tp="2"), steps=1), CPU)


def check_nothing_compared_is_no_proof() -> None:
    assert not run_cases(options(Setting(), LayoutCase(ep="3"), steps=1), CPU)


@pytest.mark.timeout(900)
def test_layouts_agree_and_lies_are_found() -> None:
    run_checks(
        4,
        [
            check_expert_gradients_twice_too_large_are_found,
            check_one_more_row_per_expert_is_found,
            check_unsynchronised_router_gradient_is_found,
            check_nothing_compared_is_no_proof,
            check_layouts_agree,
        ],
    )


def test_the_cover_holds_every_value_of_every_axis() -> None:
    from moe_dist.verify.cases import LAYOUT_AXES, SETTING_AXES

    settings = [setting for setting, _ in COVER]
    layouts = [layout for _, cases in COVER for layout in cases]
    for axes, chosen in ((SETTING_AXES, settings), (LAYOUT_AXES, layouts)):
        for name, values in axes.items():
            assert {getattr(case, name) for case in chosen} >= set(values), name
    for layout in layouts:
        assert Layout(4, int(layout.ep), int(layout.tp), etp=int(layout.etp))
