"""On two GPUs, through NCCL: streams and events right, and the protocols that gloo has shown."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import models
import overlap_cases
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from dist_lamb import Lamb, ShardedLamb
from dist_lamb.sharding.comm import Comm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA or ROCm devices"),
]


def slow_collectives() -> AbstractContextManager[None]:
    """Every collective starts some milliseconds late on its stream."""

    def wrap(original: Any) -> Any:
        def slow(self: Comm, *args: Any, **kwargs: Any) -> Any:
            torch.cuda._sleep(10_000_000)
            return original(self, *args, **kwargs)

        return slow

    return overlap_cases.wrapped_collectives(wrap)


def _overlap(rank: int, world: int, dtype: torch.dtype) -> list[str]:
    # Attention's backward may add in another order each time; a matrix product does not.
    torch.use_deterministic_algorithms(True, warn_only=True)
    runs = []
    for context in (slow_collectives, None):
        for variant in overlap_cases.VARIANTS:
            if context is None:
                runs.append(overlap_cases.run(rank, None, dtype, "cuda", **variant))
            else:
                with context():
                    runs.append(overlap_cases.run(rank, None, dtype, "cuda", **variant))
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_overlap_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = run_ranks(2, tmp_path, _overlap, dtype, backend="nccl")
    assert len({digest for runs in found for digest in runs}) == 1, found


def _exact(rank: int, world: int, dtype: torch.dtype) -> dict[str, Any]:
    """As test_sharded's training: gradients with an exact mean, some absent on all or one rank."""
    found = {}
    for stage in (1, 2):
        params = {n: nn.Parameter(p.detach().cuda()) for n, p in models.make_params(dtype).items()}
        optimizer = ShardedLamb(models.groups_of(params), lr=0.02, max_grad_norm=1.0, stage=stage)
        for t in range(4):
            absent = ("tile.weight", "fc.weight") if t == 1 else ("tile.weight",)
            mean = models.mean_gradients(params, t, absent)
            for name, g in models.rank_gradients(mean, rank, world, t).items():
                params[name].grad = g.cuda()
            params["norm.weight"].grad = (mean["norm.weight"] * world).cuda() if rank else None
            optimizer.step()
            optimizer.zero_grad()
        steps = {n: float(optimizer.state[p]["step"]) for n, p in params.items()}
        assert steps["tile.weight"] == 0, steps
        assert steps["fc.weight"] == 3, steps
        assert steps["norm.weight"] == 4, steps
        found[stage] = {n: p.detach().cpu() for n, p in params.items()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_absent_gradients_and_whole_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """-0.0 stands for an absent gradient through NCCL too; two ranks equal one, bit by bit."""
    params = {n: nn.Parameter(p.detach().cuda()) for n, p in models.make_params(dtype).items()}
    whole = Lamb(models.groups_of(params), lr=0.02, max_grad_norm=1.0)
    for t in range(4):
        absent = ("tile.weight", "fc.weight") if t == 1 else ("tile.weight",)
        for name, g in models.mean_gradients(params, t, absent).items():
            params[name].grad = g.cuda()
        whole.step()
        whole.zero_grad()
    for found in run_ranks(2, tmp_path, _exact, dtype, backend="nccl"):
        for got in found.values():
            for name, p in params.items():
                assert torch.equal(got[name], p.detach().cpu()), name


def _memory(rank: int, world: int) -> dict[str, float]:
    """Peak bytes of steps at stage 2 in bfloat16, of a model that is nearly all params."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24)))
    model = model.to("cuda", torch.bfloat16)
    numel = sum(p.numel() for p in model.parameters())
    x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)
    model(x).square().mean().backward()
    model.zero_grad()
    # params, the batch, and what cuBLAS keeps for itself
    before = torch.cuda.memory_allocated()
    optimizer = ShardedLamb(model, overlap_gather=True, bucket_numel=2**23)
    for t in range(5):
        if t == 3:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        model(x).square().mean().backward()
        assert model[0].weight.grad is None or t == 0
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    assert optimizer._kept is not None
    bucket = max(t.nbytes for t in optimizer._kept.buffers.buckets)
    dist.barrier()
    return {
        "peak": float(torch.cuda.max_memory_allocated()),
        "promised": before + 14 * numel / world + 2 * bucket,
        "bucket": float(bucket),
    }


def test_memory_of_stage_2(tmp_path: Path) -> None:
    """2P + 14P/N bytes and two buckets; and the gradients of a bucket that is not full yet."""
    for found in run_ranks(2, tmp_path, _memory, backend="nccl"):
        assert found["peak"] <= 1.01 * found["promised"] + found["bucket"], found
