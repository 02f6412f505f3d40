"""The storage formats in Triton: :mod:`dist_lamb.storage_formats` as it stands, jitted, and where
in the whole param a block's elements lie."""

from __future__ import annotations

import types
from typing import Any

import triton
import triton.language as tl

from .. import storage_formats
from .triton_math import BFLOAT16, FLOAT32, load, pointer_at, store
from .triton_rules import bound


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
    names: dict[str, Any] = {"tl": tl, "Any": tl.constexpr(0)}
    names |= {"bits": bits, "real": real, "where": where}
    for name, fn in vars(storage_formats).items():
        if isinstance(fn, types.FunctionType) and name not in names:
            names[name] = bound(fn, **names)
    return names


_names = _jitted()
seed_of, random_bits = _names["seed_of"], _names["random_bits"]
bfloat16_at_random, bfloat16_to_nearest = (
    _names["bfloat16_at_random"],
    _names["bfloat16_to_nearest"],
)
of_bfloat16, master_of = _names["of_bfloat16"], _names["master_of"]
param_of, remainder_of = _names["param_of"], _names["remainder_of"]


# --- which element --------------------------------------------------------------------------------


@triton.jit
def numbers_of(row, step, at, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    """int64 [BLOCK]: which elements of the whole param lie from ``at`` on in a piece's memory.

    ``row`` is Elements.row(DIMS) on the device, ``step`` apart. Divisions of the block are of 32
    bits: those of 64 would take longer than all else.
    """
    begin = tl.load(row) + at
    number = tl.load(row + step) + tl.zeros([BLOCK], tl.int64)
    q = tl.arange(0, BLOCK)
    for d in tl.static_range(DIMS - 1):
        size = tl.load(row + (2 + d) * step)
        stride = tl.load(row + (1 + DIMS + d) * step)
        q = (begin % size).to(tl.int32) + q
        begin = begin // size
        number += (q % size.to(tl.int32)).to(tl.int64) * stride
        q = q // size.to(tl.int32)
    return number + (begin + q) * tl.load(row + 2 * DIMS * step)


@triton.jit
def random_of(numbers, t, pair):
    """32 bits for each element at its param's step ``t``."""
    low, high = numbers.to(tl.int32), (numbers >> 32).to(tl.int32)
    return random_bits(low, high, seed_of(t.to(tl.int32), pair))


# --- memory ---------------------------------------------------------------------------------------
# A KIND says what holds for all segments: FLOAT32 nowhere, BFLOAT16 everywhere, MIXED where `code`,
# a number of the segment, is not 0.


@triton.jit
def _load_bits(address, offset, mask, aligned: tl.constexpr, BLOCK: tl.constexpr):
    pointers = pointer_at(address, offset, tl.int16, aligned) + tl.arange(0, BLOCK)
    if mask is None:
        return tl.load(pointers).to(tl.int32)
    else:
        return tl.load(pointers, mask=mask, other=0).to(tl.int32)


@triton.jit
def _store_bits(address, offset, value, mask, aligned: tl.constexpr, BLOCK: tl.constexpr):
    pointers = pointer_at(address, offset, tl.int16, aligned) + tl.arange(0, BLOCK)
    if mask is None:
        tl.store(pointers, value.to(tl.int16))
    else:
        tl.store(pointers, value.to(tl.int16), mask=mask)


@triton.jit
def load_state(
    address, offset, mask, code, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    """A state as float32."""
    if KIND == FLOAT32:
        return load(address, offset, mask, tl.float32, aligned, BLOCK)
    elif KIND == BFLOAT16:
        return of_bfloat16(_load_bits(address, offset, mask, aligned, BLOCK))
    else:
        if code != 0:
            value = of_bfloat16(_load_bits(address, offset, mask, aligned, BLOCK))
        else:
            value = load(address, offset, mask, tl.float32, aligned, BLOCK)
        return value


@triton.jit
def store_state(
    address, offset, value, random, nearest, mask, code, KIND: tl.constexpr,
    aligned: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What was stored of a new state: with bfloat16 the 16 low bits of ``random`` round it."""
    if KIND == FLOAT32:
        store(address, offset, value, mask, tl.float32, aligned, BLOCK)
        return value
    else:
        h = bfloat16_at_random(value, random)
        if nearest != 0:
            h = bfloat16_to_nearest(value)
        if KIND == BFLOAT16:
            _store_bits(address, offset, h, mask, aligned, BLOCK)
            return of_bfloat16(h)
        else:
            if code != 0:
                _store_bits(address, offset, h, mask, aligned, BLOCK)
                value = of_bfloat16(h)
            else:
                store(address, offset, value, mask, tl.float32, aligned, BLOCK)
            return value


@triton.jit
def load_x(
    x, remainder, offset, mask, code, KIND: tl.constexpr, aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What the rule reads as the param, float32."""
    if KIND == FLOAT32:
        return load(x, offset, mask, tl.float32, aligned, BLOCK)
    elif KIND == BFLOAT16:
        h = _load_bits(x, offset, mask, aligned, BLOCK)
        return master_of(h, _load_bits(remainder, offset, mask, aligned, BLOCK))
    else:
        if code != 0:
            h = _load_bits(x, offset, mask, aligned, BLOCK)
            value = master_of(h, _load_bits(remainder, offset, mask, aligned, BLOCK))
        else:
            value = load(x, offset, mask, tl.float32, aligned, BLOCK)
        return value


@triton.jit
def store_x(
    x, remainder, offset, value, mask, code, KIND: tl.constexpr, aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    if KIND == FLOAT32:
        store(x, offset, value, mask, tl.float32, aligned, BLOCK)
    elif KIND == BFLOAT16:
        _store_bits(x, offset, param_of(value), mask, aligned, BLOCK)
        _store_bits(remainder, offset, remainder_of(value), mask, aligned, BLOCK)
    else:
        if code != 0:
            _store_bits(x, offset, param_of(value), mask, aligned, BLOCK)
            _store_bits(remainder, offset, remainder_of(value), mask, aligned, BLOCK)
        else:
            store(x, offset, value, mask, tl.float32, aligned, BLOCK)
