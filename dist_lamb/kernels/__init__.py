"""The backends that compute a step on local tensors. None of them knows a norm or a rank.

An :class:`Update` is made from segments on one device and kept from step to step, for as long as
they are where they were. Its three phases are called by :mod:`dist_lamb.step`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .. import _torch_private
from ..rules import RULES, Rule

if TYPE_CHECKING:
    from .groups import GroupTable
    from .segments import Scalars, Segment

#: On CPU, elements below which "auto" stays with foreach: compiling takes tens of seconds, and
#: a step of that size has not that much to give back in a usual run.
COMPILE_FROM_NUMEL = 4 * 2**20


class Update(Protocol):
    """One step's arithmetic on segments. Nothing in it waits for a device."""

    device: torch.device
    #: whether it keeps the tensors alive that it was made from, and not only knows their addresses
    keeps_memory: bool
    counters: Tensor  # float32 [params], the params' step counts, written by apply

    @property
    def ratios(self) -> Tensor:
        """Of the last step: float32 [params] trust ratios, NaN where a param took no part."""
        ...

    @property
    def sums(self) -> Tensor:
        """Of the last step: float64 [params, columns], over all ranks."""
        ...

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        """The gradients of the next step, one a segment, laid out as x and of the dtypes they had
        at first; None where there is none: then the param takes no part."""
        ...

    def set_active(self, active: Tensor) -> None:
        """bool [params]: which take part; the gradients of the others are zero."""
        ...

    def release(self) -> None:
        """Keep no gradient alive."""
        ...

    def grad_sq(self, reduction_groups: Sequence[Tensor] | None) -> Tensor:
        """Sums of squares of the gradients as they are, float64 [groups of params + 1], one for
        each mask bool [params] (None: one of all); the last element is 0 and free for a flag."""
        ...

    def early(self) -> Tensor:
        """x.x, x.g, g.g of the gradients as they are, float64 [params, 3]; 0 where not wanted."""
        ...

    def moments(self, scalars: Scalars, to_reduce: bool, settled: bool) -> Tensor:
        """New states; sums float64 [params, columns]. Not ``to_reduce``: only for apply.

        ``settled``: which params step is known, so that a rule without late sums may move x too.
        """
        ...

    def apply(self, sums: Tensor) -> None:
        """x <- x - (shrink * x + steps * u) from the sums over all ranks; counters and ratios."""
        ...


def make_update(
    segments: Sequence[Segment],
    counters: Tensor,
    groups: GroupTable,
    *,
    impl: str,
    tiled: bool = False,
    keep: list[Any],
) -> Update:
    """The Update that ``impl`` means for segments sorted by param, on the device of ``counters``.

    ``tiled``: the segments are matrices [tiles, TILE]. ``keep`` is for what CUDA graphs go on
    reading, and lives as long as the optimizer.

    Raises ``RuntimeError`` saying why if the backend asked for cannot run there.
    """
    found = list(dict.fromkeys(groups.rules)) or [RULES["lamb"]]
    if len(found) > 1:
        from .several import SeveralRules

        return SeveralRules(
            segments,
            groups,
            [
                (rule, functools.partial(_one_rule, counters, groups, rule, impl, tiled, keep))
                for rule in found
            ],
        )
    return _one_rule(counters, groups, found[0], impl, tiled, keep, segments)


def _one_rule(
    counters: Tensor,
    groups: GroupTable,
    rule: Rule,
    impl: str,
    tiled: bool,
    keep: list[Any],
    segments: Sequence[Segment],
) -> Update:
    if uses_triton(impl, counters.device, {s.dtype for s in segments}):
        from .fused_triton import TritonUpdate

        return TritonUpdate(segments, counters, groups, rule, keep)
    from .eager import EagerUpdate

    return EagerUpdate(segments, counters, groups, rule, impl=impl, tiled=tiled)


def uses_triton(impl: str, device: torch.device, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether ``impl`` means Triton for states of ``dtypes`` on ``device``; float64 has no kernels.

    Raises ``RuntimeError`` saying why if Triton was asked for and cannot run there.
    """
    on_gpu = device.type == "cuda"  # ROCm too
    if impl == "triton":
        if not has_triton():
            raise RuntimeError("impl='triton' needs the triton package, which is not installed")
    elif impl != "auto" or not on_gpu or not has_triton():
        return False
    if not on_gpu:
        from . import triton_kernels

        if not triton_kernels.INTERPRETED:
            raise RuntimeError(
                f"impl='triton' runs on CUDA and ROCm devices, and params are on {device.type}; "
                "with TRITON_INTERPRET=1 in the environment it is interpreted, slowly, for tests"
            )
    return all(dtype == torch.float32 for dtype in dtypes)


def backend_for(impl: str, device: torch.device, numel: int) -> Any:
    """The eager module for ``impl`` on ``device``, for ``numel`` local elements.

    Raises ``RuntimeError`` saying why if the backend asked for cannot run there.
    """
    if impl == "auto":
        if device.type == "cpu":
            worth_it = numel >= COMPILE_FROM_NUMEL and has_cpp_compiler()
            impl = "compiled" if worth_it else "foreach"
        else:
            impl = "compiled" if has_triton() else "foreach"
    elif impl == "triton":
        impl = "foreach"
    elif impl == "compiled" and device.type == "cpu" and not has_cpp_compiler():
        raise RuntimeError("impl='compiled' on CPU needs a C++ compiler, and none was found")
    return import_module(f".{impl}", __name__)


@functools.cache
def has_cpp_compiler() -> bool:
    """Whether torch.compile can build CPU code here (it calls a C++ compiler at run time)."""
    return _torch_private.cpp_compiler() is not None


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
