"""The Triton kernels without a GPU: run by Triton's interpreter, against the reference."""

from __future__ import annotations

import functools
import math
import multiprocessing as mp
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fused_cases
import golden
import models
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb, kernels, rules

pytest.importorskip("triton")


pytestmark = pytest.mark.xdist_group("triton")

CPU = torch.device("cpu")


def _golden_error(name: str, cls: Any) -> float:
    trajectory = golden.Trajectory.load(name)
    return trajectory.worst_error(lambda g: cls(g, impl="triton", **trajectory.options))


#: the others differ in options that the random models below have too
IN_CI = ("apex_nvlamb", "optax_v5_masked_clip")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in IN_CI)) for n in golden.NAMES],
)
def test_golden(interpreted: Callable[..., Any], name: str) -> None:
    assert interpreted(_golden_error, name, Lamb) <= golden.TOLERANCE


@pytest.mark.parametrize("name", ["adagrad_torch_l2", "adamh_levanter", "stableadamw_optimi"])
def test_other_rules(interpreted: Callable[..., Any], name: str) -> None:
    assert interpreted(_golden_error, name, Lamb) <= golden.TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("name", golden.FAMILY)
def test_every_rule(interpreted: Callable[..., Any], name: str, cls: Any) -> None:
    assert interpreted(_golden_error, name, cls) <= golden.TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "optax_v5_masked_clip",
        pytest.param("apex_default", marks=pytest.mark.slow),
        pytest.param("apex_l2_noavg", marks=pytest.mark.slow),
    ],
)
def test_golden_sharded(interpreted: Callable[..., Any], name: str) -> None:
    assert interpreted(_golden_error, name, ShardedLamb) <= golden.TOLERANCE


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in (4, 5))]
)
def test_random_models(interpreted: Callable[..., Any], seed: int) -> None:
    """Dtypes, sizes around a block, unaligned views, options, absent gradients, loss scaling."""
    interpreted(fused_cases.check, seed, "cpu")


# --- steps ---------------------------------------------------------------------------------------


def _dummy_step(cls: Any, options: dict[str, Any]) -> None:
    params = models.make_params()
    optimizer = cls(models.groups_of(params), impl="triton", **options)
    start = {n: p.detach().clone() for n, p in params.items()}
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in params.items():
        assert torch.equal(p, start[name]), name
        state = optimizer.state[p]
        assert state["step"] == 0
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    for group, lr in zip(optimizer.param_groups, lrs):
        group["lr"] = lr
    for n, g in models.mean_gradients(params, 0).items():
        params[n].grad = g
    optimizer.step()
    counted = {n for n, p in params.items() if optimizer.state[p]["step"] == 1}
    assert counted == set(params)


@pytest.mark.parametrize(
    ("cls", "options"), [(Lamb, {}), (ShardedLamb, {"decoupled": False, "max_grad_norm": 1.0})]
)
def test_a_dummy_step_leaves_no_trace(
    interpreted: Callable[..., Any], cls: Any, options: dict[str, Any]
) -> None:
    interpreted(_dummy_step, cls, options)


def _launches(cls: Any, count: int, clip: float | None, rule: str = "lamb") -> list[str]:
    from dist_lamb.kernels._triton_private import Launches

    params = [nn.Parameter(torch.ones(3 + i % 2)) for i in range(count)]
    groups = [{"params": [p], "weight_decay": i / 100} for i, p in enumerate(params)]
    optimizer = cls(groups, impl="triton", max_grad_norm=clip, rule=rule)
    names: list[str] = []
    plain = Launches.__call__

    def counted(self: Any, kernel: Any, *args: Any, **how: Any) -> None:
        names.append(kernel.fn.__name__)
        plain(self, kernel, *args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launches, "__call__", counted)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return names


