"""The classifier: padding that changes nothing, texts that do not see each other, experts that come and go."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import moe_dist
from moe_dist.models.block import moe_layer
from moe_dist.models.classifier import Classifier
from moe_dist.models.parameters import classifier_parameter_counts
from moe_dist.moe.layer import MoE
from moe_dist.parallel.mesh import Group, single_process_mesh
from moe_dist.parallel.sharding import initialize
from moe_dist.standalone.classifier import SwitchClassifier
from moe_dist.step import RealTokens
from moe_dist.train.record.metrics import moe_record
from tests.unit.helpers import context, gradients, random_ids, tiny_model

ROUTERS = [dict(top_k=1), dict(router="sigmoid", top_k=2), dict(router="hash"), dict(router="expert_choice")]
POLICIES = [
    dict(capacity_factor=factor, drop_policy=policy, overflow=overflow)
    for factor in (0.5, 1.0)
    for policy in ("position", "score", "random")
    for overflow in ("drop", "reroute")
] + [dict(capacity_factor=0.5, drop_order="choice", overflow=overflow) for overflow in ("drop", "reroute")]


def classifier(**options: object) -> SwitchClassifier:
    settings = dict(num_experts=4, embed_dim=16, ff_dim=24, vocab_size=32, dropout_rate=0.0, num_classes=3, seed=1)
    model = SwitchClassifier(**{**settings, "num_layers": 2, "max_len": 12, **options})
    return model.double()


def padded_ids(*lengths: int, width: int = 12) -> Tensor:
    ids = random_ids(len(lengths), width) % 31 + 1
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    return ids


def test_the_document() -> None:
    """The snippet of the document, with moe_dist for its module."""
    model = moe_dist.Model(num_experts=8, embed_dim=64, ff_dim=64, vocab_size=20000, dropout_rate=0.1)
    assert moe_dist.Model is moe_dist.SwitchClassifier
    logits, aux_loss = model(torch.randint(1, 20000, (3, 50)))
    assert logits.shape == (3, 2) and aux_loss.shape == () and aux_loss > 0


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_padding_changes_nothing(capacity_factor: float | None) -> None:
    """Neither what it holds nor how much there is of it: logits, loss, loads and every gradient."""
    wide, lengths = padded_ids(5, 8, 1), (5, 8, 1)
    mask = torch.arange(12) < torch.tensor(lengths)[:, None]
    garbage = torch.where(mask, wide, random_ids(3, 12, seed=5))
    results = []
    for ids, where in ((wide[:, :8], None), (wide, None), (wide, mask), (garbage, mask), (garbage, mask.int())):
        model = classifier(capacity_factor=capacity_factor)
        logits, aux = model(ids, where)
        (F.cross_entropy(logits, torch.tensor([0, 1, 2])) + aux).backward()
        results.append((logits, aux, model.expert_counts, gradients(model)))
        assert model.expert_counts.sum(1).tolist() == [14, 14]  # one expert a token
    for logits, aux, counts, grads in results[1:]:
        torch.testing.assert_close(logits, results[0][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(aux, results[0][1], rtol=1e-12, atol=1e-12)
        assert counts.equal(results[0][2])
        for name, grad in grads.items():
            torch.testing.assert_close(grad, results[0][3][name], rtol=1e-10, atol=1e-12, msg=name)


def layer_of(**changes: object) -> MoE:
    layer = moe_layer(tiny_model(**changes), 0, single_process_mesh())
    initialize(layer, 3)
    return layer.double()


def assert_as_without_padding(**changes: object) -> None:
    """Output, statistics and gradients of an MoE layer are those of the real tokens alone; padding gets zero."""
    layer = layer_of(**changes)
    x_TD = torch.randn(13, 16, dtype=torch.float64)
    mask_T = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0]).bool()
    ids_T = torch.arange(13) * 5
    step = context(phase="train")
    alone = copy.deepcopy(layer)
    real = RealTokens.of(mask_T, Group())
    y_TD, stats = layer(x_TD, replace(step, token_ids_T=ids_T, real=real))
    expected_rD, expected = alone(x_TD[mask_T], replace(step, token_ids_T=ids_T[mask_T]))
    if changes.get("drop_policy") != "random":  # drawn by place in the batch, which padding moves
        torch.testing.assert_close(y_TD[mask_T], expected_rD, rtol=1e-12, atol=1e-12)
        for name in ("aux_loss", "balance_loss", "z_loss", "entropy", "load_E", "kept_E", "unserved"):
            torch.testing.assert_close(getattr(stats, name), getattr(expected, name), rtol=1e-12, atol=0, msg=name)
        (y_TD.square().sum() + stats.aux_loss).backward()
        (expected_rD.square().sum() + expected.aux_loss).backward()
        for (name, param), other in zip(layer.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert stats.load_E.equal(expected.load_E) and stats.load_E.sum() == expected.load_E.sum() > 0
    if layer.config.capacity_factor is not None:
        assert stats.kept_E.max() <= -(-8 * layer.config.top_k * layer.config.capacity_factor // 4)
    assert (y_TD[~mask_T] == 0).all()


@pytest.mark.parametrize("changes", ROUTERS, ids=str)
@pytest.mark.parametrize("capacity_factor", [None, 0.5, 1.0])
def test_routing_counts_real_tokens_alone(changes: dict[str, object], capacity_factor: float | None) -> None:
    if capacity_factor is None and changes.get("router") == "expert_choice":
        capacity_factor = 2.0
    assert_as_without_padding(capacity_factor=capacity_factor, **changes)


@pytest.mark.parametrize("changes", POLICIES, ids=str)
def test_capacity_is_for_real_tokens_alone(changes: dict[str, object]) -> None:
    assert_as_without_padding(**changes)


@pytest.mark.parametrize("changes", [dict(router="noisy"), dict(router="sinkhorn"), dict(balance_scope="sequence")])
def test_who_would_count_padding_says_so(changes: dict[str, object]) -> None:
    layer, mask_T = layer_of(**changes), torch.tensor([True, False])
    with pytest.raises(ValueError, match="counts padding as tokens"):
        layer(torch.randn(2, 16).double(), replace(context(), real=RealTokens(mask_T, 1)))


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "hash", "expert_choice"])
def test_a_batch_of_padding_alone_is_finite(router: str) -> None:
    model = classifier(router=router)
    logits, aux = model(torch.zeros(2, 4, dtype=torch.int64))
    (logits.sum() + aux).backward()
    assert float(aux) == 0.0
    assert logits[0].equal(logits[1]) and all(grad.isfinite().all() for grad in gradients(model).values())


NOTHING = [dict(router=router) for router in ("softmax", "sigmoid", "hash", "expert_choice")]
NOTHING += [dict(drop_policy="score"), dict(drop_policy="random"), dict(drop_order="choice"), dict(overflow="reroute")]
NOTHING += [dict(min_capacity=0), dict(capacity_factor=None), dict(num_shared_experts=1)]


@pytest.mark.parametrize("changes", NOTHING, ids=str)
def test_a_step_of_padding_alone_is_a_step(changes: dict[str, object]) -> None:
    """Nothing is routed: zero from the experts, no loss, zero gradients, and a record of finite numbers."""
    layer = layer_of(**({"capacity_factor": 1.0} | changes))
    x_TD, mask_T = torch.randn(6, 16, dtype=torch.float64, requires_grad=True), torch.zeros(6, dtype=torch.bool)
    step = replace(context(), real=RealTokens(mask_T, 0), token_ids_T=torch.arange(6))
    y_TD, stats = layer(x_TD, step)
    (y_TD.sum() + stats.aux_loss).backward()
    if "num_shared_experts" not in changes:
        assert (y_TD == 0).all()
    assert float(stats.aux_loss.detach()) == 0.0 and not stats.load_E.any() and not stats.kept_E.any()
    assert all(grad.isfinite().all() for grad in [x_TD.grad, *gradients(layer.experts).values()])
    layer.router.balance(stats.load_E)
    assert all(value.isfinite().all() for value in layer.state_dict().values())
    record = moe_record([stats], row_bytes=4)
    assert (record["drop_rate"], record["unserved_rate"], record["load_max_over_mean"]) == (0.0, 0.0, 1.0)
    assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))


def test_texts_of_a_batch_do_not_see_each_other() -> None:
    model, ids = classifier(), padded_ids(5, 12, 7)
    together = model.predict(ids)
    for row in range(3):
        torch.testing.assert_close(model.predict(ids[row : row + 1])[0], together[row], rtol=1e-12, atol=1e-12)


def test_every_token_is_seen_and_order_matters() -> None:
    model, ids = classifier(), padded_ids(12)
    before = model.predict(ids)
    for place in range(12):
        other = ids.clone()
        other[0, place] = ids[0, place] % 31 + 1
        assert (model.predict(other) - before).abs().max() > 1e-6
    assert (model.predict(ids.flip(1)) - before).abs().max() > 1e-6


def test_by_hand() -> None:
    """One block with one expert, written out: softmax over one expert is weight 1."""
    model = classifier(num_experts=1, num_layers=1, num_heads=2, capacity_factor=None)
    ids = padded_ids(3, 12)
    core, block = model.core, model.core.blocks[0]
    weights = dict(model.named_parameters())

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale

    for row, length in enumerate((3, 12)):
        x = weights["core.embedding.weight"][ids[row, :length]] + core.positions[:length]
        key_SP, value_SP = (x @ block.attention.key_value.weight.t()).split(8, dim=-1)
        heads = (x @ block.attention.query.weight.t()).split(8, dim=-1)
        seen = [(head @ key_SP.t() / 8**0.5).softmax(-1) @ value_SP for head in heads]
        x = norm(x + torch.cat(seen, -1) @ block.attention.out.weight, block.attention_norm.weight)
        experts = block.feed_forward.experts
        hidden = F.gelu(x @ experts.w_up[0].t())
        x = norm(x + hidden @ experts.w_out[0], block.feed_forward_norm.weight)
        logits = core.head @ x.mean(0) + core.head_bias
        torch.testing.assert_close(model.eval()(ids)[0][row], logits, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences() -> None:
    model, ids, labels = classifier(num_layers=1, capacity_factor=None), padded_ids(4, 9), torch.tensor([2, 0])

    def loss() -> Tensor:
        logits, aux = model(ids)
        return F.cross_entropy(logits, labels) + aux

    loss().backward()
    for name, param in model.named_parameters():
        assert param.grad is not None
        direction = torch.randn_like(param)
        with torch.no_grad():
            values = []
            for sign in (1, -1, -1, 1):  # there, back and further, back, back
                values.append(float(loss()))
                param += sign * 1e-6 * direction
            slope = (values[1] - values[3]) / 2e-6
        torch.testing.assert_close(slope, float((param.grad * direction).sum()), rtol=1e-4, atol=1e-8, msg=name)


def test_dropout_is_for_training_and_repeats_with_the_seed() -> None:
    ids = padded_ids(12, 6)
    one, two = (classifier(dropout_rate=0.5, token_dropout=0.2) for _ in range(2))
    first, second = one(ids)[0], one(ids)[0]
    assert not first.equal(second)
    assert two(ids)[0].equal(first) and two(ids)[0].equal(second)
    assert 0 < one.expert_counts[0].sum() < 18
    assert one.predict(ids).equal(classifier(dropout_rate=0.0).predict(ids)) and one.training
    state = one.state_dict()
    three = classifier(dropout_rate=0.5, token_dropout=0.2, seed=2)
    three.load_state_dict(state)
    assert three(ids)[0].equal(one(ids)[0])


@pytest.mark.parametrize("init", ["clone", "random"])
def test_a_closed_expert_changes_no_bit(init: str) -> None:
    model, ids = classifier(), padded_ids(12, 6)
    before, (train_before, aux_before) = model.predict(ids), model(ids)
    assert model.add_experts(2, init) == [4, 5] and model.num_experts == 6
    assert model.predict(ids).equal(before)
    model.step -= 1
    train_after, aux_after = model(ids)
    assert train_after.equal(train_before) and aux_after.equal(aux_before)
    model.open_experts([4, 5])
    assert not model.predict(ids).equal(before)
    model.close_experts([4, 5])
    assert model.remove_experts([4, 5]) == [0, 1, 2, 3]
    assert model.predict(ids).equal(before) and model.num_experts == 4


def test_removing_an_open_expert_that_no_token_would_choose() -> None:
    """Its probability is exp(-1000): nothing to share out among the others."""
    model, ids = classifier(), padded_ids(12, 6)
    hooks = [layer.register_forward_pre_hook(_far_from(2)) for layer in model.moe_layers]
    before = model.predict(ids)
    assert (model.expert_counts[:, 2] == 0).all()
    for hook in hooks:
        hook.remove()
    model.remove_experts([2])
    hooks = [layer.register_forward_pre_hook(_far_from(None)) for layer in model.moe_layers]
    torch.testing.assert_close(model.predict(ids), before, rtol=1e-12, atol=1e-12)


def _far_from(expert: int | None) -> object:
    """The first feature of every token becomes 1, and the expert's router row -1000 there, so its logit is that."""

    def hook(layer: MoE, args: tuple[Tensor, object]) -> tuple[Tensor, object]:
        x_TD = args[0].clone()
        x_TD[:, 0] = 1.0
        if expert is not None:
            with torch.no_grad():
                layer.router.weight[expert, 0] = -1000.0
        return x_TD, args[1]

    return hook


