"""The rule, through every backend, against LAMB written once more in plain float64 numpy."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_lamb import DEFAULTS, NumpyLamb, relative_error, to_numpy
from torch import Tensor, nn

from dist_lamb import Lamb
from dist_lamb.kernels import compiled, foreach
from dist_lamb.kernels.sweeps import Numbers, only_where
from dist_lamb.rules import RULES, adam, trust

IMPLS = (
    "reference",
    "foreach",
    pytest.param("compiled", marks=pytest.mark.xdist_group("compile")),
)
#: Of max|x|. What a float32 step rounds, and what it does in float64.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-13}
#: Relative, of a trust ratio, which is a float32: u of a single element may be a small difference.
ROUNDED = {torch.float32: 3e-5, torch.float64: 1e-7}


def hurtful_params(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """0-d, one element, empty, zeros, ones, permuted, with gaps, cut in pieces, and compiled."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3).to(dtype)

    large = foreach.BATCH_NUMEL["cpu"] + 17
    assert large > compiled.SMALL_NUMEL
    values = {
        "scalar": randn(),
        "one": randn(1),
        "empty": randn(0, 3),
        "zeros": randn(9) * 0,
        "ones": torch.ones(5, dtype=dtype),
        "transposed": randn(6, 4).t(),
        "gaps": randn(5, 8)[:, ::2],
        "offset": randn(40)[3:36].view(3, 11),
        "conv": randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "large": randn(large),
        "table": randn(compiled.SMALL_NUMEL // 64 + 1, 64),
        "late": randn(3, 7),
    }
    params = {name: nn.Parameter(value) for name, value in values.items()}
    assert not params["gaps"].is_contiguous()
    assert params["conv"].is_contiguous(memory_format=torch.channels_last)
    return params


def random_grads(
    params: Mapping[str, Tensor], step: int, absent: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Of the params' dtype, contiguous whatever the param is, and each of its own size."""
    generator = torch.Generator().manual_seed(100 + step)
    grads = {}
    for i, (name, p) in enumerate(params.items()):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10.0 ** (i % 4 - 2)
        if name not in absent:
            grads[name] = g.to(p.dtype)
    return grads


def absent_at(step: int) -> tuple[str, ...]:
    """``late`` starts at the third step, ``transposed`` leaves out one."""
    return ("late",) if step < 2 else ("transposed",) if step == 3 else ()


def assert_follows_numpy(
    params: Mapping[str, Tensor],
    groups: list[tuple[list[str], dict[str, Any]]],
    impl: str,
    steps: int = 5,
    **options: Any,
) -> None:
    dtype = next(iter(params.values())).dtype
    lamb = Lamb(
        [{"params": [(n, params[n]) for n in names], **given} for names, given in groups],
        impl=impl,
        **options,
    )
    oracle = NumpyLamb(to_numpy(params), [(names, {**options, **own}) for names, own in groups])
    for step in range(steps):
        grads = random_grads(params, step, absent_at(step))
        for name, p in params.items():
            p.grad = grads.get(name)
        lamb.step()
        oracle.step(to_numpy(grads))
        assert lamb.trust_ratios().keys() == params.keys()
        for name, ratio in lamb.trust_ratios().items():
            np.testing.assert_allclose(float(ratio), oracle.rho[name], rtol=ROUNDED[dtype])
    for name, p in params.items():
        state = lamb.state[p]
        assert float(state["step"]) == oracle.t[name], name
        for got, want in (
            (p, oracle.x),
            (state["exp_avg"], oracle.m),
            (state["exp_avg_sq"], oracle.v),
        ):
            assert relative_error(got, want[name]) <= TOLERANCE[dtype], name


@pytest.fixture(autouse=True)
def _many_graphs() -> Iterator[None]:
    """One process of tests sees more dtypes and sizes than a training does."""
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "large_decay": {"weight_decay": 0.3, "lr": 0.02},
    "no_decay": {"weight_decay": 0.0},
    "no_grad_averaging": {"grad_averaging": False},
    "no_bias_correction": {"bias_correction": False},
    "l2": {"decoupled": False, "weight_decay": 0.1},
    "l2_maximized_clipped": {
        "decoupled": False,
        "weight_decay": 0.1,
        "maximize": True,
        "max_grad_norm": 2.0,
    },
    "clipped": {"max_grad_norm": 0.5, "eps": 1e-3},
    "clipped_loosely": {"max_grad_norm": 1e6},
    "zero_is_no_clipping": {"max_grad_norm": 0},
    "not_adapted": {"adapt": False},
    "decayed_are_adapted": {"adapt": "decayed"},
    "plain_are_not_adapted": {"adapt": "decayed", "weight_decay": 0.0},
    "trust_clip": {"trust_clip": (0.2, 0.6)},
    "lambc": {"trust_clip": (0.0, 1.0)},
    "phi": {"phi": (0.5, 2.0)},
    "maximize": {"maximize": True},
    "betas": {"betas": (0.0, 0.5), "eps": 1e-2},
    "many": {
        "grad_averaging": False,
        "bias_correction": False,
        "max_grad_norm": 1.0,
        "adapt": "decayed",
        "trust_clip": (0.01, 10.0),
        "phi": (0.0, 3.0),
        "maximize": True,
        "weight_decay": 0.05,
    },
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_option(impl: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = hurtful_params(dtype)
    assert_follows_numpy(params, [(list(params), {})], impl, **{"lr": 0.01, **options})


@pytest.mark.parametrize("impl", IMPLS)
def test_options_are_each_group_s_own(impl: str) -> None:
    """One clipped group among unclipped ones, one L2 group among decoupled ones, and so on."""
    params = hurtful_params(torch.float64)
    names = list(params)
    groups: list[tuple[list[str], dict[str, Any]]] = [
        (names[0::4], {"lr": 0.02, "betas": (0.8, 0.95), "max_grad_norm": 0.5}),
        (names[1::4], {"weight_decay": 0.0, "maximize": True, "eps": 1e-2}),
        (names[2::4], {"decoupled": False, "weight_decay": 0.2, "grad_averaging": False}),
        (names[3::4], {"adapt": False, "bias_correction": False, "max_grad_norm": 3.0}),
    ]
    assert_follows_numpy(params, groups, impl, lr=0.005, trust_clip=(0.0, 2.0))


@pytest.mark.xdist_group("compile")
def test_compiled_functions_on_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the limits, only the last few elements of a tensor are left to foreach."""
    monkeypatch.setattr(compiled, "SMALL_NUMEL", 5)
    monkeypatch.setattr(compiled, "ROW_NUMEL", 5)
    monkeypatch.setattr(foreach, "sweep", _only_a_few_elements(foreach.sweep))
    params = hurtful_params(torch.float64)
    options = {"max_grad_norm": 0.5, "weight_decay": 0.1, "lr": 0.01}
    assert_follows_numpy(params, [(list(params), {})], "compiled", **options)


def _only_a_few_elements(sweep: Any) -> Any:
    def checked(work: Any, what: Any, numbers: Any) -> Tensor:
        assert all(block.x.numel() < 5 for block in work.blocks)
        result: Tensor = sweep(work, what, numbers)
        return result

    return checked


# --- between backends ----------------------------------------------------------------------------


def run(impl: str, dtype: torch.dtype, options: dict[str, Any], steps: int = 5) -> list[Tensor]:
    """Params, then all state tensors."""
    params = hurtful_params(dtype)
    lamb = Lamb(list(params.items()), impl=impl, **{"lr": 0.01, **options})
    for step in range(steps):
        grads = random_grads(params, step, absent_at(step))
        for name, p in params.items():
            p.grad = grads.get(name)
        lamb.step()
    state = [value for p in params.values() for value in lamb.state[p].values()]
    return [p.detach() for p in params.values()] + state


def assert_same_bits(some: list[Tensor], other: list[Tensor]) -> None:
    assert len(some) == len(other)
    for a, b in zip(some, other):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_foreach_has_the_bits_of_reference(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_same_bits(run("foreach", dtype, options), run("reference", dtype, options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_foreach_is_reference_in_float64(options: dict[str, Any]) -> None:
    """But for the last bits: float64 sums show in what order the pieces were added."""
    got, want = run("foreach", torch.float64, options), run("reference", torch.float64, options)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert relative_error(a, b.double().numpy()) <= 1e-14


@pytest.mark.parametrize("piece", [1, 7, 64])
def test_where_foreach_cuts_leaves_no_trace(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    params = {n: p for n, p in hurtful_params().items() if p.numel() < 1000}
    options = {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 1.0}

    def final() -> list[Tensor]:
        own = {n: nn.Parameter(p.detach().clone()) for n, p in params.items()}
        lamb = Lamb(own.items(), impl="foreach", **options)
        for step in range(3):
            for name, g in random_grads(own, step).items():
                own[name].grad = g
            lamb.step()
        return [p.detach() for p in own.values()]

    whole = final()
    monkeypatch.setitem(foreach.BATCH_NUMEL, "cpu", piece)
    assert_same_bits(final(), whole)


@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_compiled_is_close_to_reference(dtype: torch.dtype) -> None:
    options = {"weight_decay": 0.1, "max_grad_norm": 1.0}
    for got, want in zip(run("compiled", dtype, options), run("reference", dtype, options)):
        assert got.dtype == want.dtype
        bound = 1e-2 if got.dtype == torch.bfloat16 else TOLERANCE[got.dtype]
        assert relative_error(got, want.double().numpy()) <= bound


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    impl=st.sampled_from(["reference", "foreach"]),
    wd=st.sampled_from([0.0, 0.01, 0.5]),
    decoupled=st.booleans(),
    averaging=st.booleans(),
    corrected=st.booleans(),
    clip=st.sampled_from([None, 0.1, 10.0]),
    adapt=st.sampled_from(["all", "decayed", True, False]),
    trust=st.sampled_from([None, (0.0, 1.0), (0.5, 0.5)]),
    phi=st.sampled_from([None, (0.1, 0.4)]),
    maximize=st.booleans(),
)
def test_any_combination(
    shapes: list[tuple[int, ...]],
    impl: str,
    wd: float,
    decoupled: bool,
    averaging: bool,
    corrected: bool,
    clip: float | None,
    adapt: str | bool,
    trust: tuple[float, float] | None,
    phi: tuple[float, float] | None,
    maximize: bool,
) -> None:
    generator = torch.Generator().manual_seed(2)
    params: dict[str, Tensor] = {
        f"p{i}": nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for i, shape in enumerate(shapes)
    }
    assert_follows_numpy(
        params,
        [(list(params), {})],
        impl,
        steps=2,
        lr=0.05,
        weight_decay=wd,
        decoupled=decoupled,
        grad_averaging=averaging,
        bias_correction=corrected,
        max_grad_norm=clip,
        adapt=adapt,
        trust_clip=trust,
        phi=phi,
        maximize=maximize,
    )


# --- single equations ----------------------------------------------------------------------------


def hyper(**options: Any) -> adam.Hyperparameters:
    row = adam.hyperparameters({**DEFAULTS, **options})
    return adam.Hyperparameters(*torch.tensor([row], dtype=torch.float64).unbind(1))


@pytest.mark.parametrize(
    ("norm", "limit", "expected"),
    [
        (2.0, 1.0, 0.5),
        (0.5, 1.0, 1.0),
        (0.0, 1.0, 1.0),
        (float("inf"), 1.0, 0.0),
        (float("inf"), float("inf"), 1.0),
        (float("nan"), float("inf"), 1.0),
        (float("nan"), 1.0, float("nan")),
    ],
)
def test_clip_coefficient(norm: float, limit: float, expected: float) -> None:
    squared = torch.tensor(norm, dtype=torch.float64).square()
    got = trust.clip_coefficient(squared, torch.tensor([limit], dtype=torch.float64))
    np.testing.assert_equal(got.tolist(), [expected])


@pytest.mark.parametrize(
    ("x_norm", "u_norm", "options", "expected"),
    [
        (3.0, 2.0, {}, 1.5),
        (0.0, 2.0, {}, 1.0),
        (3.0, 0.0, {}, 1.0),
        (0.0, 0.0, {}, 1.0),
        (0.0, 2.0, {"phi": (0.5, 1.0)}, 1.0),
        (3.0, 2.0, {"phi": (0.0, 1.0)}, 0.5),
        (3.0, 2.0, {"phi": (5.0, 9.0)}, 2.5),
        (3.0, 2.0, {"trust_clip": (0.0, 1.0)}, 1.0),
        (3.0, 2.0, {"trust_clip": (2.0, 4.0)}, 2.0),
        (0.0, 2.0, {"trust_clip": (2.0, 4.0)}, 1.0),
        (3.0, 2.0, {"adapt": False}, 1.0),
        (3.0, 2.0, {"adapt": "decayed"}, 1.5),
        (3.0, 2.0, {"adapt": "decayed", "weight_decay": 0.0}, 1.0),
        (3.0, float("nan"), {}, float("nan")),
        (3.0, float("nan"), {"trust_clip": (0.0, 1.0)}, float("nan")),
    ],
)
def test_trust_ratio(
    x_norm: float, u_norm: float, options: dict[str, Any], expected: float
) -> None:
    x_sq, u_sq = torch.tensor([[x_norm**2], [u_norm**2]], dtype=torch.float64)
    np.testing.assert_equal(trust.trust_ratio(x_sq, u_sq, hyper(**options)).tolist(), [expected])


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_inactive_params_keep_their_moments(eps: float) -> None:
    """Whatever the gradient holds: after an overflow it is infinite or NaN."""
    h, rule = hyper(eps=eps, decoupled=False, weight_decay=0.1), RULES["lamb"]
    c = rule.coefficients(h, torch.ones(1, dtype=torch.float64), ())
    numbers = Numbers(grad_scale=torch.ones(1, dtype=torch.float64), c=c)
    kept = only_where(torch.tensor([False]), numbers, rule, guard=True).map(lambda v: v[0])
    m, v, x = (torch.rand(4, dtype=torch.float64) for _ in range(3))
    grad = torch.tensor([float("inf"), float("nan"), -float("inf"), 1.0], dtype=torch.float64)
    g = rule.gradient(grad.where(kept.active, 0.0) * kept.grad_scale, x, kept.c)
    m_new, v_new = rule.update(g, x, (m, v), kept.c)
    assert torch.equal(m_new, m)
    assert torch.equal(v_new, v)
    (u,) = rule.directions(g, x, (m_new, v_new), kept.c)
    assert u.isfinite().all()


def test_decay_enters_in_one_place() -> None:
    for decoupled, wd in itertools.product((True, False), (0.0, 0.25)):
        h = hyper(decoupled=decoupled, weight_decay=wd)
        assert float(h.decay) == (wd if decoupled else 0.0)
        assert float(h.l2) == (0.0 if decoupled else wd)
