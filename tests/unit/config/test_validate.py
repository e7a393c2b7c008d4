"""Every rule between fields: what it lets through, and the words it refuses with."""

from pathlib import Path

import pytest

from moe_dist.config import BatchShape, Config, TrainConfig, batch_shape, validate
from moe_dist.config.load import load_config
from moe_dist.config.parse import parse_dict
from moe_dist.study.design.grid import load_study

ROOT = Path(__file__).parents[3]


def config(**values: object) -> Config:
    """A configuration from dotted keys: config(model__moe__top_k=1)."""
    nested: dict = {}
    for path, value in values.items():
        *sections, key = path.split("__")
        home = nested
        for section in sections:
            home = home.setdefault(section, {})
        home[key] = value
    return parse_dict(nested, "test")


def problems(world_size: int = 8, **values: object) -> list[str]:
    with pytest.raises(ValueError) as caught:
        validate(config(**values), world_size)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8, 16])
def test_the_defaults_fit_any_small_world(world_size: int) -> None:
    assert validate(Config(), world_size).dp == world_size


@pytest.mark.parametrize(
    ("phrase", "values"),
    [
        ("num_heads=6 is not divisible by tp=4", {"model__num_heads": 6, "model__head_dim": 32, "parallel__tp": 4}),
        ("ep=3 does not divide world size 8", {"parallel__ep": 3, "model__moe__num_experts": 9}),
        (
            "tp=3 does not divide world size 8",
            {
                "parallel__tp": 3,
                "model__num_heads": 3,
                "model__head_dim": 32,
                "model__d_ff": 9,
                "model__vocab_size": 258,
                "train__seq_len": 9,
            },
        ),
        ("num_experts=8 is not divisible by ep=16", {"parallel__ep": 16, "world_size": 16}),
        ("top_k=9 is larger than num_experts=8", {"model__moe__top_k": 9}),
        ("max_skipped=0 is below 1", {"guard__max_skipped": 0}),
        ("stall_seconds=600.0 is above 540, but collectives give up after 600", {"guard__stall_seconds": 600.0}),
        ("time_limit=0.0 is not above 0", {"run__time_limit": 0.0}),
        (
            "check_replicas=5 has nothing to compare at zero_stage=3",
            {"guard__check_replicas": 5, "engine__name": "deepspeed", "engine__zero_stage": 3},
        ),
        (
            "global_batch=10 is not divisible by micro_batch*dp=2*8=16",
            {"train__global_batch": 10, "train__micro_batch": 2},
        ),
        (
            "global_batch=10 is not divisible by micro_batch*dp=2*4=8",
            {"train__global_batch": 10, "train__micro_batch": 2, "parallel__tp": 2},
        ),
        (
            "global_batch=24 is not divisible by accumulation*dp=2*8=16",
            {"train__global_batch": 24, "train__accumulation": 2},
        ),
        ("global_batch=12 is not divisible by accumulation*dp=1*8=8", {"train__global_batch": 12}),
        (
            "global_batch=16 is not micro_batch*accumulation*dp=2*2*8=32",
            {"train__micro_batch": 2, "train__accumulation": 2},
        ),
        ("num_heads=8 is not divisible by num_kv_heads=3", {"model__num_kv_heads": 3}),
        ("num_heads=8 is not divisible by num_kv_heads=16", {"model__num_kv_heads": 16}),
        ("d_model=100 is not divisible by num_heads=8", {"model__d_model": 100}),
        ("head_dim=33 is odd", {"model__head_dim": 33}),
        ("head_dim=d_model/num_heads=24/8=3 is odd", {"model__d_model": 24}),
        ("d_ff=1023 is not divisible by tp=2", {"model__d_ff": 1023, "parallel__tp": 2, "model__moe__every": 2}),
        ("vocab_size=257 is not divisible by tp=2", {"model__vocab_size": 257, "parallel__tp": 2}),
        ("seq_len=255 is not divisible by tp=2", {"train__seq_len": 255, "parallel__tp": 2}),
        (
            "num_shared_experts*d_ff=15 is not divisible by tp=2",
            {"model__moe__num_shared_experts": 3, "model__moe__d_ff": 5, "parallel__tp": 2},
        ),
        ("sequence_parallel=true needs tp > 1", {"parallel__sequence_parallel": True}),
        (
            "cuda_graph=true is of engine.name=native, not deepspeed",
            {"engine__cuda_graph": True, "engine__name": "deepspeed", "engine__zero_stage": 1},
        ),
        (
            "cuda_graph=true would draw the same jitter=0.1 in every step; change model.moe.jitter",
            {"engine__cuda_graph": True, "model__moe__jitter": 0.1},
        ),
        (
            "cuda_graph=true would draw the same drop_policy=random in every step; change model.moe.drop_policy",
            {"engine__cuda_graph": True, "model__moe__drop_policy": "random"},
        ),
        (
            "experts=loop asks the host in every step, which cuda_graph=true cannot; change model.moe.experts",
            {"engine__cuda_graph": True, "model__moe__experts": "loop"},
        ),
        (
            "cuda_graph=true needs sizes that no data changes, and capacity_factor=null has none",
            {"engine__cuda_graph": True, "model__moe__capacity_factor": None, "parallel__ep": 2},
        ),
        (
            "cuda_graph=true over 2 expert ranks needs dispatch all_to_all, wire padded and overlap_chunks 1, "
            "not auto, ragged and 1; change model.moe",
            {"engine__cuda_graph": True, "parallel__ep": 2},
        ),
        ("zero_stage=4 is outside 0 to 3", {"engine__name": "deepspeed", "engine__zero_stage": 4}),
        ("zero_stage=-1 is outside 0 to 3", {"engine__zero_stage": -1}),
        ("zero_stage=1 needs engine.name deepspeed", {"engine__zero_stage": 1}),
        (
            "zero_stage=0 with precision=bf16 is not supported",
            {"engine__name": "deepspeed", "engine__precision": "bf16"},
        ),
        ("dispatch=local with ep=2", {"model__moe__dispatch": "local", "parallel__ep": 2}),
        (
            "dispatch=hierarchical needs ep groups that lie evenly on nodes, but neither of ep*etp=4 and node_size=3",
            {"model__moe__dispatch": "hierarchical", "parallel__ep": 4, "parallel__node_size": 3},
        ),
        ("ep=2 needs num_experts > 0", {"parallel__ep": 2, "model__moe__num_experts": 0}),
        (
            "num_shared_experts=1 needs num_experts > 0",
            {"model__moe__num_shared_experts": 1, "model__moe__num_experts": 0},
        ),
        ("every=5 is larger than num_layers=4", {"model__moe__every": 5}),
        (
            "shared_d_ff=64 needs num_shared_experts > 0; set model.moe.shared_d_ff to",
            {"model__moe__shared_d_ff": 64},
        ),
        (
            "router_bias=true is of router=softmax or sigmoid, not noisy; set model.moe.router_bias to",
            {"model__moe__router_bias": True, "model__moe__router": "noisy"},
        ),
        ("renormalize_top_1=true is of top_k=1, not 2", {"model__moe__renormalize_top_1": True}),
        ("shared_gate=true needs num_shared_experts > 0", {"model__moe__shared_gate": True}),
        (
            "num_shared_experts*shared_d_ff=5 is not divisible by tp=2",
            {"model__moe__num_shared_experts": 1, "model__moe__shared_d_ff": 5, "parallel__tp": 2},
        ),
        ("first=4 is not below num_layers=4, so no layer is MoE; lower model", {"model__moe__first": 4}),
        (
            "capacity_factor has 3 values for 2 MoE layers",
            {"model__moe__capacity_factor": [1.0] * 3, "model__moe__every": 2, "model__moe__first": 0},
        ),
        ("d_ff=1023 is not divisible by tp=2", {"model__d_ff": 1023, "parallel__tp": 2, "model__moe__first": 1}),
        (
            "num_experts=8 is not divisible by capacity_pool=3; a pool lies on one rank as a whole: "
            "set model.moe.capacity_pool to one of 1, 2, 4,",
            {"model__moe__capacity_pool": 3},
        ),
        (
            "num_experts/ep=4 is not divisible by capacity_pool=8; a pool lies on one rank as a whole: "
            "set model.moe.capacity_pool to one of 1, 2",
            {"model__moe__capacity_pool": 8, "parallel__ep": 2},
        ),
        (
            "capacity_pool=2 has no meaning for router=expert_choice",
            {"model__moe__capacity_pool": 2, "model__moe__router": "expert_choice"},
        ),
        (
            "num_experts/ep/capacity_pool=2 is not divisible by overlap_chunks=4; lower model.moe.overlap_chunks, or",
            {
                "model__moe__capacity_pool": 2,
                "parallel__ep": 2,
                "model__moe__wire": "padded",
                "model__moe__overlap_chunks": 4,
            },
        ),
        ("pool_floor=0.5 needs capacity_pool > 1", {"model__moe__pool_floor": 0.5}),
        (
            "pool_floor=1.5 is outside 0.0 to 1.0",
            {"model__moe__pool_floor": 1.5, "model__moe__capacity_pool": 2},
        ),
        (
            "over_budget=error needs a limit, but capacity_factor=null has none",
            {"model__moe__over_budget": "error", "model__moe__capacity_factor": None},
        ),
        (
            "over_budget=error needs a limit",
            {"model__moe__over_budget": "error", "model__moe__capacity_factor": [None] * 4},
        ),
        (
            "over_budget=error has no meaning for router=expert_choice",
            {"model__moe__over_budget": "error", "model__moe__router": "expert_choice"},
        ),
        (
            "over_budget=error leaves nothing to overflow=reroute",
            {"model__moe__over_budget": "error", "model__moe__overflow": "reroute"},
        ),
        ("weight_decay=1001.0 is above 1/lr=1000", {"optim__weight_decay": 1001.0}),
        (
            "drop_order=choice is of drop_policy=position, not score",
            {"model__moe__drop_order": "choice", "model__moe__drop_policy": "score"},
        ),
        (
            "drop_order=choice has no meaning for router=expert_choice",
            {"model__moe__drop_order": "choice", "model__moe__router": "expert_choice"},
        ),
        ("jitter=0.1 is of router=softmax, not hash", {"model__moe__router": "hash", "model__moe__jitter": 0.1}),
        (
            "num_groups=2 is of router=softmax or sigmoid, not noisy; set model.moe.num_groups",
            {"model__moe__router": "noisy", "model__moe__num_groups": 2, "model__moe__top_k": 1},
        ),
        (
            "renormalize=false is of router=softmax or sigmoid or sinkhorn, not noisy; set model.moe.renormalize",
            {"model__moe__router": "noisy", "model__moe__renormalize": False},
        ),
        (
            "renormalize=false is of top_k > 1, not 1; set model.moe.renormalize",
            {"model__moe__top_k": 1, "model__moe__renormalize": False},
        ),
        ("sinkhorn_iterations=9 is of router=sinkhorn, not softmax", {"model__moe__sinkhorn_iterations": 9}),
        (
            "bias_update_rate=0.1 is of balance=sign or loss+sign, not loss; set model.moe.bias_update_rate",
            {"model__moe__bias_update_rate": 0.1},
        ),
        (
            "balance_loss_coef=0.1 is of balance=loss or loss+sign or loss+quantile, not quantile",
            {"model__moe__balance": "quantile", "model__moe__balance_loss_coef": 0.1},
        ),
        (
            "balance_scope=local is of balance=loss or loss+sign or loss+quantile, not none",
            {"model__moe__balance": "none", "model__moe__balance_scope": "local"},
        ),
        ("balance_ema=0.5 is of balance=quantile or loss+quantile, not loss", {"model__moe__balance_ema": 0.5}),
        ("balance_bins=99 is of balance=quantile or loss+quantile, not loss", {"model__moe__balance_bins": 99}),
        (
            "balance_ema=1.0 is outside 0 <= balance_ema < 1",
            {"model__moe__balance": "quantile", "model__moe__balance_ema": 1.0},
        ),
        (
            "balance=loss+sign adds a bias to the scores of router=softmax or sigmoid, not noisy",
            {"model__moe__balance": "loss+sign", "model__moe__router": "noisy"},
        ),
        (
            "balance=loss needs a router that learns, not hash",
            {"model__moe__balance": "loss", "model__moe__router": "hash"},
        ),
        (
            "balance=quantile has nothing to level where every token goes to all experts, top_k=num_experts=8",
            {"model__moe__balance": "quantile", "model__moe__top_k": 8},
        ),
        (
            "balance=quantile asks what a token must beat, which is nothing outside the best of num_groups=2 groups",
            {"model__moe__balance": "quantile", "model__moe__num_groups": 2, "model__moe__top_k_groups": 1},
        ),
        ("load_loss_coef=0.1 is of router=noisy, not softmax", {"model__moe__load_loss_coef": 0.1}),
        (
            "wire=padded is of dispatch=auto or all_to_all, not all_gather",
            {"model__moe__wire": "padded", "model__moe__dispatch": "all_gather", "parallel__ep": 2},
        ),
        (
            "model.attention.routed is of kind=routed, not multi_query",
            {"model__attention__routed__local_window": 64},
        ),
        (
            "qk_ln=true and qk_norm=width are two norms of the same queries and keys; set model.attention.qk_ln to",
            {"model__attention__qk_ln": True, "model__attention__qk_norm": "width"},
        ),
        ("rope_factor=2.0 is of rope_scaling=linear or ntk or dynamic", {"model__attention__rope_factor": 2.0}),
        ("window=0 is outside 1 to", {"model__attention__window": [8, 0, None]}),
        ("window=[] has none for any layer; set model.attention.window", {"model__attention__window": []}),
        ("window has 5 values for num_layers=4; shorten model", {"model__attention__window": [8] * 5}),
        (
            "rope_scaling=llama3 needs the length first trained on; set model",
            {"model__attention__rope_scaling": "llama3"},
        ),
        (
            "rope_slow_turns=4.0 is not below rope_fast_turns=4.0; lower model.attention.rope_slow_turns or",
            {
                "model__attention__rope_scaling": "llama3",
                "model__attention__rope_original_len": 8,
                "model__attention__rope_slow_turns": 4.0,
            },
        ),
        (
            "rope_truncate=false is of rope_scaling=yarn, not llama3; set model.attention.rope_truncate",
            {
                "model__attention__rope_scaling": "llama3",
                "model__attention__rope_original_len": 8,
                "model__attention__rope_truncate": False,
            },
        ),
        (
            "rotary_share=0.3 of head_dim=32 is 9.6, but rotary embedding turns pairs of numbers: change",
            {"model__attention__rotary_share": 0.3},
        ),
        ("max_positions=512 is of attention.position=learned, not rotary; set", {"model__max_positions": 512}),
        ("max_positions=null, but attention.position=learned", {"model__attention__position": "learned"}),
        (
            "seq_len=256 is above max_positions=255, and places past that have no vector; lower train.seq_len or",
            {"model__max_positions": 255, "model__attention__position": "learned"},
        ),
        (
            "norm_kernels=apex has RMSNorm alone, but norm=layer; set model.norm_kernels to same or",
            {"model__norm": "layer", "model__norm_kernels": "apex"},
        ),
        ("ff_bias=true is of dense feed-forwards, and every layer has experts; set", {"model__ff_bias": True}),
        (
            "block=parallel is of language models; set model.block",
            {"task": "classification", "model__block": "parallel"},
        ),
        ("score_multiplier=0.0 is outside 1e-06 to 1000.0", {"model__attention__score_multiplier": 0.0}),
        ("residual_multiplier=0.0 is not above 0; raise model.residual", {"model__residual_multiplier": 0.0}),
        ("logits_scaling=-1.0 is not above 0; raise model.logits", {"model__logits_scaling": -1.0}),
        ("rotary_share=1.5 is above 1.0", {"model__attention__rotary_share": 1.5}),
        (
            "rotary_share=0.5 is of position=rotary, not alibi; set model.attention.rotary_share",
            {"model__attention__rotary_share": 0.5, "model__attention__position": "alibi"},
        ),
        (
            "rope_theta=500.0 is of attention.position=rotary, not alibi",
            {"model__rope_theta": 500.0, "model__attention__position": "alibi"},
        ),
        ("decay_fraction=0.5 is of schedule=wsd, not cosine; set optim.decay_fraction", {"optim__decay_fraction": 0.5}),
        (
            "min_lr_ratio=0.5 is of schedule=cosine or linear or wsd, not constant",
            {"optim__min_lr_ratio": 0.5, "optim__schedule": "constant"},
        ),
        (
            "spike_window=10 is of spike=log or skip or roll_back, not off",
            {"guard__spike": "off", "guard__spike_window": 10},
        ),
        ("text_key=words is of kind=jsonl or csv, not stdlib", {"data__text_key": "words"}),
        (
            "label_key=mood is of task=classification",
            {"data__kind": "jsonl", "data__paths": ["a.jsonl"], "data__label_key": "mood"},
        ),
        ("block_lines=9 is of task=classification", {"data__block_lines": 9}),
        ("test_fraction=0.2 is of task=classification", {"data__test_fraction": 0.2}),
        ("node_size=4 is of model.moe.dispatch=hierarchical, not auto", {"parallel__node_size": 4}),
        ("vocab_size=255 is below 256", {"model__vocab_size": 255}),
        ("data.kind text needs paths", {"data__kind": "text"}),
        ("data.kind stdlib takes no paths", {"data__paths": ["a"]}),
        ("data.kind indexed needs paths; name PREFIX", {"data__kind": "indexed"}),
        ("data.kind indexed has no labels", {"task": "classification", "data__kind": "indexed", "data__paths": ["a"]}),
        ("decay_fraction=1.5 is above 1", {"optim__decay_fraction": 1.5, "optim__schedule": "wsd"}),
        ("keep_every=750 is not a multiple of save_every=500", {"run__keep_every": 750}),
        (
            "keep_best=true needs a validation loss for each checkpoint, but save_every=500 is not a multiple of "
            "eval_every=200",
            {"run__keep_best": True},
        ),
        (
            "keep_best=true needs a validation loss for each checkpoint, but evaluations=4 lie at fractions",
            {"run__keep_best": True, "run__evaluations": 4},
        ),
        ("evaluations=5 are more than there are steps", {"run__evaluations": 5, "train__steps": 4}),
    ],
)
def test_one_broken_rule_is_one_line_with_these_words(phrase: str, values: dict) -> None:
    (line,) = problems(**values)
    assert line.startswith(phrase)
    assert len(line) > len(phrase), "the way out is missing"


