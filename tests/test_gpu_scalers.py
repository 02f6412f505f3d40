"""Loss scaling of a ShardedLamb on a GPU, by NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from test_out_of_step import Net, digest, factors, refused
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from dist_lamb import ShardedLamb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]


def _trained(scaler: Any, unscale: bool, steps: tuple[int, ...], bad: int, **where: Any) -> str:
    """``bad``: the step with an overflow."""
    net = Net().cuda()
    optimizer = ShardedLamb(net, lr=0.1, bucket_numel=1, **where)
    for t in steps:
        loss = net(factors(t, 0) | ({"a": torch.inf} if t == bad else {}))
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return digest(net)


def _scalers(rank: int, world: int) -> bool:
    for where in ({"stage": 1}, {"stage": 2, "overlap": False}, {"stage": 2}):
        want = _trained(None, False, (0, 1, 2, 4), -1, **where)
        for kind in (torch.amp.GradScaler, ShardedGradScaler):
            for unscale in (False, True):
                scaler = kind("cuda", init_scale=4.0, growth_interval=100)
                got = _trained(scaler, unscale, (0, 1, 2, 3, 4), 3, **where)
                assert got == want, (where, kind, unscale)
                assert scaler.get_scale() == 2.0
    return True


def test_both_scalers_on_one_rank(tmp_path: Path) -> None:
    """Scaled or not, the same bits; a step that overflows is left out, and halves the scale."""
    assert run_ranks(1, tmp_path, _scalers, backend="nccl") == [True]


def _overflow_on_one_rank(rank: int, world: int) -> bool:
    for kind in (torch.amp.GradScaler, ShardedGradScaler):
        net = Net().cuda()
        optimizer = ShardedLamb(net, lr=0.1, bucket_numel=1, stage=1)
        scaler = kind("cuda", init_scale=4.0, growth_interval=100)
        for t in range(4):
            bad = {"a": torch.inf} if t == 2 and rank == 1 else {}
            before = digest(net)
            scaler.scale(net(factors(t, rank) | bad)).backward()
            if t == 3 and kind is torch.amp.GradScaler:
                refused("overflowed on 1 of 2 ranks.*Sharded", lambda: scaler.step(optimizer))  # noqa: B023
                break
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert (digest(net) == before) == (t == 2)
        if kind is ShardedGradScaler:
            assert scaler.get_scale() == 2.0
    return True


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_overflow_on_one_rank(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, _overflow_on_one_rank, backend="nccl") == [True] * 2
