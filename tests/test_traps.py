"""What implementations of LAMB get wrong: each test fails for the mistake its docstring names."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from dist_lamb import Lamb
from dist_lamb.kernels import compiled, foreach, reference
from dist_lamb.kernels.eager import RowMap, Work
from dist_lamb.kernels.segments import Segment
from dist_lamb.kernels.sweeps import SQUARES, Numbers, rule_sweep
from dist_lamb.rules import RULES

IMPLS = ("reference", "foreach")
BACKENDS = (
    reference,
    foreach,
    pytest.param(compiled, marks=pytest.mark.xdist_group("compile")),
)


def stepped(value: Tensor, *grads: Tensor | None, **options: Any) -> tuple[Tensor, Lamb]:
    p = nn.Parameter(value.clone())
    opt = Lamb([p], **options)
    for g in grads:
        p.grad = None if g is None else g.clone()
        opt.step()
    return p.detach(), opt


def first_step(x: Tensor, r: Tensor, lr: float, wd: float) -> Tensor:
    """By hand, from Adam's direction r."""
    u = r + wd * x
    return x - lr * x.norm() / u.norm() * u


@pytest.mark.parametrize("impl", IMPLS)
def test_scale_of_the_moment(impl: str) -> None:
    """Wrong: m, or a bias correction, of ten times the size.

    Without decay the trust ratio divides any factor out again, so that a test at wd = 0 sees
    nothing; the first half of this one says so, the second half is the test.
    """
    x = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
    g = torch.tensor([0.3, 0.1, -0.2, 7.0], dtype=torch.float64)
    exact: dict[str, Any] = {"lr": 0.1, "eps": 0.0, "betas": (0.9, 0.999), "impl": impl}
    averaged, _ = stepped(x, g, weight_decay=0.0, **exact)
    summed, _ = stepped(x, g, weight_decay=0.0, grad_averaging=False, **exact)
    torch.testing.assert_close(averaged, summed, rtol=1e-12, atol=0)

    for wd in (0.1, 1.0):
        averaged, _ = stepped(x, g, weight_decay=wd, **exact)
        summed, _ = stepped(x, g, weight_decay=wd, grad_averaging=False, **exact)
        uncorrected, _ = stepped(x, g, weight_decay=wd, bias_correction=False, **exact)
        r = g.sign()
        for got, direction in (
            (averaged, r),
            (summed, 10 * r),
            (uncorrected, r * 0.1 / 0.001**0.5),
        ):
            want = first_step(x, direction, 0.1, wd)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        assert (averaged - summed).abs().max() > 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wd", [1e-4, 0.01, 3.0])
def test_a_zero_gradient_decays_and_no_gradient_does_not(impl: str, wd: float) -> None:
    """Wrong: feeding zeros to a param whose gradient is None.

    Under a zero gradient rho = 1/wd: the tensor shrinks by 1 - lr a step, whatever wd is.
    """
    x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    options = {"lr": 0.25, "weight_decay": wd, "impl": impl}
    shrunk, _ = stepped(x, torch.zeros(3).double(), torch.zeros(3).double(), **options)
    torch.testing.assert_close(shrunk, 0.75**2 * x, rtol=1e-12, atol=0)
    kept, opt = stepped(x, None, None, **options)
    assert torch.equal(kept, x)
    assert not opt.state


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wd", [0.0, 0.1])
def test_zero_initialised_tensors_move(impl: str, wd: float) -> None:
    """Wrong: rho = 0 (the tensor never moves) or 0/0 (it becomes NaN) where ||x|| = 0."""
    g = torch.tensor([2.0, -0.5, 1.0])
    moved, opt = stepped(torch.zeros(3), g, lr=0.125, weight_decay=wd, eps=0.0, impl=impl)
    torch.testing.assert_close(moved, -0.125 * g.sign())
    assert opt.trust_ratios()["param_0"] == 1.0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_zero_update_of_an_undecayed_tensor(impl: str) -> None:
    """Wrong: ||x||/0 where ||u|| = 0, which makes the step inf * 0 = NaN."""
    x = torch.tensor([1.0, -2.0])
    kept, opt = stepped(x, torch.zeros(2), lr=0.1, weight_decay=0.0, impl=impl)
    assert torch.equal(kept, x)
    assert opt.trust_ratios()["param_0"] == 1.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("value", [0.0, 1.5], ids=["bias", "weight"])
