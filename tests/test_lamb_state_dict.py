"""The state of Lamb: saved, loaded, copied and pickled."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from lamb_cases import (
    DTYPES,
    HALF,
    OPTIONS,
    assert_same,
    everything,
    gradients,
    make_params,
    params_of,
    same_bits,
    through_file,
    train,
)
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from dist_lamb import Lamb
from dist_lamb.options import RULE_DEFAULTS

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
