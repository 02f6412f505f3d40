"""Lamb as a torch.optim.Optimizer: what trainers, schedulers, scalers and checkpoints rely on."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from test_rule import NumpyLamb, relative_error, to_numpy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dist_lamb import Lamb
from dist_lamb.kernels import compiled
from dist_lamb.options import RULE_DEFAULTS

Params = dict[str, Tensor]

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


@pytest.fixture(
    params=[
        "reference",
        "foreach",
        pytest.param("compiled", marks=pytest.mark.xdist_group("compile")),
    ]
)
def impl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Every backend, with hardly a tensor too small to be compiled."""
    monkeypatch.setattr(compiled, "SMALL_NUMEL", 10)
    monkeypatch.setattr(compiled, "ROW_NUMEL", 5)
    # One process of tests sees more dtypes and sizes than a training does.
    with torch._dynamo.config.patch(recompile_limit=64):
        yield str(request.param)


def make_params(dtype: torch.dtype = torch.float32) -> Params:
    """In multiples of 1/64 below 2: exact in every dtype."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"weight": (6, 5), "bias": (5,), "scale": (), "conv": (2, 3, 2, 2)}
    params: Params = {
        name: nn.Parameter((torch.randint(-127, 128, s, generator=generator) / 64).to(dtype))
        for name, s in shapes.items()
    }
    with torch.no_grad():
        params["bias"].zero_()
        params["weight"][0, 0] = -0.0
    return params


def bystander() -> Tensor:
    """Never has a gradient. With it there are two params, for which the same code is compiled."""
    return nn.Parameter(torch.ones(1))


def gradients(params: Mapping[str, Tensor], step: int) -> Params:
    """In multiples of 1/64 below 2, so that powers of two scale them exactly."""
    generator = torch.Generator().manual_seed(50 + step)
    return {
        name: (torch.randint(-127, 128, p.shape, generator=generator) / 64).to(p.dtype)
        for name, p in params.items()
    }


def train(opt: Optimizer, params: Mapping[str, Tensor], steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        for name, g in gradients(params, step).items():
            params[name].grad = g
        opt.step()
        opt.zero_grad()


def params_of(opt: Optimizer) -> Params:
    return {f"{i}": p for i, p in enumerate(p for g in opt.param_groups for p in g["params"])}


def everything(opt: Optimizer, params: Mapping[str, Tensor] | None = None) -> Params:
    """Copies of the params and of all their state."""
    found: Params = {}
    for name, p in (params_of(opt) if params is None else params).items():
        found[name] = p.detach().clone()
        for key, value in opt.state.get(p, {}).items():
            found[f"{name}.{key}"] = value.clone()
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of NaNs and of the sign of zeros."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    x, y = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(x, y)


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert same_bits(got[name], want[name]), name


def through_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# --- step() --------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [torch.enable_grad, torch.no_grad])
def test_closure_runs_once_with_grad_and_its_loss_is_returned(outer: Callable[[], Any]) -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    opt = Lamb([p], **OPTIONS)
    calls = []

    def closure() -> Tensor:
        opt.zero_grad()
        calls.append(torch.is_grad_enabled())
        loss = (p**2).sum()
        loss.backward()
        return loss

    with outer():
        assert opt.step(closure).item() == 5.0
    assert calls == [True]

    q = nn.Parameter(torch.tensor([1.0, -2.0]))
    q.grad = torch.tensor([2.0, -4.0])
    manual = Lamb([q], **OPTIONS)
    manual.step()
    assert_same(everything(opt), everything(manual))
    assert not torch.equal(p, torch.tensor([1.0, -2.0]))


def test_no_closure_returns_none() -> None:
    params = make_params()
    opt = Lamb(params.values())
    for p in params.values():
        p.grad = torch.ones_like(p)
    assert opt.step() is None
    assert opt.step(closure=None) is None
    assert opt.state[params["weight"]]["step"] == 2


def test_arguments_in_torch_s_order() -> None:
    opt = Lamb(make_params().values(), 0.5, (0.8, 0.9), 1e-4, 0.3)
    (group,) = opt.param_groups
    given = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
    assert given == (0.5, (0.8, 0.9), 1e-4, 0.3)


def test_step_changes_params_in_place() -> None:
    params = make_params()
    versions = {name: p._version for name, p in params.items()}
    pointers = {name: p.data_ptr() for name, p in params.items()}
    train(Lamb(params.values()), params, 1)
    for name, p in params.items():
        assert p.data_ptr() == pointers[name]
        assert p.is_leaf
        assert p.requires_grad
        assert p._version > versions[name]


def test_step_hooks() -> None:
    params = make_params()
    opt = Lamb(params.values())
    seen: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda o, args, kwargs: seen.append(f"{what} {int(o is opt)} {len(o.state)}")

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        opt.register_step_pre_hook(note("pre")),
        opt.register_step_post_hook(note("post")),
    ]
    try:
        train(opt, params, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre 1 0", "pre 1 0", "post 1 4", "global post 1 4"]
    train(opt, params, 1)
    assert len(seen) == 4


def test_the_profiler_sees_the_step() -> None:
    params = make_params()
    opt = Lamb(params.values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(opt, params, 1)
    assert "Optimizer.step#Lamb.step" in {event.name for event in profile.events()}


def test_in_backward() -> None:
    """One optimizer per param, stepped as its gradient arrives."""
    params, expected = make_params(), make_params()
    opts = {p: Lamb([p], **OPTIONS) for p in params.values()}

    def step_now(p: Tensor) -> None:
        opts[p].step()
        opts[p].zero_grad()

    for p in params.values():
        p.register_post_accumulate_grad_hook(step_now)
    sum((p * g).sum() for p, g in zip(params.values(), gradients(params, 0).values())).backward()
    train(Lamb(expected.values(), **OPTIONS), expected, 1)
    assert_same(params, expected)
    assert all(p.grad is None for p in params.values())


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = make_params()
    opt = Lamb(params.values())
    for p in params.values():
        p.grad = torch.ones_like(p)
    opt.zero_grad(set_to_none=set_to_none)
    for p in params.values():
        assert p.grad is None if set_to_none else not p.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_never_written(impl: str, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    groups = [
        {"params": [params["weight"], params["scale"]], "decoupled": False},
        {"params": [params["bias"], params["conv"]], "maximize": True},
    ]
    opt = Lamb(groups, **OPTIONS, impl=impl, max_grad_norm=0.1)
    for step in range(2):
        grads = gradients(params, step)
        for name, p in params.items():
            p.grad = grads[name]
        kept = {name: g.clone() for name, g in grads.items()}
        opt.step()
        assert all(p.grad is grads[name] for name, p in params.items())
        assert_same(grads, kept)


def test_params_without_gradient_are_left_alone(impl: str) -> None:
    params = make_params()
    opt = Lamb(params.values(), impl=impl, **OPTIONS)
    start = everything(opt, params)
    for name in ("weight", "scale"):
        params[name].grad = torch.ones_like(params[name])
    opt.step()
    assert set(opt.state) == {params["weight"], params["scale"]}
    for name in ("bias", "conv"):
        assert same_bits(params[name], start[name])

    train(opt, params, 1)
    before = everything(opt, params)
    params["weight"].grad = torch.ones_like(params["weight"])
    opt.step()
    after = everything(opt, params)
    for key in before:
        assert same_bits(after[key], before[key]) == (not key.startswith("weight")), key
    assert opt.state[params["weight"]]["step"] == 3


def test_a_step_without_any_gradient_does_nothing() -> None:
    params = make_params()
    opt = Lamb(params.values(), max_grad_norm=1.0)
    before = everything(opt, params)
    assert opt.step(lambda: 7.0) == 7.0
    assert not opt.state
    assert_same(everything(opt, params), before)


def test_an_absent_gradient_is_not_part_of_the_global_norm() -> None:
    runs = []
    for names in (("weight",), ("weight", "conv")):
        params = make_params()
        opt = Lamb([params[n] for n in names], **OPTIONS, eps=0.1, max_grad_norm=0.5)
        params["weight"].grad = torch.ones_like(params["weight"])
        opt.step()
        runs.append(params["weight"])
    assert same_bits(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_formats_may_differ(impl: str, dtype: torch.dtype) -> None:
    """Of param and gradient, between steps, and between saving and loading."""
    shape = (4, 3, 5, 2)
    formats = (torch.contiguous_format, torch.channels_last)
    generator = torch.Generator().manual_seed(4)
    start = torch.randn(shape, generator=generator)
    finals = []
    for at_first in formats:
        for of_grad in formats:
            for later in formats:
                p = nn.Parameter(start.clone().to(dtype).to(memory_format=at_first))
                opt = Lamb([p, bystander()], impl=impl, **OPTIONS)
                generator.manual_seed(5)
                for step in range(4):
                    g = torch.randn(shape, generator=generator).to(dtype)
                    p.grad = g.to(memory_format=of_grad)
                    if step == 2:
                        p.data = p.data.to(memory_format=later)
                        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
                    if step == 3:
                        p.data = p.data.to(memory_format=at_first)
                    opt.step()
                assert p.is_contiguous(memory_format=at_first)
                finals.append(everything(opt))
    for final in finals[1:]:
        assert_same(final, finals[0])


def test_expanded_gradient() -> None:
    runs = []
    for g in (torch.ones(()).expand(3, 4), torch.ones(3, 4)):
        p = nn.Parameter(torch.arange(12.0).view(3, 4))
        p.grad = g
        opt = Lamb([p], **OPTIONS)
        opt.step()
        runs.append(everything(opt))
    assert_same(*runs)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_another_dtype(impl: str) -> None:
    """Float32 gradients of bfloat16 params are not rounded to bfloat16, nor the other way."""
    values = torch.tensor([1.0, 0.5, -0.25, 3.0] * 3)
    grad = torch.tensor([1.0 + 2.0**-20, -(2.0**-30), 0.1, 1e-5] * 3)
    p = nn.Parameter(values.bfloat16())
    p.grad_dtype = torch.float32
    p.grad = grad
    q = nn.Parameter(values)
    q.grad = grad
    low, full = (Lamb([t, bystander()], impl=impl, **OPTIONS) for t in (p, q))
    low.step()
    full.step()
    assert same_bits(low.state[p]["exp_avg"], full.state[q]["exp_avg"])
    assert same_bits(low.state[p]["master"], q)

    q = nn.Parameter(values)
    q.grad_dtype = torch.bfloat16
    q.grad = grad.bfloat16()
    opt = Lamb([q, bystander()], impl=impl, betas=(0.5, 0.5))
    opt.step()
    assert same_bits(opt.state[q]["exp_avg"], 0.5 * grad.bfloat16().float())


# --- params --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_half_params_are_rounded_float32_params(impl: str, dtype: torch.dtype) -> None:
    low, full = make_params(dtype), make_params()
    low_opt = Lamb(low.values(), impl=impl, max_grad_norm=1.0, **OPTIONS)
    full_opt = Lamb(full.values(), impl=impl, max_grad_norm=1.0, **OPTIONS)
    for step in range(6):
        train(low_opt, low, 1, step)
        train(full_opt, full, 1, step)
        for name in low:
            state, expected = low_opt.state[low[name]], full_opt.state[full[name]]
            assert same_bits(low[name], full[name].to(dtype))
            assert same_bits(state["master"], full[name])
            assert "master" not in expected
            for key in ("exp_avg", "exp_avg_sq", "step"):
                assert same_bits(state[key], expected[key])
    assert not same_bits(low["weight"].float(), full["weight"])


def test_mixed_dtypes_share_one_clip(impl: str) -> None:
    dtypes = dict(zip(make_params(), (torch.float32, torch.bfloat16, torch.float64, torch.float16)))
    params = {n: nn.Parameter(p.detach().to(dtypes[n])) for n, p in make_params().items()}
    options = {**OPTIONS, "max_grad_norm": 0.25, "eps": 1e-2}
    opt = Lamb(params.items(), impl=impl, **options)
    oracle = NumpyLamb(to_numpy(params), [(list(params), options)])
    for step in range(4):
        train(opt, params, 1, step)
        oracle.step(to_numpy(gradients(params, step)))
    for name, p in params.items():
        value = opt.state[p].get("master", p)
        bound = 1e-13 if p.dtype == torch.float64 else 3e-6
        assert value.dtype == (p.dtype if p.dtype == torch.float64 else torch.float32)
        assert relative_error(value, oracle.x[name]) <= bound
        assert relative_error(opt.state[p]["exp_avg_sq"], oracle.v[name]) <= bound


def test_a_late_starter_has_its_own_bias_correction(impl: str) -> None:
    """Without clipping params do not see each other: as if it had an optimizer of its own."""
    params, alone = make_params(), make_params()["weight"]
    opt = Lamb(params.values(), impl=impl, **OPTIONS)
    own = Lamb([alone, bystander()], impl=impl, **OPTIONS)
    for step in range(5):
        for name, g in gradients(params, step).items():
            params[name].grad = None if name == "weight" and step < 3 else g
        opt.step()
        if step >= 3:
            alone.grad = gradients(params, step)["weight"]
            own.step()
    assert opt.state[params["weight"]]["step"] == 2
    assert opt.state[params["conv"]]["step"] == 5
    assert same_bits(params["weight"], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_params_with_gaps(impl: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    base = torch.randn(7, 10, generator=generator).to(dtype)
    kept = base.clone()
    p, whole = nn.Parameter(base[1:6, ::3]), nn.Parameter(base[1:6, ::3].clone())
    opts = [Lamb([t, bystander()], impl=impl, max_grad_norm=1, **OPTIONS) for t in (p, whole)]
    for _ in range(3):
        g = torch.randn(p.shape, generator=generator).to(dtype)
        for t, opt in zip((p, whole), opts):
            t.grad = g.clone()
            opt.step()
    assert_same(everything(opts[0]), everything(opts[1]))
    assert same_bits(base[1:6, ::3], p)
    assert not torch.equal(p, kept[1:6, ::3])
    rest = torch.ones_like(base, dtype=torch.bool)
    rest[1:6, ::3] = False
    assert same_bits(base[rest], kept[rest])


def test_a_tied_param_is_stepped_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    alone = nn.Parameter(model[0].weight.detach().clone())
    opt, own = Lamb(model.parameters(), **OPTIONS), Lamb([alone], **OPTIONS)
    model[0].weight.grad = alone.grad = torch.ones(3, 3)
    opt.step()
    own.step()
    assert_same(everything(opt), everything(own))


def test_dropping_state_starts_a_param_anew() -> None:
    """As after writing new values into a half-precision param: also its step starts again."""
    params = make_params(torch.bfloat16)
    opt = Lamb(params.values(), **OPTIONS)
    train(opt, params, 3)
    fresh = nn.Parameter(params["weight"].detach().clone())
    del opt.state[params["weight"]]
    own = Lamb([fresh], **OPTIONS)
    fresh.grad = gradients(params, 3)["weight"]
    own.step()
    train(opt, params, 1, 3)
    assert opt.state[params["weight"]]["step"] == 1
    assert opt.state[params["conv"]]["step"] == 4
    assert same_bits(params["weight"], fresh)


def test_state_that_was_moved_away_and_back(impl: str) -> None:
    """As those do who need a GPU's memory for something else between two steps."""
    params, undisturbed = make_params(torch.bfloat16), make_params(torch.bfloat16)
    opts = [Lamb(p.values(), impl=impl, **OPTIONS) for p in (params, undisturbed)]
    for opt, own in zip(opts, (params, undisturbed)):
        train(opt, own, 2)
    for entry in opts[0].state.values():
        for name, value in entry.items():
            entry[name] = value.to("cpu", copy=True)
    for opt, own in zip(opts, (params, undisturbed)):
        train(opt, own, 2, 2)
    assert_same(everything(opts[0]), everything(opts[1]))
    assert opts[0].state[params["weight"]]["step"] == 4
    opts[0].state[params["weight"]]["step"] = torch.tensor(1.0)
    train(opts[0], params, 1, 4)
    assert opts[0].state[params["weight"]]["step"] == 2
    assert opts[0].state[params["conv"]]["step"] == 5


