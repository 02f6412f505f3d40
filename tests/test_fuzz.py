"""Random courses of steps and edits against LAMB in float64: see fuzz_steps.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fuzz_steps
import pytest

WORLDS = (1, 2, 3)
#: (impl, seeds in CI, seeds of the long run)
LAMB = [
    pytest.param("reference", 3, 600, id="reference"),
    pytest.param("foreach", 8, 1200, id="foreach"),
    pytest.param("compiled", 1, 40, id="compiled", marks=pytest.mark.xdist_group("compile")),
    pytest.param("triton", 1, 150, id="triton", marks=pytest.mark.xdist_group("triton")),
]
SHARDED = [
    pytest.param("foreach", 2, 200, id="foreach"),
    pytest.param("triton", 1, 30, id="triton", marks=pytest.mark.xdist_group("triton")),
]


def _fuzz(impl: str, seeds: range, world: int = 0) -> None:
    """In a process of its own: edits to torch's settings, and Triton's interpreter, stay there."""
    if impl == "triton":
        pytest.importorskip("triton")
    program = Path(fuzz_steps.__file__)
    command = [sys.executable, str(program), "--impl", impl, "--world", str(world), "--stop"]
    done = subprocess.run(
        [*command, "--seeds", f"{seeds.start}:{seeds.stop}"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("impl", "few", "many"), LAMB)
def test_lamb(impl: str, few: int, many: int) -> None:
    _fuzz(impl, range(few))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("impl", "few", "many"), SHARDED[:1])  # the interpreter is slow
def test_sharded(impl: str, few: int, many: int, world: int) -> None:
    _fuzz(impl, range(few), world)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("impl", "few", "many"), LAMB)
def test_lamb_for_long(impl: str, few: int, many: int) -> None:
    _fuzz(impl, range(1000, 1000 + many))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("impl", "few", "many"), SHARDED)
def test_sharded_for_long(impl: str, few: int, many: int, world: int) -> None:
    _fuzz(impl, range(1000, 1000 + many), world)
