"""`MixtureOfExperts` over expert and tensor parallelism against one process with all tokens and all experts."""

import torch
from torch import Tensor

from moe_dist import MixtureOfExperts
from moe_dist.parallel.mesh import Mesh, create_mesh
from tests.dist.helpers import raised, run_checks

T, D, E = 24, 8, 4
CASES = [
    dict(drop_policy="random"),
    dict(top_k=1, drop_policy="score"),
    dict(router="noisy"),
    dict(router="sigmoid", jitter=0.0),
    dict(router="expert_choice"),
    dict(router="sinkhorn"),
    dict(router="softmax", overflow="reroute"),
]


def mixture(mesh: Mesh | None, options: dict[str, object]) -> MixtureOfExperts:
    moe = dict(num_experts=E, dropout=0.2, expert_capacity_factor=0.75, experts="loop") | options
    return MixtureOfExperts(D, 12, seed=1, mesh=mesh, **moe).double()


def draw(seed: int) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_layouts() -> None:
    """Outputs with dropout, counts and what is dropped, two steps on; all experts open, and one closed."""
    for ep, tp in ((1, 1), (2, 1), (4, 1), (2, 2)):
        mesh = create_mesh(ep, tp)
        own = slice(mesh.dp.rank * T // mesh.dp.size, (mesh.dp.rank + 1) * T // mesh.dp.size)
        for options in CASES:
            part, whole = mixture(mesh, options), mixture(None, options)
            for step in range(3):
                if step == 2:
                    part.close_experts([1])
                    whole.close_experts([1])
                y_TD, expected_TD = part(draw(step)[own]), whole(draw(step))
                torch.testing.assert_close(y_TD, expected_TD[own], rtol=1e-9, atol=1e-11)
                assert torch.equal(part.expert_counts, whole.expert_counts)
            assert part.expert_counts[1] == 0


def check_mistakes() -> None:
    mesh = create_mesh(4, 1)
    assert "give a seed" in raised(ValueError, lambda: MixtureOfExperts(D, 12, E, mesh=mesh))
    assert "not divisible by ep=4" in raised(ValueError, lambda: MixtureOfExperts(D, 12, 6, seed=0, mesh=mesh))
    part = mixture(mesh, {})
    assert "gather the model on one process" in raised(ValueError, part.add_experts, 4)


def test_on_four_ranks() -> None:
    run_checks(4, [check_layouts, check_mistakes])