@pytest.mark.parametrize(("cls", "clip"), [(Lamb, None), (ShardedLamb, 1.0)])
def test_launches_do_not_grow_with_the_model(
    interpreted: Callable[..., Any], cls: Any, clip: float | None
) -> None:
    expected = ["grad_sq"] * bool(clip) + ["moments_pass", "norms", "apply"]
    for count in (1, 20):
        assert interpreted(_launches, cls, count, clip) == expected


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("adamw", ["moments_pass", "norms"]),
        ("lars", ["early_pass", "early_sums", "moments_pass", "norms"]),
        ("lans", ["early_pass", "early_sums", "moments_pass", "norms", "apply"]),
    ],
)
def test_launches_of_other_rules(
    interpreted: Callable[..., Any], rule: str, expected: list[str]
) -> None:
    assert interpreted(_launches, Lamb, 20, None, rule) == expected


# --- ranks ----------------------------------------------------------------------------------------


def _train(rank: int, world: int) -> list[str]:
    digests = []
    for clip in (None, 1.0):
        params = models.make_params()
        options = {"impl": "triton", "max_grad_norm": clip, "bucket_numel": 2**13}
        optimizer = ShardedLamb(models.groups_of(params), lr=0.02, **options)
        for t in range(3):
            mean = models.mean_gradients(params, t, ("fc.weight",) if t == 1 else ())
            for name, g in models.rank_gradients(mean, rank, world, t).items():
                params[name].grad = g
            optimizer.found_inf = torch.tensor([float(t == 2 and rank == 0)])
            optimizer.step()
            optimizer.zero_grad()
        full = optimizer.full_optimizer_state_dict()["state"]
        found = {n: p.detach() for n, p in params.items()}
        found |= {f"{i} {n}": t for i, state in full.items() for n, t in state.items()}
        assert found["emb.weight"].isfinite().all()
        assert max(float(t) for n, t in found.items() if n.endswith(" step")) == 2
        digests.append(models.digest(found))
    # too small for a piece on each rank
    tiny = nn.Parameter(torch.ones(3))
    optimizer = ShardedLamb([tiny], impl="triton", stage=1)
    tiny.sum().backward()
    optimizer.step()
    assert float(tiny[0]) < 1.0
    return [*digests, models.digest({"tiny": tiny.detach()})]


