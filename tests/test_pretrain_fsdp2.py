"""launch/pretrain.py with engine ``fsdp2``: the curve and the checkpoints of engine ``sharded``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from pretrain_runs import crash, difference, run_here, run_on_ranks
from pretraining.report import read_log

from dist_lamb.checkpoint import Checkpoint, checkpoints

pytestmark = pytest.mark.usefixtures("no_process_group_left")

FSDP2 = "optim.engine=fsdp2"


@pytest.mark.xdist_group("programs")
def test_same_curve_as_sharded_and_resume_across_engines(config: Path, tmp_path: Path) -> None:
    sharded = run_here(config, tmp_path / "sharded")
    assert sharded[-1]["loss"] < sharded[0]["loss"] - 0.3

    broken = tmp_path / "broken"
    with pytest.raises(RuntimeError, match=r"exit codes \[9, 9\]"):
        run_on_ranks(config, broken, FSDP2, before=crash)
    assert [path.name for path in checkpoints(broken / "checkpoints")] == ["step-5"]
    other = tmp_path / "other"
    shutil.copytree(broken, other)

    # two ranks of fsdp2 go on with what they saved, and one of sharded does
    printed = run_on_ranks(config, broken, FSDP2)
    assert "engine fsdp2, " in printed
    assert "resumed at step 5" in printed
    two = read_log(broken / "log.jsonl")
    print(f"largest difference of losses, fsdp2 and sharded: {difference(sharded, two):.1e}")
    assert difference(sharded, two) < 1e-3
    assert difference(sharded, run_here(config, other)) < 1e-3
    # the same names and shapes, for BertForMaskedLM and for either engine
    saved = [
        Checkpoint(tmp_path / run / "checkpoints" / "step-12") for run in ("sharded", "broken")
    ]
    shapes = [
        {key: (e.shape, e.dtype) for key, e in content.tensors.items() if key != "rng"}
        for content in saved
    ]
    assert shapes[0] == shapes[1]

    # bf16 is what the layers compute in, and only that
    exact = run_here(config, tmp_path / "float32", FSDP2)
    halved = run_here(config, tmp_path / "bf16", FSDP2, "train.autocast=bf16")
    assert 1e-5 < difference(exact, halved) < 0.1
    state = Checkpoint(tmp_path / "bf16" / "checkpoints" / "step-12")
    assert {entry.dtype for key, entry in state.tensors.items() if key != "rng"} == {torch.float32}
