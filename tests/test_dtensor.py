"""Lamb on DTensors: whatever the mesh and the placements, the same as on whole tensors."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import golden
import models
import pytest
import torch
from dtensor_cases import How, assert_same, everything, placed, whole
from ranks import each_world, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.debug import CommDebugMode

from dist_lamb import Lamb, ShardedLamb
from dist_lamb.norms import DTensorNorms

pytestmark = pytest.mark.xdist_group("ranks")

OPTIONS: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 1.0}
STEPS = 20
#: fc.weight is without gradient at step 1, tile.weight in the first three
ABSENT = {0: ("tile.weight",), 1: ("fc.weight", "tile.weight"), 2: ("tile.weight",)}


def by_rows(_: str, t: Tensor) -> list[Any]:
    """FSDP2's. Rows do not divide evenly, and small tensors leave ranks without any."""
    return [Shard(0) if t.ndim else Replicate()]


def mixed(name: str, t: Tensor) -> list[Any] | None:
    """Columns, replicas and plain tensors in one optimizer."""
    if name in ("fc.bias", "one"):
        return None
    return [Shard(1) if t.ndim > 1 else Replicate()]


def replicated_rows(name: str, t: Tensor) -> list[Any]:
    """HSDP."""
    return [Replicate(), *by_rows(name, t)]


def both_ways(name: str, t: Tensor) -> list[Any] | None:
    """FSDP over TP: matrices cut along both axes, vectors along one, some along none."""
    if name == "one":
        return None
    return [Shard(0), Shard(1)] if t.ndim > 1 else [*by_rows(name, t), Replicate()]


def swapped(name: str, t: Tensor) -> list[Any]:
    """Both axes cut one dim; vectors are cut along the axis that ``both_ways`` leaves out."""
    return [Shard(0), Shard(0)] if t.ndim > 1 else [Replicate(), *by_rows(name, t)]


