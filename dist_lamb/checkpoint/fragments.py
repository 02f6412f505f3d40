"""A flat range of a param's memory as boxes of the whole param.

Boxes can be read into any other sharding of the param.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

#: (offsets, sizes), one number per dim.
Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Split elements ``[start, stop)`` of a row-major tensor into boxes, in memory order.

    At most 2 ndim - 1 boxes: part of a row, whole rows and part of a row for each dim but the last.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    (first, skipped), (last, used) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from _within(first, shape, skipped, used)
        return
    if skipped:
        yield from _within(first, shape, skipped, row)
        first += 1
    if first < last:
        rest = tuple(shape[1:])
        yield (first, *(0 for _ in rest)), (last - first, *rest)
    yield from _within(last, shape, 0, used)


def _within(row: int, shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)


class Fragment:
    """Elements ``[start, start + flat.numel())`` of a param's memory, as boxes of the param.

    Args:
        shape, stride: of the whole param, which is dense: its memory has no gaps, but its dims may
            be in any order (channels_last).
        flat: the elements [n], a view of the param's or state's memory. Loading writes to it.
    """

    def __init__(
        self, shape: Sequence[int], stride: Sequence[int], start: int, flat: Tensor
    ) -> None:
        self.shape, self.stride = torch.Size(shape), tuple(stride)
        self.start, self.flat = start, flat

    def with_flat(self, flat: Tensor) -> Fragment:
        """The same elements in other memory, ``flat``."""
        return Fragment(self.shape, self.stride, self.start, flat)

    @cached_property
    def parts(self) -> dict[tuple[int, ...], Tensor]:
        """{offsets: box}, views of ``flat``."""
        # Dims from the slowest in memory to the fastest.
        order = sorted(range(len(self.shape)), key=lambda dim: -self.stride[dim])
        inverse = [order.index(dim) for dim in range(len(self.shape))]
        memory_shape, stop = [self.shape[dim] for dim in order], self.start + self.flat.numel()
        parts, position = {}, 0
        for offsets, sizes in boxes(memory_shape, self.start, stop):
            numel = math.prod(sizes)
            part = self.flat[position : position + numel].view(sizes).permute(inverse)
            parts[tuple(offsets[i] for i in inverse)] = part
            position += numel
        return parts
