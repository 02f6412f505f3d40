"""The backends that compute a step on local tensors. None of them knows a rank.

A backend is a module with three functions on a :class:`Work`::

    grad_sq(work)                    partials of ||g||^2, float64 [rows]
    moments(work, c)                 updates m, v; partials of ||x||^2, ||u||^2, float64 [rows, 2]
    apply(work, c, step_size)        x <- x - step_size * u, and the low-precision copies

``c`` is a :class:`dist_lamb.rule.Coefficients` of [params] tensors, ``step_size`` is [params]; both
in ``work.dtype``. A partial belongs to a row; ``work.rows.sum`` adds rows up to params.

``fused_triton`` is another kind: it has all phases of a step in one function, on a table of
addresses, so that the number of launches does not grow with the number of params.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from .. import rule
from .tables import Segment, supports


class RowMap:
    """Which param every row of a :class:`Work` belongs to; built once, never changed.

    ``blocks`` holds, for every block, the param index of each of its rows.
    """

    def __init__(
        self, blocks: Sequence[Sequence[int]], num_params: int, device: torch.device
    ) -> None:
        flat = torch.tensor([k for block in blocks for k in block], dtype=torch.int64)
        self.num_params = num_params
        #: int64 [rows], the param of each row
        self.index = flat.to(device)
        self.sizes = [len(block) for block in blocks]
        #: the same, block by block
        self.indices = list(torch.split(self.index, self.sizes))
        self._subsets: dict[tuple[int, ...], RowMap] = {}
        order = torch.argsort(flat, stable=True)
        sorted_already = bool((order == torch.arange(len(flat))).all())
        self._order = None if sorted_already else order.to(device)
        self._lengths = torch.bincount(flat, minlength=num_params).to(device)
        #: (block, first row, end row, param): maximal runs of rows of one param
        self.runs: list[tuple[int, int, int, int]] = []
        for b, block in enumerate(blocks):
            for i, k in enumerate(block):
                if i and block[i - 1] == k:
                    self.runs[-1] = (b, self.runs[-1][1], i + 1, k)
                else:
                    self.runs.append((b, i, i + 1, k))

    def sum(self, partials: Tensor) -> Tensor:
        """[rows, ...] -> [params, ...], added in the order of the rows.

        Not index_add_: on a GPU that uses atomics, and the bits would change from run to run.
        """
        if self._order is not None:
            partials = partials[self._order]
        if not len(partials):
            return partials.new_zeros(self.num_params, *partials.shape[1:])
        return torch.segment_reduce(
            partials, "sum", lengths=self._lengths, axis=0, unsafe=True, initial=0
        )

    def subset(self, blocks: Sequence[int]) -> RowMap:
        """The map of some of the blocks only."""
        key = tuple(blocks)
        if key not in self._subsets:
            params = self.index.tolist()
            starts = [0, *itertools.accumulate(self.sizes)]
            chosen = [params[starts[b] : starts[b + 1]] for b in key]
            self._subsets[key] = RowMap(chosen, self.num_params, self.index.device)
        return self._subsets[key]


class Block(NamedTuple):
    """Tensors [rows, cols] that are worked on together; all contiguous, all of one shape.

    A tile matrix [tiles, TILE] of a flat buffer, every tile one param's own, or a whole tensor as
    a single row [1, numel].
    """

    grad: Tensor  # any floating dtype; never written
    param: Tensor  # what the rule reads and writes: float32 or float64
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None  # low-precision copy of param, written by apply


#: Where there is none, or where it is not looked at.
NO_GRADIENT = torch.empty(1, 0)


@dataclass
class Work:
    """What one step computes on."""

    blocks: list[Block]
    rows: RowMap
    dtype: torch.dtype  # of params and of all arithmetic but the sums of squares
    tiled: bool  # blocks are tile matrices
    #: what a backend keeps between its passes over these same tensors
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.rows.index.device

    @property
    def numel(self) -> int:
        return sum(block.param.numel() for block in self.blocks)

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Compute on these from now on, one for each block; the rest is as it was."""
        self.blocks = [Block(g, *b[1:]) for g, b in zip(gradients, self.blocks, strict=True)]

    def release(self) -> None:
        """Keep no gradient alive until the next step, which takes others."""
        self.take([NO_GRADIENT] * len(self.blocks))

    def segments(self) -> list[Segment]:
        """The same, one segment for every run of rows of a param, sorted by param."""
        found = []
        for b, lo, hi, k in self.rows.runs:
            grad, x, m, v, copy = (None if t is None else t[lo:hi] for t in self.blocks[b])
            found.append(Segment(k, grad, x, m, v, copy))  # type: ignore[arg-type]
        return sorted(found, key=lambda segment: segment.param)


