"""Tables on the device that say what a fused step works on: where it lies, and with which options.

*Segments* are a param's memory, or its piece of a flat buffer, given by addresses; they are cut
into *chunks*, the work of one program. Built once; afterwards only what changed is uploaded, which
never waits for the device: addresses of gradients, and numbers of the param groups.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rule

#: Elements a program works on at a time.
BLOCK = 512
#: Blocks a chunk, of models up to that many elements: small models need many chunks to fill the
#: device evenly, large ones few, so that the table and the partials stay small.
CHUNK_BLOCKS = ((2**26, 4), (math.inf, 8))

#: Columns of a chunk, int32: segment, param, group, first block, numel, and nothing to 32 bytes.
CHUNK_COLUMNS = 8
#: Columns of a param, int32: first chunk, end chunk, group, its segment (-1: none).
PARAM_COLUMNS = 4
#: Columns of what one launch leaves per param for the next, float32.
STEP_COLUMNS = 8
#: Columns of a group, float64: rule.Hyperparameters, log2 of both betas, and as int64 bits the
#: address of an lr on the device and its kind (0 none, 1 float32, 2 float64).
GROUP_COLUMNS = len(rule.Hyperparameters._fields) + 4
#: Flags of a segment: has a gradient; all its addresses are multiples of 16; then two dtypes.
PRESENT, ALIGNED = 1, 2
GRAD_SHIFT, COPY_SHIFT = 2, 4
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # 0 as a copy: none
MIXED = 3


class Segment(NamedTuple):
    """A param's memory or a piece of it: dense tensors of one shape and one memory format."""

    param: int
    grad: Tensor | None  # None where the step leaves the param alone
    x: Tensor  # float32: what the rule reads and writes
    m: Tensor
    v: Tensor
    copy: Tensor | None  # low-precision copy of x


def supports(dtype: torch.dtype) -> bool:
    """Whether params of ``dtype`` can be updated here; float64 has no kernels."""
    return dtype in CODES


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _upload(t: Tensor, device: torch.device, keep: list[Any], out: Tensor | None = None) -> Tensor:
    """``t`` on ``device``, into ``out`` where that is given, without waiting for it.

    ``keep`` is for what a CUDA graph goes on reading: it copies again at every replay.
    """
    if device.type == "cpu":
        return t.clone() if out is None else out.copy_(t)
    pinned = torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t)
    if out is None:
        out = torch.empty(t.shape, dtype=t.dtype, device=device)
    out.copy_(pinned, non_blocking=True)
    if capturing(device):
        keep += [pinned, out]
    return out


def _int64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def _kind(codes: Sequence[int]) -> int:
    """The code that all have, or MIXED."""
    kinds = set(codes) or {0}
    return kinds.pop() if len(kinds) == 1 else MIXED


