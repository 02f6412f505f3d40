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


@pytest.mark.slow
@pytest.mark.xdist_group("compile")
@pytest.mark.parametrize("name", golden.FAMILY)
def test_other_rules_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    test_lamb(name, "compiled", monkeypatch)


def _replay(rank: int, group: Any) -> dict[str, Any]:
    """Worst error of each file, impl and stage, and a digest of the final params."""
    found = {}
    for name in golden.ALL:
        trajectory = golden.Trajectory.load(name).with_spare_bits(2)
        of_lamb = name in golden.NAMES
        for impl in IMPLS if of_lamb else ("foreach",):
            for stage in (1, 2) if of_lamb else (2,):
                params: dict[str, Any] = {}

                def make(
                    groups: Any,
                    params: dict[str, Any] = params,
                    impl: str = impl,
                    stage: int = stage,
                    options: dict[str, Any] = trajectory.options,
                ) -> ShardedLamb:
                    params.update((n, p) for g in groups for n, p in g["params"])
                    return ShardedLamb(
                        groups, impl=impl, stage=stage, process_group=group, **options
                    )

                error = trajectory.worst_error(make)
                found[f"{name} {impl} {stage}"] = (error, models.digest(params))
    return found


@pytest.mark.xdist_group("distributed")
def test_sharded_at_every_world_size(tmp_path: Path) -> None:
    """Within the bound at W = 1, 2, 3, 4, and with the same final bits at all of them."""
    ranks = run_ranks(4, tmp_path, each_world, _replay)
    expected = ranks[0][1]
    assert len(expected) == len(golden.NAMES) * len(IMPLS) * 2 + len(golden.FAMILY)
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
    assert torch.isfinite(golden.Trajectory.load("optax_v5").params[-1]["emb.weight"]).all()
