"""The rules in Triton: one launch a phase, whatever the number of params.

A table of addresses describes everything that is updated: *segments* (a param's memory, or its
piece of a flat buffer) cut into *chunks* of a few thousand elements, the work of one program. Each
launch is one pass over the chunks; for LAMB::

    grad_sq       reads g                        only where gradients are clipped   4 bytes a param
    moments_pass  reads g, x, m, v; writes m, v; squares of x, u and g             24
    norms         per param: sums of the partials, rho, step size, counter          ~0
    apply         reads x, m, v; computes u again; writes x (and its copy)         16

That is 40 bytes a param in float32, 44 with clipping. A bfloat16 param with a float32 master has a
2-byte gradient and a 2-byte copy to write: 22 + 18 = 40 bytes, 42 with clipping. A rule without
late sums is done in moments_pass; early sums take the launches early_pass and early_sums before it.

The equations are :mod:`dist_lamb.rules`: :func:`of` binds the kernels to a rule's functions. Sums
are float64, a partial per chunk, added up in the order of the chunks: no atomics on floats, so
every run gives the same bits. All that may change between steps is read from tables on the device:
nothing recompiles, nothing waits for the device, and a captured CUDA graph replays with the
current lr.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import triton
import triton.language as tl

from ..rules import Rule
from ..rules.trust import clip_coefficient as _clip_coefficient

# fmt: off
from .triton_math import (
    BFLOAT16, CHUNK_COLUMNS, COPY, COPY_SHIFT, END_CHUNK, ERASED, FIRST_BLOCK, FIRST_CHUNK, FLAGS,
    FLOAT16, GRAD, GRAD_SCALE, GRAD_SHIFT, GROUP, GROUP_COLUMNS, LR, MAX_GRAD_NORM, MIXED, NUMEL,
    PARAM, PARAM_COLUMNS, PARAM_GROUP, PARAM_INDEX, SEGMENT, SHRINK, SIGN, STATE, STEP_COLUMNS,
    UPDATED, X, NARROW_STAGES, NEAREST, REMAINDER_SHIFT, STATE_SHIFT, learning_rate, load_any,
    participates, store, sum_partials, whole_blocks,
)
from .triton_formats import (
    have_one_high, load_state, load_x, places_of, random_at, store_state, store_x,
)
# fmt: on
from .triton_rules import bound, names_of, on_device
from .triton_sums import INTERPRETED as INTERPRETED
from .triton_sums import jit as _jit

clip_coefficient = on_device(_clip_coefficient)
# The names that are defined nowhere here are a rule's: `of` brings them.
# --- a rule's step, bound by `of` -----------------------------------------------------------------


def _numbers_of(group, param, t, loss_scale, total, early):
    """(hyperparameters, early sums of scaled gradients, scale of the gradient, coefficients)."""
    values = (learning_rate(group),)
    for k in tl.static_range(1, NUM_H):
        values = values + (tl.load(group + LR + k),)
    h = Hyperparameters(*values)
    scale = tl.load(group + SIGN)
    inverse = tl.full([], 1.0, tl.float64)
    if loss_scale is not None:
        inverse = 1.0 / tl.load(loss_scale).to(tl.float64)
        scale = scale * inverse
    if total is not None:
        grad_sq = tl.load(total) * inverse * inverse
        scale = scale * clip_coefficient(grad_sq, tl.load(group + MAX_GRAD_NORM))
    found = ()
    if EARLY_XX:
        found = found + (tl.load(early + param * 3),)
    if EARLY_XG:
        found = found + (tl.load(early + param * 3 + 1) * scale,)
    if EARLY_GG:
        found = found + (tl.load(early + param * 3 + 2) * scale * scale,)
    wide = coefficients(h, t, found)
    # float64, rounded once
    values = ()
    for k in tl.static_range(NUM_C):
        values = values + (wide[k].to(tl.float32),)
    return h, found, scale.to(tl.float32), Coefficients(*values)


def _sweep(
    first, last, totals, squares, segment, num_segments, flags, offset, numel, scale, c, moves, t,
    places, MOMENTS: tl.constexpr, APPLY: tl.constexpr, NORM: tl.constexpr, MASKED: tl.constexpr,
    KIND: tl.constexpr, COPY_KIND: tl.constexpr, STATE_KIND: tl.constexpr, X_KIND: tl.constexpr,
    DIMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Blocks ``first`` to ``last`` of a chunk: MOMENTS new states and sums, APPLY a new x."""
    g = tl.load(segment + GRAD * num_segments)
    x = tl.load(segment + X * num_segments)
    copy = tl.load(segment + COPY * num_segments)
    narrow, split = (flags >> STATE_SHIFT) & 3, (flags >> REMAINDER_SHIFT) & 1
    remainder = x
    if X_KIND:
        remainder = tl.load(segment + (STATE + NUM_STATES) * num_segments)
    memory = ()
    for k in tl.static_range(NUM_STATES):
        memory = memory + (tl.load(segment + (STATE + k) * num_segments),)
    stages: tl.constexpr = 1 if MASKED or not (STATE_KIND or X_KIND) else NARROW_STAGES
    for i in tl.range(first, last, num_stages=stages):
        at = offset + i * BLOCK
        if MASKED:
            mask = tl.arange(0, BLOCK) < numel - i * BLOCK
        else:
            mask = None
        param = load_x(x, remainder, at, mask, split, X_KIND, not MASKED, BLOCK)
        states = ()
        for k in tl.static_range(NUM_STATES):
            states = states + (
                load_state(memory[k], at, mask, narrow, STATE_KIND, not MASKED, BLOCK),
            )
        grad = param
        if MOMENTS or READS_GRAD:
            raw = load_any(g, at, mask, (flags >> GRAD_SHIFT) & 3, KIND, not MASKED, BLOCK)
            # g <- g * min(1, max_grad_norm / ||g_all||)
            grad = gradient(raw * scale, param, c)
            if NORM:
                squares = tl.fma(raw.to(tl.float64), raw.to(tl.float64), squares)
        if MOMENTS:
            states = update(grad, param, states, c)
            # What is stored is what counts from here on.
            stored = ()
            random = tl.zeros([BLOCK], tl.int32)
            for k in tl.static_range(NUM_STATES):
                if STATE_KIND and STATE_KIND != NEAREST:
                    # As kernels.stored.rounded: 16 bits the first, the other 16 all others.
                    if k == 0:
                        random = random_at(
                            places, offset, i * BLOCK, t, not MASKED and DIMS == 1, DIMS, BLOCK
                        )
                    elif k == 1:
                        random = random >> 16
                stored = stored + (
                    store_state(
                        memory[k], at, states[k], random, mask, narrow, STATE_KIND,
                        not MASKED, BLOCK,
                    ),
                )  # fmt: skip
            states = stored
        if APPLY or NUM_LATE > 0:
            u = directions(grad, param, states, c)
            if not APPLY:
                pairs = sums(grad, param, states, u, c)
                new = ()
                for k in tl.static_range(NUM_LATE):
                    a, b = pairs[k][0].to(tl.float64), pairs[k][1].to(tl.float64)
                    if MASKED:  # with eps = 0 what was not read gives 0 / 0
                        a, b = tl.where(mask, a, 0.0), tl.where(mask, b, 0.0)
                    # Products of two float32 are exact in float64, fused or not.
                    new = new + (tl.fma(a, b, totals[k]),)
                totals = new
            else:
                # x <- x - (shrink * x + sum of steps_k * u_k)
                change = u[0] * moves[1]
                for k in tl.static_range(1, NUM_DIRECTIONS):
                    change = change + u[k] * moves[1 + k]
                if SHRINKS:
                    change = change + param * moves[0]
                param = param - change
                store_x(x, remainder, at, param, mask, split, X_KIND, not MASKED, BLOCK)
                code = (flags >> COPY_SHIFT) & 3
                _store_copy(copy, at, param, mask, code, COPY_KIND, not MASKED, BLOCK)
    return totals, squares


