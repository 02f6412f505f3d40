"""Numbers in fewer bits: every pattern, the mean of roundings, and which random bits are whose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_lamb import storage_formats as formats
from dist_lamb.elements import Elements, numbers_of
from dist_lamb.state import flat_row

pytest.importorskip("triton")

INF, NAN = float("inf"), float("nan")
#: Around every power of two, and the ends of every kind of float32.
EDGES = [
    sign | exponent << 23 | mantissa
    for sign in (0, 1 << 31)
    for exponent in range(256)
    for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    for mantissa in (low, 0x10000 | low, 0x3F0000 | low, 0x400000 | low, 0x7F0000 | low)
]
#: Numbers of patterns at a time.
PART = 2**22
#: All 2^32 take over an hour on two CPU cores, less than a minute on a GPU.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def of_patterns(patterns: Tensor) -> Tensor:
    """float32 of int64 patterns."""
    return torch.where(patterns >= 2**31, patterns - 2**32, patterns).int().view(torch.float32)


def every(stride: int) -> Iterator[Tensor]:
    """Patterns of float32: every ``stride``-th, in parts; and the edges."""
    yield of_patterns(torch.tensor(EDGES, device=DEVICE))
    for at in range(0, 2**32, stride * PART):
        end = min(at + stride * PART, 2**32)
        yield of_patterns(torch.arange(at, end, stride, device=DEVICE))


SWEEPS = [
    pytest.param(2 * 509, id="strided"),
    pytest.param(1, id="all", marks=[pytest.mark.slow, pytest.mark.timeout(9000)]),
]


def same(a: Tensor, b: Tensor) -> bool:
    """The same patterns, any NaN being equal to any."""
    return bool(((formats.bits(a) == formats.bits(b)) | (a.isnan() & b.isnan())).all())


# --- the master in two halves ---------------------------------------------------------------------


@pytest.mark.parametrize("stride", SWEEPS)
def test_a_master_is_its_param_and_the_remainder(stride: int) -> None:
    """For every float32 the two halves give it back, and the param is the nearest bfloat16."""
    for x in every(stride):
        h, low = formats.param_of(x), formats.remainder_of(x)
        assert h.min() >= -(2**15)
        assert h.max() < 2**15
        assert low.min() >= -(2**15)
        assert low.max() < 2**15
        assert same(formats.master_of(h, low), x)
        param = formats.as_bfloat16(h)
        # Rounded as torch does it, but for ties: those go away from zero.
        nearest = x.to(torch.bfloat16)
        tie = (formats.bits(x) & 0xFFFF) == 0x8000
        away = (formats.bits(x) + 0x8000) >> 16
        want = torch.where(tie & x.isfinite(), away, formats.pattern(nearest))
        assert same(param.float(), formats.of_bfloat16(want))


def test_masters_that_round_to_inf_or_are_nan() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([0.0, largest, -largest, INF, -INF, NAN, -NAN])
    x[0] = of_patterns(torch.tensor([0x7F7F7FFF]))
    h, low = formats.param_of(x), formats.remainder_of(x)
    param = formats.as_bfloat16(h)
    assert param.tolist()[1:5] == [INF, -INF, INF, -INF]
    assert math.isfinite(param[0])
    assert param[5:].isnan().all()
    assert low[3:].tolist() == [0, 0, 0, 0]
    assert same(formats.master_of(h, low), x)


def test_a_param_that_was_written_to_stays_within_half_a_place() -> None:
    """A remainder of another value makes no NaN, and no number whose rounding is another param."""
    lows = torch.tensor([-(2**15), -1, 0, 1, 2**15 - 1], dtype=torch.int32)
    params = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    h, low = torch.cartesian_prod(params, lows).unbind(1)
    x, param = formats.master_of(h, low), formats.of_bfloat16(h)
    assert torch.equal(x.isnan(), param.isnan())
    again = formats.of_bfloat16(formats.param_of(x))
    assert same(again, param)


# --- moments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", SWEEPS)
def test_every_moment_is_rounded_to_a_neighbour(stride: int) -> None:
    """Finite stays finite, inf and NaN stay, a bfloat16 stays what it is; and to nearest.

    Rounded at random are results of arithmetic, so signaling NaNs are rounded to nearest only.
    """
    for every_x in every(stride):
        near = formats.of_bfloat16(formats.bfloat16_to_nearest(every_x))
        want = every_x.to(torch.bfloat16).float()
        largest = formats.of_bfloat16(formats.bits(every_x) >> 16)
        want = torch.where(want.isinf() & every_x.isfinite(), largest, want)
        assert same(near, want)
        x = every_x[~every_x.isnan() | (formats.bits(every_x) & 0x400000 != 0)]
        b = formats.bits(x)
        below = formats.of_bfloat16(b >> 16)  # towards zero
        for r in (0, 1, 0x7FFF, 0x8000, 0xFFFF, -1):
            h = formats.bfloat16_at_random(x, torch.full_like(b, r))
            got = formats.of_bfloat16(h)
            assert same(got.isfinite().float(), x.isfinite().float())
            assert torch.equal(got.isnan(), x.isnan())
            above = (b + 0xFFFF) >> 16
            up = (h == above) & (r & 0xFFFF > 0)
            assert (up | (got == below) | got.isnan()).all()
            exact = (b & 0xFFFF) == 0
            assert same(got[exact], x[exact])


def test_the_mean_of_all_roundings_is_the_number() -> None:
    """Exactly: over the 65,536 values of r the larger neighbour comes as often as x is near it."""
    generator = torch.Generator().manual_seed(0)
    r = torch.arange(2**16, dtype=torch.int32)
    for x in (torch.randn(40, generator=generator) * 10.0 ** torch.arange(-20, 20)).tolist():
        rounded = formats.of_bfloat16(formats.bfloat16_at_random(torch.full((2**16,), x), r))
        assert float(rounded.double().mean()) == torch.tensor(x).double()


def test_roundings_of_elements_and_steps_are_unbiased() -> None:
    """A mean over n roundings is off by less than 6 of its standard deviations.

    One rounding of x between neighbours at a distance d is d * (Bernoulli(p) - p) off, whose
    standard deviation is at most d / 2; so the mean of n independent ones is within 6 * d / (2
    sqrt(n)) but for 2 cases in 1e9.
    """
    n, x = 2**16, torch.tensor([1.001953125, 1.3712, 3e-9, -7.7e4, 1.00001])
    elements = torch.arange(n, dtype=torch.int32)
    zero = torch.zeros_like(elements)
    for value in x:
        d = float(torch.ldexp(torch.ones(()), torch.frexp(value).exponent - 8))
        values = value.expand(n).contiguous()
        fixed_step = formats.random_bits(elements, zero, formats.seed_of(torch.tensor(7)))
        fixed_element = formats.random_bits(zero, zero, formats.seed_of(elements + 1))
        for r in (fixed_step, fixed_step >> 16, fixed_element, fixed_element >> 16):
            got = formats.of_bfloat16(formats.bfloat16_at_random(values, r)).double()
            assert abs(float(got.mean() - value.double())) < 6 * d / (2 * math.sqrt(n))


def test_a_decaying_moment_stands_still_unless_rounded_at_random() -> None:
    """Why moments are rounded at random: 0.999 v is nearer to v than to the next bfloat16 below.

    At random the mean of n elements follows 0.999^k. Relative to it, a rounding has a standard
    deviation of at most 2^-8, so 1,000 of them have at most sqrt(1000) 2^-8 = 0.124, and the mean
    of n = 65,536 elements 0.0005; 6 of these are allowed.
    """
    n, steps = 2**16, 1000
    elements = torch.arange(n, dtype=torch.int32)
    zero = torch.zeros_like(elements)
    nearest, random = torch.ones(n), torch.ones(n)
    for step in range(1, steps + 1):
        nearest = formats.of_bfloat16(formats.bfloat16_to_nearest(0.999 * nearest))
        r = formats.random_bits(elements, zero, formats.seed_of(torch.tensor(step)))
        random = formats.of_bfloat16(formats.bfloat16_at_random(0.999 * random, r))
    assert (nearest == 1).all()
    assert abs(float(random.double().mean()) / 0.999**steps - 1) < 6 * 0.0005


def _chi_squared(values: Tensor, bins: int) -> float:
    counts = torch.bincount(values, minlength=bins).double()
    expected = len(values) / bins
    return float(((counts - expected) ** 2 / expected).sum())


def test_random_bits_are_even_and_apart() -> None:
    """Chi-squared of 16 x 16 bins over pairs of what must not depend on each other.

    Of 255 degrees of freedom: mean 255, standard deviation 22.6; 400 is more than 6 of them.
    """
    n = 2**18
    elements = torch.arange(n, dtype=torch.int32)
    zero = torch.zeros_like(elements)

    def of(step: int, high: int = 0) -> Tensor:
        seed = formats.seed_of(torch.tensor(step, dtype=torch.int32))
        return formats.random_bits(elements, zero + high, seed)

    def top(r: Tensor) -> Tensor:
        return ((r & 0xFFFF) >> 12).long()

    now = of(1000)
    others = {
        "its other half": now >> 16,
        "the next element": now.roll(1),
        "the next row of 1,024": now.roll(1024),
        "the next step": of(1001),
        "a step 256 later": of(1256),
        "the element 2^32 further": of(1000, high=1),
    }
    for name, other in others.items():
        assert _chi_squared(top(now) * 16 + top(other), 256) < 400, name


# --- which element --------------------------------------------------------------------------------


def _pieces() -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, a piece of a tensor of numbers in any memory format, the whole)."""
    for shape in ((5, 6), (7,), (), (4, 1), (2, 3, 4), (4, 6, 3, 5), (2, 3, 4, 5, 3)):
        n = torch.Size(shape).numel()
        whole = torch.arange(n).view(shape)
        yield f"whole {shape}", whole, whole
        for dim, size in enumerate(shape):
            half = size // 2
            yield f"{shape} dim {dim}", whole.narrow(dim, half, size - half).contiguous(), whole
            for other in range(dim + 1, len(shape)):
                part = whole.narrow(dim, half, size - half).narrow(other, 0, -(-shape[other] // 2))
                yield f"{shape} dims {dim} and {other}", part.contiguous(), whole
                yield f"{shape} {dim} {other} transposed", part.mT.contiguous().mT, whole
        if len(shape) in (4, 5):
            memory = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
            for t in (whole, whole[1:], whole[:, 1:], whole[1:, :, 1:]):
                yield f"{shape} channels_last", t.contiguous(memory_format=memory), whole


def _of(piece: Tensor, whole: Tensor) -> Elements:
    flat = int(piece.flatten()[0])
    offsets = [int(i) for i in torch.unravel_index(torch.tensor(flat), whole.shape)]
    return Elements.of(piece.shape, piece.stride(), whole.shape, offsets)


def test_elements_of_pieces_are_numbered_as_in_the_whole_param() -> None:
    for name, piece, whole in _pieces():
        elements = _of(piece, whole)
        want = flat_row(piece)[0]
        q = torch.arange(elements.first, elements.first + piece.numel())
        assert torch.equal(numbers_of(q, elements.start, elements.sizes, elements.strides), want), (
            name
        )
        for at in (i for i in (1, 3) if i < piece.numel()):
            later = elements.from_(at)
            q = torch.arange(later.first, later.first + piece.numel())[: piece.numel() - at]
            got = numbers_of(q, later.start, later.sizes, later.strides)
            assert torch.equal(got, want[at:]), (name, at)


def test_pieces_in_one_part_need_no_division() -> None:
    assert Elements.of((4, 6), (6, 1)) == Elements()
    assert Elements.of((2, 6), (6, 1), (4, 6), (2, 0)) == Elements(12, 0, (), (1,))
    assert Elements.of((4, 3), (3, 1), (4, 6), (0, 3)) == Elements(3, 0, (3,), (1, 6))
    assert Elements.of((4, 3), (3, 1), (4, 6), (0, 3)).row(3) == [0, 3, 1, 3, 0, 1, 6]


# --- Triton ---------------------------------------------------------------------------------------


def in_triton(x: Tensor, r: Tensor, rows: Tensor, dims: int) -> list[Tensor]:
    """What the kernels make of these."""
    import format_kernels

    return [t.cpu() for t in format_kernels.run(x, r, rows, dims)]


def check_triton(run: Callable[..., list[Tensor]], device: str = "cpu") -> None:
    """Bit by bit what tensors give, of every kind of float32 and of every piece."""
    x = torch.cat(list(every(2**16 - 15))).cpu()
    x = x[: len(x) // 512 * 512]
    assert len(x) > 2**16 - 512
    generator = torch.Generator().manual_seed(1)
    r = torch.randint(-(2**31), 2**31, x.shape, generator=generator, dtype=torch.int64).int()
    h, low = formats.param_of(x), formats.remainder_of(x)
    want = [
        formats.bfloat16_at_random(x, r),
        formats.bfloat16_to_nearest(x),
        formats.bits(formats.of_bfloat16(h)),
        h,
        low,
        formats.bits(formats.master_of(h, r >> 16)),
        formats.random_bits(r, r >> 5, formats.seed_of(h)),
    ]
    here = [t.to(device) for t in (x, r, torch.zeros(1, 7, dtype=torch.int64))]
    *got, _ = run(*here, 3)
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        if k in (2, 5):  # of a NaN the sign is left to the machine
            assert same(formats.real(a), formats.real(b)), k
        else:
            assert torch.equal(a, b), k
    _check_numbers(run, device)


def test_triton_gives_the_same_bits(interpreted: Callable[..., Any]) -> None:
    """Integers throughout: Triton's interpreter rounds to bfloat16 by cutting bits off."""
    check_triton(lambda *args: interpreted(in_triton, *args))


def _check_numbers(run: Callable[..., list[Tensor]], device: str) -> None:
    big = 2**31 + 5
    found = [(_of(piece, whole), piece.numel()) for _, piece, whole in _pieces()]
    found += [
        (Elements(start=2**33 + 7), 512),
        (Elements(3, 5 * big + 1, (1000,), (1, big)), 2000),
        (Elements(3, 2**34, (7, 1000), (2**20, 1, big)), 2000),
    ]
    contiguous = [(piece, n) for piece, n in found if not piece.sizes]
    # Blocks that begin, end and are cut at a multiple of 2^32.
    contiguous += [
        (Elements(2**32 * k + start, 0, (), (stride,)), 1024)
        for k, start, stride in ((0, 0, 1), (1, -1, 1), (5, -512, 1), (3, -700, 2), (1, 9, 2**22))
    ]
    for pieces in (found, contiguous):
        dims = max(len(elements.strides) for elements, _ in pieces)
        rows = torch.tensor([elements.row(dims) for elements, _ in pieces])
        here = [t.to(device) for t in (torch.zeros(0), torch.zeros(0).int(), rows)]
        for (elements, numel), numbers, random in zip(pieces, *run(*here, dims)[-1], strict=True):
            q = torch.arange(elements.first, elements.first + 1024)
            want = numbers_of(q, elements.start, elements.sizes, elements.strides)
            assert torch.equal(numbers[:numel], want[:numel]), elements
            seed = formats.seed_of(torch.tensor(3, dtype=torch.int32))
            bits = formats.random_bits(want.int(), (want >> 32).int(), seed)
            assert torch.equal(random[:numel].int(), bits[:numel]), elements
