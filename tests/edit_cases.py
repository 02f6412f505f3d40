"""What the tests of edits share: LAMB in float64 to compare with, and the backends to run on."""

from __future__ import annotations

import atexit
import functools
import multiprocessing as mp
import os
import traceback
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb

_COMPILE, _TRITON = (pytest.mark.xdist_group(name) for name in ("compile", "triton"))
BACKENDS = [
    "reference",
    "foreach",
    pytest.param("compiled", marks=_COMPILE),
    pytest.param("triton", marks=_TRITON),
]
#: (impl, cls)
KINDS = [
    ("reference", Lamb),
    ("foreach", Lamb),
    pytest.param("compiled", Lamb, marks=_COMPILE),
    pytest.param("triton", Lamb, marks=_TRITON),
    ("foreach", ShardedLamb),
]
MORE_KINDS = [*KINDS, pytest.param("triton", ShardedLamb, marks=_TRITON)]
SHAPES: dict[str, tuple[int, ...]] = {
    "a": (6, 7),
    "b": (9,),
    "c": (3, 5),
    "d": (2, 700),
    "e": (),
    "f": (17,),
}
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "grad_averaging": True,
    "bias_correction": True,
    "decoupled": True,
    "max_grad_norm": None,
    "adapt": "all",
    "trust_clip": None,
    "phi": None,
}
STATES = ("exp_avg", "exp_avg_sq", "master")
TOLERANCE = 2e-5
NAN = float("nan")


# --- the rule ------------------------------------------------------------------------------------


class Plain:
    """LAMB in float64, one named tensor after the other, as shared/LAMB.md has it.

    ``options[name]`` may be changed, and so may every other number that it keeps by name.
    """

    def __init__(self, params: Mapping[str, Tensor], **options: Any) -> None:
        self.x: dict[str, Tensor] = {}
        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.t: dict[str, int] = {}
        self.options: dict[str, dict[str, Any]] = {}
        #: of the last step
        self.grad_norm = 0.0
        self.rho: dict[str, float] = {}
        self.x_norm: dict[str, float] = {}
        self.u_norm: dict[str, float] = {}
        self.g_norm: dict[str, float] = {}
        for name, p in params.items():
            self.add(name, p, **options)

    def add(self, name: str, p: Tensor, **options: Any) -> None:
        self.options[name] = {**DEFAULTS, **options}
        self.start_anew(name, p)

    def start_anew(self, name: str, p: Tensor) -> None:
        self.x[name] = p.detach().double().clone()
        self.m[name] = torch.zeros_like(self.x[name])
        self.v[name] = torch.zeros_like(self.x[name])
        self.t[name] = 0

    def step(self, grads: Mapping[str, Tensor]) -> None:
        for kept in (self.rho, self.x_norm, self.u_norm, self.g_norm):
            kept.update(dict.fromkeys(self.x, NAN))
        self.grad_norm = float(sum(g.double().square().sum() for g in grads.values())) ** 0.5
        for name, grad in grads.items():
            o, g, x = self.options[name], grad.double(), self.x[name]
            self.g_norm[name] = float(g.norm())
            b1, b2 = o["betas"]
            wd = o["weight_decay"]
            if o["max_grad_norm"]:
                g = g * min(1.0, o["max_grad_norm"] / self.grad_norm)
            if not o["decoupled"]:
                g, wd = g + wd * x, 0.0
            t = self.t[name] = self.t[name] + 1
            self.m[name] = b1 * self.m[name] + (1 - b1 if o["grad_averaging"] else 1.0) * g
            self.v[name] = b2 * self.v[name] + (1 - b2) * g * g
            m, v = self.m[name], self.v[name]
            if o["bias_correction"]:
                m, v = m / (1 - b1**t), v / (1 - b2**t)
            u = m / (v.sqrt() + o["eps"]) + wd * x
            lo, hi = o["phi"] or (0.0, float("inf"))
            x_norm, u_norm = float(x.norm()), float(u.norm())
            self.x_norm[name], self.u_norm[name] = x_norm, u_norm
            adapted = o["weight_decay"] != 0 if o["adapt"] == "decayed" else bool(o["adapt"])
            rho = 1.0
            if adapted and x_norm and u_norm:
                rho = min(max(x_norm, lo), hi) / u_norm
                if o["trust_clip"]:
                    rho = min(max(rho, o["trust_clip"][0]), o["trust_clip"][1])
            self.rho[name] = rho
            self.x[name] = x - o["lr"] * rho * u


