"""The storage formats in Triton: :mod:`dist_lamb.storage_formats` as it stands, jitted, and where
in the whole param a block's elements lie."""

from __future__ import annotations

import types
from typing import Any

import triton
import triton.language as tl

from .. import storage_formats


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def real(b):
    return b.to(tl.float32, bitcast=True)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


def _jitted() -> dict[str, Any]:
    """All functions of ``storage_formats``, calling each other and the three above."""
    # Triton looks for its own module in a function's namespace, and evaluates annotations there.
    names: dict[str, Any] = {
        "tl": tl,
        "Any": tl.constexpr(0),
        "bits": bits,
        "real": real,
        "where": where,
    }
    for name, fn in vars(storage_formats).items():
        if isinstance(fn, types.FunctionType) and name not in names:
            clone = types.FunctionType(fn.__code__, names, name)
            clone.__module__, clone.__qualname__ = __name__, name
            names[name] = triton.jit(clone)
    return names


_names = _jitted()
seed_of, random_bits = _names["seed_of"], _names["random_bits"]
bfloat16_at_random, bfloat16_to_nearest = (
    _names["bfloat16_at_random"],
    _names["bfloat16_to_nearest"],
)
of_bfloat16, master_of = _names["of_bfloat16"], _names["master_of"]
param_of, remainder_of = _names["param_of"], _names["remainder_of"]


@triton.jit
def numbers_of(row, at, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    """int64 [BLOCK]: which elements of the whole param lie from ``at`` on in a piece's memory.

    ``row`` is Elements.row(DIMS) on the device. Divisions of the block are of 32 bits: those of 64
    would take longer than all else.
    """
    begin = tl.load(row) + at
    number = tl.load(row + 1) + tl.zeros([BLOCK], tl.int64)
    q = tl.arange(0, BLOCK)
    for d in tl.static_range(DIMS - 1):
        size = tl.load(row + 2 + d)
        stride = tl.load(row + 1 + DIMS + d)
        q = (begin % size).to(tl.int32) + q
        begin = begin // size
        number += (q % size.to(tl.int32)).to(tl.int64) * stride
        q = q // size.to(tl.int32)
    return number + (begin + q) * tl.load(row + 2 * DIMS)
