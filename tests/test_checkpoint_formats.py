"""Checkpoints of every format that is still read, as the program of their time wrote them.

``tests/formats/<number>/`` holds one of ShardedLamb on two ranks and one of Lamb, with and without
masters, and in ``expected.json`` the dtype, shape and SHA-256 that the model and the optimizer had
in the memory of the program that saved them.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import sign
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb, checkpoint
from dist_lamb.checkpoint import CheckpointError, files
from dist_lamb.checkpoint.json_codec import DTYPE_NAMES, memory_of

FOLDER = Path(__file__).parent / "formats"
NUMBERS = sorted(int(path.name) for path in FOLDER.iterdir())


def build(cls: Any, seed: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 3).bfloat16())
    named = list(net.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim > 1], "weight_decay": 0.05},
        {
            "params": [(n, p) for n, p in named if p.ndim < 2],
            "weight_decay": 0.0,
            "trust_clip": (0.01, 5.0),
        },
    ]
    return net, cls(groups, lr=0.5, max_grad_norm=1.0, nonfinite="skip")


def described(t: Tensor) -> list[Any]:
    t = t.detach().cpu().contiguous()
    digest = hashlib.sha256(bytes(memory_of(t))).hexdigest()
    return [DTYPE_NAMES[t.dtype], list(t.shape), digest]


def found_in(net: nn.Module, optimizer: Any) -> dict[str, list[Any]]:
    found = {f"model.{name}": described(t) for name, t in net.state_dict().items()}
    full = optimizer.full_optimizer_state_dict()
    names = [n for group in full["param_groups"] for n in group["param_names"]]
    ids = [i for group in full["param_groups"] for i in group["params"]]
    for name, i in zip(names, ids):
        for kind, value in full["state"].get(i, {}).items():
            found[f"optimizer.{name}.{kind}"] = described(value)
    return found


def test_the_present_format_is_there() -> None:
    assert files.VERSION in NUMBERS
    assert min(NUMBERS) == files.OLDEST_VERSION


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("writer", ["sharded", "lamb"])
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_an_old_checkpoint_loads_bit_by_bit(number: int, writer: str, cls: Any) -> None:
    expected = json.loads((FOLDER / str(number) / "expected.json").read_text())[writer]
    drawn = expected.pop("drawn", None)
    net, optimizer = build(cls, seed=11)
    stateful = {}
    if writer == "sharded":
        stateful["lr"] = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    saved = checkpoint.load(FOLDER / str(number) / writer, net, optimizer, stateful=stateful)
    assert (saved.step, saved.world_size) == (3, 2 if writer == "sharded" else 1)
    if drawn:
        assert described(torch.rand(4)) == drawn
    found = found_in(net, optimizer)
    for key, value in expected.items():
        assert found[key] == value, key
    assert sum("master" in key for key in expected) == 2
    # Lamb wrote no state of a param that never had a gradient; ShardedLamb has zeros there.
    rest = found.keys() - expected.keys()
    assert all(key.startswith("optimizer.1.bias.") for key in rest)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02]
    if writer == "sharded":
        assert saved.extra == {"tokens": (7, math.inf)}


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    source = FOLDER / str(files.VERSION) / "lamb" / "step-3"
    for i, (key, value, message) in enumerate(
        (
            ("version", 0, "format 0, of an older dist_lamb; this one reads formats 1 to 1"),
            ("version", 99, "format 99, of a newer dist_lamb"),
            ("version", "1", "not a checkpoint's manifest"),
            ("version", True, "not a checkpoint's manifest"),
            ("format", "another", "not a checkpoint's manifest"),
        )
    ):
        folder = tmp_path / str(i)
        shutil.copytree(source, folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        # of a newer one nothing else need be as it is here
        manifest = {**manifest, key: value, **({"more": 1} if value == 99 else {})}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        sign(folder)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.Checkpoint(folder)