def test_what_cannot_be_is_refused() -> None:
    for options, words in (
        (dict(embed_dim=30), "embed_dim=30 is not divisible by num_heads=4"),
        (dict(num_classes=1), "num_classes=1 is below 2"),
        (dict(dropout_rate=1.0), "dropout=1.0 is outside"),
        (dict(top_k=5), "top_k=5 is larger than num_experts=4"),
        (dict(router="sinkhorn"), "router=sinkhorn counts padding"),
        (dict(pad_id=32), "pad_id=32 below vocab_size=32"),
        (dict(num_experts=0, top_k=1), "num_experts=0 is below 1"),
    ):
        with pytest.raises(ValueError, match=words):
            classifier(**options)
    with pytest.raises(ValueError, match="must be \\[B, S\\] with 1 <= S <= 12"):
        classifier()(torch.ones(2, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask has shape"):
        classifier()(padded_ids(3), torch.ones(1, 3))


@pytest.mark.parametrize("changes", [{}, dict(num_experts=0), dict(every=2), dict(num_shared_experts=1)], ids=str)
def test_parameter_counts_are_those_of_the_model(changes: dict[str, object]) -> None:
    config = tiny_model(num_classes=5, **changes)
    counts = classifier_parameter_counts(config, max_len=20)
    model = Classifier(config, single_process_mesh(), max_len=20)
    assert counts.total == sum(param.numel() for param in model.parameters())


def test_activation_checkpointing_without_torchs_generator_asks_for_the_step() -> None:
    model, ids = SwitchClassifier(4, 16, 32, 20, dropout_rate=0.5, seed=1), torch.randint(1, 20, (4, 6))
    weight = model.core.embedding.weight
    (expected,) = torch.autograd.grad(model(ids, step=3)[0].square().sum(), weight)
    again = checkpoint(lambda ids: model(ids, step=3)[0], ids, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), weight), (expected,))
    with pytest.raises(ValueError, match="give forward the same `step`"):
        checkpoint(lambda ids: model(ids)[0], ids, use_reentrant=False, preserve_rng_state=False).sum().backward()


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        (torch.full((2, 4), 25), None, "0 <= id < 20"),
        (torch.ones(2, 4), None, "must be int32 or int64"),
        (torch.ones(2, 4, dtype=torch.int64), torch.full((2, 4), -1e9), "0 and 1 alone"),
    ],
    ids=["range", "dtype", "mask"],
)
def test_mistakes_of_a_call(ids: torch.Tensor, mask: torch.Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SwitchClassifier(4, 16, 32, 20)(ids, mask)
