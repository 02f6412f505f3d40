"""The rule in Triton: phases 2-6 of a step in four launches, whatever the number of params.

One table describes everything that is updated: *segments* (a param's memory, or its piece of a
flat buffer) cut into *chunks* of a few thousand elements. Each launch is one pass over the chunks::

    _grad_sq     reads g                        only where gradients are clipped   4 bytes a param
    _moments     reads g, x, m, v; writes m, v; partials of ||x||^2 and ||u||^2   24
    _norms       per param: sums of the partials, rho, step size, counter          ~0
    _apply       reads x, m, v; computes u again; writes x (and its copy)         16

That is 40 bytes a param in float32, 44 with clipping. A bfloat16 param with a float32 master has a
2-byte gradient and a 2-byte copy to write: 22 + 18 = 40 bytes, 42 with clipping.

A second writing of :mod:`dist_lamb.rule`, and tested against it. Sums of squares are float64, a
partial per chunk, added up in the order of the chunks: no atomics on floats, so every run gives the
same bits. All that may change between steps is read from tables on the device: nothing recompiles,
nothing waits for the device, and a captured CUDA graph replays with the lr of the day.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tables
from .tables import BLOCK, Table, capturing

#: Of BLOCK elements each thread then has 4, one 16-byte access a tensor. With 8 it needs twice the
#: registers, which leave room for half the threads: 1-2 % slower on an H200.
WARPS = 4
#: Programs a multiprocessor of the launch that sums the gradients.
PROGRAMS_EACH = 8

# --- the tables, as the kernels read them (tables.py) ---------------------------------------------

CHUNK_COLUMNS, PARAM_COLUMNS, GROUP_COLUMNS = (
    tl.constexpr(n) for n in (tables.CHUNK_COLUMNS, tables.PARAM_COLUMNS, tables.GROUP_COLUMNS)
)
# columns of a chunk
SEGMENT, PARAM, GROUP, FIRST_BLOCK, NUMEL = (tl.constexpr(i) for i in range(5))
# columns of a param
FIRST_CHUNK, END_CHUNK, PARAM_GROUP, PARAM_SEGMENT = (tl.constexpr(i) for i in range(4))
# columns of a group
(LR, BETA1, BETA2, BETA3, EPS, DECAY, L2, SIGN, CORRECTED, MAX_GRAD_NORM) = (
    tl.constexpr(i) for i in range(10)
)
(ADAPT, TRUST_LO, TRUST_HI, PHI_LO, PHI_HI) = (tl.constexpr(i) for i in range(10, 15))
LOG_BETA1, LOG_BETA2, LR_ADDRESS, LR_KIND = (tl.constexpr(i) for i in range(15, 19))
# rows of the segments, and their flags
GRAD, FLAGS, X, M, V, COPY = (tl.constexpr(i) for i in range(6))
PRESENT, ALIGNED = tl.constexpr(tables.PRESENT), tl.constexpr(tables.ALIGNED)
GRAD_SHIFT, COPY_SHIFT = tl.constexpr(tables.GRAD_SHIFT), tl.constexpr(tables.COPY_SHIFT)
FLOAT32, BFLOAT16, FLOAT16, MIXED = (tl.constexpr(i) for i in range(4))
# what _norms leaves for _apply, float32 [params, STEP_COLUMNS]
SCALE1, SCALE2, STEP_EPS, STEP_DECAY, STEP_SIZE, UPDATED, ERASED = (
    tl.constexpr(i) for i in range(7)
)
STEP_COLUMNS = tl.constexpr(tables.STEP_COLUMNS)

# Nothing about the arguments, none of which is data, compiles a kernel a second time.
_jit = functools.partial(
    triton.jit,
    do_not_specialize=["num_chunks", "num_segments"],
    do_not_specialize_on_alignment=[
        "chunks", "segments", "param_table", "groups", "counters", "active", "kind",
        "loss_scale", "found_inf", "arrivals", "partials", "total", "sums", "steps", "ratios",
    ],
)  # fmt: skip

# --- the equations (rule.py) ----------------------------------------------------------------------


@triton.jit
def gradient(g, x, grad_scale, l2):
    # g <- g * min(1, max_grad_norm / ||g_all||);  g <- g + wd * x where decay is L2
    return g * grad_scale + x * l2


@triton.jit
def moments(g, m, v, beta1, beta3, beta2, beta4):
    # m <- b1 * m + b3 * g
    m = m * beta1 + g * beta3
    # v <- b2 * v + (1 - b2) * g^2
    v = v * beta2 + g * g * beta4
    return m, v


@triton.jit
def direction(x, m, v, scale1, scale2, eps, decay):
    # r = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps), the corrections as factors
    r = tl.div_rn(m * scale1, tl.sqrt_rn(v * scale2) + eps)
    # u = r + wd * x
    return r + x * decay


@triton.jit
def bias_correction(group, log_beta, t):
    # 1 / (1 - beta^t), float64
    corrected = tl.load(group + CORRECTED) > 0
    return tl.where(corrected, 1.0 / (1.0 - tl.exp2(t * tl.load(group + log_beta))), 1.0)


@triton.jit
def clip_coefficient(grad_sq, max_grad_norm):
    # min(1, max_grad_norm / ||g_all||); comparisons keep a NaN, and inf / inf must not be seen
    clip = max_grad_norm / tl.sqrt(grad_sq)
    clip = tl.where(clip > 1.0, 1.0, clip)
    return tl.where(max_grad_norm == float("inf"), 1.0, clip)


@triton.jit
def clamp(a, lo, hi):
    a = tl.where(a < lo, lo, a)  # NaN stays NaN
    return tl.where(a > hi, hi, a)


@triton.jit
def trust_ratio(x_sq, u_sq, group):
    x_norm, u_norm = tl.sqrt(x_sq), tl.sqrt(u_sq)
    # rho = phi(||x||) / ||u||, clamped where trust_clip asks
    phi = clamp(x_norm, tl.load(group + PHI_LO), tl.load(group + PHI_HI))
    rho = clamp(phi / u_norm, tl.load(group + TRUST_LO), tl.load(group + TRUST_HI))
    # 1 where ||x|| = 0, where ||u|| = 0, or not adapted
    plain = (x_norm == 0) | (u_norm == 0) | (tl.load(group + ADAPT) == 0)
    return tl.where(plain, 1.0, rho)


# --- memory ---------------------------------------------------------------------------------------


@triton.jit
def _at(address, offset, dtype: tl.constexpr, aligned: tl.constexpr):
    """Pointer to element ``offset``, a multiple of BLOCK, of the memory at ``address``."""
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        # Without this the compiler cannot know, and reads 4 bytes at a time instead of 16.
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offset


@triton.jit
def _load(address, offset, mask, dtype: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr):
    pointers = _at(address, offset, dtype, aligned) + tl.arange(0, BLOCK)
    if mask is None:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(
    address, offset, value, mask, dtype: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    pointers = _at(address, offset, dtype, aligned) + tl.arange(0, BLOCK)
    if mask is None:
        tl.store(pointers, value.to(dtype))
    else:
        tl.store(pointers, value.to(dtype), mask=mask)


@triton.jit
def _load_any(
    address, offset, mask, code, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    """A gradient as float32; ``KIND`` is the dtype of all of them, or MIXED: then ``code`` says."""
    if KIND == FLOAT32:
        return _load(address, offset, mask, tl.float32, aligned, BLOCK)
    elif KIND == BFLOAT16:
        return _load(address, offset, mask, tl.bfloat16, aligned, BLOCK)
    elif KIND == FLOAT16:
        return _load(address, offset, mask, tl.float16, aligned, BLOCK)
    else:
        if code == FLOAT32:
            g = _load(address, offset, mask, tl.float32, aligned, BLOCK)
        elif code == BFLOAT16:
            g = _load(address, offset, mask, tl.bfloat16, aligned, BLOCK)
        else:
            g = _load(address, offset, mask, tl.float16, aligned, BLOCK)
        return g


@triton.jit
def _blocks(flags, numel, BLOCK: tl.constexpr):
    """(whole blocks that may be read 16 bytes at a time, all blocks) of a chunk."""
    fast = tl.where((flags & ALIGNED) != 0, numel // BLOCK, 0)
    return fast, (numel + BLOCK - 1) // BLOCK


# --- the launches ---------------------------------------------------------------------------------


@triton.jit
def _grad_sq_block(
    g, offset, mask, code, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    g = _load_any(g, offset, mask, code, KIND, aligned, BLOCK).to(tl.float64)
    return g * g


@_jit()
def _grad_sq(
    chunks,
    num_chunks,
    segments,
    num_segments,
    active,
    kind,
    arrivals,
    partials,
    total,
    KIND: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """total[0] = ||g_all||^2 of this device, or of the params of ``kind``; arrivals stays 0."""
    program = tl.program_id(0)
    squares = tl.zeros([BLOCK], tl.float64)
    for at in range(program, num_chunks, tl.num_programs(0)):
        chunk = chunks + tl.cast(at, tl.int64) * CHUNK_COLUMNS
        segment = segments + tl.load(chunk + SEGMENT)
        flags = tl.load(segment + FLAGS * num_segments)
        numel = tl.load(chunk + NUMEL)
        numel = tl.where(_takes_part(flags, active, chunk), numel, 0)
        if kind is not None:
            numel = tl.where(tl.load(kind + tl.load(chunk + PARAM)) != 0, numel, 0)
        offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
        g, code = tl.load(segment + GRAD * num_segments), (flags >> GRAD_SHIFT) & 3
        fast, every = _blocks(flags, numel, BLOCK)
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
def _takes_part(flags, active, chunk):
    if active is None:
        return (flags & PRESENT) != 0
    else:
        return tl.load(active + tl.load(chunk + PARAM)) != 0


@triton.jit
def _moments_block(
    g, x, m, v, offset, mask, code, grad_scale, l2, beta1, beta3, beta2, beta4, scale1, scale2, eps,
    decay, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates m and v; squares of x and u, float64 [BLOCK]."""
    grad = _load_any(g, offset, mask, code, KIND, aligned, BLOCK)
    param = _load(x, offset, mask, tl.float32, aligned, BLOCK)
    m_old = _load(m, offset, mask, tl.float32, aligned, BLOCK)
    v_old = _load(v, offset, mask, tl.float32, aligned, BLOCK)
    grad = gradient(grad, param, grad_scale, l2)
    m_new, v_new = moments(grad, m_old, v_old, beta1, beta3, beta2, beta4)
    _store(m, offset, m_new, mask, tl.float32, aligned, BLOCK)
    _store(v, offset, v_new, mask, tl.float32, aligned, BLOCK)
    u = direction(param, m_new, v_new, scale1, scale2, eps, decay)
    if mask is not None:
        u = tl.where(mask, u, 0.0)  # with eps = 0 what was not read gives 0 / 0
    param, u = param.to(tl.float64), u.to(tl.float64)
    return param * param, u * u


