"""Which gradients have come: DeepSpeed does not tell those that have not from zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: The latest optimizer's, by param: what an older one would warn of is no news.
_LATEST: Any = WeakIdKeyDictionary()


class Arrivals:
    """Which gradients backward has made on this rank.

    DeepSpeed fills in zeros for those it has not, and a param without gradient must be left alone.

    Args:
        unused: called with the number of backward passes so far, at each of them, while it is set.
    """

    def __init__(self, unused: Callable[[int], None]) -> None:
        self.count = 0
        self.unused: Callable[[int], None] | None = unused
        #: by original, 1 where one came: since its last step; ever
        self.since_step, self.ever = bytearray(), bytearray()
        #: the original that backward passes are counted by, and their number
        self._counted, self._backwards = -1, 0

    def expect(self, p: Any) -> None:
        """The next original is ``p``."""
        i = len(self.ever)
        self.since_step.append(0)
        self.ever.append(0)

        def hook(_: Tensor) -> None:
            self.count += 1
            self.since_step[i] = self.ever[i] = 1
            if self.unused is not None:
                self._count_backward(i)

        if p.requires_grad:
            p.register_post_accumulate_grad_hook(hook)
            if p in _LATEST:
                _LATEST[p].unused = None
            _LATEST[p] = self

    def _count_backward(self, i: int) -> None:
        if self._counted < 0:
            self._counted = i
        if i == self._counted and self.unused is not None:
            self._backwards += 1
            self.unused(self._backwards)
