"""Which elements of the whole param a piece of memory holds: pure integers.

Elements are numbered as in the contiguous whole tensor, whatever the memory format and however the
tensor is cut. The memory of a piece is an array of digits::

    shape [4, 6], Shard(1) over 2 ranks, rank 1:  3 4 5   9 10 11   15 16 17   21 22 23
    start 3, sizes (3,), strides (1, 6):          element q is 3 + (q % 3) * 1 + (q // 3) * 6
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Elements(NamedTuple):
    """The number of every element of a piece, in the order of its memory."""

    start: int = 0  # of the array's first element
    first: int = 0  # where in the array the piece begins
    #: of the dims but the slowest, from the fastest in memory on
    sizes: tuple[int, ...] = ()
    #: of all dims: how much the number grows
    strides: tuple[int, ...] = (1,)

    @staticmethod
    def of(
        shape: Sequence[int],
        stride: Sequence[int],
        whole: Sequence[int] | None = None,
        offsets: Sequence[int] | None = None,
    ) -> Elements:
        """Of a dense tensor that lies at ``offsets`` in a tensor of shape ``whole``.

        ``stride`` tells the order of its memory only. Without ``whole`` it is the whole tensor.
        """
        logical: list[int] = []
        step = 1
        for size in reversed(shape if whole is None else whole):
            logical.insert(0, step)
            step *= size
        start = sum(at * n for at, n in zip(offsets or (), logical))
        runs: list[tuple[int, int]] = []  # (size, stride) of neighbouring dims in one
        for d in sorted(range(len(shape)), key=stride.__getitem__):
            if shape[d] == 1:
                continue
            if runs and runs[-1][0] * runs[-1][1] == logical[d]:
                runs[-1] = (runs[-1][0] * shape[d], runs[-1][1])
            else:
                runs.append((shape[d], logical[d]))
        sizes, strides = zip(*runs or [(1, 1)])
        return Elements(start, 0, sizes[:-1], strides)

    def from_(self, at: int) -> Elements:
        """The piece without its first ``at`` elements."""
        if self.sizes:
            return self._replace(first=self.first + at)
        return self._replace(start=self.start + at * self.strides[0])

    def row(self, dims: int) -> list[int]:
        """``first``, ``start``, sizes and strides of ``dims`` dims, the first of them of size 1."""
        more = dims - len(self.strides)
        return [self.first, self.start, *[1] * more, *self.sizes, *[0] * more, *self.strides]


def numbers_of(q: Any, start: Any, sizes: Sequence[Any], strides: Sequence[Any]) -> Any:
    """The numbers of elements ``q`` of an array, in memory order; integers or int64 tensors."""
    number = start
    for size, stride in zip(sizes, strides):
        number = number + (q % size) * stride
        q = q // size
    return number + q * strides[-1]