class Kernels(Protocol):
    def grad_sq(self, work: Work) -> Tensor: ...
    def moments(self, work: Work, c: rule.Coefficients) -> Tensor: ...
    def apply(self, work: Work, c: rule.Coefficients, step_size: Tensor) -> None: ...


def square_sum(t: Tensor) -> Tensor:
    """Sum of squares of each row in float64, [rows, cols] -> [rows].

    The squares themselves are float64: rounding them to float32 first would leave norms that
    depend on how the tensor was cut.
    """
    return t.to(torch.float64, copy=True).square_().sum(dim=-1)


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether torch.compile can build CPU code here (it calls a C++ compiler at run time)."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return shutil.which(get_cpp_compiler()) is not None
    except Exception:  # a private module; its error for "no compiler" is no stable class either
        return any(shutil.which(cxx) for cxx in ("g++", "clang++", "c++"))


#: On CPU, elements below which "auto" stays with foreach: compiling takes tens of seconds, and
#: a step of that size has not that much to give back in a usual run.
COMPILE_FROM_NUMEL = 4 * 2**20


def select(impl: str, device: torch.device, numel: int) -> Kernels:
    """The backend for ``impl`` on ``device``, for ``numel`` local elements.

    Raises ``RuntimeError`` saying why if the backend asked for cannot run there.
    """
    if impl == "auto":
        if device.type == "cpu":
            worth_it = numel >= COMPILE_FROM_NUMEL and has_cpp_compiler()
            impl = "compiled" if worth_it else "foreach"
        else:
            impl = "compiled" if has_triton() else "foreach"
    elif impl == "triton":
        impl = "foreach"  # for what fused() does not take
    elif impl == "compiled" and device.type == "cpu" and not has_cpp_compiler():
        raise RuntimeError("impl='compiled' on CPU needs a C++ compiler, and none was found")
    return cast(Kernels, _module(impl))


def fused(impl: str, kinds: Iterable[tuple[torch.device, torch.dtype]]) -> ModuleType | None:
    """``fused_triton`` if ``impl`` means it and it can update params of ``kinds``, else None.

    It takes float32 and half-precision params on one device; others go to what :func:`select` says.
    Raises ``RuntimeError`` saying why if Triton was asked for and cannot run there.
    """
    kinds = set(kinds)
    devices = {device for device, _ in kinds}
    on_gpu = all(device.type == "cuda" for device in devices)  # ROCm too
    if impl == "triton":
        if not has_triton():
            raise RuntimeError("impl='triton' needs the triton package, which is not installed")
    elif impl != "auto" or not on_gpu or not has_triton():
        return None
    from . import fused_triton

    if not on_gpu and not fused_triton.INTERPRETED:
        raise RuntimeError(
            "impl='triton' runs on CUDA and ROCm devices, and params are on "
            f"{', '.join(sorted({d.type for d in devices}))}; with TRITON_INTERPRET=1 in the "
            "environment it is interpreted, slowly, for tests"
        )
    fits = len(devices) == 1 and all(supports(dtype) for _, dtype in kinds)
    return fused_triton if fits else None


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _module(impl: str) -> ModuleType:
    from . import compiled, foreach, reference

    return {"compiled": compiled, "foreach": foreach, "reference": reference}[impl]
