"""How numbers of the host come to the device without either waiting for the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def upload(t: Tensor, device: torch.device, keep: list[Any], out: Tensor | None = None) -> Tensor:
    """``t`` on ``device``, into ``out`` where that is given, without waiting for it.

    ``keep`` is for what a CUDA graph goes on reading: it copies again at every replay.
    """
    if device.type == "cpu":
        return t.clone() if out is None else out.copy_(t)
    pinned = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True).copy_(t)
    if out is None:
        out = torch.empty(t.shape, dtype=t.dtype, device=device)
    out.copy_(pinned, non_blocking=True)
    if capturing(device):
        keep += [pinned, out]
    return out


def mask_of(positions: Iterable[int], count: int, device: torch.device, keep: list[Any]) -> Tensor:
    """bool [count] on ``device``, True at ``positions``; else as :func:`upload`."""
    mask = torch.zeros(count, dtype=torch.bool, device="cpu")
    mask[list(positions)] = True
    return upload(mask, device, keep)


def int64(values: Sequence[Any]) -> Tensor:
    """On the host, whatever torch's default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")
