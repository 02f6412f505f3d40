"""What Lamb does with gradients: absent, strided, of another dtype; never written."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from lamb_cases import (
    OPTIONS,
    assert_same,
    bystander,
    everything,
    gradients,
    make_params,
    same_bits,
    train,
)
from torch import Tensor, nn

from dist_lamb import Lamb


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