def test_same_bits_at_every_world_size(
    interpreted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an absent gradient, an overflow that one rank alone has seen, and a rank that has no
    element of anything."""
    alone = interpreted(_train, 0, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run_ranks(2, tmp_path, _train) == [alone, alone]


def _narrow() -> None:
    import test_narrow

    test_narrow._check_norms("triton")
    # The interpreter cuts bfloat16 copies of masters off: none of these has any.
    cases = [(torch.float32, test_narrow.FORMATS[0]), (torch.bfloat16, test_narrow.NARROW)]
    test_narrow._check_backend("triton", cases=cases)


def test_narrow_states(interpreted: Callable[..., Any]) -> None:
    """As on the other backends: what is stored is what counts, in both norms; the same rounding."""
    interpreted(_narrow)


def _vector(*shape: int, transposed: bool = False, gradient: bool = True) -> Tensor:
    p = torch.linspace(-1.0, 1.0, math.prod(shape)).view(shape)
    p = p.t() if transposed else p
    p.grad = torch.ones_like(p) if gradient else None
    return p


def _uneven() -> None:
    other = {"rule": "adamw"}
    cases: list[Callable[[], list[dict[str, Any]]]] = [
        lambda: [{"params": [_vector(4)]}, {"params": [_vector(3, gradient=False)], **other}],
        lambda: [{"params": [_vector(4)]}, {"params": [_vector(0, 3)], **other}],
        lambda: [
            {"params": [_vector(7, 5, transposed=True)]},
            {"params": [_vector(9)], "state_format": "bfloat16"},
        ],
    ]
    for case in cases:
        found = []
        for impl in ("triton", "reference"):
            groups = case()
            Lamb(groups, impl=impl).step()
            found.append(torch.cat([p.flatten() for group in groups for p in group["params"]]))
        torch.testing.assert_close(*found, atol=2e-5, rtol=0)


def test_rules_without_a_segment_and_wide_states_beside_narrow(
    interpreted: Callable[..., Any],
) -> None:
    """A rule none of whose params has a gradient; a transposed param with float32 states."""
    interpreted(_uneven)


# --- choosing it ----------------------------------------------------------------------------------


def _interpreting() -> bool:
    return kernels.uses_triton("triton", CPU, [torch.float32])


def test_triton_that_cannot_run_says_why(
    interpreted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interpreted(_interpreting)
    if "TRITON_INTERPRET" not in os.environ:
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        for cls in (Lamb, ShardedLamb):
            with pytest.raises(RuntimeError, match="runs on CUDA and ROCm devices, and params are"):
                cls([p], impl="triton").step()
    monkeypatch.setattr(kernels, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="needs the triton package, which is not installed"):
        kernels.uses_triton("triton", CPU, [torch.float32])


def test_auto_on_a_gpu() -> None:
    gpu = torch.device("cuda", 0)
    single, double = torch.float32, torch.float64
    assert kernels.uses_triton("auto", gpu, [single])
    assert not kernels.uses_triton("auto", gpu, [single, double])
    assert not kernels.uses_triton("auto", CPU, [single])
    assert not kernels.uses_triton("foreach", gpu, [single])


# --- for GPUs that are not here ------------------------------------------------------------------


def _compiled_for(
    arch: int, kind: int, rule_name: str = "lamb", formats: tuple[int, int] = (0, 0)
) -> dict[str, str]:
    """PTX of a rule's kernels, for gradients and copies of one kind; kinds of states and of x."""
    os.environ.pop("TRITON_INTERPRET", None)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dist_lamb.kernels import triton_kernels, triton_math

    types = {
        "chunks": "*i32", "num_chunks": "i32", "segments": "*i64", "num_segments": "i32",
        "groups": "*fp64", "counters": "*fp32", "active": "*i1", "partials": "*fp64",
        "steps": "*fp32", "numels": "*fp64", "param_table": "*i32", "totals": "*fp64",
        "ratios": "*fp32",
    }  # fmt: skip
    found = {}
    rule = rules.RULES[rule_name]
    if rule.early:
        types["early"] = "*fp64"
    for kernel in vars(triton_kernels.of(rule)).values():
        names = kernel.arg_names
        constants: dict[str, Any] = dict.fromkeys(n for n in names if n not in types)
        given = {
            "KIND": kind,
            "NORM": False,
            "BLOCK": triton_math.BLOCK,
            "COPY_KIND": 0 if formats[1] else kind,
        }
        given |= {"ONCE": not rule.late, "COLUMNS": rule.columns, "LR_ZERO": False}
        given |= {"SUM": True, "FINISH": True, "DIMS": 1}
        given |= {"STATE_KIND": formats[0], "X_KIND": formats[1]}
        constants |= {n: value for n, value in given.items() if n in names}
        source = ASTSource(
            fn=kernel,
            signature={n: types.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): value for n, value in constants.items()},
        )
        options = {"num_warps": triton_math.WARPS, "enable_fp_fusion": False}
        target = GPUTarget("cuda", arch, 32)
        found[kernel.__name__] = triton.compile(source, target=target, options=options).asm["ptx"]
    return found


def _format_kernels() -> dict[str, str]:
    """PTX of the kernels that show the storage formats."""
    os.environ.pop("TRITON_INTERPRET", None)
    import format_kernels
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"x": "*fp32", "r": "*i32", "n": "i32", "rows": "*i64"}
    found = {}
    for kernel, out in ((format_kernels.all_formats, "*i32"), (format_kernels.all_numbers, "*i64")):
        names, constants = kernel.arg_names, {"DIMS": 3, "BLOCK": format_kernels.BLOCK}
        source = ASTSource(
            fn=kernel,
            signature={n: {**types, "out": out}.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): v for n, v in constants.items() if n in names},
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        found[kernel.__name__] = ptx
    return found


