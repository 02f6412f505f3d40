"""Kernels that show what :mod:`dist_lamb.kernels.triton_formats` makes of numbers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_lamb.kernels.triton_formats import (
    bfloat16_at_random,
    bfloat16_to_nearest,
    have_one_high,
    master_of,
    numbers_of,
    of_bfloat16,
    param_of,
    places_of,
    random_at,
    random_bits,
    remainder_of,
    seed_of,
)
from dist_lamb.kernels.triton_rules import bits

BLOCK = 512
#: of the random bits
STEP = tl.constexpr(3)


@triton.jit
def all_formats(x, r, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, noise = tl.load(x + at), tl.load(r + at)
    h = param_of(value)
    tl.store(out + at, bfloat16_at_random(value, noise))
    tl.store(out + n + at, bfloat16_to_nearest(value))
    tl.store(out + 2 * n + at, bits(of_bfloat16(h)))
    tl.store(out + 3 * n + at, h)
    tl.store(out + 4 * n + at, remainder_of(value))
    tl.store(out + 5 * n + at, bits(master_of(h, noise >> 16)))
    tl.store(out + 6 * n + at, random_bits(noise, noise >> 5, seed_of(h)))


@triton.jit
def all_numbers(rows, out, DIMS: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0)
    places = places_of(rows + k * (2 * DIMS + 1), 1, DIMS)
    for i in range(2):
        at = k * 2 * BLOCK + i * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, numbers_of(places, i * BLOCK, DIMS, BLOCK))
        t = tl.full([], STEP, tl.float64)
        random = random_at(places, i * BLOCK - 7, 7, t, False, DIMS, BLOCK)
        if DIMS == 1 and have_one_high(places, i * BLOCK - 7, BLOCK + 7):
            random = random_at(places, i * BLOCK - 7, 7, t, True, DIMS, BLOCK)
        tl.store(out + tl.num_programs(0) * 2 * BLOCK + at, random.to(tl.int64))


def run(x: Tensor, r: Tensor, rows: Tensor, dims: int) -> list[Tensor]:
    """The outputs of the first kernel, int32 each, and [2, rows, 1024] int64: the numbers, and
    random bits of them."""
    out = torch.zeros(7, len(x), dtype=torch.int32, device=x.device)
    numbers = torch.zeros(2, len(rows), 2 * BLOCK, dtype=torch.int64, device=rows.device)
    if len(x):
        all_formats[(len(x) // BLOCK,)](x, r, out, len(x), BLOCK=BLOCK)
    all_numbers[(len(rows),)](rows, numbers, DIMS=dims, BLOCK=BLOCK)
    return [*out, numbers]