def test_the_number_of_threads_leaves_no_trace(impl: str) -> None:
    """Of sums that are long enough to be shared out among threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            generator = torch.Generator().manual_seed(4)
            params: Params = {
                name: nn.Parameter(torch.randn(shape, generator=generator))
                for name, shape in {"long": (300_001,), "wide": (50, 1000)}.items()
            }
            opt = Lamb(params.values(), impl=impl, max_grad_norm=1.0, **OPTIONS)
            train(opt, params, 3)
            found.append(everything(opt))
    finally:
        torch.set_num_threads(before)
    assert_same(*found)


# --- groups and options --------------------------------------------------------------------------


def test_names() -> None:
    params = make_params()
    named = Lamb([{"params": list(params.items())[:2]}, {"params": list(params.items())[2:]}])
    plain = Lamb(params.values())
    train(named, params, 1)
    assert list(named.trust_ratios()) == list(params)
    assert [g["param_names"] for g in named.state_dict()["param_groups"]] == [
        ["weight", "bias"],
        ["scale", "conv"],
    ]
    train(plain, params, 1)
    assert list(plain.trust_ratios()) == [f"param_{i}" for i in range(4)]
    assert "param_names" not in plain.param_groups[0]


def test_named_and_plain_load_each_other_s_state() -> None:
    finals = []
    for first_named in (True, False):
        for then_named in (True, False):
            params = make_params()
            first = Lamb(params.items() if first_named else params.values(), **OPTIONS)
            train(first, params, 2)
            then = Lamb(params.items() if then_named else params.values())
            then.load_state_dict(first.state_dict())
            # torch keeps the loaded names where there are none of its own
            assert ("param_names" in then.param_groups[0]) == (first_named or then_named)
            train(then, params, 2, 2)
            finals.append(everything(then, params))
    for final in finals[1:]:
        assert_same(final, finals[0])


@pytest.mark.parametrize("steps_before", [0, 2])
def test_add_param_group(impl: str, steps_before: int) -> None:
    """Without clipping, the same as an optimizer for each group."""
    params, alone = make_params(), make_params()
    opt = Lamb([params["weight"], params["conv"]], impl=impl, **OPTIONS)
    first = Lamb([alone["weight"], alone["conv"]], impl=impl, **OPTIONS)
    second = Lamb([alone["bias"]], impl=impl, **{**OPTIONS, "weight_decay": 0.0}, adapt=False)
    train(opt, {n: params[n] for n in ("weight", "conv")}, steps_before)
    train(first, {n: alone[n] for n in ("weight", "conv")}, steps_before)
    opt.add_param_group({"params": [params["bias"]], "weight_decay": 0.0, "adapt": False})
    assert opt.param_groups[1]["lr"] == OPTIONS["lr"]
    for step in range(2, 5):
        grads = gradients(params, step)
        for name in ("weight", "conv", "bias"):
            params[name].grad = grads[name]
            alone[name].grad = grads[name].clone()
        for o in (opt, first, second):
            o.step()
    assert opt.state[params["bias"]]["step"] == 3
    matrices = {name: alone[name] for name in ("weight", "conv")}
    want = {**everything(first, matrices), **everything(second, {"bias": alone["bias"]})}
    assert_same(everything(opt, {n: params[n] for n in ("weight", "conv", "bias")}), want)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"lr": -1.0}, ValueError),
        ({"betas": (0.9, 1.0)}, ValueError),
        ({"adapt": "some"}, ValueError),
        ({"params": [torch.zeros(3, dtype=torch.int32)]}, TypeError),
        ({"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]}, TypeError),
        ({"params": [nn.Parameter(torch.zeros(3)), torch.zeros(3, dtype=torch.int64)]}, TypeError),
        ({"params": ["weight"]}, TypeError),
        ({"params": [nn.Parameter(torch.zeros(2)) * 2]}, ValueError),
        ({"params": "mine"}, ValueError),
    ],
)
def test_a_refused_group_leaves_no_trace(bad: dict[str, Any], error: type[Exception]) -> None:
    params, other = make_params(), make_params()
    opt, undisturbed = Lamb(params.values(), **OPTIONS), Lamb(other.values(), **OPTIONS)
    for o, own in ((opt, params), (undisturbed, other)):
        train(o, own, 1)
    group = {"params": [nn.Parameter(torch.zeros(3))], **bad}
    if group["params"] == "mine":
        group["params"] = [params["bias"]]
    with pytest.raises(error):
        opt.add_param_group(group)
    assert len(opt.param_groups) == 1
    assert opt.state_dict()["param_groups"] == undisturbed.state_dict()["param_groups"]
    for o, own in ((opt, params), (undisturbed, other)):
        train(o, own, 1, 1)
    assert_same(everything(opt, params), everything(undisturbed, other))


def test_options_may_change_between_steps(impl: str) -> None:
    params = make_params(torch.float64)
    opt = Lamb(params.items(), impl=impl, **OPTIONS)
    oracle = NumpyLamb(to_numpy(params), [(list(params), OPTIONS)])
    changes: list[dict[str, Any]] = [
        {"weight_decay": 0.5},
        {"lr": 0.3},
        {"max_grad_norm": 0.1, "eps": 0.5},
        {"adapt": False},
        {"betas": (0.5, 0.6), "maximize": True},
        {"decoupled": False, "trust_clip": (0.0, 0.1), "adapt": True},
    ]
    for step, change in enumerate(changes):
        opt.param_groups[0].update(change)
        for options in oracle.options.values():
            options.update(change)
        train(opt, params, 1, step)
        oracle.step(to_numpy(gradients(params, step)))
        for name, p in params.items():
            assert relative_error(p, oracle.x[name]) <= 1e-13


def test_maximize_is_minimizing_the_negative(impl: str) -> None:
    up, down = make_params(), make_params()
    ascending = Lamb(up.values(), impl=impl, maximize=True, max_grad_norm=1.0, **OPTIONS)
    descending = Lamb(down.values(), impl=impl, max_grad_norm=1.0, **OPTIONS)
    for step in range(3):
        for name, g in gradients(up, step).items():
            up[name].grad, down[name].grad = g, -g
        ascending.step()
        descending.step()
    for name in up:
        assert same_bits(up[name], down[name])


def test_torch_s_flags() -> None:
    params = list(make_params().values())
    assert Lamb(params, foreach=True).impl == "foreach"
    assert Lamb(params, foreach=False).impl == "auto"
    assert Lamb(params, fused=True).impl == "auto"
    assert Lamb(params, foreach=False, fused=False, impl="reference").impl == "reference"
    for flags in ({"foreach": True}, {"fused": True}, {"capturable": True}):
        opt = Lamb(params, **flags)  # type: ignore[arg-type]
        for p in params:
            p.grad = torch.ones_like(p)
        before = params[0].detach().clone()
        opt.step()
        assert not torch.equal(params[0], before)
        assert opt.param_groups[0].items() >= flags.items()
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        Lamb(params, foreach=True, fused=True)


def test_trust_ratios(impl: str) -> None:
    params = make_params(torch.float64)
    opt = Lamb(params.items(), impl=impl, betas=(0.0, 0.0), eps=0.0, weight_decay=0.5, lr=0.1)
    assert opt.trust_ratios() == {}
    before = {n: p.detach().clone() for n, p in params.items()}
    for name in ("weight", "bias", "scale"):
        params[name].grad = torch.full_like(params[name], 3.0)
    opt.step()
    ratios = opt.trust_ratios()
    assert all(r.dtype == torch.float32 and r.shape == () for r in ratios.values())
    for name in ("weight", "scale"):
        u = 1.0 + 0.5 * before[name]
        torch.testing.assert_close(ratios[name], (before[name].norm() / u.norm()).float())
    assert ratios["bias"] == 1.0
    assert ratios["conv"].isnan()
    params["conv"].grad = torch.ones_like(params["conv"])
    opt.zero_grad()
    params["conv"].grad = torch.ones_like(params["conv"])
    opt.step()
    assert {n for n, r in opt.trust_ratios().items() if not r.isnan()} == {"conv"}


# --- learning rates ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr(impl: str, shape: tuple[int, ...]) -> None:
    params, other = make_params(), make_params()
    lr = torch.full(shape, 0.25)
    opt = Lamb(params.values(), lr=lr, impl=impl)
    number = Lamb(other.values(), lr=0.25, impl=impl)
    train(opt, params, 2)
    train(number, other, 2)
    assert opt.param_groups[0]["lr"] is lr
    assert_same(everything(opt, params), everything(number, other))
    lr.fill_(0.5)
    number.param_groups[0]["lr"] = 0.5
    train(opt, params, 1, 2)
    train(number, other, 1, 2)
    assert_same(everything(opt, params), everything(number, other))


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_numpy_numbers(kind: Callable[[float], Any]) -> None:
    """As from np.linspace over learning rates; torch's optimizers take them."""
    params, other = make_params(), make_params()
    train(Lamb(params.values(), lr=kind(0.25), weight_decay=kind(0.5)), params, 2)
    train(Lamb(other.values(), lr=0.25, weight_decay=0.5), other, 2)
    assert_same(params, other)


