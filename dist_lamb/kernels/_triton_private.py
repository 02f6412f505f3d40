"""Launching compiled Triton kernels past ``JITFunction``: every private Triton API used here.

``JITFunction`` inspects every argument and every global at every launch, which takes longer than a
small model's whole step on the device. Launches under one key give it nothing new to find, so what
it compiled at the first is launched directly.

``CompiledKernel.run``, ``.function`` and ``.packed_metadata``, and the order of ``run``'s arguments
(Triton 3.6 to 3.9); ``knobs.runtime.launch_enter_hook`` (since 3.4). Without them: delete
``_launch_compiled`` and launch by ``kernel[(programs,)](...)``, 20 us more a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
import triton

from .. import _torch_private
from .triton_math import WARPS


class Launches:
    """The kernels of one device as they were compiled at their first launch, by key."""

    def __init__(self, device: torch.device) -> None:
        self._compiled: dict[Hashable, Any] = {}
        self._index = device.index

    def __call__(
        self,
        kernel: Any,
        key: Hashable,
        programs: int,
        *args: Any,
        registers: int | None = None,
    ) -> None:
        """Launch ``kernel``. ``key`` is whatever may compile it in another way: constants, which
        arguments are None, dtypes behind pointers. ``registers``: at most so many a thread, where
        the compiler can be told."""
        if not programs:
            return
        # By id: a JITFunction's own hash is one of its source.
        compiled = self._compiled.get((id(kernel), key))
        if compiled is not None:
            self._launch_compiled(compiled, programs, args)
            return
        # Products and sums rounded apart: which of them are fused would change with the kind of
        # step, and so would the bits. In the interpreter there is nothing to keep.
        limits = {"maxnreg": registers} if registers and not torch.version.hip else {}
        compiled = kernel[(programs,)](*args, num_warps=WARPS, enable_fp_fusion=False, **limits)
        self._compiled[id(kernel), key] = compiled

    def _launch_compiled(self, compiled: Any, programs: int, args: Any) -> None:
        hook = triton.knobs.runtime.launch_enter_hook
        if getattr(hook, "calls", hook):  # a profiler wants to be told of launches
            compiled[(programs, 1, 1)](*args)
            return
        stream = _torch_private.current_stream_number(self._index)
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *args)


@functools.cache
def launches_on(device: torch.device) -> Launches:
    return Launches(device)
