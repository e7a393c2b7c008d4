"""The language model: what it may see, what it is made of, and that recomputing changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.models.decoder import Decoder
from moe_dist.moe.layer import MoE
from moe_dist.parallel.feed_forward import FeedForward
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import Site
from tests.unit.helpers import context, gradients, random_ids, tiny_model


def decoder(seed: int = 0, **changes: object) -> Decoder:
    return Decoder(tiny_model(**changes), single_process_mesh(), seed=seed)


def wide_logits(model: Decoder, ids: Tensor, phase: str = "dropless") -> Tensor:
    return model.double()(ids, None, context(phase=phase), "logits")


SIGHT = [
    dict(attention=attention, experts=experts, top_k=top_k)
    for attention, experts, top_k in (("torch", "loop", 1), ("flash", "grouped_mm", 2), ("torch", "bmm", 3))
]


@pytest.mark.parametrize("changes", SIGHT, ids=str)
@pytest.mark.parametrize("at", [0, 4, 8])
def test_a_token_changes_nothing_before_it(at: int, changes: dict[str, object]) -> None:
    model, ids = decoder(**changes), random_ids(2, 9)
    other = ids.clone()
    other[0, at] = (other[0, at] + 1) % 32
    difference_BS = (wide_logits(model, ids) - wide_logits(model, other)).abs().amax(-1)
    assert (difference_BS[0, :at] < 1e-12).all()
    assert (difference_BS[0, at:] > 1e-6).all()
    assert (difference_BS[1] < 1e-12).all()  # nor in the other sequence


def test_dropping_by_position_is_causal_too() -> None:
    """One sequence, so that earlier in the micro-step is earlier in the sequence."""
    model, ids = decoder(capacity_factor=0.5, drop_policy="position"), random_ids(1, 16)
    assert model(ids, ids, context()).stats[0].kept_E.sum() < 32
    other = ids.clone()
    other[0, 10] = (other[0, 10] + 1) % 32
    difference_S = (wide_logits(model, ids, "train") - wide_logits(model, other, "train")).abs().amax(-1)[0]
    assert (difference_S[:10] < 1e-12).all()


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model, ids = decoder(), random_ids(3, 8)
    together = wide_logits(model, ids)
    for row in range(3):
        torch.testing.assert_close(together[row], wide_logits(model, ids[row : row + 1])[0])


def test_loss_is_cross_entropy_plus_auxiliary_losses() -> None:
    model, ids, targets = decoder(balance_loss_coef=0.1, z_loss_coef=0.01), random_ids(2, 8), random_ids(2, 8, seed=1)
    output = model(ids, targets, context())
    logits = model(ids, None, context(), "logits")
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 8)
    torch.testing.assert_close(model(ids, targets, context(), "token_losses"), each.detach())
    torch.testing.assert_close(output.nll, each.mean().detach())
    aux = [0.1 * float(layer.balance_loss) + 0.01 * float(layer.z_loss) for layer in output.stats]
    assert [stats.site.layer for stats in output.stats] == [0, 1]
    torch.testing.assert_close(output.loss.item(), output.nll.item() + sum(aux))
    output.loss.backward()
    gradients(model)


@pytest.mark.parametrize("policy", ["position", "score", "random"])
@pytest.mark.parametrize("experts", ["loop", "bmm", "grouped_mm"])
def test_recomputed_blocks_have_the_same_gradients_to_the_bit(experts: str, policy: str) -> None:
    ids, grads = random_ids(2, 12), {}
    for recompute in ("none", "block"):
        changes = dict(experts=experts, capacity_factor=0.75, drop_policy=policy, num_shared_experts=1)
        model = decoder(recompute=recompute, **changes)
        output = model(ids, random_ids(2, 12, seed=1), context())
        output.loss.backward()
        grads[recompute] = gradients(model) | {"loss": output.loss.detach()}
    assert output.stats[0].kept_E.sum() < 48
    for name, grad in grads["none"].items():
        assert torch.equal(grad, grads["block"][name]), name


class CountingWitness:
    """Sees every decision, and turns the router's scores around when asked again."""

    def __init__(self) -> None:
        self.decisions = 0

    def scores(self, site: Site, what: str, scores: Tensor) -> Tensor:
        return scores if self.decisions < 2 else -scores

    def decided(self, site: Site, experts_TK: Tensor, kept_TK: Tensor) -> None:
        self.decisions += 1


def test_recomputing_decides_nothing_again() -> None:
    witness, model, ids = CountingWitness(), decoder(recompute="block", capacity_factor=1.0), random_ids(2, 8)
    model(ids, ids, context(witness=witness)).loss.backward()
    assert witness.decisions == 2  # one a layer


def test_the_seed_fixes_the_weights() -> None:
    first, again, other = (dict(decoder(seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(param, again[name]) for name, param in first.items())
    same = [name for name, param in first.items() if torch.equal(param, other[name])]
    assert all(name.endswith("norm.weight") for name in same)


def test_layers_and_experts_start_differently() -> None:
    params = dict(decoder(num_layers=3).named_parameters())
    weights = [params[f"blocks.{layer}.feed_forward.experts.w_up"][e] for layer in range(3) for e in range(4)]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_tied_and_untied_embeddings() -> None:
    tied, untied = decoder(tie_embeddings=True), decoder(tie_embeddings=False)
    assert tied.output.weight is tied.embedding.weight
    extra = set(dict(untied.named_parameters())) - set(dict(tied.named_parameters()))
    assert extra == {"output.weight"}
    ids = random_ids(1, 6)
    tied(ids, ids, context()).loss.backward()
    unseen = [i for i in range(32) if i not in ids]
    assert (tied.embedding.weight.grad[unseen].abs().amax(-1) > 0).all()  # as outputs they still count
    untied(ids, ids, context()).loss.backward()
    assert untied.embedding.weight.grad[unseen].abs().max() == 0


def test_a_dense_model() -> None:
    model, ids = decoder(num_experts=0), random_ids(2, 8)
    assert [type(block.feed_forward) for block in model.blocks] == [FeedForward, FeedForward]
    output = model(ids, ids, context())
    assert output.stats == ()
    assert output.loss == output.nll
    output.loss.backward()
    gradients(model)


def test_moe_on_every_second_layer() -> None:
    model, ids = decoder(num_layers=5, every=2), random_ids(1, 8)
    assert [type(block.feed_forward) for block in model.blocks] == [FeedForward, MoE, FeedForward, MoE, FeedForward]
    assert [stats.site.layer for stats in model(ids, ids, context()).stats] == [1, 3]


def test_load_counts_every_assignment() -> None:
    model, ids = decoder(capacity_factor=0.5), random_ids(2, 8)
    for layer in model(ids, ids, context()).stats:
        assert layer.load_E.sum() == 2 * 8 * 2
        assert layer.kept_E.max() <= 4  # ceil(0.5 * 2 * 16 / 4)
    for layer in model(ids, ids, context(phase="eval")).stats:
        assert torch.equal(layer.kept_E, layer.load_E)


def test_bfloat16_runs_and_stays_close() -> None:
    model, ids = decoder(), random_ids(2, 8)
    exact = model(ids, ids, context()).nll
    low = model.bfloat16()(ids, ids, context())
    low.loss.backward()
    assert {grad.dtype for grad in gradients(model).values()} == {torch.bfloat16}
    assert abs(float(low.nll) - float(exact)) < 0.05
