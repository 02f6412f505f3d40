"""Random schedules of ranks, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import fuzz_ranks
import pytest

pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.parametrize("world", [2, 3])
def test_schedules(tmp_path: Path, world: int) -> None:
    """Right to the bit, or the same error on all ranks; both occur."""
    ends = fuzz_ranks.check(range(16), world, tmp_path)
    assert min(ends.values()) > 0, ends


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", [2, 3])
def test_many_schedules(tmp_path: Path, world: int) -> None:
    ends = fuzz_ranks.check(range(1000, 2500), world, tmp_path, timeout=1700.0)
    assert min(ends.values()) > 0, ends
