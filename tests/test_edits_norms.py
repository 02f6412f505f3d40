"""The norms of the last step: of all gradients, of each param and of each update.

On ranks: test_edits_sharded.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from edit_cases import BACKENDS, KINDS, MORE_KINDS, NAN, Twin, close, dtypes, lamb_twin, make, on
from torch import Tensor, nn

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


def _one_is_bad(impl: str, cls: Any) -> None:
    """Clipping makes every trust ratio NaN then; which gradient it was, the norms tell."""
    params = {n: nn.Parameter(torch.ones(4)) for n in "ab"}
    opt = cls(params.items(), lr=0.1, impl=impl, max_grad_norm=1.0, track_grad_norm=True)
    params["a"].grad, params["b"].grad = torch.tensor([1.0, NAN, 1.0, 1.0]), torch.ones(4)
    opt.step()
    assert all(ratio.isnan() for ratio in opt.trust_ratios().values())
    assert opt.grad_norms()["a"].isnan()
    assert float(opt.grad_norms()["b"]) == 2.0
    assert [float(norm) for norm in opt.param_norms().values()] == [2.0, 2.0]


@pytest.mark.parametrize(("impl", "cls"), KINDS)
def test_norms_where_one_gradient_is_bad(impl: str, cls: Any) -> None:
    on(impl, _one_is_bad, cls)


def _overflow(impl: str, cls: Any) -> None:
    p = nn.Parameter(torch.ones(4))
    opt = cls([("p", p)], lr=0.1, impl=impl, track_grad_norm=True)
    for bad in (0.0, 1.0, 0.0):
        p.grad = torch.full((4,), float("inf") if bad else 1.0)
        # as torch.amp.GradScaler.step() does
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(bad)
        opt.step()
        assert float(opt.grad_norm()) == (float("inf") if bad else 2.0)


@pytest.mark.parametrize(("impl", "cls"), KINDS)
def test_the_norm_of_a_step_that_loss_scaling_skips(impl: str, cls: Any) -> None:
    """Not 0, which says that no param had a gradient."""
    on(impl, _overflow, cls)


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


# --- groups that were edited since the step ------------------------------------------------------

FOUR = ("trust_ratios", "param_norms", "update_norms", "grad_norms")


def in_groups(cls: Any, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """a and b in one group, c in the other; each with other norms, after one step."""
    params = {n: nn.Parameter(torch.full((3,), k)) for n, k in zip("abc", (1.0, 2.0, 3.0))}
    groups = [{"params": [(n, params[n]) for n in names], **options} for names in ("ab", "c")]
    opt = cls(groups, lr=0.1, track_grad_norm=True)
    with_gradients(params)
    opt.step()
    return params, opt


def with_gradients(params: dict[str, Tensor], scale: float = 1.0) -> None:
    for k, p in enumerate(params.values()):
        p.grad = torch.full((3,), scale * 10.0**k)


def reports(opt: Any) -> dict[str, dict[str, float]]:
    return {name: {n: float(v) for n, v in getattr(opt, name)().items()} for name in FOUR}


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_reports_after_a_move(cls: Any) -> None:
    """Results are of params, not of positions."""
    params, opt = in_groups(cls)
    before = reports(opt)
    assert all(len(set(values.values())) == 3 for values in before.values())
    first, second = (group["params"] for group in opt.param_groups)
    second.append(first.pop(0))
    assert list(opt.grad_norms()) == ["b", "c", "a"]
    assert reports(opt) == before
    opt.param_groups.reverse()
    assert reports(opt) == before
    with_gradients(params, 2.0)
    opt.step()
    doubled = {n: 2 * norm for n, norm in before["grad_norms"].items()}
    assert reports(opt)["grad_norms"] == pytest.approx(doubled)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_reports_of_params_that_were_not_there(cls: Any) -> None:
    """NaN, as of a param without gradient, until the next step."""
    params, opt = in_groups(cls)
    before, norm = reports(opt), float(opt.grad_norm())
    opt.add_param_group({"params": [("d", nn.Parameter(torch.ones(2)))]})
    for name, found in reports(opt).items():
        assert found == pytest.approx({**before[name], "d": NAN}, nan_ok=True)
    assert float(opt.grad_norm()) == norm
    with_gradients(params)
    opt.step()
    assert reports(opt)["grad_norms"] == pytest.approx(
        {**before["grad_norms"], "d": NAN}, nan_ok=True
    )
    opt.param_groups[0]["params"][0] = nn.Parameter(torch.ones(3))  # a's place and name
    for found in reports(opt).values():
        assert {n for n, value in found.items() if value != value} == {"a", "d"}


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_reports_after_another_rule_came(cls: Any) -> None:
    """Norms stand where the rule of that step put them, which here looks at none."""
    _, opt = in_groups(cls, rule="lars")
    before = reports(opt)
    for group in opt.param_groups:
        group.update(rule="lamb")
    for name, found in reports(opt).items():
        assert found == pytest.approx(before[name], nan_ok=True)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_an_empty_first_group(cls: Any) -> None:
    opt = cls([{"params": []}, {"params": [nn.Parameter(torch.ones(4))]}], track_grad_norm=True)
    one(opt.grad_norm())
    opt.step()
    assert float(opt.grad_norm()) == 0.0
    opt.param_groups[1]["params"][0].grad = torch.ones(4)
    opt.step()
    assert float(opt.grad_norm()) == 2.0
    one(Lamb([{"params": []}]).grad_norm())


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_params_of_one_name_are_all_reported(cls: Any) -> None:
    """torch.optim takes the named_parameters() of two networks."""
    params = [torch.ones(2).requires_grad_() for _ in range(3)]
    optimizer = cls([("w", params[0]), ("w", params[1]), ("b", params[2])], lr=0.1)
    sum(p.sum() for p in params).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["w", "w (2)", "b"]
