"""``nonfinite="skip"``: a step with a gradient that is not finite changes nothing, and is counted.

On ranks: test_edits_sharded.py.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from edit_cases import (
    BACKENDS,
    MORE_KINDS,
    Holder,
    copied,
    dtypes,
    everything,
    gradient,
    lamb_twin,
    make,
    on,
    same_bits,
)

from dist_lamb import Lamb, ShardedLamb

SKIP = {"nonfinite": "skip"}
BAD = [("c", -1, float("nan")), ("d", 1399, float("inf")), ("a", 0, float("-inf"))]


def _bad_step(twin: Any, where: tuple[str, int, float]) -> None:
    """A step that must change nothing."""
    before = everything(twin.opt, twin.params)
    twin.set_gradients()
    name, element, value = where
    twin.params[name].grad.view(-1)[element] = value
    twin.opt.step()
    twin.opt.zero_grad()
    same_bits(everything(twin.opt, twin.params), before)


def _counted(opt: Any, want: int) -> None:
    count = opt.skipped_steps()
    assert isinstance(count, torch.Tensor)
    assert count.shape == ()
    assert int(count) == want
    for group in opt.param_groups:
        assert isinstance(group["skipped_steps"], torch.Tensor)
        assert group["skipped_steps"].shape == ()
        assert int(group["skipped_steps"]) == want


def _skipped(impl: str, cls: Any, clip: float | None) -> None:
    for dtype in dtypes(impl):
        twin = lamb_twin(impl, dtype, cls=cls, also=SKIP, max_grad_norm=clip)
        twin.step(steps=2)
        twin.opt.add_param_group({"params": [("z", torch.nn.Parameter(torch.ones(2)))]})
        twin.step()
        _counted(twin.opt, 0)
        for done, where in enumerate(BAD, start=1):
            _bad_step(twin, where)
            _counted(twin.opt, done)
            twin.step(absent="b")
            twin.check()
        # the very first step of an optimizer
        first = lamb_twin(impl, dtype, cls=cls, also=SKIP, max_grad_norm=clip)
        start = {n: p.detach().clone() for n, p in first.params.items()}
        first.set_gradients()
        first.params["e"].grad.fill_(float("nan"))
        first.opt.step()
        same_bits({n: p.detach() for n, p in first.params.items()}, start)
        _counted(first.opt, 1)
        first.step(steps=2)
        first.check()


@pytest.mark.parametrize(("impl", "cls"), MORE_KINDS)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_bad_gradient_changes_nothing(impl: str, cls: Any, clip: float | None) -> None:
    if impl == "triton" and (clip is None) is (cls is Lamb):
        pytest.skip("the interpreter is slow")
    on(impl, _skipped, cls, clip)


def _large(impl: str) -> None:
    """Finite gradients are stepped with, as they would be without the option."""
    for clip in (1.0,) if impl == "triton" else (None, 1.0):
        found = []
        for also in (SKIP, {"nonfinite": "propagate"}):
            twin = lamb_twin(impl, also=also, max_grad_norm=clip)
            twin.step(steps=2)
            twin.set_gradients()
            for n in "ac":
                twin.params[n].grad.fill_(1e30)
            twin.opt.step()
            assert int(twin.opt.state[twin.params["a"]]["step"]) == 3
            found.append(everything(twin.opt, twin.params))
            if also is SKIP:
                _counted(twin.opt, 0)
        same_bits(*found)


@pytest.mark.parametrize("impl", BACKENDS)
def test_a_large_gradient_is_not_skipped(impl: str) -> None:
    on(impl, _large)


def _propagated(impl: str) -> None:
    for also in ({"nonfinite": "propagate"}, {}):
        twin = lamb_twin(impl, also=also)
        assert twin.opt.param_groups[0]["nonfinite"] == "propagate"
        twin.step(steps=2)
        twin.set_gradients()
        twin.params["c"].grad.view(-1)[3] = float("nan")
        twin.opt.step()
        assert int(twin.opt.skipped_steps()) == 0
        assert twin.params["c"].isnan().all()  # its norm is NaN
        for n, p in twin.params.items():
            assert int(twin.opt.state[p]["step"]) == 3
            if n != "c":
                assert p.isfinite().all()


@pytest.mark.parametrize("impl", BACKENDS)
def test_by_default_a_nan_reaches_the_params(impl: str) -> None:
    on(impl, _propagated)


def _switched_on(impl: str) -> None:
    twin = lamb_twin(impl)
    twin.step(steps=3)
    twin.opt.param_groups[0]["nonfinite"] = "skip"
    twin.step()
    twin.check()
    for done in (1, 2):
        _bad_step(twin, BAD[done])
        _counted(twin.opt, done)
    twin.step(steps=2)
    twin.check()


@pytest.mark.parametrize("impl", BACKENDS)
def test_switched_on_between_steps(impl: str) -> None:
    on(impl, _switched_on)


@pytest.mark.parametrize("value", ["Skip", None, True, "raise"])
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_invalid_values(cls: Any, value: Any) -> None:
    params = make()
    with pytest.raises(ValueError, match="nonfinite"):
        cls(list(params.items()), nonfinite=value)
    twin = lamb_twin("foreach", cls=cls)
    twin.step(steps=2)
    twin.opt.param_groups[0]["nonfinite"] = value
    twin.set_gradients()
    before = everything(twin.opt, twin.params)
    with pytest.raises(ValueError, match="nonfinite"):
        twin.opt.step()
    same_bits(everything(twin.opt, twin.params), before)


# --- the count stays -----------------------------------------------------------------------------


def _other(opt: Any, params: Any, how: str, folder: Path) -> tuple[Any, Any]:
    """An optimizer of other params that has been given the state of ``opt``."""
    if how in ("deepcopy", "pickle"):
        pair = opt, params
        return copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    others = copied(params)
    cls = Lamb if how == "full into Lamb" else type(opt)
    other = cls(list(others.items()), lr=0.5, **SKIP)
    if how.startswith("full"):
        other.load_state_dict(opt.full_optimizer_state_dict())
    elif how == "state dict":
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif how == "file":
        torch.save(opt.state_dict(), folder / "opt.pt")
        other.load_state_dict(torch.load(folder / "opt.pt", weights_only=True))
    else:
        from torch.distributed.checkpoint.state_dict import (
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )

        model, fresh = Holder(params), Holder(others)
        get_optimizer_state_dict(fresh, other)
        set_optimizer_state_dict(fresh, other, get_optimizer_state_dict(model, opt))
    return other, others


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize(
    "how",
    [
        "state dict",
        "file",
        "deepcopy",
        "pickle",
        "torch.distributed.checkpoint",
        "full",
        "full into Lamb",
    ],
)
def test_the_count_is_state(how: str, tmp_path: Path) -> None:
    cls = ShardedLamb if how.startswith("full") else Lamb
    twin = lamb_twin("foreach", cls=cls, also=SKIP)
    twin.step(steps=2)
    _bad_step(twin, BAD[0])
    _bad_step(twin, BAD[1])
    other, params = _other(twin.opt, twin.params, how, tmp_path)
    _counted(other, 2)
    # both go on, each counting for itself
    for n, p in params.items():
        p.grad = gradient(n, p, 50)
        if n == "a":
            p.grad.fill_(float("nan"))
    other.step()
    _counted(other, 3)
    _counted(twin.opt, 2)
    twin.step()
    twin.check()
    for n, p in params.items():
        p.grad = gradient(n, p, twin.t - 1)
    other.step()
    same_bits(everything(other, params), everything(twin.opt, twin.params))
