"""ShardedLamb: LAMB with ZeRO-1/2 sharding over any process group, exact at every world size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from . import options
from ._torch_private import phase
from .base import Closure, LambBase, ParamsT
from .norms import FlatNorms
from .sharded_state import ShardedState, described_setup, gradient_problem
from .sharding.buffers import FlatBuffers, OwnedRange
from .sharding.comm import Comm, DeviceMesh, ProcessGroup, is_dtensor
from .sharding.comm_stream import CommStream
from .sharding.forward_order import ForwardOrder, Hook, OutputHook
from .sharding.overlap import GradientReducer, ParamGatherer, any_gradient
from .sharding.settings import Settings

#: Elements per bucket, unless one param alone is larger.
BUCKET_NUMEL = 2**25


class ShardedLamb(LambBase):
    """Data-parallel LAMB whose state, and at stage 2 gradients, are sharded over the ranks.

    Takes the place of DistributedDataParallel and of an optimizer::

        opt = ShardedLamb(model, lr=1e-3)         # or param_groups(model, ...)
        loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()

    Gradients are averaged over ranks inside backward, each bucket as soon as it is complete;
    ``step()`` updates this rank's shard and gathers the params: per bucket one reduce-scatter and
    one all-gather, and one all-reduce for all norms together (with ``max_grad_norm`` one more, of
    a scalar). The result does not depend on the number of ranks: the same bits come out for the
    same averaged gradients.

    Args:
        params: a module, :func:`dist_lamb.param_groups` of one, or what :class:`dist_lamb.Lamb`
            takes. Every rank must give the same params in the same order; their values are
            broadcast from rank 0, and with a module its buffers are too.
        lr, betas, eps, weight_decay, and keyword options: as for :class:`dist_lamb.Lamb`.
        stage: 1 keeps ``p.grad``; 2 frees each as soon as its bucket is reduced, so that
            ``p.grad`` is None after backward and two bucket buffers hold all that is on its way.
        process_group: the ranks to shard over; default all. Or ``mesh``, a DeviceMesh of one axis
            (shard) or two (replicate, shard): then gradients are reduce-scattered over the shard
            axis and all-reduced over the replicate axis, and all else stays on the shard axis.
        reduce_gradients: False if ``p.grad`` arrives averaged (under DistributedDataParallel, or
            a trainer that uses it).
        reduce_dtype: what gradients are sent, summed and kept in; default the params' dtype.
        accumulate: what backward does inside :meth:`no_sync`. ``"local"`` adds up ``p.grad`` and
            sends nothing; ``"sharded"`` (stage 2) reduces every micro-batch into float32 shards:
            more communication, no full gradients.
        overlap: reduce gradients inside backward; False: in ``step()``.
        overlap_gather: let the params travel into the next forward: each module waits for its own,
            and evaluation, ``state_dict()`` and ``load_state_dict()`` of the module for all. Any
            other read of params after ``step()`` needs :meth:`synchronize` first, which is why
            this is off by default. Needs a module; torch.compile of it breaks off at every wait.
        bucket_numel: elements communicated at a time.

    Params move into flat buffers at the first step, ``p.data`` becoming views; frozen params stay
    where they are. (``torch.save`` of some of a module's tensors writes the buffers they lie in:
    save clones of them.) A param without a gradient on any rank is left alone; without one on some
    ranks it counts as zero there; but between two steps every rank must run backward as often as
    the others. ``state[p]`` shows this rank's pieces, with the same keys on every rank: what is
    dropped there begins anew, tensors put there are copied. Params may be moved between groups of
    the same formats. See :meth:`full_optimizer_state_dict` for whole tensors.

    Between backward and ``step()``, gradients are clipped by ``max_grad_norm`` alone: at stage 2
    there is no ``p.grad`` to change then, at stage 1 a changed one is reduced once more. To skip
    a step call ``zero_grad()`` of this optimizer, not of the module.

    With loss scaling use torch's ShardedGradScaler (a plain one would change its scale on one rank
    only), and ``stage=1`` or ``overlap=False``: it looks for overflows in ``p.grad``.

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
        self._comm = Comm.of(process_group, mesh)
        self._kept: ShardedState | None = None
        self._reducer: GradientReducer | None = None
        self._gatherer: ParamGatherer | None = None
        self._order: ForwardOrder | None = None
        self._consolidated: dict[str, Any] | None = None
        self._ready = False
        super().__init__(
            params, lr, betas, eps, weight_decay, grad_averaging=grad_averaging,
            bias_correction=bias_correction, decoupled=decoupled, max_grad_norm=max_grad_norm,
            adapt=adapt, trust_clip=trust_clip, phi=phi, maximize=maximize, rule=rule,
            nonfinite=nonfinite, state_format=state_format, master=master,
            track_grad_norm=track_grad_norm, impl=impl, foreach=foreach, capturable=capturable,
            fused=fused, **of_rule,
        )  # fmt: skip
        self._agree()
        self._comm.broadcast_all(self._all_params() + (list(module.buffers()) if module else []))
        if overlap_gather and module is not None:
            self._order = ForwardOrder(module, self._wait_for_module, self.synchronize)
        if overlap and reduce_gradients and module is not None:
            module.register_forward_hook(OutputHook(self._note_output, 0))
        self._handles: list[Any] = []
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
        state = self._whole_state(keep=True) if self._kept else None
        super().add_param_group(param_group)
        if not self._ready:
            return
        self._agree()
        self._comm.broadcast_all(self.param_groups[-1]["params"])
        if self._kept and state is not None:
            self._kept.buffers.release_params()
            self._kept = self._reducer = self._gatherer = None
            self._load_tensors(dict(zip(self._all_params(), state.values())))

    def _agree(self) -> None:
        """All ranks have the same params and options, or all raise the same error."""
        own = [*self._settings.described(), f"impl = {self.impl!r}"]
        described = described_setup(self.named_groups(), self.param_groups) + own
        for p in self._all_params()[:1]:
            self._comm.require_same("params or options", described, p.device)

    def _current(self) -> ShardedState:
        """What is kept, in line with what groups, params and state are now."""
        kept, _ = self._build()
        self.synchronize()
        kept.settle(self.param_groups, self.state)
        return kept

    def _build(self) -> tuple[ShardedState, ParamGatherer]:
        """The buffers, at first use: frameworks move params after making the optimizer."""
        if self._kept is None or self._gatherer is None:
            every = chain.from_iterable(self.named_groups())
            named = {id(p): (name, p) for name, p in every if p.requires_grad}
            if not named:
                raise RuntimeError("ShardedLamb has no trainable params")
            # In the order of use, as far as a backward has shown it; the same on every rank.
            used = self._comm.from_first(list(self._used))
            last = [named.pop(key) for i in used if (key := id(self._numbered[i])) in named]
            ordered = [*named.values(), *reversed(last)]
            made_for = self.rule_of(), self.formats_of()
            buffers = FlatBuffers.of(ordered, *made_for, self._comm, self._settings)
            stream = CommStream(buffers.device)
            self._gatherer = ParamGatherer(buffers, self._comm, stream, self._order)
            if self._settings.reduce_gradients and self._comm.num_ranks > 1:
                keep = self.stage == 1
                self._reducer = GradientReducer(buffers, self._comm, stream, keep)
            for handle in self._handles:
                handle.remove()
            self._handles = []
            if self._reducer is not None and self._settings.overlap:
                self._reducer.watch()
            self._kept = ShardedState(
                buffers, self.param_groups, self.state, impl=self.impl, keep=self._captured
            )
        return self._kept, self._gatherer

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
        if self._reducer is not None and torch.is_grad_enabled():
            self._reducer.expect_backward(output)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around forward and backward of every micro-batch but the last: gradients accumulate.

        In ``p.grad`` or in the shards, as ``accumulate`` says.
        """
        reducer = self._reducer
        if reducer is None or reducer.paused or self.accumulate == "sharded":
            yield
            return
        reducer.paused = True
        try:
            yield
        finally:
            reducer.resume()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim; gradients that have been reduced already are dropped too."""
        super().zero_grad(set_to_none)
        if self._reducer is not None:
            self._reducer.discard(gone=set_to_none)

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
        self._begin()
        grads_left, kept = self._validate(), self._current()
        self._consolidated = None
        # 1. gradients -> this rank's shard of their mean
        with phase("1 reduce gradients"):
            present, grad_sq = self._shard_gradients(kept.buffers, grads_left)
            kept.update.set_active(kept.active(present, everywhere=self._reducer is None))
        # 2-6. the update of the shard; norms over the ranks that share it out
        self._update([kept.update], FlatNorms(self._comm), grad_sq)
        if self._reducer is not None:
            self._reducer.forget(gone=self.stage == 2)
        # 7. params -> every rank
        self._unfinished = True
        with phase("7 gather params"):
            self._build()[1].start()
        self._unfinished = False
        kept.renew()
        return loss

    def _shard_gradients(
        self, buffers: FlatBuffers, grads_left: bool
    ) -> tuple[set[int], Callable[[], Tensor] | None]:
        """The params that have a gradient on this rank (under ``reduce_gradients=False`` on all),
        and what knows the sum of squares of this rank's shards.

        ``grads_left``: backward has not taken all of them, or more were set by hand.
        """
        reducer = self._reducer
        if reducer is None:
            present = buffers.take_gradients()
        else:
            reducer.squares_wanted = self._options.squares_wanted
            reducer.finish(grads_left)
            present = reducer.present
        if self.stage == 2 and grads_left:
            for p in buffers.params:
                p.grad = None
        return present, None if reducer is None else reducer.grad_sq

    def _validate(self) -> bool:
        """Whether there are gradients in ``p.grad``, in order.

        Refuses the step before the first collective: after it, other ranks would wait forever.
        """
        # GradScaler adds up what it found in each p.grad: of none it makes a plain 0.
        if self._reducer is not None and isinstance(getattr(self, "found_inf", None), int):
            raise RuntimeError(
                "GradScaler looks for overflows in p.grad, which stage=2 frees inside backward: "
                "use ShardedLamb with stage=1 or overlap=False for loss scaling"
            )
        if not any_gradient(chain.from_iterable(map(itemgetter("params"), self.param_groups))):
            return False  # as always at stage 2, where backward has taken them
        frozen = self._kept.frozen if self._kept else ()
        problem = gradient_problem(chain.from_iterable(self.named_groups()), frozen)
        if problem:
            raise RuntimeError(f"ShardedLamb cannot step {problem}")
        return True

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
        kept, _ = self._build()
        self.synchronize()
        kept.arrange(self.param_groups, self.state, adopt=False)
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
