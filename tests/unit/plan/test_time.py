"""Planned times against times worked out by hand, on the machine and the model of toys.py."""

from dataclasses import replace

import pytest

from moe_dist.models.flops import train_flops_per_token
from moe_dist.parallel.mesh import Layout
from moe_dist.plan.hardware import Host
from moe_dist.plan.held import Held, Tensor
from moe_dist.plan.time import exchange_seconds, part_of, step_time
from moe_dist.plan.transfer import Transfer
from moe_dist.plan.work import Seconds, micro_step, rank_products
from tests.unit.plan.toys import NEVER, TOY_SHAPE, toy_config, toy_hardware

HELD = Held((Tensor("dense", 100), Tensor("expert", 50, expert=True)))
ROWS = Transfer("all_to_all", "ep", (0, 1), "forward", "rows to experts", calls=4, bytes=4000)


def computed(layout: Layout, **moe: object) -> dict[str, float]:
    """FLOPs of a forward pass by part, as seconds at 1 FLOP/s."""
    hardware = toy_hardware(peak=1.0)
    return {
        part: seconds.forward for part, seconds in micro_step(toy_config(**moe), TOY_SHAPE, layout, hardware).items()
    }


def test_products_of_one_rank() -> None:
    """6 tokens, 2 FLOPs a parameter; scores: 2 layers * 2 products * 2 * 4 wide * 2 keys on average = 64 a token."""
    found = computed(Layout())
    assert {part: round(found[part]) for part in found if found[part] > 1} == {
        "attention projections": 2 * 6 * 96,
        "attention scores": 64 * 6,
        "router": 2 * 6 * 16,
        "experts": 2 * 6 * 2 * 60,
        "shared experts": 2 * 6 * 60,
        "dense feed-forwards": 2 * 6 * 72,
        "logits": 2 * 6 * 40,
    }


def test_backward_is_twice_forward_and_all_of_it_is_what_mfu_counts() -> None:
    found = micro_step(toy_config(), TOY_SHAPE, Layout(), toy_hardware(peak=1.0))
    total = sum(seconds.forward + seconds.backward for seconds in found.values())
    assert total == pytest.approx(6 * train_flops_per_token(toy_config().model, 3))


def test_products_over_tp() -> None:
    """The one key/value head is computed on both ranks; each has half of the tokens for router and experts."""
    found = computed(Layout(2, tp=2))
    assert {part: round(found[part]) for part in found if found[part] > 1} == {
        "attention projections": 2 * 6 * 2 * (8 + 8 + 16),
        "attention scores": 64 * 3,
        "router": 2 * 3 * 16,
        "experts": 2 * 3 * 2 * 60,
        "shared experts": 6 * 60,
        "dense feed-forwards": 6 * 72,
        "logits": 6 * 40,
    }


@pytest.mark.parametrize(("layout", "groups"), [(Layout(2, ep=2), 2), (Layout(2, etp=2), 4), (Layout(4, 2, etp=2), 2)])
def test_experts_over_ranks_compute_what_their_tokens_ask_for(layout: Layout, groups: int) -> None:
    """Each rank brings as many rows as it takes away; under etp twice as many of half the width."""
    config = toy_config()
    config.parallel.ep, config.parallel.etp = layout.ep, layout.etp
    own = [each for each in rank_products(config, TOY_SHAPE, layout) if each.product.part == "experts"]
    assert sum(each.flops for each in own) == pytest.approx(2 * 6 * 2 * 60)
    assert {each.groups for each in own} == {groups}
    assert {each.rows for each in own} == {12.0 * layout.etp}
    assert {(each.fan_in, each.fan_out) for each in own} == {(4.0, 5.0 / layout.etp), (5.0 / layout.etp, 4.0)}


def test_capacity_bounds_what_experts_compute_and_skew_adds() -> None:
    """C = ceil(0.5 * 2 * 6 / 4) = 2 rows for each of 4 experts, of 12 assignments."""
    assert computed(Layout(), capacity_factor=0.5)["experts"] == pytest.approx(2 * 60 * 8)
    busy = micro_step(toy_config(), TOY_SHAPE, Layout(2, ep=2), toy_hardware(peak=1.0), skew=1.5)
    assert busy["experts"].forward == pytest.approx(1.5 * 2 * 6 * 2 * 60)
    assert busy["router"].forward == pytest.approx(2 * 6 * 16)