def half(impl: str) -> torch.dtype:
    """Triton's interpreter cuts float32 off to bfloat16, where a GPU and torch round it."""
    return torch.float16 if impl == "triton" else torch.bfloat16


def dtypes(impl: str) -> tuple[torch.dtype, ...]:
    """The interpreter takes 30 ms a tensor and step: no more than the kind with most state."""
    return (half(impl),) if impl == "triton" else (torch.float32, half(impl))


# --- params and gradients ------------------------------------------------------------------------


def value_of(name: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(shape, generator=generator) * 0.1


def make(
    dtype: torch.dtype = torch.float32, shapes: Mapping[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    return {n: nn.Parameter(value_of(n, shape).to(dtype)) for n, shape in shapes.items()}


def copied(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}


def gradient(name: str, p: Tensor, step: int) -> Tensor:
    """In 64ths below 1: exact in bfloat16, and so are 3 times it and the mean of 3 and -1 times."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1000 + step)
    return (torch.randint(-63, 64, p.shape, generator=generator) / 64).to(p.dtype)


class Holder(nn.Module):
    """A module of these params, under these names."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, p in params.items():
            self.register_parameter(name, p)  # type: ignore[arg-type]


# --- an optimizer beside the rule ----------------------------------------------------------------


def states(opt: Any) -> dict[Tensor, dict[str, Any]]:
    """{param: its whole state}, also of a ShardedLamb; a collective then."""
    every = [p for group in opt.param_groups for p in group["params"]]
    if isinstance(opt, ShardedLamb):
        state = opt.full_optimizer_state_dict()["state"]
        return {p: state.get(i, {}) for i, p in enumerate(every)}
    return {p: opt.state.get(p, {}) for p in every}


def everything(opt: Any, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of params and state, by name."""
    found = {n: p.detach().clone() for n, p in params.items()}
    state = states(opt)
    for n, p in params.items():
        for key, value in state.get(p, {}).items():
            found[f"{n}.{key}"] = torch.as_tensor(value).detach().clone()
    return found


def same_bits(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Also of NaNs."""
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    for name, b in want.items():
        a = got[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), (name, a.dtype, a.shape, b.dtype, b.shape)
        x, y = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
        assert torch.equal(x, y), f"{name} differs: {a.flatten()[:4]} for {b.flatten()[:4]}"


def close(what: str, got: Any, want: Any, tolerance: float = TOLERANCE) -> None:
    """Largest difference relative to the largest value; NaNs where NaNs are wanted."""
    a, b = torch.as_tensor(got).detach().double(), torch.as_tensor(want).detach().double()
    assert a.shape == b.shape, (what, a.shape, b.shape)
    assert torch.equal(a.isnan(), b.isnan()), f"{what}: {a.flatten()[:4]} for {b.flatten()[:4]}"
    a, b = a.nan_to_num(), b.nan_to_num()
    error = float((a - b).abs().max()) if a.numel() else 0.0
    bound = tolerance * (float(b.abs().max()) if b.numel() else 0.0)
    assert error <= bound, f"{what} is off by {error} (bound {bound}): {a.flatten()[:4]}, {b.flatten()[:4]}"  # fmt: skip  # noqa: E501


class Twin:
    """An optimizer and :class:`Plain`, given the same gradients.

    On ranks, each with other gradients that have the intended ones as their mean.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        opt: Any,
        rank: int = 0,
        world: int = 1,
        **options: Any,
    ) -> None:
        self.params = dict(params)
        self.opt = opt
        self.plain = Plain(params, **options)
        self.t = 0
        self._factor = 1 if world == 1 else (3, -1)[rank]

    def set_gradients(self, absent: Iterable[str] = ()) -> dict[str, Tensor]:
        """Sets this rank's, returns the mean."""
        mean = {n: gradient(n, p, self.t) for n, p in self.params.items() if n not in absent}
        for n, p in self.params.items():
            p.grad = mean[n] * self._factor if n in mean else None
        self.t += 1
        return mean

    def step(self, absent: Iterable[str] = (), steps: int = 1) -> None:
        for _ in range(steps):
            mean = self.set_gradients(absent)
            self.opt.step()
            self.opt.zero_grad()
            self.plain.step(mean)

    def check(self, names: Iterable[str] | None = None, tolerance: float = TOLERANCE) -> None:
        """Params, counters, moments and masters are those of the rule."""
        state = states(self.opt)
        for n in self.params if names is None else names:
            p, entry = self.params[n], state[self.params[n]]
            x, t = self.plain.x[n], self.plain.t[n]
            assert float(entry.get("step", 0)) == t, (n, entry.get("step"), t)
            if p.dtype == torch.float32:
                assert "master" not in entry, n
                close(n, p, x, tolerance)
            elif t:
                close(f"{n}.master", entry["master"], x, tolerance)
                assert torch.equal(p, entry["master"].to(p.dtype)), f"{n} is not its master"
            if t:
                close(f"{n}.exp_avg", entry["exp_avg"], self.plain.m[n], tolerance)
                close(f"{n}.exp_avg_sq", entry["exp_avg_sq"], self.plain.v[n], tolerance)

    def follow_masters(self) -> dict[str, Tensor]:
        """What params must start from after an edit: the masters' bits, but where they differ.

        The rule goes on from there too.
        """
        state, starts = states(self.opt), {}
        for n, p in self.params.items():
            master = state[p]["master"]
            assert master.dtype == torch.float32
            edited = p.detach() != master.to(p.dtype)
            starts[n] = torch.where(edited, p.detach().float(), master)
            self.plain.x[n] = starts[n].double()
        return starts


def lamb_twin(
    impl: str,
    dtype: torch.dtype = torch.float32,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    cls: Any = Lamb,
    also: Mapping[str, Any] | None = None,
    **options: Any,
) -> Twin:
    """One group with names; ``also``: options that :class:`Plain` has not."""
    params = make(dtype, shapes)
    options = {"lr": 0.1, "weight_decay": 0.05, **options}
    tracked = {"track_grad_norm": True, **(also or {})}
    opt = cls(list(params.items()), impl=impl, **options, **tracked)
    return Twin(params, opt, **options)


# --- where a test runs ---------------------------------------------------------------------------


def on(impl: str, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(impl, *args)``, for Triton in a process where it interprets.

    Triton decides that when it defines a kernel, once a process. There is one such process for all
    tests of this one.
    """
    if impl == "triton":
        pytest.importorskip("triton")
        return _child()(fn, impl, *args)
    if impl != "compiled":
        return fn(impl, *args)
    import torch._dynamo

    from dist_lamb.kernels import compiled

    # hardly a tensor too small to be compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "SMALL_NUMEL", 16)
        patch.setattr(compiled, "ROW_NUMEL", 8)
        with torch._dynamo.config.patch(recompile_limit=64):
            return fn(impl, *args)


@functools.cache
def _child() -> Callable[..., Any]:
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        process.start()

    def stop() -> None:
        ours.close()
        process.join(5)
        process.kill()

    atexit.register(stop)

    def call(fn: Callable[..., Any], *args: Any) -> Any:
        try:
            ours.send((fn, args))
            if not ours.poll(100):
                raise TimeoutError(f"{fn.__name__}{args} gave no answer")
            ok, result = ours.recv()
        except (EOFError, OSError):  # a wild address; TimeoutError is an OSError too
            process.kill()
            _child.cache_clear()
            raise
        assert ok, result
        return result

    return call


def _serve(pipe: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
