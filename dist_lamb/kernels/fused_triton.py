"""A step in Triton's launches: 3, 4 with clipping, whatever the number of params."""

from __future__ import annotations

import functools
import math
import operator
from array import array
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import compress
from typing import Any

import torch
import triton
from torch import Tensor

from ..elements import Elements
from ..rules import EARLY, Rule
from . import triton_kernels, triton_sums
from ._triton_private import launches_on
from .device import capturing, int64, mask_of, upload
from .groups import GroupTable
from .segments import Scalars, Segment
from .triton_math import (
    ALIGNED,
    BLOCK,
    CHUNK_COLUMNS,
    COPY_SHIFT,
    GRAD_SHIFT,
    NARROW_REGISTERS,
    REMAINDER_SHIFT,
    SHRINK,
    STATE_SHIFT,
    STEP_COLUMNS,
)

#: (up to so many elements, blocks a chunk, and where states are narrow): small models need many
#: chunks to fill the device evenly, large ones few, so that the table and the partials stay small,
#: and so that narrow blocks, which take less time, outweigh what a chunk needs once.
CHUNK_BLOCKS = ((2**26, 4, 4), (math.inf, 8, 16))
#: Programs a multiprocessor of the launch that sums the gradients.
PROGRAMS_EACH = 8

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # 0 as a copy: none
_MIXED = 3
_DATA_PTR = Tensor.data_ptr