@pytest.mark.parametrize(
    ("factor", "scope", "share"),
    [(1.25, "local", 1.25), (3.0, "local", 2.0), (0.5, "local", 2 / 3), (1.25, "global", 2.0)],
)
def test_capacity_bounds_skew(factor: float, scope: str, share: float) -> None:
    """Two ranks, one set of experts on each: of 2 * 6 tokens' places one copy may take those of both. At 0.5 there are
    ceil(0.5 * 2 * 6 / 4) = 2 rows of 3 for each expert, however often it is asked for."""
    config, shape = toy_config(capacity_factor=factor, capacity_scope=scope), replace(TOY_SHAPE, dp=2)
    found = micro_step(config, shape, Layout(2), toy_hardware(peak=1.0), skew=2.0)
    assert found["experts"].forward == pytest.approx(share * 2 * 6 * 2 * 60)


def test_passes_over_memory() -> None:
    """At 1 byte a second and no time for FLOPs; fp32. Products: 4 * (matrices + rows in and out)."""
    found = micro_step(toy_config(), TOY_SHAPE, Layout(), toy_hardware(peak=NEVER, bandwidth=1.0))
    expected = {
        # rows 12 on 4 experts: gate and up 4 x 5 each, out 5 x 4
        "experts": (3 * 4 * (4 * 20 + 12 * 9), 2),
        "router": (4 * (16 + 6 * 8), 2),
        "norms and residuals": (2 * 10 * 96, 1.2),
        "rotary": (2 * 5 * 4 * 6 * 3 * 2, 1.0),
        # dense 6 x 6, experts 12 x 5, shared 6 x 5
        "activation": (3 * 4 * (36 + 60 + 30), 5 / 3),
        "routing": (12 * 4 * 6 * 4, 1 / 3),
        "permutation": (5 * 4 * 24, 1.0),
        "cross-entropy": (8 * 4 * 60, 0.0),
    }
    for part, (forward, backward) in expected.items():
        assert found[part] == Seconds(pytest.approx(forward), pytest.approx(backward * forward)), part
    over_ep = micro_step(toy_config(), TOY_SHAPE, Layout(2, ep=2), toy_hardware(peak=NEVER, bandwidth=1.0))
    assert over_ep["permutation"].forward == pytest.approx(5 * 4 * 24 + 4 * 4 * 12 * 4)


def test_sequence_parallelism_spares_norms() -> None:
    config = toy_config()
    config.parallel.tp, config.parallel.sequence_parallel = 2, True
    hardware, layout = toy_hardware(peak=NEVER, bandwidth=1.0), Layout(2, tp=2)
    cut = micro_step(config, TOY_SHAPE, layout, hardware)["norms and residuals"].forward
    config.parallel.sequence_parallel = False
    assert micro_step(config, TOY_SHAPE, layout, hardware)["norms and residuals"].forward == pytest.approx(2 * cut)


def test_exchanges_inside_and_between_nodes() -> None:
    """A call of 1000 bytes between 2 ranks sends 500: 1 ms + 0.5 ms inside; 10 ms + 5 ms between nodes of one rank."""
    assert exchange_seconds(ROWS, Layout(2, ep=2), toy_hardware()) == pytest.approx(4 * 1.5e-3)
    apart = toy_hardware(ranks_per_node=1)
    assert exchange_seconds(ROWS, Layout(2, ep=2), apart) == pytest.approx(4 * 15e-3)
    # Two ranks of a node reduce 1000 bytes with the other node at once: 2 * 1000 pass its cable.
    reduced = Transfer("all_reduce", "edp", (0, 2), "gradients", "gradients", calls=1, bytes=1000)
    assert exchange_seconds(reduced, Layout(4, ep=2), toy_hardware()) == pytest.approx(10e-3 + 20e-3)
    # A ring over all four leaves each node once: 1500 bytes a rank, half of the ranks send them between nodes.
    whole = Transfer("all_reduce", "world", (0, 1, 2, 3), "statistics", "losses", calls=1, bytes=1000)
    assert exchange_seconds(whole, Layout(4), toy_hardware()) == pytest.approx(2 * 10e-3 + 15e-3)


