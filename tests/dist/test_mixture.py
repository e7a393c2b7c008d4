"""`MixtureOfExperts` over expert and tensor parallelism against one process with all tokens and all experts."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_dist import MixtureOfExperts, MultiQueryAttention, TransformerBlock
from moe_dist.parallel.collectives import all_gather
from moe_dist.parallel.mesh import Mesh, create_mesh, single_process_mesh
from moe_dist.standalone.ddp import prepare_for_ddp
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
            part, whole = mixture(mesh, options), mixture(single_process_mesh(), options)
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


def check_copies() -> None:
    """The whole layer on every rank, under DDP: the bias moves by the load of all, and ranks draw other numbers."""
    rank = dist.get_rank()
    plain = dict(router="sigmoid", bias_update_rate=0.1, dropout=0.0, expert_capacity_factor=None)
    layer, whole = mixture(None, plain), mixture(None, plain)
    wrapped = DistributedDataParallel(layer)
    for step in range(2):
        own_TD = draw(step).chunk(4)[rank]
        wrapped(own_TD[: 1 + rank]).sum().backward()  # unequal loads
        if rank == 3:
            layer.loads.since_balance = None  # this one saw nothing: it takes part all the same
        layer.balance()
        seen = [draw(step).chunk(4)[r][: 1 + r] for r in range(3)]
        whole.moe.router.balance(sum(_load(whole, x_TD) for x_TD in seen))
        assert torch.equal(layer.moe.router.bias_E, whole.moe.router.bias_E)
        assert layer.moe.router.bias_E.any() or step == 1  # what the first moved, the second may move back
    for options in (dict(dropout=0.5), dict(dropout=0.0, jitter=0.9, top_k=1), dict(dropout=0.0, router="noisy")):
        ones_TD = torch.ones(T, D, dtype=torch.float64)
        noisy = mixture(None, dict(expert_capacity_factor=None) | options)
        if "router" in options:
            noisy.moe.router.noise_weight.data.fill_(1.0)
        y_TD = noisy(ones_TD).detach()
        everyone = all_gather(y_TD[None].contiguous(), create_mesh(1, 1).world)
        assert all(not torch.equal(everyone[i], everyone[j]) for i in range(4) for j in range(i)), options


def _load(layer: MixtureOfExperts, x_TD: Tensor) -> Tensor:
    """Assignments by hand."""
    router = layer.moe.router
    scores_TE = (x_TD @ router.weight.t()).sigmoid() + router.bias_E
    return scores_TE.topk(2).indices.flatten().bincount(minlength=E)


def check_cut_under_ddp() -> None:
    """DDP writes rank 0's experts over the others' and is refused; prepared, it gives the gradients of one process."""
    mesh, plain = create_mesh(2, 1), dict(dropout=0.0, expert_capacity_factor=None)

    def model(mesh: Mesh | None) -> nn.Sequential:
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(D, D).double(), mixture(mesh, plain), nn.Linear(D, 1).double())

    own_TD = draw(9).chunk(4)[dist.get_rank()]
    spoilt = DistributedDataParallel(model(mesh))
    assert "prepare_for_ddp(model) before wrapping" in raised(ValueError, spoilt, own_TD)
    part, whole = model(mesh), model(None)
    prepare_for_ddp(part)
    wrapped = DistributedDataParallel(part)
    for _ in range(2):  # gradients add up
        wrapped(own_TD).mean().backward()
        whole(draw(9)).mean().backward()
    for (name, ours), (_, theirs) in zip(part.named_parameters(), whole.named_parameters(), strict=True):
        expected = theirs.grad
        if ours.shape != theirs.shape:
            expected = expected.chunk(2)[mesh.ep.rank]
        torch.testing.assert_close(ours.grad, expected, rtol=1e-8, atol=1e-12, msg=name)


def check_filled_after_fsdp() -> None:
    """Made without memory, cut over four ranks and then filled: each parameter together is that of one process."""
    devices = init_device_mesh("cpu", (4,))
    for make in (
        lambda device: MixtureOfExperts(D, 12, E, seed=1, num_shared_experts=1, expert_bias=True, device=device),
        lambda device: TransformerBlock(D, 2, 12, use_moe=True, num_experts=E, seed=1, device=device),
        lambda device: MultiQueryAttention(D, 2, "torch", qk_ln=True, sinks=True, seed=1, device=device),
    ):
        layer, expected = make("meta"), dict(make("cpu").named_parameters())
        fully_shard(layer, mesh=devices)
        layer.to_empty(device="cpu")
        layer.reset_parameters()
        for name, param in layer.named_parameters():
            assert param.to_local().numel() < param.numel()
            assert torch.equal(param.full_tensor(), expected[name]), name
        weights = {name: 2 * tensor.detach() for name, tensor in expected.items()}  # and no seed, as other tools write
        set_model_state_dict(layer, weights, options=StateDictOptions(full_state_dict=True, strict=False))
        for name, param in layer.named_parameters():
            assert torch.equal(param.full_tensor(), 2 * expected[name]), name
        whole = get_model_state_dict(layer, options=StateDictOptions(full_state_dict=True))
        set_model_state_dict(layer, whole, options=StateDictOptions(full_state_dict=True))


def test_on_four_ranks() -> None:
    run_checks(4, [check_layouts, check_mistakes, check_copies, check_cut_under_ddp, check_filled_after_fsdp])
