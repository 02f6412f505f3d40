"""The rule in Triton: one launch a phase, whatever the number of params.

A table of addresses describes everything that is updated: *segments* (a param's memory, or its
piece of a flat buffer) cut into *chunks* of a few thousand elements, the work of one program. Each
launch is one pass over the chunks::

    grad_sq       reads g                        only where gradients are clipped   4 bytes a param
    moments_pass  reads g, x, m, v; writes m, v; squares of x, u and g             24
    norms         per param: sums of the partials, rho, step size, counter          ~0
    apply         reads x, m, v; computes u again; writes x (and its copy)         16

That is 40 bytes a param in float32, 44 with clipping. A bfloat16 param with a float32 master has a
2-byte gradient and a 2-byte copy to write: 22 + 18 = 40 bytes, 42 with clipping.

A second writing of :mod:`dist_lamb.rule`, and tested against it. Sums of squares are float64, a
partial per chunk, added up in the order of the chunks: no atomics on floats, so every run gives the
same bits. All that may change between steps is read from tables on the device: nothing recompiles,
nothing waits for the device, and a captured CUDA graph replays with the current lr.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl

# fmt: off
from .triton_math import (
    BETA1, BETA2, BETA3, BFLOAT16, CHUNK_COLUMNS, COPY, COPY_SHIFT, DECAY, END_CHUNK, EPS, ERASED,
    FIRST_BLOCK, FIRST_CHUNK, FLAGS, FLOAT16, GRAD, GRAD_SHIFT, GRAD_SQ, GROUP, GROUP_COLUMNS,
    HISTORY, L2, LOG_BETA1, LOG_BETA2, MAX_GRAD_NORM, MIXED, NUMEL, PARAM, PARAM_COLUMNS,
    PARAM_GROUP, SCALE1, SCALE2, SEGMENT, SIGN, STEP_COLUMNS, STEP_DECAY, STEP_EPS, STEP_SIZE,
    SUM_COLUMNS, U_SQ, UPDATED, UPDATED_COLUMN, X_SQ, M, V, X, bias_correction, clip_coefficient,
    direction, gradient, learning_rate, load, load_any, moments, participates, store, sum_partials,
    trust_ratio, whole_blocks,
)
# fmt: on

# Nothing about the arguments, none of which is data, compiles a kernel a second time.
_jit = functools.partial(
    triton.jit,
    do_not_specialize=["num_chunks", "num_segments"],
    do_not_specialize_on_alignment=[
        "chunks", "segments", "param_table", "groups", "counters", "active", "group_mask",
        "loss_scale", "overflow", "arrivals", "partials", "total", "sums", "steps", "ratios",
    ],
)  # fmt: skip

# --- the launches ---------------------------------------------------------------------------------


@triton.jit
def _grad_sq_block(
    g, offset, mask, code, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    g = load_any(g, offset, mask, code, KIND, aligned, BLOCK).to(tl.float64)
    return g * g


@_jit()
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
def _moments_block(
    g, x, m, v, offset, mask, code, grad_scale, l2, beta1, beta3, beta2, beta4, scale1, scale2, eps,
    decay, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates m and v; squares of x and u, float64 [BLOCK], and g as it is."""
    raw = load_any(g, offset, mask, code, KIND, aligned, BLOCK)
    param = load(x, offset, mask, tl.float32, aligned, BLOCK)
    m_old = load(m, offset, mask, tl.float32, aligned, BLOCK)
    v_old = load(v, offset, mask, tl.float32, aligned, BLOCK)
    grad = gradient(raw, param, grad_scale, l2)
    m_new, v_new = moments(grad, m_old, v_old, beta1, beta3, beta2, beta4)
    store(m, offset, m_new, mask, tl.float32, aligned, BLOCK)
    store(v, offset, v_new, mask, tl.float32, aligned, BLOCK)
    u = direction(param, m_new, v_new, scale1, scale2, eps, decay)
    if mask is not None:
        u = tl.where(mask, u, 0.0)  # with eps = 0 what was not read gives 0 / 0
    param, u = param.to(tl.float64), u.to(tl.float64)
    return param * param, u * u, raw