def test_a_link_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hardware toy says nothing of the link between: measure it on two nodes"):
        exchange_seconds(ROWS, Layout(2, ep=2), toy_hardware(ranks_per_node=1, between=None))


def test_exchanges_have_a_part_each() -> None:
    def named(axis: str, phase: str) -> str:
        return part_of(Transfer("all_reduce", axis, (0, 1), phase, "", 1, 1))  # type: ignore[arg-type]

    assert [named(axis, "forward") for axis in ("ep", "ep_node", "ep_across")] == ["dispatch"] * 3
    assert [named("tp", "backward"), named("dp", "backward")] == ["tensor parallel", "ZeRO weights"]
    assert [named("edp", "gradients"), named("edp", "update")] == ["gradient exchange", "ZeRO weights"]
    assert [named("world", "forward"), named("tp", "update"), named("world", "statistics")] == ["counts and losses"] * 3


def test_a_step_is_the_sum_of_its_parts() -> None:
    """Two micro-steps; fp32 native on one rank: AdamW 28 and its norm 4 bytes an element, 12 more for the second
    micro-step's gradients."""
    hardware = toy_hardware(host=Host(dense_block=1.0, moe_block=2.0, micro_step=0.5, step=0.25))
    plan = step_time(toy_config(), TOY_SHAPE, Layout(), hardware, [ROWS], HELD)
    flops = 2 * 6 * train_flops_per_token(toy_config().model, 3)
    assert plan.parts["host"] == pytest.approx(2 * 3.5 + 0.25)
    assert plan.parts["dispatch"] == pytest.approx(6e-3)
    assert plan.seconds == pytest.approx(flops / 1e9 + 6e-3 + 7.25)
    assert (plan.flops, plan.hidden) == (pytest.approx(flops), 0.0)
    assert plan.mfu == pytest.approx(flops / plan.seconds / 1e9)
    assert plan.bottleneck.startswith("host, 100% of the step") and "train.micro_batch (it is 2)" in plan.advice
    slow = step_time(toy_config(), TOY_SHAPE, Layout(), toy_hardware(peak=NEVER, bandwidth=1.0), [], HELD)
    assert slow.parts["optimizer"] == pytest.approx(150 * 32)
    assert slow.parts["gradient copies"] == pytest.approx(150 * 12)


def test_zero_spreads_the_update_and_not_the_gradients() -> None:
    config = toy_config()
    config.engine.name, config.engine.zero_stage, config.parallel.ep = "deepspeed", 1, 2
    hardware = toy_hardware(peak=NEVER, bandwidth=1.0)
    plan = step_time(config, replace(TOY_SHAPE, dp=2, accumulation=1), Layout(2, ep=2), hardware, [], HELD)
    assert plan.parts["optimizer"] == pytest.approx((50 + 50) * 32)
    assert plan.parts["gradient copies"] == pytest.approx(150 * 24)
    config.engine.name, config.engine.zero_stage = "native", 0
    plan = step_time(config, replace(TOY_SHAPE, dp=2), Layout(2, ep=2), hardware, [], HELD)
    assert plan.parts["optimizer"] == pytest.approx(150 * 32)
    assert plan.parts["gradient copies"] == pytest.approx(150 * (8 + 12 + 8))


def test_a_gpu_computes_while_the_host_launches() -> None:
    host = Host(micro_step=1e-3)
    fast, slow = (
        step_time(toy_config(), TOY_SHAPE, Layout(), toy_hardware(peak, device="cuda", host=host), [], HELD)
        for peak in (1e9, 1e6)
    )
    assert fast.seconds == pytest.approx(2e-3)
    assert "host" not in slow.parts and slow.seconds == pytest.approx(1e3 * fast.flops / 1e9)


