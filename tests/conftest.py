from __future__ import annotations

import os

import pytest

# Every pytest worker computes on small tensors: threads would only fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)
