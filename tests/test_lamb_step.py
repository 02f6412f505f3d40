"""Lamb.step() as torch.optim.Optimizer has it: closures, hooks, in place, the profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from lamb_cases import OPTIONS, assert_same, everything, gradients, make_params, train
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dist_lamb import Lamb


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