def test_recomputation_is_a_forward_pass_of_the_blocks() -> None:
    config = toy_config()
    config.model.recompute = "block"
    plan = step_time(config, TOY_SHAPE, Layout(), toy_hardware(peak=1.0), [], HELD)
    logits = 2 * 6 * 40
    assert plan.parts["recomputation"] == pytest.approx(2 * (6 * train_flops_per_token(config.model, 3) / 3 - logits))


def test_what_travels_in_chunks_is_hidden_but_for_its_ends() -> None:
    """Of two chunks, in 1, in 2, out 1 and out 2 of 1.5 ms each: the experts compute 2 * 3 * 1440 FLOPs while in 2 and
    out 1 travel, and the longer of both counts."""
    config = toy_config(dispatch="all_to_all", overlap_chunks=2)
    config.parallel.ep = 2
    for peak in (1e9, 1e6):
        experts = 8640 / peak
        plan = step_time(config, replace(TOY_SHAPE, dp=2), Layout(2, ep=2), toy_hardware(peak), [ROWS], HELD)
        assert plan.parts["dispatch"] == pytest.approx(6e-3)
        assert 6e-3 + experts - plan.hidden == pytest.approx(2 * 1.5e-3 + 2 * max(1.5e-3, experts / 2))
    plan = step_time(config, replace(TOY_SHAPE, dp=2), Layout(2, ep=2), toy_hardware(), [ROWS], HELD)
    assert plan.seconds == pytest.approx(sum(plan.parts.values()) - plan.hidden)
    assert plan.bottleneck.startswith("dispatch, ") and "wire_dtype" in plan.advice and "overlap" not in plan.advice


def test_gradients_in_buckets_are_hidden_but_for_the_last() -> None:
    """4000 bytes in buckets of 1000 take 1 + 4 ms; one backward pass of 6 tokens as long as it takes."""
    config = toy_config()
    reduced = Transfer("all_reduce", "dp", (0, 1), "gradients", "gradients", calls=1, bytes=4000)
    backward = 6 * 2 / 3 * train_flops_per_token(config.model, 3)
    for bucket_mib, peak, hidden in (
        (1000 / 2**20, 1.0, 0.75 * 5e-3),
        (1000 / 2**20, 1e9, 0.75 * backward / 1e9),
        (None, 1.0, 0.0),
        (1.0, 1.0, 0.0),
    ):
        config.engine.bucket_mib = bucket_mib
        plan = step_time(config, replace(TOY_SHAPE, dp=2), Layout(2), toy_hardware(peak), [reduced], HELD)
        assert plan.hidden == pytest.approx(hidden), (bucket_mib, peak)


def test_zero_3_hides_its_weights_on_a_gpu_alone() -> None:
    config = toy_config()
    config.engine.name, config.engine.zero_stage = "deepspeed", 3
    weights = Transfer("all_gather", "dp", (0, 1), "forward", "weights", calls=2, bytes=1000)
    shape = replace(TOY_SHAPE, dp=2)
    for device, hidden in (("cpu", 0.0), ("cuda", 0.5 * 2 * 1.5e-3)):
        hardware = toy_hardware(peak=1e6, device=device)
        assert step_time(config, shape, Layout(2), hardware, [weights], HELD).hidden == pytest.approx(hidden), device


def test_advice_names_keys_and_sees_nodes() -> None:
    config = toy_config(dispatch="all_to_all")
    config.parallel.ep = 2
    apart = toy_hardware(ranks_per_node=1)
    plan = step_time(config, replace(TOY_SHAPE, dp=2), Layout(2, ep=2), apart, [ROWS], HELD)
    assert plan.bottleneck.startswith("dispatch between nodes, 100%")
    assert "parallel.ep*etp is 2, a node has 1 ranks" in plan.advice and "model.moe.overlap_chunks=2" in plan.advice


def test_a_precision_that_the_machine_lacks_is_refused() -> None:
    config = toy_config()
    config.engine.precision = "bf16"
    with pytest.raises(ValueError, match="hardware toy does not say how fast bf16 products are, but fp32"):
        step_time(config, TOY_SHAPE, Layout(), toy_hardware(), [], HELD)
