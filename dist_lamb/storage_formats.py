"""How float32 numbers are stored in fewer bits: the arithmetic, on int32 patterns.

=============  =================================================================================
a moment       bfloat16, rounded at random so that the mean of many roundings is the number
               itself (or to nearest, which lets ``v <- 0.999 v`` stand still)
a master       a bfloat16 param and 16 bits more: the param is the master rounded to nearest,
               half away from zero, and the master is their sum as patterns
=============  =================================================================================

One source for tensors and for Triton: only ``+ * ^ & | >> <<`` of int32, comparisons, and the four
names ``bits``, ``real``, ``where`` and ``magnitude``, of which Triton has its own. Integers, for a
backend must not choose how to round; float32 is only compared, which is exact. ``>>`` of int32
copies the sign, hence the masks after it; ``*`` and ``+`` wrap around.

Random bits are a hash of (element of the whole param, the param's own step): of no position in a
buffer, shard or launch, so the same bits come out however the param is sharded. The mixing function
is lowbias32 of Chris Wellons' hash-prospector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def bits(x: Any) -> Any:
    """The int32 pattern of a float32."""
    return x.view(torch.int32)


def real(b: Any) -> Any:
    """The float32 of an int32 pattern."""
    return b.view(torch.float32)


def where(condition: Any, a: Any, b: Any) -> Any:
    return torch.where(condition, a, b)


def magnitude(x: Any) -> Any:
    return x.abs()


# --- random bits ----------------------------------------------------------------------------------


def mixed(x: Any) -> Any:
    """int32 -> int32, a bijection under which every bit of ``x`` matters to every bit."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def seed_of(step: Any) -> Any:
    """int32, of a param's own step."""
    return mixed(step)


def random_bits(low: Any, high: Any, seed: Any) -> Any:
    """32 bits for an element, whose int64 number has the halves ``low`` and ``high``."""
    return salted_bits(low, salt_of(high, seed))


def salt_of(high: Any, seed: Any) -> Any:
    """What all elements have alike whose numbers have this high half."""
    return seed + high * -0x61C88647


def salted_bits(low: Any, salt: Any) -> Any:
    return mixed(low ^ salt)


# --- bfloat16 -------------------------------------------------------------------------------------


def bfloat16_at_random(x: Any, r: Any) -> Any:
    """float32 -> the pattern of a bfloat16, int32 with the sign copied.

    Of the 65,536 values of ``r`` as many give the larger neighbour as ``x`` is near to it. What is
    finite stays finite, inf stays inf, and a quiet NaN stays NaN: arithmetic gives no other.
    """
    # From the largest bfloat16 on nothing is added: it would give inf, and of a NaN anything.
    return (bits(x) + where(magnitude(x) < 3.3895313892515355e38, r & 0xFFFF, 0)) >> 16


def bfloat16_to_nearest(x: Any) -> Any:
    """As :func:`bfloat16_at_random`, to the nearest, and to the even one of two; any NaN stays."""
    h = bfloat16_at_random(x, ((bits(x) >> 16) & 1) + 0x7FFF)
    return where(x == x, h, h | 0x40)


def of_bfloat16(h: Any) -> Any:
    """The float32 of a bfloat16's pattern."""
    return real(h << 16)


# --- a bfloat16 param and the remainder of its master ---------------------------------------------


def param_of(x: Any) -> Any:
    """A float32 master -> the pattern of its bfloat16 param: nearest, half away from zero.

    It is inf for those 32,768 masters of either sign that are nearer to inf than to the largest
    bfloat16, and a quiet NaN for every NaN.
    """
    return where(x == x, bits(x) + 0x8000, bits(x) | 0x400000) >> 16


def remainder_of(x: Any) -> Any:
    """A float32 master less its param, as patterns: int32 in [-32768, 32767], the low half of the
    master's as a signed number.

    Its sign tells whether the param was rounded away from zero. Of a NaN it says nothing.
    """
    return ((bits(x) & 0xFFFF) ^ 0x8000) - 0x8000


def master_of(h: Any, remainder: Any) -> Any:
    """The float32 master of a param's pattern and a remainder.

    Exact for what the two functions above give; any other remainder (the param was written to
    since) changes no number into NaN, and no param by more than half its last place.
    """
    x = real((h << 16) + remainder)
    return where(x == x, x, real(h << 16))


# --- whole tensors --------------------------------------------------------------------------------


def pattern(t: Tensor) -> Tensor:
    """The patterns of a bfloat16 tensor, int32."""
    return t.view(torch.int16).to(torch.int32)


def as_bfloat16(h: Tensor) -> Tensor:
    """bfloat16 of these patterns."""
    return h.to(torch.int16).view(torch.bfloat16)
