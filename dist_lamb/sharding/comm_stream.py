"""The stream that communication runs on beside computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import _torch_private


def event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class CommStream:
    """Where communication runs beside the computation on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: dict[int, torch.cuda.Stream] = {}
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._given, self._done = event(), event()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is launched within starts after all that the current stream has been given."""
        if self.stream is None:
            yield
            return
        current = self.current()
        self._given.record(current)
        self.stream.wait_event(self._given)
        if torch.cuda.current_device() != self.device.index:
            with torch.cuda.stream(self.stream):
                yield
            return
        torch.cuda.set_stream(self.stream)  # what the context manager does in 20 us more
        try:
            yield
        finally:
            torch.cuda.set_stream(current)

    def join(self) -> None:
        """What the current stream is given from now on starts after all that was launched here."""
        if self.stream is not None:
            self._done.record(self.stream)
            self.current().wait_event(self._done)

    def current(self) -> torch.cuda.Stream:
        """The current stream."""
        raw = self.raw_current()
        if raw not in self._streams:
            self._streams[raw] = torch.cuda.current_stream(self.device)
        return self._streams[raw]

    def raw_current(self) -> int:
        """The current stream, as a number: a Stream object takes 10 us to make."""
        return _torch_private.current_stream_number(self.device.index)

    def wait_for(self, raw: int) -> None:
        """The current stream waits for another one."""
        other = (
            torch.cuda.ExternalStream(raw, self.device)  # type: ignore[no-untyped-call]
            if raw
            else torch.cuda.default_stream(self.device)
        )
        self.current().wait_stream(other)


class Later:
    """A tensor of one element on its way to the host, which need not wait for what comes after."""

    def __init__(self, t: Tensor) -> None:
        self._host = t
        self._there: torch.cuda.Event | None = None
        if t.device.type == "cuda":
            self._host = torch.empty_like(t, device="cpu", pin_memory=True)
            self._host.copy_(t, non_blocking=True)
            self._there = event()
            self._there.record()

    def item(self) -> float:
        if self._there is not None:
            self._there.synchronize()
        return float(self._host)
