"""Every number of the configuration at its extremes: taken, or refused at once in lines that name it."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, get_args, get_origin

import pytest

from moe_dist.config import Config, validate
from moe_dist.config.parse import field_types
from moe_dist.config.rules.memory import machine_memory, parts_of
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.config.test_validate import config

INTEGERS = [0, -1, 2**31, 2**62, -(2**31)]
NUMBERS = [0.0, -1.0, 1e-30, 1e-308, 1e30, 1e308, -1e30]
MEMORY = 8 * 2**30
# Under each of them other options count; what another choice leaves unused is refused whatever its size.
BASES: dict[str, dict[str, Any]] = {
    "default": {},
    "sigmoid": {"model__moe__router": "sigmoid"},
    "noisy": {"model__moe__router": "noisy"},
    "quantile": {"model__moe__balance": "loss+quantile"},
    "sinkhorn": {"model__moe__router": "sinkhorn"},
    "hierarchical": {"model__moe__dispatch": "hierarchical"},
    "switch": {"model__attention__kind": "switch", "model__attention__moe__router": "sigmoid"},
    "switch_noisy": {"model__attention__kind": "switch", "model__attention__moe__router": "noisy"},
    "switch_sinkhorn": {"model__attention__kind": "switch", "model__attention__moe__router": "sinkhorn"},
    "routed": {"model__attention__kind": "routed"},
    "yarn": {"model__attention__rope_scaling": "yarn", "model__attention__rope_original_len": 64},
    "llama3": {
        "model__attention__rope_scaling": "llama3",
        "model__attention__rope_original_len": 64,
        "model__moe__num_shared_experts": 1,
    },
    "wsd": {"optim__schedule": "wsd"},
    "classification": {"task": "classification"},
    "zero": {"engine__name": "deepspeed", "engine__zero_stage": 3},
}
UNBOUNDED = {"train.seed", "train.data_seed"}


def numbers(hint: Any) -> list[Any]:
    if get_origin(hint) is dict:
        return []
    kinds = get_args(hint) or (hint,)
    return INTEGERS if int in kinds else NUMBERS if float in kinds else []


def with_value(base: Config, path: str, value: Any) -> Config:
    changed: Any = deepcopy(base)
    *sections, last = path.split(".")
    section = changed
    for name in sections:
        section = getattr(section, name)
    setattr(section, last, value)
    return changed


def cases() -> Iterator[tuple[str, Any]]:
    for path, hint in field_types(Config).items():
        for value in numbers(hint):
            yield path, value
    for section in ("model.moe", "model.attention.moe"):
        yield from ((f"{section}.capacity_factor", [1.0, 1.0, 1.0, value]) for value in NUMBERS if value > 0)
        yield from ((f"{section}.capacity_schedule", {0: value}) for value in NUMBERS)
        yield from ((f"{section}.capacity_schedule", {value: 1.0}) for value in INTEGERS)
    yield from (("model.moe.d_ff", [8] * 7 + [value]) for value in INTEGERS)


@pytest.mark.parametrize("name", BASES)
def test_every_number_is_taken_or_refused_in_lines_that_name_it(name: str) -> None:
    base = config(**BASES[name])
    validate(base, 1, MEMORY)
    for path, value in cases():
        try:
            validate(with_value(base, path, value), 1, MEMORY)
        except ValueError as error:
            lines = str(error).splitlines()
            sections = {path, path.rpartition(".")[0], path.rpartition(".")[2]}
            assert all(any(each in line for each in sections) for line in lines), (path, value, lines)


@pytest.mark.parametrize("name", BASES)
def test_no_number_is_without_bounds(name: str) -> None:
    base = config(**BASES[name])
    for path, hint in field_types(Config).items():
        for value in {int: (2**62, -1), float: (1e308, -1.0)}.get(type((numbers(hint) or [""])[0]), ()):
            if path in UNBOUNDED and value > 0:
                continue
            with pytest.raises(ValueError):
                validate(with_value(base, path, value), 1)
                pytest.fail(f"{path}={value} was taken")


@pytest.mark.parametrize(
    ("blamed", "values"),
    [
        ("num_experts=1048576", {"model__moe__num_experts": 2**20}),
        ("vocab_size=16777216", {"model__vocab_size": 2**24}),
        ("d_ff=16777216", {"model__d_ff": 2**24}),
        ("d_ff=16777216", {"model__moe__d_ff": 2**24}),
        ("num_layers=9999", {"model__num_layers": 9999}),
        ("global_batch=1048576", {"train__global_batch": 2**20}),
        ("micro_batch=1048576", {"train__global_batch": 2**20, "train__micro_batch": 2**20}),
        ("seq_len=16777216", {"train__seq_len": 2**24}),
    ],
)
def test_what_does_not_fit_is_one_line_that_names_the_number_to_blame(blamed: str, values: dict[str, Any]) -> None:
    wanted = config(**values)
    validate(wanted, 1)  # on another machine, perhaps
    with pytest.raises(ValueError) as caught:
        validate(wanted, 1, MEMORY)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{blamed} is too much for 8.0 GiB of memory: ")


def test_the_bound_is_below_what_a_run_holds() -> None:
    """Against the parameters of the model itself, 16 bytes each."""
    wanted = config(model__d_model=32, model__num_layers=4, model__moe__every=2, model__d_ff=48, model__num_heads=4)
    model = resolve_backends(wanted.model, 1)
    held = 16 * sum(param.numel() for param in Decoder(model, single_process_mesh()).parameters())
    bound = sum(part.size for part in parts_of(wanted, validate(wanted, 1)) if part.what != "activations")
    assert 0.9 * held < bound <= held


def test_ranks_share_what_is_cut() -> None:
    def experts(**values: Any) -> float:
        wanted = config(**values)
        return {part.what: part.size for part in parts_of(wanted, validate(wanted, 8))}["experts"]

    whole = experts()
    assert experts(parallel__ep=4) == whole / 4
    assert experts(parallel__ep=4, engine__name="deepspeed", engine__zero_stage=1) == whole / 8
    assert experts(parallel__ep=2, parallel__etp=2, parallel__tp=2) == whole / 4


def test_this_machine_has_memory() -> None:
    assert 2**28 < machine_memory() < 2**50