def test_tensor_lr_of_one_group_of_two() -> None:
    params, other = make_params(), make_params()

    def groups(of: Params, lr: Any) -> list[dict[str, Any]]:
        return [
            {"params": [of["weight"], of["bias"]], "lr": 0.25},
            {"params": [of["scale"], of["conv"]], "lr": lr},
        ]

    train(Lamb(groups(params, torch.tensor(0.125))), params, 3)
    train(Lamb(groups(other, 0.125)), other, 3)
    assert_same(params, other)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: (n + 1) / 4),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda n: 0.7),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], gamma=0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "WarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=7),
    "Sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        milestones=[3],
    ),
    "Chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.5),
}


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tensor_lr: bool) -> None:
    """Against a float64 replay with the lr (and betas) that torch's AdamW is given."""
    params = make_params()
    start = torch.tensor(0.1) if tensor_lr else 0.1
    opt = Lamb(params.items(), lr=start, weight_decay=0.1)
    witness = AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler, expected = SCHEDULERS[name](opt), SCHEDULERS[name](witness)
    oracle = NumpyLamb(to_numpy(params), [(list(params), {"weight_decay": 0.1})])
    lrs = []
    for step in range(6):
        lrs.append(witness.param_groups[0]["lr"])
        for options in oracle.options.values():
            options.update(lr=lrs[-1], betas=witness.param_groups[0]["betas"])
        train(opt, params, 1, step)
        oracle.step(to_numpy(gradients(params, step)))
        witness.step()
        for s in (scheduler, expected):
            s.step(*((1.0,) if name == "ReduceLROnPlateau" else ()))
    assert len(set(lrs)) > 1
    if tensor_lr:
        assert opt.param_groups[0]["lr"] is start
    for key, p in params.items():
        assert relative_error(p, oracle.x[key]) <= 1e-5


