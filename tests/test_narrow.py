"""States in fewer bits: what is stored is what counts, and nobody sees how a param was cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from dtensor_cases import placed
from ranks import each_world, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from dist_lamb import Lamb, ShardedLamb, checkpoint
from dist_lamb import storage_formats as bits
from dist_lamb.sharding.dtensors import full_of

FORMATS: list[dict[str, Any]] = [
    {"state_format": "bfloat16"},
    {"state_format": "bfloat16", "master": "remainder"},
    {"master": "remainder"},
]
NARROW = FORMATS[1]
RANK_CASES = [(torch.float32, FORMATS[0]), (torch.bfloat16, NARROW)]
OPTIONS: dict[str, Any] = {"lr": 0.02, "max_grad_norm": 1.0}


def make(dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """As models.make_params, with a convolution in channels_last and a transposed matrix."""
    params = models.make_params(dtype)
    generator = torch.Generator().manual_seed(9)
    kernel = (torch.randn(6, 5, 3, 3, generator=generator) * 0.1).to(dtype)
    params["conv"] = nn.Parameter(kernel.contiguous(memory_format=torch.channels_last))
    params["wide.weight"] = nn.Parameter(params["wide.weight"].detach().t().contiguous().t())
    if device == "cpu":
        return params
    return {name: nn.Parameter(p.detach().to(device)) for name, p in params.items()}


def trained(
    cls: Any, dtype: torch.dtype, steps: int = 3, device: str = "cpu", **options: Any
) -> tuple[dict[str, Tensor], Any]:
    params = make(dtype, device)
    optimizer = cls(models.groups_of(params), **{**OPTIONS, **options})
    for t in range(steps):
        for name, g in models.mean_gradients(params, t).items():
            params[name].grad = g.to(device)
        optimizer.step()
        optimizer.zero_grad()
    return params, optimizer


def everything(params: dict[str, Tensor], optimizer: Any) -> dict[str, Tensor]:
    found = {name: p.detach().clone() for name, p in params.items()}
    packed = optimizer.state_dict()
    names = [name for group in packed["param_groups"] for name in group["param_names"]]
    for i, name in enumerate(names):
        for key, value in packed["state"].get(i, {}).items():
            if params[name].numel():
                found[f"{name} {key}"] = value.clone()
    return found


def masters(params: dict[str, Tensor], optimizer: Any) -> dict[str, Tensor]:
    """The values that are optimized, float32."""
    held = everything(params, optimizer)
    found = {}
    for name in params:
        p, remainder = held[name], held.get(f"{name} remainder")
        if remainder is not None:
            p = bits.master_of(bits.pattern(p), remainder.to(torch.int32))
        found[name] = held.get(f"{name} master", p).float()
    return found


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], case: Any = "") -> None:
    assert got.keys() == want.keys(), (case, got.keys() ^ want.keys())
    for name, value in want.items():
        assert got[name].dtype == value.dtype, (case, name)
        assert torch.equal(got[name], value), (case, name)


# --- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_what_is_stored(dtype: torch.dtype, options: dict[str, Any]) -> None:
    params, optimizer = trained(Lamb, dtype, steps=1, impl="foreach", **options)
    moments = torch.bfloat16 if options.get("state_format") and dtype != torch.float64 else None
    split = dtype == torch.bfloat16 and options.get("master") == "remainder"
    for p in params.values():
        state = optimizer.state[p]
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == (moments or torch.promote_types(dtype, torch.float32))
            assert state[name].stride() == p.stride()
        assert ("remainder" in state) == split
        assert ("master" in state) == (dtype.itemsize == 2 and not split)


@pytest.mark.parametrize("name", ["state_format", "master"])
def test_unknown_formats_are_refused(name: str) -> None:
    p = nn.Parameter(torch.ones(3))
    for cls in (Lamb, ShardedLamb):
        with pytest.raises(ValueError, match=f"Invalid {name} value: 'int8'; one of 'float32', "):
            cls([p], **{name: "int8"})


# --- one truth ------------------------------------------------------------------------------------


def _u_norm(x: Tensor, state: dict[str, Tensor], decay: float, t: int) -> float:
    m, v = (state[n].double() for n in ("exp_avg", "exp_avg_sq"))
    r = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-6)
    return float((r + decay * x.double()).norm())


def _check_norms(impl: str, device: str = "cpu") -> None:
    """The norms that a step reports are those of what it has stored, to float32's precision.

    A moment before rounding is up to 2^-7 of itself away from what is stored, its norm over n
    elements about 2^-8 / sqrt(n): the tensors are small enough for that to be far above 1e-5.
    """
    seen = 0.0
    formats = ({"state_format": "bfloat16"}, {"state_format": "bfloat16-nearest"})
    for options in formats[: 1 if impl == "compiled" else 2]:
        params = {n: nn.Parameter(p.detach().to(device)) for n, p in models.make_params().items()}
        optimizer = Lamb(models.groups_of(params), lr=0.02, impl=impl, **options)
        for t in range(1, 4):
            before = {name: p.detach().clone() for name, p in params.items()}
            for name, g in models.mean_gradients(params, t).items():
                params[name].grad = g.to(device)
            optimizer.step()
            norms = optimizer.update_norms()
            for name, p in params.items():
                decay = 0.05 if p.ndim > 1 else 0.0
                want = _u_norm(before[name], optimizer.state[p], decay, t)
                assert float(norms[name]) == pytest.approx(want, rel=1e-5), (options, t, name)
            state = dict(optimizer.state[params["fc.bias"]])
            state["exp_avg"] = state["exp_avg"].float() * (1 + 2**-9)
            other = _u_norm(before["fc.bias"], state, 0.0, t)
            seen = max(seen, abs(other / float(norms["fc.bias"]) - 1))
    assert seen > 1e-4  # the test would see unrounded moments


def test_both_norms_are_of_what_is_stored(impl: str) -> None:
    _check_norms(impl)


# --- backends -------------------------------------------------------------------------------------


def _distance(a: Tensor, b: Tensor, places: int) -> float:
    """Of their values, in units of the last place of the largest."""
    largest = float(b.double().abs().max()) if b.numel() else 0.0
    unit = math.ldexp(1.0, math.frexp(largest)[1] - places) if largest else 1.0
    return float((a.double() - b.double()).abs().max()) / unit if a.numel() else 0.0


ALL_CASES = [
    (dtype, options)
    for dtype in (torch.float32, torch.bfloat16)
    for options in (*FORMATS, {"state_format": "bfloat16-nearest"})
]


def _check_backend(impl: str, device: str = "cpu", cases: Any = ALL_CASES) -> None:
    """Between backends within one rounding: a moment that differs in float32's last place may come
    out as the other neighbour, one unit in the last of a bfloat16's 8 places."""
    for dtype, options in cases:
        want_p, want = trained(Lamb, dtype, 2, device, impl="reference", **options)
        got_p, got = trained(Lamb, dtype, 2, device, impl=impl, **options)
        for name, p in want_p.items():
            for key in ("exp_avg", "exp_avg_sq"):
                a, b = got.state[got_p[name]][key], want.state[p][key]
                assert a.dtype == b.dtype
                assert _distance(a, b, 8 if "state_format" in options else 20) <= 1, (name, key)
        values, expected = masters(got_p, got), masters(want_p, want)
        for name in expected:
            assert _distance(values[name], expected[name], 14) <= 1, (impl, dtype, options, name)