@pytest.fixture(scope="module")
def compiler() -> Iterator[Callable[..., Any]]:
    """Calls functions in a process that does not interpret."""
    with mp.get_context("spawn").Pool(1) as pool:
        yield lambda f, *args: pool.apply(f, args)


@pytest.fixture(scope="module")
def compile_for(compiler: Callable[..., Any]) -> Callable[..., dict[str, str]]:
    """:func:`_compiled_for` in that process."""
    return functools.partial(compiler, _compiled_for)


def test_storage_formats_compile(compiler: Callable[..., Any]) -> None:
    """Functions that call each other: the compiler takes none that was not jitted."""
    ptx = compiler(_format_kernels)
    assert ptx.keys() == {"all_formats", "all_numbers"}
    assert "fma.rn.f32" not in ptx["all_formats"]


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_to_16_byte_accesses(compile_for: Callable[..., Any], arch: int) -> None:
    """The interpreter takes what the compiler refuses; and it knows nothing of accesses."""
    for kind, tensors in {0: 4, 1: 3, 3: 4}.items():  # float32, bfloat16, mixed
        ptx = compile_for(arch, kind)
        # x, m, v and a float32 gradient; without the copies, which are written
        assert ptx["moments_pass"].count("ld.global.v4.b32") == tensors, kind
        assert ptx["moments_pass"].count("st.global.v4.b32") == 2
        assert ptx["apply"].count("ld.global.v4.b32") == 3
        assert ptx["apply"].count("st.global.v4.b32") == 1
        assert "fma.rn.f32" not in ptx["moments_pass"]  # products and sums rounded apart


def test_narrow_states_compile_to_wide_accesses(compile_for: Callable[..., Any]) -> None:
    """Of 16 bytes for float32, and of the 8 that a thread's 4 numbers take in bfloat16."""
    from dist_lamb.kernels.triton_math import NARROW_STAGES

    found = [compile_for(90, k, "lamb", f) for k, f in NARROW_KINDS]
    stages = NARROW_STAGES.value
    # (16 bytes read, 8 bytes read, 16 written, 8 written): states, then params
    for ptx, moments, apply in zip(found, NARROW_MOMENTS, NARROW_APPLY, strict=True):
        for name, (r16, r8, w16, w8) in (("moments_pass", moments), ("apply", apply)):
            # Read ahead into shared memory: before the loop, and in it.
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*, 0x(8|10), ", ptx[name])
            assert copies.count("10") == r16 * stages, name
            assert copies.count("8") == r8 * stages, name
            written = [ptx[name].count(f"st.global.{width}.b32") for width in ("v4", "v2")]
            assert written == [w16, w8], name
        assert "fma.rn.f32" not in ptx["moments_pass"]


#: float32 gradients and params with bfloat16 states; bfloat16 ones with remainders, and both
NARROW_KINDS = [(0, (1, 0)), (1, (0, 1)), (1, (1, 1))]
NARROW_MOMENTS = [(2, 2, 0, 2), (2, 3, 2, 0), (0, 5, 0, 2)]
NARROW_APPLY = [(1, 2, 1, 0), (2, 2, 0, 2), (0, 4, 0, 2)]


@pytest.mark.parametrize("name", [name for name in rules.RULES if name != "lamb"])
def test_every_rule_compiles_to_16_byte_accesses(
    compile_for: Callable[..., Any], name: str
) -> None:
    states = len(rules.RULES[name].states)
    ptx = compile_for(90, 0, name)
    once = not rules.RULES[name].late
    # stable_adamw's sum has no x in it
    reads_x = name != "stable_adamw"
    assert ptx["moments_pass"].count("ld.global.v4.b32") == 1 + reads_x + states
    assert ptx["moments_pass"].count("st.global.v4.b32") == states + once
    assert "fma.rn.f32" not in ptx["moments_pass"]
    if not once:
        reads = 1 + states + rules.RULES[name].reads_grad
        assert ptx["apply"].count("ld.global.v4.b32") == reads
        assert ptx["apply"].count("st.global.v4.b32") == 1
