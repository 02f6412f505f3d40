"""The rules' pages and the storage formats as Triton functions: the same source, with the backend's
own operations.

A function is copied with other globals: the names of :mod:`dist_lamb.rules.ops`, and the first four
of :mod:`dist_lamb.storage_formats`, become the ones below, whatever else it calls is treated alike,
and the copy is jitted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import triton
import triton.language as tl

from .. import storage_formats
from ..rules import Rule, ops


@triton.jit
def div(a, b):
    return tl.div_rn(a, b)


@triton.jit
def sqrt(a):
    # of float64 the plain one is correctly rounded
    if a.dtype == tl.float64:
        return tl.sqrt(a)
    else:
        return tl.sqrt_rn(a)


@triton.jit
def maximum(a, b):
    # A NaN stays. Not `|`: the interpreter takes that of a block and a scalar for one of floats.
    return tl.where(a < b, b, tl.where(b != b, b, a))


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def power(base, log2_base, exponent):
    return tl.exp2(exponent * log2_base)


@triton.jit
def bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def real(b):
    return b.to(tl.float32, bitcast=True)


@triton.jit
def magnitude(x):
    return tl.abs(x)


_OPS: dict[Any, Any] = {
    ops.div: div,
    ops.sqrt: sqrt,
    ops.maximum: maximum,
    ops.where: where,
    ops.power: power,
    storage_formats.bits: bits,
    storage_formats.real: real,
    storage_formats.where: where,
    storage_formats.magnitude: magnitude,
}


def bound(f: Any, jit: Callable[[Any], Any] = triton.jit, **names: Any) -> Any:
    """``f``, jitted, with other globals."""
    copy = FunctionType(f.__code__, {**f.__globals__, **names}, f.__name__, f.__defaults__)
    copy.__module__, copy.__qualname__ = f.__module__, f.__qualname__
    # Without them no argument of a kernel is a tl.constexpr.
    copy.__annotations__ = f.__annotations__
    return jit(copy)


@functools.cache
def on_device(f: Any) -> Any:
    """A function of a rule or a format, and all that it calls."""
    if f in _OPS:
        return _OPS[f]
    called = ((name, f.__globals__.get(name)) for name in f.__code__.co_names)
    names = {name: on_device(g) for name, g in called if isinstance(g, FunctionType)}
    # adam.direction and the like
    # The interpreter looks for tl, the compiler into annotations.
    none = tl.constexpr(None)
    return bound(f, tl=tl, Array=none, Any=none, **names)


@functools.cache
def names_of(rule: Rule) -> dict[str, Any]:
    """What the kernels call and count in one rule, by the names that they have for it."""
    functions = ("coefficients", "gradient", "update", "directions", "sums", "scales")
    counts = {
        "NUM_STATES": len(rule.states),
        "NUM_H": len(rule.h._fields),  # type: ignore[attr-defined]
        "NUM_C": len(rule.idle),
        "NUM_LATE": len(rule.late),
        "NUM_DIRECTIONS": rule.num_directions,
        "SHRINKS": rule.shrinks,
        "READS_GRAD": rule.reads_grad,
        # the places of the early sums that it wants
        "EARLY_XX": "x.x" in rule.early,
        "EARLY_XG": "x.g" in rule.early,
        "EARLY_GG": "g.g" in rule.early,
    }
    return {
        **{name: on_device(getattr(rule, name)) for name in functions},
        **{name: tl.constexpr(value) for name, value in counts.items()},
        "Hyperparameters": rule.h,
        "Coefficients": type(rule.idle),
    }
