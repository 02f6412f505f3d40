"""The params that Lamb takes: half precision, gaps, ties, state that was moved or dropped."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from lamb_cases import (
    DTYPES,
    HALF,
    OPTIONS,
    Params,
    assert_same,
    bystander,
    everything,
    gradients,
    make_params,
    same_bits,
    train,
)
from numpy_lamb import NumpyLamb, relative_error, to_numpy
from torch import nn

from dist_lamb import Lamb


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
