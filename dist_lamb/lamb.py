"""Lamb: the drop-in torch.optim.Optimizer, for tensors that are whole on their device."""

from __future__ import annotations

from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from .base import Closure, LambBase, Options, ParamsT
from .kernels import Block, RowMap, Work
from .norms import LocalNorms
from .sharding.comm import is_dtensor
from .state import as_laid_out, complete_state, flat_row, is_dense, state_dtype


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
        impl: ``"auto"``, ``"reference"``, ``"foreach"`` or ``"compiled"`` (torch.compile).
        foreach, fused, capturable: torch's flags; ``foreach=True`` is ``impl="foreach"``,
            ``fused=True`` is ``impl="auto"``.

    Options may differ between groups; :func:`dist_lamb.options.preset` has named sets of them.

    Moments and norms are float32 (float64 for float64 params) whatever the dtype of params and
    gradients, and half-precision params keep a float32 ``master`` in the state, which then is
    the value being optimized: after writing new values into such a param, drop its state.
    ``state[p]`` holds ``step`` (0-d float32), ``exp_avg``, ``exp_avg_sq`` (shaped like p), and
    ``master``. A param whose gradient is None is left alone; gradients are never written.

    Raises:
        ValueError: an option out of its range. TypeError: a param that is not real floating point.
        RuntimeError, from ``step()``: sparse gradients; params on the meta device; DTensors.
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

    def _forget_caches(self) -> None:
        super()._forget_caches()
        self._maps: dict[_Kind, tuple[list[int], RowMap]] = {}
        self._active: dict[torch.device, tuple[list[int], Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update of every param that has a gradient.

        ``closure`` reevaluates the model and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        stepped = [(i, p) for i, p in enumerate(self._all_params()) if p.grad is not None]
        if stepped:
            self._validate(stepped)
            works, gaps = self._works(stepped)
            self._update(works, self._active_masks(stepped), LocalNorms(), masked=False)
            for p, dense in gaps:
                p.copy_(dense)
        return loss

    def _validate(self, stepped: list[tuple[int, Tensor]]) -> None:
        """Refuse the step before anything is changed."""
        for i, p in stepped:
            assert p.grad is not None
            if p.grad.is_sparse or p.grad.layout != torch.strided:
                what = "sparse gradients are not supported"
            elif p.device.type == "meta":
                what = "it is on the meta device and holds no values"
            elif is_dtensor(p):
                what = "it is a DTensor; its trust ratio would be that of the local shard"
            else:
                continue
            raise RuntimeError(f"Lamb cannot step {self._all_names()[i]}: {what}")

    def _works(
        self, stepped: list[tuple[int, Tensor]]
    ) -> tuple[list[Work], list[tuple[Tensor, Tensor]]]:
        """One Work per device and dtype of state; (param, dense copy) where a param has gaps."""
        kinds: dict[_Kind, list[tuple[int, Block]]] = {}
        gaps = []
        for i, p in stepped:
            x = p.detach()
            if not is_dense(x):
                x = x.contiguous()
                gaps.append((p, x))
            state = self.state[p]
            if "step" not in state:
                state["step"] = self._steps(p.device)[i]
            complete_state(p, x, state)
            assert p.grad is not None
            master = state.get("master")
            block = Block(
                flat_row(as_laid_out(p.grad, x)),
                flat_row(x if master is None else master),
                flat_row(state["exp_avg"]),
                flat_row(state["exp_avg_sq"]),
                None if master is None else flat_row(x),
            )
            kinds.setdefault(_Kind(p.device, state_dtype(p.dtype)), []).append((i, block))
        works = []
        for kind, rows in kinds.items():
            indices = [i for i, _ in rows]
            blocks = [block for _, block in rows]
            works.append(Work(blocks, self._row_map(kind, indices), kind.dtype, tiled=False))
        return works, gaps

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
