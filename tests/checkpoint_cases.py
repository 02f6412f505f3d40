"""A module made of params: shared by the tests of checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def module_of(params: dict[str, Tensor]) -> nn.Module:
    """A module with these params under these names, and a buffer."""
    root = nn.Module()
    for name, p in params.items():
        *path, last = name.split(".")
        home = root
        for part in path:
            if not hasattr(home, part):
                home.add_module(part, nn.Module())
            home = getattr(home, part)
        home.register_parameter(last, p)  # type: ignore[arg-type]
    root.register_buffer("seen", torch.tensor(7))
    return root
