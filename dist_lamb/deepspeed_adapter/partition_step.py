"""The step of what DeepSpeed hands over in one call of ``step()``: params in parts of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import step
from ..elements import Elements
from ..kernels import Update, make_update
from ..kernels.device import int64
from ..kernels.groups import GroupOptions, GroupTable
from ..kernels.segments import UPDATED, Scalars, Segment
from ..norms import add_up
from ..rules import Rule
from ..sharding.comm import Comm
from ..state import (
    MASTER,
    TENSOR_STATES,
    Formats,
    as_laid_out,
    complete_state,
    converted,
    flat_row,
    needs_master,
    refresh_master,
    scalar_of,
)
from .arrivals import Arrivals
from .layouts import (
    Original,
    PartitionLayout,
    UnknownLayout,
    logical_numel,
    logical_shape,
    problem_with,
)


class PartitionStep:
    """Partitions that DeepSpeed steps together, and the params that lie in them."""

    def __init__(
        self,
        impl: str,
        rules_of: Mapping[int, Rule],
        formats_of: Mapping[int, Formats],
        every: Sequence[Original],
        layouts: Sequence[PartitionLayout],
        partitions: Sequence[Tensor],
    ) -> None:
        self.layouts, self.partitions = layouts, partitions
        self.originals = [every[i] for i in sorted({i for lay in layouts for i in lay.originals})]
        self.device = partitions[0].device
        kinds = {layout.kind for layout in layouts}
        if len(kinds) != 1 or any(t.device != self.device for t in partitions):
            raise UnknownLayout(
                f"a step over {sorted(kinds)} on {[str(t.device) for t in partitions]}"
            )
        self._impl = impl
        self._comm = Comm(layouts[0].process_group)
        self._agree(every)
        self._versions = self._seen_versions()
        self._at = {o.number: k for k, o in enumerate(self.originals)}
        self._index = int64([o.number for o in self.originals]).to(self.device)
        self._cuts = [_cuts(layout, t) for layout, t in zip(layouts, partitions)]
        self._span_params = [self._at[s.original] for lay in layouts for s in lay.spans]
        self._norms = _PartitionNorms(self._comm, layouts[0].cut, self.originals[0].param.device)
        self._heard = -1
        self._flags: tuple[list[float], Tensor] | None = None
        self.group_indices = sorted({o.group for o in self.originals})
        group_of = [self.group_indices.index(o.group) for o in self.originals]
        self._options = GroupOptions()
        self._rules = [rules_of[i] for i in self.group_indices]
        self._formats = {i: formats_of[i] for i in self.group_indices}
        numels = [logical_numel(o.param) for o in self.originals]
        self._groups = GroupTable(self.device, self._rules, group_of, numels, keep=[])
        self._counters = torch.zeros(len(self.originals), dtype=torch.float32, device=self.device)
        #: (addresses and dtypes of everything, segments without gradients, their update)
        self._kept: tuple[Any, list[Segment], Update] | None = None
        #: of the last step: trust ratios, sums, scalars
        self.last: tuple[Tensor, Tensor, Scalars] | None = None

    def _agree(self, every: Sequence[Original]) -> None:
        """The layout is the same on all ranks and fits the values, or all raise the same error."""
        problem = None
        for layout, partition in zip(self.layouts, self.partitions):
            problem = problem or problem_with(layout, partition, every)
        described = [f"layout: {problem or 'fits'}"]
        described += [line for layout in self.layouts for line in layout.describe(every)]
        try:
            self._comm.require_same("layouts", described, self.originals[0].param.device)
        except ValueError as error:
            raise UnknownLayout(str(error)) from None
        if problem:
            raise UnknownLayout(problem)

    def _seen_versions(self) -> list[int]:
        """What torch counts up when a param is written to, but not when DeepSpeed does: it
        writes to the flat vector behind it, or to ``p.data``."""
        return [o.param._version for o in self.originals]

    def refuse_stale_masters(self, every: Sequence[Original]) -> None:
        """Raise where params that were written to are no longer their masters' rounding."""
        if self.layouts[0].kind not in ("master", "flat"):
            return
        versions = self._seen_versions()
        if versions == self._versions:
            return
        for layout, partition in zip(self.layouts, self.partitions):
            problem = problem_with(layout, partition, every)
            if problem:
                raise RuntimeError(f"DeepSpeedLamb cannot step: {problem}")
        self._versions = versions

    def update(
        self,
        live: Mapping[int, Mapping[str, Any]],
        state: Any,
        steps: Tensor,
        arrivals: Arrivals,
        grad_norm: Any,
        track_grad_norm: bool,
        loss_scaling: tuple[Tensor | None, Tensor | None],
    ) -> Tensor | None:
        """Phases 2-6 of a step; one number, not 0 if the step was skipped, or None.

        ``live`` are the param groups, ``steps`` all originals' counts, ``loss_scaling`` what
        torch.amp.GradScaler set on the optimizer, under DeepSpeed's torch_autocast.
        """
        found = self._options.read([live[i] for i in self.group_indices]).rules
        if found != self._rules:
            raise RuntimeError(
                f"DeepSpeedLamb was made with the rules {[r.name for r in self._rules]}, and its "
                f"param groups say {[r.name for r in found]} by now: changed, or loaded with a "
                "checkpoint of others. Make a new one"
            )
        self._formats = {i: Formats.of(live[i]) for i in self.group_indices}
        segments, update = self._prepare(state)
        stepped = [s for s in segments if s.grad is not None]
        missing, doubtful = self._missing(arrivals)
        norms = self._norms
        present = self._present(missing, doubtful, stepped) if missing else None
        norms.prepare(present, grad_norm)
        # DeepSpeed made zeros of gradients that did not come. Whether another rank had one is known
        # after the all-reduce only: step, and take the moments back where none had.
        kept = [(s, [t.clone() for t in s.states]) for s in stepped if s.param in missing]
        self._counters.copy_(steps[self._index])
        scalars = Scalars(self._options, track_grad_norm, *loss_scaling)
        step.prepare([update], norms, scalars)
        step.update([update], norms, scalars)
        update.release()
        for s, before in kept:
            for t, old in zip(s.states, before):
                t.copy_(torch.where(norms.updated[s.param], t, old))
        steps[self._index] = self._counters
        self.last = (update.ratios, update.sums, scalars)
        return scalars.overflow if self._options.skip else None

    def _prepare(self, state: Any) -> tuple[list[Segment], Update]:
        """The spans of values, moments and gradients, in the order of layouts and their spans."""
        tensors = []
        for layout, partition in zip(self.layouts, self.partitions):
            x, entry, rule = partition.detach(), state[partition], self._rule_of(layout)
            complete_state(partition, x, entry, rule, self._formats_of(layout))
            master = entry.get(MASTER)
            x, copy = (x, None) if master is None else (master, x)
            tensors.append((x, copy, *(entry[name] for name in rule.states)))
        grads = self._gradients()
        # DeepSpeed moves memory around: offloading, loading.
        key: list[Any] = [
            None if t is None else (t.data_ptr(), t.dtype, t.shape) for of in tensors for t in of
        ]
        key += [[None if g is None else g.dtype for g in grads], self._formats.copy()]
        if self._kept is None or self._kept[0] != key:
            segments: list[Segment] = []
            for layout, partition, of_one, cut in zip(
                self.layouts, self.partitions, tensors, self._cuts
            ):
                nearest = self._formats_of(layout).nearest
                numbers = iter(_elements(layout, partition))
                for x, copy, *moments in zip(*(cut(t) for t in of_one)):
                    k = self._span_params[len(segments)]
                    if copy is not None:
                        refresh_master(x, copy)
                    s = Segment(k, grads[len(segments)], x, tuple(moments), copy)
                    segments.append(s._replace(elements=next(numbers), nearest=nearest))
            update = make_update(segments, self._counters, self._groups, impl=self._impl, keep=[])
            self._kept = (key, [s._replace(grad=None) for s in segments], update)
        else:
            self._kept[2].set_gradients(grads)
        _, segments, update = self._kept
        return [s._replace(grad=g) for s, g in zip(segments, grads)], update

    def _rule_of(self, layout: PartitionLayout) -> Rule:
        """Of a partition: DeepSpeed joins params of one group only."""
        return self._groups.rules[self._at[layout.originals[0]]]

    def _formats_of(self, layout: PartitionLayout) -> Formats:
        return self._formats[self.originals[self._at[layout.originals[0]]].group]

    def _gradients(self) -> list[Tensor | None]:
        grads: list[Tensor | None] = []
        for layout, partition, cut in zip(self.layouts, self.partitions, self._cuts):
            g = partition.grad
            if g is None and layout.cut:
                g = torch.zeros_like(partition)  # other ranks may have one for other spans
            elif g is not None and g.layout != torch.strided:
                name = self.originals[self._at[layout.originals[0]]].name
                raise RuntimeError(
                    f"DeepSpeedLamb cannot step {name}: sparse gradients are not supported"
                )
            grads += cut(None if g is None else as_laid_out(g, partition))
        return grads

    def _missing(self, arrivals: Arrivals) -> tuple[set[int], set[int]]:
        """The params whose gradient has not come on this rank since their last step; and those of
        them whose gradients may come in a way that we do not hear of."""
        numbers = [o.number for o in self.originals]
        missing = {k for k, i in enumerate(numbers) if not arrivals.came(i)}
        if arrivals.count == self._heard:
            doubtful = missing  # a compiled graph may reduce gradients by itself
        else:
            doubtful = {k for k in missing if not arrivals.ever[numbers[k]]}
        self._heard = arrivals.count
        for i in numbers:
            arrivals.forget(i)
        return missing, doubtful

    def _present(self, missing: set[int], doubtful: set[int], stepped: Sequence[Segment]) -> Tensor:
        """float64 [params], 1 where this rank knows of a gradient.

        Where in doubt, one that is not zero. Not in general: of a param that gets none this time,
        ZeRO-3 shows the gradient of the time before.
        """
        here = {s.param for s in stepped} if not self.layouts[0].cut else self._at.values()
        flags = [float(k in here and k not in missing) for k in range(len(self.originals))]
        if self._flags is None or self._flags[0] != flags:
            self._flags = (flags, torch.tensor(flags, dtype=torch.float64, device=self.device))
        present = self._flags[1].clone()
        for s in stepped:
            if s.param in doubtful:
                assert s.grad is not None
                present[s.param] = torch.maximum(present[s.param], s.grad.any().double())
        return present

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
                for span in layout.spans:
                    if span.original == i:
                        part = tensor.detach()[span.start : span.start + span.numel]
                        whole[span.offset : span.offset + span.numel] = part
                self._comm.all_reduce_sum(whole)
                found[i][name] = whole.view(*logical_shape(original)).cpu()
        return found

    def load_whole_state(self, saved: Mapping[int, Mapping[str, Tensor]], state: Any) -> None:
        """The reverse, of what ``saved`` has; everything else becomes zero, but masters stay."""
        for name, layout, tensor in self._stored(state):
            if name != MASTER:
                tensor.zero_()
            for span in layout.spans:
                value = saved.get(span.original, {}).get(name)
                if value is None:
                    continue
                if layout.cut:
                    part = value.reshape(-1)[span.offset : span.offset + span.numel]
                    into = tensor.detach()[span.start : span.start + span.numel]
                    into.copy_(converted(part, tensor.dtype))
                else:
                    tensor.detach().copy_(converted(value, tensor.dtype))

    def _stored(self, state: Any) -> list[tuple[str, PartitionLayout, Tensor]]:
        """(what it is, layout, tensor) of everything a checkpoint must have beside the model."""
        found: list[tuple[str, PartitionLayout, Tensor]] = []
        for layout, partition in zip(self.layouts, self.partitions):
            entry = state[partition]
            rule, formats = self._rule_of(layout), self._formats_of(layout)
            complete_state(partition, partition.detach(), entry, rule, formats)
            found += [(name, layout, entry[name]) for name in TENSOR_STATES if name in entry]
            half = needs_master(self.originals[self._at[layout.originals[0]]].param.dtype)
            if half and layout.kind != "param":
                found.append((MASTER, layout, partition))
        return found

    def held(self, group: int) -> list[tuple[PartitionLayout, Tensor]]:
        """This unit's layouts and partitions of a param group."""
        return [
            (layout, partition)
            for layout, partition in zip(self.layouts, self.partitions)
            if self.originals[self._at[layout.originals[0]]].group == group
        ]


