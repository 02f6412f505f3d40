"""Half-precision params that are written between steps, and their masters in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from edit_cases import (
    BACKENDS,
    KINDS,
    MORE_KINDS,
    Holder,
    Twin,
    close,
    copied,
    everything,
    half,
    lamb_twin,
    make,
    on,
    same_bits,
    states,
    value_of,
)
from torch import Tensor

from dist_lamb import Lamb

OPTIONS = {"lr": 0.1, "weight_decay": 0.05}


# --- edits that are noticed ----------------------------------------------------------------------


def _loaded(params: dict[str, Tensor]) -> None:
    Holder(params).load_state_dict(
        {n: value_of(n, tuple(p.shape), 7).to(p.dtype) for n, p in params.items()}
    )


def _copied_to_one(params: dict[str, Tensor]) -> None:
    with torch.no_grad():
        params["c"].copy_(value_of("c", tuple(params["c"].shape), 8))


def _clamped(params: dict[str, Tensor]) -> None:
    """Many elements stay as they are."""
    with torch.no_grad():
        for p in params.values():
            p.clamp_(-0.07, 0.07)


def _rows_of_one(params: dict[str, Tensor]) -> None:
    with torch.no_grad():
        params["a"][1:3].mul_(2.0)


def _all_at_once(params: dict[str, Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(params.values()), 0.5)


EDITS = [_loaded, _copied_to_one, _clamped, _rows_of_one, _all_at_once]


def _edited(impl: str, cls: Any) -> None:
    twin = lamb_twin(impl, half(impl), cls=cls)
    twin.step()
    for edit in EDITS:
        edit(twin.params)
        twin.follow_masters()
        twin.step(steps=2)
        twin.check()
    # at lr = 0 the start can be seen bit by bit
    _clamped(twin.params)
    starts = twin.follow_masters()
    params = {n: p.detach().clone() for n, p in twin.params.items()}
    twin.opt.param_groups[0]["lr"] = 0.0
    twin.set_gradients()
    twin.opt.step()
    same_bits({n: states(twin.opt)[p]["master"] for n, p in twin.params.items()}, starts)
    same_bits({n: p.detach() for n, p in twin.params.items()}, params)


@pytest.mark.parametrize(("impl", "cls"), MORE_KINDS)
def test_edits_are_not_reverted(impl: str, cls: Any) -> None:
    """A step starts from what was written, and from the master's bits where nothing was."""
    on(impl, _edited, cls)


def _edited_behind_the_back(impl: str, cls: Any) -> None:
    twin = lamb_twin(impl, half(impl), cls=cls)
    twin.step(steps=3)
    for n, p in twin.params.items():
        p.data.mul_(2.0)  # no element is left as it was
        twin.plain.x[n] = p.detach().double()
    twin.opt.refresh_masters()
    for n, p in twin.params.items():
        close(n, states(twin.opt)[p]["master"], p.float(), 0.0)
    twin.step(steps=2)
    twin.check()
    # full-precision params are their own masters
    twin = lamb_twin(impl, cls=cls)
    twin.opt.refresh_masters()
    twin.step(steps=3)
    for n, p in twin.params.items():
        p.data.mul_(2.0)
        twin.plain.x[n] *= 2.0
    before = everything(twin.opt, twin.params)
    twin.opt.refresh_masters()
    same_bits(everything(twin.opt, twin.params), before)
    twin.step(steps=2)
    twin.check()


@pytest.mark.parametrize(("impl", "cls"), KINDS)
def test_refresh_masters(impl: str, cls: Any) -> None:
    """After edits through ``p.data``, which nothing tells of."""
    on(impl, _edited_behind_the_back, cls)


# --- checkpoints ---------------------------------------------------------------------------------


def _resumed(impl: str, edit: bool, model_first: bool, cls: Any) -> None:
    twin = lamb_twin(impl, half(impl), cls=cls)
    twin.step(steps=2)
    if edit:
        _clamped(twin.params)
        twin.follow_masters()
    weights = {n: p.detach().clone() for n, p in twin.params.items()}
    state, at = copy.deepcopy(twin.opt.state_dict()), twin.t
    twin.step(steps=2)
    twin.check()
    want = everything(twin.opt, twin.params)

    fresh = make(half(impl))
    with torch.no_grad():
        for p in fresh.values():
            p.neg_()
    running = copied(fresh)
    used = cls(list(running.items()), impl=impl, lr=0.5)
    Twin(running, used).step(steps=2)
    for params, opt in ((fresh, cls(list(fresh.items()), impl=impl, lr=0.5)), (running, used)):
        steps: list[Callable[[], Any]] = [
            lambda params=params: Holder(params).load_state_dict(weights),
            lambda opt=opt: opt.load_state_dict(copy.deepcopy(state)),
        ]
        for load in steps if model_first else reversed(steps):
            load()
        again = Twin(params, opt)
        again.t = at
        again.step(steps=2)
        same_bits(everything(opt, params), want)


@pytest.mark.parametrize(("impl", "cls"), KINDS)
@pytest.mark.parametrize("edit", [False, True], ids=["untouched", "edited"])
@pytest.mark.parametrize("model_first", [False, True], ids=["optimizer first", "model first"])
def test_resumed_with_the_same_bits(impl: str, cls: Any, edit: bool, model_first: bool) -> None:
    """Model and optimizer of a checkpoint in either order, into new ones and into running ones.

    ``edited``: weights were written between the last step and saving.
    """
    if impl == "triton" and not edit:
        pytest.skip("the interpreter is slow")
    on(impl, _resumed, edit, model_first, cls)


# --- another precision ---------------------------------------------------------------------------


def _to_half_and_back(impl: str, by_file: bool) -> None:
    params = make()
    model = Holder(params)
    twin = Twin(params, Lamb(list(params.items()), impl=impl, **OPTIONS), **OPTIONS)
    twin.step(steps=3)
    twin.check()
    model.to(half(impl))
    for n, p in params.items():
        twin.plain.x[n] = p.detach().double()
    twin.step(steps=2)
    twin.check()
    model.float()
    if by_file:
        twin.opt.load_state_dict(copy.deepcopy(twin.opt.state_dict()))
    for n, p in params.items():
        assert p.dtype == torch.float32
        twin.plain.x[n] = p.detach().double()
    for _ in range(2):
        twin.step()
        twin.check()
        assert not any("master" in entry for entry in twin.opt.state.values())
        saved = twin.opt.state_dict()["state"].values()
        assert not any("master" in entry for entry in saved)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("by_file", [False, True], ids=["", "and loaded"])
def test_no_stale_master_rules_a_full_precision_param(impl: str, by_file: bool) -> None:
    if impl == "triton" and by_file:
        pytest.skip("the interpreter is slow")
    on(impl, _to_half_and_back, by_file)
