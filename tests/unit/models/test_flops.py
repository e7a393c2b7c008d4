"""Parameter and FLOP counts, against numbers worked out by hand."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.config.model import AttentionConfig, ModelConfig, MoEConfig, RoutedAttentionConfig
from moe_dist.models.backends import resolve_backends
from moe_dist.models.decoder import Decoder, DecoderOutput
from moe_dist.models.flops import executed_flops, train_flops_per_token
from moe_dist.models.parameters import parameter_counts
from moe_dist.parallel.mesh import single_process_mesh
from tests.unit.helpers import context, random_ids

# D=4, H=2, P=2, G=1: attention = q 4*4 + kv 2*1*2*4 + out 4*4 = 16 + 16 + 16 = 48.
ATTENTION = 48


def tiny(**changes: object) -> ModelConfig:
    """Two layers, the second one MoE: 3 experts of width 5, 2 of them for each token, one shared."""
    moe = MoEConfig(num_experts=3, top_k=2, d_ff=5, every=2, num_shared_experts=1)
    settings = dict(vocab_size=10, d_model=4, num_layers=2, num_heads=2, num_kv_heads=1, d_ff=6, moe=moe)
    return ModelConfig(**(settings | changes))


def test_parameters_by_hand() -> None:
    # dense layer 3*4*6 = 72; one expert 3*4*5 = 60; router 3*4 = 12; norms 2 layers * 2 * 4 + 4 = 20; embedding 40
    counts = parameter_counts(tiny())
    assert counts.expert == 3 * 60
    assert counts.total == 40 + 20 + 2 * ATTENTION + 72 + 12 + 4 * 60
    assert counts.active == counts.total - 60


def test_parameters_untied_without_gate() -> None:
    # dense 2*4*6 = 48; expert 2*4*5 = 40; embedding and output 80
    counts = parameter_counts(tiny(tie_embeddings=False, activation="relu"))
    assert counts.expert == 3 * 40
    assert counts.total == 80 + 20 + 2 * ATTENTION + 48 + 12 + 4 * 40
    assert counts.active == counts.total - 40


def test_a_dense_model_has_no_experts() -> None:
    counts = parameter_counts(tiny(moe=MoEConfig(num_experts=0)))
    assert counts.expert == 0
    assert counts.total == counts.active == 40 + 20 + 2 * (ATTENTION + 72)


def test_head_dim_and_expert_width() -> None:
    # head_dim 3: q 6*4, kv 2*3*4, out 6*4 = 72; experts without a width of their own take the model's, 3*4*6 = 72
    counts = parameter_counts(tiny(head_dim=3, moe=MoEConfig(num_experts=2, top_k=1)))
    assert counts.expert == 2 * 2 * 72
    assert counts.total == 40 + 20 + 2 * (72 + 2 * 4 + 2 * 72)


@pytest.mark.parametrize(("every", "moe_layers"), [(1, 5), (2, 2), (3, 1), (6, 0)])
def test_every_nth_layer_is_moe(every: int, moe_layers: int) -> None:
    model = tiny(num_layers=5, moe=MoEConfig(num_experts=3, top_k=1, d_ff=5, every=every))
    assert moe_layers == sum((index + 1) % every == 0 for index in range(5))
    assert parameter_counts(model).expert == moe_layers * 3 * 60


@pytest.mark.parametrize(
    ("every", "first", "layers"),
    [(1, None, [0, 1, 2, 3, 4]), (2, None, [1, 3]), (1, 2, [2, 3, 4]), (2, 0, [0, 2, 4]), (3, 1, [1, 4]), (9, 4, [4])],
)
def test_dense_layers_come_first(every: int, first: int | None, layers: list[int]) -> None:
    moe = MoEConfig(num_experts=3, top_k=1, d_ff=5, every=every, first=first)
    model = tiny(num_layers=5, moe=moe)
    assert list(moe.layers(5)) == layers and moe.layer_count(5) == len(layers)
    counts, dense = parameter_counts(model), 5 - len(layers)
    assert counts.expert == len(layers) * 3 * 60
    assert counts.total == 40 + (5 * 2 + 1) * 4 + 5 * ATTENTION + dense * 72 + len(layers) * (12 + 3 * 60)
    # a router of 12, one expert of 60, or a dense layer of 72: every block costs the same
    assert train_flops_per_token(model, seq_len=3) == 3 * (2 * (5 * (ATTENTION + 72) + 40) + 5 * 2 * 2 * 4 * 2)


def test_train_flops_by_hand() -> None:
    # matrices one token meets: attention 2*48, dense 72, router 12, 2 routed + 1 shared expert 180, output 40 = 400
    # attention at S=3: keys seen 1, 2, 3, on average 2; 2 layers * 2 products * 2 FLOPs * 4 wide * 2 keys = 64
    assert train_flops_per_token(tiny(), seq_len=3) == 3 * (2 * 400 + 64)


def test_attention_options() -> None:
    both = tiny(attention=AttentionConfig(qk_ln=True, sinks=True, window=2))
    # a layer: scale and bias of 4 query and 2 key numbers, 2 sinks
    assert parameter_counts(both).total == parameter_counts(tiny()).total + 2 * (2 * (4 + 2) + 2)
    # keys seen at S=3: 1, 2, 2
    assert train_flops_per_token(both, seq_len=3) == pytest.approx(3 * (2 * 400 + 2 * 4 * 4 * 5 / 3))


def test_shared_experts_of_their_own_width_behind_a_gate() -> None:
    """One of width 7 in place of 5, and a gate of 4 numbers, in the one MoE layer."""
    moe = MoEConfig(num_experts=3, top_k=2, d_ff=5, every=2, num_shared_experts=1, shared_d_ff=7, shared_gate=True)
    more = 3 * 4 * (7 - 5) + 4
    assert parameter_counts(tiny(moe=moe)).active == parameter_counts(tiny()).active + more
    assert parameter_counts(tiny(moe=moe)).expert == parameter_counts(tiny()).expert
    assert train_flops_per_token(tiny(moe=moe), 3) == train_flops_per_token(tiny(), 3) + 3 * 2 * more


def test_windows_by_layer() -> None:
    """Keys seen at S=3: 1, 2, 2 in the first layer, 1, 2, 3 in the second."""
    alternating = tiny(attention=AttentionConfig(window=[2, None]))
    assert train_flops_per_token(alternating, seq_len=3) == pytest.approx(3 * (2 * 400 + 2 * 2 * 4 * (5 + 6) / 3))


@pytest.mark.parametrize("kind", ["multi_query", "switch", "routed"])
def test_counts_are_those_of_the_model(kind: str) -> None:
    attention = AttentionConfig(kind=kind, backend="torch", position="none")
    model = resolve_backends(tiny(attention=attention), 1)
    built = Decoder(model, single_process_mesh())
    assert parameter_counts(model).total == sum(p.numel() for p in built.parameters())


@pytest.mark.parametrize(("factor", "met"), [(0.5, 1.0), (1.0, 2.0), (1.25, 2.5), (2.0, 3.0)])
def test_under_expert_choice_the_capacity_says_what_a_token_meets(factor: float, met: float) -> None:
    """Three experts take factor * 2 / 3 of the tokens each, never more than all."""
    moe = MoEConfig(num_experts=3, top_k=2, d_ff=5, every=2, router="expert_choice", capacity_factor=factor)
    counts = parameter_counts(tiny(moe=moe))
    assert counts.total - counts.active == (3 - met) * 60
    # as in test_train_flops_by_hand, but for the experts
    assert train_flops_per_token(tiny(moe=moe), seq_len=3) == pytest.approx(3 * (2 * (220 + met * 60) + 64))


@pytest.mark.parametrize("router", ["softmax", "expert_choice"])
@pytest.mark.parametrize("kind", ["multi_query", "switch"])
def test_executed_flops_are_those_that_torch_counts(kind: str, router: str) -> None:
    """What training costs more at one capacity than at another, counted product by product by torch."""
    measured, told, nominal = [], [], []
    for factor in (0.5, 2.0):
        own = MoEConfig(num_experts=3, top_k=2, capacity_factor=factor, experts="loop")
        moe = MoEConfig(num_experts=4, top_k=2, d_ff=5, router=router, capacity_factor=factor, experts="loop")
        attention = AttentionConfig(kind=kind, backend="torch", moe=own)
        model = resolve_backends(tiny(attention=attention, moe=moe), 1, "cpu")
        built, tokens = Decoder(model, single_process_mesh(), seed=3), random_ids(4, 8, vocab=10)
        with FlopCounterMode(display=False) as counter:
            output = built(tokens, tokens.roll(1, 1), context())
            output.loss.backward()
        assert isinstance(output, DecoderOutput)
        measured.append(counter.get_total_flops())
        nominal.append(train_flops_per_token(model, 8))
        told.append(executed_flops(model, nominal[-1], tokens.numel(), output.stats))
    assert measured[1] > measured[0]
    assert told[1] - told[0] == pytest.approx(measured[1] - measured[0])
    if router == "expert_choice" and kind == "multi_query":  # nothing is dropped, so nominal is executed
        assert told == pytest.approx([32 * each for each in nominal])


def test_routed_attention_costs_what_it_chooses() -> None:
    routed = RoutedAttentionConfig(num_experts=3, num_routed_queries=2, num_routed_key_values=1, local_window=4)
    model = tiny(attention=AttentionConfig(kind="routed", routed=routed))
    # S=8: window 1 of 2; an expert has 2 queries, each 2*16 for q and 2*16 for out, on 2 keys 2*2*4 each; 1 key of 2*16
    far = 3 * (2 * 2 * 4 + (2 * (64 + 32) + 32) / 8)
    # local attention, 5 keys at most: 1, 2, 3, 4, 5, 5, 5, 5
    assert train_flops_per_token(model, seq_len=8) == pytest.approx(3 * (2 * 400 + 2 * 4 * 4 * 30 / 8 + 2 * far))


def test_train_flops_ignore_what_is_not_computed() -> None:
    base = train_flops_per_token(tiny(), seq_len=8)
    assert train_flops_per_token(tiny(tie_embeddings=False), seq_len=8) == base  # a lookup is no matmul
    idle = MoEConfig(num_experts=4, top_k=2, d_ff=5, every=2, num_shared_experts=1)
    assert train_flops_per_token(tiny(moe=idle), seq_len=8) == base + 3 * 2 * 4  # a router row, not an expert
    tight = MoEConfig(num_experts=3, top_k=2, d_ff=5, every=2, num_shared_experts=1, capacity_factor=0.5)
    assert train_flops_per_token(tiny(moe=tight), seq_len=8) == base
