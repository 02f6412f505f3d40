"""Parameter groups of Lamb, their options, names and trust ratios."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from lamb_cases import OPTIONS, assert_same, everything, gradients, make_params, same_bits, train
from numpy_lamb import NumpyLamb, relative_error, to_numpy
from torch import nn

from dist_lamb import Lamb


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
