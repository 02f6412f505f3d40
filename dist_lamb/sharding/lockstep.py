"""Ranks agree on what comes next before they communicate, or all raise the same error."""

from __future__ import annotations

import os
import socket
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

from .comm import Comm

#: The parts of a counter, by bits: how many ranks have come, how many of them with a flag, and the
#: sum of the codes of what they came for.
_FLAGS, _CODES, _MASK = 16, 32, 2**16 - 1
#: Seconds in which another rank is expected.
_SHORT = 0.002
#: Times whose keys a rank keeps that never waits.
_MOST_SPENT = 100
#: A wait lets no signal handler run until it ends.
_SLICE = timedelta(seconds=0.2)


class Lockstep:
    """Where ranks meet before a step, a round of reductions, or another series of collectives.

    A collective that another rank does not join never ends on NCCL, and ends the process on gloo.
    So each rank first adds to a counter in the store of the process group and waits for all others
    to do so: on the host, with no collective, and without waiting for a device.
    """

    def __init__(self, comm: Comm) -> None:
        told = comm.everyone((comm.me, uuid4().hex, _processes(), os.getpid()))
        self._ranks: list[int] = [rank for rank, *_ in told]
        #: processes of ranks that can be seen from here
        self._pids = {rank: pid for rank, _, seen, pid in told if seen == _processes() != ""}
        self._me = comm.me
        self._store: Any = comm.store(told[0][1]) if len(told) > 1 else None
        self._timeout = comm.timeout() * 0.9
        #: how often this rank has come
        self._times = 0
        #: times of which keys are to be deleted
        self._spent: list[int] = []

    def meet(self, what: str, flag: bool = False) -> bool:
        """Wait for all ranks to come for the same; whether any of them has set ``flag``.

        Raises the same ``RuntimeError`` on all ranks if they come for different things, if one
        :meth:`refuse`\\ s, or if one does not come within the timeout of the process group.
        """
        if self._store is None:
            return flag
        at = self._times
        verdict = self._come(what, flag) or self._wait_for(f"verdict {at}")
        if not verdict:
            verdict = self._decide(at, self._out_of_step(at))
        if len(verdict) > 1:
            raise RuntimeError(verdict)
        return verdict == "1"

    def _wait_for(self, key: str) -> str:
        """What is written there; "" if it does not come in time."""
        began, until = time.monotonic(), self._timeout.total_seconds()
        while not self._store.check([key]):
            waited = time.monotonic() - began
            gone = waited > 0.5 and not all(map(_runs, self._pids.values()))
            if waited > until or (gone and not self._store.check([key])):
                return ""
            if waited < _SHORT:
                time.sleep(waited / 8)
                continue
            # Asking again and again would keep the store from serving a thousand other ranks.
            with suppress(RuntimeError):  # of a lost connection the next question tells
                self._store.wait([key], _SLICE)
        value: bytes = self._store.get(key)
        return value.decode()

    def refuse(self, what: str, problem: object) -> None:
        """Have all others, which are waiting or will come, raise that this rank cannot go on."""
        if self._store is not None:
            # In its own place: this rank does not wait, and may come for something else at once.
            said = f"rank {self._me} refuses {what}: {problem}"
            self._store.compare_set(f"refusal {self._times}", "", said)
            self._come(said, False)

    def _come(self, what: str, flag: bool) -> str:
        """What the last rank to come decides; "" for others."""
        at, world = self._times, len(self._ranks)
        self._times += 1
        code = zlib.crc32(what.encode()) % (2**31 // world)
        total = self._store.add(f"count {at}", (code << _CODES) + (flag << _FLAGS) + 1)
        last = total & _MASK == world
        alike = last and total >> _CODES == code * world
        # Others wait for the last one's verdict: all else comes after it.
        verdict = self._decide(at, str(int(total >> _FLAGS & _MASK > 0))) if alike else ""
        self._store.set(f"rank {self._me}", f"{at} came for {what}")
        if last:
            self._spent.append(at - 1)  # all have read it, or would not be here
        if not last or len(self._spent) > _MOST_SPENT:
            self._tidy()
        if last and not alike:
            until = time.monotonic() + 1.0
            while time.monotonic() < until and not all(self._told(at)):
                time.sleep(0.001)  # all have come, and are about to say for what
            return self._decide(at, self._out_of_step(at))
        return verdict

    def _tidy(self) -> None:
        """Away with what nobody reads again: while this rank waits anyway."""
        for at in self._spent:
            for key in ("count", "verdict", "refusal"):
                self._store.delete_key(f"{key} {at}")
        self._spent.clear()

    def _told(self, at: int) -> Iterator[bool]:
        return (when >= at for when, _ in map(self._last_of, self._ranks))

    def _last_of(self, rank: int) -> tuple[int, str]:
        """When a rank came last, and what for."""
        key = f"rank {rank}"
        if not self._store.check([key]):
            return -1, "came for none"
        when, what = self._store.get(key).decode().split(" ", 1)
        return int(when), what

    def _decide(self, at: int, verdict: str) -> str:
        """The first decision counts."""
        decided: bytes = self._store.compare_set(f"verdict {at}", "", verdict)
        return decided.decode()

    def _out_of_step(self, at: int) -> str:
        """Which ranks came for what, or what one of them cannot do."""
        if self._store.check([f"refusal {at}"]):
            refusal: bytes = self._store.get(f"refusal {at}")
            return refusal.decode()
        said: dict[str, list[int]] = {}
        for rank in self._ranks:
            when, what = self._last_of(rank)
            if when < at and not _runs(self._pids.get(rank)):
                what = f"does not run any more (it {what})"
            elif when < at:
                what = f"has not come in {self._timeout.total_seconds():.0f} s (it {what})"
            elif when > at:
                what = "has gone on"
            said.setdefault(what, []).append(rank)
        found = "; ".join(f"{_ranks(ranks)} {what}" for what, ranks in said.items())
        return (
            f"ranks are out of step: {found}. Between two steps every rank must run backward as "
            "often as the others (under no_sync() it may differ), and all must call step() with "
            "the same options"
        )


def _processes() -> str:
    """Names the processes that this one can see by their numbers; "" where that is not known."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _runs(pid: int | None) -> bool:
    """Whether a process of this machine runs; True of one that cannot be seen."""
    try:
        if pid is not None:
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _ranks(ranks: Iterable[int]) -> str:
    numbers = list(map(str, ranks))
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"
