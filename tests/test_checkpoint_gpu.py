"""Checkpoints from and to a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from checkpoint_cases import module_of
from sharded_cases import state_of
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb, checkpoint
from dist_lamb.checkpoint import saving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def build(cls: Any, device: str, dtype: torch.dtype, seed: int) -> tuple[dict[str, Tensor], Any]:
    made = models.make_params(dtype, seed)
    params = {name: nn.Parameter(p.detach().to(device)) for name, p in made.items()}
    return params, cls(models.groups_of(params), lr=0.02, max_grad_norm=1.0)


def train(params: dict[str, Tensor], optimizer: Any, steps: range) -> None:
    host = {name: p.detach().cpu() for name, p in params.items()}
    for t in steps:
        for name, g in models.mean_gradients(host, t).items():
            params[name].grad = g.to(params[name].device)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_what_is_saved_is_the_state_at_the_call(
    tmp_path: Path, cls: Any, dtype: torch.dtype
) -> None:
    """Steps are queued behind the copies and overwrite what was copied, not the copies."""
    params, optimizer = build(cls, "cuda", dtype, seed=0)
    for round_ in range(3):
        first = 4 * round_
        train(params, optimizer, range(first, first + 2))
        expected = models.digest(params), models.digest(state_of(optimizer))
        drawn_from = torch.cuda.get_rng_state()
        pending = checkpoint.save_async(tmp_path, first, module_of(params), optimizer, keep=1)
        torch.rand(5, device="cuda")
        train(params, optimizer, range(first + 2, first + 4))
        pending.wait()
        assert saving._buffer is not None
        assert saving._buffer.is_pinned()
        assert models.digest(params) != expected[0]

        for device in ("cuda", "cpu"):
            for other in (Lamb, ShardedLamb):
                fresh, into = build(other, device, dtype, seed=3)
                checkpoint.load(tmp_path, module_of(fresh), into)
                assert models.digest(fresh) == expected[0]
                if other is cls:
                    assert models.digest(state_of(into)) == expected[1]
        assert torch.equal(torch.cuda.get_rng_state(), drawn_from)
        # and the run goes on as it went
        straight = models.digest(params)
        checkpoint.load(tmp_path, module_of(params), optimizer)
        train(params, optimizer, range(first + 2, first + 4))
        assert models.digest(params) == straight


def test_at_once_is_the_same_as_beside(tmp_path: Path) -> None:
    params, optimizer = build(ShardedLamb, "cuda", torch.bfloat16, seed=0)
    train(params, optimizer, range(2))
    one = checkpoint.save(tmp_path / "a", 2, module_of(params), optimizer)
    other = checkpoint.save_async(tmp_path / "b", 2, module_of(params), optimizer).wait()
    sums = [checkpoint.Checkpoint(path).files for path in (one, other)]
    assert sums[0] == sums[1]
