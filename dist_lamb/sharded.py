"""ShardedLamb: LAMB with ZeRO-1/2 sharding over any process group, exact at every world size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from .base import Closure, LambBase, Options, ParamsT
from .norms import FlatNorms
from .sharding.buffers import FlatBuffers, spec_of
from .sharding.comm import Comm, DeviceMesh, ProcessGroup, is_dtensor
from .sharding.layout import Layout
from .state import TENSOR_STATES

#: Elements per bucket, unless one param alone is larger.
BUCKET_NUMEL = 2**24


class ShardedLamb(LambBase):
    """Data-parallel LAMB whose state, and at stage 2 gradients, are sharded over the ranks.

    Takes the place of DistributedDataParallel and of an optimizer::

        opt = ShardedLamb(model, lr=1e-3)         # or param_groups(model, ...)
        loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()

    ``step()`` averages the gradients over ranks, updates this rank's shard and gathers the params:
    per bucket one reduce-scatter and one all-gather, and one all-reduce for all norms together
    (with ``max_grad_norm`` one more, of a scalar). The result does not depend on the number of
    ranks: the same bits come out for the same averaged gradients.

    Args:
        params: a module, or what :class:`dist_lamb.Lamb` takes. Every rank must give the same
            params in the same order; their values are broadcast from the group's rank 0, and
            with a module its buffers are too.
        lr, betas, eps, weight_decay, and keyword options: as for :class:`dist_lamb.Lamb`.
        stage: 1 keeps ``p.grad`` after ``step()``; 2 frees each as soon as it is reduced.
        process_group: the ranks to shard over; default all. Or ``mesh``, a 1-D DeviceMesh.
        reduce_gradients: False if ``p.grad`` arrives averaged (under DistributedDataParallel, or
            a trainer that uses it).
        bucket_numel: elements communicated at a time.

    Params move into flat buffers at the first step, ``p.data`` becoming views; frozen params stay
    where they are. A param without a gradient on any rank is left alone; without one on some
    ranks it counts as zero there. ``state[p]`` holds this rank's pieces, with the same keys on
    every rank; see :meth:`full_optimizer_state_dict` for whole tensors.

    With loss scaling use torch's ShardedGradScaler: ``step()`` agrees on an overflow over all
    ranks, but a plain GradScaler would then change its scale on one rank only.

    Raises:
        ValueError: ranks that differ in names, shapes, dtypes or options, naming the first
            difference; an option out of its range. RuntimeError: params on several devices or on
            the meta device; sparse gradients; DTensors.
    """

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        stage: int = 2,
        process_group: ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
        reduce_gradients: bool = True,
        bucket_numel: int = BUCKET_NUMEL,
        **more: Unpack[Options],
    ) -> None:
        if stage not in (1, 2):
            raise ValueError(f"Invalid stage: {stage!r}; 1 (shard state) or 2 (and gradients)")
        if not isinstance(bucket_numel, int) or bucket_numel < 1:
            raise ValueError(f"Invalid bucket_numel: {bucket_numel!r}")
        self.stage = stage
        self.reduce_gradients = reduce_gradients
        self._bucket_numel = bucket_numel
        self._comm = Comm.of(process_group, mesh)
        self._buffers: FlatBuffers | None = None
        self._consolidated: dict[str, Any] | None = None
        self._ready = False
        module = params if isinstance(params, nn.Module) else None
        named: ParamsT = module.named_parameters() if module is not None else params  # type: ignore[assignment]
        super().__init__(named, lr, betas, eps, weight_decay, **more)
        self._agree()
        self._broadcast(self._all_params() + (list(module.buffers()) if module else []))
        self._ready = True

    # --- construction ----------------------------------------------------------------------------

    def _check_param(self, name: str, p: Tensor) -> None:
        super()._check_param(name, p)
        if p.device.type == "meta":
            raise RuntimeError(f"{name} is on the meta device; materialize the model first")
        if is_dtensor(p):
            raise RuntimeError(
                f"{name} is a DTensor, sharded already; ShardedLamb shards plain tensors itself"
            )
        device = next(iter(self._all_params())).device
        if p.device != device:
            raise RuntimeError(
                f"all params must be on one device; {name} is on {p.device}, others on {device}"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; once built, a collective that moves all state to a new layout."""
        state = self._whole_state(keep=True) if self._buffers else None
        super().add_param_group(param_group)
        if not self._ready:
            return
        self._agree()
        self._broadcast(self.param_groups[-1]["params"])
        if self._buffers and state is not None:
            self._buffers.release_params()
            self._buffers = None
            self._load_tensors(dict(zip(self._all_params(), state.values())))

    def _agree(self) -> None:
        """All ranks have the same params and options, or all raise the same error."""
        items = [
            (spec_of(name, p), p.requires_grad)
            for name, p in zip(self._all_names(), self._all_params())
        ]
        described: list[Any] = [
            f"{s.name} {s.shape} {s.stride} {s.dtype} requires_grad={grad}" for s, grad in items
        ]
        for i, group in enumerate(self.param_groups):
            kept = {k: v for k, v in group.items() if k not in ("params", "param_names", "lr")}
            kept["lr"] = float(group["lr"])
            described.append(f"group {i} of {len(group['params'])} params with {kept}")
        mine = (self.stage, self.reduce_gradients, self._bucket_numel, self.impl)
        described.append(f"(stage, reduce_gradients, bucket_numel, impl) = {mine}")
        params = self._all_params()
        if params:
            self._comm.require_same("params or options", described, params[0].device)

    def _broadcast(self, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            for t in tensors:
                whole = t.detach().contiguous()
                self._comm.broadcast(whole)
                if whole.data_ptr() != t.data_ptr():
                    t.copy_(whole)

    def _build(self) -> FlatBuffers:
        """The buffers, at first use: frameworks move params after making the optimizer."""
        if self._buffers is None:
            every, names = self._all_params(), self._all_names()
            indices = [i for i, p in enumerate(every) if p.requires_grad]
            if not indices:
                raise RuntimeError("ShardedLamb has no trainable params")
            specs = [spec_of(names[i], every[i]) for i in indices]
            layout = Layout.plan(specs, self._comm.world_size, self._bucket_numel)
            params = [every[i] for i in indices]
            self._buffers = FlatBuffers(layout, params, indices, len(every), self._comm)
            self._attach_state()
        return self._buffers

    def _attach_state(self) -> None:
        """``state[p]`` shows the step and this rank's pieces, the same keys on every rank."""
        assert self._buffers is not None
        every = self._all_params()
        for j, i in enumerate(self._buffers.indices):
            self.state[every[i]].update(self._buffers.local_state(j))
            self.state[every[i]]["step"] = self._steps(every[i].device)[i]

    # --- training --------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around the backward of every micro-batch but the last: gradients accumulate locally."""
        yield

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update, the same on every rank; all ranks must call it.

        ``closure`` reevaluates the model and returns the loss, which is returned.
        """
        loss = self._reevaluated(closure)
        self._validate()
        buffers = self._build()
        buffers.adopt_params()
        self._consolidated = None
        # 1. gradients -> this rank's shard of their mean
        if self.reduce_gradients:
            buffers.reduce_gradients(free=self.stage == 2)
        else:
            buffers.take_gradients()
        # 2-6. the update of the shard; norms over all ranks
        active = {self._all_params()[0].device: buffers.present()}
        self._update(buffers.works, active, FlatNorms(self._comm), masked=True)
        # 7. params -> every rank
        buffers.gather_params()
        return loss

    def _validate(self) -> None:
        """Refuse the step before the first collective: after it, other ranks would wait forever."""
        for name, p in zip(self._all_names(), self._all_params()):
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"ShardedLamb cannot step {name}: sparse gradients are not supported"
                )
            if self._buffers and p not in self.state:
                raise RuntimeError(
                    f"ShardedLamb cannot step {name}: it was frozen when the buffers were made; "
                    "add it by add_param_group() when it becomes trainable"
                )

    # --- state -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A copy would share the process group and think it owns the params' memory.
        raise TypeError("a ShardedLamb cannot be copied or pickled; save its state dict instead")

    def full_optimizer_state_dict(self) -> dict[str, Any]:
        """A torch.optim state dict with whole tensors on the CPU, on every rank; a collective.

        It loads into a ShardedLamb of any world size, or into :class:`dist_lamb.Lamb`.
        """
        found = self._packed(keep=True)
        assert found is not None
        return found

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Make ``state_dict()`` whole on rank ``to`` until the next step; a collective."""
        self._consolidated = self._packed(keep=self._comm.rank == to)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, or an error: never silently this rank's part.

        With more than one rank call :meth:`consolidate_state_dict` on all ranks first.
        """
        if self._buffers is None:
            return dict(super().state_dict())
        if self._comm.world_size == 1:
            return self.full_optimizer_state_dict()
        if self._consolidated is None:
            raise RuntimeError(
                "the state is sharded: call consolidate_state_dict(to=rank) on all ranks before "
                "state_dict() on that rank, or full_optimizer_state_dict() on all ranks"
            )
        return self._consolidated

    def _packed(self, keep: bool) -> dict[str, Any] | None:
        whole = self._whole_state(keep)
        if not keep:
            return None
        packed = dict(super().state_dict())
        return {**packed, "state": {i: whole[i] for i in packed["state"]}}

    def _whole_state(self, keep: bool) -> dict[int, dict[str, Tensor]]:
        """{position of the param: its state in whole tensors on the CPU}; a collective."""
        whole: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(self._all_params()))}
        if self._buffers is None:
            return whole
        for name in TENSOR_STATES:
            for j, value in self._buffers.gather_state(name, keep).items():
                whole[self._buffers.indices[j]][name] = value
        for i in self._buffers.indices:
            whole[i]["step"] = self.state[self._all_params()[i]]["step"].to("cpu", copy=True)
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load whole tensors (:meth:`full_optimizer_state_dict`, or a plain optimizer's).

        Every rank must load the same.

        Raises ``ValueError`` naming a param whose saved state has another shape, or an option that
        is not valid; nothing is changed then.
        """
        super().load_state_dict(state_dict)
        self._consolidated = None

    def _load_tensors(self, loaded: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        if self._buffers is None and not any(loaded.values()):
            return  # an empty state: trainers pass one through before the first step
        buffers, every = self._build(), self._all_params()
        for j, i in enumerate(buffers.indices):
            buffers.load_state(j, loaded.get(every[i], {}))
        self._attach_state()
