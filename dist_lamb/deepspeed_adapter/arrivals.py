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
        #: by original, 1 where one ever came
        self.ever = bytearray()
        #: by original, the engine's step that one came for; -1: none since its last step
        self._came: list[int] = []
        self._engine: Any = None
        #: the original that backward passes are counted by, and their number
        self._counted, self._backwards = -1, 0

    def bind(self, engine: Any) -> None:
        """``engine`` counts also the steps that DeepSpeed skips, with their gradients."""
        came = [self.came(i) for i in range(len(self._came))]
        self._engine = engine
        self._came = [self._step() if c else -1 for c in came]

    def _step(self) -> int:
        return 0 if self._engine is None else int(self._engine.global_steps)

    def came(self, i: int) -> bool:
        """Whether a gradient has come for the step that is made now."""
        return self._came[i] == self._step()

    def forget(self, i: int) -> None:
        self._came[i] = -1

    def expect(self, p: Any) -> None:
        """The next original is ``p``."""
        i = len(self.ever)
        self._came.append(-1)
        self.ever.append(0)

        def hook(_: Tensor) -> None:
            self.count += 1
            self._came[i], self.ever[i] = self._step(), 1
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