class TritonUpdate:
    """:class:`dist_lamb.kernels.Update` on a table of addresses; it keeps no tensor alive.

    The table is built once; afterwards only addresses of gradients, and which params take part,
    are uploaded, where they have changed.
    """

    keeps_memory = False

    def __init__(
        self,
        segments: Sequence[Segment],
        counters: Tensor,
        groups: GroupTable,
        rule: Rule,
        keep: list[Any],
    ) -> None:
        self.device = device = counters.device
        self.counters = counters
        #: positions in ``segments``, by param: a param's chunks are neighbours in the table
        self._order = sorted(range(len(segments)), key=lambda i: segments[i].param)
        self._sorted = self._order == list(range(len(segments)))
        self._grads: Sequence[Tensor | None] = ()
        given = [s.grad for s in segments]
        segments = [segments[i] for i in self._order]
        self.ratios = torch.full_like(counters, torch.nan)
        self._groups, self._rule, self._keep = groups, rule, keep
        self._kernels = triton_kernels.of(rule)
        #: the params of the rule: the others' counters and sums are not touched
        self._own = [k for k, other in enumerate(groups.rules) if other is rule]
        self._params = [s.param for s in segments]
        self._launch = launches_on(device)
        num_params = len(counters)
        self._cut(segments, num_params)
        #: int32 [1], 0 between launches: how many programs of one have finished
        self._arrivals = torch.zeros(1, dtype=torch.int32, device=device)
        #: sums of squares by chunk, by param, and of all gradients, with a flag
        rows = max(len(rule.late) + 2, len(EARLY) if rule.early else 0)
        self._partials = torch.empty(rows * self._num_chunks, dtype=torch.float64, device=device)
        self._rows = torch.zeros(num_params, groups.columns, dtype=torch.float64, device=device)
        #: as they were applied: those of all ranks are one tensor, which every rule's Update has
        self.sums = self._rows
        self._total = torch.zeros(2, dtype=torch.float64, device=device)
        assert int(SHRINK) + 1 + rule.num_directions + len(rule.idle) <= int(STEP_COLUMNS)
        self._steps = torch.empty(num_params, int(STEP_COLUMNS), dtype=torch.float32, device=device)
        self._grad_partials: Tensor | None = None
        # A gradient that is not there yet will come in the dtype of its param.
        like = [next(t for t in (s.grad, s.copy, s.x) if t is not None) for s in segments]
        codes = [_CODES[t.dtype] for t in like]
        copies = [0 if s.copy is None else _CODES[s.copy.dtype] for s in segments]
        self._grad_dtype, self._copy_dtype = _common(codes), _common(copies)
        narrow, split = (
            [s.narrow * (1 + s.nearest) for s in segments],
            [int(s.remainder is not None) for s in segments],
        )
        #: what the kernels are compiled for: formats of states and params, dims of their elements
        self._state_kind, self._x_kind = _common(narrow), _common(split)
        dims = [len(s.elements.strides) for s in segments if s.narrow]
        self._dims = max(dims, default=1)
        memory = [[s.x, s.copy, *s.states, s.remainder] for s in segments]
        fixed = [[0 if t is None else t.data_ptr() for t in of_one] for of_one in memory]
        # int64 [rows, segments], rows as triton_math names them: gradient, flags, x, copy, states
        # (a rank may have no element of a rule's params)
        by_segment = int64([[0, 0, *row] for row in fixed])
        self._host = by_segment.view(len(segments), 5 + self._num_states).T.contiguous()
        self._dtypes = int64(codes) << int(GRAD_SHIFT) | int64(copies) << int(COPY_SHIFT)
        self._dtypes |= int64(narrow) << int(STATE_SHIFT) | int64(split) << int(REMAINDER_SHIFT)
        self._unaligned = ((self._host & 15) != 0).any(dim=0)
        if self._state_kind:
            numbered = [s.elements if s.narrow else Elements() for s in segments]
            elements = int64([own.row(self._dims) for own in numbered])
            self._host = torch.cat([self._host, elements.T]).contiguous()
        self._table: Tensor | None = None
        #: whether all gradients were aligned the last time
        self._whole = False
        self._addresses: list[int] | None = None
        self._present: list[bool] | None = None
        self.set_gradients(given)

    def _cut(self, segments: Sequence[Segment], num_params: int) -> None:
        """Chunks, and which of them are a param's: they are neighbours."""
        param = int64(self._params)
        numel = int64([s.x.numel() for s in segments])
        groups = self._groups.on_host
        of_size = next(n for up_to, *n in CHUNK_BLOCKS if int(numel.sum()) <= up_to)
        blocks = of_size[any(s.narrow for s in segments)]
        counts = -(-numel // (blocks * BLOCK))
        self._num_chunks = int(counts.sum())
        segment = torch.arange(len(segments), device="cpu").repeat_interleave(counts)
        within = torch.arange(self._num_chunks, device="cpu") - (counts.cumsum(0) - counts)[segment]
        rest = numel[segment] - within * (blocks * BLOCK)
        owner = param[segment]
        chunks = [segment, owner, groups[owner], within * blocks, rest.clamp(max=blocks * BLOCK)]
        chunks += [torch.zeros_like(segment)] * (int(CHUNK_COLUMNS) - len(chunks))
        ends = torch.bincount(owner, minlength=num_params).cumsum(0)
        starts = ends - torch.bincount(owner, minlength=num_params)
        own = int64(self._own)
        params = [starts[own], ends[own], groups[own], own]
        flat = [torch.stack(columns, dim=1).view(-1) for columns in (chunks, params)]
        both = upload(torch.cat(flat).int(), self.device, self._keep)
        self._chunks, self._param_table = torch.split(both, [len(t) for t in flat])

    # --- before a step ----------------------------------------------------------------------------

    def set_gradients(self, grads: Sequence[Tensor | None]) -> None:
        self._grads = grads  # alive until the step has been launched: some are copies
        if not self._sorted:
            grads = [grads[i] for i in self._order]
        try:
            addresses = list(map(_DATA_PTR, grads))  # type: ignore[arg-type]
            present = [True] * len(addresses)
        except TypeError:
            present = [g is not None for g in grads]
            addresses = [0 if g is None else g.data_ptr() for g in grads]
        if present != self._present:
            chosen = compress(self._params, present)
            self._active = mask_of(chosen, len(self.counters), self.device, self._keep)
            self._present = present
        if addresses != self._addresses:
            # twice as fast as torch.tensor; of nothing there is no buffer
            row = torch.frombuffer(array("q", addresses or [0]), dtype=torch.int64)
            self._host[0] = row[: len(addresses)]
            whole = not functools.reduce(operator.or_, addresses, 0) & 15
            if not (whole and self._whole):  # else the flags are what they were
                aligned = ~(self._unaligned | ((self._host[0] & 15) != 0))
                self._host[1] = self._dtypes + aligned * int(ALIGNED)
                self._whole = whole
            if self._table is not None and not capturing(self.device):
                changed = self._host[:2].view(-1)
                upload(changed, self.device, self._keep, out=self._table[: len(changed)])
            else:
                self._table = None
            self._addresses = addresses

    def set_active(self, active: Tensor) -> None:
        self._active = active

    def release(self) -> None:
        self._grads = ()

    # --- the phases -------------------------------------------------------------------------------

    def grad_sq(self, reduction_groups: Sequence[Tensor] | None) -> Tensor:
        masks: Sequence[Tensor | None] = [None] if reduction_groups is None else reduction_groups
        if reduction_groups is not None:
            self._total = self._total.new_zeros(len(masks) + 1)
        at_most = _programs(self.device)
        if self._grad_partials is None:
            self._grad_partials = self._partials.new_empty(at_most)
        with self._on_device():
            for k, mask in enumerate(masks):
                self._launch(
                    triton_sums.grad_sq, (self._grad_dtype, mask is None),
                    max(1, min(self._num_chunks, at_most)), *self._tables(), self._active, mask,
                    self._arrivals, self._grad_partials, self._total[k:], self._grad_dtype,
                    triton.next_power_of_2(at_most), BLOCK,
                )  # fmt: skip
        return self._total

    def early(self) -> Tensor:
        early = self._total.new_zeros(len(self.counters), len(EARLY))
        if self._rule.early:
            with_x = self._rule.early != ("g.g",)
            with self._on_device():
                self._launch(
                    triton_sums.early_pass,
                    (self._grad_dtype, with_x, self._num_states, self._x_kind), self._num_chunks,
                    *self._tables(), self._active, self._partials, with_x, self._num_states,
                    self._x_kind, self._grad_dtype, BLOCK,
                )  # fmt: skip
                self._launch(
                    triton_sums.early_sums, None, len(self._own), self._param_table,
                    self._num_chunks, self._partials, early, BLOCK,
                )  # fmt: skip
        return early

    def moments(self, scalars: Scalars, to_reduce: bool, settled: bool) -> Tensor:
        self._scalars, self._reduced = scalars, to_reduce
        self._options = self._groups.of(scalars.options)
        norm, lr_zero = scalars.track_grad_norm, scalars.options.lr_zero
        #: states and params in one pass
        self._once = once = settled and not self._rule.late and not lr_zero
        with self._on_device():
            if lr_zero:
                at = (len(self._rule.late) + 1) * self._num_chunks
                self._launch(
                    triton_sums.history, (self._grad_dtype, self._num_states, self._state_kind),
                    self._num_chunks, *self._tables(), self._active, self._partials[at:],
                    self._num_states, self._state_kind, self._grad_dtype, BLOCK,
                )  # fmt: skip
            copy = self._copy_dtype if once else 0
            self._launch(
                self._kernels.moments_pass,
                (self._grad_dtype, copy, norm, once, *self._formats, *self._kinds()),
                self._num_chunks, *self._tables(), self._options, self.counters, self._active,
                *self._step_args(), self._groups.numels, self._partials, norm, once,
                self._grad_dtype, copy, *self._formats, BLOCK,
                registers=NARROW_REGISTERS if self._state_kind else None,
            )  # fmt: skip
            # After the launch, behind which the host can hide it.
            alone = len(self._own) == len(self.counters)
            self.ratios = (
                self.ratios.new_empty(len(self.counters))
                if alone
                else (torch.full_like(self.ratios, torch.nan))
            )
            if to_reduce:
                self._norms(self._rows, add_up=True, finish=False)
        return self._rows

    def apply(self, sums: Tensor) -> None:
        self.sums = sums
        with self._on_device():
            self._norms(sums, add_up=not self._reduced, finish=True)
            chunks, count, table, segments = self._tables()
            if self._scalars.options.lr_zero:
                self._launch(
                    triton_sums.erase, (self._num_states, self._state_kind), count, chunks, table,
                    segments, self._steps, self._num_states, self._state_kind, BLOCK,
                )  # fmt: skip
            if not self._once:
                grad = self._grad_dtype if self._rule.reads_grad else 0
                self._launch(
                    self._kernels.apply, (self._copy_dtype, grad, *self._formats[:2]), count,
                    chunks, table, segments, self._steps, grad, self._copy_dtype,
                    *self._formats[:2], BLOCK,
                )  # fmt: skip
        if capturing(self.device):
            # What a graph has captured outlives this table, and addresses in it never change.
            held = [*vars(self).values(), self._groups.numels]
            self._keep += [v for v in held if isinstance(v, Tensor)]
            self._table = None

    def _norms(self, sums: Tensor, add_up: bool, finish: bool) -> None:
        norm, lr_zero = self._scalars.track_grad_norm, self._scalars.options.lr_zero
        columns = self._groups.columns
        self._launch(
            self._kernels.norms, (columns, norm, lr_zero, add_up, finish, *self._kinds()),
            len(self._own), self._param_table, self._num_chunks, self._options, self.counters,
            self._active, *self._step_args(), self._groups.numels, self._partials, sums,
            self._steps, self.ratios, columns, norm, lr_zero, add_up, finish, BLOCK,
        )  # fmt: skip

    @property
    def _formats(self) -> tuple[int, int, int]:
        return self._state_kind, self._x_kind, self._dims

    @property
    def _num_states(self) -> int:
        return len(self._rule.states)

    def _step_args(self) -> tuple[Tensor | None, ...]:
        """Loss scale, overflow, the gradients' squares and the early sums; None if not needed."""
        scalars = self._scalars
        clip = scalars.grad_sq if scalars.options.clip else None
        early = scalars.early if self._rule.early else None
        return scalars.loss_scale, scalars.overflow, clip, early

    def _kinds(self) -> tuple[torch.dtype | None, ...]:
        return tuple(None if t is None else t.dtype for t in self._step_args())

    def _tables(self) -> tuple[Tensor, int, Tensor, int]:
        if self._table is None:
            self._table = upload(self._host.view(-1), self.device, self._keep)
        return self._chunks, self._num_chunks, self._table, self._host.shape[1]

    def _on_device(self) -> AbstractContextManager[Any]:
        # Triton launches on the current device, whatever the tensors are on.
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            return torch.cuda.device(self.device)
        return nullcontext()


def _common(codes: Sequence[int]) -> int:
    """The code that all have, or _MIXED."""
    found = set(codes) or {0}
    return found.pop() if len(found) == 1 else _MIXED


@functools.cache
def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return PROGRAMS_EACH * int(torch.cuda.get_device_properties(device).multi_processor_count)
