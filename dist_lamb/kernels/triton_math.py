"""What the Triton kernels are made of: the tables' columns, reads and writes."""

from __future__ import annotations

import triton
import triton.language as tl

from . import groups as _groups

#: Elements a program works on at a time. With 4 warps each thread has 4, one 16-byte access a
#: tensor; with 8 it needs twice the registers, which leaves room for half the threads: 1-2 % slower
#: on an H200.
BLOCK = 512
WARPS = 4
#: Registers a thread of a pass that rounds: the compiler would take up to 120, with which fewer
#: threads fit on a multiprocessor than it takes to keep the memory busy. With 72 some are spilled.
NARROW_REGISTERS = 80
#: Blocks of a narrow pass that are read ahead, into shared memory: a thread's 8 bytes of bfloat16
#: are too few to keep the memory busy, and registers are short.
NARROW_STAGES = tl.constexpr(4)

# --- the tables, as the kernels read them ---------------------------------------------------------


def _constants(*names: str) -> list[tl.constexpr]:
    return [tl.constexpr(i) for i in range(len(names))]


# columns of a chunk, int32, padded to 32 bytes
CHUNK_COLUMNS = tl.constexpr(8)
SEGMENT, PARAM, GROUP, FIRST_BLOCK, NUMEL = _constants(
    "segment", "param", "group", "first_block", "numel"
)
# columns of a param of the rule, int32
PARAM_COLUMNS = tl.constexpr(4)
FIRST_CHUNK, END_CHUNK, PARAM_GROUP, PARAM_INDEX = _constants("first", "end", "group", "index")
# columns of a group, float64; the rule's own begin with lr
GROUP_COLUMNS = tl.constexpr(_groups.GROUP_COLUMNS)
SIGN, MAX_GRAD_NORM, LR_ADDRESS, LR_DTYPE, LR = (
    tl.constexpr(getattr(_groups, name))
    for name in ("SIGN", "MAX_GRAD_NORM", "LR_ADDRESS", "LR_DTYPE", "LR")
)
# rows of the segments, int64: addresses, and flags; then the states', and where some are stored in
# fewer bits the remainder's, and Elements.row
GRAD, FLAGS, X, COPY, STATE = _constants("grad", "flags", "x", "copy", "state")
# flags: all addresses are multiples of 16; then the dtypes of gradient and copy
ALIGNED, GRAD_SHIFT, COPY_SHIFT = tl.constexpr(1), tl.constexpr(1), tl.constexpr(3)
# of the states; whether a bfloat16 param has a remainder
STATE_SHIFT, REMAINDER_SHIFT = tl.constexpr(5), tl.constexpr(7)
FLOAT32, BFLOAT16, FLOAT16, MIXED = (tl.constexpr(i) for i in range(4))
#: of states: bfloat16 rounded to nearest, not at random
NEAREST = tl.constexpr(2)
# what norms leaves for apply, float32 [params, STEP_COLUMNS]; shrink, steps and then the rule's
# coefficients end it
STEP_COLUMNS = tl.constexpr(24)
UPDATED, ERASED, GRAD_SCALE, SHRINK = _constants("updated", "erased", "grad_scale", "shrink")

# --- memory ---------------------------------------------------------------------------------------


@triton.jit
def pointer_at(address, offset, dtype: tl.constexpr, aligned: tl.constexpr):
    """Pointer to element ``offset``, a multiple of BLOCK, of the memory at ``address``."""
    pointer = address.to(tl.pointer_type(dtype))
    if aligned:
        # Without this the compiler cannot know, and reads 4 bytes at a time instead of 16.
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offset


@triton.jit
def load(address, offset, mask, dtype: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr):
    pointers = pointer_at(address, offset, dtype, aligned) + tl.arange(0, BLOCK)
    if mask is None:
        return tl.load(pointers).to(tl.float32)
    else:
        return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(
    address, offset, value, mask, dtype: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    pointers = pointer_at(address, offset, dtype, aligned) + tl.arange(0, BLOCK)
    if mask is None:
        tl.store(pointers, value.to(dtype))
    else:
        tl.store(pointers, value.to(dtype), mask=mask)


@triton.jit
def load_bits(address, offset, mask, aligned: tl.constexpr, BLOCK: tl.constexpr):
    """16 bits of memory for each element, int32 with the sign copied."""
    if aligned:
        # By pairs: of loads of 16 bits the compiler takes every second apart in three instructions.
        pair = pointer_at(address, offset >> 1, tl.int32, aligned) + tl.arange(0, BLOCK // 2)
        pairs = tl.load(pair)
        return tl.interleave((pairs << 16) >> 16, pairs >> 16)
    else:
        pointers = pointer_at(address, offset, tl.int16, aligned) + tl.arange(0, BLOCK)
        return tl.load(pointers, mask=mask, other=0).to(tl.int32)


@triton.jit
def load_bfloat16(address, offset, mask, aligned: tl.constexpr, BLOCK: tl.constexpr):
    return (load_bits(address, offset, mask, aligned, BLOCK) << 16).to(tl.float32, bitcast=True)


@triton.jit
def load_any(
    address, offset, mask, code, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    """A gradient as float32; ``KIND`` is the dtype of all of them, or MIXED: then ``code`` says."""
    if KIND == FLOAT32:
        return load(address, offset, mask, tl.float32, aligned, BLOCK)
    elif KIND == BFLOAT16:
        return load_bfloat16(address, offset, mask, aligned, BLOCK)
    elif KIND == FLOAT16:
        return load(address, offset, mask, tl.float16, aligned, BLOCK)
    else:
        if code == FLOAT32:
            g = load(address, offset, mask, tl.float32, aligned, BLOCK)
        elif code == BFLOAT16:
            g = load_bfloat16(address, offset, mask, aligned, BLOCK)
        else:
            g = load(address, offset, mask, tl.float16, aligned, BLOCK)
        return g


@triton.jit
def whole_blocks(flags, numel, BLOCK: tl.constexpr):
    """(whole blocks that may be read 16 bytes at a time, all blocks) of a chunk."""
    fast = tl.where((flags & ALIGNED) != 0, numel // BLOCK, 0)
    return fast, (numel + BLOCK - 1) // BLOCK


@triton.jit
def participates(active, overflow, param):
    takes_part = tl.load(active + param) != 0
    if overflow is not None:
        takes_part = takes_part & (tl.load(overflow) <= 0)
    return takes_part


@triton.jit
def sum_partials(partials, first, end, BLOCK: tl.constexpr):
    acc = tl.zeros([BLOCK], tl.float64)
    for at in range(first, end, BLOCK):
        i = at + tl.arange(0, BLOCK)
        acc += tl.load(partials + i, mask=i < end, other=0.0)
    return tl.sum(acc)


@triton.jit
def learning_rate(group):
    bits = group.to(tl.pointer_type(tl.int64))
    lr = tl.load(group + LR)
    dtype = tl.load(bits + LR_DTYPE)
    if dtype == 1:
        lr = tl.load(tl.load(bits + LR_ADDRESS).to(tl.pointer_type(tl.float32))).to(tl.float64)
    elif dtype == 2:
        lr = tl.load(tl.load(bits + LR_ADDRESS).to(tl.pointer_type(tl.float64)))
    return lr
