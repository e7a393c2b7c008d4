"""Random numbers that do not know which rank draws them.

A `RandomKey` is folded from what identifies a draw (seed, step, layer, ...); per-token numbers come from a
counter-based hash of the key and the *global* token index, so every layout draws the same number for the same token.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


@dataclass(frozen=True)
class RandomKey:
    """A 63-bit key. `fold` derives independent keys."""

    value: int

    @staticmethod
    def of(*parts: int | str) -> "RandomKey":
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
        return RandomKey(int.from_bytes(digest, "little") & _MASK)

    def fold(self, *parts: int | str) -> "RandomKey":
        return RandomKey.of(self.value, *parts)

    def uniform(self, index: Tensor) -> Tensor:
        """One number in [0, 1) for each int64 index, float64 with 53 random bits.

        The index is mixed with the key by two rounds of the SplitMix64 finaliser (Steele et al., OOPSLA 2014).
        """
        bits = _mix(_mix(index ^ self.value) + _signed(0x9E3779B97F4A7C15))
        return _shift(bits, 11).double() * 2.0**-53

    def keeps(self, index: Tensor, rate: float) -> Tensor:
        """False for a share `rate` of the indices: what dropout leaves as it is."""
        return self.uniform(index) >= rate

    def normal(self, index: Tensor) -> Tensor:
        """One standard normal number for each int64 index, float64: the inverse distribution function of `uniform`."""
        return torch.special.ndtri(self.uniform(index) + 2.0**-54)


def dropout_by_index(x_TD: Tensor, rate: float, key: RandomKey, first_token: int) -> Tensor:
    """Zero with probability `rate`, else divided by 1 - rate; token t draws as token first_token + t of all."""
    if rate == 0.0:
        return x_TD
    first = first_token * x_TD.shape[1]
    index_TD = torch.arange(first, first + x_TD.numel(), device=x_TD.device).view_as(x_TD)
    return x_TD * key.keeps(index_TD, rate) / (1 - rate)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic on int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """The int64 with the bits of an unsigned constant; int64 products wrap around."""
    return constant - (1 << 64) if constant >> 63 else constant
