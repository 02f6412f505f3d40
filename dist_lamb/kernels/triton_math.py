"""What the Triton kernels are made of: the tables' columns, the equations, reads and writes."""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import FIELDS
from .segments import COLUMNS

#: Elements a program works on at a time. With 4 warps each thread has 4, one 16-byte access a
#: tensor; with 8 it needs twice the registers, which leaves room for half the threads: 1-2 % slower
#: on an H200.
BLOCK = 512
WARPS = 4

# --- the tables, as the kernels read them ---------------------------------------------------------


def _constants(*names: str, of: tuple[str, ...] | None = None) -> list[tl.constexpr]:
    return [tl.constexpr((of or names).index(name)) for name in names]


# columns of a chunk, int32, padded to 32 bytes
CHUNK_COLUMNS = tl.constexpr(8)
SEGMENT, PARAM, GROUP, FIRST_BLOCK, NUMEL = _constants(
    "segment", "param", "group", "first_block", "numel"
)
# columns of a param, int32, padded to 16 bytes
PARAM_COLUMNS = tl.constexpr(4)
FIRST_CHUNK, END_CHUNK, PARAM_GROUP = _constants("first_chunk", "end_chunk", "group")
# columns of a group, float64
GROUP_COLUMNS = tl.constexpr(len(FIELDS))
(LR, BETA1, BETA2, BETA3, EPS, DECAY, L2, SIGN, CORRECTED, MAX_GRAD_NORM) = _constants(
    "lr", "beta1", "beta2", "beta3", "eps", "decay", "l2", "sign", "corrected", "max_grad_norm",
    of=FIELDS,
)  # fmt: skip
(ADAPT, TRUST_LO, TRUST_HI, PHI_LO, PHI_HI) = _constants(
    "adapt", "trust_lo", "trust_hi", "phi_lo", "phi_hi", of=FIELDS
)
LOG_BETA1, LOG_BETA2, LR_ADDRESS, LR_DTYPE = _constants(
    "log_beta1", "log_beta2", "lr_address", "lr_dtype", of=FIELDS
)
# rows of the segments, int64: addresses, and flags
GRAD, FLAGS, X, COPY, M, V = _constants("grad", "flags", "x", "copy", "m", "v")
# flags: all addresses are multiples of 16; then the dtypes of gradient and copy
ALIGNED, GRAD_SHIFT, COPY_SHIFT = tl.constexpr(1), tl.constexpr(1), tl.constexpr(3)
FLOAT32, BFLOAT16, FLOAT16, MIXED = (tl.constexpr(i) for i in range(4))
# sums of a chunk, rows of the partials; the first are those of a param, columns of the sums
X_SQ, U_SQ, GRAD_SQ, HISTORY = _constants("x_sq", "u_sq", "grad_sq", "history")
SUM_COLUMNS, UPDATED_COLUMN = tl.constexpr(COLUMNS), tl.constexpr(COLUMNS - 1)
# what norms leaves for apply, float32 [params, STEP_COLUMNS]
STEP_COLUMNS = tl.constexpr(8)
SCALE1, SCALE2, STEP_EPS, STEP_DECAY, STEP_SIZE, UPDATED, ERASED = _constants(
    "scale1", "scale2", "eps", "decay", "step_size", "updated", "erased"
)

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
def load_any(
    address, offset, mask, code, KIND: tl.constexpr, aligned: tl.constexpr, BLOCK: tl.constexpr
):
    """A gradient as float32; ``KIND`` is the dtype of all of them, or MIXED: then ``code`` says."""
    if KIND == FLOAT32:
        return load(address, offset, mask, tl.float32, aligned, BLOCK)
    elif KIND == BFLOAT16:
        return load(address, offset, mask, tl.bfloat16, aligned, BLOCK)
    elif KIND == FLOAT16:
        return load(address, offset, mask, tl.float16, aligned, BLOCK)
    else:
        if code == FLOAT32:
            g = load(address, offset, mask, tl.float32, aligned, BLOCK)
        elif code == BFLOAT16:
            g = load(address, offset, mask, tl.bfloat16, aligned, BLOCK)
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