def train(
    mesh: DeviceMesh | None = None,
    how: How = by_rows,
    dtype: torch.dtype = torch.float32,
    steps: int = STEPS,
    grad_placements: Sequence[Any] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Everything there is after some steps, on whole tensors if there is no mesh."""
    shapes = models.make_params(dtype)
    places = {n: how(n, p) if mesh is not None else None for n, p in shapes.items()}
    params: dict[str, Tensor] = {
        n: nn.Parameter(placed(p, mesh, places[n])) if mesh is not None else p
        for n, p in shapes.items()
    }
    optimizer = Lamb(models.groups_of(params), **{**OPTIONS, **options})
    for t in range(steps):
        grads = models.mean_gradients(shapes, t, ABSENT.get(t, ()))
        for n, g in grads.items():
            at = places[n] and (grad_placements or places[n])
            params[n].grad = g if mesh is None else placed(g, mesh, at)
        optimizer.step()
        optimizer.zero_grad()
    return everything(params, optimizer)


# --- every mesh ----------------------------------------------------------------------------------


def _one_axis(rank: int, group: Any, expected: dict[Any, dict[str, Tensor]]) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    for (impl, dtype), want in expected.items():
        got = train(mesh, dtype=dtype, impl=impl)
        assert_same(got, want, (impl, dtype, by_rows))
    for how in (by_rows, mixed):
        got = train(mesh, how, grad_placements=[Replicate()], impl="foreach")
        assert_same(got, expected["foreach", torch.float32], how)


def _four_ranks(rank: int, world: int, expected: dict[Any, dict[str, Tensor]]) -> dict[str, int]:
    each_world(rank, world, _one_axis, expected)
    _two_axes(expected["foreach", torch.float32])
    return _communication()


def test_every_mesh_and_what_it_communicates(tmp_path: Path) -> None:
    """20 steps at W = 1, 2, 3, 4 and on 2 x 2: params, moments, masters, counters, ratios, all
    bits. With 240 tensors: one collective a step and mesh axis, one of a few scalars to clip.
    """
    kinds = [
        ("reference", torch.float32),
        ("foreach", torch.float32),
        ("foreach", torch.bfloat16),
        ("compiled", torch.float32),
    ]
    expected = {(impl, dtype): train(impl=impl, dtype=dtype) for impl, dtype in kinds}
    counts = run_ranks(4, tmp_path, _four_ranks, expected, timeout=240)
    assert all(c == counts[0] for c in counts)
    theirs = counts[0].pop("timm", None)
    assert counts[0] == {
        "FSDP2 None": 1,
        "FSDP2 1.0": 2,
        "HSDP None": 1,
        "HSDP 1.0": 2,
        "FSDP x TP None": 2,
        "FSDP x TP 1.0": 4,
    }
    print(f"collectives a step: Lamb 1, timm Lamb {theirs}")
    assert theirs is None or theirs > 240


def _two_axes(expected: dict[str, Tensor]) -> None:
    """Replicate x shard, shard x shard of other dims and of the same dim."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    for how in (replicated_rows, both_ways, swapped):
        assert_same(train(mesh, how), expected, how)
    _golden(mesh, both_ways)


def _three_ranks(rank: int, world: int, in_float64: dict[str, Tensor]) -> None:
    mesh = init_device_mesh("cpu", (world,))
    # Sums in float64 cannot hide the order of the ranks from params in float64.
    for name, got in train(mesh, dtype=torch.float64).items():
        torch.testing.assert_close(got, in_float64[name], rtol=1e-12, atol=1e-12, equal_nan=True)
    _golden(mesh, by_rows)
    _refusals(rank, mesh)
    _overflow_on_one_rank(rank, mesh)
    _nan_on_one_rank(rank, mesh)
    _dummy_step(rank, mesh)
    _added_group(rank, mesh)
    _swapped_params(rank, mesh)
    _offloaded(mesh)


def test_three_ranks(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, _three_ranks, train(dtype=torch.float64))


def _golden(mesh: DeviceMesh, how: How) -> None:
    for name in golden.NAMES:
        trajectory = golden.Trajectory.load(name)
        params = {n: nn.Parameter(placed(t, mesh, how(n, t))) for n, t in trajectory.init.items()}
        optimizer = Lamb(trajectory.groups(params), **trajectory.options)
        for grads, expected in zip(trajectory.grads, trajectory.params):
            for n, p in params.items():
                p.grad = placed(grads[n], mesh, how(n, grads[n]))
            optimizer.step()
            for n, p in params.items():
                error = (whole(p) - expected[n]).abs().max() / expected[n].abs().max()
                assert error <= golden.TOLERANCE, (name, n, error)


def _refusals(rank: int, mesh: DeviceMesh) -> None:
    partial = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(RuntimeError, match=r"cannot optimize w: .*Partial.*redistribute"):
        Lamb([("w", partial)])
    sharded = nn.Parameter(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))
    with pytest.raises(RuntimeError, match="w is a DTensor, sharded already"):
        ShardedLamb([("w", sharded)])
    other = init_device_mesh("cpu", (1, mesh.size()))
    sharded.grad = distribute_tensor(torch.ones(6), other, [Replicate(), Shard(0)])
    with pytest.raises(RuntimeError, match=r"cannot step w: the param is on .*, its gradient on"):
        Lamb([("w", sharded)]).step()
    state = Lamb([("w", sharded)]).state_dict()
    state["state"][0] = {"step": 1, "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(6)}
    with pytest.raises(ValueError, match=r"exp_avg of w has shape \(2,\), the param has \(6,\)"):
        Lamb([("w", sharded)]).load_state_dict(state)


def parameters(mesh: DeviceMesh, how: How) -> dict[str, Tensor]:
    return {n: nn.Parameter(placed(p, mesh, how(n, p))) for n, p in models.make_params().items()}


def _overflow_on_one_rank(rank: int, mesh: DeviceMesh) -> None:
    """What one rank's scaler sees is agreed upon by all; and the scale is divided out."""
    for clip in (OPTIONS["max_grad_norm"], None):
        params = parameters(mesh, mixed)
        optimizer = Lamb(models.groups_of(params), **{**OPTIONS, "max_grad_norm": clip})
        runs = []
        for flag in (float(rank == 1), 0.0):
            for n, g in models.mean_gradients(models.make_params(), 0, ABSENT[0]).items():
                params[n].grad = placed(g * 4.0, mesh, mixed(n, g))
            optimizer.grad_scale = torch.tensor(4.0)  # type: ignore[attr-defined]
            optimizer.found_inf = torch.tensor(flag)  # type: ignore[attr-defined]
            optimizer.step()
            runs.append({n: whole(p) for n, p in params.items()})
        assert models.digest(runs[0]) == models.digest(models.make_params())
        if clip is None:
            assert models.digest(runs[1]) != models.digest(runs[0])
        else:
            straight = train(steps=1)
            assert_same(runs[1], {n: straight[n] for n in runs[1]}, "after the overflow")


def _nan_on_one_rank(rank: int, mesh: DeviceMesh) -> None:
    p = nn.Parameter(distribute_tensor(torch.ones(7, 2), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(7, 2), mesh, [Shard(0)])
    if rank == 1:
        p.grad.to_local()[0, 0] = torch.nan
    optimizer = Lamb([("w", p)])
    optimizer.step()
    assert bool(optimizer.trust_ratios()["w"].isnan())


def _dummy_step(rank: int, mesh: DeviceMesh) -> None:
    """lr = 0 and zero gradients: bit-exact, no counter; a gradient on one rank's rows counts."""
    params = parameters(mesh, by_rows)
    optimizer = Lamb(models.groups_of(params), lr=0.0, decoupled=False)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    unchanged = models.digest({n: whole(p) for n, p in params.items()})
    assert unchanged == models.digest(models.make_params())
    assert all(float(optimizer.state[p]["step"]) == 0 for p in params.values())
    assert not any(whole(optimizer.state[p]["exp_avg"]).any() for p in params.values())
    spike = torch.zeros(97, 64)
    spike[96, 63] = 1.0  # of the last rank
    params["emb.weight"].grad = placed(spike, mesh, [Shard(0)])
    optimizer.step()
    assert float(optimizer.state[params["emb.weight"]]["step"]) == 1
    assert float(optimizer.state[params["wide.weight"]]["step"]) == 0


def _added_group(rank: int, mesh: DeviceMesh) -> None:
    runs = []
    for where in (None, mesh):
        params = parameters(mesh, by_rows) if where else models.make_params()
        optimizer = Lamb(models.groups_of(params), **OPTIONS)
        for t in range(4):
            if t == 2:
                late = torch.full((5, 3), 0.5)
                params["late"] = nn.Parameter(placed(late, mesh, [Shard(0)] if where else None))
                more = {"params": [("late", params["late"])], "weight_decay": 0.3}
                optimizer.add_param_group(more)
            whole_params = {n: whole(p) for n, p in params.items()}
            for n, g in models.mean_gradients(whole_params, t).items():
                params[n].grad = placed(g, mesh, by_rows(n, g) if where else None)
            optimizer.step()
        runs.append(everything(params, optimizer))
    assert_same(runs[1], runs[0], "added group")


def _swapped_params(rank: int, mesh: DeviceMesh) -> None:
    """Accelerate hands over stand-ins, and puts the DTensors of FSDP2 in their place later."""
    first = nn.Parameter(torch.full((7, 3), 0.5))
    second = nn.Parameter(torch.full((4,), 0.25))
    optimizer = Lamb([nn.Parameter(torch.empty(1)) for _ in range(2)], lr=0.1)
    straight = Lamb([first, second], lr=0.1)
    sharded = [nn.Parameter(placed(p, mesh, [Shard(0)])) for p in (first, second)]
    optimizer.param_groups[0]["params"] = sharded
    for t in range(2):
        for p, whole_p in zip(sharded, (first, second)):
            whole_p.grad = torch.arange(whole_p.numel()).view(whole_p.shape) - 3.5 - t
            p.grad = placed(whole_p.grad, mesh, [Shard(0)])
        optimizer.step()
        straight.step()
    assert torch.equal(whole(sharded[0]), first)
    assert torch.equal(whole(sharded[1]), second)


def _offloaded(mesh: DeviceMesh) -> None:
    """Params on the CPU on a mesh of GPUs, as under CPUOffloadPolicy; and state loaded for them."""
    gpus = DeviceMesh.from_group(mesh.get_group(), "cuda")
    whole_p, whole_g = torch.arange(35.0).view(7, 5), torch.ones(7, 5)

    def on_gpus(t: Tensor) -> Any:
        t = placed(t, mesh, [Shard(0)])
        spec = DTensorSpec(gpus, (Shard(0),), t._spec.tensor_meta)  # type: ignore[attr-defined]
        return DTensor(t.to_local(), spec, requires_grad=False)  # type: ignore[call-arg]

    straight = Lamb([nn.Parameter(whole_p)], lr=0.1, max_grad_norm=1.0)
    optimizer = Lamb([nn.Parameter(on_gpus(whole_p))], lr=0.1, max_grad_norm=1.0)
    (p,), (twin,) = (o.param_groups[0]["params"] for o in (optimizer, straight))
    for t in range(3):
        p.grad, twin.grad = on_gpus(whole_g), whole_g
        if not t:
            optimizer._known, optimizer._norms = [p], DTensorNorms([p])
        (axis,) = optimizer._norms._axes  # type: ignore[union-attr]
        assert t or axis._device_type == "cuda"
        axis._device_type = "cpu"  # there is no GPU here
        optimizer.step()
        straight.step()
        if t == 1:
            optimizer.load_state_dict(straight.state_dict())
    assert torch.equal(p.to_local(), placed(twin, mesh, [Shard(0)]).to_local())  # type: ignore[attr-defined]
    for name in ("exp_avg", "exp_avg_sq"):
        state = optimizer.state[p][name]
        assert state.device_mesh == gpus
        want = placed(straight.state[twin][name], mesh, [Shard(0)])
        assert torch.equal(state.to_local(), want.to_local())  # type: ignore[attr-defined]


# --- what it costs -------------------------------------------------------------------------------


class Deep(nn.Module):
    """240 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(60)
        )


def _communication() -> dict[str, int]:
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    found = {}
    cases: dict[str, tuple[DeviceMesh, How]] = {
        "FSDP2": (mesh["inner"], by_rows),
        "HSDP": (mesh, replicated_rows),
        "FSDP x TP": (mesh, both_ways),
    }

    def params_of(where: DeviceMesh, how: How) -> list[nn.Parameter]:
        params = [nn.Parameter(placed(p, where, how("", p))) for p in Deep().parameters()]
        for p in params:
            p.grad = torch.ones_like(p)
        return params

    for case, (where, how) in cases.items():
        for clip in (None, 1.0):
            optimizer = Lamb(params_of(where, how), max_grad_norm=clip)
            optimizer.step()
            with CommDebugMode() as comm:
                optimizer.step()
            found[f"{case} {clip}"] = comm.get_total_counts()
    if timm := _timm_lamb():
        theirs = timm(params_of(mesh["inner"], by_rows), max_grad_norm=None, always_adapt=True)
        theirs.step()
        with CommDebugMode() as comm:
            theirs.step()
        found["timm"] = comm.get_total_counts()
    return found


def _timm_lamb() -> Any:
    """timm's Lamb without the rest of timm, which needs torchvision; None if not installed."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        return None
    (folder,) = spec.submodule_search_locations
    for name, path in (("timm", folder), ("timm.optim", f"{folder}/optim")):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    return importlib.import_module("timm.optim.lamb").Lamb


# --- Triton --------------------------------------------------------------------------------------


def _planned(rank: int, world: int) -> None:
    """The table of pointers holds local shards, from step to step, and gives the same bits."""
    from dist_lamb.kernels import triton_kernels

    assert triton_kernels.INTERPRETED
    mesh = init_device_mesh("cpu", (world,))
    want = train(dtype=torch.bfloat16, steps=2, impl="triton")
    got = train(mesh, by_rows, dtype=torch.bfloat16, steps=2, impl="triton")
    assert_same(got, want, by_rows)
    got = train(mesh, mixed, steps=2, impl="triton")
    for name, expected in train(steps=2, impl="reference").items():
        torch.testing.assert_close(
            got[name], expected, rtol=1e-4 if "ratio" in name else 1e-5, atol=1e-6, equal_nan=True
        )
    p = nn.Parameter(distribute_tensor(torch.ones(7, 5), mesh, [Shard(0)]))
    optimizer = Lamb([("w", p)], impl="triton", max_grad_norm=1.0)
    tables = []
    for placement in (Shard(0), Shard(0), Replicate(), Shard(0), Shard(0)):
        p.grad = distribute_tensor(torch.full((7, 5), 2.0), mesh, [placement])
        optimizer.step()
        tables.append(optimizer._kept and optimizer._kept.updates[0])
    assert tables[0] is tables[1] is not None
    assert tables[2] is None
    assert tables[3] is tables[4] is not None


@pytest.mark.slow  # the interpreter on two ranks; test_gpu_fsdp2 has it on GPUs
def test_planned_triton_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run_ranks(2, tmp_path, _planned)


def _six_ranks(rank: int, world: int, expected: dict[str, Tensor]) -> None:
    mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicate", "shard"))
    for how in (replicated_rows, both_ways, swapped):
        assert_same(train(mesh, how), expected, how)


@pytest.mark.slow
def test_six_ranks(tmp_path: Path) -> None:
    """Replicas of three shards each: sums are gathered there, and added in the order of ranks."""
    run_ranks(6, tmp_path, _six_ranks, train(), timeout=280)