# --- state dict ----------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_resuming_from_a_file_continues_with_the_same_bits(dtype: torch.dtype, named: bool) -> None:
    params = make_params(dtype)
    opt = Lamb(params.items() if named else params.values(), max_grad_norm=1.0, **OPTIONS)
    train(opt, params, 3)
    saved = through_file(opt.state_dict())
    resumed = {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}
    after = Lamb(resumed.items() if named else resumed.values(), lr=9.0)
    after.load_state_dict(state_dict=saved)
    assert_same(everything(after, resumed), everything(opt, params))
    train(opt, params, 3, 3)
    train(after, resumed, 3, 3)
    assert_same(everything(after, resumed), everything(opt, params))


def test_state_dict_holds_plain_tensors_by_position() -> None:
    params = make_params(torch.bfloat16)
    opt = Lamb(params.values())
    train(opt, params, 2)
    saved = opt.state_dict()
    assert sorted(saved) == ["param_groups", "state"]
    assert saved["param_groups"][0]["params"] == [0, 1, 2, 3]
    for i, p in enumerate(params.values()):
        entry = saved["state"][i]
        assert sorted(entry) == ["exp_avg", "exp_avg_sq", "master", "step"]
        assert all(type(value) is Tensor for value in entry.values())
        assert entry["step"].shape == ()
        assert entry["step"].dtype == torch.float32
        for key in ("exp_avg", "exp_avg_sq", "master"):
            assert entry[key].shape == p.shape
            assert entry[key].dtype == torch.float32
    assert set(RULE_DEFAULTS) <= set(saved["param_groups"][0])


