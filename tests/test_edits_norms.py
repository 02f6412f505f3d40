"""The norms of the last step: of all gradients, of each param and of each update.

On ranks: test_edits_sharded.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from edit_cases import BACKENDS, KINDS, MORE_KINDS, NAN, Twin, close, dtypes, lamb_twin, make, on
from torch import Tensor

from dist_lamb import Lamb, ShardedLamb


def check_norms(twin: Twin, tolerance: float = 2e-5) -> None:
    """What the optimizer says of its last step, against the rule; by name."""
    opt, plain = twin.opt, twin.plain
    one(opt.grad_norm())
    close("grad_norm", opt.grad_norm(), plain.grad_norm, tolerance)
    for found, want in (
        (opt.param_norms(), plain.x_norm),
        (opt.update_norms(), plain.u_norm),
        (opt.grad_norms(), plain.g_norm),
        (opt.trust_ratios(), plain.rho),
    ):
        assert list(found) == list(twin.params)
        for n, norm in found.items():
            one(norm)
            close(n, norm, want[n], tolerance)


def one(t: Tensor) -> None:
    assert isinstance(t, Tensor)
    assert (t.dtype, t.shape, t.device.type) == (torch.float32, (), "cpu")


def _followed(impl: str, cls: Any, options: dict[str, Any]) -> None:
    for dtype in dtypes(impl):
        twin = lamb_twin(impl, dtype, cls=cls, **options)
        for t in range(4):
            twin.step(absent="bd" if t == 2 else "")
            check_norms(twin)
        # no gradient at all
        twin.step(absent=twin.params)
        assert float(twin.opt.grad_norm()) == 0.0
        check_norms(twin)
        assert all(norm.isnan() for norm in twin.opt.trust_ratios().values())
        twin.step()
        check_norms(twin)


@pytest.mark.parametrize(("impl", "cls"), MORE_KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.3},
        {"max_grad_norm": 1e9, "phi": (0.1, 0.2), "trust_clip": (0.0, 0.3), "decoupled": False},
    ],
    ids=["", "clipped", "clamped"],
)
def test_norms(impl: str, cls: Any, options: dict[str, Any]) -> None:
    """Before clipping and clamping, of params before their update."""
    if impl == "triton" and bool(options) is (cls is ShardedLamb):
        pytest.skip("the interpreter is slow")
    on(impl, _followed, cls, options)


def _scaled(impl: str, cls: Any) -> None:
    for clip in (None, 0.3):
        for with_flag in (False, True):
            twin = lamb_twin(impl, cls=cls, max_grad_norm=clip)
            for _ in range(2):
                mean = twin.set_gradients()
                for p in twin.params.values():
                    p.grad *= 1024.0
                twin.opt.grad_scale = torch.tensor(1024.0)
                if with_flag:
                    twin.opt.found_inf = torch.tensor([0.0])
                twin.opt.step()
                twin.plain.step(mean)
                check_norms(twin)
                twin.check()


@pytest.mark.parametrize(("impl", "cls"), KINDS)
def test_loss_scale_is_taken_out(impl: str, cls: Any) -> None:
    on(impl, _scaled, cls)


def _groups_differ(impl: str) -> None:
    """One group is clipped, the other is not: the norm is of both."""
    params = make()
    first = {"params": [(n, params[n]) for n in "ab"], "max_grad_norm": 0.3}
    rest = {"params": [(n, params[n]) for n in "cdef"], "weight_decay": 0.0, "adapt": False}
    twin = Twin(
        params,
        Lamb([first, rest], lr=0.1, weight_decay=0.05, impl=impl, track_grad_norm=True),
        lr=0.1,
    )
    for n in params:
        inside = (first if n in "ab" else rest).items()
        twin.plain.options[n].update(weight_decay=0.05)
        twin.plain.options[n].update({k: v for k, v in inside if k != "params"})
    for _ in range(3):
        twin.step()
        check_norms(twin)
        twin.check()


@pytest.mark.parametrize("impl", BACKENDS)
def test_groups_that_differ(impl: str) -> None:
    on(impl, _groups_differ)


def _zeros(impl: str) -> None:
    """Norms that are 0 are 0; a gradient that is 0 is a gradient."""
    twin = lamb_twin(impl)
    with torch.no_grad():
        twin.params["a"].zero_()
        twin.plain.x["a"].zero_()
    mean = twin.set_gradients()
    mean["a"].zero_()
    twin.params["a"].grad.zero_()
    twin.opt.step()
    twin.plain.step(mean)
    check_norms(twin)
    assert float(twin.opt.param_norms()["a"]) == float(twin.opt.update_norms()["a"]) == 0.0


@pytest.mark.parametrize("impl", BACKENDS)
def test_norms_that_are_zero(impl: str) -> None:
    on(impl, _zeros)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("impl", ["reference", "foreach"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_no_gradient_anywhere(cls: Callable[..., Any], impl: str, steps: int) -> None:
    """Every name is there, and no number of the step before."""
    twin = lamb_twin(impl, cls=cls)
    twin.step(steps=steps)
    twin.opt.zero_grad()
    twin.opt.step()
    opt = twin.opt
    reports = (opt.trust_ratios(), opt.param_norms(), opt.update_norms(), opt.grad_norms())
    for found in reports:
        assert list(found) == list(twin.params)
        for norm in found.values():
            close("norm", norm, NAN)
    assert float(twin.opt.grad_norm()) == 0.0
    twin.plain.step({})
    twin.check()
