"""dist_lamb/norms.py: sums of squares over the ranks that hold the pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from dist_lamb.norms import DTensorNorms, FlatNorms
from dist_lamb.sharding.comm import Comm

pytestmark = pytest.mark.xdist_group("ranks")


def _replicas_add_in_rank_order(rank: int, mesh: DeviceMesh) -> None:
    norms = DTensorNorms([distribute_tensor(torch.ones(3), mesh, [Shard(0)])])
    norms._axes[0].comm.replicated = True
    # 1 + 1e-16 + 1e-16 is 1, and 1e-16 + 1e-16 + 1 is not
    columns = torch.tensor([[1.0, 1e-16], [1e-16, 1e-16], [1e-16, 1.0]], dtype=torch.float64)
    with CommDebugMode() as comm:
        got = norms.per_param(columns[rank].view(1, 2).clone())
    assert comm.get_total_counts() == 1
    assert got.tolist() == [[1.0 + 1e-16 + 1e-16, 1e-16 + 1e-16 + 1.0]]


#: On a mesh of 2 x 2. None: a plain tensor. Whole numbers below: every sum is exact.
PLACEMENTS: list[list[Any] | None] = [
    [Shard(0), Shard(1)],
    [Replicate(), Shard(0)],
    [Shard(1), Replicate()],
    [Replicate(), Replicate()],
    None,
    [Replicate(), Shard(1)],
    [Shard(0), Shard(0)],
]


def _square_sum(t: Tensor) -> Tensor:
    return t.double().square().sum()


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _two_by_two(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    whole = [torch.arange(35.0).view(7, 5) + 3 * i for i in range(len(PLACEMENTS))]
    params = [
        t if how is None else distribute_tensor(t, mesh, how) for t, how in zip(whole, PLACEMENTS)
    ]
    norms = DTensorNorms(params)
    assert not norms.local
    mine = torch.stack([_square_sum(_local(p)) for p in params])
    want = torch.stack([_square_sum(t) for t in whole])

    with CommDebugMode() as comm:
        got = norms.per_param(torch.stack([mine, 2 * mine], dim=1))
    assert comm.get_total_counts() == 2  # one for each axis of the mesh
    assert torch.equal(got, torch.stack([want, 2 * want], dim=1))

    groups = norms.reduction_groups(torch.device("cpu"))
    assert groups is not None
    assert torch.equal(torch.stack(list(groups)).sum(dim=0), torch.ones(len(params)).long())
    sums = torch.stack([mine[kind].sum() for kind in groups])
    # the flag of one rank alone reaches all
    flag = torch.tensor([float(rank == 3)], dtype=torch.float64)
    assert torch.equal(
        norms.over_all(torch.cat([sums, flag]), None)[0],
        torch.stack([want.sum(), torch.ones((), dtype=torch.float64)]),
    )


def test_whole_sums_on_a_mesh_of_two_axes(tmp_path: Path) -> None:
    """Cut along both axes, along one, along none, and plain: whole sums on every rank."""
    run_ranks(4, tmp_path, _two_by_two)


def _one_axis(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    _replicas_add_in_rank_order(rank, mesh)
    rows = [distribute_tensor(torch.ones(n, 2), mesh, [Shard(0)]) for n in (7, 1)]
    norms: Any
    for norms in (DTensorNorms(rows), FlatNorms(Comm())):
        assert not norms.local
        assert (
            norms.reduction_groups(torch.device("cpu")) is None
        )  # all params add up over the same ranks
        mine = torch.tensor([[rank + 1.0, 1.0], [10.0 * rank, 0.0]], dtype=torch.float64)
        assert norms.per_param(mine).tolist() == [[6.0, 3.0], [30.0, 0.0]]
        flagged = torch.tensor([rank + 1.0, float(rank == 1)], dtype=torch.float64)
        total, early = norms.over_all(flagged, torch.full((2, 3), 10.0**rank, dtype=torch.float64))
        assert total.tolist() == [6.0, 1.0]
        assert early is not None
        assert early.tolist() == [[111.0] * 3] * 2


def test_sums_over_one_axis(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, _one_axis)


def test_whole_tensors_have_nothing_to_add() -> None:
    sums = torch.ones(3, 2, dtype=torch.float64)
    norms: Any
    for norms in (FlatNorms(Comm()), DTensorNorms([torch.ones(2), torch.ones(3)])):
        assert norms.local
        assert norms.reduction_groups(torch.device("cpu")) is None
        assert torch.equal(norms.per_param(sums.clone()), sums)
        assert norms.over_all(torch.tensor([4.0, 0.0]), None)[0].tolist() == [4.0, 0.0]
