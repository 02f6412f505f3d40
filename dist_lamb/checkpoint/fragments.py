"""A flat range of a param's memory as boxes of the whole param.

Boxes can be read into any other sharding of the param.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import combinations
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


#: Of boxes that no plane separates. What is written can be separated: it is cut dim by dim.
_MAX_INSEPARABLE = 500
_MAX_WORK = 10**6


def are_disjoint(found: Sequence[Box]) -> bool:
    """Whether no two boxes have an element in common.

    Also false if there are too many to tell of a kind that is never written.
    """
    rest = [box for box in found if all(box[1])]
    ndim = len(rest[0][0]) if rest else 0
    # Boxes, the dim that planes are to cut next, and how many dims no plane could cut.
    slabs = [(rest, 0, 0)]
    work = _MAX_WORK + 100 * ndim * len(rest)
    while slabs:
        inside, dim, uncut = slabs.pop()
        work -= len(inside)
        if work < 0:
            return False
        if len(inside) < 2:
            continue
        if uncut == ndim:
            pairs = combinations(inside, 2)
            if len(inside) > _MAX_INSEPARABLE or any(_overlap(*pair) for pair in pairs):
                return False
            continue
        parts = _cut(inside, dim)
        uncut = uncut + 1 if len(parts) == 1 else 1
        slabs += [(part, (dim + 1) % ndim, uncut) for part in parts]
    return True


def _cut(found: Sequence[Box], dim: int) -> list[list[Box]]:
    """Split at all planes across ``dim`` that no box crosses."""
    parts: list[list[Box]] = []
    end = -1
    for box in sorted(found, key=lambda box: box[0][dim]):
        if box[0][dim] >= end:
            parts.append([])
        parts[-1].append(box)
        end = max(end, box[0][dim] + box[1][dim])
    return parts


def _overlap(one: Box, other: Box) -> bool:
    return all(a < b + n and b < a + m for a, m, b, n in zip(one[0], one[1], other[0], other[1]))


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