def test_num_experts_not_divisible_by_ep() -> None:
    assert problems(6, parallel__ep=3, train__global_batch=6) == [
        "num_experts=8 is not divisible by ep=3; "
        "every rank of an expert-parallel group holds as many; change parallel.ep or model.moe.num_experts"
    ]


@pytest.mark.parametrize(
    "key",
    [
        "model__vocab_size model__d_model model__num_layers model__num_heads model__num_kv_heads model__head_dim",
        "model__d_ff model__moe__d_ff model__moe__every model__moe__top_k parallel__ep parallel__tp train__steps",
        "train__seq_len train__global_batch train__micro_batch train__accumulation train__threads run__log_every",
        "run__eval_every run__evaluations run__eval_sequences run__save_every run__keep_last model__moe__capacity_pool",
    ],
)
@pytest.mark.parametrize("value", [0, -2])
def test_sizes_are_positive(key: str, value: int) -> None:
    for path in key.split():
        name = path.rpartition("__")[2]
        expected = f"{name}={value} is below 1; set {path.replace('__', '.')} to 1 or more"
        assert problems(1, **{path: value}) == [expected]


@pytest.mark.parametrize(
    "path",
    ["model__moe__num_experts", "model__moe__num_shared_experts", "model__moe__min_capacity", "run__sample_tokens"]
    + ["model__moe__balance_loss_coef", "model__moe__z_loss_coef", "optim__warmup_steps", "optim__weight_decay"],
)
def test_zero_is_allowed_and_less_is_not(path: str) -> None:
    validate(config(**{path: 0}), 1)
    assert f"{path.rpartition('__')[2]}=-1" in problems(1, **{path: -1})[0]


