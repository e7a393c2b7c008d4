"""Engines beside each other: bf16 against fp32, what ZeRO holds, and ZeRO-3 outside of `verify`."""

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.engine.base import Engine, Kind
from moe_dist.engine.exchange import GradientExchange, _Queue
from moe_dist.parallel.collectives import all_gather
from moe_dist.parallel.mesh import create_mesh, single_process_mesh
from moe_dist.parallel.sharding import ParamSpec, parameter
from moe_dist.step import StepContext
from tests.dist.helpers import KEY, TinyRun, assert_same, logical, run_checks, tiny_config

DEEPSPEED = {"engine__name": "deepspeed"}
# Dropless, because rounding that sends one token elsewhere must not decide which others are dropped.
LEARN = {"optim__lr": 3e-3, "model__moe__capacity_factor": None}


ZERO3 = DEEPSPEED | {"engine__zero_stage": 3}
KINDS: tuple[Kind, ...] = ("weight", "exp_avg", "exp_avg_sq")


def start(**changes: Any) -> TinyRun:
    config = tiny_config(**changes)
    return TinyRun(config, create_mesh(config.parallel.ep, config.parallel.tp, config.parallel.etp))


def check_bf16_follows_fp32() -> None:
    """Native and ZeRO-1 to 3 at ep = 2: losses fall, and stay within 2e-2 of fp32."""
    reference = start(parallel__ep=2, **LEARN).train(0, 20)
    assert sum(reference[-3:]) < sum(reference[:3]) - 0.3, reference
    for engine in ({}, *(DEEPSPEED | {"engine__zero_stage": stage} for stage in (1, 2, 3))):
        run = start(parallel__ep=2, engine__precision="bf16", **LEARN, **engine)
        losses = run.train(0, 20)
        off = max(abs(a - b) for a, b in zip(losses, reference, strict=True))
        assert off < 2e-2, f"{engine}: {off}"
        assert losses[-1] < losses[0]
        # What is saved is fp32, and what computes is its rounding.
        weights = logical(run.engine, "weight")
        assert any((w != w.bfloat16().double()).any() for w in weights.values()), "masters are no more than bf16"


def check_zero3_evaluates_between_steps() -> None:
    """Logits, with caches and without, token losses and training interleaved give what the native engine gives."""
    for ep, tp in ((1, 2), (2, 1)):
        outcomes = []
        for engine in ({}, ZERO3):
            run = start(parallel__ep=ep, parallel__tp=tp, model__recompute="block", **engine)
            tokens_BS, targets_BS = run.batch(50)
            seen = []
            for step in range(2):
                run.train(step, step + 1)
                context = StepContext(KEY, "dropless")
                evaluate = partial(run.engine.evaluate, step=context)
                seen.append(evaluate(tokens_BS, targets_BS, want="token_losses"))
                seen.append(evaluate(tokens_BS, None, want="logits"))
                caches = run.engine.model.new_caches(*tokens_BS.shape)
                parts = tokens_BS.split([8, 7, 1], 1)
                pieces = [evaluate(part, None, want="logits", caches=caches) for part in parts[:-1]]
                last_BV = evaluate(
                    parts[-1], None, want="logits", caches=caches, at_B=torch.zeros_like(tokens_BS[:, 0])
                )
                whole_BSV = torch.cat([*pieces, last_BV[:, None]], 1)
                torch.testing.assert_close(whole_BSV, seen[-1], rtol=0, atol=2e-5)
            run.train(2, 3)
            outcomes.append(([all_gather(x.contiguous(), run.mesh.dp) for x in seen], logical(run.engine, "weight")))
        (expected, weights), (found, zero_weights) = outcomes
        for actual, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-5, atol=2e-5)
        assert_same(zero_weights, weights, atol=1e-6)


def check_every_stage_tells_the_same_state() -> None:
    for stage in range(4):
        engine = DEEPSPEED | {"engine__zero_stage": stage}
        assert_state_of_one_process({}, *({"parallel__ep": ep} | engine for ep in (1, 2)))


def check_zero3_tells_the_same_state_on_four_ranks() -> None:
    """Experts cut over edp, over tp as well, by hidden units; experts without rows, and none at all."""
    ep2 = {"parallel__ep": 2}
    both = ep2 | {"parallel__tp": 2, "parallel__sequence_parallel": True}
    assert_state_of_one_process({"train__accumulation": 2}, ZERO3 | ep2, ZERO3 | ep2 | {"parallel__etp": 2})
    assert_state_of_one_process({"model__tie_embeddings": True, "model__recompute": "block"}, ZERO3 | both)
    # 8 tokens of one expert each: half of the experts get none anywhere, and most of those here none of this rank's.
    few = {"train__seq_len": 2, "train__global_batch": 4, "model__moe__top_k": 1, "model__moe__num_experts": 16}
    assert_state_of_one_process(few | {"model__moe__capacity_factor": None}, ZERO3 | both)
    assert_state_of_one_process({"model__moe__num_experts": 0}, ZERO3 | {"parallel__tp": 2})


def check_zero3_fetches_experts_of_different_widths() -> None:
    """Ranks hold more or less of them; one that fetches ahead by size would fetch something else than its peers."""
    from moe_dist.engine import deepspeed

    true_config = deepspeed._config

    def small_bucket(*args: Any) -> dict[str, Any]:
        config = true_config(*args)
        config["zero_optimization"].setdefault("stage3_prefetch_bucket_size", 14_000)  # filled by some ranks
        return config

    with mock.patch.object(deepspeed, "_config", small_bucket):
        assert_state_of_one_process({"model__moe__d_ff": [16, 96, 32, 48]}, ZERO3 | {"parallel__ep": 2})


