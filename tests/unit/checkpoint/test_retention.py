"""Which checkpoints stay: by hand."""

import pytest

from moe_dist.checkpoint.retention import Retention

LOSSES = {0: None, 10: 3.0, 20: 2.0, 30: None, 40: 1.5, 50: 1.5, 60: 1.7, 70: float("nan")}


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (dict(keep_last=1), {70}),
        (dict(keep_last=3), {50, 60, 70}),
        (dict(keep_last=99), set(LOSSES)),
        (dict(keep_last=1, keep_every=20), {20, 40, 60, 70}),
        (dict(keep_last=1, keep_best=True), {40, 70}),  # the earlier of two equals; not a number is no best
        (dict(keep_last=2, keep_every=30, keep_best=True), {30, 40, 60, 70}),
    ],
)
def test_rules(rule: dict, kept: set[int]) -> None:
    assert Retention(**rule).kept(LOSSES) == kept


def test_no_losses_and_no_checkpoints() -> None:
    assert Retention(keep_last=1, keep_best=True).kept({5: None, 6: None}) == {6}
    assert Retention(keep_last=1, keep_every=2, keep_best=True).kept({}) == set()