@triton.jit
def _store_copy(
    copy, at, param, mask, code, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    if KIND == BFLOAT16:
        store(copy, at, param, mask, tl.bfloat16, aligned, BLOCK)
    elif KIND == FLOAT16:
        store(copy, at, param, mask, tl.float16, aligned, BLOCK)
    elif KIND == MIXED:
        if code == BFLOAT16:
            store(copy, at, param, mask, tl.bfloat16, aligned, BLOCK)
        elif code == FLOAT16:
            store(copy, at, param, mask, tl.float16, aligned, BLOCK)


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
    early,
    numels,
    partials,
    NORM: tl.constexpr,
    ONCE: tl.constexpr,
    KIND: tl.constexpr,
    COPY_KIND: tl.constexpr,
    STATE_KIND: tl.constexpr,
    X_KIND: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """New states; partials of the late sums and of ||g||^2, float64 rows [chunks]. ONCE: new x too.

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
    h, found, scale, c = numbers_of(group, param, t, loss_scale, total, early)
    moves = ()
    if ONCE:
        wide = scales(h, t, found, (), tl.load(numels + param))
        for k in tl.static_range(NUM_DIRECTIONS + 1):
            moves = moves + (tl.cast(wide[1 + k], tl.float32),)
    totals = ()
    for _ in tl.static_range(NUM_LATE):
        totals = totals + (tl.zeros([BLOCK], tl.float64),)
    squares = tl.zeros([BLOCK], tl.float64)
    fast, every = whole_blocks(flags, numel, BLOCK)
    places = ()
    if STATE_KIND:
        # Here: in the loop the stores that may be to the same memory would have them read again.
        places = places_of(segment + (STATE + NUM_STATES + 1) * num_segments, num_segments, DIMS)
        if DIMS == 1:
            fast = tl.where(have_one_high(places, offset, numel), fast, 0)
    totals, squares = sweep(
        0, fast, totals, squares, segment, num_segments, flags, offset, numel, scale, c, moves,
        t, places, True, ONCE, NORM, False, KIND, COPY_KIND, STATE_KIND, X_KIND, DIMS, BLOCK,
    )  # fmt: skip
    totals, squares = sweep(
        fast, every, totals, squares, segment, num_segments, flags, offset, numel, scale, c, moves,
        t, places, True, ONCE, NORM, True, KIND, COPY_KIND, STATE_KIND, X_KIND, DIMS, BLOCK,
    )  # fmt: skip
    for k in tl.static_range(NUM_LATE):
        tl.store(partials + k * num_chunks + at, tl.sum(totals[k]))
    if NORM:
        tl.store(partials + NUM_LATE * num_chunks + at, tl.sum(squares))


def norms(
    param_table,
    num_chunks,
    groups,
    counters,
    active,
    loss_scale,
    overflow,
    total,
    early,
    numels,
    partials,
    totals,
    steps,
    ratios,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    LR_ZERO: tl.constexpr,
    SUM: tl.constexpr,
    FINISH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a param. SUM: partials -> sums of this rank.

    FINISH: sums of all ranks -> scales, what apply needs, and the param's counter. One launch
    where there is one rank, else two around the all-reduce of ``totals``.
    """
    param = param_table + tl.program_id(0) * PARAM_COLUMNS
    k = tl.load(param + PARAM_INDEX)
    group = groups + tl.load(param + PARAM_GROUP) * GROUP_COLUMNS
    takes_part = participates(active, overflow, k)
    row = totals + k * COLUMNS
    late = ()
    if SUM:
        first, end = tl.load(param + FIRST_CHUNK), tl.load(param + END_CHUNK)
        for i in tl.static_range(NUM_LATE):
            late = late + (sum_partials(partials + i * num_chunks, first, end, BLOCK),)
        counts = takes_part
        if LR_ZERO:
            # A dummy step with lr = 0 and zero gradients leaves no trace: EagerUpdate._counts.
            seen = sum_partials(partials + (NUM_LATE + 1) * num_chunks, first, end, BLOCK) > 0
            counts = counts & ((learning_rate(group) != 0) | seen)
        updated = counts.to(tl.float64)
        for i in tl.static_range(NUM_LATE):
            tl.store(row + i, late[i])
        if NORM:
            g_sq = sum_partials(partials + NUM_LATE * num_chunks, first, end, BLOCK)
            tl.store(row + COLUMNS - 2, g_sq)
        tl.store(row + COLUMNS - 1, updated)
    else:
        for i in tl.static_range(NUM_LATE):
            late = late + (tl.load(row + i),)
        updated = tl.load(row + COLUMNS - 1)
    if FINISH:
        is_updated = updated > 0
        counter = tl.load(counters + k)
        t = counter.to(tl.float64) + 1.0
        h, found, scale, c = numbers_of(group, k, t, loss_scale, total, early)
        wide = scales(h, t, found, late, tl.load(numels + k))
        step = steps + k * STEP_COLUMNS
        tl.store(step + UPDATED, is_updated.to(tl.float32))
        tl.store(step + ERASED, (takes_part & (updated <= 0)).to(tl.float32))
        tl.store(step + GRAD_SCALE, scale)
        for i in tl.static_range(NUM_DIRECTIONS + 1):
            tl.store(step + SHRINK + i, tl.cast(wide[1 + i], tl.float32))
        for i in tl.static_range(NUM_C):
            tl.store(step + SHRINK + 1 + NUM_DIRECTIONS + i, c[i])
        tl.store(counters + k, tl.where(is_updated, counter + 1.0, counter))
        tl.store(ratios + k, tl.where(is_updated, wide[0], float("nan")).to(tl.float32))


def apply(
    chunks,
    segments,
    num_segments,
    steps,
    KIND: tl.constexpr,
    COPY_KIND: tl.constexpr,
    STATE_KIND: tl.constexpr,
    X_KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x <- x - (shrink * x + sum of steps_k * u_k), and the low-precision copies."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * CHUNK_COLUMNS
    segment = segments + tl.load(chunk + SEGMENT)
    step = steps + tl.load(chunk + PARAM) * STEP_COLUMNS
    offset = tl.load(chunk + FIRST_BLOCK).to(tl.int64) * BLOCK
    flags = tl.load(segment + FLAGS * num_segments)
    numel = tl.where(tl.load(step + UPDATED) > 0, tl.load(chunk + NUMEL), 0)
    moves = ()
    for k in tl.static_range(NUM_DIRECTIONS + 1):
        moves = moves + (tl.load(step + SHRINK + k),)
    values = ()
    for k in tl.static_range(NUM_C):
        values = values + (tl.load(step + SHRINK + 1 + NUM_DIRECTIONS + k),)
    c, scale = Coefficients(*values), tl.load(step + GRAD_SCALE)
    squares = tl.zeros([BLOCK], tl.float64)
    fast, every = whole_blocks(flags, numel, BLOCK)
    sweep(
        0, fast, (), squares, segment, num_segments, flags, offset, numel, scale, c, moves,
        None, (), False, True, False, False, KIND, COPY_KIND, STATE_KIND, X_KIND, 1, BLOCK,
    )  # fmt: skip
    sweep(
        fast, every, (), squares, segment, num_segments, flags, offset, numel, scale, c, moves,
        None, (), False, True, False, True, KIND, COPY_KIND, STATE_KIND, X_KIND, 1, BLOCK,
    )  # fmt: skip


@functools.cache
def of(rule: Rule) -> SimpleNamespace:
    """moments_pass, norms and apply of one rule."""
    names = names_of(rule)
    inner = {"numbers_of": bound(_numbers_of, **names), "sweep": bound(_sweep, **names)}
    return SimpleNamespace(
        **{f.__name__: bound(f, _jit(), **names, **inner) for f in (moments_pass, norms, apply)}
    )
