"""On several GPUs, over NCCL: FSDP2 and Lamb's fused step against whole tensors.

torch's own process group stays gloo; the meshes' groups are NCCL.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dtensor_cases import everything, whole
from fsdp2_cases import Net, batch, lamb, sharded
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import Shard, distribute_tensor

from dist_lamb import Lamb

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("gpu"),
    pytest.mark.skipif(GPUS < 2, reason="needs two or more CUDA devices"),
]
#: BERT-large, fully sharded layer by layer: what an optimizer step may take on 4 H200s
BERT_LARGE_MS = 3.0


def _mesh(rank: int, world: int) -> DeviceMesh:
    torch.cuda.set_device(rank)
    return DeviceMesh.from_group(dist.new_group(list(range(world)), backend="nccl"), "cuda")


def _hsdp_mesh(rank: int, world: int) -> DeviceMesh:
    """(2, world / 2): each rank's groups along both axes, made by all ranks in one order."""
    grid = torch.arange(world).view(2, -1)
    mine: dict[int, Any] = {}
    for axis, lines in enumerate((grid.t(), grid)):
        for line in lines.tolist():
            group = dist.new_group(line, backend="nccl")
            if rank in line:
                mine[axis] = group
    groups = [mine[0], mine[1]]
    return DeviceMesh.from_group(groups, "cuda", mesh=grid, mesh_dim_names=("replicate", "shard"))


def _compare(net: Net, rank: int, steps: int = 5) -> dict[str, float]:
    """Largest |difference| / max of params and moments from a whole copy; 0 for the same bits."""
    twin = {n: nn.Parameter(whole(p)) for n, p in net.named_parameters()}
    optimizer, names = lamb(net), {p: n for n, p in net.named_parameters()}
    groups = [
        {**group, "params": [(names[p], twin[names[p]]) for p in group["params"]]}
        for group in lamb(net).param_groups
        if group.pop("param_names")
    ]
    straight = Lamb(groups)
    for t in range(steps):
        net(batch(t, rank).cuda()).backward()
        for n, p in net.named_parameters():
            twin[n].grad = None if p.grad is None else whole(p.grad)
        optimizer.step()
        straight.step()
        optimizer.zero_grad()
    got, want = everything(dict(net.named_parameters()), optimizer), everything(twin, straight)
    assert got.keys() == want.keys()
    errors = {}
    for name, b in want.items():
        a, b = got[name].double().nan_to_num(), b.double().nan_to_num()
        if a.numel():
            errors[name] = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
    return errors


def _ways(rank: int, world: int) -> dict[str, float]:
    mesh = _mesh(rank, world)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cases: dict[str, Any] = {
        "float32": (mesh, {}),
        "bf16 compute": (mesh, {"mp_policy": half}),
        "offloaded": (mesh, {"offload_policy": CPUOffloadPolicy()}),
    }
    if world >= 4 and world % 2 == 0:
        cases["HSDP"] = (_hsdp_mesh(rank, world), {})
    found = {}
    for case, (where, policies) in cases.items():
        errors = _compare(sharded(where, Net().cuda(), **policies), rank)
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-6, (case, worst, errors[worst])
        found[case] = errors[worst]
    return found


def test_same_as_whole_tensors(tmp_path: Path) -> None:
    found = run_ranks(min(GPUS, 4), tmp_path, _ways, timeout=280)
    print(f"largest relative differences from whole tensors: {found[0]}")


def _bert_large_step(rank: int, world: int) -> dict[str, float]:
    """Gradients are at new addresses every step, as fully_shard's are."""
    from benchmarking.workloads import bert_large

    mesh = _mesh(rank, world)
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Any:
        t = torch.randn(shape, generator=generator) * 0.02
        return distribute_tensor(t.cuda(), mesh, [Shard(0)], src_data_rank=None)

    shapes = bert_large()
    params = [nn.Parameter(draw(shape)) for shape in shapes]
    grads = [[draw(shape) for shape in shapes] for _ in range(2)]
    found = {}
    for clip in (None, 1.0):
        optimizer = Lamb(params, 1e-3, max_grad_norm=clip)
        wall = []
        for i in range(25):
            for p, g in zip(params, grads[i % 2]):
                p.grad = g
            torch.cuda.synchronize()
            dist.barrier()
            begin = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            wall.append((time.perf_counter() - begin) * 1e3)
        assert optimizer._kept is not None
        found[f"clip {clip}"] = statistics.median(wall[5:])
    return found


def test_bert_large_step(tmp_path: Path) -> None:
    world = min(GPUS, 4)
    found = run_ranks(world, tmp_path, _bert_large_step, timeout=280)
    print(f"{len(found)} GPUs, BERT-large, wall ms of step() by rank: {found}")
    if world == 4 and "H200" in torch.cuda.get_device_name():
        assert max(found[0].values()) <= BERT_LARGE_MS