@_jit()
def moments_pass(
    chunks,
    num_chunks,
    segments,
    num_segments,
    groups,
    counters,
    active,
    loss_scale,
    overflow,
    total,
    partials,
    NORM: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials of ||x||^2, ||u||^2 and ||g||^2, float64 rows [chunks]; new m and v.

    Chunks are taken from the last to the first, against the order of the launches before and
    after: what those touched last, or will touch first, is still in the cache.
    """
    at = num_chunks - 1 - tl.program_id(0)
    chunk = chunks + at.to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    group = groups + tl.load(chunk + GROUP) * GROUP_COLUMNS
    param = tl.load(chunk + PARAM)
    t = tl.load(counters + param).to(tl.float64) + 1.0
    flags = tl.load(segment + FLAGS * num_segments)
    numel = tl.where(participates(active, overflow, param), tl.load(chunk + NUMEL), 0)
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK

    # rule.coefficients, float64, rounded once
    scale = tl.load(group + SIGN)
    inverse = tl.full([], 1.0, tl.float64)
    if loss_scale is not None:
        inverse = 1.0 / tl.load(loss_scale).to(tl.float64)
        scale = scale * inverse
    if total is not None:
        grad_sq = tl.load(total) * inverse * inverse
        scale = scale * clip_coefficient(grad_sq, tl.load(group + MAX_GRAD_NORM))
    grad_scale = scale.to(tl.float32)
    l2 = tl.load(group + L2).to(tl.float32)
    beta1 = tl.load(group + BETA1).to(tl.float32)
    beta3 = tl.load(group + BETA3).to(tl.float32)
    beta2 = tl.load(group + BETA2).to(tl.float32)
    beta4 = (1.0 - tl.load(group + BETA2)).to(tl.float32)
    scale1 = bias_correction(group, LOG_BETA1, t).to(tl.float32)
    scale2 = bias_correction(group, LOG_BETA2, t).to(tl.float32)
    eps = tl.load(group + EPS).to(tl.float32)
    decay = tl.load(group + DECAY).to(tl.float32)

    g, code = tl.load(segment + GRAD * num_segments), (flags >> GRAD_SHIFT) & 3
    x = tl.load(segment + X * num_segments)
    m = tl.load(segment + M * num_segments)
    v = tl.load(segment + V * num_segments)
    x_sq, u_sq = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    g_sq = tl.zeros([BLOCK], tl.float64)
    fast, every = whole_blocks(flags, numel, BLOCK)
    for i in range(0, fast):
        xx, uu, grad = _moments_block(
            g, x, m, v, offset + i * BLOCK, None, code, grad_scale, l2, beta1, beta3, beta2, beta4,
            scale1, scale2, eps, decay, KIND, True, BLOCK,
        )  # fmt: skip
        x_sq += xx
        u_sq += uu
        if NORM:
            g_sq += grad.to(tl.float64) * grad.to(tl.float64)
    for i in range(fast, every):
        mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        xx, uu, grad = _moments_block(
            g, x, m, v, offset + i * BLOCK, mask, code, grad_scale, l2, beta1, beta3, beta2, beta4,
            scale1, scale2, eps, decay, KIND, False, BLOCK,
        )  # fmt: skip
        x_sq += xx
        u_sq += uu
        if NORM:
            g_sq += grad.to(tl.float64) * grad.to(tl.float64)
    tl.store(partials + X_SQ * num_chunks + at, tl.sum(x_sq))
    tl.store(partials + U_SQ * num_chunks + at, tl.sum(u_sq))
    if NORM:
        tl.store(partials + GRAD_SQ * num_chunks + at, tl.sum(g_sq))


@triton.jit
def _nonzero(value):
    return (value != 0.0).to(tl.float64)


@_jit()
def history(
    chunks,
    num_chunks,
    segments,
    num_segments,
    active,
    partials,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A partial > 0 for chunks with some g, m or v that is not 0 (or NaN)."""
    at = tl.program_id(0)
    chunk = chunks + at.to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    flags = tl.load(segment + FLAGS * num_segments)
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
    takes_part = participates(active, None, tl.load(chunk + PARAM))
    numel = tl.where(takes_part, tl.load(chunk + NUMEL), 0)
    g, code = tl.load(segment + GRAD * num_segments), (flags >> GRAD_SHIFT) & 3
    m = tl.load(segment + M * num_segments)
    v = tl.load(segment + V * num_segments)
    count = tl.zeros([BLOCK], tl.float64)
    for i in range(0, (numel + BLOCK - 1) // BLOCK):
        mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        at_i = offset + i * BLOCK
        count += _nonzero(load_any(g, at_i, mask, code, KIND, False, BLOCK))
        count += _nonzero(load(m, at_i, mask, tl.float32, False, BLOCK))
        count += _nonzero(load(v, at_i, mask, tl.float32, False, BLOCK))
    tl.store(partials + HISTORY * num_chunks + at, tl.sum(count))


@_jit()
def erase(chunks, segments, num_segments, steps, BLOCK: tl.constexpr):
    """m = v = 0 again where a step did not count: L2 decay has entered them."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    erased = tl.load(steps + tl.load(chunk + PARAM) * STEP_COLUMNS + ERASED) > 0
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
    numel = tl.where(erased, tl.load(chunk + NUMEL), 0)
    m = tl.load(segment + M * num_segments)
    v = tl.load(segment + V * num_segments)
    zero = tl.zeros([BLOCK], tl.float32)
    for i in range(0, (numel + BLOCK - 1) // BLOCK):
        mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        store(m, offset + i * BLOCK, zero, mask, tl.float32, False, BLOCK)
        store(v, offset + i * BLOCK, zero, mask, tl.float32, False, BLOCK)


@_jit()
def norms(
    param_table,
    num_chunks,
    groups,
    counters,
    active,
    overflow,
    partials,
    sums,
    steps,
    ratios,
    NORM: tl.constexpr,
    LR_ZERO: tl.constexpr,
    SUM: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a param. SUM: partials -> sums of this rank.

    FINISH: sums of all ranks -> trust ratio, what apply needs, and the param's counter. One
    launch where there is one rank, else two around the all-reduce of ``sums``.
    """
    k = tl.program_id(0)
    param = param_table + k * PARAM_COLUMNS
    group = groups + tl.load(param + PARAM_GROUP) * GROUP_COLUMNS
    takes_part = participates(active, overflow, k)
    sum_row = sums + k * SUM_COLUMNS
    if SUM:
        first, end = tl.load(param + FIRST_CHUNK), tl.load(param + END_CHUNK)
        x_sq = sum_partials(partials + X_SQ * num_chunks, first, end, BLOCK)
        u_sq = sum_partials(partials + U_SQ * num_chunks, first, end, BLOCK)
        counts = takes_part
        if LR_ZERO:
            # A dummy step with lr = 0 and zero gradients leaves no trace: EagerUpdate._counts.
            history = sum_partials(partials + HISTORY * num_chunks, first, end, BLOCK) > 0
            counts = counts & ((learning_rate(group) != 0) | history)
        updated = counts.to(tl.float64)
        tl.store(sum_row + X_SQ, x_sq)
        tl.store(sum_row + U_SQ, u_sq)
        if NORM:
            g_sq = sum_partials(partials + GRAD_SQ * num_chunks, first, end, BLOCK)
            tl.store(sum_row + GRAD_SQ, g_sq)
        tl.store(sum_row + UPDATED_COLUMN, updated)
    else:
        x_sq = tl.load(sum_row + X_SQ)
        u_sq = tl.load(sum_row + U_SQ)
        updated = tl.load(sum_row + UPDATED_COLUMN)
    if FINISH:
        is_updated = updated > 0
        rho = trust_ratio(x_sq, u_sq, group)
        counter = tl.load(counters + k)
        t = counter.to(tl.float64) + 1.0
        step = steps + k * STEP_COLUMNS
        tl.store(step + SCALE1, bias_correction(group, LOG_BETA1, t).to(tl.float32))
        tl.store(step + SCALE2, bias_correction(group, LOG_BETA2, t).to(tl.float32))
        tl.store(step + STEP_EPS, tl.load(group + EPS).to(tl.float32))
        tl.store(step + STEP_DECAY, tl.load(group + DECAY).to(tl.float32))
        tl.store(step + STEP_SIZE, (learning_rate(group) * rho).to(tl.float32))
        tl.store(step + UPDATED, is_updated.to(tl.float32))
        tl.store(step + ERASED, (takes_part & (updated <= 0)).to(tl.float32))
        tl.store(counters + k, tl.where(is_updated, counter + 1.0, counter))
        tl.store(ratios + k, tl.where(is_updated, rho, float("nan")).to(tl.float32))


@triton.jit
def _apply_block(
    x, m, v, copy, offset, mask, code, scale1, scale2, eps, decay, step_size,
    KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    param = load(x, offset, mask, tl.float32, aligned, BLOCK)
    m = load(m, offset, mask, tl.float32, aligned, BLOCK)
    v = load(v, offset, mask, tl.float32, aligned, BLOCK)
    # x <- x - lr * rho * u
    param = param - direction(param, m, v, scale1, scale2, eps, decay) * step_size
    store(x, offset, param, mask, tl.float32, aligned, BLOCK)
    if KIND == BFLOAT16:
        store(copy, offset, param, mask, tl.bfloat16, aligned, BLOCK)
    elif KIND == FLOAT16:
        store(copy, offset, param, mask, tl.float16, aligned, BLOCK)
    elif KIND == MIXED:
        if code == BFLOAT16:
            store(copy, offset, param, mask, tl.bfloat16, aligned, BLOCK)
        elif code == FLOAT16:
            store(copy, offset, param, mask, tl.float16, aligned, BLOCK)


@_jit()
def apply(
    chunks, segments, num_segments, steps, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """x <- x - lr * rho * u, and the low-precision copies."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    step = steps + tl.load(chunk + PARAM) * STEP_COLUMNS
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
    flags = tl.load(segment + FLAGS * num_segments)
    numel = tl.where(tl.load(step + UPDATED) > 0, tl.load(chunk + NUMEL), 0)
    code = (flags >> COPY_SHIFT) & 3
    scale1, scale2 = tl.load(step + SCALE1), tl.load(step + SCALE2)
    eps, decay = tl.load(step + STEP_EPS), tl.load(step + STEP_DECAY)
    step_size = tl.load(step + STEP_SIZE)
    x = tl.load(segment + X * num_segments)
    m = tl.load(segment + M * num_segments)
    v = tl.load(segment + V * num_segments)
    copy = tl.load(segment + COPY * num_segments)
    fast, every = whole_blocks(flags, numel, BLOCK)
    for i in range(0, fast):
        _apply_block(
            x, m, v, copy, offset + i * BLOCK, None, code, scale1, scale2, eps, decay, step_size,
            KIND, True, BLOCK,
        )  # fmt: skip
    for i in range(fast, every):
        mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        _apply_block(
            x, m, v, copy, offset + i * BLOCK, mask, code, scale1, scale2, eps, decay, step_size,
            KIND, False, BLOCK,
        )  # fmt: skip


#: Whether the kernels run in Triton's interpreter, on the CPU.
INTERPRETED = not isinstance(apply, triton.JITFunction)
