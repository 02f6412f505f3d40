"""The names that the rules' equations use beside ``+ - * <``: on tensors, and on lists of tensors.

``kernels.triton_rules`` has the same names for Triton, correctly rounded.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

#: A tensor, a list of tensors that behaves as one (``kernels.foreach.TensorList``), or a value in a
#: Triton kernel.
Array: TypeAlias = Any


def div(a: Array, b: Array) -> Array:
    return a / b


def sqrt(a: Array) -> Array:
    return a.sqrt()


def maximum(a: Array, b: Array) -> Array:
    return a.maximum(b)


def where(condition: Array, a: Array, b: Array) -> Array:
    """Of tensors and numbers; no lists of tensors."""
    return torch.where(condition, a, b)


def power(base: Array, log2_base: Array, exponent: Array) -> Array:
    """base ** exponent; a kernel takes the logarithm, which the host has taken for it."""
    return base**exponent