@pytest.mark.parametrize("dtype", HALF)
def test_loading_keeps_float32_state_of_half_params(dtype: torch.dtype) -> None:
    params = make_params(dtype)
    opt = Lamb(params.values(), **OPTIONS)
    train(opt, params, 3)
    rounded = opt.state[params["weight"]]["exp_avg"].to(dtype).float()
    assert not torch.equal(rounded, opt.state[params["weight"]]["exp_avg"])
    fresh = make_params(dtype)
    other = Lamb(fresh.values())
    other.load_state_dict(opt.state_dict())
    for p, q in zip(params.values(), fresh.values()):
        assert_same(other.state[q], opt.state[p])


def test_loading_copies() -> None:
    params = make_params(torch.bfloat16)
    opt = Lamb(params.values(), **OPTIONS)
    train(opt, params, 2)
    saved = copy.deepcopy(opt.state_dict())
    kept = copy.deepcopy(saved)
    fresh, control = make_params(torch.bfloat16), make_params(torch.bfloat16)
    other, undisturbed = Lamb(fresh.values()), Lamb(control.values())
    other.load_state_dict(saved)
    undisturbed.load_state_dict(copy.deepcopy(kept))
    train(other, fresh, 2)
    for i, entry in kept["state"].items():
        assert_same(saved["state"][i], entry)
    assert saved["param_groups"] == kept["param_groups"]

    other.load_state_dict(saved)
    for entry in saved["state"].values():
        for value in entry.values():
            value.fill_(7.0)
    saved["param_groups"][0]["lr"] = 7.0
    fresh2 = make_params(torch.bfloat16)
    with torch.no_grad():
        for name, p in fresh.items():
            p.copy_(fresh2[name])
    train(other, fresh, 2)
    train(undisturbed, control, 2)
    assert_same(everything(other, fresh), everything(undisturbed, control))