@pytest.mark.parametrize(
    "path",
    ["model__moe__capacity_factor", "model__moe__eval_capacity_factor", "engine__grad_clip", "optim__lr", "optim__eps"]
    + ["model__norm_eps", "optim__decay_fraction"],
)
def test_these_are_above_zero(path: str) -> None:
    name, more = path.rpartition("__")[2], {"optim__schedule": "wsd"}
    found = problems(1, **{path: 0.0}, **more)[0]
    assert found.startswith(f"{name}=0.0 is not above 0; raise {path.replace('__', '.')}")
    validate(config(**{path: 0.05}, **more), 1)


@pytest.mark.parametrize(
    "path", ["model__moe__capacity_factor", "model__moe__eval_capacity_factor", "engine__grad_clip"]
)
def test_these_may_be_null(path: str) -> None:
    validate(config(**{path: None}), 1)


@pytest.mark.parametrize(
    ("path", "inside", "outside"),
    [
        ("optim__beta1", [0.0, 0.999], [-0.1, 1.0]),
        ("optim__beta2", [0.0, 0.999], [-0.1, 1.0]),
        ("optim__min_lr_ratio", [0.0, 1.0], [-0.1, 1.1]),
        ("data__validation_fraction", [0.01, 0.99], [0.0, 1.0]),
        ("train__seed", [0, 2**63 - 1], [-1, 2**63]),
        ("optim__warmup_steps", [0, 1001], [-1, 2**31]),
        ("model__norm_eps", [1e-12, 0.1], [1.5]),
        ("model__rope_theta", [1.0, 1e7], [1e-30, 0.0, 1e30]),
        ("model__attention__clip_qkv", [None, 8.0], [1e-30, 1e30]),
        ("optim__eps", [1e-15, 1.0], [1e30]),
    ],
)
def test_ranges(path: str, inside: list, outside: list) -> None:
    for value in inside:
        validate(config(**{path: value}), 1)
    for value in outside:
        (line,) = problems(1, **{path: value})
        assert line.startswith(f"{path.rpartition('__')[2]}={value} is ")


