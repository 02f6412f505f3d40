"""The step of a unit: of the tensors that DeepSpeed hands over in one call of ``step()``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels, options
from ..base import LambBase
from ..kernels import Block, RowMap, Work
from ..kernels.tables import Segment, Table
from ..sharding.comm import Comm
from ..state import TENSOR_STATES, as_laid_out, complete_state, flat_row, needs_master
from .layouts import (
    Layout,
    Original,
    UnknownLayout,
    logical_numel,
    logical_shape,
    problem_with,
)

OPTION_NAMES = (*options.RULE_DEFAULTS, *options.TORCH_FLAGS)


class Unit(LambBase):
    """What DeepSpeed steps together: the order of a step, over params in pieces of its tensors."""

    def __init__(
        self,
        owner: LambBase,
        every: Sequence[Original],
        options_of: Mapping[int, Mapping[str, Any]],
        layouts: Sequence[Layout],
        holders: Sequence[Tensor],
    ) -> None:
        self.layouts, self.holders = layouts, holders
        self.originals = [every[i] for i in sorted({i for lay in layouts for i in lay.originals})]
        self.device = holders[0].device
        kinds = {layout.kind for layout in layouts}
        if len(kinds) != 1 or any(h.device != self.device for h in holders):
            raise UnknownLayout(
                f"a step over {sorted(kinds)} on {[str(h.device) for h in holders]}"
            )
        self._comm = Comm(layouts[0].process_group)
        self._agree(every)
        self._at = {o.number: k for k, o in enumerate(self.originals)}
        self._index = torch.tensor([o.number for o in self.originals], device=self.device)
        self._everyone = torch.ones(len(self._at), dtype=torch.bool, device=self.device)
        self._cuts = [_cuts(layout, holder) for layout, holder in zip(layouts, holders)]
        self._row_params = [self._at[p.original] for lay in layouts for p in lay.pieces]
        self._norms = _HolderNorms(self._comm, layouts[0].cut, self.originals[0].param.device)
        self._rows: tuple[Any, list[_Row]] | None = None
        self._maps: dict[Any, RowMap] = {}
        self._heard = -1
        self._flags: tuple[list[float], Tensor] | None = None
        self._fused_table: tuple[Any, Table] | None = None
        #: set by torch.amp.GradScaler on the owner, under DeepSpeed's torch_autocast
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.group_indices = sorted({o.group for o in self.originals})
        groups = [
            {
                **options_of[i],
                "params": [(o.name, o.param) for o in self.originals if o.group == i],
            }
            for i in self.group_indices
        ]
        defaults = {name: owner.defaults[name] for name in OPTION_NAMES}
        super().__init__(groups, **defaults, impl=owner.impl)

    def _agree(self, every: Sequence[Original]) -> None:
        """The layout is the same on all ranks and fits the values, or all raise the same error."""
        problem = None
        for layout, holder in zip(self.layouts, self.holders):
            problem = problem or problem_with(layout, holder, every)
        described = [f"layout: {problem or 'fits'}"]
        described += [line for layout in self.layouts for line in layout.describe(every)]
        try:
            self._comm.require_same("layouts", described, self.originals[0].param.device)
        except ValueError as error:
            raise UnknownLayout(str(error)) from None
        if problem:
            raise UnknownLayout(problem)

    def update(
        self,
        live: Mapping[int, Mapping[str, Any]],
        state: Any,
        steps: Tensor,
        arrivals: Arrivals,
        grad_norm: Any,
    ) -> None:
        """Phases 2-6 of a step. ``live`` are the param groups, ``steps`` all originals' counts."""
        for own, i in zip(self.param_groups, self.group_indices):
            own.update((name, live[i][name]) for name in OPTION_NAMES)
        rows, grads = self._view_state(state), self._view_gradients()
        stepped = [(row, g) for row, g in zip(rows, grads) if g is not None]
        missing, doubtful = self._missing(arrivals)
        norms = self._norms
        present = self._present(missing, doubtful, stepped) if missing else None
        norms.prepare(present, grad_norm)
        # DeepSpeed made zeros of gradients that did not come. Whether another rank had one is known
        # after the all-reduce only: step, and take the moments back where none had.
        kept = [
            (row, row.exp_avg.clone(), row.exp_avg_sq.clone())
            for row, _ in stepped
            if row.k in missing
        ]
        self._counters = {self.device: steps[self._index]}
        active = self._everyone
        if len(stepped) < len(rows):
            active = torch.zeros_like(active)
            active[[row.k for row, _ in stepped]] = True
        kinds = {(self.device, row.x.dtype) for row, _ in stepped}
        if kinds and kernels.fused(self.impl, kinds):
            self._update_fused(self._table_for(stepped), norms, active)
        else:
            self._update(self._works(stepped), {self.device: active}, norms, masked=False)
        for row, exp_avg, exp_avg_sq in kept:
            updated = norms.updated[row.k]
            row.exp_avg.copy_(torch.where(updated, row.exp_avg, exp_avg))
            row.exp_avg_sq.copy_(torch.where(updated, row.exp_avg_sq, exp_avg_sq))
        steps[self._index] = self._counters[self.device]

    def _view_state(self, state: Any) -> list[_Row]:
        """The pieces of values and moments, in the order of layouts and their pieces."""
        tensors = []
        for holder in self.holders:
            x, entry = holder.detach(), state[holder]
            complete_state(holder, x, entry)
            master = entry.get("master")
            x, copy = (x, None) if master is None else (master, x)
            tensors.append((x, entry["exp_avg"], entry["exp_avg_sq"], copy))
        # DeepSpeed moves memory around: offloading, loading.
        key = [None if t is None else t.data_ptr() for four in tensors for t in four]
        if self._rows is None or self._rows[0] != key:
            views: list[tuple[Any, ...]] = []
            for four, cut in zip(tensors, self._cuts):
                views += zip(*(cut(t) for t in four))
            rows = [_Row(k, *four) for k, four in zip(self._row_params, views, strict=True)]
            self._rows = (key, rows)
            self._fused_table = None
        return self._rows[1]

    def _view_gradients(self) -> list[Tensor | None]:
        grads: list[Tensor | None] = []
        for layout, holder, cut in zip(self.layouts, self.holders, self._cuts):
            g = holder.grad
            if g is None and layout.cut:
                g = torch.zeros_like(holder)  # other ranks may have one for other pieces
            elif g is not None and g.layout != torch.strided:
                name = self.originals[self._at[layout.originals[0]]].name
                raise RuntimeError(
                    f"DeepSpeedLamb cannot step {name}: sparse gradients are not supported"
                )
            grads += cut(None if g is None else as_laid_out(g, holder))
        return grads

    def _missing(self, arrivals: Arrivals) -> tuple[set[int], set[int]]:
        """The params whose gradient has not come on this rank since their last step; and those of
        them whose gradients may come in a way that we do not hear of."""
        numbers = [o.number for o in self.originals]
        missing = {k for k, i in enumerate(numbers) if not arrivals.since_step[i]}
        if arrivals.count == self._heard:
            doubtful = missing  # a compiled graph may reduce gradients by itself
        else:
            doubtful = {k for k in missing if not arrivals.ever[numbers[k]]}
        self._heard = arrivals.count
        for i in numbers:
            arrivals.since_step[i] = 0
        return missing, doubtful

    def _present(
        self, missing: set[int], doubtful: set[int], stepped: Sequence[tuple[_Row, Tensor]]
    ) -> Tensor:
        """float64 [params], 1 where this rank knows of a gradient.

        Where in doubt, one that is not zero. Not in general: of a param that gets none this time,
        ZeRO-3 shows the gradient of the time before.
        """
        here = {row.k for row, _ in stepped} if not self.layouts[0].cut else self._at.values()
        flags = [float(k in here and k not in missing) for k in range(len(self.originals))]
        if self._flags is None or self._flags[0] != flags:
            self._flags = (flags, torch.tensor(flags, dtype=torch.float64, device=self.device))
        present = self._flags[1].clone()
        for row, g in stepped:
            if row.k in doubtful:
                present[row.k] = torch.maximum(present[row.k], g.any().double())
        return present

    def _works(self, stepped: Sequence[tuple[_Row, Tensor]]) -> list[Work]:
        """One Work per dtype of state."""
        works = []
        for dtype in dict.fromkeys(row.x.dtype for row, _ in stepped):
            chosen = [(row, g) for row, g in stepped if row.x.dtype == dtype]
            key = (dtype, *(row.k for row, _ in chosen))
            if key not in self._maps:
                owners = [[row.k] for row, _ in chosen]
                self._maps[key] = RowMap(owners, len(self.originals), self.device)
            blocks = [Block(g, row.x, row.exp_avg, row.exp_avg_sq, row.copy) for row, g in chosen]
            works.append(Work(blocks, self._maps[key], dtype, tiled=False))
        return works

    def _table_for(self, stepped: Sequence[tuple[_Row, Tensor]]) -> Table:
        """The table of addresses, kept for as long as only gradients move."""
        ordered = sorted(stepped, key=lambda pair: pair[0].k)
        key = [(row.k, g.dtype) for row, g in ordered]
        if self._fused_table is None or self._fused_table[0] != key:
            segments = [
                Segment(row.k, g, row.x, row.exp_avg, row.exp_avg_sq, row.copy)
                for row, g in ordered
            ]
            self._fused_table = (key, self._table(segments, self.device))
        table = self._fused_table[1]
        table.set_gradients([g.data_ptr() for _, g in ordered], None)
        return table

    def whole_state(self, state: Any) -> dict[int, dict[str, Tensor]]:
        """{number of the original: moments and master, whole, on the CPU}; a collective.

        The master where the model's own params are in half precision.
        """
        found: dict[int, dict[str, Tensor]] = {o.number: {} for o in self.originals}
        for name, layout, tensor in self._stored(state):
            for i in layout.originals:
                original = self.originals[self._at[i]].param
                if not layout.cut:
                    found[i][name] = tensor.detach().to("cpu", copy=True)
                    continue
                whole = torch.zeros(
                    logical_numel(original), dtype=tensor.dtype, device=original.device
                )
                for piece in layout.pieces:
                    if piece.original == i:
                        part = tensor.detach()[piece.start : piece.start + piece.numel]
                        whole[piece.offset : piece.offset + piece.numel] = part
                self._comm.all_reduce_sum(whole)
                found[i][name] = whole.view(*logical_shape(original)).cpu()
        return found

    def load_whole_state(self, saved: Mapping[int, Mapping[str, Tensor]], state: Any) -> None:
        """The reverse, of what ``saved`` has; everything else becomes zero, but masters stay."""
        for name, layout, tensor in self._stored(state):
            if name != "master":
                tensor.zero_()
            for piece in layout.pieces:
                value = saved.get(piece.original, {}).get(name)
                if value is None:
                    continue
                if layout.cut:
                    part = value.reshape(-1)[piece.offset : piece.offset + piece.numel]
                    tensor.detach()[piece.start : piece.start + piece.numel].copy_(part)
                else:
                    tensor.detach().copy_(value)

    def _stored(self, state: Any) -> list[tuple[str, Layout, Tensor]]:
        """(what it is, layout, tensor) of everything a checkpoint must have beside the model."""
        found: list[tuple[str, Layout, Tensor]] = []
        for layout, holder in zip(self.layouts, self.holders):
            entry = state[holder]
            complete_state(holder, holder.detach(), entry)
            found += [(name, layout, entry[name]) for name in TENSOR_STATES if name in entry]
            half = needs_master(self.originals[self._at[layout.originals[0]]].param.dtype)
            if half and layout.kind != "param":
                found.append(("master", layout, holder))
        return found

    def ratio(self, k: int) -> Tensor:
        return self._ratios[self.device][k]

    def held(self, group: int) -> list[tuple[Layout, Tensor]]:
        """This unit's layouts and holders of a param group."""
        return [
            (layout, holder)
            for layout, holder in zip(self.layouts, self.holders)
            if self.originals[self._at[layout.originals[0]]].group == group
        ]


