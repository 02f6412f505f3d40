"""The tensors of a param's state: their names, dtype, and memory where no buffer holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import rules
from . import storage_formats as bits
from .rules import Rule

#: The float32 value of a half-precision param: what the rule reads and writes in its place.
MASTER = "master"
#: int16: what the float32 value of a bfloat16 param has more than the param, which is its rounding.
REMAINDER = "remainder"
#: All state that is as large as the param, under any rule.
TENSOR_STATES = (*rules.STATES, MASTER, REMAINDER)


class Formats(NamedTuple):
    """How a group's states are stored: its options ``state_format`` and ``master``."""

    moments: str = "float32"
    master: str = "float32"

    @staticmethod
    def of(group: Mapping[str, Any]) -> Formats:
        return Formats(group.get("state_format", "float32"), group.get("master", "float32"))

    @property
    def nearest(self) -> bool:
        return self.moments == "bfloat16-nearest"

    def counting(self, dtype: torch.dtype) -> Formats:
        """With the defaults in place of what says nothing about params of ``dtype``."""
        moments = self.moments if state_dtype(dtype) == torch.float32 else "float32"
        return Formats(moments, self.master if dtype == torch.bfloat16 else "float32")


#: Every state as wide as the arithmetic.
FLOAT32 = Formats()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of moments, masters and arithmetic for params of ``dtype``: float32, or float64.

    Half-precision moments are wrong, not only coarse: in float16 the square of 1e-4 is 0.
    """
    return torch.promote_types(dtype, torch.float32)


def needs_master(dtype: torch.dtype) -> bool:
    return dtype != state_dtype(dtype)


def states_of(dtype: torch.dtype, rule: Rule, formats: Formats = FLOAT32) -> dict[str, torch.dtype]:
    """{name: dtype} of the states of a param of ``dtype`` that are as large as the param.

    The rule's come first, in the order in which its functions take them. Float64 params keep
    float64 states, and float16 params float32 masters, whatever the formats.
    """
    wide = state_dtype(dtype)
    narrow = formats.moments != "float32" and wide == torch.float32
    found = dict.fromkeys(rule.states, torch.bfloat16 if narrow else wide)
    if dtype == torch.bfloat16 and formats.master == "remainder":
        found[REMAINDER] = torch.int16
    elif needs_master(dtype):
        found[MASTER] = wide
    return found


def stored_dtype(name: str, saved: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """What a state of a param of ``dtype`` is held in that was saved as ``saved``: other formats
    than those of now stay, until a step converts them."""
    if name == REMAINDER:
        return torch.int16
    wide = state_dtype(dtype)
    narrow = saved == torch.bfloat16 and wide == torch.float32
    return torch.bfloat16 if narrow and name != MASTER else wide


def scalar_of(value: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A number as a tensor on the CPU, a float as float32; a tensor where it is.

    ``torch.as_tensor`` takes both to torch's default device, if one is set, and a float to torch's
    default dtype.
    """
    if not isinstance(value, Tensor):
        dtype = torch.float32 if dtype is None and isinstance(value, float) else dtype
        return torch.tensor(value, dtype=dtype, device="cpu")
    return value if dtype is None else value.to(dtype)


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


def state_like(p: Tensor, value: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A state tensor for ``p``, its strides where they are dense: zeros, or a copy of ``value``."""
    dtype = dtype or state_dtype(p.dtype)
    out = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    return out if value is None else out.copy_(value)


def complete_state(
    p: Tensor, dense: Tensor, state: dict[str, Tensor], rule: Rule, formats: Formats = FLOAT32
) -> None:
    """Create what is missing of ``p``'s states and master, and store and lay all out as it must be.

    ``dense`` is ``p``, or a contiguous copy of it where ``p`` has gaps; where a master becomes a
    remainder it is written to. A master is removed where ``p`` has full precision by now: it would
    be older than ``p``.
    """
    wanted = states_of(p.dtype, rule, formats)
    for name in TENSOR_STATES:
        # The param may have changed its memory format since.
        if name in state:
            state[name] = as_laid_out(state[name], dense)
    for name, dtype in wanted.items():
        if name not in state:
            if name == MASTER and REMAINDER in state:
                state[name] = joined(dense, state[REMAINDER])
            elif name == REMAINDER and MASTER in state:
                refresh_master(state[MASTER], dense)
                state[name] = split_into(dense, state[MASTER])
            else:
                state[name] = state_like(dense, dense if name == MASTER else None, dtype)
        # Its precision may have changed, or the format.
        state[name] = converted(state[name], dtype)
    for name in {MASTER, REMAINDER} & state.keys() - wanted.keys():
        del state[name]


def converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A state in another dtype; to bfloat16 it is rounded to nearest, and finite stays finite."""
    if value.dtype == dtype:
        return value
    if dtype == torch.bfloat16:
        return bits.as_bfloat16(bits.bfloat16_to_nearest(value.float()))
    return value.to(dtype)


def joined(p: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master of a param, which is or was bfloat16, and its remainder."""
    pattern = bits.pattern(p.to(torch.bfloat16))
    master: Tensor = bits.master_of(pattern, remainder.to(torch.int32))
    return master


def split_into(p: Tensor, master: Tensor) -> Tensor:
    """The remainder of a master; a bfloat16 param that is its rounding becomes the remainder's.

    Elsewhere the param has been written to since, or will be loaded after its master.
    """
    rounds = master.to(p.dtype) == p
    torch.where(rounds, bits.as_bfloat16(bits.param_of(master)), p, out=p)
    remainder: Tensor = bits.remainder_of(master)
    return remainder.to(torch.int16)


def refresh_master(master: Tensor, p: Tensor) -> None:
    """Take into ``master`` those elements of ``p`` that are not its own rounding any more.

    Where weights were loaded or clamped the param counts; elsewhere the master keeps the bits
    that the param has no room for.
    """
    torch.where(master.to(p.dtype) == p, master, p.to(master.dtype), out=master)


def refresh_remainder(remainder: Tensor, p: Tensor, before: Tensor | None = None) -> None:
    """Clear the remainder where ``p`` has changed: where it is not ``before``, if that is known.

    If not, it stays, whatever was written: the master is less than a unit in the last place of
    ``p`` away from it, and rounds to it. (To clear all would forget, at every clamping of a few
    weights, what the rest have gathered.) Not beside zeros and infinities: those are exact.
    """
    cleared = (p == 0) | p.isinf() if before is None else p != before
    remainder.masked_fill_(cleared, 0)


def restore_precision(p: Tensor, master: Tensor) -> None:
    """Give a full-precision param the bits of a master that it is a half-precision rounding of."""
    for dtype in (torch.bfloat16, torch.float16):
        torch.where(master.to(dtype).to(p.dtype) == p, master.to(p.dtype), p, out=p)


def to_be_held(name: str, value: Tensor, p: Tensor) -> Tensor | None:
    """A loaded state of the local param ``p`` as it is held until a step wants another format.

    None where ``p`` has the precision for it itself, and has taken it.
    """
    local = state_like(p, value, stored_dtype(name, value.dtype, p.dtype))
    if name == MASTER and not needs_master(p.dtype):
        restore_precision(p, local)
        return None
    if name == REMAINDER and p.dtype != torch.bfloat16:
        restore_precision(p, joined(p, local))
        return None
    return local
