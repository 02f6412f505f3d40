"""Params whose memory overlaps: one step would write an element twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .state import is_dense


def first_overlap(named: Sequence[tuple[str, Tensor]]) -> str | None:
    """What overlaps, for an error: one tensor with itself, or two tensors; None: nothing does.

    Views of one tensor that interleave without sharing an element are no overlap.
    """
    by_storage: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for name, t in named:
        if t.numel() and t.device.type != "meta":
            ranges = by_storage.setdefault(t.untyped_storage().data_ptr(), [])
            ranges.append((t.data_ptr(), t.data_ptr() + _nbytes(t), name, t))
    for ranges in by_storage.values():
        ranges.sort(key=lambda r: r[0])
        for cluster in _clusters(ranges):
            names = _shared([(name, t) for _, _, name, t in cluster], cluster[0][0])
            if names:
                return names
    return None


def _clusters(
    ranges: Sequence[tuple[int, int, str, Tensor]],
) -> Iterator[list[tuple[int, int, str, Tensor]]]:
    """Neighbours whose ranges of addresses meet, and single tensors that may overlap themselves."""
    cluster, end = [ranges[0]], ranges[0][1]
    for here in ranges[1:]:
        if here[0] >= end:
            yield cluster
            cluster = []
        cluster.append(here)
        end = max(end, here[1])
    yield cluster


def _shared(cluster: Sequence[tuple[str, Tensor]], start: int) -> str | None:
    if len(cluster) == 1 and is_dense(cluster[0][1]):
        return None
    # One byte for each byte of the range: marked where a tensor has an element.
    ends = [t.data_ptr() - start + _nbytes(t) for _, t in cluster]
    marks = torch.zeros(max(ends), dtype=torch.bool, device="cpu")
    owners: list[tuple[str, Tensor]] = []
    for name, t in cluster:
        size = t.element_size()
        shape = (*t.shape, size)
        strides = (*(s * size for s in t.stride()), 1)
        here = marks.as_strided(shape, strides, t.data_ptr() - start)
        if bool(here.any()):
            others = ", ".join(other for other, _ in owners)
            return f"{name} shares memory with {others}"
        before = int(marks.sum())
        here.fill_(True)
        if int(marks.sum()) - before != t.numel() * size:
            return f"{name} has elements that share memory (an expanded tensor)"
        owners.append((name, t))
    return None


def _nbytes(t: Tensor) -> int:
    """From its first byte to its last."""
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1
    return span * t.element_size()
