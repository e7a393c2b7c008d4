"""Slopes by hand and against other libraries; the two forms of the bias against distances."""

import pytest
import torch

from moe_dist.attention.alibi import alibi_bias, alibi_slopes


def test_slopes_by_hand() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert alibi_slopes(2).tolist() == [2.0**-4, 2.0**-8]
    # Six heads: those of four, then the first and third of eight.
    assert alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    with pytest.raises(ValueError, match="heads=0 is below 1"):
        alibi_slopes(0)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 25, 40, 64, 71, 112])
def test_slopes_and_causal_form_are_those_of_mpt_and_bloom(heads: int) -> None:
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    expected_HK = mpt.build_mpt_alibi_tensor(heads, 5)[:, 0]
    torch.testing.assert_close(alibi_bias(heads, 5)[0, :, 0], expected_HK, rtol=1e-6, atol=0)
    # Bloom's is slope * j.
    slopes_H = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), slopes_H, rtol=1e-6, atol=0)


def test_full_form_is_the_distance_to_both_sides() -> None:
    full = alibi_bias(3, 4, causal=False, dtype=torch.float64)
    assert full.shape == (1, 3, 4, 4) and full.dtype == torch.float64
    slopes = alibi_slopes(3, torch.float64).tolist()
    for head, slope in enumerate(slopes):
        assert full[0, head].tolist() == [[-slope * abs(i - j) for j in range(4)] for i in range(4)]


def test_forms_have_the_same_softmax_under_a_causal_mask() -> None:
    future = torch.full((7, 7), -torch.inf, dtype=torch.float64).triu(1)
    scores = torch.randn(1, 5, 7, 7, dtype=torch.float64) + future
    causal, full = (alibi_bias(5, 7, form, torch.float64) for form in (True, False))
    assert causal.shape == (1, 5, 1, 7)
    torch.testing.assert_close((scores + causal).softmax(-1), (scores + full).softmax(-1))