def assert_state_of_one_process(model: dict[str, Any], *layouts: dict[str, Any]) -> None:
    """Losses of three steps; then gradients, masters and moments by logical name: those of the oracle."""
    oracle = TinyRun(tiny_config(**model), single_process_mesh())
    losses = oracle.train(0, 2) + [oracle.forward_backward(2)[0]]
    grads, state = whole(oracle.engine, "grad"), {kind: whole(oracle.engine, kind) for kind in KINDS}
    for layout in layouts:
        run = start(**model | layout)
        found = run.train(0, 2) + [run.forward_backward(2)[0]]
        assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < 1e-5, (layout, found, losses)
        assert_same(logical(run.engine, "grad"), grads, rtol=1e-3, atol=1e-6)
        for kind in KINDS:
            assert_same(logical(run.engine, kind), state[kind], rtol=1e-3, atol=1e-6)


def whole(engine: Engine, kind: Kind) -> dict[str, Tensor]:
    return {piece.name: piece.values.detach().double().view(piece.logical_shape).clone() for piece in engine.held(kind)}


def check_ranks_gather_groups_in_the_same_order() -> None:
    """Though parameters of two groups are asked for in an order that differs between ranks, as that of a set does."""
    from deepspeed.runtime.zero import partition_parameters

    run = start(parallel__ep=2, **ZERO3)
    params = list(run.engine.model.blocks[0].feed_forward.parameters())
    assert len({id(param.ds_process_group) for param in params}) == 2
    begun, begin = [], partition_parameters._dist_allgather_fn

    def spy(piece: Tensor, output: Tensor, group: dist.ProcessGroup) -> Any:
        begun.append(dist.get_world_size(group))
        return begin(piece, output, group)

    with mock.patch.object(partition_parameters, "_dist_allgather_fn", spy):
        for asked in (params, params[::-1]):
            params[0].all_gather_coalesced(asked if dist.get_rank() % 2 else asked[::-1]).wait()
            for param in params:
                param.partition()
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, begun)
    assert set(begun) == {2, 4} and all(other == begun for other in seen), seen


def check_buckets_change_no_bit() -> None:
    """Of two numbers there is one sum, so that it does not matter how many leave together."""
    for changes in ({}, {"parallel__ep": 2, "train__accumulation": 2}, {"engine__precision": "bf16"}):
        runs = [start(engine__bucket_mib=mib, **changes) for mib in (None, 0.005, 1.0)]
        states = []
        for run in runs:
            run.train(0, 2)
            run.forward_backward(2)
            states.append(logical(run.engine, "weight") | logical(run.engine, "grad"))
        for name, expected in states[0].items():
            assert torch.equal(states[1][name], expected) and torch.equal(states[2][name], expected), (changes, name)


def check_buckets_leave_while_backward_goes_on() -> None:
    """In the same order on every rank, in the last micro-step alone, most of them before the last gradient is there."""
    run = start(train__accumulation=2, engine__bucket_mib=0.005)
    exchange, sent, send = run.engine.gradients, [], _Queue._send

    def spy(queue: _Queue) -> None:
        sent.append((queue.group.size, queue.buckets[queue.gone].flat.numel(), len(exchange.missing)))
        send(queue)

    with mock.patch.object(_Queue, "_send", spy):
        run.forward_backward(0)
    sizes = [(ranks, size) for ranks, size, _ in sent]
    assert len(sizes) == sum(len(queue.buckets) for queue in exchange.queues) > 4
    assert sum(missing > 0 for *_, missing in sent) > len(sent) // 2, sent
    replies: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(replies, sizes)
    assert all(reply == sizes for reply in replies)


def check_gradients_may_come_in_any_order() -> None:
    """And some not at all, as those of experts that saw no token."""
    mesh, rank = create_mesh(1, 1), dist.get_rank()
    params = [parameter((size,), ParamSpec((size,))) for size in (700, 300, 900, 500, 100)]
    exchange = GradientExchange({param: param.detach() for param in params}, mesh, 0.002)
    orders = [[4, 3, 2, 1, 0], [0, 3, 1, 4]]  # on rank 1 the third has none
    masters = [exchange.masters[param] for param in params]
    for first in (True, False):
        with exchange.of_micro_step(first, not first):
            for place in orders[rank]:
                params[place].grad = torch.full_like(params[place], 10.0 ** (rank + 2 * first) * (place + 1))
                exchange._take(params[place])
    for place, master in enumerate(masters):
        each = 101 * (place + 1) * (1 if place == 2 else 11)
        assert master.grad is not None and bool((master.grad == each / 2).all()), (place, master.grad)


def test_two_ranks() -> None:
    run_checks(
        2,
        [
            check_every_stage_tells_the_same_state,
            check_zero3_evaluates_between_steps,
            check_bf16_follows_fp32,
            check_buckets_change_no_bit,
            check_buckets_leave_while_backward_goes_on,
            check_gradients_may_come_in_any_order,
        ],
    )


def test_four_ranks() -> None:
    run_checks(
        4,
        [
            check_ranks_gather_groups_in_the_same_order,
            check_zero3_fetches_experts_of_different_widths,
            check_zero3_tells_the_same_state_on_four_ranks,
        ],
    )