def test_loading_before_the_first_step() -> None:
    """Accelerate's prepare() passes an empty state through."""
    params, other = make_params(), make_params()
    opt, undisturbed = Lamb(params.values(), **OPTIONS), Lamb(other.values(), **OPTIONS)
    opt.load_state_dict(opt.state_dict())
    assert not opt.state
    train(opt, params, 2)
    train(undisturbed, other, 2)
    assert_same(everything(opt, params), everything(undisturbed, other))


def test_state_dict_hooks_run() -> None:
    params = make_params()
    opt = Lamb(params.values(), **OPTIONS)
    train(opt, params, 2)
    seen: list[str] = []

    def saving(o: Optimizer) -> None:
        seen.append("saving")

    def saved(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("saved")
        return {**state_dict, "mine": 1}

    def loading(o: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("loading")
        state = {
            i: {**e, "exp_avg": e["exp_avg"] * 2, "step": e["step"] + 10}
            for i, e in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    def loaded(o: Optimizer) -> None:
        seen.append(f"loaded {float(o.state[params['bias']]['exp_avg_sq'].sum() > 0):.0f}")

    opt.register_state_dict_pre_hook(saving)
    opt.register_state_dict_post_hook(saved)
    opt.register_load_state_dict_pre_hook(loading)
    opt.register_load_state_dict_post_hook(loaded)
    state_dict = opt.state_dict()
    assert state_dict["mine"] == 1
    before = {n: opt.state[p]["exp_avg"].clone() for n, p in params.items()}
    opt.load_state_dict(state_dict)
    assert seen == ["saving", "saved", "loading", "loaded 1"]
    for name, p in params.items():
        assert same_bits(opt.state[p]["exp_avg"], before[name] * 2)
        assert opt.state[p]["step"] == 12
    opt.load_state_dict(state_dict)
    assert seen[4:] == ["loading", "loaded 1"]


@pytest.mark.parametrize("kind", [int, float, np.float32, torch.tensor])
def test_steps_that_are_no_tensors(kind: Callable[[int], Any]) -> None:
    params, other = make_params(), make_params()
    opt, undisturbed = Lamb(params.values(), **OPTIONS), Lamb(other.values(), **OPTIONS)
    train(opt, params, 3)
    train(undisturbed, other, 3)
    saved = copy.deepcopy(opt.state_dict())
    for entry in saved["state"].values():
        entry["step"] = kind(3)
    opt.load_state_dict(saved)
    train(opt, params, 2, 3)
    train(undisturbed, other, 2, 3)
    assert_same(everything(opt, params), everything(undisturbed, other))


def test_older_state_dicts_lack_newer_options() -> None:
    """As torch.optim does, a missing option takes the default it has in the class."""
    old_keys = ("params", "lr", "betas", "eps", "weight_decay")
    params, other = make_params(), make_params()
    opt, undisturbed = Lamb(params.values(), **OPTIONS), Lamb(other.values(), **OPTIONS)
    train(opt, params, 2)
    train(undisturbed, other, 2)
    saved = opt.state_dict()
    saved["param_groups"] = [{k: g[k] for k in old_keys} for g in saved["param_groups"]]
    opt.load_state_dict(saved)
    assert opt.state_dict()["param_groups"] == undisturbed.state_dict()["param_groups"]
    train(opt, params, 2, 2)
    train(undisturbed, other, 2, 2)
    assert_same(everything(opt, params), everything(undisturbed, other))


def test_adam_s_state_can_be_loaded() -> None:
    params = make_params()
    adam = AdamW(params.values(), lr=0.01)
    train(adam, params, 2)
    opt = Lamb(params.values())
    opt.load_state_dict(adam.state_dict())
    for p in params.values():
        assert same_bits(opt.state[p]["exp_avg"], adam.state[p]["exp_avg"])
    train(opt, params, 1)
    assert opt.state[params["weight"]]["step"] == 3


def test_float32_state_into_half_params_and_back() -> None:
    full = make_params()
    opt = Lamb(full.values(), **OPTIONS)
    train(opt, full, 2)
    half = {n: nn.Parameter(p.detach().bfloat16()) for n, p in full.items()}
    low = Lamb(half.values())
    low.load_state_dict(opt.state_dict())
    train(low, half, 1, 2)
    p = half["weight"]
    assert same_bits(p, low.state[p]["master"].bfloat16())
    again = {n: nn.Parameter(p.detach().float()) for n, p in half.items()}
    back = Lamb(again.values())
    back.load_state_dict(copy.deepcopy(low.state_dict()))
    train(low, half, 2, 3)
    train(back, again, 2, 3)
    for name in half:
        assert same_bits(half[name], again[name].bfloat16())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda s: s["state"][0].update(exp_avg=torch.zeros(2, 2)), "exp_avg of weight has shape"),
        (lambda s: s["state"][3].update(exp_avg_sq=torch.zeros(())), "exp_avg_sq of conv has"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "Invalid learning rate: -1.0"),
        (lambda s: s["param_groups"][0].update(adapt="some"), "Invalid adapt value: 'some'"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "parameter groups"),
        (lambda s: s["param_groups"][0]["params"].append(4), "size of optimizer's group"),
    ],
)
def test_a_refused_state_dict_leaves_no_trace(
    break_it: Callable[[dict[str, Any]], None], message: str
) -> None:
    params = make_params()
    opt = Lamb(params.items(), **OPTIONS)
    train(opt, params, 2)
    saved = copy.deepcopy(opt.state_dict())
    before, groups = everything(opt, params), copy.deepcopy(saved["param_groups"])
    break_it(saved)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    assert_same(everything(opt, params), before)
    assert opt.state_dict()["param_groups"] == groups
    opt.load_state_dict(opt.state_dict())


