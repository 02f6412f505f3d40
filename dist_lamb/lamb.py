"""Lamb: the drop-in torch.optim.Optimizer, for tensors whole on their device and for DTensors."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch_private import outside_graphs
from .base import Closure, LambBase, count_here
from .deepspeed_marks import refuse_deepspeed
from .fingerprint import Fingerprint
from .kernels import Update, make_update
from .kernels.device import capturing
from .kernels.groups import GroupTable
from .kernels.segments import Segment, segment
from .last_step import Members
from .norms import DTensorNorms, Norms
from .param_notes import ParamNotes
from .rules import Rule
from .sharding.dtensors import (
    elements_of,
    elsewhere,
    full_of,
    local_of,
    mismatch,
    placed_as,
    refusal,
    wrapped,
)
from .state import (
    MASTER,
    REMAINDER,
    TENSOR_STATES,
    Formats,
    as_laid_out,
    complete_state,
    foreign_state,
    is_dense,
    refresh_master,
    refresh_remainder,
)


class Lamb(LambBase):
    """LAMB (You et al., arXiv 1904.00962 v5): Adam's direction, scaled per tensor by ||x||/||u||.

    Args:
        params: a module, tensors, ``(name, tensor)`` pairs, or groups of either, as in torch.optim.
        lr: learning rate; a float or a 1-element tensor.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: coefficient wd; where it enters is ``decoupled``'s choice.
        grad_averaging: moment ``m <- b1*m + (1-b1)*g``; False drops the factor ``1-b1``.
        bias_correction: divide the moments by ``1 - beta^t``; False is the paper's version 3.
        decoupled: ``u = r + wd*x``; False decays by L2, ``g <- g + wd*x``, before the moments.
        max_grad_norm: clip all gradients to this global L2 norm (over all params, groups and
            ranks). None or 0: off.
        adapt: which tensors get the trust ratio: ``"all"`` (the paper), ``"decayed"`` (where
            weight_decay is not 0: NVIDIA's BERT recipes, with biases and norm weights in a
            ``weight_decay=0`` group), or True/False for a group. The others take an Adam step.
        trust_clip: ``(lo, hi)`` clamp of the trust ratio; LAMBC is (0, 1).
        phi: ``(lo, hi)`` clamp of ||x|| in the trust ratio.
        maximize: ascend instead of descend.
        rule: ``"lamb"``, or another one of :mod:`dist_lamb.rules`, whose own options are then
            keyword arguments (and entries of groups) too: ``rule="lars", momentum=0.9``.
        amsgrad: divide by the largest second moment so far; of rules lamb, lamb_outside and adamw.
        nonfinite: what a step does when a gradient is infinite or NaN. ``"propagate"``: it goes
            into the params, as in torch.optim. ``"skip"``: the step changes nothing, on any rank,
            and :meth:`skipped_steps` counts it; decided on the device, without a sync, for one
            more pass over the gradients (clipping makes that pass anyway). One group that says
            "skip" makes it so for all.
        state_format: how the rule's states are stored: ``"float32"``; ``"bfloat16"``, half the
            memory, by stochastic rounding, so that the mean of many roundings is exact; or
            ``"bfloat16-nearest"``, for comparison only: rounded so, ``v <- 0.999 v`` stands still.
            What is stored is what counts, in both norms. Float64 params keep float64 states.
        master: of bfloat16 params: ``"float32"``, or ``"remainder"``, 2 bytes a param in place of
            4: the param is the master rounded to nearest (half away from zero), and an int16
            ``remainder`` in the state is what the master has more. Nothing is lost by it. Float16
            params keep float32 masters. For whole state dicts of DTensors see
            :meth:`full_optimizer_state_dict`.
        track_grad_norm: let :meth:`grad_norm` know the norm where nothing else asks for it, and
            :meth:`grad_norms` those of every param.
        impl: ``"auto"``, ``"reference"``, ``"foreach"``, ``"compiled"`` (torch.compile) or
            ``"triton"``. Auto takes Triton on GPUs (3 launches a step, 4 with clipping). On CPUs it
            takes torch.compile from 4 M elements on, if there is a C++ compiler (the first step
            then takes seconds), else foreach.
        foreach, fused: torch's flags; ``foreach=True`` is ``impl="foreach"``, ``fused=True`` is
            ``impl="auto"``.
        capturable: allow ``step()`` to be captured in a CUDA graph (Triton only), after at least
            one step outside of it; an lr that changes between replays must be a device tensor.

    Options may differ between groups; :func:`dist_lamb.options.preset` has named sets of them.

    Norms, and by default moments, are float32 (float64 for float64 params) whatever the dtype of
    params and gradients, and half-precision params keep a float32 ``master`` in the state, which is
    the value being optimized. Where such a param was written to (weights loaded, clamped), elements
    that are no longer their master's rounding count; writes through ``p.data`` cannot be noticed:
    call :meth:`refresh_masters` after them. Under rule lamb ``state[p]`` holds ``step`` (0-d
    float32), ``exp_avg``, ``exp_avg_sq`` (shaped like p), and ``master`` or ``remainder``. A param
    whose gradient is None is left alone; gradients are never written. With ``master="remainder"``
    the master of a param that was written to is the new value where that is zero or infinite, and
    elsewhere within one unit in the last place of bfloat16. To start from other weights delete the
    state, ``del opt.state[p]``.

    Random bits are a hash of (element of the whole param, the param's own step): the same bits come
    out at every number of ranks, on every mesh and in every memory format. Formats are this
    optimizer's own: state that is loaded is converted into them, exactly where it can be. Groups,
    state and options may be edited in place between steps, as in torch.optim.

    DTensors (fully_shard, parallelize_module, distribute_tensor; any mesh, uneven shards, beside
    plain tensors that all ranks have alike) are updated as the whole tensors would be: a step
    works on local shards, and adds norms up by one collective for each mesh axis that cuts
    params, whatever their number; with clipping by another one of a few numbers. All ranks of a
    mesh must call ``step()``, with gradients for the same params. State is sharded as the params
    are, so torch.distributed.checkpoint saves, loads and reshards it; whole tensors load too.
    ``max_grad_norm`` knows the params of this optimizer only: with pipeline stages, each with its
    own, clip across stages before ``step()``.

    Raises:
        ValueError: an option out of its range; params whose memory overlaps. TypeError: a param
        that is not real floating point; an option that is none, naming what it is called here.
        RuntimeError: params that are not whole logical tensors and do not say of what they are
        part (FSDP1's, ShardedTensor, DTensors with Partial placements); from ``step()`` also
        sparse gradients, and params on the meta device.
    """

    def _prepare_fields(self) -> None:
        super()._prepare_fields()
        self._kept: _Kept | None = None
        #: the params that counters and norms were made for
        self._known: list[Tensor] = []
        self._counters: dict[torch.device, Tensor] = {}
        self._norms: Norms | None = None
        #: the rule that a param's state was made under
        self._made_for: ParamNotes[Rule] = ParamNotes()

    @outside_graphs
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update of every param that has a gradient.

        ``closure`` reevaluates the model and returns the loss, which is returned.
        """
        loss = self._reevaluated(closure)
        self._begin()
        kept = self._kept
        gaps: list[tuple[Tensor, Tensor]] = []
        grads = None
        if kept and (kept.rules, kept.formats) == (self._options.rules, self._formats()):
            grads = kept.gradients_if_valid(self.param_groups, self.state)
        if kept is None or grads is None:
            # Until it is made anew nothing that was kept may be used, whatever raises here.
            self._kept = None
            stepped = [(i, p) for i, p in enumerate(self._all_params()) if p.grad is not None]
            if not stepped:
                self._last = ([], None, Members([], []))
                return loss
            kept, gaps = self._prepare(stepped)
        elif all(g is None for g in grads):
            self._last = ([], None, Members([], []))
            return loss
        else:
            for p in kept.fingerprint.edited():
                self._refresh(p)
            for update, positions in zip(kept.updates, kept.positions):
                update.set_gradients(
                    [grads[k] for k in positions] if len(kept.updates) > 1 else grads
                )
        try:
            self._update(kept.updates, kept.norms, kept.members)
        finally:
            for update in kept.updates:
                update.release()
        for x, dense in gaps:
            x.copy_(dense)
        kept.fingerprint.renew()
        return loss

    def refresh_masters(self) -> None:
        """Take half-precision params that were written to through ``p.data`` as the new values.

        Elements that still are their master's rounding keep the master. Other writes are noticed.
        Under ``master="remainder"`` every element is: see there.
        """
        for p in self._all_params():
            if p in self.state:
                self._refresh(p)

    def _refresh(self, p: Tensor) -> None:
        state, x = self.state[p], local_of(p).detach()
        if MASTER in state:
            refresh_master(local_of(state[MASTER]), x)
        if REMAINDER in state:
            refresh_remainder(local_of(state[REMAINDER]), x)

    def full_optimizer_state_dict(self) -> dict[str, Any]:
        """The state dict with whole tensors on the CPU, on every rank; of DTensors a collective.

        It loads at any number of ranks, on any mesh, and into the package's other optimizers.
        torch's ``get_optimizer_state_dict`` with ``full_state_dict`` gives the same by name, but
        not of int16 remainders, which neither gloo nor NCCL sends.
        """
        packed = dict(self.state_dict())
        own = {i: dict(entry) for i, entry in packed["state"].items() if isinstance(i, int)}
        # In the same order on every rank, whichever came first: each DTensor is a collective.
        for i, name in sorted((i, name) for i, entry in own.items() for name in entry):
            if isinstance(own[i][name], Tensor):
                own[i][name] = full_of(own[i][name]).to("cpu", copy=True)
        return {**packed, "state": {**packed["state"], **own}}

    def _formats(self) -> list[Formats]:
        """By group."""
        return list(map(Formats.of, self.param_groups))

    def _prepare(
        self, stepped: list[tuple[int, Tensor]]
    ) -> tuple[_Kept, list[tuple[Tensor, Tensor]]]:
        """What a step works on, and where nothing is out of the ordinary for the next ones too.

        Also (local memory, dense copy) of params with gaps.
        """
        self._validate(stepped)
        params = self._all_params()
        if len(params) != len(self._known) or not all(map(is_, params, self._known)):
            # Counters and norms belong to params, not to positions.
            self._known, self._counters, self._norms = params, {}, DTensorNorms(params)
        assert self._norms is not None
        rules, formats = self._options.rules, self._formats()
        group_of = [i for i, group in enumerate(self.param_groups) for _ in group["params"]]
        self._refuse_to_begin(
            {
                i: rule
                for i, p in stepped
                if next(iter((rule := rules[group_of[i]]).states)) not in self.state.get(p, ())
            }
        )
        # Params that were stepped before stay: gradients may come and go.
        chosen = {i for i, _ in stepped} | {
            i
            for i, p in enumerate(params)
            if next(iter(rules[group_of[i]].states)) in self.state.get(p, ())
            and is_dense(local_of(p))
        }
        segments = [
            self._segment(i, params[i], rules[group_of[i]], formats[group_of[i]])
            for i in sorted(chosen)
        ]
        by_device: dict[torch.device, list[int]] = {}
        for k, s in enumerate(segments):
            by_device.setdefault(s.x.device, []).append(k)
        updates = [
            make_update(
                [segments[k] for k in positions],
                self._counters[device],
                GroupTable.of_groups(device, self.param_groups, self._captured),
                impl=self.impl,
                keep=self._captured,
            )
            for device, positions in by_device.items()
        ]
        own = [params[s.param] for s in segments]
        fingerprint = Fingerprint(self.param_groups, self.state, own, [s.grad for s in segments])
        members = Members(params, [rules[i] for i in group_of])
        positions = list(by_device.values())
        kept = _Kept(fingerprint, updates, positions, self._norms, members, rules, formats)
        dense = [(local_of(p), s.x if s.copy is None else s.copy) for p, s in zip(own, segments)]
        gaps = [(p, x) for p, x in dense if p.data_ptr() != x.data_ptr()]
        in_place = all(
            p.grad is None or s.grad.data_ptr() == local_of(p.grad).data_ptr()  # type: ignore[union-attr]
            for p, s in zip(own, segments)
        )
        # On a GPU it would keep state alive that is moved away between steps.
        on_cpu = all(device.type == "cpu" for device in by_device)
        if in_place and not gaps and (on_cpu or not any(u.keeps_memory for u in updates)):
            self._kept = kept
        return kept, gaps

    def _refuse_to_begin(self, new: dict[int, Rule]) -> None:
        """Raise where state must not be made for these params. To look for zeros is a collective,
        of the first step alone: no rank sees more than its pieces."""
        params = self._known
        if any(capturing(params[i].device) for i in new):
            raise RuntimeError(
                "take a step before capturing step() in a CUDA graph: state that is made "
                "inside of it would be made anew at every replay"
            )
        looked_at = [i for i, rule in new.items() if rule.zeros and params[i].numel()]
        for device in dict.fromkeys(params[i].device for i in looked_at):
            here = [i for i in looked_at if params[i].device == device]
            nonzero = torch.zeros(len(params), 1, dtype=torch.float64, device=device)
            for i in here:
                nonzero[i] = elsewhere(params[i]) or local_of(params[i]).any()
            assert self._norms is not None
            found = self._norms.per_param(nonzero).tolist()
            for i in here:
                if found[i] == [0.0]:
                    raise ValueError(f"{self._all_names()[i]} is zero: {new[i].zeros}")

    def _segment(self, i: int, p: Tensor, rule: Rule, formats: Formats) -> Segment:
        """What the step of a param touches, its state completed and laid out as the param is."""
        whole = x = local_of(p).detach()
        if not is_dense(x):
            x = x.contiguous()
        state = self.state[p]
        other, made_for = foreign_state(state, rule), self._made_for.get(p, rule)
        if other or (made_for.states != rule.states and next(iter(rule.states)) in state):
            raise RuntimeError(
                f"Lamb cannot step {self._all_names()[i]}: its state {other or list(state)} is of "
                f"another rule than {rule.name!r} with {list(rule.states)}; to begin anew, drop "
                "it: del opt.state[p]"
            )
        if x.device not in self._counters:
            self._counters[x.device] = torch.zeros(
                len(self._known), dtype=torch.float32, device=x.device
            )
        count_here(self._counters[x.device], i, state)
        found = {name: local_of(state[name]) for name in TENSOR_STATES if name in state}
        for name, t in found.items():
            problem = None
            if t.device != x.device:  # a kernel would follow an address of the other device
                problem = f"is on {t.device}, the param on {x.device}"
            elif t.shape != x.shape:
                problem = f"has shape {tuple(t.shape)}, the param {tuple(x.shape)}"
            if problem:
                raise RuntimeError(
                    f"Lamb cannot step {self._all_names()[i]}: its state {name} {problem}"
                )
        self._made_for[p] = rule
        local = dict(found)
        if REMAINDER in local:
            refresh_remainder(local[REMAINDER], whole)
        complete_state(x, x, local, rule, formats)
        for name in found.keys() - local.keys():
            del state[name]
        for name, t in local.items():
            if t is not found.get(name):
                state[name] = wrapped(t, p)
        grad = None if p.grad is None else as_laid_out(local_of(placed_as(p.grad, p)), x)
        s = segment(i, grad, x, local, rule, formats, elements_of(p, x))
        if s.copy is not None:
            refresh_master(s.x, whole)
        return s

    def _validate(self, stepped: list[tuple[int, Tensor]]) -> None:
        """Refuse the step before anything is changed."""
        refuse_deepspeed("Lamb", self._given, (p for _, p in stepped))
        for i, p in stepped:
            assert p.grad is not None
            if p.grad.is_sparse or p.grad.layout != torch.strided:
                what = "sparse gradients are not supported"
            elif p.device.type == "meta":
                what = "it is on the meta device and holds no values"
            else:
                # again: FSDP1 may have wrapped the model since, or a framework swapped the params
                found = refusal(p) or mismatch(p.grad, p)
                if found is None:
                    continue
                what = found
            raise RuntimeError(f"Lamb cannot step {self._all_names()[i]}: {what}")


class _Kept(NamedTuple):
    """What one step found and the next one may use, if the fingerprint still matches."""

    fingerprint: Fingerprint
    updates: list[Update]
    positions: list[list[int]]  # of each update's segments in the order of the fingerprint
    norms: Norms
    members: Members
    rules: list[Rule]  # by group
    formats: list[Formats]  # by group

    def gradients_if_valid(self, groups: Any, state: Any) -> list[Any] | None:
        return self.fingerprint.gradients() if self.fingerprint.matches(groups, state) else None
