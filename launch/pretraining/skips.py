"""Steps that the optimizer skipped for a gradient that is not finite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Counted(NamedTuple):
    """A step. ``total``: skipped steps up to and with it; ``skipped``: whether it is one."""

    total: int
    skipped: bool


class Streak(NamedTuple):
    """``length`` skipped steps in a row, the last of them ``step``."""

    length: int = 0
    step: int = 0


class SkippedSteps:
    """The optimizer's count of skipped steps after every step.

    The counts of all steps are kept on the device until they are read together, so streaks are
    exact however seldom that is. The counts are the same on all ranks, and so is what follows
    from them.

    Args:
        limit: this many skipped steps in a row are too many; 0: never.
        count: the optimizer's count before the first step of this process, 0-d.
    """

    def __init__(self, limit: int, count: Tensor) -> None:
        self._limit = limit
        self._total = int(count)
        self._unread: list[tuple[int, Tensor]] = []
        self._read: list[Counted] = []
        self._current = Streak()
        #: of all steps that were read
        self.longest = Streak()

    def add(self, step: int, count: Tensor) -> None:
        """The optimizer's ``count`` after ``step``: 0-d, not written to later."""
        self._unread.append((step, count))

    def too_many(self) -> bool:
        """Whether ``limit`` steps in a row were skipped, as far as counts were read.

        Reads them, which waits for the device, after every ``limit`` steps without :meth:`take`:
        ``limit`` skipped steps in a row are seen less than ``limit`` steps after the last of them.
        """
        if 0 < self._limit <= len(self._unread):
            self._read_all()
        return 0 < self._limit <= self.longest.length

    def take(self) -> list[Counted]:
        """Every step since the last call; waits for the device once."""
        if self._unread:
            self._read_all()
        taken, self._read = self._read, []
        return taken

    def _read_all(self) -> None:
        totals = torch.stack([count for _, count in self._unread]).tolist()
        for (step, _), total in zip(self._unread, map(int, totals), strict=True):
            skipped = total > self._total
            self._current = Streak(self._current.length + 1 if skipped else 0, step)
            self.longest = max(self.longest, self._current, key=lambda streak: streak.length)
            self._total = total
            self._read.append(Counted(total, skipped))
        self._unread = []
