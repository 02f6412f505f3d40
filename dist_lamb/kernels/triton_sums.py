"""The Triton launches that are the same for every rule: sums of gradients, and lr = 0."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

# fmt: off
from .triton_formats import load_state, load_x, store_state
from .triton_math import (
    CHUNK_COLUMNS,
    END_CHUNK,
    ERASED,
    FIRST_BLOCK,
    FIRST_CHUNK,
    FLAGS,
    GRAD,
    GRAD_SHIFT,
    NUMEL,
    PARAM,
    PARAM_COLUMNS,
    PARAM_INDEX,
    REMAINDER_SHIFT,
    SEGMENT,
    STATE,
    STATE_SHIFT,
    STEP_COLUMNS,
    X,
    load_any,
    participates,
    sum_partials,
    whole_blocks,
)

# fmt: on

# Nothing about the arguments, none of which is data, compiles a kernel a second time.
jit = functools.partial(
    triton.jit,
    do_not_specialize=["num_chunks", "num_segments"],
    do_not_specialize_on_alignment=[
        "chunks", "segments", "param_table", "groups", "counters", "active", "group_mask",
        "loss_scale", "overflow", "arrivals", "partials", "total", "early", "numels", "totals",
        "steps", "ratios",
    ],
)  # fmt: skip

# --- sums of gradients, for any rule --------------------------------------------------------------


@triton.jit
def _grad_sq_block(
    g, offset, mask, code, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    g = load_any(g, offset, mask, code, KIND, aligned, BLOCK).to(tl.float64)
    return g * g


@jit()
def grad_sq(
    chunks,
    num_chunks,
    segments,
    num_segments,
    active,
    group_mask,
    arrivals,
    partials,
    total,
    KIND: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total[0] = ||g_all||^2 here, or of the params of ``group_mask``; arrivals stays 0."""
    program = tl.program_id(0)
    squares = tl.zeros([BLOCK], tl.float64)
    for at in range(program, num_chunks, tl.num_programs(0)):
        chunk = chunks + tl.cast(at, tl.int64) * CHUNK_COLUMNS
        segment = segments + tl.load(chunk + SEGMENT)
        flags = tl.load(segment + FLAGS * num_segments)
        param = tl.load(chunk + PARAM)
        numel = tl.where(participates(active, None, param), tl.load(chunk + NUMEL), 0)
        if group_mask is not None:
            numel = tl.where(tl.load(group_mask + param) != 0, numel, 0)
        offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
        g, code = tl.load(segment + GRAD * num_segments), (flags >> GRAD_SHIFT) & 3
        fast, every = whole_blocks(flags, numel, BLOCK)
        for i in range(0, fast):
            squares += _grad_sq_block(g, offset + i * BLOCK, None, code, KIND, True, BLOCK)
        for i in range(fast, every):
            mask = tl.arange(0, BLOCK) < numel - i * BLOCK
            squares += _grad_sq_block(g, offset + i * BLOCK, mask, code, KIND, False, BLOCK)
    tl.store(partials + program, tl.sum(squares))
    # The last program to arrive adds up, in the order of the programs: which one it is, is the
    # only thing left to chance.
    tl.debug_barrier()
    if tl.atomic_add(arrivals, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        i = tl.arange(0, PROGRAMS)
        found = tl.load(partials + i, mask=i < tl.num_programs(0), other=0.0, cache_modifier=".cg")
        tl.store(total, tl.sum(found))
        tl.store(arrivals, 0)


@triton.jit
def _early_blocks(
    first, last, xx, xg, gg, x, remainder, g, offset, numel, flags, MASKED: tl.constexpr,
    KIND: tl.constexpr, X_KIND: tl.constexpr, WITH_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for i in range(first, last):
        at = offset + i * BLOCK
        if MASKED:
            mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        else:
            mask = None
        code = (flags >> GRAD_SHIFT) & 3
        grad = load_any(g, at, mask, code, KIND, not MASKED, BLOCK).to(tl.float64)
        gg += grad * grad
        if WITH_X:
            of_x = (flags >> REMAINDER_SHIFT) & 1
            param = load_x(x, remainder, at, mask, of_x, X_KIND, not MASKED, BLOCK).to(tl.float64)
            xx += param * param
            xg += param * grad
    return xx, xg, gg


@jit()
def early_pass(
    chunks,
    num_chunks,
    segments,
    num_segments,
    active,
    partials,
    WITH_X: tl.constexpr,
    NUM_STATES: tl.constexpr,
    X_KIND: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials of x.x, x.g and g.g, float64 rows [chunks]; the first two 0 if not WITH_X."""
    at = tl.program_id(0)
    chunk = chunks + at.to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    flags = tl.load(segment + FLAGS * num_segments)
    takes_part = participates(active, None, tl.load(chunk + PARAM))
    numel = tl.where(takes_part, tl.load(chunk + NUMEL), 0)
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
    g, x = tl.load(segment + GRAD * num_segments), tl.load(segment + X * num_segments)
    remainder = x
    if X_KIND:
        remainder = tl.load(segment + (STATE + NUM_STATES) * num_segments)
    fast, every = whole_blocks(flags, numel, BLOCK)
    xx = tl.zeros([BLOCK], tl.float64)
    xg = tl.zeros([BLOCK], tl.float64)
    gg = tl.zeros([BLOCK], tl.float64)
    xx, xg, gg = _early_blocks(
        0, fast, xx, xg, gg, x, remainder, g, offset, numel, flags, False, KIND, X_KIND, WITH_X,
        BLOCK,
    )  # fmt: skip
    xx, xg, gg = _early_blocks(
        fast, every, xx, xg, gg, x, remainder, g, offset, numel, flags, True, KIND, X_KIND, WITH_X,
        BLOCK,
    )  # fmt: skip
    tl.store(partials + at, tl.sum(xx))
    tl.store(partials + num_chunks + at, tl.sum(xg))
    tl.store(partials + 2 * num_chunks + at, tl.sum(gg))


@jit()
def early_sums(param_table, num_chunks, partials, early, BLOCK: tl.constexpr):
    """Partials -> early, float64 [params, 3], of this rank."""
    param = param_table + tl.program_id(0) * PARAM_COLUMNS
    first, end = tl.load(param + FIRST_CHUNK), tl.load(param + END_CHUNK)
    row = early + tl.load(param + PARAM_INDEX) * 3
    for k in tl.static_range(3):
        tl.store(row + k, sum_partials(partials + k * num_chunks, first, end, BLOCK))


# --- states that should not be there --------------------------------------------------------------


@triton.jit
def _nonzero(value):
    return (value != 0.0).to(tl.float64)


@jit()
def history(
    chunks,
    num_chunks,
    segments,
    num_segments,
    active,
    partials,
    NUM_STATES: tl.constexpr,
    STATE_KIND: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A partial > 0 for chunks with some gradient or state that is not 0 (or NaN)."""
    at = tl.program_id(0)
    chunk = chunks + at.to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    flags = tl.load(segment + FLAGS * num_segments)
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
    takes_part = participates(active, None, tl.load(chunk + PARAM))
    numel = tl.where(takes_part, tl.load(chunk + NUMEL), 0)
    g, code = tl.load(segment + GRAD * num_segments), (flags >> GRAD_SHIFT) & 3
    count = tl.zeros([BLOCK], tl.float64)
    for i in range(0, (numel + BLOCK - 1) // BLOCK):
        mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        at_i = offset + i * BLOCK
        count += _nonzero(load_any(g, at_i, mask, code, KIND, False, BLOCK))
        for k in tl.static_range(NUM_STATES):
            state = tl.load(segment + (STATE + k) * num_segments)
            narrow = (flags >> STATE_SHIFT) & 3
            count += _nonzero(load_state(state, at_i, mask, narrow, STATE_KIND, False, BLOCK))
    tl.store(partials + at, tl.sum(count))


@jit()
def erase(
    chunks, segments, num_segments, steps, NUM_STATES: tl.constexpr, STATE_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Zero states again where a step did not count: L2 decay has entered them."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    erased = tl.load(steps + tl.load(chunk + PARAM) * STEP_COLUMNS + ERASED) > 0
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
    numel = tl.where(erased, tl.load(chunk + NUMEL), 0)
    narrow = (tl.load(segment + FLAGS * num_segments) >> STATE_SHIFT) & 3
    zero = tl.zeros([BLOCK], tl.float32)
    for i in range(0, (numel + BLOCK - 1) // BLOCK):
        mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        for k in tl.static_range(NUM_STATES):
            state = tl.load(segment + (STATE + k) * num_segments)
            at = offset + i * BLOCK
            none = tl.zeros([BLOCK], tl.int32)
            store_state(state, at, zero, none, mask, narrow, STATE_KIND, False, BLOCK)


#: Whether the kernels run in Triton's interpreter, on the CPU.
INTERPRETED = not isinstance(grad_sq, triton.JITFunction)