def test_a_dummy_step_leaves_no_trace(value: float, decoupled: bool, impl: str) -> None:
    """Wrong: a step of lr = 0 with zero gradients that makes NaNs, or counts as the first step.

    torch.distributed.checkpoint makes one to have the optimizer create its state.
    """
    p, q = nn.Parameter(torch.full((3,), value)), nn.Parameter(torch.full((3,), value))
    options: dict[str, Any] = {"weight_decay": 0.5, "decoupled": decoupled, "impl": impl}
    opt, fresh = Lamb([p], lr=0.0, **options), Lamb([q], lr=0.1, **options)
    p.grad = torch.zeros(3)
    opt.step(closure=None)
    assert torch.equal(p, q)
    assert opt.state[p]["step"] == 0
    opt.param_groups[0]["lr"] = 0.1
    p.grad = q.grad = torch.tensor([1.0, -3.0, 0.25])
    opt.step()
    fresh.step()
    assert torch.equal(p, q)
    assert opt.state[p]["step"] == 1


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "vectors"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_sums_of_one_tensor_are_added(
    backend: ModuleType, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong: the last fragment's sum overwriting those before it (apex scatters without adding).

    Param 1 has three fragments in two buffers, two of them apart in the same one.
    """
    monkeypatch.setattr(compiled, "SMALL_NUMEL", 2)
    monkeypatch.setattr(compiled, "ROW_NUMEL", 16)
    owners = [[1, 1, 0, 1], [2, 2, 1]] if tiled else [[1], [0], [1], [2], [1]]
    cols = 64 if tiled else 100
    generator = torch.Generator().manual_seed(0)
    blocks = [
        [torch.rand(len(o), cols, generator=generator) + 0.5 for _ in range(4)] for o in owners
    ]
    start = [[t.clone() for t in block] for block in blocks]
    rows = RowMap(owners, 3, torch.device("cpu"))
    segments = [Segment(o[0], g, x, (m, v), None) for o, (g, x, m, v) in zip(owners, blocks)]
    work = Work(segments, rows, torch.float32, tiled=tiled)
    rule = RULES["lamb"]
    table = torch.tensor(
        [
            rule.hyperparameters(Lamb([nn.Parameter(torch.zeros(1))], weight_decay=wd).defaults)
            for wd in (0.1, 0.2, 0.3)
        ],
        dtype=torch.float64,
    )
    h = rule.h(*table.unbind(1))
    c = rule.coefficients(h, torch.tensor([1.0, 2.0, 3.0]).double(), ())._replace(l2=None)
    n = Numbers(c=c).to(torch.float32)
    step = torch.tensor([0.1, 0.2, 0.3])
    with torch._dynamo.config.patch(recompile_limit=64):
        moments = rule_sweep(rule, moments=True, apply=False, norm=True)
        sums = rows.sum(backend.sweep(work, moments, n))
        grad_sq = rows.sum(backend.sweep(work, SQUARES, Numbers()))[:, 0]
        apply = rule_sweep(rule, moments=False, apply=True)
        backend.sweep(work, apply, n._replace(steps=(step,)))
    for k in range(3):
        mine = [(b, i) for b, o in enumerate(owners) for i, owner in enumerate(o) if owner == k]
        g, x, m, v = (torch.cat([start[b][n][i] for b, i in mine]).double() for n in range(4))
        ck = Numbers(c=c).map(lambda t, k=k: t[k]).c
        m, v = rule.update(g, x, (m, v), ck)
        (u,) = rule.directions(g, x, (m, v), ck)
        want = torch.stack([t.square().sum() for t in (x, u, g)])
        torch.testing.assert_close(sums[k], want, rtol=1e-6, atol=0)
        torch.testing.assert_close(grad_sq[k], g.square().sum(), rtol=1e-6, atol=0)
        got = torch.cat([blocks[b][1][i] for b, i in mine])
        torch.testing.assert_close(got, (x - 0.1 * (k + 1) * u).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_clip_is_by_the_norm_of_all_groups(impl: str) -> None:
    """Wrong: clipping each group, or each dtype, by a norm of its own."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16)
    params = [nn.Parameter(torch.ones(4, dtype=d)) for d in dtypes]
    groups = [{"params": [p], "max_grad_norm": limit} for p, limit in zip(params, (3.0, 1.5, None))]
    opt = Lamb(groups, betas=(0.0, 0.5), impl=impl)
    for p, size in zip(params, (1.0, 2.0, 2.0)):
        p.grad = torch.full_like(p, size)
    opt.step()
    norm = (4 * 1.0 + 4 * 4.0 + 4 * 4.0) ** 0.5
    assert norm == 6.0
    for p, expected in zip(params, (1.0 * 3.0 / norm, 2.0 * 1.5 / norm, 2.0)):
        want = torch.full_like(opt.state[p]["exp_avg"], expected)
        torch.testing.assert_close(opt.state[p]["exp_avg"], want)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("off", [None, 0, 0.0])
def test_clipping_to_zero_is_off(impl: str, off: float | None) -> None:
    """Wrong: erasing every gradient (apex, timm)."""
    x, g = torch.ones(3), torch.tensor([1.0, -2.0, 3.0])
    moved, _ = stepped(x, g, lr=0.1, max_grad_norm=off, impl=impl)
    unclipped, _ = stepped(x, g, lr=0.1, max_grad_norm=1e9, impl=impl)
    assert torch.equal(moved, unclipped)
    assert not torch.equal(moved, 0.9 * x)


@pytest.mark.parametrize("impl", IMPLS)
def test_clipping_to_zero_is_off_beside_a_clipped_group(impl: str) -> None:
    """Wrong: a coefficient of 0 for the group that is not clipped."""
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [p], "max_grad_norm": 0.0}, {"params": [q], "max_grad_norm": 1.0}]
    opt = Lamb(groups, betas=(0.0, 0.5), impl=impl)
    p.grad, q.grad = torch.full((2,), 3.0), torch.full((2,), 3.0)
    opt.step()
    torch.testing.assert_close(opt.state[p]["exp_avg"], torch.full((2,), 3.0))
    torch.testing.assert_close(opt.state[q]["exp_avg"], torch.full((2,), 0.5))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", ["same", "transposed"])