class Table:
    """Segments cut into chunks, on the device.

    ``segments`` are sorted by param; ``groups`` holds the group of each of the optimizer's params.
    A param may have several segments if ``active`` is given to :func:`update`, which otherwise
    takes presence from the gradients. ``keep`` is a list that lives as long as the optimizer.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        groups: Sequence[int],
        device: torch.device,
        keep: list[Any],
    ) -> None:
        self.device = device
        self.num_params, self.num_segments = len(groups), len(segments)
        self._keep = keep
        self._cut(segments, _int64(groups))
        #: int32 [1], 0 between launches: how many programs of one have finished
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=device)
        #: sums of squares by chunk, by param, and of all gradients with the overflow flag
        self.partials = torch.empty(3 * self.num_chunks, dtype=torch.float64, device=device)
        self.sums = torch.empty(self.num_params, 3, dtype=torch.float64, device=device)
        self.total = torch.zeros(2, dtype=torch.float64, device=device)
        self.steps = torch.empty(self.num_params, STEP_COLUMNS, device=device)
        self._grad_partials: Tensor | None = None
        grads = [0 if s.grad is None else s.grad.data_ptr() for s in segments]
        # A gradient that is not there yet will come in the dtype of its param.
        like = [s.grad if s.grad is not None else s.copy for s in segments]
        codes = [0 if t is None else CODES[t.dtype] for t in like]
        copies = [0 if s.copy is None else CODES[s.copy.dtype] for s in segments]
        self.grad_kind, self.copy_kind = _kind(codes), _kind(copies)
        # int64 [6, segments], rows as the kernels' constants say
        self._host = _int64(
            [
                [0] * len(segments),
                [0] * len(segments),
                [s.x.data_ptr() for s in segments],
                [s.m.data_ptr() for s in segments],
                [s.v.data_ptr() for s in segments],
                [0 if s.copy is None else s.copy.data_ptr() for s in segments],
            ]
        )
        self._dtypes = _int64([c << GRAD_SHIFT | d << COPY_SHIFT for c, d in zip(codes, copies)])
        self._unaligned = ((self._host & 15) != 0).any(dim=0)
        self._segments: Tensor | None = None
        self._grads: Sequence[int] | None = None
        self._present: Sequence[bool] | None = None
        present = [s.grad is not None for s in segments]
        self.set_gradients(grads, None if all(present) else present)

    def _cut(self, segments: Sequence[Segment], groups: Tensor) -> None:
        """Chunks, and which of them are a param's: they are neighbours."""
        param = _int64([s.param for s in segments])
        numel = _int64([s.x.numel() for s in segments])
        blocks = next(n for up_to, n in CHUNK_BLOCKS if int(numel.sum()) <= up_to)
        counts = -(-numel // (blocks * BLOCK))
        self.num_chunks = int(counts.sum())
        segment = torch.arange(len(segments)).repeat_interleave(counts)
        within = torch.arange(self.num_chunks) - (counts.cumsum(0) - counts)[segment]
        rest = numel[segment] - within * (blocks * BLOCK)
        owner = param[segment]
        unused = torch.zeros_like(segment)
        chunks = [segment, owner, groups[owner], within * blocks, rest.clamp(max=blocks * BLOCK)]
        chunks += [unused] * (CHUNK_COLUMNS - len(chunks))
        ends = torch.bincount(owner, minlength=self.num_params).cumsum(0)
        only = torch.full_like(ends, -1)
        only[param] = torch.arange(len(segments))
        params = [ends - torch.bincount(owner, minlength=self.num_params), ends, groups, only]
        flat = [torch.stack(columns, dim=1).view(-1) for columns in (chunks, params)]
        both = _upload(torch.cat(flat).int(), self.device, self._keep)
        self.chunks, self.params = torch.split(both, [len(t) for t in flat])

    def set_gradients(self, addresses: Sequence[int], present: Sequence[bool] | None) -> None:
        """Addresses of the gradients, of the dtypes they had first; ``present`` None: all are."""
        if addresses == self._grads and present == self._present:
            return
        # twice as fast as torch.tensor; of nothing there is no buffer
        grads = torch.frombuffer(array("q", addresses or [0]), dtype=torch.int64)[: len(addresses)]
        flags = self._dtypes + (~(self._unaligned | ((grads & 15) != 0))) * ALIGNED
        flags += PRESENT if present is None else torch.tensor(present) * PRESENT
        self._host[0], self._host[1] = grads, flags
        if self._segments is not None and not capturing(self.device):
            changed = self._host[:2].view(-1)
            _upload(changed, self.device, self._keep, out=self._segments[: len(changed)])
        else:
            self._segments = None
        self._grads, self._present = addresses, present

    @property
    def segments(self) -> Tensor:
        """int64 [6 * segments] on the device."""
        if self._segments is None:
            self._segments = _upload(self._host.view(-1), self.device, self._keep)
        return self._segments

    def grad_partials(self, programs: int) -> Tensor:
        """float64 [programs], for the sum of squares of all gradients."""
        if self._grad_partials is None:
            self._grad_partials = torch.empty(programs, dtype=torch.float64, device=self.device)
        return self._grad_partials

    def leave_to_graph(self) -> None:
        """What a graph has captured outlives this table, and addresses in it never change."""
        self._keep += [v for v in vars(self).values() if isinstance(v, Tensor)]
        self._segments = None


class GroupTable:
    """The options of the param groups on the device, float64 [groups, GROUP_COLUMNS]."""

    def __init__(self, device: torch.device, keep: list[Any]) -> None:
        self._device = device
        self._keep = keep
        self._rows: Any = None
        self._table: Tensor | None = None

    def of(self, groups: Sequence[Mapping[str, Any]]) -> Tensor:
        rows = [self._row(group) for group in groups]
        if self._table is None or rows != self._rows:
            numbers = torch.tensor([row[:-2] for row in rows], dtype=torch.float64)
            pointers = _int64([row[-2:] for row in rows])
            table = torch.cat([numbers.view(torch.int64), pointers], dim=1)
            self._table = _upload(table, self._device, self._keep).view(torch.float64)
            self._rows = rows
        table = self._table
        if capturing(self._device):
            self._keep.append(table)
            # Uploaded by the graph, at a replay: worth nothing to the steps outside of it.
            self._table = None
        return table

    def _row(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        row = rule.hyperparameters(group)
        lr, address, kind = group["lr"], 0, 0
        if isinstance(lr, Tensor):
            if lr.device.type == "cpu":
                row = (float(lr), *row[1:])
            elif lr.device == self._device and lr.dtype in (torch.float32, torch.float64):
                address, kind = lr.data_ptr(), 1 if lr.dtype == torch.float32 else 2
            else:
                lr = lr.detach().to(self._device, torch.float64, non_blocking=True)
                self._keep_lr = lr
                address, kind = lr.data_ptr(), 2
        # Negative infinity for beta = 0: then 1 - exp2(t * log) is 1.
        logs = (math.log2(beta) if beta else -math.inf for beta in row[1:3])
        return (*row, *logs, address, kind)
