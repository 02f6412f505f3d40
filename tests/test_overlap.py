"""Communication inside backward and forward: it may run late, and nothing may show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from overlap_cases import (
    OPTIONS,
    STEPS,
    VARIANTS,
    averaged,
    late_collectives,
    loss_of,
    make_net,
    run,
)
from ranks import each_world, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from dist_lamb import Lamb, ShardedLamb, param_groups

pytestmark = pytest.mark.xdist_group("ranks")


def _variants(rank: int, group: Any) -> dict[str, list[str]]:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        plain = [run(rank, group, dtype, **variant) for variant in VARIANTS]
        late = []
        if dtype == torch.bfloat16:
            with late_collectives():
                late = [run(rank, group, dtype, **variant) for variant in VARIANTS]
        found[str(dtype)] = plain + late
    return found


def test_overlap_leaves_no_trace(tmp_path: Path) -> None:
    """On or off, at stage 1 and 2, at once or late: the same bits on every rank."""
    ranks = run_ranks(4, tmp_path, each_world, _variants)
    for world in range(1, 5):
        for dtype in ("torch.float32", "torch.bfloat16"):
            digests = {d for rank in range(world) for d in ranks[rank][world][dtype]}
            assert len(digests) == 1, (world, dtype)


def _exact(rank: int, group: Any, **options: Any) -> str:
    """Gradients by backward whose mean over ranks is exact: W must leave no trace."""
    world = dist.get_world_size(group)
    params = models.make_params()
    options = {**OPTIONS, **options}
    if "mesh" not in options:
        options["process_group"] = group
    optimizer = ShardedLamb(models.groups_of(params), **options)
    for t in range(STEPS):
        mean = models.mean_gradients(params, t, ("tile.weight",))
        own = models.rank_gradients(mean, dist.get_rank(group), world, t)
        sum((params[n] * g).sum() for n, g in own.items()).backward()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return models.digest(params)


def _grid(rank: int, world: int) -> dict[str, Any]:
    """2 x 2 ranks: replicas of two shards, beside four shards and the optimizer that has none."""
    found: dict[str, Any] = {"flat": _exact(rank, None), "unsharded": None}
    for name, shape in {"2x2": (2, 2), "4x1": (4, 1), "1x4": (1, 4)}.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        for stage in (1, 2):
            found[f"{name} {stage}"] = _exact(rank, None, mesh=mesh, stage=stage)
        with late_collectives():
            found[f"{name} late"] = _exact(rank, None, mesh=mesh)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = make_net()
    groups = param_groups(model)
    optimizer = ShardedLamb(groups, mesh=mesh, overlap_gather=True, **OPTIONS)
    other_rank_is_wrong = models.make_params()
    if rank == 2:
        other_rank_is_wrong["one"] = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"rank 0 has one \(1,\).* rank 2 has one \(2,\)"):
        ShardedLamb(models.groups_of(other_rank_is_wrong), mesh=mesh)
    for t in range(2):
        loss = loss_of(model, t, rank)
        with CommDebugMode() as mode:
            loss.backward()
            optimizer.step()
    found["counts"] = {str(op): n for op, n in mode.get_comm_counts().items()}
    found["buckets"] = len(optimizer._kept.buffers.layout.buckets)  # type: ignore[union-attr]
    # an overflow that one rank alone has seen skips the step of both replicas
    optimizer = ShardedLamb(groups, mesh=mesh, overlap=False, **OPTIONS)
    before = models.digest({n: p.detach() for n, p in model.named_parameters()})
    loss = loss_of(model, 5, rank) * (torch.inf if rank == 3 else 1.0)
    loss.backward()
    optimizer.grad_scale = torch.tensor(1.0)
    optimizer.found_inf = torch.tensor(float(rank == 3))
    optimizer.step()
    optimizer.synchronize()
    found["skipped"] = before == models.digest({n: p.detach() for n, p in model.named_parameters()})
    return found


def test_hierarchical_mesh(tmp_path: Path) -> None:
    params = models.make_params()
    whole = Lamb(models.groups_of(params), lr=0.05, max_grad_norm=1.0)
    for t in range(STEPS):
        for n, g in models.mean_gradients(params, t, ("tile.weight",)).items():
            params[n].grad = g
        whole.step()
        whole.zero_grad()
    expected = models.digest(params)
    for found in run_ranks(4, tmp_path, _grid):
        counts, buckets = found.pop("counts"), found.pop("buckets")
        assert found.pop("skipped")
        del found["unsharded"]
        assert set(found.values()) == {expected}, found
        assert buckets > 2
        assert counts == {
            "c10d._reduce_scatter_base_": buckets,
            "c10d._allgather_base_": buckets,
            # across replicas, one for each bucket; over shards, the clip's scalar and the norms
            "c10d.allreduce_": buckets + 2,
        }


# --- every way in which gradients come about --------------------------------------------------


def expect(
    rank: int,
    world: int,
    train: Callable[[ShardedLamb, nn.Module, int], None],
    losses: Callable[[nn.Module, int], list[Tensor]],
    *,
    reentrant: bool | None = None,
    **options: Any,
) -> None:
    """``train`` (forward and backward of a step) gives what Lamb gives on averaged gradients."""
    plain = make_net(reentrant=reentrant)
    shard_nothing = {k: v for k, v in OPTIONS.items() if k != "bucket_numel"}
    reference = Lamb(param_groups(plain), **shard_nothing)
    model = make_net(reentrant=reentrant)
    optimizer = ShardedLamb(param_groups(model), **{**OPTIONS, **options})
    for t in range(STEPS):
        averaged(plain, lambda m, t=t: losses(m, t), world)
        reference.step()
        reference.zero_grad()
        train(optimizer, model, t)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    for (name, p), q in zip(model.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def _ways(rank: int, world: int) -> bool:
    def one(model: nn.Module, t: int) -> list[Tensor]:
        return [loss_of(model, t, rank)]

    def two(model: nn.Module, t: int) -> list[Tensor]:
        return [loss_of(model, t, rank) / 2, loss_of(model, t + 50, rank) / 2]

    def once(optimizer: ShardedLamb, model: nn.Module, t: int) -> None:
        loss_of(model, t, rank).backward()

    def twice(optimizer: ShardedLamb, model: nn.Module, t: int) -> None:
        for loss in two(model, t):
            loss.backward()

    def local(optimizer: ShardedLamb, model: nn.Module, t: int) -> None:
        with optimizer.no_sync():
            (loss_of(model, t, rank) / 2).backward()
            if optimizer._kept is not None and optimizer.accumulate == "local":
                assert optimizer._reducer is not None
                assert not optimizer._reducer.rounds.count
        (loss_of(model, t + 50, rank) / 2).backward()

    def local_last(optimizer: ShardedLamb, model: nn.Module, t: int) -> None:
        (loss_of(model, t, rank) / 2).backward()
        with optimizer.no_sync():
            (loss_of(model, t + 50, rank) / 2).backward()

    def by_hand(optimizer: ShardedLamb, model: nn.Module, t: int) -> None:
        once(optimizer, model, t)
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)

    def skipped(optimizer: ShardedLamb, model: nn.Module, t: int) -> None:
        (1e3 * loss_of(model, t, rank)).backward()
        optimizer.zero_grad()
        once(optimizer, model, t)

    with late_collectives():
        for stage in (1, 2):
            kept: dict[str, Any] = {"stage": stage, "overlap_gather": True}
            expect(rank, world, once, one, **kept)
            expect(rank, world, twice, two, **kept)
            expect(rank, world, local, two, **kept)
            expect(rank, world, local_last, two, **kept)
            expect(rank, world, skipped, one, **kept)
            for reentrant in (False, True):
                expect(rank, world, once, one, reentrant=reentrant, **kept)
                expect(rank, world, twice, two, reentrant=reentrant, **kept)
        for train in (local, twice):
            expect(rank, world, train, two, accumulate="sharded", overlap_gather=True)
        # stage 1 keeps p.grad: what is done to it after backward is reduced once more
        expect(rank, world, by_hand, lambda m, t: [loss_of(m, t, rank) / 2], stage=1)
    return True


def test_every_way_to_make_gradients(tmp_path: Path) -> None:
    """Unused params, params used twice, more backwards than steps, checkpoints, no_sync."""
    assert run_ranks(3, tmp_path, _ways) == [True] * 3


def _failing(rank: int, world: int) -> bool:
    """A gradient that is refused in the middle of a backward; then the run goes on without it."""

    def trained(fails: tuple[int, ...]) -> list[Tensor]:
        torch.manual_seed(0)
        layers = [nn.Linear(32, 32) for _ in range(3)]
        model = nn.Sequential(nn.Linear(32, 32), nn.Embedding(40, 32), *layers)
        optimizer = ShardedLamb(model, bucket_numel=1024, lr=0.1)

        def backward(t: int) -> None:
            first, embed, *rest = model
            embed.sparse = t in fails
            x = embed(torch.arange(4)) + first(torch.ones(4, 32) * (rank + t))
            for layer in rest:
                x = torch.tanh(layer(x))
            x.square().sum().backward()

        for t in (0, 1, *fails, 4, 5):
            if t in fails:
                with pytest.raises(RuntimeError, match=r"1\.weight has a sparse gradient"):
                    backward(t)
            else:
                backward(t)
                optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    return all(map(torch.equal, trained((2, 3)), trained(())))


def test_a_backward_that_fails(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, _failing) == [True] * 2


class Branches(nn.Module):
    """Every forward uses half of the params."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])

    def forward(self, x: Tensor, which: int) -> dict[str, Tensor]:
        return {"out": torch.tanh(self.branches[which](x))}


