"""ShardedLamb: LAMB with ZeRO-1/2 sharding over any process group, exact at every world size."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import options
from ._torch_private import asked_by_sharded_scaler, outside_graphs, phase, running_node
from .base import Closure, ParamsT
from .norms import FlatNorms
from .sharded_base import ShardedBase
from .sharded_state import gradient_problem
from .sharding.arrivals import any_gradient
from .sharding.buffers import FlatBuffers
from .sharding.comm import DeviceMesh, Group
from .sharding.forward_order import ForwardOrder, Handles, Hook, OutputHook
from .sharding.members import Members
from .sharding.scaling import LossScaling
from .sharding.settings import Settings
from .sharding.wrappers import wrapper_problem

#: Elements per bucket, unless one param alone is larger.
BUCKET_NUMEL = 2**25

#: Those that may have hooks on params which a newer one takes over.
_LIVING: weakref.WeakSet[ShardedLamb] = weakref.WeakSet()


class ShardedLamb(ShardedBase):
    """Data-parallel LAMB whose state, and at stage 2 gradients, are sharded over the ranks.

    Takes the place of DistributedDataParallel and of an optimizer::

        opt = ShardedLamb(model, lr=1e-3)         # or param_groups(model, ...)
        loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()

    Gradients are averaged over ranks, at stage 2 inside backward, each bucket as soon as it is
    complete; ``step()`` updates this rank's shard and gathers the params: per bucket one
    reduce-scatter and one all-gather, and one all-reduce for all norms together (with
    ``max_grad_norm`` one more, of a scalar). The result does not depend on the number of ranks: the
    same bits come out for the same averaged gradients.

    Args:
        params: a module, :func:`dist_lamb.param_groups` of one, or what :class:`dist_lamb.Lamb`
            takes. Every rank must give the same params in the same order; their values are
            broadcast from rank 0, and with a module its buffers are too.
        lr, betas, eps, weight_decay, and keyword options: as for :class:`dist_lamb.Lamb`.
        stage: 1 reduces gradients in ``step()``: until then ``p.grad`` is this rank's own gradient,
            and may be edited. 2 frees each as soon as its bucket is reduced, so that ``p.grad`` is
            None after backward and two bucket buffers hold all that is on its way; not so before
            the first step, which makes these buffers and reduces what is in ``p.grad``.
        process_group: the ranks to shard over; default all, also where the group is made after the
            optimizer, before its first use. "self": this rank alone, beside others or not. Or
            ``mesh``, a DeviceMesh of one axis (shard) or two (replicate, shard): then gradients are
            reduce-scattered over the shard axis and all-reduced over the replicate axis, and all
            other communication is within the shard axis.
        reduce_gradients: False if ``p.grad`` arrives averaged (under DistributedDataParallel, or
            a trainer that uses it; params or that module may be given).
        reduce_dtype: what gradients are sent, summed and kept in; default the params' dtype.
        accumulate: what backward does inside :meth:`no_sync`. ``"local"`` adds up ``p.grad`` and
            sends nothing; ``"sharded"`` (stage 2) reduces every micro-batch into float32 shards:
            more communication, no full gradients.
        overlap: at stage 2, reduce gradients inside backward; False: in ``step()``.
        overlap_gather: let the params travel into the next forward: each module waits for its own,
            and evaluation, ``state_dict()`` and ``load_state_dict()`` of the module for all. Any
            other read of params after ``step()`` needs :meth:`synchronize` first, which is why
            this is off by default. Needs a module; torch.compile of it breaks off at every wait.
        bucket_numel: elements communicated at a time.

    Params move into flat buffers at the first step, ``p.data`` becoming views; frozen params stay
    where they are until all ranks unfreeze them. (``torch.save`` of some of a module's tensors
    writes the buffers they lie in: save clones of them.) A param without a gradient on any rank is
    left alone; without one on some ranks it counts as zero there; but where gradients are reduced
    inside backward, every rank must run it as often as the others between two steps. ``state[p]``
    shows this rank's pieces, with the same keys on every rank: what is dropped there begins anew,
    tensors put there are copied. Params may be moved between groups of the
    same formats. See
    :meth:`full_optimizer_state_dict` for whole tensors. A newer ShardedLamb of the same params
    takes them over.

    At stage 2 with ``overlap`` there is no ``p.grad`` to change between backward and ``step()``;
    clip by ``max_grad_norm``. To skip a step call ``zero_grad()`` of this optimizer on all ranks;
    that of the module leaves gradients that are reduced already, and the next step takes them.

    With loss scaling use torch's ShardedGradScaler, and ``stage=1`` or ``overlap=False``: it looks
    for overflows in ``p.grad``. After an overflow on some ranks alone a plain GradScaler has other
    scales on other ranks: that step is skipped by all, the next is an error.

    Raises:
        ValueError: ranks that differ in names, shapes, dtypes or options, naming the first
            difference; an option out of its range. RuntimeError: params on several devices or on
            the meta device; sparse gradients; DTensors; from ``step()`` and ``backward()``, on all
            ranks within the timeout of the process group, ranks that are out of step, or
            have changed their groups differently.
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
        process_group: Group | None = None,
        mesh: DeviceMesh | None = None,
        reduce_gradients: bool = True,
        reduce_dtype: torch.dtype | None = None,
        accumulate: str = "local",
        overlap: bool = True,
        overlap_gather: bool = False,
        bucket_numel: int = BUCKET_NUMEL,
        grad_averaging: bool = True,
        bias_correction: bool = True,
        decoupled: bool = True,
        max_grad_norm: float | None = None,
        adapt: options.Adapt | bool = "all",
        trust_clip: tuple[float, float] | None = None,
        phi: tuple[float, float] | None = None,
        maximize: bool = False,
        rule: str = "lamb",
        nonfinite: options.Nonfinite = "propagate",
        state_format: options.StateFormat = "float32",
        master: options.Master = "float32",
        track_grad_norm: bool = False,
        impl: options.Impl = "auto",
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        **of_rule: Any,
    ) -> None:
        self._settings = Settings(
            stage=stage, reduce_gradients=reduce_gradients, reduce_dtype=reduce_dtype,
            accumulate=accumulate, overlap=overlap, overlap_gather=overlap_gather,
            bucket_numel=bucket_numel,
        )  # fmt: skip
        module = params if isinstance(params, nn.Module) else getattr(params, "module", None)
        if overlap_gather and module is None:
            raise ValueError(
                "overlap_gather=True needs the module, whose forward it overlaps: give the module "
                "or param_groups(module) as params"
            )
        self.stage, self.accumulate = stage, accumulate
        self._members, self._scaling = Members(process_group, mesh), LossScaling()
        self._module = None if module is None else weakref.ref(module)
        self._steps = 0
        self._replaced = self._looked = False
        self._kept = self._reducer = self._gatherer = self._order = self._consolidated = None
        self._handles, self._output_handle = Handles(), Handles()
        super().__init__(
            params, lr, betas, eps, weight_decay, grad_averaging=grad_averaging,
            bias_correction=bias_correction, decoupled=decoupled, max_grad_norm=max_grad_norm,
            adapt=adapt, trust_clip=trust_clip, phi=phi, maximize=maximize, rule=rule,
            nonfinite=nonfinite, state_format=state_format, master=master,
            track_grad_norm=track_grad_norm, impl=impl, foreach=foreach, capturable=capturable,
            fused=fused, **of_rule,
        )  # fmt: skip
        older = self._older()
        for other in older:
            other.synchronize()
        if not self._members.open:
            self._join()
        for other in older:
            other._let_go()
        _LIVING.add(self)
        if overlap_gather and module is not None:
            self._order = ForwardOrder(module, self._wait_for_module, self.synchronize)
        if self._overlaps and module is not None:
            hook = OutputHook(self._note_output, 0)
            self._output_handle.append(module.register_forward_hook(hook))
        self._used = {}
        self._numbered = self._all_params()
        for i, p in enumerate(self._numbered):
            if p.requires_grad and p.is_leaf:
                hooked: Any = p
                handle = hooked.register_post_accumulate_grad_hook(Hook(self._note_use, i))
                self._handles.append(handle)

    # --- construction ----------------------------------------------------------------------------

    def _older(self) -> list[ShardedLamb]:
        """Optimizers of the same params, which this one takes over."""
        own = set(map(id, self._all_params()))
        return [o for o in _LIVING if not own.isdisjoint(map(id, o._all_params()))]

    def _let_go(self) -> None:
        self.synchronize()
        if self._reducer is not None:
            self._reducer.let_go()
        if self._order is not None:
            self._order.remove()
        self._handles.remove_all()
        self._output_handle.remove_all()
        self._reducer = self._order = None
        self._replaced = True
        _LIVING.discard(self)

    # --- training --------------------------------------------------------------------------------

    def _note_use(self, p: Tensor, i: int) -> None:
        """Before there are buffers: the order of first arrival tells the order of use."""
        self._used.setdefault(i)

    def _note_output(self, output: Any) -> None:
        """The module has run: a backward will come through what it returned."""
        reducer = self._reducer
        if reducer is not None and reducer.arrivals is not None and torch.is_grad_enabled():
            if running_node() is None:  # else a checkpoint has run it
                reducer.settle()
            reducer.arrivals.expect(output)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around forward and backward of every micro-batch but the last: gradients accumulate.

        In ``p.grad`` or in the shards, as ``accumulate`` says.
        """
        arrivals = None if self._reducer is None else self._reducer.arrivals
        if arrivals is None or arrivals.paused or self.accumulate == "sharded":
            yield
            return
        arrivals.paused = True
        try:
            yield
        finally:
            arrivals.paused = False
            arrivals.look()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; gradients that have been reduced already are dropped too."""
        if self._reducer is not None:
            self._reducer.settle()
            self._reducer.discard()
        super().zero_grad(set_to_none)

    def _wait_for_module(self, index: int) -> None:
        if self._gatherer is not None:
            self._gatherer.wait(index)

    @outside_graphs
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update, the same on every rank; all ranks must call it.

        ``closure`` reevaluates the model and returns the loss, which is returned.
        """
        loss = self._reevaluated(closure)
        left = self._in_step()
        kept = self._current()
        if kept.unfrozen():
            kept = self._lay_out_anew(kept)
        self._consolidated = None
        # 1. gradients -> this rank's shard of their mean
        with phase("1 reduce gradients"):
            present, grad_sq = self._shard_gradients(kept.buffers, left)
            kept.update.set_active(kept.active(present, everywhere=self._reducer is None))
        # 2-6. the update of the shard; norms over the ranks that share it out
        _, flag = self._loss_scaling(kept.buffers.device)
        if flag is not None:
            self.found_inf = self._scaling.share(flag, self._comm)
        self._update([kept.update], FlatNorms(self._comm), kept.members, grad_sq)
        if self._reducer is not None:
            self._reducer.stepped()
        # 7. params -> every rank
        self._unfinished = True
        with phase("7 gather params"):
            self._build()[1].start()
        self._unfinished = False
        kept.renew()
        return loss

    def _in_step(self) -> bool:
        """All ranks make this step, or all raise before the first collective: after it, others
        would wait forever. Whether there are gradients on any rank that have not been reduced."""
        lockstep, reducer, what = self._join(), self._reducer, f"step {self._steps}"
        if reducer is not None:
            reducer.settle()
        try:
            self._begin()
            self._validate()
            if self._kept is not None:
                self._current()
        except Exception as problem:
            lockstep.refuse(what, problem)
            raise
        left = any_gradient(self._all_params()) if reducer is None else reducer.left()
        if self._kept is not None and (unfrozen := self._kept.unfrozen()):
            what += f" with newly trainable params {unfrozen}"
            left = True
        if reducer is not None:
            what += f" {reducer.rounds.described()}"
        changed, groups = self._changed_groups()
        left = lockstep.meet(what + changed, left)
        self._agreed = groups
        self._steps += 1
        return left

    def _shard_gradients(
        self, buffers: FlatBuffers, left: bool
    ) -> tuple[set[int], Callable[[], Tensor] | None]:
        """The params that have a gradient on this rank (under ``reduce_gradients=False`` on all),
        and what knows the sum of squares of this rank's shards."""
        reducer = self._reducer
        if reducer is None:
            present = buffers.take_gradients()
        else:
            reducer.squares_wanted = self._options.squares_wanted
            reducer.finish(left)
            present = reducer.present
        if self.stage == 2 and (left or buffers.empty):
            for p in buffers.params:
                p.grad = None
        return present, None if reducer is None else reducer.grad_sq

    def _validate(self) -> None:
        """Refuse a step that would be wrong."""
        reducer, flag = self._reducer, getattr(self, "found_inf", None)
        problem, params = None, self._all_params()
        if self._replaced:
            problem = (
                "any more: a newer ShardedLamb was made of the same params and has taken them "
                "over; call step() of that one"
            )
        elif flag is not None:
            reduced = reducer is not None and reducer.rounds.count > 0
            problem = self._scaling.problem(flag, reduced, self._comm.num_ranks)
        if problem is None and not self._looked and self._reduces:
            # At stage 2 gradients are gone by now, in the shards.
            arrived = any_gradient(params) or (reducer is not None and bool(reducer.present))
            problem = wrapper_problem(params, arrived)
        if problem is None and any_gradient(params):
            problem = gradient_problem(self._all_named())
        if not self._looked:
            for i in range(len(self.param_groups)):
                self.refuse_zeros(i)
        if problem is not None:
            for name in ("found_inf", "grad_scale"):  # which a scaler leaves behind now
                self.__dict__.pop(name, None)
            raise RuntimeError(f"ShardedLamb cannot step {problem}")
        self._looked = True

    # --- loss scaling ----------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A ShardedGradScaler agrees on overflows with other ranks only where it unscales itself;
        a plain GradScaler must not, or one rank alone would leave out step()."""
        return self._overlaps or not asked_by_sharded_scaler()

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, _: bool) -> None:
        pass
