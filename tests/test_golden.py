"""Every execution path against the recorded trajectories of optax, apex and timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden
import models
import pytest
import torch
from ranks import WORLDS, each_world, run_ranks

from dist_lamb import Lamb, ShardedLamb
from dist_lamb.kernels import compiled

IMPLS = ("reference", "foreach", "compiled")


@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", golden.NAMES)
def test_lamb(name: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise tensors this small would go through foreach.
    monkeypatch.setattr(compiled, "SMALL_NUMEL", 4)
    monkeypatch.setattr(compiled, "ROW_NUMEL", 4)
    trajectory = golden.Trajectory.load(name)
    error = trajectory.worst_error(lambda groups: Lamb(groups, impl=impl, **trajectory.options))
    assert error <= golden.TOLERANCE


@pytest.mark.parametrize("name", golden.FAMILY)
def test_other_rules(name: str) -> None:
    trajectory = golden.Trajectory.load(name)
    for impl in ("reference", "foreach"):
        error = trajectory.worst_error(
            lambda groups, impl=impl: Lamb(groups, impl=impl, **trajectory.options)
        )
        assert error <= golden.TOLERANCE, impl


#: Early sums and two directions; all in one pass.
COMPILED = ("lans_apex", "lars_timm")


@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize(
    "name",
    [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in golden.FAMILY],
)
def test_other_rules_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_lamb(name, "compiled", monkeypatch)


#: File, impl and ZeRO stage.
Case = tuple[str, str, int]
ALL_TOGETHER = "all together"
EVERY_CASE: list[Case] = [
    *((name, impl, stage) for name in golden.NAMES for impl in IMPLS for stage in (1, 2)),
    *((name, impl, 2) for name in golden.FAMILY for impl in ("foreach", "compiled")),
    *((ALL_TOGETHER, impl, 1) for impl in IMPLS),
]
SOME_CASES: list[Case] = [
    (ALL_TOGETHER, "foreach", 2),
    ("optax_v5_masked_clip", "reference", 1),
    ("apex_l2_noavg", "foreach", 2),
]


def _replay(rank: int, group: Any, cases: list[Case]) -> dict[Case, tuple[float, str]]:
    """Worst error of each case, and a digest of the final params."""
    found = {}
    for name, impl, stage in cases:
        together = name == ALL_TOGETHER
        trajectory = golden.all_together() if together else golden.Trajectory.load(name)
        trajectory = trajectory.with_spare_bits(2)
        options: dict[str, Any] = {"impl": impl, "stage": stage, **trajectory.options}
        params: dict[str, Any] = {}

        def make(
            groups: Any, params: dict[str, Any] = params, options: dict[str, Any] = options
        ) -> ShardedLamb:
            params.update((n, p) for g in groups for n, p in g["params"])
            return ShardedLamb(groups, process_group=group, **options)

        error = trajectory.worst_error(make)
        found[name, impl, stage] = (error, models.digest(params))
    return found


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SOME_CASES, id="some"),
        pytest.param(EVERY_CASE, id="every", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_sharded_at_every_world_size(tmp_path: Path, cases: list[Case]) -> None:
    """Within the bound at W = 1, 2, 3, 4, and with the same final bits at all of them."""
    ranks = run_ranks(4, tmp_path, each_world, _replay, cases, timeout=1700)
    expected = ranks[0][1]
    assert list(expected) == cases
    for rank, worlds in enumerate(ranks):
        assert sorted(worlds) == [w for w in WORLDS if rank < w]
        for world, run in worlds.items():
            for key, (error, digest) in run.items():
                assert error <= golden.TOLERANCE, (key, world)
                assert digest == expected[key][1], (key, world)


def test_files_are_all_there() -> None:
    assert golden.NAMES == [
        "apex_default",
        "apex_l2_noavg",
        "apex_nvlamb",
        "optax_v5",
        "optax_v5_masked_clip",
        "timm_trust_clip",
    ]
    assert len(golden.all_together().init) == 6 * 20
    assert torch.isfinite(golden.Trajectory.load("optax_v5").params[-1]["emb.weight"]).all()
