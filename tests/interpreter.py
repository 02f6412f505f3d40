"""A process in which Triton's interpreter runs the GPU kernels."""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch


def _serve(pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        fn, args = pipe.recv()
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Calls a function of a test module in a process where Triton interprets.

    Triton decides that when it defines a kernel, once a process, whatever ran there before.
    """
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process.start()

    def call(fn: Callable[..., Any], *args: Any) -> Any:
        ours.send((fn, args))
        if not ours.poll(200):
            raise TimeoutError(f"{fn.__name__}{args} gave no answer")
        ok, result = ours.recv()
        assert ok, result
        return result

    try:
        yield call
    finally:
        process.kill()
        process.join()