class Arrivals:
    """Which gradients backward has made on this rank.

    DeepSpeed fills in zeros for those it has not, and a param without gradient must be left alone.
    """

    def __init__(self) -> None:
        self.count = 0
        #: by original, 1 where one came: since its last step; ever
        self.since_step, self.ever = bytearray(), bytearray()

    def expect(self) -> Callable[[Tensor], None]:
        """The hook for the next original."""
        i = len(self.ever)
        self.since_step.append(0)
        self.ever.append(0)

        def hook(_: Tensor) -> None:
            self.count += 1
            self.since_step[i] = self.ever[i] = 1

        return hook


class _Row(NamedTuple):
    """One piece, as tensors [1, numel]."""

    k: int  # its param in the unit
    x: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    copy: Tensor | None


class _HolderNorms:
    """:class:`dist_lamb.norms.Norms` that also add up on which ranks a param has a gradient."""

    def __init__(self, comm: Comm, cut: bool, device: torch.device) -> None:
        self._comm = comm
        self._cut = cut
        self._device = device
        self.local = False
        #: bool [params], of the last step: on some rank the param had a gradient
        self.updated = torch.empty(0, dtype=torch.bool)

    def prepare(self, present: Tensor | None, grad_norm: Any) -> None:
        """For one step: which params have a gradient on this rank, float64 [params] (None: all),
        and the norm of all gradients if it comes from outside."""
        self._present = present
        self._grad_norm = grad_norm
        self.local = self._comm.world_size == 1 and present is None and grad_norm is None

    def kinds(self, device: torch.device) -> None:
        """All gradients add up over the same ranks."""
        return None

    def per_param(self, sums: Tensor) -> Tensor:
        if self._present is not None:
            sums[:, 2] *= self._present
        if self._cut:
            sums = self._add(sums)
        else:
            # Every rank has the whole tensors and the same sums.
            sums[:, 2] = self._add(sums[:, 2].contiguous())
        self.updated = sums[:, 2] > 0
        return sums

    def over_all(self, sums: Tensor) -> Tensor:
        if self._cut:
            sums = self._add(sums)
        if self._grad_norm is not None:
            sums[0] = torch.as_tensor(self._grad_norm, dtype=torch.float64) ** 2
        return sums

    def _add(self, t: Tensor) -> Tensor:
        # With CPU offload the sums are on the CPU, where NCCL does not go.
        return self._comm.all_reduce_sum(t.to(self._device)).to(t.device)


def _cuts(layout: Layout, holder: Tensor) -> Callable[[Tensor | None], Sequence[Any]]:
    """A function from a tensor like ``holder`` to its pieces, each [1, numel]; None to Nones."""
    count = len(layout.pieces)
    if not layout.cut:
        return lambda t: [None if t is None else flat_row(t)]
    sizes, chosen, end = [], [], 0
    for piece in layout.pieces:
        if piece.start > end:
            sizes.append(piece.start - end)
        chosen.append(len(sizes))
        sizes.append(piece.numel)
        end = piece.start + piece.numel
    sizes.append(holder.numel() - end)

    def cut(t: Tensor | None) -> Sequence[Any]:
        if t is None:
            return [None] * count
        parts = torch.split(flat_row(t), sizes, dim=1)
        return [parts[i] for i in chosen]

    return cut