class _PartitionNorms:
    """:class:`dist_lamb.norms.Norms` that also add up on which ranks a param has a gradient."""

    def __init__(self, comm: Comm, cut: bool, device: torch.device) -> None:
        self._comm = comm
        self._cut = cut
        self._device = device
        self.local = False
        self.settled = True
        #: bool [params], of the last step: on some rank the param had a gradient
        self.updated = torch.empty(0, dtype=torch.bool, device="cpu")

    def prepare(self, present: Tensor | None, grad_norm: Any) -> None:
        """For one step: which params have a gradient on this rank, float64 [params] (None: all),
        and the norm of all gradients if it comes from outside."""
        self._present = present
        self._grad_norm = grad_norm
        self.settled = present is None
        self.local = self._comm.world_size == 1 and present is None and grad_norm is None

    def reduction_groups(self, device: torch.device) -> None:
        """All gradients add up over the same ranks."""
        return None

    def per_param(self, sums: Tensor) -> Tensor:
        if self._present is not None:
            sums[:, UPDATED] *= self._present
        if self._cut:
            sums = self._add(sums)
        else:
            # Every rank has the whole tensors and the same sums.
            sums[:, UPDATED] = self._add(sums[:, UPDATED].contiguous())
        self.updated = sums[:, UPDATED] > 0
        return sums

    def over_all(self, sums: Tensor, early: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self._cut:
            sums, early = add_up(self._add, sums, early)
        if self._grad_norm is not None:
            sums[0] = scalar_of(self._grad_norm, torch.float64) ** 2
        return sums, early

    def _add(self, t: Tensor) -> Tensor:
        # With CPU offload the sums are on the CPU, where NCCL does not go.
        return self._comm.all_reduce_sum(t.to(self._device)).to(t.device)


def _elements(layout: PartitionLayout, partition: Tensor) -> list[Elements]:
    """Of a partition's spans. DeepSpeed joins params as contiguous ones."""
    if not layout.cut:
        return [Elements.of(partition.shape, partition.stride())]
    return [Elements(start=span.offset) for span in layout.spans]


def _cuts(layout: PartitionLayout, partition: Tensor) -> Callable[[Tensor | None], Sequence[Any]]:
    """A function from a tensor like ``partition`` to its spans, each [1, numel]; None to Nones."""
    count = len(layout.spans)
    if not layout.cut:
        return lambda t: [None if t is None else flat_row(t)]
    sizes, chosen, end = [], [], 0
    for span in layout.spans:
        if span.start > end:
            sizes.append(span.start - end)
        chosen.append(len(sizes))
        sizes.append(span.numel)
        end = span.start + span.numel
    sizes.append(partition.numel() - end)

    def cut(t: Tensor | None) -> Sequence[Any]:
        if t is None:
            return [None] * count
        parts = torch.split(flat_row(t), sizes, dim=1)
        return [parts[i] for i in chosen]

    return cut
