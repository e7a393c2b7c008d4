"""How rows are written while they travel, and the one differentiable exchange that all dispatchers are made of.

| wire_dtype | to the experts                        | back, and gradients both ways |
|------------|---------------------------------------|-------------------------------|
| same       | as they are                           | as they are                   |
| bf16       | bf16                                  | bf16                          |
| fp8        | e4m3, and one fp32 scale for each row | bf16                          |

Legend: Y rows sent, X rows that arrived, D width.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moe_dist.parallel.collectives import with_gradient

Format = Literal["same", "bf16", "fp8"]

_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_SMALLEST = torch.finfo(torch.float32).tiny
_SCALE_BYTES = 4


class Wire(NamedTuple):
    """out: the format of rows on their way to the experts; rest: of everything else."""

    out: Format
    rest: Format

    @staticmethod
    def of(wire_dtype: Format) -> "Wire":
        return Wire(wire_dtype, "same" if wire_dtype == "same" else "bf16")

    def sent_bytes(self, trip: "Trip", like: Tensor) -> int:
        """Of rows like `like`, there and back."""
        there, back = trip.away
        width, dtype = like.shape[1], like.dtype
        return there * row_bytes(width, dtype, self.out) + back * row_bytes(width, dtype, self.rest)


class Trip(Protocol):
    """Rows to the ranks of their experts, and results the other way. Not differentiable; every rank enters both.

    away: rows this rank sends to other ranks, (there, back); padding counts.
    """

    @property
    def away(self) -> tuple[int, int]: ...

    def there(self, rows_YD: Tensor, form: Format) -> Tensor: ...

    def back(self, rows_XD: Tensor, form: Format) -> Tensor: ...


def carry_out(rows_YD: Tensor, trip: Trip, wire: Wire) -> Tensor:
    """Rows to their experts; their gradients come back the same way."""
    return with_gradient(
        rows_YD, lambda rows: _moved(trip.there, rows, wire.out), lambda grad: trip.back(grad, wire.rest)
    )


def carry_home(rows_XD: Tensor, trip: Trip, wire: Wire) -> Tensor:
    """Results to where their rows came from."""
    return with_gradient(
        rows_XD, lambda rows: _moved(trip.back, rows, wire.rest), lambda grad: trip.there(grad, wire.rest)
    )


def _moved(way: Callable[[Tensor, Format], Tensor], rows: Tensor, form: Format) -> Tensor:
    """A group of one hands rows on as they are, and autograd wants an input returned as a view."""
    moved = way(rows, form)
    return moved.view_as(moved) if moved is rows else moved


def pack(rows_YD: Tensor, form: Format) -> Tensor:
    """Rows as they travel. An fp8 row is D bytes and its scale: one message, and gloo knows bytes, not float8."""
    if form == "same":
        return rows_YD
    if form == "bf16":
        return rows_YD.to(torch.bfloat16)
    width = rows_YD.shape[1]
    wide = rows_YD.to(torch.float32)
    # A row of zeros has no largest number to scale by; whatever is not finite stays so.
    scale_Y1 = (wide.abs().amax(1, keepdim=True) / _LARGEST).clamp(min=_SMALLEST)
    packed = torch.empty(rows_YD.shape[0], width + _SCALE_BYTES, dtype=torch.uint8, device=rows_YD.device)
    packed[:, :width].copy_((wide / scale_Y1).to(torch.float8_e4m3fn).view(torch.uint8))
    packed[:, width:].copy_(scale_Y1.view(torch.uint8))
    return packed


def unpack(packed: Tensor, form: Format, dtype: torch.dtype) -> Tensor:
    """What `pack` wrote, in `dtype` again."""
    if form != "fp8":
        return packed.to(dtype)
    width = packed.shape[1] - _SCALE_BYTES
    scale_Y1 = packed[:, width:].contiguous().view(torch.float32)
    return packed[:, :width].contiguous().view(torch.float8_e4m3fn).to(dtype).mul_(scale_Y1)


def row_bytes(width: int, dtype: torch.dtype, form: Format) -> int:
    """Of one packed row."""
    if form == "fp8":
        return width + _SCALE_BYTES
    return width * (torch.bfloat16 if form == "bf16" else dtype).itemsize
