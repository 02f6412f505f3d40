"""The tensors of a param's state: their names, dtype, and memory where no buffer holds them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import rules
from .rules import Rule

#: The float32 value of a half-precision param: what the rule reads and writes in its place.
MASTER = "master"
#: All state that is as large as the param, under any rule.
TENSOR_STATES = (*rules.STATES, MASTER)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments, masters and arithmetic for params of ``dtype``: float32, or float64.

    Half-precision moments are wrong, not only coarse: in float16 the square of 1e-4 is 0.
    """
    return torch.promote_types(dtype, torch.float32)


def needs_master(dtype: torch.dtype) -> bool:
    return dtype != state_dtype(dtype)


def states_of(dtype: torch.dtype, rule: Rule) -> tuple[str, ...]:
    """Names of the states of a param of ``dtype`` that are as large as the param.

    The rule's come first, in the order in which its functions take them.
    """
    return (*rule.states, MASTER) if needs_master(dtype) else tuple(rule.states)


def foreign_state(state: Iterable[str], rule: Rule) -> str | None:
    """A state among the names that ``rule`` does not have, though another one does."""
    return next((n for n in state if n in rules.STATES and n not in rule.states), None)


def is_dense(t: Tensor) -> bool:
    """Whether ``t``'s elements fill a range of memory without gaps or overlaps, in any order."""
    if t.is_contiguous():
        return True
    expected = 1
    for size, stride in sorted(zip(t.shape, t.stride()), key=lambda pair: pair[1]):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def flat_row(t: Tensor) -> Tensor:
    """A dense tensor's memory as one row [1, numel], in the order of the memory."""
    return t.as_strided((1, t.numel()), (t.numel(), 1))


def as_laid_out(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with the strides of the dense tensor ``like``, copied only where they differ.

    A gradient may come in another memory format than its parameter (channels_last against
    contiguous); read in memory order the two would be paired up wrongly. A negated view keeps its
    sign beside its memory, where no kernel looks.
    """
    if t.stride() == like.stride() and not t.is_neg():
        return t
    out = torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device=t.device)
    return out.copy_(t)


def state_like(p: Tensor, value: Tensor | None = None) -> Tensor:
    """A state tensor for ``p``, its strides where they are dense: zeros, or a copy of ``value``."""
    out = torch.zeros_like(p, dtype=state_dtype(p.dtype), memory_format=torch.preserve_format)
    return out if value is None else out.copy_(value)


def complete_state(p: Tensor, dense: Tensor, state: dict[str, Tensor], rule: Rule) -> None:
    """Create what is missing of ``p``'s states and master, and lay all out as ``dense`` is.

    ``dense`` is ``p``, or a contiguous copy of it where ``p`` has gaps. A master is removed where
    ``p`` has full precision by now: it would be older than ``p``.
    """
    for name in rule.states:
        if name not in state:
            state[name] = state_like(dense)
    if not needs_master(p.dtype):
        state.pop(MASTER, None)
    elif MASTER not in state:
        state[MASTER] = state_like(dense, dense)
    for name in TENSOR_STATES:
        # The param may have changed its memory format or its precision since.
        if name in state:
            if state[name].dtype != state_dtype(p.dtype):
                state[name] = state[name].to(state_dtype(p.dtype))
            state[name] = as_laid_out(state[name], dense)


def refresh_master(master: Tensor, p: Tensor) -> None:
    """Take into ``master`` those elements of ``p`` that are not its own rounding any more.

    Where weights were loaded or clamped the param counts; elsewhere the master keeps the bits
    that the param has no room for.
    """
    torch.where(master.to(p.dtype) == p, master, p.to(master.dtype), out=master)


def restore_precision(p: Tensor, master: Tensor) -> None:
    """Give a full-precision param the bits of a master that it is a half-precision rounding of."""
    for dtype in (torch.bfloat16, torch.float16):
        torch.where(master.to(dtype).to(p.dtype) == p, master.to(p.dtype), p, out=p)
