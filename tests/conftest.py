from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Every pytest worker computes on small tensors: threads would only fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before the process is started that ranks are forked from.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish(session: pytest.Session) -> None:
    _require_groups(session)
    _compile_deepspeed_ops(session)


def _require_groups(session: pytest.Session) -> None:
    """Without groups tests run twice what they share, and programs that meet by a name collide."""
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if getattr(session.config.option, "loadgroup", False):
        assert all("@" in item.nodeid for item in grouped), "this pytest-xdist makes no groups"


def _compile_deepspeed_ops(session: pytest.Session) -> None:
    """Compile what tests marked ``deepspeed_ops`` load, before the first test's clock runs."""
    if not any(item.get_closest_marker("deepspeed_ops") for item in session.items):
        return
    from pretraining import deepspeed_ops

    try:
        ready = any(deepspeed_ops.extensions_dir().glob(f"*/{deepspeed_ops.COMPLETE}"))
    except ImportError:  # no deepspeed: the tests say so
        return
    if not ready:
        program = "from pretraining import deepspeed_ops; deepspeed_ops.load_shared_memory_op()"
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            warnings.warn(f"DeepSpeed's operations do not compile:\n{done.stderr}", stacklevel=1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(
    params=[
        "reference",
        "foreach",
        pytest.param("compiled", marks=pytest.mark.xdist_group("compile")),
    ]
)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend, with hardly a tensor too small to be compiled."""
    import torch._dynamo

    from dist_lamb.kernels import compiled

    monkeypatch.setattr(compiled, "SMALL_NUMEL", 10)
    monkeypatch.setattr(compiled, "ROW_NUMEL", 5)
    # One process of tests sees more dtypes and sizes than a training does.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield str(request.param)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function in a process where Triton interprets its kernels."""
    pytest.importorskip("triton")
    from interpreter import interpreter

    with interpreter() as call:
        yield call


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small config for launch/pretrain.py."""
    from pretrain_runs import write_config

    return write_config(tmp_path_factory.mktemp("pretrain"))


@pytest.fixture
def no_process_group_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For tests that run launch/pretrain.py in this process."""
    import torch
    import torch.distributed as dist

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