def test_gradients_can_be_read_after_the_step(impl: str, layout: str) -> None:
    """Wrong: the clipped gradient, or the update, written into p.grad (apex, timm)."""
    p = nn.Parameter(torch.ones(3, 4))
    g = torch.randn(3, 4) if layout == "same" else torch.randn(4, 3).t()
    kept = g.clone()
    p.grad = g
    options: dict[str, Any] = {"max_grad_norm": 0.01, "decoupled": False, "maximize": True}
    Lamb([p], impl=impl, **options).step()
    assert p.grad is g
    assert torch.equal(g, kept)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_tensor_counts_its_own_steps(impl: str) -> None:
    """Wrong: one counter for a group, under which |r| of the late tensor's first step is 0.5.

    At its own t = 1 bias correction makes r the sign of the gradient.
    """
    early, late = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    opt = Lamb([early, late], lr=0.1, weight_decay=0.5, eps=0.0, adapt=False, impl=impl)
    for _ in range(20):
        early.grad = torch.ones(2)
        opt.step()
    late.grad = torch.tensor([3.0, -0.1])
    opt.step()
    torch.testing.assert_close(
        late.detach(), torch.tensor([1 - 0.1 * (1 + 0.5), 1 - 0.1 * (-1 + 0.5)])
    )
    assert [float(opt.state[p]["step"]) for p in (early, late)] == [21.0, 1.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_moments_would_be_zero(impl: str) -> None:
    """Wrong: moments in the params' dtype. In float16 the square of 1e-4 is 0; m / 0 follows."""
    x, g = torch.ones(4, dtype=torch.float16), torch.full((4,), 1e-4, dtype=torch.float16)
    moved, opt = stepped(x, g, lr=0.1, weight_decay=0.0, eps=1e-8, impl=impl)
    (state,) = opt.state.values()
    assert state["exp_avg_sq"].dtype == torch.float32
    torch.testing.assert_close(state["exp_avg_sq"], g.float() ** 2 * (1 - 0.999), rtol=1e-4, atol=0)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.9), rtol=2e-3, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_half_precision_weights_would_stand_still(impl: str) -> None:
    """Wrong: no float32 master. Steps below half a unit in the last place would all be lost."""
    x, g = torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
    one, _ = stepped(x, g, lr=2.0**-12, weight_decay=0.0, impl=impl)
    assert torch.equal(one, x)
    many, _ = stepped(x, *[g] * 128, lr=2.0**-12, weight_decay=0.0, impl=impl)
    torch.testing.assert_close(
        many.float(), torch.full((4,), (1 - 2.0**-12) ** 128), rtol=2**-8, atol=0
    )
    assert (many < x).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("size", [2.0**24, 2.0**40])
def test_a_large_norm_is_no_overflow(impl: str, scaled: bool, size: float) -> None:
    """Wrong: "norm + 1 > norm" as the test of an overflow (apex): false from 2^24 on."""
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opts = [Lamb([t], lr=0.1, max_grad_norm=1.0, impl=impl) for t in (p, q)]
    p.grad, q.grad = torch.full((4,), size), torch.full((4,), 0.5)
    if scaled:
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        scaler.step(opts[0])
        scaler.update()
        assert scaler.get_scale() == 1.0
    else:
        opts[0].step()
    opts[1].step()
    assert opts[0].state[p]["step"] == 1
    assert torch.equal(p, q)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [1e-5, 1e5])
def test_the_trust_ratio_is_not_clamped_unless_asked(impl: str, size: float) -> None:
    """Wrong: a silent clamp to [0.01, 10] (DeepSpeed)."""
    x = torch.full((4,), size)
    _, opt = stepped(x, torch.ones(4), lr=0.1, weight_decay=0.0, eps=0.0, impl=impl)
    torch.testing.assert_close(opt.trust_ratios()["param_0"], torch.tensor(size))


@pytest.mark.parametrize("impl", IMPLS)
def test_bias_correction_is_not_folded_into_lr(impl: str) -> None:
    """Wrong: lr * sqrt(1 - b2^t) / (1 - b1^t) outside the ratio, which then changes the step.

    The length of a step is lr * ||x||, at every t.
    """
    x, g = torch.full((4,), 2.0, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for steps in (1, 10):
        before, _ = stepped(x, *[g] * (steps - 1), lr=0.01, weight_decay=0.1, impl=impl)
        after, _ = stepped(x, *[g] * steps, lr=0.01, weight_decay=0.1, impl=impl)
        torch.testing.assert_close((after - before).norm(), 0.01 * before.norm())
