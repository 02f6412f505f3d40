"""launch/ with DeepSpeed: the engine of pretrain.py."""

from __future__ import annotations

import fcntl
import json
import multiprocessing as mp
import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pretrain_runs import ROOT, run_here, run_on_ranks, torchrun
from pretraining import deepspeed_ops
from pretraining.config import ConfigError, OptimConfig
from pretraining.engine_deepspeed import read_config
from pretraining.report import read_log

pytestmark = [
    pytest.mark.xdist_group("programs"),
    pytest.mark.usefixtures("no_process_group_left"),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.filterwarnings("ignore:Unable to enable fault handler"),
]

PRETRAIN = ROOT / "launch" / "pretrain.py"


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in log if row["kind"] in ("train", "held_out")]


def stale_batons(root: Path) -> list[Path]:
    """In a folder of extensions ``root``, what processes that were killed while compiling left:
    one of our engine, and one of another program, which may be at work still."""
    prepared = deepspeed_ops.extensions_dir()
    own = root / prepared.relative_to(prepared.parents[1])
    if prepared.exists():
        shutil.copytree(prepared, own)
    batons = [folder / "deepspeed_shm_comm" / "lock" for folder in (own, root)]
    for baton in batons:
        baton.parent.mkdir(parents=True, exist_ok=True)
        baton.touch()
    return batons


@pytest.mark.deepspeed_ops
def test_same_curve_as_sharded(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 2 ranks at stage 2; and a run of engine sharded that goes on at stage 3. Where processes
    were killed while they compiled DeepSpeed's operations."""
    own, others = stale_batons(tmp_path / "extensions")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    want = run_here(config, tmp_path / "sharded")
    torchrun(PRETRAIN, config, tmp_path / "ds", "optim.engine=deepspeed")
    got = read_log(tmp_path / "ds" / "log.jsonl")
    assert len(got) == len(want)
    assert losses(got) == pytest.approx(losses(want), abs=1e-3)
    assert [row.get("trust") is None for row in got] == [row.get("trust") is None for row in want]

    run_here(config, tmp_path / "half", "train.steps=6")
    shutil.copytree(tmp_path / "half", tmp_path / "moved")
    want = run_here(config, tmp_path / "half")
    run_on_ranks(config, tmp_path / "moved", "optim.engine=deepspeed", "optim.stage=3")
    moved = read_log(tmp_path / "moved" / "log.jsonl")
    assert len(moved) == len(want)
    assert losses(moved) == pytest.approx(losses(want), abs=1e-3)
    if (own.parent / deepspeed_ops.COMPLETE).exists():  # where there is a compiler
        assert not own.exists()
    assert [path.name for path in others.parent.iterdir()] == ["lock"]


def _hold(folder: Path, pipe: Any) -> None:
    with deepspeed_ops.exclusive(folder):
        pipe.send("held")
        time.sleep(1000)


def test_extensions_folder_is_free_when_its_owner_dies(tmp_path: Path) -> None:
    """What it had compiled stays; what it was compiling goes, with the compilers' folder."""
    ours, theirs = mp.Pipe()
    owner = mp.get_context("fork").Process(target=_hold, args=(tmp_path, theirs))
    owner.start()
    try:
        assert ours.recv() == "held"
        done, half = tmp_path / "done", tmp_path / "half"
        for folder in (done, half):
            folder.mkdir()
            (folder / "lock").touch()
            (folder / "op.so").touch()
        (done / deepspeed_ops.COMPLETE).touch()
        file = os.open(tmp_path / "owner.lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(file)
    finally:
        owner.kill()
        owner.join()
    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    with deepspeed_ops.exclusive(tmp_path):
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "owner.lock"]
        assert sorted(path.name for path in done.iterdir()) == ["complete", "op.so"]
    assert os.environ.get("TORCH_EXTENSIONS_DIR") == before


def test_extensions_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="file/own: Not a directory; set TORCH_EXTENSIONS_DIR"),
        deepspeed_ops.exclusive(tmp_path / "file" / "own"),
    ):
        pass


def test_config_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"

    def read(content: Any, **more: Any) -> dict[str, Any]:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        optim = {"engine": "deepspeed", "lr": 1e-3, "base_batch": 1, "warmup_fraction": 0.1}
        return read_config(OptimConfig(**optim, deepspeed=str(path), **more))

    zero = {"zero_optimization": {"stage": 2}}
    assert read(zero)["gradient_clipping"] == 1.0
    for content, told in [
        ("{", "is not JSON"),
        ({"zero_optimization": {"stage": 3}}, "is for ZeRO stage 3, optim.stage is 2"),
        (
            zero | {"gradient_clipping": 0.5},
            "has gradient_clipping 0.5, optim.max_grad_norm is 1.0",
        ),
        (zero | {"train_batch_size": 8}, r"remove train_batch_size, which is set in \[train\]"),
        (zero | {"bf16": {"enabled": True}}, "communication_data_type"),
        (zero | {"optimizer": {"type": "Lamb"}}, r"remove optimizer, which is set in \[optim\]"),
    ]:
        with pytest.raises(ConfigError, match=told):
            read(content)
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(
            OptimConfig(
                engine="deepspeed", deepspeed="no.json", lr=1e-3, base_batch=1, warmup_fraction=0.1
            )
        )
    for stage in range(4):
        optim = OptimConfig(
            engine="deepspeed", stage=stage, lr=1e-3, base_batch=1, warmup_fraction=0.1
        )
        assert read_config(optim)["zero_optimization"]["stage"] == stage