# --- copies --------------------------------------------------------------------------------------


def by_pickle(opt: Lamb) -> Lamb:
    restored: Lamb = pickle.loads(pickle.dumps(opt))
    return restored


def by_old_pickle(opt: Lamb) -> Lamb:
    """Of a version that knew neither ``impl`` nor the newer options."""
    state = copy.deepcopy(opt.__getstate__())
    old = {k: state[k] for k in ("defaults", "state", "param_groups")}
    for group in old["param_groups"]:
        for name in ("phi", "trust_clip", "adapt", "fused"):
            del group[name]
    restored = Lamb([nn.Parameter(torch.zeros(1))], impl=opt.impl)
    restored.__setstate__(old)
    return restored


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_old_pickle])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_copies_continue_alone(
    duplicate: Callable[[Lamb], Lamb], dtype: torch.dtype, steps_before: int
) -> None:
    params = make_params(dtype)
    opt = Lamb(params.values(), impl="reference", **OPTIONS)
    train(opt, params, steps_before)
    other = duplicate(opt)
    assert other.impl == "reference"
    assert_same(everything(other), everything(opt))
    before = everything(opt)
    train(other, params_of(other), 2, steps_before)
    assert_same(everything(opt), before)
    train(opt, params_of(opt), 2, steps_before)
    assert_same(everything(other), everything(opt))
    assert opt.trust_ratios() == other.trust_ratios()


