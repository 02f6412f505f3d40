"""ShardedLamb: LAMB with ZeRO-1/2 sharding over any process group, exact at every world size."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import options
from ._torch_private import asked_by_sharded_scaler, phase, running_node
from .base import Closure, LambBase, ParamsT
from .norms import FlatNorms
from .sharded_state import ShardedState, described_setup, gradient_problem
from .sharding.arrivals import any_gradient
from .sharding.buffers import FlatBuffers, OwnedRange
from .sharding.comm import Comm, DeviceMesh, Group, ProcessGroup, is_dtensor
from .sharding.comm_stream import CommStream, Later
from .sharding.forward_order import ForwardOrder, Handles, Hook, OutputHook
from .sharding.lockstep import Lockstep
from .sharding.overlap import GradientReducer, ParamGatherer
from .sharding.settings import Settings
from .sharding.wrappers import wrapper_problem

#: Elements per bucket, unless one param alone is larger.
BUCKET_NUMEL = 2**25

#: Those that may have hooks on params which a newer one takes over.
_LIVING: weakref.WeakSet[ShardedLamb] = weakref.WeakSet()


class ShardedLamb(LambBase):
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
        stage: 1 reduces gradients in ``step()`` and keeps ``p.grad``, this rank's own: what it
            holds then counts. 2 frees each as soon as its bucket is reduced, so that ``p.grad`` is
            None after backward and two bucket buffers hold all that is on its way.
        process_group: the ranks to shard over; default all, also where the group is made after the
            optimizer, before its first use. "self": this rank alone, beside others or not. Or
            ``mesh``, a DeviceMesh of one axis (shard) or two (replicate, shard): then gradients are
            reduce-scattered over the shard axis and all-reduced over the replicate axis, and all
            else stays on the shard axis.
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
    tensors put there are copied. Params may be moved between groups in place. See
    :meth:`full_optimizer_state_dict` for whole tensors. A newer ShardedLamb of the same params takes
    them over.

    At stage 2 with ``overlap`` there is no ``p.grad`` to change between backward and ``step()``;
    clip by ``max_grad_norm``. To skip a step call ``zero_grad()`` of this optimizer, not of the
    module, on all ranks.

    With loss scaling use torch's ShardedGradScaler, and ``stage=1`` or ``overlap=False``: it looks
    for overflows in ``p.grad``. After an overflow on some ranks alone a plain GradScaler has other
    scales on other ranks: that step is skipped by all, the next is an error.

    Raises:
        ValueError: ranks that differ in names, shapes, dtypes or options, naming the first
            difference; an option out of its range. RuntimeError: params on several devices or on
            the meta device; sparse gradients; DTensors; from ``step()`` and ``backward()``, on all
            ranks within the timeout of the process group, ranks that are out of step.
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
        nonfinite: options.Nonfinite = "propagate",
        track_grad_norm: bool = False,
        impl: options.Impl = "auto",
        foreach: bool | None = None,
        capturable: bool = False,
        fused: bool | None = None,
        **unknown: Any,
    ) -> None:
        self._settings = Settings(
            stage=stage, reduce_gradients=reduce_gradients, reduce_dtype=reduce_dtype,
            accumulate=accumulate, overlap=overlap, overlap_gather=overlap_gather,
            bucket_numel=bucket_numel,
        )  # fmt: skip
        module = params if isinstance(params, nn.Module) else getattr(params, "module", None)
        if overlap_gather and module is None:
            why = (
                "overlap_gather=True needs the module, whose forward it overlaps: give the module "
            )
            raise ValueError(why + "or param_groups(module) as params")
        self.stage, self.accumulate = stage, accumulate
        self._comm = Comm.of(process_group, mesh)
        #: None until it is known which ranks there are
        self._lockstep: Lockstep | None = None
        self._module = None if module is None else weakref.ref(module)
        self._steps = 0
        self._replaced = self._looked = False
        #: how many ranks the last step's loss scaling found an overflow on
        self._overflows: Later | None = None
        self._kept: ShardedState | None = None
        self._reducer: GradientReducer | None = None
        self._gatherer: ParamGatherer | None = None
        self._order: ForwardOrder | None = None
        self._consolidated: dict[str, Any] | None = None
        self._ready = False
        super().__init__(
            params, lr, betas, eps, weight_decay, grad_averaging=grad_averaging,
            bias_correction=bias_correction, decoupled=decoupled, max_grad_norm=max_grad_norm,
            adapt=adapt, trust_clip=trust_clip, phi=phi, maximize=maximize, nonfinite=nonfinite,
            track_grad_norm=track_grad_norm, impl=impl, foreach=foreach, capturable=capturable,
            fused=fused, **unknown,
        )  # fmt: skip
        if process_group is not None or Comm.known():
            self._join(self._comm)
        self._take_over()
        if overlap_gather and module is not None:
            self._order = ForwardOrder(module, self._wait_for_module, self.synchronize)
        self._handles, self._output_handle = Handles(), Handles()
        if self._overlaps and module is not None:
            hook = OutputHook(self._note_output, 0)
            self._output_handle.append(module.register_forward_hook(hook))
        #: in the order of first arrival, for as long as there are no buffers
        self._used: dict[int, None] = {}
        self._numbered = self._all_params()
        for i, p in enumerate(self._numbered):
            if p.requires_grad and p.is_leaf:
                hooked: Any = p
                handle = hooked.register_post_accumulate_grad_hook(Hook(self._note_use, i))
                self._handles.append(handle)
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
        if self._ready:
            self.synchronize()
        super().add_param_group(param_group)
        if not self._ready or self._lockstep is None:
            return
        self._lockstep.meet("add_param_group()")
        self._agree()
        self._comm.broadcast_all(self.param_groups[-1]["params"])
        if self._kept:
            self._lay_out_anew()

    def _agree(self) -> None:
        """All ranks have the same params and options, or all raise the same error."""
        own = [*self._settings.described(), f"impl = {self.impl!r}"]
        described = described_setup(self.named_groups(), self.param_groups) + own
        for p in self._all_params()[:1]:
            self._comm.require_same("params or options", described, p.device)

    def _join(self, comm: Comm | None = None) -> Lockstep:
        """Find the other ranks, at first use if there was no process group before that."""
        if self._lockstep is not None:
            return self._lockstep
        late, self._comm = comm is None, comm or Comm.of_all()
        self._agree()
        module, params = self._module and self._module(), self._all_params()
        if late:
            self._require_same_start()
        self._comm.broadcast_all(params + (list(module.buffers()) if module else []))
        self._lockstep = Lockstep(self._comm)
        return self._lockstep

    def _require_same_start(self) -> None:
        """Backward before there was a process group: of the same params, or all ranks raise."""
        named = list(chain.from_iterable(self.named_groups()))
        if not any(self._comm.everyone(any_gradient(p for _, p in named))):
            return
        first = [p.detach().clone() for _, p in named]
        self._comm.broadcast_all(first)
        other = [name for (name, p), q in zip(named, first) if not torch.equal(p, q)]
        for rank, name in enumerate(self._comm.everyone(other[:1])):
            if name:
                raise RuntimeError(
                    f"the first backward was run on other values of {name[0]} on rank {rank} than "
                    "on rank 0: call torch.distributed.init_process_group() before making the "
                    "optimizer, which then broadcasts them, or start all ranks alike"
                )

    def _take_over(self) -> None:
        """Older optimizers of the same params let go of them."""
        own = set(map(id, self._all_params()))
        for other in list(_LIVING):
            if not own.isdisjoint(map(id, other._all_params())):
                other._let_go()
        _LIVING.add(self)

    def _let_go(self) -> None:
        self.synchronize()
        if self._reducer is not None:
            self._reducer.discard()
        if self._order is not None:
            self._order.remove()
        self._handles.remove_all()
        self._output_handle.remove_all()
        self._reducer = self._order = None
        self._replaced = True
        _LIVING.discard(self)

    @property
    def _overlaps(self) -> bool:
        return self.stage == 2 and self._settings.overlap and self._settings.reduce_gradients

    def _current(self) -> ShardedState:
        """What is kept, in line with what groups, params and state are now."""
        kept, _ = self._build()
        self.synchronize()
        if not self._replaced:
            kept.settle(self.param_groups, self.state)
        return kept

    def _build(self, also: frozenset[int] = frozenset()) -> tuple[ShardedState, ParamGatherer]:
        """The buffers, at first use: frameworks move params after making the optimizer.

        ``also``: ids of params that need not be trainable now.
        """
        if self._kept is None or self._gatherer is None:
            lockstep = self._join()
            named = {
                id(p): (name, p)
                for name, p in chain.from_iterable(self.named_groups())
                if p.requires_grad or id(p) in also
            }
            if not named:
                raise RuntimeError("ShardedLamb has no trainable params")
            # In the order of use, as far as a backward has shown it; the same on every rank.
            used = self._comm.from_first(list(self._used))
            last = [named.pop(key) for i in used if (key := id(self._numbered[i])) in named]
            buffers = FlatBuffers.of([*named.values(), *reversed(last)], self._comm, self._settings)
            stream = CommStream(buffers.device)
            self._gatherer = ParamGatherer(buffers, self._comm, stream, self._order)
            if self._settings.reduce_gradients and self._comm.num_ranks > 1:
                keep = self.stage == 1
                self._reducer = GradientReducer(
                    buffers, self._comm, stream, lockstep, self._overlaps, keep
                )
            self._handles.remove_all()
            self._kept = ShardedState(
                buffers, self.param_groups, self.state, impl=self.impl, keep=self._captured
            )
        return self._kept, self._gatherer

    def _lay_out_anew(self) -> ShardedState:
        """Other buffers, of all that is trainable now and of what was, with the same state and the
        same gradients; a collective."""
        kept, reducer = self._current(), self._reducer
        state, reduced, rounds = kept.whole(keep=True), {}, 0
        if reducer is not None:
            reduced, rounds = reducer.reduced(), reducer.rounds.count
        by_param = {kept.buffers.params[j]: state[i] for j, i in enumerate(kept.indices)}
        kept.buffers.release_params()
        self._kept = self._reducer = self._gatherer = None
        kept, _ = self._build(also=frozenset(map(id, by_param)))
        kept.load(by_param)
        if self._reducer is not None:
            self._reducer.resume(reduced, rounds)
        return kept

    @property
    def process_group(self) -> ProcessGroup | None:
        """The shard axis."""
        return self._comm.group

    def refresh_masters(self) -> None:
        """As :meth:`dist_lamb.Lamb.refresh_masters`; call it on all ranks."""
        if self._kept is not None:
            self.synchronize()
            self._kept.refresh_masters()

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

    def synchronize(self) -> None:
        """Wait for the params of the last step; on GPUs the current stream does, not the host."""
        if self._gatherer is not None:
            self._gatherer.synchronize()

    def _wait_for_module(self, index: int) -> None:
        if self._gatherer is not None:
            self._gatherer.wait(index)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One update, the same on every rank; all ranks must call it.

        ``closure`` reevaluates the model and returns the loss, which is returned.
        """
        loss = self._reevaluated(closure)
        left = self._in_step()
        kept = self._current()
        if kept.unfrozen():
            kept = self._lay_out_anew()
        self._consolidated = None
        # 1. gradients -> this rank's shard of their mean
        with phase("1 reduce gradients"):
            present, grad_sq = self._shard_gradients(kept.buffers, left)
            kept.update.set_active(kept.active(present, everywhere=self._reducer is None))
        # 2-6. the update of the shard; norms over the ranks that share it out
        self._share_overflow(kept.buffers.device)
        self._update([kept.update], FlatNorms(self._comm), grad_sq)
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
            what += f", after {reducer.rounds.described()}"
        left = lockstep.meet(what, left)
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
        if self._replaced:
            raise RuntimeError(
                "a newer ShardedLamb was made of the same params and has taken them over: call "
                "step() of that one"
            )
        ranks, params = self._comm.num_ranks, self._all_params()
        if not self._looked and ranks > 1 and self._settings.reduce_gradients:
            problem = wrapper_problem(params)
            if problem:
                raise RuntimeError(f"ShardedLamb cannot step: {problem}")
        self._looked = True
        # Of no p.grad GradScaler makes a plain 0, ShardedGradScaler a tensor.
        reducer, flag = self._reducer, getattr(self, "found_inf", None)
        if reducer is not None and flag is not None and (type(flag) is int or reducer.rounds.count):
            for name in ("found_inf", "grad_scale"):  # which the scaler leaves behind now
                with suppress(AttributeError):
                    delattr(self, name)
            raise RuntimeError(
                "loss scaling looks for overflows in p.grad, which stage=2 frees inside backward: "
                "use ShardedLamb with stage=1 or overlap=False for loss scaling"
            )
        if flag is not None and self._overflows is not None:
            count = self._overflows.item()
            if 0 < count < ranks:
                raise RuntimeError(
                    f"gradients of the last step overflowed on {count:.0f} of {ranks} ranks, and "
                    "GradScaler has changed its scale on these alone: use torch.distributed.fsdp."
                    "sharded_grad_scaler.ShardedGradScaler, whose scale is the same on all"
                )
        problem = gradient_problem(chain(*self.named_groups())) if any_gradient(params) else None
        if problem:
            raise RuntimeError(f"ShardedLamb cannot step {problem}")

    # --- loss scaling ----------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """A ShardedGradScaler agrees on overflows with other ranks only where it unscales itself;
        a plain GradScaler must not, or one rank alone would leave out step()."""
        return self._overlaps or not asked_by_sharded_scaler()

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, _: bool) -> None:
        pass

    def _share_overflow(self, device: torch.device) -> None:
        """A plain GradScaler's flag of this rank -> how many ranks have it."""
        _, flag = self._loss_scaling(device)
        if flag is not None and self._comm.num_ranks > 1:
            self.found_inf = self._comm.sum_over_all((flag > 0).double().view(1))
            self._overflows = Later(self.found_inf)

    # --- state -----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A copy would share the process group and think it owns the params' memory.
        raise TypeError("a ShardedLamb cannot be copied or pickled; save its state dict instead")

    def full_optimizer_state_dict(self) -> dict[str, Any]:
        """A torch.optim state dict with whole tensors on the CPU, on every rank; a collective.

        It loads at any world size, and into :class:`dist_lamb.Lamb`.
        """
        return self._packed(keep=True) or {}

    def full_state_dict(self, to: int = 0) -> dict[str, Any]:
        """:meth:`full_optimizer_state_dict` on rank ``to`` alone, ``{}`` on others; a collective.

        Buckets are gathered one after the other, so no device ever holds more than one whole, and
        only rank ``to`` needs host memory for all.
        """
        return self._packed(keep=self._comm.rank == to) or {}

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Make ``state_dict()`` whole on rank ``to`` until the next step; a collective."""
        self._consolidated = self._packed(keep=self._comm.rank == to)

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors, or an error: never silently this rank's part.

        With several ranks call :meth:`consolidate_state_dict` on all of them first.
        """
        if self._kept is None:
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
        if self._kept is not None:
            self._join().meet("a whole state dict")
        whole = self._whole_state(keep)
        if not keep:
            return None
        packed = dict(super().state_dict())
        return {**packed, "state": {i: whole.get(i, v) for i, v in packed["state"].items()}}

    def _whole_state(self, keep: bool) -> dict[int, dict[str, Tensor]]:
        """{position of the param: its state in whole tensors on the CPU}; a collective."""
        if self._kept is None:
            return {i: {} for i in range(len(self._all_params()))}
        return self._current().whole(keep)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load whole tensors (:meth:`full_optimizer_state_dict`, say) on all ranks.

        Raises ``ValueError`` naming a param whose saved state has another shape, or an option that
        is not valid; nothing is changed then.
        """
        super().load_state_dict(state_dict)
        self._consolidated = None

    def _load_tensors(self, loaded: Mapping[Tensor, Mapping[str, Tensor]]) -> None:
        if self._kept is None and not any(loaded.values()):
            return  # an empty state: trainers pass one through before the first step
        kept, _ = self._build(also=frozenset(id(p) for p, tensors in loaded.items() if tensors))
        self.synchronize()
        kept.arrange(self.param_groups, self.state, adopt=False)
        if kept.unfrozen():
            kept = self._lay_out_anew()
        kept.load(loaded)

    # --- checkpoints -----------------------------------------------------------------------------

    def pieces(self, build: bool = False) -> dict[Tensor, OwnedRange]:
        """What this rank holds of each trainable param, memory to be read or to be overwritten.

        Empty before the first step, unless ``build``. After overwriting, :meth:`take_pieces`.
        """
        return self._current().owned() if self._kept or build else {}

    @torch.no_grad()
    def take_pieces(self, steps: Mapping[Tensor, Tensor]) -> None:
        """Go on from overwritten pieces, with these step counts (else 0); a collective."""
        kept, gatherer = self._build()
        for p in self.state:
            self.state[p]["step"] = steps.get(p, torch.zeros(()))
        kept.arrange(self.param_groups, self.state, adopt=False)
        gatherer.gather()
        self._consolidated = None
        self.state_loaded()