@pytest.mark.parametrize("name", ["a", "run-1_B.2", "0", "_x"])
def test_run_names(name: str) -> None:
    validate(config(run__name=name), 1)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "-rf", "a/b", "a b", "ü", "a\n", "a\\b"])
def test_names_that_are_no_simple_file_name(name: str) -> None:
    (line,) = problems(1, run__name=name)
    assert line.startswith(f"name={name!r} is not a simple file name")


@pytest.mark.parametrize(
    ("world_size", "values"),
    [
        (8, {"parallel__ep": 8, "parallel__tp": 2}),
        (8, {"parallel__tp": 8, "parallel__sequence_parallel": True}),
        (8, {"engine__name": "deepspeed", "engine__zero_stage": 2, "engine__precision": "bf16", "parallel__ep": 4}),
        (8, {"engine__name": "deepspeed", "engine__zero_stage": 3, "engine__precision": "bf16", "parallel__ep": 4}),
        (8, {"engine__name": "native", "engine__precision": "bf16"}),
        (8, {"model__moe__num_experts": 0, "model__moe__top_k": 2}),
        (8, {"model__moe__dispatch": "all_to_all"}),
        (8, {"model__moe__capacity_scope": "local", "parallel__ep": 8}),
        (8, {"model__moe__capacity_pool": 4, "model__moe__pool_floor": 1.0, "parallel__ep": 2}),
        (8, {"model__moe__capacity_pool": 8, "model__moe__capacity_factor": None}),
        (8, {"model__moe__over_budget": "error", "model__moe__capacity_factor": [None, 1.0, None, None]}),
        (
            8,
            {
                "model__moe__over_budget": "error",
                "model__moe__capacity_factor": None,
                "model__moe__capacity_schedule": {9: 2.0},
            },
        ),
        (8, {"data__kind": "text", "data__paths": ["a"]}),
        (8, {"data__kind": "indexed", "data__paths": ["a"], "model__vocab_size": 64}),
        (8, {"model__d_model": 100, "model__head_dim": 32}),
        (2, {"model__moe__top_k": 8, "model__moe__num_experts": 8}),
    ],
)
def test_what_must_be_allowed(world_size: int, values: dict) -> None:
    validate(config(**values), world_size)