@_jit()
def _moments(
    chunks,
    num_chunks,
    segments,
    num_segments,
    groups,
    counters,
    active,
    loss_scale,
    found_inf,
    total,
    partials,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[0] of ||x||^2 and partials[1] of ||u||^2, float64 [2, chunks]; new m and v.

    Chunks are taken from the last to the first, against the order of the launches before and
    after: what those touched last, or will touch first, is still in the cache.
    """
    at = num_chunks - 1 - tl.program_id(0)
    chunk = chunks + at.to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    group = groups + tl.load(chunk + GROUP) * GROUP_COLUMNS
    t = tl.load(counters + tl.load(chunk + PARAM)).to(tl.float64) + 1.0
    flags = tl.load(segment + FLAGS * num_segments)
    numel = tl.load(chunk + NUMEL)
    takes_part = _takes_part(flags, active, chunk)
    if found_inf is not None:
        takes_part = takes_part & (tl.load(found_inf) <= 0)
    numel = tl.where(takes_part, numel, 0)
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
    fast, every = _blocks(flags, numel, BLOCK)
    for i in range(0, fast):
        xx, uu = _moments_block(
            g, x, m, v, offset + i * BLOCK, None, code, grad_scale, l2, beta1, beta3, beta2, beta4,
            scale1, scale2, eps, decay, KIND, True, BLOCK,
        )  # fmt: skip
        x_sq += xx
        u_sq += uu
    for i in range(fast, every):
        mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        xx, uu = _moments_block(
            g, x, m, v, offset + i * BLOCK, mask, code, grad_scale, l2, beta1, beta3, beta2, beta4,
            scale1, scale2, eps, decay, KIND, False, BLOCK,
        )  # fmt: skip
        x_sq += xx
        u_sq += uu
    tl.store(partials + at, tl.sum(x_sq))
    tl.store(partials + num_chunks + at, tl.sum(u_sq))


@triton.jit
def _nonzero(value):
    return (value != 0.0).to(tl.float64)


@_jit()
def _history(
    chunks,
    num_chunks,
    segments,
    num_segments,
    active,
    partials,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[2] > 0 for chunks with some g, m or v that is not 0 (or NaN)."""
    at = tl.program_id(0)
    chunk = chunks + at.to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    flags = tl.load(segment + FLAGS * num_segments)
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
    numel = tl.where(_takes_part(flags, active, chunk), tl.load(chunk + NUMEL), 0)
    g, code = tl.load(segment + GRAD * num_segments), (flags >> GRAD_SHIFT) & 3
    m = tl.load(segment + M * num_segments)
    v = tl.load(segment + V * num_segments)
    count = tl.zeros([BLOCK], tl.float64)
    for i in range(0, (numel + BLOCK - 1) // BLOCK):
        mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        at_i = offset + i * BLOCK
        count += _nonzero(_load_any(g, at_i, mask, code, KIND, False, BLOCK))
        count += _nonzero(_load(m, at_i, mask, tl.float32, False, BLOCK))
        count += _nonzero(_load(v, at_i, mask, tl.float32, False, BLOCK))
    tl.store(partials + 2 * num_chunks + at, tl.sum(count))


@_jit()
def _erase(chunks, segments, num_segments, steps, BLOCK: tl.constexpr):
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
        _store(m, offset + i * BLOCK, zero, mask, tl.float32, False, BLOCK)
        _store(v, offset + i * BLOCK, zero, mask, tl.float32, False, BLOCK)


@triton.jit
def _sum(partials, first, end, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], tl.float64)
    for at in range(first, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        acc += tl.load(partials + i, mask=i < end, other=0.0)
    return tl.sum(acc)


@triton.jit
def _learning_rate(group):
    bits = group.to(tl.pointer_type(tl.int64))
    lr = tl.load(group + LR)
    kind = tl.load(bits + LR_KIND)
    if kind == 1:
        lr = tl.load(tl.load(bits + LR_ADDRESS).to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif kind == 2:
        lr = tl.load(tl.load(bits + LR_ADDRESS).to(tl.pointer_type(tl.float64)))
    return lr


@_jit()
def _norms(
    param_table,
    num_chunks,
    segments,
    num_segments,
    groups,
    counters,
    active,
    found_inf,
    partials,
    sums,
    steps,
    ratios,
    LR_ZERO: tl.constexpr,
    SUM: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a param. SUM: partials -> sums of this rank, [||x||^2, ||u||^2, updated].

    FINISH: sums of all ranks -> trust ratio, what _apply needs, and the param's counter. One
    launch where there is one rank, else two around the all-reduce of ``sums`` [params, 3].
    """
    k = tl.program_id(0)
    param = param_table + k * PARAM_COLUMNS
    group = groups + tl.load(param + PARAM_GROUP) * GROUP_COLUMNS
    if active is None:
        segment = tl.load(param + PARAM_SEGMENT)
        flags = tl.load(segments + FLAGS * num_segments + segment, mask=segment >= 0, other=0)
        takes_part = (flags & PRESENT) != 0
    else:
        takes_part = tl.load(active + k) != 0
    if found_inf is not None:
        takes_part = takes_part & (tl.load(found_inf) <= 0)
    if SUM:
        first, end = tl.load(param + FIRST_CHUNK), tl.load(param + END_CHUNK)
        x_sq = _sum(partials, first, end, BLOCK)
        u_sq = _sum(partials + num_chunks, first, end, BLOCK)
        counts = takes_part
        if LR_ZERO:
            # A dummy step with lr = 0 and zero gradients leaves no trace: base._counts.
            history = _sum(partials + 2 * num_chunks, first, end, BLOCK) > 0
            counts = counts & ((_learning_rate(group) != 0) | history)
        updated = counts.to(tl.float64)
        if not FINISH:
            tl.store(sums + k * 3, x_sq)
            tl.store(sums + k * 3 + 1, u_sq)
            tl.store(sums + k * 3 + 2, updated)
    else:
        x_sq = tl.load(sums + k * 3)
        u_sq = tl.load(sums + k * 3 + 1)
        updated = tl.load(sums + k * 3 + 2)
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
        tl.store(step + STEP_SIZE, (_learning_rate(group) * rho).to(tl.float32))
        tl.store(step + UPDATED, is_updated.to(tl.float32))
        tl.store(step + ERASED, (takes_part & (updated <= 0)).to(tl.float32))
        tl.store(counters + k, tl.where(is_updated, counter + 1.0, counter))
        tl.store(ratios + k, tl.where(is_updated, rho, float("nan")).to(tl.float32))


@triton.jit
def _apply_block(
    x, m, v, copy, offset, mask, code, scale1, scale2, eps, decay, step_size,
    KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    param = _load(x, offset, mask, tl.float32, aligned, BLOCK)
    m = _load(m, offset, mask, tl.float32, aligned, BLOCK)
    v = _load(v, offset, mask, tl.float32, aligned, BLOCK)
    # x <- x - lr * rho * u
    param = param - direction(param, m, v, scale1, scale2, eps, decay) * step_size
    _store(x, offset, param, mask, tl.float32, aligned, BLOCK)
    if KIND == BFLOAT16:
        _store(copy, offset, param, mask, tl.bfloat16, aligned, BLOCK)
    elif KIND == FLOAT16:
        _store(copy, offset, param, mask, tl.float16, aligned, BLOCK)
    elif KIND == MIXED:
        if code == BFLOAT16:
            _store(copy, offset, param, mask, tl.bfloat16, aligned, BLOCK)
        elif code == FLOAT16:
            _store(copy, offset, param, mask, tl.float16, aligned, BLOCK)


@_jit()
def _apply(
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
    fast, every = _blocks(flags, numel, BLOCK)
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
INTERPRETED = not isinstance(_apply, triton.JITFunction)

# --- a step --------------------------------------------------------------------------------------


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return PROGRAMS_EACH * int(torch.cuda.get_device_properties(device).multi_processor_count)


class _Launches:
    """The kernels of one kind of step, as they were compiled at its first launch.

    JITFunction inspects every argument and every global at every launch, which takes longer than
    a small model's whole step on the device. Steps of one kind give it nothing new to find.
    """

    def __init__(self, device: torch.device) -> None:
        self._compiled: dict[str, Any] = {}
        self._index = device.index

    def __call__(self, name: str, kernel: Any, programs: int, *args: Any) -> None:
        if not programs:
            return
        compiled = self._compiled.get(name)
        if compiled is None:  # in the interpreter always
            # Products and sums rounded apart: which of them are fused would change with the kind of
            # step, and so would the bits.
            self._compiled[name] = kernel[(programs,)](
                *args, num_warps=WARPS, enable_fp_fusion=False
            )
        elif _watched():
            compiled[(programs, 1, 1)](*args)
        else:  # the same, but for what looks for hooks and finds out where to launch: 5 us
            stream = torch._C._cuda_getCurrentRawStream(self._index)
            function, metadata = compiled.function, compiled.packed_metadata
            compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *args)


def _watched() -> bool:
    """Whether somebody, a profiler, wants to be told of launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


@functools.cache
def _launches(device: torch.device, *kind: Any) -> _Launches:
    return _Launches(device)


def _scalar(value: Any, device: torch.device) -> Tensor | None:
    """One floating-point number on ``device``; as it is where it is that already."""
    if value is None:
        return None
    scalar = torch.as_tensor(value, device=device)
    return scalar if scalar.numel() == 1 and scalar.is_floating_point() else scalar.sum().double()


def update(
    table: Table,
    groups: Tensor,
    counters: Tensor,
    norms: Any,
    *,
    clip: bool,
    grad_sq: Tensor | None,
    lr_zero: bool,
    active: Tensor | None,
    loss_scale: Tensor | None,
    found_inf: Tensor | None,
    before_apply: Callable[[], None] | None = None,
) -> Tensor:
    """Phases 2-6 of a step: new m, v, x, copies and counters; the trust ratios, float32 [params].

    ``clip``: some group clips. ``grad_sq``: the sum of squares of all local gradients, float64 0-d,
    where it is known already. ``lr_zero``: some lr is known to be 0. ``active``, bool [params], or
    None where the presence of a gradient says it. ``norms`` are :class:`dist_lamb.norms.Norms`.
    ``before_apply()`` is work for the host while the device is busy with the moments.
    """
    device = table.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever the tensors are on.
        with torch.cuda.device(device):
            return update(
                table, groups, counters, norms, clip=clip, grad_sq=grad_sq, lr_zero=lr_zero,
                active=active, loss_scale=loss_scale, found_inf=found_inf,
                before_apply=before_apply,
            )  # fmt: skip
    loss_scale, overflow = _scalar(loss_scale, device), _scalar(found_inf, device)
    chunks, num_chunks, params = table.chunks, table.num_chunks, table.params
    segments, num_segments = table.segments, table.num_segments
    partials, sums, steps, total = table.partials, table.sums, table.steps, None
    launch = _launches(
        device, table.grad_kind, table.copy_kind, clip, lr_zero, active is None,
        None if loss_scale is None else loss_scale.dtype,
        None if overflow is None else overflow.dtype, norms.local, norms.kinds(device) is None,
    )  # fmt: skip

    # 2. clip coefficient and overflow flag, of all params on all ranks
    kinds = norms.kinds(device)
    # [squares of each kind of params, flag]
    each = table.total if kinds is None else table.total.new_zeros(len(kinds) + 1)
    if grad_sq is not None:
        each[0] = grad_sq
    elif clip:
        at_most = _programs(device)
        for k, kind in enumerate(kinds or [None]):
            launch(
                "grad_sq", _grad_sq, max(1, min(num_chunks, at_most)), chunks, num_chunks, segments,
                num_segments, active, kind, table.arrivals, table.grad_partials(at_most), each[k:],
                table.grad_kind, triton.next_power_of_2(at_most), BLOCK,
            )  # fmt: skip
    known = clip or grad_sq is not None
    if not norms.local and (clip or overflow is not None):
        both = each if known else each.zero_()
        if overflow is not None:
            both[-1] = overflow.view(())
        each = norms.over_all(both)
        overflow = None if overflow is None else each[1:]
    if known and overflow is not None:
        # Finite half-precision gradients of two ranks may have a sum that is not.
        overflow = overflow.view(1) + ~each[:1].isfinite()
    if clip:
        total = each
    if lr_zero:
        launch(
            "history", _history, num_chunks, chunks, num_chunks, segments, num_segments, active,
            partials, table.grad_kind, BLOCK,
        )  # fmt: skip
    # 3. moments, and sums of squares of x and u
    launch(
        "moments", _moments, num_chunks, chunks, num_chunks, segments, num_segments, groups,
        counters, active, loss_scale, overflow, total, partials, table.grad_kind, BLOCK,
    )  # fmt: skip
    # After the launch, behind which the host can hide it.
    ratios = torch.empty(table.num_params, dtype=torch.float32, device=device)

    def per_param(name: str, add_up: bool, finish: bool) -> None:
        launch(
            name, _norms, table.num_params, params, num_chunks, segments, num_segments, groups,
            counters, active, overflow, partials, sums, steps, ratios, lr_zero, add_up, finish,
            BLOCK,
        )  # fmt: skip

    # 4. over ranks: one all-reduce
    if not norms.local:
        per_param("sums", add_up=True, finish=False)
        sums = norms.per_param(sums)
    if before_apply is not None:
        before_apply()
    # 5. trust ratio
    per_param("ratios", add_up=norms.local, finish=True)
    if lr_zero:
        launch("erase", _erase, num_chunks, chunks, segments, num_segments, steps, BLOCK)
    # 6. x <- x - lr * rho * u
    launch(
        "apply", _apply, num_chunks, chunks, segments, num_segments, steps, table.copy_kind, BLOCK
    )  # fmt: skip
    if capturing(device):
        table.leave_to_graph()
    return ratios
