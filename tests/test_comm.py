"""dist_lamb/sharding/comm.py: what ranks agree on, and collectives."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dist_lamb import GradientNoiseScale, ShardedLamb, checkpoint
from dist_lamb.sharding.comm import Comm, DeviceMesh

pytestmark = pytest.mark.xdist_group("ranks")


def _broadcasts(rank: int, world: int) -> None:
    torch.manual_seed(rank)
    model = torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.BatchNorm1d(40))
    model[1].running_mean.fill_(rank + 1.0)
    frozen = model[0].bias.requires_grad_(False)
    optimizer = ShardedLamb(model)
    torch.manual_seed(0)
    expected = torch.nn.Linear(50, 40)
    assert torch.equal(model[0].weight, expected.weight)
    assert torch.equal(frozen, expected.bias)
    assert bool((model[1].running_mean == 1.0).all())
    assert optimizer._all_names() == ["0.weight", "0.bias", "1.weight", "1.bias"]


def _differing_ranks_are_refused(rank: int, world: int) -> None:
    cases: list[tuple[Any, str]] = [
        ({"w": (3, 4), "v": (4 + (rank == 1),)}, r"rank 0 has v \(4,\).*rank 1 has v \(5,\)"),
        ({"w": (3, 4)} if rank == 2 else {"w": (3, 4), "v": (4,)}, "rank 0 has v .*rank 2 has"),
        ({("w" if rank else "u"): (3, 4)}, "rank 0 has u .*rank 1 has w"),
    ]
    for shapes, message in cases:
        params = [(n, torch.nn.Parameter(torch.ones(s))) for n, s in shapes.items()]
        with pytest.raises(ValueError, match=message):
            ShardedLamb(params)
    dtype = torch.bfloat16 if rank > 1 else torch.float32
    w = [("w", torch.nn.Parameter(torch.ones(3, 3, dtype=dtype)))]
    with pytest.raises(ValueError, match=r"rank 0 has w .*float32.* rank 2 has w .*bfloat16"):
        ShardedLamb(w)
    with pytest.raises(ValueError, match=r"rank 0 has lr=0.1 in group 0, rank 2 has lr=0.2 in"):
        ShardedLamb([("w", torch.nn.Parameter(torch.ones(3)))], lr=0.2 if rank == 2 else 0.1)


def _module_with_mesh(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model = torch.nn.Linear(300, 7)
    optimizer = ShardedLamb(model, mesh=mesh)
    model(torch.ones(2, 300)).sum().backward()
    optimizer.step()
    assert sorted(optimizer.trust_ratios()) == ["bias", "weight"]
    with pytest.raises(ValueError, match="either process_group or mesh"):
        ShardedLamb(model, mesh=mesh, process_group=mesh.get_group())
    cube = init_device_mesh("cpu", (1, 1, world))
    with pytest.raises(ValueError, match=r"one axis \(shard\) or two .* expected, got 3"):
        ShardedLamb(model, mesh=cube)


def test_mesh_and_group_contradict() -> None:
    group: Any = object()
    mesh: Any = object.__new__(DeviceMesh)
    with pytest.raises(ValueError, match=r"^give either process_group or mesh, not both$"):
        Comm.of(group, mesh)


def _replicas_get_the_same_bits(rank: int, world: int) -> None:
    """Sums that depend on the order of their terms are added in the order of the ranks."""
    comm = Comm()
    comm.replicated = True  # as if other groups of ranks computed the same sums
    terms = torch.tensor([[1.0, 1e-16], [1e-16, 1e-16], [1e-16, 1.0]], dtype=torch.float64)
    expected = [1.0 + 1e-16 + 1e-16, 1e-16 + 1e-16 + 1.0]
    assert expected[0] != expected[1]
    assert comm.all_reduce_sum(terms[rank].clone()).tolist() == expected


def _three_ranks(rank: int, world: int) -> None:
    for check in (
        _broadcasts,
        _differing_ranks_are_refused,
        _module_with_mesh,
        _replicas_get_the_same_bits,
    ):
        check(rank, world)
        dist.barrier()


def test_what_ranks_agree_on(tmp_path: Path) -> None:
    """What an optimizer broadcasts, compares and refuses when it is made; and sums."""
    run_ranks(3, tmp_path, _three_ranks)


def _of_rank(rank: int, numel: int) -> Tensor:
    """Whole numbers, others on every rank: sums are exact."""
    return torch.arange(float(numel)) * (rank + 1) + 1000 * rank


def _collectives(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for comm, members in ((Comm(), [0, 1, 2, 3]), (Comm.of(None, mesh), [rank & 2, rank | 1])):
        members = sorted(set(members))
        assert (comm.world_size, comm.rank) == (len(members), members.index(rank))
        assert comm.num_ranks == world
        n = 5
        numel = comm.world_size * n
        total = torch.stack([_of_rank(r, numel) for r in members]).sum(dim=0)
        mine = slice(comm.rank * n, (comm.rank + 1) * n)
        for async_op in (False, True):
            shard, whole = torch.empty(n), torch.empty(numel)
            work = comm.reduce_scatter(shard, _of_rank(rank, numel), async_op)
            if async_op:
                work.wait()
            assert torch.equal(shard, total[mine])
            work = comm.all_gather(whole, shard, async_op)
            if async_op:
                work.wait()
            assert torch.equal(whole, total)
            # of a shard that is a part of the whole
            whole = torch.zeros(numel)
            whole[mine] = total[mine]
            work = comm.all_gather(whole, whole[mine], async_op)
            if async_op:
                work.wait()
            assert torch.equal(whole, total)
        assert torch.equal(comm.all_reduce_sum(_of_rank(rank, numel)), total)
        everyone = torch.stack([_of_rank(r, numel) for r in range(world)]).sum(dim=0)
        assert torch.equal(comm.all_reduce_across(total.clone()), everyone)
        first = _of_rank(rank, 3)
        comm.broadcast(first)
        assert torch.equal(first, _of_rank(0, 3))
        assert comm.from_first({"of": rank}) == {"of": 0}
        assert comm.gather_objects(f"rank {rank}") == [f"rank {r}" for r in members]
        _require_same(comm, rank)


def _require_same(comm: Comm, rank: int) -> None:
    device = torch.device("cpu")
    comm.require_same("things", ["a", "b", "c"], device)
    for theirs, message in (
        (["a", "x", "y"], "things differ between ranks: rank 0 has b, rank 3 has x$"),
        (["a", "b"], "things differ between ranks: rank 0 has c, rank 3 has nothing$"),
        (["a", "b", "c", "d"], "things differ between ranks: rank 0 has nothing, rank 3 has d$"),
    ):
        # every rank raises, so that all stop, and the next call finds them at the same place
        with pytest.raises(ValueError, match=message):
            comm.require_same("things", theirs if rank == 3 else ["a", "b", "c"], device)
    comm.require_same("things", ["a"], device)


def test_collectives_and_their_identities(tmp_path: Path) -> None:
    """Over all ranks, and over two shards of two replicas."""
    run_ranks(4, tmp_path, _collectives)


def test_without_other_ranks_everything_is_local() -> None:
    comm = Comm()
    assert (comm.world_size, comm.rank, comm.num_ranks, comm.replicated) == (1, 0, 1, False)
    whole = _of_rank(1, 6)
    shard = torch.empty(6)
    assert comm.reduce_scatter(shard, whole, async_op=True) is None
    assert torch.equal(shard, whole)
    assert comm.all_gather(torch.empty(6), shard) is None
    assert comm.all_reduce_sum(whole) is whole
    assert comm.gather_objects("here") == ["here"]
    assert comm.from_first(3) == 3
    comm.require_same("things", [1], torch.device("cpu"))


def _threads_of_gloo() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it ended just now
            found.append((task / "comm").read_text().strip())
    return [name for name in found if "gloo" in name]


def _destroyed_groups_end(rank: int, world: int, folder: str) -> None:
    """While the script's own optimizer lives on, as it does in one without functions."""
    model = torch.nn.Linear(3, 3)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    for over in (None, mesh):
        optimizer = ShardedLamb(model, stage=2, mesh=over)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    noise = GradientNoiseScale(model, small_batch=1, big_batch=2, process_group=dist.group.WORLD)
    checkpoint.save(folder, 1, model, optimizer)  # makes a second group of the same ranks
    del mesh, over  # torch's own, which keeps its groups
    assert _threads_of_gloo()
    dist.destroy_process_group()
    # Their entries may be seen for a moment after they were joined.
    until = time.monotonic() + 60
    while _threads_of_gloo() and time.monotonic() < until:
        time.sleep(0.05)
    assert not _threads_of_gloo()
    with pytest.raises(RuntimeError, match=r"destroy_process_group\(\): call this before, or make"):
        optimizer.step()
    noise._watched = torch.ones(())
    with pytest.raises(RuntimeError, match=r"destroy_process_group\(\): call this before, or make"):
        noise.update(1.0)
    # The harness waits for all ranks.
    dist.init_process_group("gloo", init_method=f"file://{folder}-2", rank=rank, world_size=world)
    checkpoint.save(folder, 2, model)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads names of threads in /proc")
def test_destroyed_groups_end(tmp_path: Path) -> None:
    """gloo's threads end with ``destroy_process_group()``.

    One that lived on, and let go of a tensor just as Python ended, aborted the process: "terminate
    called without an active exception" (pytorch/pytorch#190489).
    """
    run_ranks(2, tmp_path, _destroyed_groups_end, str(tmp_path / "saved"))