def _branches(rank: int, world: int) -> bool:
    def backward(model: nn.Module, t: int, penalty: bool) -> None:
        for micro_batch in range(2):
            # From the third step on, rank 0 goes the other way round: the gradients that came last
            # before come first there, and on the other ranks not.
            which = (rank + micro_batch + (t > 1 and rank == 0)) % 2
            x = torch.arange(10.0).view(2, 5).requires_grad_() / (10 + rank + t)
            loss = model(x, which)["out"].square().sum()
            if penalty:
                (of_x,) = torch.autograd.grad(loss, x, create_graph=True)
                loss = loss + of_x.square().sum()
            loss.backward()

    def trained(given: str, penalty: bool, **options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model: nn.Module = Branches()
        optimizer: Any
        if given == "plain":
            optimizer = Lamb(model.parameters(), lr=0.1)
        else:
            params = list(model.parameters()) if given == "list" else model
            optimizer = ShardedLamb(params, lr=0.1, **options)
        called: Any = model
        if given == "compiled":
            called = torch.compile(model, backend="eager", fullgraph=True)
        for t in range(4):
            backward(called, t, penalty)
            if given == "plain":
                averaged(model, lambda _: [], world)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for penalty in (False, True):
        want = trained("plain", penalty)
        for options in ({"stage": 1}, {"stage": 2}, {"accumulate": "sharded"}):
            for given in ("module", "list", *(() if penalty else ("compiled",))):
                got = trained(given, penalty, **options)
                torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)
    return True