def test_backends_agree(impl: str) -> None:
    if impl == "compiled":  # compiling all takes minutes
        _check_backend(impl, cases=[(torch.bfloat16, NARROW)])
    elif impl == "foreach":
        _check_backend(impl)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_agrees_in_every_format() -> None:
    _check_backend("compiled")


def test_float32_formats_are_the_default_and_the_same_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        plain = everything(*trained(Lamb, dtype, impl="foreach"))
        named = {"state_format": "float32", "master": "float32"}
        assert_same(everything(*trained(Lamb, dtype, impl="foreach", **named)), plain)


def test_distance_from_float32() -> None:
    """After T steps the params are within T * lr * 2^-6 of the float32 run's, times the norm ratio.

    A stored moment is off by at most 2^-7 of itself (one bfloat16 rounding), m and v of the same
    element after t steps by at most the sum of decayed roundings, b^(t-1) + ... + 1 <= T roundings
    each; so a direction by at most T * (2^-7 + 2^-8) of the sum of |m| terms it is made of, and
    with ||x|| / ||u|| changing by no more, one step moves x by at most lr * ||x|| * T * 2^-5 more
    or less. T steps: T^2 * lr * ||x|| * 2^-5, here 9 * 0.02 / 32 = 0.0056 of the norm; without
    the cancellation of random roundings, which makes it far less.
    """
    steps = 3
    want_p, _ = trained(Lamb, torch.float32, steps, impl="foreach")
    got_p, _ = trained(Lamb, torch.float32, steps, impl="foreach", state_format="bfloat16")
    for name, p in want_p.items():
        if p.numel():
            bound = steps**2 * OPTIONS["lr"] * 2**-5 * max(float(p.detach().norm()), 1.0)
            off = float((got_p[name] - p).norm())
            assert off <= bound, name
            assert off > 0 or p.numel() < 30, name


