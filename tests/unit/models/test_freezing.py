"""Which parameters patterns freeze, what is said of them, and which patterns are refused."""

import pytest
import torch

from moe_dist.models.decoder import Decoder
from moe_dist.models.freezing import freeze
from moe_dist.moe.balance import Tally
from moe_dist.parallel.mesh import single_process_mesh
from moe_dist.step import Site
from tests.unit.helpers import context, random_ids, tiny_model


def decoder_of(**changes: object) -> Decoder:
    return Decoder(tiny_model(**changes), single_process_mesh())


def frozen_in(model: Decoder) -> set[str]:
    return {name for name, param in model.named_parameters() if not param.requires_grad}


def test_patterns_freeze_what_they_match_and_nothing_else() -> None:
    model = decoder_of(tie_embeddings=False)
    found = freeze(model, ["embedding.*", "blocks.*.experts.w_up", "blocks.1.attention_norm.weight"])
    expected = {"embedding.weight", "blocks.1.attention_norm.weight"}
    expected |= {f"blocks.{layer}.feed_forward.experts.w_up" for layer in (0, 1)}
    assert frozen_in(model) == expected == set(found.names)
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    assert found.elements == sum(sizes[name] for name in expected) and found.total == sum(sizes.values())
    assert f"4 parameters, {found.elements / found.total:.1%} of all numbers" in found.describe()
    assert freeze(model, []) is None


def test_a_tied_matrix_is_frozen_by_either_of_its_names() -> None:
    for pattern in ("embedding.weight", "output.weight"):
        model = decoder_of(tie_embeddings=True)
        found = freeze(model, [pattern])
        assert frozen_in(model) == {"embedding.weight"}
        assert "tied, so the same as output.weight" in found.describe()


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("embeding.weight", "did you mean embedding.weight"),
        ("blocks.0.feed_forward", "did you mean blocks.0.feed_forward.\\*"),
        ("blocks.7.*", "did you mean blocks.1.*"),
        ("", "names are like embedding.weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, near: str) -> None:
    model = decoder_of()
    with pytest.raises(ValueError, match=f"{pattern!r} matches no parameter; .*{near}".replace("*'", "\\*'")):
        freeze(model, ["blocks.0.*", pattern])
    assert frozen_in(model) == set()


def test_something_must_be_left_to_train() -> None:
    with pytest.raises(ValueError, match=r"freeze=\['\*'\] leaves nothing to train: all \d+ parameters match"):
        freeze(decoder_of(), ["*"])


def test_a_balancing_bias_that_is_named_does_not_move() -> None:
    model = decoder_of(router="sigmoid", bias_update_rate=0.1)
    freeze(model, ["blocks.0.*"])
    tally = Tally(torch.tensor([9, 1, 1, 1]))
    model.balance_routers({Site(layer, "feed_forward"): tally for layer in (0, 1)})
    biases = [block.feed_forward.router.bias_E for block in model.blocks]
    assert bool((biases[0] == 0).all()) and bool((biases[1] != 0).any())


def test_gradients_pass_through_what_is_frozen() -> None:
    """Those of all others are what they are when everything is trained."""
    ids = random_ids(2, 8)
    gradients = []
    for patterns in ([], ["blocks.1.*", "output.norm.*"]):
        model = decoder_of()
        freeze(model, patterns)
        model(ids, ids, context()).loss.backward()
        gradients.append({name: param.grad for name, param in model.named_parameters()})
    everything, rest = gradients
    assert all(rest[name] is None for name in rest if name.startswith(("blocks.1.", "output.norm.")))
    assert rest["embedding.weight"] is not None and rest["blocks.0.attention.query.weight"] is not None
    assert all(torch.equal(grad, everything[name]) for name, grad in rest.items() if grad is not None)
