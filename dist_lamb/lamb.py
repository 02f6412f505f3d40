"""Lamb: the drop-in torch.optim.Optimizer, for tensors whole on their device and for DTensors."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from . import kernels
from .base import Closure, LambBase, Options, ParamsT, count_here
from .kernels import Block, RowMap, Work
from .kernels.tables import Segment, capturing, supports
from .norms import DTensorNorms, Norms
from .plans import FusedPlan, Plan, WorksPlan, in_place
from .sharding.dtensors import local_of, mismatch, placed_as, refusal, wrapped
from .state import TENSOR_STATES, as_laid_out, complete_state, flat_row, is_dense, state_dtype


class Lamb(LambBase):
    """LAMB (You et al., arXiv 1904.00962 v5): Adam's direction, scaled per tensor by ||x||/||u||.

    Args:
        params: tensors, ``(name, tensor)`` pairs, or groups of either, as in torch.optim.
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
        impl: ``"auto"``, ``"reference"``, ``"foreach"``, ``"compiled"`` (torch.compile) or
            ``"triton"``, which auto takes on GPUs: 3 launches a step, 4 with clipping.
        foreach, fused: torch's flags; ``foreach=True`` is ``impl="foreach"``, ``fused=True`` is
            ``impl="auto"``.
        capturable: allow ``step()`` to be captured in a CUDA graph (Triton only), after at least
            one step outside of it; an lr that changes between replays must be a device tensor.

    Options may differ between groups; :func:`dist_lamb.options.preset` has named sets of them.

    Moments and norms are float32 (float64 for float64 params) whatever the dtype of params and
    gradients, and half-precision params keep a float32 ``master`` in the state, which then is
    the value being optimized: after writing new values into such a param, drop its state.
    ``state[p]`` holds ``step`` (0-d float32), ``exp_avg``, ``exp_avg_sq`` (shaped like p), and
    ``master``. A param whose gradient is None is left alone; gradients are never written.

    DTensors (fully_shard, parallelize_module, distribute_tensor; any mesh, uneven shards, beside
    plain tensors that all ranks have alike) are updated as the whole tensors would be: a step
    works on local shards, and adds norms up by one collective for each mesh axis that cuts
    params, whatever their number; with clipping by another one of a few numbers. All ranks of a
    mesh must call ``step()``, with gradients for the same params. State is sharded as the params
    are, so torch.distributed.checkpoint saves, loads and reshards it; whole tensors load too.
    ``max_grad_norm`` knows the params of this optimizer only: with pipeline stages, each with its
    own, clip across stages before ``step()``.

    Raises:
        ValueError: an option out of its range. TypeError: a param that is not real floating point.
        RuntimeError: params that are not whole logical tensors and do not say of what they are
        part (FSDP1's, ShardedTensor, DTensors with Partial placements); from ``step()`` also
        sparse gradients, and params on the meta device.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        **more: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **more)

    @property
    def state(self) -> Any:
        """``defaultdict``: {param: {"step", "exp_avg", "exp_avg_sq", and "master" in some}}.

        To put other tensors there, ask for it anew: a step looks at all of them only when somebody
        has asked since the last one, for it takes longer than the step of a small model.
        """
        self._state_seen = True
        return self.__dict__["state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["state"] = value

    def _forget_caches(self) -> None:
        super()._forget_caches()
        #: whether somebody has had the state in hand since the last step
        self._state_seen = True
        self._maps: dict[_Kind, tuple[list[int], RowMap]] = {}
        self._active: dict[torch.device, tuple[list[int], Tensor]] = {}
        self._plan: Plan | None = None
        #: which params the last step was made on, where it was without a plan
        self._stepped: list[int] = []
        self._normed: tuple[list[Tensor], Norms] | None = None

    def step(self, closure: Closure | None = None) -> Any:
        """One update of every param that has a gradient.

        ``closure`` reevaluates the model and returns the loss, which is returned.
        """
        loss = self._reevaluated(closure)
        state = self.__dict__["state"]
        if self._plan is not None and self._plan.fits(self.param_groups, state, self._state_seen):
            # every other check was made when the plan was
            self._state_seen = False
            self._plan.step(self)
        else:
            self._step_unplanned()
        return loss

    @torch.no_grad()  # entering takes a small model's step 2 us, and planned steps need it not
    def _step_unplanned(self) -> None:
        params = self._all_params()
        stepped = [(i, p) for i, p in enumerate(params) if p.grad is not None]
        if stepped:
            self._validate(stepped)
            if kernels.fused(self.impl, ((p.device, p.dtype) for _, p in stepped)):
                gaps = self._step_fused(params, stepped)
            else:
                gaps = self._step_works(params, stepped)
            for x, dense in gaps:
                x.copy_(dense)

    def _step_fused(
        self, params: list[Tensor], stepped: list[tuple[int, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """The fused step, and where nothing is out of the ordinary a plan for the next ones.

        Returns (local memory, dense copy) where a param has gaps.
        """
        device = stepped[0][1].device
        chosen = {i for i, _ in stepped}
        # Params that were stepped before stay in the table: gradients may come and go.
        chosen |= {
            i
            for i, p in enumerate(params)
            if p.device == device
            and supports(p.dtype)
            and is_dense(local_of(p))
            and "exp_avg" in self.state.get(p, ())
        }
        segments = [self._segment(i, params[i]) for i in sorted(chosen)]
        gaps = self._gaps(params, segments)
        table = self._table(segments, device)
        norms = self._norms_of(params)
        self._plan = None
        if not gaps and in_place(params, segments):
            self._plan = FusedPlan(table, norms, params, segments, self.state)
        self._update_fused(table, norms, active=None)
        return gaps

    def _step_works(
        self, params: list[Tensor], stepped: list[tuple[int, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """The step on tensors one by one; else as :meth:`_step_fused`."""
        segments = [self._segment(i, p) for i, p in stepped]
        gaps = self._gaps(params, segments)
        works, active = self._works(segments, params), self._active_masks(stepped)
        norms = self._norms_of(params)
        self._update(works, active, norms, masked=False)
        self._plan = None
        indices = [i for i, _ in stepped]
        on_cpu = all(p.device.type == "cpu" for _, p in stepped)
        # On a GPU it would keep state alive that is moved away between steps. Where other params
        # have gradients in every step it would be made in vain.
        if on_cpu and not gaps and indices == self._stepped and in_place(params, segments):
            self._plan = WorksPlan(works, active, norms, params, segments, self.state)
        self._stepped = indices
        return gaps

    def _segment(self, i: int, p: Tensor) -> Segment:
        """What the step of a param touches, its state completed and laid out as the param is."""
        x = local_of(p).detach()
        if not is_dense(x):
            x = x.contiguous()
        state = self.state[p]
        if "exp_avg" not in state and capturing(p.device):
            raise RuntimeError(
                "take a step before capturing step() in a CUDA graph: state that is made inside "
                "of it would be made anew at every replay"
            )
        count_here(self._steps(p.device), i, state)
        found = {name: local_of(state[name]) for name in TENSOR_STATES if name in state}
        local = dict(found)
        complete_state(x, x, local)
        for name, t in local.items():
            if t is not found.get(name):
                state[name] = wrapped(t, p)
            if t.device != x.device:  # a kernel would follow an address of the other device
                raise RuntimeError(
                    f"Lamb cannot step {self._all_names()[i]}: its state {name} is on {t.device}, "
                    f"the param on {x.device}"
                )
        m, v, master = local["exp_avg"], local["exp_avg_sq"], local.get("master")
        grad = None if p.grad is None else as_laid_out(local_of(placed_as(p.grad, p)), x)
        return (
            Segment(i, grad, x, m, v, None) if master is None else Segment(i, grad, master, m, v, x)
        )

    @staticmethod
    def _gaps(params: list[Tensor], segments: list[Segment]) -> list[tuple[Tensor, Tensor]]:
        """(local memory, dense copy) where a param has gaps."""
        dense = [(local_of(params[s.param]), s.x if s.copy is None else s.copy) for s in segments]
        return [(p, x) for p, x in dense if p.data_ptr() != x.data_ptr()]

    def _validate(self, stepped: list[tuple[int, Tensor]]) -> None:
        """Refuse the step before anything is changed."""
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

    def _norms_of(self, params: list[Tensor]) -> Norms:
        known = self._normed
        if known is None or len(known[0]) != len(params) or not all(map(is_, known[0], params)):
            known = self._normed = (params, DTensorNorms(params))
        return known[1]

    def _works(self, segments: Sequence[Segment], params: list[Tensor]) -> list[Work]:
        """One Work per device and dtype of state."""
        kinds: dict[_Kind, list[tuple[int, Block]]] = {}
        for segment in segments:
            p = params[segment.param]
            block = Block(*(None if t is None else flat_row(t) for t in segment[1:]))  # type: ignore[arg-type]
            kind = _Kind(p.device, state_dtype(p.dtype))
            kinds.setdefault(kind, []).append((segment.param, block))
        works = []
        for kind, rows in kinds.items():
            indices = [i for i, _ in rows]
            blocks = [block for _, block in rows]
            works.append(Work(blocks, self._row_map(kind, indices), kind.dtype, tiled=False))
        return works

    def _row_map(self, kind: _Kind, indices: list[int]) -> RowMap:
        cached = self._maps.get(kind)
        if cached is None or cached[0] != indices:
            rows = RowMap([[i] for i in indices], len(self._all_params()), kind.device)
            cached = self._maps[kind] = (indices, rows)
        return cached[1]

    def _active_masks(self, stepped: list[tuple[int, Tensor]]) -> dict[torch.device, Tensor]:
        by_device: dict[torch.device, list[int]] = {}
        for i, p in stepped:
            by_device.setdefault(p.device, []).append(i)
        for device, indices in by_device.items():
            cached = self._active.get(device)
            if cached is None or cached[0] != indices:
                mask = torch.zeros(len(self._all_params()), dtype=torch.bool)
                mask[indices] = True
                self._active[device] = (indices, mask.to(device))
        return {device: self._active[device][1] for device in by_device}


class _Kind(NamedTuple):
    device: torch.device
    dtype: torch.dtype