def test_every_broken_rule_is_reported() -> None:
    lines = problems(
        8,
        model__num_heads=6,
        model__head_dim=32,
        model__moe__top_k=9,
        parallel__tp=4,
        parallel__ep=3,
        optim__lr=0.0,
        train__global_batch=9,
        run__name="../x",
    )
    openings = [
        "top_k=9 is larger",
        "num_experts=8 is not divisible by ep=3",
        "num_heads=6 is not divisible by tp=4",
        "ep=3 does not divide world size 8",
        "lr=0.0 is not above 0",
        "name='../x' is not a simple",
        "global_batch=9 is not divisible by accumulation*dp=1*2=2",
    ]
    assert len(lines) == len(openings)
    for opening in openings:
        assert any(line.startswith(opening) for line in lines), opening


def test_rules_that_hang_on_dp_stay_silent_when_there_is_no_dp() -> None:
    lines = problems(8, parallel__tp=3, train__global_batch=7)
    assert any(line.startswith("tp=3 does not divide world size 8") for line in lines)
    assert not any("global_batch" in line for line in lines)


def test_zeros_everywhere_are_reported_and_never_divided_by() -> None:
    lines = problems(
        0, parallel__tp=0, parallel__ep=0, model__num_heads=0, model__num_kv_heads=0, train__global_batch=0
    )
    assert "world size 0 is below 1; start at least one rank" in lines
    assert "tp=0 is below 1; set parallel.tp to 1 or more" in lines


