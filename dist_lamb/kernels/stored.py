"""Segments as the rules see them, in the dtype of the arithmetic, and back into what is stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import storage_formats as formats
from ..elements import numbers_of
from .segments import Segment


def read_x(s: Segment) -> Tensor:
    if s.remainder is None:
        return s.x
    master: Tensor = formats.master_of(formats.pattern(s.x), s.remainder.to(torch.int32))
    return master


def read_states(s: Segment) -> list[Tensor]:
    return [t if t.dtype == s.dtype else t.to(s.dtype) for t in s.states]


def write_x(s: Segment, new: Tensor) -> None:
    """The param's new values, and its copy."""
    if s.remainder is not None:
        s.x.copy_(formats.as_bfloat16(formats.param_of(new)))
        s.remainder.copy_(formats.remainder_of(new))
        return
    s.x.copy_(new)
    if s.copy is not None:
        s.copy.copy_(new)


def element_numbers(places: Tensor, columns: int, dims: int | None = None) -> Tensor:
    """Which elements of their whole params a matrix holds, int64 [rows, columns]."""
    dims = places.shape[1] // 2 if dims is None else dims
    first, start, *rest = (column[:, None] for column in places.unbind(1))
    q = first + torch.arange(columns, device=places.device)
    numbers: Tensor = numbers_of(q, start, rest[: dims - 1], rest[dims - 1 :])
    return numbers


def random_of(numbers: Tensor, t: Tensor) -> Callable[[], Tensor]:
    """Random bits of these elements at their params' steps ``t`` (broadcast), once asked for."""
    found: list[Tensor] = []

    def random() -> Tensor:
        if not found:
            low, high = numbers.to(torch.int32), (numbers >> 32).to(torch.int32)
            found.append(formats.random_bits(low, high, formats.seed_of(t.to(torch.int32))))
        return found[0]

    return random


def rounded(value: Tensor, k: int, nearest: bool, random: Any) -> Tensor:
    """The pattern of state ``k``'s new value as a bfloat16; to nearest, ``random`` is None.

    Of 32 random bits the first state takes 16, all others the other 16: rounded alike, amsgrad's
    maximum is nowhere below the second moment. Else a skipped step would raise it.
    """
    if nearest:
        return formats.bfloat16_to_nearest(value)  # type: ignore[no-any-return]
    bits = random()
    return formats.bfloat16_at_random(value, bits >> 16 if k else bits)  # type: ignore[no-any-return]


def put(s: Segment, new: Sequence[Tensor], random: Any) -> list[Tensor]:
    """Store new states; what was stored, which is what counts from there on."""
    stored = []
    for k, (state, value) in enumerate(zip(s.states, new)):
        if state.dtype == value.dtype:
            state.copy_(value)
        else:
            h = rounded(value, k, s.nearest, random)
            state.copy_(formats.as_bfloat16(h))
            value = formats.of_bfloat16(h)
        stored.append(value)
    return stored
