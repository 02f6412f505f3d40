"""State that is reset, replaced or given other memory between two steps of Lamb counts."""

from __future__ import annotations

import copy
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_cases import (
    BACKENDS,
    STATES,
    Holder,
    copied,
    dtypes,
    everything,
    gradient,
    lamb_twin,
    on,
    same_bits,
    states,
    value_of,
)

from dist_lamb import Lamb, checkpoint

OPTIONS = {"lr": 0.1, "weight_decay": 0.05}


# --- reset ---------------------------------------------------------------------------------------


def _reset(impl: str, how: str, folder: str) -> None:
    """All of it goes: what follows is, bit by bit, the first step of a new optimizer."""
    for dtype in dtypes(impl):
        twin = lamb_twin(impl, dtype)
        known = twin.opt.state
        twin.step(steps=3)
        if how == "assigned":
            twin.opt.state = defaultdict(dict)
        elif how == "cleared":
            twin.opt.state.clear()
        else:
            known.clear()
        twin.t = 20
        params = copied(twin.params)
        fresh = Lamb(list(params.items()), impl=impl, **OPTIONS)
        for n, p in twin.params.items():
            twin.plain.start_anew(n, p)
        for done in (1, 2):
            for n, p in params.items():
                p.grad = gradient(n, p, twin.t)
            fresh.step()
            twin.step()
            same_bits(everything(twin.opt, twin.params), everything(fresh, params))
            twin.check()
            _saved_is(twin, everything(fresh, params), f"{folder}/{dtype}", done)


def _saved_is(twin: Any, want: dict[str, Any], folder: str, done: int) -> None:
    """state_dict() and a checkpoint hold the state that the steps are made with."""
    saved = twin.opt.state_dict()["state"]
    for i, n in enumerate(twin.params):
        assert saved[i]["step"] == done
        for key in (f"{n}.{name}" for name in STATES if f"{n}.{name}" in want):
            same_bits({key: saved[i][key.split(".")[1]]}, {key: want[key]})
    checkpoint.save(folder, done, Holder(twin.params), twin.opt)
    params = copied(twin.params)
    loaded = Lamb(list(params.items()), **OPTIONS)
    checkpoint.load(folder, Holder(params), loaded)
    same_bits(everything(loaded, params), want)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("how", ["assigned", "cleared", "cleared through an old reference"])
def test_reset(impl: str, how: str, tmp_path: Path) -> None:
    if impl == "triton" and how == "cleared":
        pytest.skip("the interpreter is slow")
    on(impl, _reset, how, str(tmp_path))


def _assigned_before_loading(impl: str) -> None:
    """A state dict of before is what counts after a reset and a load."""
    twin = lamb_twin(impl)
    twin.step(steps=3)
    saved = copy.deepcopy(twin.opt.state_dict())
    twin.step()
    twin.opt.state = defaultdict(dict)
    for n, p in twin.params.items():
        twin.plain.start_anew(n, p)
    twin.step()
    twin.check()
    twin.opt.load_state_dict(saved)
    for n, entry in zip(twin.params, saved["state"].values()):
        twin.plain.m[n], twin.plain.v[n] = entry["exp_avg"].double(), entry["exp_avg_sq"].double()
        twin.plain.t[n] = 3
    twin.step(steps=2)
    twin.check()


@pytest.mark.parametrize("impl", BACKENDS)
def test_reset_then_loaded(impl: str) -> None:
    on(impl, _assigned_before_loading)


def _deleted(impl: str, through_an_old_reference: bool) -> None:
    """One param starts anew, the others go on."""
    for dtype in dtypes(impl):
        twin = lamb_twin(impl, dtype)
        known = twin.opt.state
        twin.step(steps=4)
        gone = twin.params["c"]
        del (known if through_an_old_reference else twin.opt.state)[gone]
        twin.plain.start_anew("c", gone)
        for _ in range(2):
            twin.step()
            twin.check()
        saved = twin.opt.state_dict()["state"]
        assert [int(saved[i]["step"]) for i in range(len(saved))] == [6, 6, 2, 6, 6, 6]


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("through_an_old_reference", [False, True])
def test_one_param_s_state_is_deleted(impl: str, through_an_old_reference: bool) -> None:
    if impl == "triton" and not through_an_old_reference:
        pytest.skip("the interpreter is slow")
    on(impl, _deleted, through_an_old_reference)


# --- other memory, through a reference from before the last step ---------------------------------

STEP_AND_STATES = ("step", *STATES)


def _replaced(impl: str) -> None:
    count = 20 if impl == "triton" else 60
    shapes = {f"p{i}": (3 + i % 2,) for i in range(count)}
    for dtype in dtypes(impl):
        twin = lamb_twin(impl, dtype, shapes)
        twin.step(steps=2)
        known = twin.opt.state  # in hand already when the next step is made
        twin.step()
        # params in the middle, at no regular distances; each loses something in one way
        losses = product(STEP_AND_STATES, ("memory", "tensor", "entry"))
        places = [i * (count // 20) for i in range(20) if i % 4]
        chosen = {f"p{i}": loss for i, loss in zip(places, losses)}
        for n, (name, how) in chosen.items():
            p = twin.params[n]
            if name not in known[p]:
                continue
            other = value_of(n, shapes[n], seed=5).square()
            if name == "exp_avg":
                twin.plain.m[n] = other.double()
            elif name == "exp_avg_sq":
                twin.plain.v[n] = other.double()
            elif name == "step":
                other = torch.tensor(1.0)
                twin.plain.t[n] = 1
            else:  # another value that is rounded to the param's
                other = p.detach().float()
                twin.plain.x[n] = other.double()
            if how == "memory":
                known[p][name].data = other.clone()
            elif how == "tensor":
                known[p][name] = other.clone()
            else:
                known[p] = {**{key: t.clone() for key, t in known[p].items()}, name: other.clone()}
        wrong = []
        for _ in range(2):
            twin.step()
            for n in twin.params:
                try:
                    twin.check([n])
                except AssertionError as error:
                    wrong.append((n, chosen.get(n), str(error)))
        assert not wrong, wrong
        for n in chosen:
            assert states(twin.opt)[twin.params[n]] is known[twin.params[n]]


@pytest.mark.parametrize("impl", BACKENDS)
def test_state_replaced_through_an_old_reference(impl: str) -> None:
    """``.data`` of a state tensor, the tensor, or the param's whole entry: of some of 60."""
    on(impl, _replaced)
