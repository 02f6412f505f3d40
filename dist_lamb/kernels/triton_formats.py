"""The storage formats in Triton: :mod:`dist_lamb.storage_formats` as it stands, jitted, and where
in the whole param a block's elements lie."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import storage_formats as _formats
from .triton_math import (
    BFLOAT16,
    FLOAT32,
    MIXED,
    NEAREST,
    load,
    load_bfloat16,
    load_bits,
    pointer_at,
    store,
)
from .triton_rules import on_device

seed_of, random_bits = on_device(_formats.seed_of), on_device(_formats.random_bits)
bfloat16_at_random = on_device(_formats.bfloat16_at_random)
bfloat16_to_nearest = on_device(_formats.bfloat16_to_nearest)
of_bfloat16, master_of = on_device(_formats.of_bfloat16), on_device(_formats.master_of)
param_of, remainder_of = on_device(_formats.param_of), on_device(_formats.remainder_of)


# --- which element --------------------------------------------------------------------------------


@triton.jit
def places_of(row, step, DIMS: tl.constexpr):
    """A piece's Elements.row(DIMS), which lies on the device, ``step`` apart."""
    found = ()
    for k in tl.static_range(2 * DIMS + 1):
        found = found + (tl.load(row + k * step),)
    return found


@triton.jit
def numbers_of(places, at, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    """int64 [BLOCK]: which elements of the whole param lie from ``at`` on in a piece's memory.

    Divisions of the block are of 32 bits: those of 64 would take longer than all else.
    """
    begin, numbers = places[0] + at, places[1] + tl.zeros([BLOCK], tl.int64)
    q = tl.arange(0, BLOCK)
    for d in tl.static_range(DIMS - 1):
        size, stride = places[2 + d], places[1 + DIMS + d]
        q = (begin % size).to(tl.int32) + q
        begin = begin // size
        numbers += (q % size.to(tl.int32)).to(tl.int64) * stride
        q = q // size.to(tl.int32)
    return numbers + (begin + q) * places[2 * DIMS]


@triton.jit
def _first_of(places, at):
    return places[1] + (places[0] + at) * places[2]


@triton.jit
def have_one_high(places, at, numel):
    """Whether the numbers of ``numel`` elements from ``at`` on have one high half; DIMS = 1."""
    last = _first_of(places, at + numel - 1)
    return (_first_of(places, at) >> 32) == (last >> 32)


@triton.jit
def random_at(
    places, offset, begin, t, ONE_HIGH: tl.constexpr, DIMS: tl.constexpr, BLOCK: tl.constexpr
):
    """32 bits for each of the elements from ``offset + begin`` on at their param's step ``t``.

    ONE_HIGH: :func:`have_one_high` of all from ``offset`` on. Then their first number alone is of
    64 bits, and a loop over ``begin`` looks for it once.
    """
    if ONE_HIGH:
        first = _first_of(places, offset)
        at = begin + tl.arange(0, BLOCK)
        low = first.to(tl.int32) + at * places[2].to(tl.int32)
        high = (first >> 32).to(tl.int32)
    else:
        numbers = numbers_of(places, offset + begin, DIMS, BLOCK)
        low, high = numbers.to(tl.int32), (numbers >> 32).to(tl.int32)
    return random_bits(low, high, seed_of(t.to(tl.int32)))


# --- memory ---------------------------------------------------------------------------------------
# A KIND says what holds for all segments: FLOAT32 nowhere, BFLOAT16 everywhere, states with NEAREST
# rounded so, MIXED what `code`, a number of the segment, says.


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
    elif KIND != MIXED:
        return load_bfloat16(address, offset, mask, aligned, BLOCK)
    else:
        if code != 0:
            value = load_bfloat16(address, offset, mask, aligned, BLOCK)
        else:
            value = load(address, offset, mask, tl.float32, aligned, BLOCK)
        return value


@triton.jit
def store_state(
    address, offset, value, random, mask, code, KIND: tl.constexpr, aligned: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What was stored of a new state: with bfloat16 the 16 low bits of ``random`` round it."""
    if KIND == FLOAT32:
        store(address, offset, value, mask, tl.float32, aligned, BLOCK)
        return value
    elif KIND != MIXED:
        h = bfloat16_to_nearest(value) if KIND == NEAREST else bfloat16_at_random(value, random)
        _store_bits(address, offset, h, mask, aligned, BLOCK)
        return of_bfloat16(h)
    else:
        if code == FLOAT32:
            store(address, offset, value, mask, tl.float32, aligned, BLOCK)
        else:
            h = bfloat16_at_random(value, random)
            if code == NEAREST:
                h = bfloat16_to_nearest(value)
            _store_bits(address, offset, h, mask, aligned, BLOCK)
            value = of_bfloat16(h)
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
        h = load_bits(x, offset, mask, aligned, BLOCK)
        return master_of(h, load_bits(remainder, offset, mask, aligned, BLOCK))
    else:
        if code != 0:
            h = load_bits(x, offset, mask, aligned, BLOCK)
            value = master_of(h, load_bits(remainder, offset, mask, aligned, BLOCK))
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