def test_ranks_that_take_different_branches(tmp_path: Path) -> None:
    """As many backwards on every rank, but no gradient that comes in all of them."""
    assert run_ranks(2, tmp_path, _branches) == [True] * 2


def _refusals(rank: int, world: int) -> bool:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="overlap_gather=True needs the module"):
        ShardedLamb(model.parameters(), overlap_gather=True)
    for options in ({"stage": 1}, {"overlap": False}, {"reduce_gradients": False}):
        with pytest.raises(ValueError, match="accumulate='sharded' needs stage=2"):
            ShardedLamb(model, accumulate="sharded", **options)
    with pytest.raises(ValueError, match="Invalid accumulate: 'global'"):
        ShardedLamb(model, accumulate="global")
    with pytest.raises(ValueError, match=r"Invalid reduce_dtype: torch\.int8"):
        ShardedLamb(model, reduce_dtype=torch.int8)
    with pytest.raises(ValueError, match=r"rank 0 has overlap = True, rank 1 has overlap = False"):
        ShardedLamb(model, overlap=rank == 0)
    optimizer = ShardedLamb(model, overlap_gather=True)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 8)).sum()).backward()
    with pytest.raises(RuntimeError, match=r"stage=1 or overlap=False for loss scaling"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    return True


def test_refusals(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, _refusals) == [True] * 2