@pytest.mark.parametrize(
    ("micro_batch", "accumulation", "expected"),
    [(None, None, (6, 1)), (None, 3, (2, 3)), (3, None, (3, 2)), (1, 6, (1, 6))],
)
def test_batch_shape_solves_for_what_is_null(
    micro_batch: int | None, accumulation: int | None, expected: tuple[int, int]
) -> None:
    train = TrainConfig(global_batch=24, seq_len=10, micro_batch=micro_batch, accumulation=accumulation)
    shape = batch_shape(train, dp=4)
    assert shape == BatchShape(micro_batch=expected[0], accumulation=expected[1], dp=4, global_batch=24, seq_len=10)
    assert shape.micro_batch * shape.accumulation * shape.dp == 24
    assert shape.micro_step_sequences == expected[0] * 4
    assert shape.tokens_per_step == 240


def test_fixed_accumulation_keeps_the_tokens_of_a_micro_step_for_every_dp() -> None:
    train = TrainConfig(global_batch=16, accumulation=2)
    assert {batch_shape(train, dp).micro_step_sequences for dp in (1, 2, 4, 8)} == {8}


def test_batch_shape_refuses_by_itself() -> None:
    with pytest.raises(ValueError, match=r"global_batch=10 is not divisible by micro_batch\*dp=2\*4=8"):
        batch_shape(TrainConfig(global_batch=10, micro_batch=2), dp=4)
    with pytest.raises(ValueError, match="dp=0 is below 1"):
        batch_shape(TrainConfig(), dp=0)


def test_validate_returns_the_shape_for_dp_not_for_the_world() -> None:
    shape = validate(config(parallel__tp=2, train__micro_batch=1), 8)
    assert (shape.dp, shape.accumulation, shape.micro_step_sequences) == (4, 4, 4)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path) -> None:
    shipped = load_config(path)
    validate(shipped, shipped.parallel.ep * shipped.parallel.tp)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path) -> None:
    assert load_study(path).points
