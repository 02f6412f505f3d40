"""launch/examples/vision_lars.py learns, on two ranks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

FOLDER = Path(__file__).parent.parent / "launch" / "examples"


def example(name: str) -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


def _losses(rank: int, world: int) -> list[float]:
    losses: list[float] = example("vision_lars").main("cpu")
    return losses


@pytest.mark.xdist_group("programs")
def test_lars(tmp_path: Path) -> None:
    for losses in run_ranks(2, tmp_path, _losses):
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5]), losses
