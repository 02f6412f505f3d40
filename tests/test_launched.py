"""ShardedLamb in scripts that torchrun starts: own loops, Hugging Face's Trainer, Lightning."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import launched_runs
import pytest

pytestmark = pytest.mark.xdist_group("programs")


def _launch(kind: str) -> None:
    program = Path(launched_runs.__file__)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(program), kind],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo",
        },
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280.0,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("all is well") == 2, done.stdout


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


def test_own_loops() -> None:
    """Made before the process group, or under DistributedDataParallel and FSDP."""
    _launch("own")


def test_trainer() -> None:
    _needs("transformers")
    _needs("accelerate")
    _launch("trainer")


@pytest.mark.slow  # test_examples.py has a run of it too
def test_lightning() -> None:
    _needs("lightning")
    _launch("lightning")
