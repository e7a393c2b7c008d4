"""The search on two ranks, where all layouts can be listed by hand."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from time import process_time

import pytest

from moe_dist.config import Config, validate
from moe_dist.config.load import load_config
from moe_dist.models.flops import train_flops_per_token
from moe_dist.plan.hardware import Memory, Products, load_hardware
from moe_dist.plan.plan import make_plan
from moe_dist.plan.search import Search, prices, search
from moe_dist.plan.shared import Choice, Shared
from tests.dist.helpers import tiny_config
from tests.unit.plan.toys import NEVER, toy_config, toy_hardware

ENGINES = [("native", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
WAYS = [("all_to_all", "ragged"), ("all_to_all", "padded"), ("hierarchical", "ragged"), ("all_gather", "ragged")]
ROOMY = toy_hardware(memory=Memory(bytes=2**36, bandwidth=1e9), peak=1e7)


@pytest.fixture(scope="module")
def found() -> Search:
    return search(toy_config(), 2, ROOMY, top=100)


def test_all_layouts_are_found(found: Search) -> None:
    """A sequence of 3 tokens forbids tp = 2, experts 5 wide forbid etp = 2. 2 sequences a rank: micro_batch 1 or 2."""
    expected = {
        Choice(ep, 1, 1, engine, stage, micro_batch, "none", dispatch, wire)
        for ep, ways in ((1, [("local", "ragged")]), (2, WAYS))
        for micro_batch, (engine, stage), (dispatch, wire) in product((1, 2), ENGINES, ways)
    }
    assert len(expected) == 40
    assert {choice for choice, _ in found.ranked} == expected and len(found.ranked) == 40


def test_every_other_layout_has_a_reason(found: Search) -> None:
    """etp = 2: 4 engines * 4 ways, * 2 micro-batches at tp = 1 and * 3 at tp = 2, each at ep = 1 and 2: 160.
    tp = 2 at etp = 1: 3 * 4 at ep = 1 and 3 * 4 * 4 at ep = 2: 60."""
    assert [(reason.count, reason.example.partition(";")[0]) for reason in found.reasons] == [
        (160, "d_ff=5 is not divisible by etp=2"),
        (60, "seq_len=3 is not divisible by tp=2"),
    ]
    assert found.tried == 260


def test_groups_that_lie_unevenly_on_nodes_keep_only_their_own_out() -> None:
    """6 ranks on nodes of 4: experts on 3 or 6 of them cannot travel by way of one rank of each node."""
    config = toy_config(num_experts=6)
    config.train.global_batch = 12
    found = search(config, 6, replace(ROOMY, ranks_per_node=4), top=1000)
    by_node = {choice.ep for choice, _ in found.ranked if choice.dispatch == "hierarchical"}
    assert by_node == {2} and {choice.ep for choice, _ in found.ranked} == {1, 2, 3, 6}
    assert any("neither of ep*etp=3 and node_size=4 divides" in reason.example for reason in found.reasons)


def test_the_order_is_that_of_planned_time(found: Search) -> None:
    seconds = [make_plan(choice.applied(toy_config()), 2, ROOMY).time.seconds for choice, _ in found.ranked[:6]]
    assert seconds == [plan.time.seconds for _, plan in found.ranked[:6]]
    everything = [plan.time.seconds for _, plan in found.ranked]
    assert everything == sorted(everything) and everything[0] < everything[-1]


def test_the_fastest_are_found_without_looking_at_all(found: Search) -> None:
    """On a machine that computes slowly, so that many are out before they are planned."""
    slow = replace(ROOMY, products={"fp32": Products(peak=1e4)})
    everything, three = (search(toy_config(), 2, slow, top=top) for top in (100, 3))
    seconds = [plan.time.seconds for _, plan in everything.ranked]
    assert [plan.time.seconds for _, plan in three.ranked] == seconds[:3]
    assert everything.tried == three.tried == 260
    slower = [reason for reason in three.reasons if "fastest" in reason.example or "fits" in reason.example]
    assert [reason.count for reason in slower] == [37]


def test_what_layouts_share_is_what_each_alone_is_planned_with() -> None:
    """Of ranks that are not alike, too: 3 key/value heads of which two tp ranks read 2 each, experts of two widths."""
    plain, unlike, cut = toy_config(), toy_config(d_ff=[4, 4, 6, 6], num_shared_experts=0), toy_config(d_ff=8)
    cut.train.seq_len, cut.model.num_heads, cut.model.head_dim = 4, 6, 2
    cut.model.num_kv_heads, cut.model.attention.qk_norm, cut.parallel.sequence_parallel = 3, "width", True
    for config in (plain, unlike, cut):
        shared, compared = Shared(config, 2, ROOMY), 0
        for choice in layouts(config):
            plan = make_plan(choice.applied(config), 2, ROOMY)
            assert shared.memory(choice) == (plan.rank, plan.memory), choice
            assert shared.seconds(choice, plan.rank) == pytest.approx(plan.time.seconds, rel=1e-12), choice
            assert shared.least_seconds(choice) <= plan.time.seconds * (1 + 1e-12)
            assert shared.sure_memory(choice) <= plan.memory.total
            compared += 1
        assert compared > 60


def layouts(config: Config) -> Iterator[Choice]:
    """All on two ranks that rules admit, asked one by one."""
    sizes, again = ((1, 2),) * 3, ("none", "activation", "block")
    for ep, tp, etp, micro_batch in product(*sizes, (1, 2, 4)):
        for (engine, stage), way, recompute in product(ENGINES, [("local", "ragged"), *WAYS], again):
            choice = Choice(ep, tp, etp, engine, stage, micro_batch, recompute, *way)
            if (ep * etp == 1) == (way[0] == "local"):
                with suppress(ValueError):
                    validate(choice.applied(config), 2)
                    yield choice


@pytest.mark.parametrize("usable", [2**36, 20_000])
def test_the_fastest_are_those_of_all(usable: int) -> None:
    """Every layout that rules admit is planned, with as little recomputation as memory allows."""
    config = toy_config(d_ff=8)
    config.train.seq_len = 4
    hardware = replace(ROOMY, memory=Memory(bytes=usable, bandwidth=1e9))
    fits: dict[Choice, list[float]] = {}
    for choice in layouts(config):
        plan = make_plan(choice.applied(config), 2, hardware)
        if plan.fits:  # in the order of recomputation
            fits.setdefault(replace(choice, recompute="none"), []).append(plan.time.seconds)
    fastest = sorted(seconds[0] for seconds in fits.values())
    assert 5 < len(fastest) < 150 if usable < 2**30 else len(fastest) > 100
    found = search(config, 2, hardware, top=5)
    assert [plan.time.seconds for _, plan in found.ranked] == pytest.approx(fastest[:5], rel=1e-12)
    assert all(plan.fits for _, plan in found.ranked)


def test_a_classifier_is_searched_without_recomputed_blocks() -> None:
    config = tiny_config(task="classification", model__num_classes=2, data__kind="jsonl", data__paths=["x"])
    found = search(config, 2, ROOMY, top=200)
    assert found.ranked and {choice.recompute for choice, _ in found.ranked} == {"none"}


@pytest.mark.slow
def test_a_thousand_ranks_are_searched_in_seconds() -> None:
    """Of CPU time; about 10 on a laptop."""
    config = load_config(Path(__file__).parents[3] / "configs/models/mixtral-8x7b.yaml")
    began = process_time()
    found = search(config, 1024, load_hardware("h100"))
    assert process_time() - began < 30
    assert len(found.ranked) == 10 and found.tried > 20_000


def test_flags_make_the_layout(found: Search) -> None:
    from moe_dist.config.flags import override_config

    choice, plan = found.ranked[0]
    config = override_config(toy_config(), choice.flags().split())
    assert make_plan(config, 2, ROOMY).time.seconds == plan.time.seconds
    assert choice.flags().startswith(f"--parallel.ep {choice.ep} --parallel.tp 1")


def test_where_nothing_fits_memory_is_the_reason() -> None:
    tight = replace(ROOMY, memory=Memory(bytes=1000, bandwidth=1e9))
    nothing = search(toy_config(), 2, tight)
    assert nothing.ranked == [] and nothing.tried == sum(reason.count for reason in nothing.reasons) == 260
    memory = [reason for reason in nothing.reasons if "etp=2" not in reason.example and "tp=2" not in reason.example]
    assert sum(reason.count for reason in memory) == 40
    assert any("of 1000 B with --parallel.ep" in reason.example for reason in memory)


def test_recomputation_comes_in_where_memory_is_short() -> None:
    config = toy_config()
    config.train.seq_len, config.train.global_batch, config.model.moe.num_shared_experts = 300, 2, 0
    config.train.micro_batch = None
    whole, again = (
        make_plan(replace(config, model=replace(config.model, recompute=each)), 2, ROOMY) for each in ("none", "block")
    )
    assert again.memory.total < whole.memory.total
    between = replace(ROOMY, memory=Memory(bytes=(whole.memory.total + again.memory.total) // 2, bandwidth=1e9))
    ranked = search(config, 2, between).ranked
    native = {choice.recompute for choice, _ in ranked if choice == replace(choice, ep=1, tp=1, engine="native")}
    assert native and "none" not in native


def test_what_capacity_costs() -> None:
    """12 tokens of 2 ranks ask for 24 rows; at 0.5 four experts take ceil(0.5 * 2 * 12 / 4) = 3 each, so a token meets
    one expert less, of 2 * 60 FLOPs forward."""
    half, whole = prices(toy_config(), 2, toy_hardware(peak=1.0, bandwidth=NEVER), [0.5, None])
    tokens, nominal = 12, train_flops_per_token(toy_config().model, 3)
    assert whole.flops == pytest.approx(tokens * nominal)
    assert half.flops == pytest.approx(tokens * (nominal - 3 * 2 * 60))
    assert half.plan.time.flops == whole.plan.time.flops  # MFU does not fall with what is dropped
    assert half.plan.time.seconds < whole.plan.time.seconds
    assert (half.factor, whole.factor) == (0.5, None)
