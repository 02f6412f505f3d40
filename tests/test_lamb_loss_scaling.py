"""Lamb under torch.amp.GradScaler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from lamb_cases import HALF, OPTIONS, Params, assert_same, everything, gradients, make_params, train

from dist_lamb import Lamb


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
