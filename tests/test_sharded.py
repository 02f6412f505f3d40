"""ShardedLamb on gloo ranks: the world size must leave no trace, and nothing may be lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import WORLDS, each_world, run_ranks
from sharded_cases import OPTIONS, STEPS, state_of, train
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from dist_lamb import Lamb, ShardedLamb

pytestmark = pytest.mark.xdist_group("ranks")
#: (impl, stage, bucket_numel), the first of each impl being what the others must equal
RUNS = [
    ("reference", 1, 2**24),
    ("reference", 2, 2**13),
    ("foreach", 1, 2**24),
    ("foreach", 1, 2**13),
    ("foreach", 2, 2**13),
    ("compiled", 2, 2**13),
]


def _train(rank: int, group: Any, dtype: torch.dtype) -> dict[Any, Any]:
    world = dist.get_world_size(group)
    found = {}
    for impl, stage, bucket_numel in RUNS:
        if impl == "compiled" and world > 2:
            continue  # a compilation more on every rank
        params = models.make_params(dtype, seed=rank)  # only rank 0's may count
        optimizer = ShardedLamb(
            models.groups_of(params),
            stage=stage,
            impl=impl,
            bucket_numel=bucket_numel,
            process_group=group,
            **OPTIONS,
        )
        train(optimizer, params, rank, world)
        found[impl, stage, bucket_numel] = {
            "params": {n: p.detach().clone() for n, p in params.items()},
            "state": state_of(optimizer),
            "ratios": {n: r.clone() for n, r in optimizer.trust_ratios().items()},
        }
    return found


def plain(impl: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Lamb]:
    params = models.make_params(dtype)
    optimizer = Lamb(models.groups_of(params), impl=impl, **OPTIONS)
    train(optimizer, params, 0, 1)
    return params, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_every_world_size(tmp_path: Path, dtype: torch.dtype) -> None:
    """Params, moments, masters, steps and trust ratios: W, stage and buckets leave no trace."""
    ranks = run_ranks(4, tmp_path, each_world, _train, dtype)
    for impl in ("reference", "foreach", "compiled"):
        expected = ranks[0][1][next(run for run in RUNS if run[0] == impl)]
        assert expected["state"]["tile.weight step"] == 0
        assert expected["state"]["fc.weight step"] == STEPS - 1
        assert expected["state"]["norm.weight step"] == STEPS
        assert expected["ratios"]["tile.weight"].isnan()
        for rank, worlds in enumerate(ranks):
            assert sorted(worlds) == [w for w in WORLDS if rank < w]
            for world, runs in worlds.items():
                for key, run in runs.items():
                    if key[0] != impl:
                        continue
                    for part in ("params", "state", "ratios"):
                        where = (key, world, rank, part)
                        assert models.digest(run[part]) == models.digest(expected[part]), where
        # and the same bits as the optimizer that shards nothing
        params, optimizer = plain("foreach" if impl == "compiled" else impl, dtype)
        for name, p in params.items():
            if impl == "compiled":  # another compiler: the same to rounding
                torch.testing.assert_close(expected["params"][name], p.detach())
            else:
                assert torch.equal(expected["params"][name], p.detach()), name
        if impl != "compiled":
            for key, value in state_of(optimizer).items():
                # Lamb makes no state before the first gradient, and counts steps of nothing
                if not key.startswith(("tile.weight", "empty")):
                    assert torch.equal(expected["state"][key], value), key


def _communicate(rank: int, group: Any) -> dict[str, Any]:
    counts = {}
    for clip in (None, 1.0):
        for extra in (0, 200):
            params = models.make_params()
            params |= {f"x{i}": torch.nn.Parameter(torch.ones(i % 5 + 1)) for i in range(extra)}
            options = {"max_grad_norm": clip, "bucket_numel": 2**13, "process_group": group}
            optimizer = ShardedLamb(models.groups_of(params), **options)
            for t in range(2):
                for name, g in models.mean_gradients(params, t).items():
                    params[name].grad = g
                with CommDebugMode() as mode:
                    optimizer.step()
            kinds = {str(op): n for op, n in mode.get_comm_counts().items()}
            assert optimizer._kept is not None
            counts[f"{clip} {extra}"] = (kinds, len(optimizer._kept.buffers.layout.buckets))
    return counts


def test_communication_is_minimal(tmp_path: Path) -> None:
    """Per bucket one reduce-scatter and one all-gather; one all-reduce for all norms."""
    for worlds in run_ranks(4, tmp_path, each_world, _communicate):
        for world, counts in worlds.items():
            for key, (kinds, buckets) in counts.items():
                assert buckets > 1
                expected = {
                    "c10d._reduce_scatter_base_": buckets,
                    "c10d._allgather_base_": buckets,
                    "c10d.allreduce_": 1 if key.startswith("None") else 2,
                }
                assert kinds == ({} if world == 1 else expected), (world, key)


def _features(rank: int, world: int) -> dict[str, Any]:
    """Many small checks in one spawn; each raises where it fails."""
    for check in (
        _frozen_and_tied,
        _same_keys_everywhere,
        _accumulation,
        _averaged_by_ddp,
        _state_moves,
        _state_dict_is_never_a_part,
        _overflow_on_one_rank,
        _nan_is_seen_by_all,
        _added_group,
    ):
        check(rank, world)
        dist.barrier()
    return {"ok": True}


def test_features(tmp_path: Path) -> None:
    assert run_ranks(3, tmp_path, _features) == [{"ok": True}] * 3


def _same_everywhere(t: Tensor, world: int) -> bool:
    everyone = [torch.empty_like(t) for _ in range(world)]
    dist.all_gather(everyone, t.contiguous())
    return all(torch.equal(everyone[0], other) for other in everyone)


def _frozen_and_tied(rank: int, world: int) -> None:
    torch.manual_seed(0)  # ranks start alike: params are broadcast, frozen ones too
    model = torch.nn.Sequential(*(torch.nn.Linear(60, 60) for _ in range(3)))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    before = model[2].weight.clone()
    optimizer = ShardedLamb(model, lr=0.1)
    model(torch.ones(2, 60)).sum().backward()
    optimizer.step()
    assert torch.equal(model[2].weight, before)
    assert model[0].weight is model[1].weight
    assert len(optimizer.state) == 3
    model[2].weight.requires_grad_(True)
    model(torch.ones(2, 60)).sum().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)
    trained = [model[0].weight, model[0].bias, model[2].weight]
    assert [float(optimizer.state[p]["step"]) for p in trained] == [2, 2, 1]


def _same_keys_everywhere(rank: int, world: int) -> None:
    params = models.make_params(torch.bfloat16)
    optimizer = ShardedLamb(models.groups_of(params))
    train(optimizer, params, rank, world, range(1))
    keys = {n: sorted(optimizer.state[p]) for n, p in params.items()}
    assert set(map(tuple, keys.values())) == {("exp_avg", "exp_avg_sq", "master", "step")}
    lengths = torch.tensor([optimizer.state[p]["exp_avg"].numel() for p in params.values()])
    assert int((lengths == 0).sum()) > 0  # this rank owns nothing of some param, and yet has keys
    dist.all_reduce(lengths)
    assert lengths.tolist() == [p.numel() for p in params.values()]


def _accumulation(rank: int, world: int) -> None:
    """Two micro-batches under no_sync equal one of their sum."""
    runs = []
    for accumulate in (False, True):
        params = models.make_params()
        optimizer = ShardedLamb(models.groups_of(params), **OPTIONS)
        a, b = (models.mean_gradients(params, t) for t in (3, 4))
        if accumulate:
            with optimizer.no_sync():
                sum((p * a[n]).sum() for n, p in params.items()).backward()
            sum((p * b[n]).sum() for n, p in params.items()).backward()
        else:
            for n, p in params.items():
                p.grad = a[n] + b[n]
        optimizer.step()
        runs.append(models.digest(params))
        assert all(p.grad is None for p in params.values())
    assert runs[0] == runs[1]


def _averaged_by_ddp(rank: int, world: int) -> None:
    """Under DistributedDataParallel: the params of ShardedLamb reducing itself, to rounding."""
    results = []
    for wrapped in (False, True):
        torch.manual_seed(5)
        layers = (torch.nn.Linear(70, 90), torch.nn.Tanh(), torch.nn.Linear(90, 3))
        model = torch.nn.Sequential(*layers)
        net = torch.nn.parallel.DistributedDataParallel(model) if wrapped else model
        optimizer = ShardedLamb(model, lr=0.01, stage=1, reduce_gradients=not wrapped)
        for t in range(3):
            x = torch.randn(8, 70, generator=torch.Generator().manual_seed(10 * t + rank))
            net(x).square().mean().backward()
            optimizer.step()
            assert model[0].weight.grad is not None
            optimizer.zero_grad()
        assert _same_everywhere(model[0].weight.detach(), world)
        results.append([p.detach().clone() for p in model.parameters()])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def _state_moves(rank: int, world: int) -> None:
    """Whole state into Lamb, another ShardedLamb, and back: the same bits, and after it too."""
    for dtype in (torch.float32, torch.bfloat16):
        params = models.make_params(dtype)
        optimizer = ShardedLamb(models.groups_of(params), bucket_numel=2**13, **OPTIONS)
        train(optimizer, params, rank, world, range(3))
        whole = optimizer.full_optimizer_state_dict()
        for cls, more in ((Lamb, {}), (ShardedLamb, {"bucket_numel": 2**24, "stage": 1})):
            copy = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
            other = cls(models.groups_of(copy), **OPTIONS, **more)  # type: ignore[operator]
            other.load_state_dict(whole)
            assert models.digest(state_of(other)) == models.digest(state_of(optimizer)), cls
            back = ShardedLamb(models.groups_of(copy), **OPTIONS)
            back.load_state_dict(getattr(other, "full_optimizer_state_dict", other.state_dict)())
            assert models.digest(state_of(back)) == models.digest(state_of(optimizer)), cls
            train(back, copy, rank, world, range(3, 5))
            straight = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
            same = ShardedLamb(models.groups_of(straight), **OPTIONS)
            same.load_state_dict(whole)
            train(same, straight, rank, world, range(3, 5))
            assert models.digest(copy) == models.digest(straight)
        for entry in optimizer.state.values():  # as somebody does who moves it away and back
            entry.update({name: value.clone() for name, value in entry.items()})
        train(optimizer, params, rank, world, range(3, 5))
        assert models.digest(params) == models.digest(straight)
        assert models.digest(state_of(optimizer)) == models.digest(state_of(same))
        bad = {**whole, "state": {0: {**whole["state"][0], "exp_avg": torch.zeros(3)}}}
        with pytest.raises(ValueError, match=r"exp_avg of emb.weight has shape \(3,\)"):
            optimizer.load_state_dict(bad)


def _state_dict_is_never_a_part(rank: int, world: int) -> None:
    params = models.make_params()
    optimizer = ShardedLamb(models.groups_of(params), **OPTIONS)
    empty = optimizer.state_dict()
    assert empty["state"] == {}
    optimizer.load_state_dict(empty)  # what trainers do before training
    train(optimizer, params, rank, world, range(2))
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        optimizer.state_dict()
    optimizer.consolidate_state_dict(to=1)
    whole = optimizer.full_optimizer_state_dict()
    if rank == 1:
        got = optimizer.state_dict()
        for i, entry in whole["state"].items():
            assert all(torch.equal(entry[k], got["state"][i][k]) for k in entry)
    else:
        with pytest.raises(RuntimeError, match="consolidate_state_dict"):
            optimizer.state_dict()
    train(optimizer, params, rank, world, range(2, 3))
    with pytest.raises(RuntimeError, match="consolidate_state_dict"):
        optimizer.state_dict()  # what was consolidated is stale


def _overflow_on_one_rank(rank: int, world: int) -> None:
    """An overflow seen by one rank's scaler skips the step on all, and leaves every bit alone."""
    params = models.make_params()
    optimizer = ShardedLamb(models.groups_of(params), **OPTIONS)
    train(optimizer, params, rank, world, range(2))
    before = (models.digest(params), models.digest(state_of(optimizer)))
    for name, g in models.mean_gradients(params, 2).items():
        params[name].grad = g * 4.0
    if rank == 2:
        params["emb.weight"].grad[3, 3] = torch.inf  # type: ignore[index]
    optimizer.grad_scale = torch.tensor(4.0)
    optimizer.found_inf = torch.tensor(float(rank == 2))
    optimizer.step()
    assert (models.digest(params), models.digest(state_of(optimizer))) == before
    with pytest.raises(RuntimeError, match=r"overflowed on 1 of 3 ranks.*ShardedGradScaler"):
        optimizer.step()
    # and on all
    for everywhere in (1.0, 0.0):
        optimizer._scaling._overflows = None  # as in a run in which all ranks have it
        for name, g in models.mean_gradients(params, 2).items():
            params[name].grad = g * 4.0
        optimizer.found_inf = torch.tensor(everywhere)
        optimizer.step()
    scaled = models.digest(params)
    other = models.make_params()
    straight = ShardedLamb(models.groups_of(other), **OPTIONS)
    train(straight, other, rank, world, range(2))
    for name, g in models.mean_gradients(other, 2).items():
        other[name].grad = g
    straight.step()
    assert models.digest(other) == scaled