def test_a_remainder_is_a_master() -> None:
    """bfloat16 params with remainders go the way of float32 masters bit by bit: it is the storage
    that differs, and the params in ties alone."""
    want_p, want = trained(Lamb, torch.bfloat16, 4, impl="foreach")
    got_p, got = trained(Lamb, torch.bfloat16, 4, impl="foreach", master="remainder")
    assert_same(masters(got_p, got), masters(want_p, want))
    for name, p in want_p.items():
        assert torch.equal(got.state[got_p[name]]["exp_avg"], want.state[p]["exp_avg"])
        assert int((got_p[name] != p).sum()) <= 0.01 * p.numel(), name


# --- whose random bits ----------------------------------------------------------------------------


def test_rounding_does_not_depend_on_place_or_memory_format() -> None:
    """Other params before it, another group, a transposed or channels_last memory, gaps."""
    generator = torch.Generator().manual_seed(1)
    value, grad = torch.randn(2, 6, 4, 3, 5, generator=generator).unbind(0)

    def run(p: Tensor, *before: Tensor) -> dict[str, Tensor]:
        optimizer = Lamb([*before, p], lr=0.1, **NARROW, impl="foreach")
        for _ in range(3):
            for other in (p, *before):
                other.grad = torch.ones_like(other) if other is not p else grad.to(p.dtype)
            optimizer.step()
        state = {k: v.contiguous() for k, v in optimizer.state[p].items()}
        return {"p": p.detach().contiguous().clone(), **state}

    def param(make: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
        return nn.Parameter(make(value.clone()).to(torch.bfloat16))

    want = run(param())
    assert_same(run(param(lambda t: t.contiguous(memory_format=torch.channels_last))), want)
    assert_same(run(param(lambda t: t.transpose(0, 3).contiguous().transpose(0, 3))), want)
    assert_same(run(param(), nn.Parameter(torch.ones(777))), want)
    gaps = torch.zeros(6, 4, 3, 10, dtype=torch.bfloat16)[..., ::2]
    assert_same(run(nn.Parameter(gaps.copy_(value))), want)


# --- ranks ----------------------------------------------------------------------------------------


def _shards(rank: int, group: Any) -> dict[str, str]:
    """Digests of all there is after 2 steps, and after 2 more with state that was loaded."""
    world = dist.get_world_size(group)
    found = {}
    for dtype, formats in RANK_CASES:
        params = make(dtype)
        of_models = {"bucket_numel": 2**13, "process_group": group, "impl": "foreach", **formats}
        optimizer = ShardedLamb(models.groups_of(params), **OPTIONS, **of_models)
        for t in range(4):
            mean = models.mean_gradients(params, t)
            for name, g in models.rank_gradients(mean, rank, world, t).items():
                params[name].grad = g
            optimizer.step()
            optimizer.zero_grad()
            if t == 1:
                # Into a new optimizer, as after a start on other ranks.
                packed = optimizer.full_optimizer_state_dict()
                found[f"{dtype} {formats} at 2"] = _digest(params, packed)
                values = {name: p.detach().clone() for name, p in params.items()}
                params = {name: nn.Parameter(v) for name, v in values.items()}
                optimizer = ShardedLamb(models.groups_of(params), **OPTIONS, **of_models)
                optimizer.load_state_dict(packed)
        packed = optimizer.full_optimizer_state_dict()
        found[f"{dtype} {formats} at 4"] = _digest(params, packed)
    return found


def _digest(params: dict[str, Tensor], packed: dict[str, Any]) -> str:
    tensors = {name: p.detach() for name, p in params.items()}
    names = [name for group in packed["param_groups"] for name in group["param_names"]]
    for i, name in enumerate(names):
        if params[name].numel():
            tensors |= {f"{name} {k}": v for k, v in packed["state"][i].items()}
    return models.digest(tensors)


#: rows; columns; FSDP over TP both ways; HSDP
PLACEMENTS: list[Any] = [
    ((4,), lambda t: [Shard(0)]),
    ((4,), lambda t: [Shard(min(1, t.ndim - 1))]),
    ((2, 2), lambda t: [Shard(0), Shard(min(1, t.ndim - 1))]),
    ((2, 2), lambda t: [Shard(0), Shard(0)]),
    ((2, 2), lambda t: [Replicate(), Shard(t.ndim - 1)]),
]


def _meshes() -> list[str]:
    """The same on DTensors; in the middle state and params go into others, sharded anew."""
    found = []
    for dtype, formats in RANK_CASES:
        for k in range(len(PLACEMENTS)):
            params, optimizer = make(dtype), None
            for t in range(4):
                if t in (0, 2):  # resharded in the middle
                    at, place = PLACEMENTS[(k + t) % len(PLACEMENTS)]
                    mesh = init_device_mesh("cpu", at)
                    whole = params
                    params = {
                        n: nn.Parameter(placed(p, mesh, place(p) if p.ndim else None))
                        for n, p in whole.items()
                    }
                    before = optimizer
                    optimizer = Lamb(models.groups_of(params), **OPTIONS, impl="foreach", **formats)
                    if before is not None:
                        packed = before.full_optimizer_state_dict()
                        optimizer.load_state_dict(packed)
                like = make(dtype)
                for n, g in models.mean_gradients(like, t).items():
                    p = params[n]
                    at_p = p.placements if isinstance(p, DTensor) else None
                    g = g.contiguous().as_strided(g.shape, g.stride())
                    params[n].grad = placed(g, mesh, at_p)
                optimizer.step()
                if t == 1:
                    params = {n: nn.Parameter(whole_of(p)) for n, p in params.items()}
            state = {
                f"{n} {key}": whole_of(v)
                for n, p in params.items()
                for key, v in optimizer.state[p].items()
                if p.numel() or not p.ndim
            }
            tensors = {n: whole_of(p) for n, p in params.items()} | state
            found.append(models.digest(tensors))
    return found


def whole_of(t: Tensor) -> Tensor:
    return full_of(t.detach()).clone()


def _ranks(rank: int, world: int) -> tuple[dict[int, Any], list[str]]:
    return each_world(rank, world, _shards), _meshes()


def test_no_trace_of_ranks_meshes_and_resharding(tmp_path: Path) -> None:
    """W = 1, 2, 3, 4; rows, columns, FSDP over TP, HSDP; state moved in the middle: same bits."""
    alone = []
    for dtype, formats in RANK_CASES:
        params, optimizer = trained(Lamb, dtype, 4, impl="foreach", **formats)
        alone.append(models.digest(everything(params, optimizer)))
    for worlds, meshes in run_ranks(4, tmp_path, _ranks):
        for found in worlds.values():
            assert [d for name, d in found.items() if name.endswith("at 4")] == alone
            assert found == worlds[max(worlds)]
        assert meshes == [digest for digest in alone for _ in PLACEMENTS]


# --- params written to from outside ---------------------------------------------------------------


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_params_written_to(cls: Any) -> None:
    """What is written counts, zeros exactly; what is written back as it was loses nothing."""
    params, optimizer = trained(cls, torch.bfloat16, 2, impl="foreach", **NARROW)
    p = params["emb.weight"]
    before = everything(params, optimizer)
    swapped = p.detach().clone()
    with torch.no_grad():
        p.fill_(0.5)
        p.copy_(swapped)  # as an average of weights that was looked at in between
    for other in params.values():
        other.grad = torch.zeros_like(other)
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = 0.0, (0.0, 0.0)
    optimizer.step()
    after = everything(params, optimizer)
    for name in ("emb.weight", "emb.weight remainder"):
        assert torch.equal(after[name], before[name])
    with torch.no_grad():
        p[:2] = 0.0
        p[2:4] = 0.75
    optimizer.step()
    got, now = everything(params, optimizer), masters(params, optimizer)["emb.weight"]
    assert not got["emb.weight remainder"][:2].any()
    assert torch.equal(got["emb.weight remainder"][4:], before["emb.weight remainder"][4:])
    assert (now.view(p.shape)[2:4] - 0.75).abs().max() <= 2**-9
    assert torch.equal(now.view(p.shape).to(torch.bfloat16)[:4], p.detach()[:4])


def test_memory_that_is_replaced_clears_what_has_changed() -> None:
    params, optimizer = trained(ShardedLamb, torch.bfloat16, 2, impl="foreach", **NARROW)
    p = params["emb.weight"]
    remainder = optimizer.state[p]["remainder"].view(p.shape)
    before = remainder.clone()
    assert before[3].any()
    new = p.detach().clone()
    new[3] += 1.0
    p.data = new
    optimizer.refresh_masters()
    assert not remainder[3].any()
    before[3] = 0
    assert torch.equal(remainder, before)


# --- loading --------------------------------------------------------------------------------------


def _continued(params: dict[str, Tensor], optimizer: Any, steps: int = 2) -> None:
    for t in range(10, 10 + steps):
        for name, g in models.mean_gradients(params, t).items():
            params[name].grad = g
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("how", ["state dict", "checkpoint"])
def test_loading_into_another_format(cls: Any, how: str, tmp_path: Path) -> None:
    """Exact where it can be: from remainders to masters and back, from bfloat16 to float32."""

    class Model(nn.Module):
        def __init__(self, params: dict[str, Tensor]) -> None:
            super().__init__()
            self.names = list(params)
            self.all = nn.ParameterList(params.values())

    def loaded(saved: Any, model: Model, **options: Any) -> tuple[dict[str, Tensor], Any]:
        params = make(torch.bfloat16)
        optimizer = cls(models.groups_of(params), **OPTIONS, impl="foreach", **options)
        if how == "checkpoint":
            checkpoint.load(saved, Model(params), optimizer)
        else:
            with torch.no_grad():
                for name, t in zip(model.names, model.all):
                    params[name].copy_(t)
            optimizer.load_state_dict(saved)
        for group in optimizer.param_groups:
            assert {name: group[name] for name in options} == options
        return params, optimizer

    def saved(params: dict[str, Tensor], optimizer: Any, name: str) -> tuple[Any, Model]:
        model = Model(params)
        if how == "checkpoint":
            return checkpoint.save(tmp_path / name, 3, model, optimizer), model
        return optimizer.state_dict(), model

    wide_p, wide = trained(cls, torch.bfloat16, impl="foreach")
    state, model = saved(wide_p, wide, "wide")
    # float32 masters become remainders: the run goes on bit by bit
    split_p, split = loaded(state, model, master="remainder")
    back = loaded(*saved(split_p, split, "split")) if cls is ShardedLamb else None
    _continued(wide_p, wide)
    _continued(split_p, split)
    want, got = masters(wide_p, wide), masters(split_p, split)
    assert_same(got, want)
    if back is not None:
        _continued(*back)
        assert_same(masters(*back), want)
    # bfloat16 moments are float32 ones exactly, and the reverse to nearest
    narrow_p, narrow = trained(cls, torch.bfloat16, impl="foreach", **NARROW)
    state, model = saved(narrow_p, narrow, "narrow")
    moments = {n: t.float() for n, t in everything(narrow_p, narrow).items() if "exp_avg" in n}
    values = masters(narrow_p, narrow)
    same_p, same = loaded(state, model, **NARROW)
    float_p, float_ = loaded(state, model)
    for optimizer in (narrow, same, float_):
        for group in optimizer.param_groups:  # keeps moments and params as they are
            group.update(lr=0.0, betas=(0.999, 0.999), grad_averaging=True)
    if cls is ShardedLamb:
        found = everything(float_p, float_)
        assert_same({n: t for n, t in found.items() if "exp_avg" in n}, moments)
        assert_same(masters(float_p, float_), values)
    _continued(same_p, same, 1)
    _continued(narrow_p, narrow, 1)
    assert_same(everything(same_p, same), everything(narrow_p, narrow))


def test_inspect_names_the_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dist_lamb.checkpoint import cli

    model = nn.Linear(3, 2).bfloat16()
    optimizer = Lamb(model, **NARROW)
    model(torch.ones(1, 3).bfloat16()).sum().backward()
    optimizer.step()
    path = checkpoint.save(tmp_path, 1, model, optimizer)
    assert cli.main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "state_format=bfloat16, master=remainder" in printed
    assert any(
        line.split()[:3] == ["optimizer.weight.remainder", "2x3", "int16"]
        for line in printed.splitlines()
    )


def test_groups_of_several_formats_and_changing_them() -> None:
    """Each group has its own; in Lamb they may change between steps, in ShardedLamb not."""
    params = make(torch.bfloat16)
    groups = models.groups_of(params)
    groups[1]["state_format"] = "float32"
    groups[1]["master"] = "float32"
    optimizers = []
    for cls in (Lamb, ShardedLamb):
        own = {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}
        mine = [{**g, "params": [(n, own[n]) for n, _ in g["params"]]} for g in groups]
        optimizer = cls(mine, **OPTIONS, impl="foreach", **NARROW)
        _continued(own, optimizer)
        assert optimizer.state[own["fc.bias"]]["exp_avg"].dtype == torch.float32
        assert optimizer.state[own["fc.weight"]]["exp_avg"].dtype == torch.bfloat16
        optimizers.append((own, optimizer))
    assert_same(everything(*optimizers[0]), everything(*optimizers[1]))
    for own, optimizer in optimizers:
        optimizer.param_groups[1].update(NARROW)
        if isinstance(optimizer, ShardedLamb):
            with pytest.raises(RuntimeError, match="has come under other formats than"):
                _continued(own, optimizer, 1)
            # As the message says: the new one first, which takes the params over.
            every = [{**g, "params": list(g["params"])} for g in optimizer.param_groups]
            after = ShardedLamb(every, **OPTIONS, impl="foreach")
            after.load_state_dict(optimizer.state_dict())
            _continued(own, after, 1)
            assert after.state[own["fc.bias"]]["exp_avg"].dtype == torch.bfloat16
            assert after.state[own["fc.bias"]]["step"] == 3
        else:
            before = masters(own, optimizer)["fc.bias"]
            optimizer.param_groups[1]["lr"] = 0.0
            _continued(own, optimizer, 1)
            assert optimizer.state[own["fc.bias"]]["exp_avg"].dtype == torch.bfloat16
            assert torch.equal(masters(own, optimizer)["fc.bias"], before)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_a_format_that_says_nothing_about_a_param_may_change(cls: Any) -> None:
    """Of float32 params ``master``, of float64 ones both."""
    p = nn.Parameter(torch.ones(3))
    q = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = cls([{"params": [p], "master": "remainder"}, {"params": [q], **NARROW}])
    for formats in ({}, {"master": "float32"}, {"master": "remainder"}):
        optimizer.param_groups[0].update(formats)
        optimizer.param_groups[1].update(formats, state_format="float32")
        for param in (p, q):
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert [set(optimizer.state[x]) for x in (p, q)] == [{"step", "exp_avg", "exp_avg_sq"}] * 2


# --- amsgrad, and masters that are loaded ---------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "foreach"])
def test_a_skipped_step_leaves_amsgrads_maximum(impl: str) -> None:
    """Rounded apart from the second moment it would be below it, and then be raised."""
    torch.manual_seed(0)
    p = torch.randn(4000)
    options = {"amsgrad": True, "state_format": "bfloat16", "nonfinite": "skip"}
    optimizer = Lamb([p], lr=0.01, impl=impl, **options)
    for t in range(4):
        p.grad = torch.randn(4000)
        if t == 3:
            p.grad[0] = torch.inf
            before = {n: v.clone() for n, v in optimizer.state[p].items()}
            x = p.clone()
        optimizer.step()
    assert int(optimizer.skipped_steps()) == 1
    assert torch.equal(p, x)
    for name, value in optimizer.state[p].items():
        assert torch.equal(value, before[name]), name
    assert (before["max_exp_avg_sq"] >= before["exp_avg_sq"]).all()


def _saved(cls: Any, master: str) -> tuple[Tensor, dict[str, Any]]:
    torch.manual_seed(0)
    w = torch.randn(400).bfloat16().requires_grad_()
    optimizer = cls([("w", w)], lr=0.01, master=master)
    for _ in range(3):
        w.grad = torch.randn(400).bfloat16()
        optimizer.step()
    return w.detach().clone(), optimizer.state_dict()


def _loaded(
    cls: Any, value: Tensor, saved: dict[str, Any], **options: Any
) -> tuple[Tensor, Tensor]:
    """A param of this value after the state dict was loaded, and after a step without gradients."""
    p = value.clone().requires_grad_()
    optimizer = cls([("w", p)], lr=0.01, **options)
    optimizer.load_state_dict(saved)
    loaded = p.detach().clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    return loaded, p.detach()


@pytest.mark.parametrize("before", ["float32", "remainder"])
@pytest.mark.parametrize("after", ["float32", "remainder"])
def test_weights_that_were_edited_outlive_loaded_masters(before: str, after: str) -> None:
    """Also of ShardedLamb: what is no rounding of its master was written to since."""
    factor = torch.ones(400).bfloat16()
    factor[::2], factor[1::4] = 0.0, 2.0
    ends = []
    for cls in (Lamb, ShardedLamb):
        w, saved = _saved(cls, before)
        loaded, end = _loaded(cls, w * factor, saved, master=after)
        assert torch.equal(loaded, w * factor)
        assert float((end - loaded).abs().max()) < 0.2
        ends.append(end)
    # But for a unit in the last place: an edited element may keep a remainder.
    assert ((ends[0] - ends[1]).abs() <= ends[0].abs() * 2**-7 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("master", ["float32", "remainder"])
def test_masters_loaded_into_another_precision(master: str, dtype: torch.dtype) -> None:
    """A float32 param has its bits back, a float16 one its rounding, by both optimizers."""
    found = []
    for cls in (Lamb, ShardedLamb):
        w, saved = _saved(cls, master)
        found.append(_loaded(cls, w.to(dtype), saved))
    (one, one_end), (other, other_end) = found
    assert torch.equal(one, other)
    assert torch.equal(one_end, other_end)
    assert bool((one != w.to(dtype)).any()) == (dtype == torch.float32 or master == "remainder")
    assert float((one_end.float() - w.float()).abs().max()) < 0.3
