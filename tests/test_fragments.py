"""dist_lamb/checkpoint/fragments.py: pieces of a tensor's memory as boxes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_lamb.checkpoint.fragments import Fragment, boxes


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_boxes_tile_an_interval(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    stop = data.draw(st.integers(start, whole.numel()))
    cut = list(boxes(shape, start, stop))
    assert len(cut) <= max(1, 2 * len(shape) - 1)
    pieces = [whole[tuple(slice(o, o + n) for o, n in zip(*box))].reshape(-1) for box in cut]
    assert torch.cat([torch.arange(0), *pieces]).tolist() == list(range(start, stop))


@given(st.permutations(range(4)), st.integers(0, 120), st.integers(0, 120))
def test_fragments_of_any_memory_order(order: list[int], a: int, b: int) -> None:
    start, stop = min(a, b), max(a, b)
    whole = torch.empty([(2, 3, 4, 5)[d] for d in order]).permute(
        [order.index(d) for d in range(4)]
    )
    assert whole.shape == (2, 3, 4, 5)
    memory = whole.as_strided((120,), (1,))
    memory.copy_(torch.arange(120))
    fragment = Fragment(whole.shape, whole.stride(), start, memory[start:stop])
    found = torch.full_like(whole, -1.0)
    for offsets, part in fragment.parts.items():
        found[tuple(slice(o, o + n) for o, n in zip(offsets, part.shape))] = part
    inside = (whole >= start) & (whole < stop)
    assert torch.equal(found, torch.where(inside, whole, -1.0))