def _nan_is_seen_by_all(rank: int, world: int) -> None:
    params = models.make_params()
    optimizer = ShardedLamb(models.groups_of(params), **OPTIONS)
    for name, g in models.mean_gradients(params, 0).items():
        params[name].grad = g
    if rank == 1:
        params["emb.weight"].grad[96, 63] = torch.nan  # type: ignore[index]
    optimizer.step()
    assert bool(optimizer.trust_ratios()["emb.weight"].isnan())


def _added_group(rank: int, world: int) -> None:
    params = models.make_params()
    optimizer = ShardedLamb(models.groups_of(params), **OPTIONS)
    reference = {n: torch.nn.Parameter(p.detach().clone()) for n, p in params.items()}
    whole = Lamb(models.groups_of(reference), **OPTIONS)
    for t in range(4):
        if t == 2:
            for p, o in ((params, optimizer), (reference, whole)):
                p["late"] = torch.nn.Parameter(torch.full((3000,), 0.5))
                o.add_param_group({"params": [("late", p["late"])], "weight_decay": 0.3})
        for p, o in ((params, optimizer), (reference, whole)):
            for name, g in models.mean_gradients(p, t).items():
                p[name].grad = g
            o.step()
    assert models.digest(params) == models.digest(reference)
    assert float(optimizer.state[params["late"]]["step"]) == 2
