"""The rules of model.attention.kind = switch, and what they let through."""

import pytest

from moe_dist.config import MoEConfig, validate
from moe_dist.config.model import AttentionConfig, ModelConfig
from moe_dist.models.backends import describe_backends, resolve_backends
from tests.unit.config.test_validate import config, problems


def switch(**values: object) -> dict[str, object]:
    return {"model__attention__kind": "switch"} | {f"model__attention__{name}": value for name, value in values.items()}


@pytest.mark.parametrize(
    ("phrase", "values"),
    [
        ("num_experts=0 of attention is below 1; raise model.attention.moe.num_experts", switch(moe__num_experts=0)),
        ("qk_ln=true is not of kind=switch", switch(qk_ln=True)),
        ("qkv_bias=true is not of kind=switch; set model.attention.qkv_bias to false", switch(qkv_bias=True)),
        ("qk_norm=head is not of kind=switch", switch(qk_norm="head")),
        ("sinks=true is not of kind=switch", switch(sinks=True)),
        ("d_ff=64 is of feed-forward experts, not of attention's", switch(moe__d_ff=64)),
        ("every=2 is of feed-forward experts", switch(moe__every=2)),
        ("shared_gate=True is of feed-forward experts", switch(moe__shared_gate=True)),
        ("first=1 is of feed-forward experts", switch(moe__first=1)),
        ("num_shared_experts=1 is of feed-forward experts", switch(moe__num_shared_experts=1)),
        ("expert_bias=True is of feed-forward experts", switch(moe__expert_bias=True)),
        ("overlap_chunks=2 is of feed-forward experts", switch(moe__overlap_chunks=2)),
        ("router=expert_choice is not for attention experts", switch(moe__router="expert_choice")),
        ("experts=triton is of feed-forward experts", switch(moe__experts="triton")),
        ("etp=2 cannot cut attention experts", switch() | {"parallel__etp": 2}),
        (
            "top_k=9 is larger than num_experts=8; lower model.attention.moe.top_k",
            switch(moe__top_k=9),
        ),
        (
            "num_experts=6 is not divisible by ep=4; every rank of an expert-parallel group holds as many; "
            "change parallel.ep or model.attention.moe.num_experts",
            switch(moe__num_experts=6) | {"parallel__ep": 4},
        ),
        (
            "num_experts/ep=2 is not divisible by capacity_pool=4; a pool lies on one rank as a whole: "
            "set model.attention.moe.capacity_pool to one of 1, 2",
            switch(moe__capacity_pool=4) | {"parallel__ep": 4},
        ),
        (
            "capacity_factor=0.0 is not above 0; raise model.attention.moe.capacity_factor",
            switch(moe__capacity_factor=0.0),
        ),
        (
            "capacity_factor has 2 values for 4 MoE layers; give one for each in model.attention.moe.capacity_factor",
            switch(moe__capacity_factor=[1.0, 2.0]),
        ),
        (
            "dispatch=local with ep=2 cannot reach experts on other ranks; set model.attention.moe.dispatch",
            switch(moe__dispatch="local") | {"parallel__ep": 2},
        ),
        ("model.attention.moe is of kind=switch, not multi_query", {"model__attention__moe__top_k": 1}),
    ],
)
def test_refused(phrase: str, values: dict[str, object]) -> None:
    found = problems(**values)
    assert sum(phrase in line for line in found) == 1, found


@pytest.mark.parametrize(
    "values",
    [
        switch(),
        switch(window=8, dropout=0.1, backend="torch", clip_qkv=4.0, position="alibi"),
        switch(moe__capacity_factor=[1.0, None, 2.0, 1.5], moe__router="sigmoid") | {"parallel__ep": 8},
        switch() | {"model__moe__num_experts": 0, "parallel__ep": 4},
        switch(moe__dispatch="all_gather", moe__top_k=1) | {"parallel__ep": 2, "parallel__tp": 2},
        switch() | {"model__num_kv_heads": 4, "parallel__tp": 2},
    ],
)
def test_let_through(values: dict[str, object]) -> None:
    assert validate(config(train__global_batch=16, **values), 8).dp in (4, 8)


def test_attention_experts_have_backends_of_their_own() -> None:
    attention = AttentionConfig(kind="switch", moe=MoEConfig(experts="loop"))
    model = ModelConfig(attention=attention, moe=MoEConfig(num_experts=0))
    one, two = resolve_backends(model, ep=1), resolve_backends(model, ep=2, device_type="cuda")
    assert (one.attention.moe.dispatch, two.attention.moe.dispatch) == ("local", "all_to_all")
    assert one.attention.moe.experts == two.attention.moe.experts == "loop"
    names = describe_backends(two, "cuda")
    assert (names["attention_dispatch"], names["attention_experts"]) == ("all_to_all (ragged)", "loop")
    assert "dispatch" not in names
    plain = resolve_backends(ModelConfig(), ep=2)
    assert plain.attention.moe == MoEConfig() and "attention_experts" not in describe_backends(plain, "cpu")
    auto = resolve_backends(ModelConfig(attention=AttentionConfig(kind="switch")), ep=1)
    assert describe_backends(auto, "cpu")["attention_experts"] == "grouped_mm (cpu loop)"