def test_a_pickled_optimizer_still_unscales_by_itself() -> None:
    """Otherwise a GradScaler writes into the gradients, and decides on the host about step()."""
    opt = by_pickle(Lamb(make_params().values(), **OPTIONS))
    expected = make_params()
    train(Lamb(expected.values(), **OPTIONS), expected, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    params = params_of(opt)
    for p, g in zip(params.values(), gradients(expected, 0).values()):
        p.grad = 2 * g
    scaler.step(opt)
    for p, g, q in zip(params.values(), gradients(expected, 0).values(), expected.values()):
        assert p.grad is not None
        assert same_bits(p.grad, 2 * g)
        assert same_bits(p, q)


# --- loss scaling --------------------------------------------------------------------------------


def scaled_run(
    impl: str,
    dtype: torch.dtype,
    scaler: torch.amp.GradScaler | None,
    unscale_first: bool,
    overflow_at: tuple[int, ...] = (),
    **options: Any,
) -> Iterator[tuple[Lamb, Params]]:
    """(optimizer, params) after every step; an overflow is an extra step with a bad gradient."""
    params = make_params(dtype)
    opt = Lamb(params.items(), impl=impl, **{**OPTIONS, **options})
    for step in range(3):
        for bad in (True, False) if step in overflow_at else (False,):
            if bad and scaler is None:
                continue
            # scale() is where a scaler makes its scale.
            scale = 1.0 if scaler is None else float(scaler.scale(torch.ones(())))
            for name, g in gradients(params, step).items():
                params[name].grad = g * scale
            if bad:
                params["conv"].grad.view(-1)[3] = float("inf") if step else float("nan")
            if scaler is None:
                opt.step()
            else:
                if unscale_first:
                    scaler.unscale_(opt)
                scaler.step(opt)
                scaler.update()
            yield opt, params


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_leaves_no_trace(
    impl: str, unscale_first: bool, max_grad_norm: float | None
) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    clip = {"max_grad_norm": max_grad_norm, "eps": 0.01}
    scaled = scaled_run(impl, torch.float32, scaler, unscale_first, **clip)
    plain = scaled_run(impl, torch.float32, None, False, **clip)
    for (opt, params), (expected, others) in zip(scaled, plain, strict=True):
        assert_same(everything(opt, params), everything(expected, others))
    assert not hasattr(opt, "grad_scale")
    assert not hasattr(opt, "found_inf")


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_overflow_skips_the_step(
    impl: str, unscale_first: bool, max_grad_norm: float | None
) -> None:
    """At the first step (a NaN) and later (an infinity), whatever the option."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    clip = {"max_grad_norm": max_grad_norm, "decoupled": False}
    scaled = scaled_run(impl, torch.float32, scaler, unscale_first, (0, 2), **clip)
    plain = scaled_run(impl, torch.float32, None, False, **clip)
    start = make_params()
    opt, params = next(scaled)
    assert scaler.get_scale() == 512.0
    assert_same(params, start)
    for state in opt.state.values():
        assert not any(value.any() for value in state.values())
    assert all(r.isnan() for r in opt.trust_ratios().values())
    for overflows in (False, False, True, False):
        if not overflows:
            wanted, others = next(plain)
        next(scaled)
        assert_same(everything(opt, params), everything(wanted, others))
    assert scaler.get_scale() == 256.0
    assert opt.state[params["conv"]]["step"] == 3
    assert next(scaled, None) is None


@pytest.mark.parametrize("decoupled", [True, False])
def test_overflow_while_lr_is_zero(impl: str, decoupled: bool) -> None:
    """What is not counted there may have a history, which must stay."""
    params = make_params()
    opt = Lamb(params.values(), impl=impl, decoupled=decoupled, **OPTIONS)
    train(opt, params, 2)
    before = everything(opt, params)
    opt.param_groups[0]["lr"] = 0.0
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for p in params.values():
        p.grad = torch.full_like(p, float("inf"))
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same(everything(opt, params), before)


@pytest.mark.parametrize("dtype", HALF)
def test_grad_scaler_with_half_params(impl: str, dtype: torch.dtype) -> None:
    """torch refuses unscale_() of float16 gradients; step() unscales them in float32."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    scaled = scaled_run(impl, dtype, scaler, False, (1,), max_grad_norm=0.5)
    plain = scaled_run(impl, dtype, None, False, max_grad_norm=0.5)
    latest = next(scaled)
    assert_same(everything(*latest), everything(*next(plain)))
    before = everything(*latest)
    assert_same(everything(*next(scaled)), before)
    for latest, expected in zip(scaled, plain, strict=True):
        assert_same(everything(*latest), everything(*expected))
    assert scaler.get_scale() == 128.0


# --- a step that must leave no trace -------------------------------------------------------------


def dummy_step(opt: Lamb, params: Params) -> None:
    """What torch.distributed.checkpoint.state_dict does to an optimizer without state."""
    lrs = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], Tensor) else 0.0
    for p in params.values():
        p.grad = torch.zeros_like(p)
    opt.step(closure=None)
    for group, lr in zip(opt.param_groups, lrs):
        group["lr"] = lr
    opt.zero_grad()


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"decoupled": False},
        {"maximize": True},
        {"adapt": False},
        {"eps": 0.0},
        {"weight_decay": 0.0},
    ],
    ids=str,
)
def test_dummy_step(
    impl: str, options: dict[str, Any], dtype: torch.dtype, tensor_lr: bool
) -> None:
    params, other = make_params(dtype), make_params(dtype)
    lr = torch.tensor(0.25) if tensor_lr else 0.25
    options = {"weight_decay": 0.1, **options}
    opt, fresh = (Lamb(ps.values(), lr=lr, impl=impl, **options) for ps in (params, other))
    start = {n: p.detach().clone() for n, p in params.items()}
    dummy_step(opt, params)
    assert_same(params, start)
    for p in params.values():
        assert opt.state[p]["step"] == 0
        assert not opt.state[p]["exp_avg"].any()
        assert not opt.state[p]["exp_avg_sq"].any()
    train(opt, params, 2)
    train(fresh, other, 2)
    assert_same(everything(opt, params), everything(fresh, other))


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_warm_up_from_lr_zero_counts(impl: str, lr: float | Tensor) -> None:
    params = make_params(torch.float64)
    opt = Lamb(params.items(), lr=lr, impl=impl, weight_decay=0.1)
    oracle = NumpyLamb(to_numpy(params), [(list(params), {"weight_decay": 0.1})])
    for step, rate in enumerate((0.0, 0.1, 0.2)):
        opt.param_groups[0]["lr"] = torch.tensor(rate).double() if step else lr
        for options in oracle.options.values():
            options["lr"] = float(torch.tensor(rate))
        train(opt, params, 1, step)
        oracle.step(to_numpy(gradients(params, step)))
        for name, p in params.items():
            assert opt.state[p]["step"] == step + 1
            assert relative_error(p, oracle.x[name]) <= 1e-13


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_lr_zero_and_zero_gradients_count_once_there_is_a_history(
    impl: str, beta1: float, decoupled: bool
) -> None:
    """Only a param whose moments are all zero has not begun; with beta1 = 0, v alone tells."""
    params = make_params(torch.float64)
    options = {"betas": (beta1, 0.9), "weight_decay": 0.1, "decoupled": decoupled, "lr": 0.1}
    opt = Lamb(params.items(), impl=impl, **options)
    oracle = NumpyLamb(to_numpy(params), [(list(params), options)])
    for step, rate in enumerate((0.1, 0.0, 0.1)):
        grads = {n: g * (rate > 0) for n, g in gradients(params, step).items()}
        for name, p in params.items():
            oracle.options[name]["lr"] = opt.param_groups[0]["lr"] = rate
            p.grad = grads[name]
        opt.step()
        oracle.step(to_numpy(grads))
        for name, p in params.items():
            assert opt.state[p]["step"] == step + 1
            assert relative_error(p, oracle.x[name]) <= 1e-13
            assert relative_error(opt.state[p]["exp_avg_sq"], oracle.v[name]) <= 1e-13


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        nn.init.zeros_(self.fc.bias)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.norm(self.fc(self.emb(ids)))
        return out


def train_net(model: Net, opt: Lamb, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        ids = torch.arange(5) + step % 3
        opt.zero_grad()
        model(ids).float().square().mean(dim=0).mul(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_distributed_checkpoint(
    tmp_path: Path, dtype: torch.dtype, flat: bool, tensor_lr: bool
) -> None:
    """Save and load through torch's own helpers, which step a fresh optimizer once."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def fresh(seed: int) -> tuple[Net, Lamb]:
        torch.manual_seed(seed)
        model = Net().to(dtype)
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        return model, Lamb(model.parameters(), lr=lr, weight_decay=0.1)

    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = fresh(0)
    untouched, before = fresh(0)
    get_optimizer_state_dict(model, opt, options=how)
    assert_same(dict(model.named_parameters()), dict(untouched.named_parameters()))
    assert all(state["step"] == 0 for state in opt.state.values())
    train_net(model, opt, 3)
    train_net(untouched, before, 3)
    assert_same(everything(opt), everything(before))

    saved = {"optim": get_optimizer_state_dict(model, opt, options=how)}
    dcp.save(saved, checkpoint_id=tmp_path / "at3")
    resumed, after = fresh(1)
    resumed.load_state_dict(model.state_dict())
    target = {"optim": get_optimizer_state_dict(resumed, after, options=how)}
    dcp.load(target, checkpoint_id=tmp_path / "at3")
    set_optimizer_state_dict(resumed, after, target["optim"], options=how)
    assert_same(everything(after), everything(opt))
    train_net(model, opt, 2, 3)
    train_net(resumed, after, 2, 3)
    assert_same(everything(after), everything(opt))
