"""Communication that hides behind computation.

Gradients are reduced while backward goes on: a bucket travels as soon as the gradients of all its
params have arrived. Params are gathered while the next forward goes on: a module waits for its own.
Neither changes a bit of the result, whatever runs late: every rank issues the same collectives in
the same order, and what needs a result waits for it.

On GPUs both run on a stream of their own; on CPU gloo's threads do the work.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import attrgetter, is_not
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .. import _torch_private
from .buffers import FlatBuffers
from .comm import Comm
from .comm_stream import CommStream, event
from .forward_order import ForwardOrder

#: Whole-bucket buffers that gradients are sent from: one is filled while the other travels.
STAGING_SLOTS = 2


#: A gradient, and its version then.
_Seen: TypeAlias = tuple[weakref.ref[Tensor], int]


def any_gradient(params: Iterable[Any]) -> bool:
    """Whether there is one in ``p.grad``; a loop in C: hundreds are looked at in a step."""
    return any(map(is_not, map(attrgetter("grad"), params), repeat(None)))


def _mark(grad: Any) -> _Seen | None:
    """What tells a gradient from any other, and from itself once it has changed."""
    return None if grad is None else (weakref.ref(grad), _torch_private.version(grad))


@dataclass
class _Reduction:
    """A bucket on its way to the shards."""

    bucket: int
    out: Tensor  # receives the sum over the shard axis
    work: Any


class GradientReducer:
    """Gradients -> this rank's shards of their mean over ranks: one reduce-scatter per bucket.

    A *round* reduces every bucket once, in the order of the buckets on every rank, whatever order
    gradients arrive in and whichever of them are missing: ranks that lack different gradients
    must not pair up different buckets. It begins inside a backward and is closed at that
    backward's end, or it is all done at :meth:`finish`. Where gradients are freed (stage 2), rounds
    since the last step add up in the shards; where they are kept (``keep``, stage 1), they add up
    in ``p.grad`` and the last round counts.
    """

    def __init__(self, buffers: FlatBuffers, comm: Comm, stream: CommStream, keep: bool) -> None:
        self._buffers = buffers
        self._comm = comm
        self._stream = stream
        self._keep = keep
        self._members = [b.params for b in buffers.layout.buckets]
        self._bucketed = [j for members in self._members for j in members]
        ends = list(accumulate(map(len, self._members), initial=0))
        #: where a bucket's params are in _bucketed
        self._positions = [range(*ends[b : b + 2]) for b in range(len(self._members))]
        self._params: list[Any] = [buffers.params[j] for j in self._bucketed]
        #: While True, gradients stay where they arrive.
        self.paused = False
        self._travelling: list[_Reduction | None] = [None] * STAGING_SLOTS
        self._sent = [event() for _ in range(STAGING_SLOTS if stream.stream else 0)]
        self._squares = torch.zeros(len(self._members), dtype=torch.float64, device=buffers.device)
        self._handles: list[Any] = []
        #: streams on which gradients arrive
        self._streams: set[int] = set()
        #: params in the order of arrival, while every gradient is watched
        self._arrivals: list[int] | None = None
        #: buckets that may leave before backward ends: not those with gradients that come in two
        #: parts, as those of a param of two reentrant checkpoints do
        self._early = [True] * len(self._members)
        #: backwards that will tell when they end
        self._tasks: set[int] = set()
        #: whether backwards tell by the module's output that they begin
        self._told = False
        #: whether clipping will ask for :meth:`grad_sq`, which then is ready when backward ends
        self.squares_wanted = False
        self.forget()

    def forget(self, gone: bool = False) -> None:
        """As after a step, which has used the gradients: the shards hold nothing.

        ``gone``: there is none in any ``p.grad`` either.
        """
        self._tasks.clear()
        self._rounds = 0
        self._held = [False] * len(self._members)
        self._squared = [False] * len(self._members)
        #: params that had a gradient on this rank
        self.present: set[int] = set()
        self._next = 0
        #: by position in _bucketed: gradients that were there before this round, and that have
        #: been reduced
        nothing: list[_Seen | None] = [None] * len(self._bucketed)
        self._old = nothing if gone else self._seen()
        self._reduced = list(nothing)

    def _seen(self) -> list[_Seen | None]:
        """The gradients that there are."""
        if not any_gradient(self._params):
            return [None] * len(self._params)
        return [_mark(p.grad) for p in self._params]

    def _is_other(self, i: int, seen: list[_Seen | None]) -> bool:
        """Whether there is a gradient that is not the one that was seen."""
        grad, old = self._params[i].grad, seen[i]
        if grad is None or old is None:
            return grad is not None
        same = old[0]() is grad
        return not same or old[1] != _torch_private.version(grad)

    # --- inside backward -------------------------------------------------------------------------

    def watch(self) -> None:
        """Reduce from now on inside backward. The first one shows which gradients to watch."""
        self._hook(self._bucketed)
        self._arrivals = []

    def _hook(self, reported: Iterable[int], noticed: Iterable[int] = ()) -> None:
        """Have the gradients of these params reported, each of which costs the host some us; of
        others, only that a backward has come to them."""
        for handle in self._handles:
            handle.remove()
        hooks = [(j, self._unless_paused("_arrived", j)) for j in reported]
        hooks += [(j, self._unless_paused("_began")) for j in noticed]
        of: list[Any] = self._buffers.params
        self._handles = [of[j].register_post_accumulate_grad_hook(hook) for j, hook in hooks]

    def _unless_paused(self, method: str, *args: Any) -> Callable[[Tensor], None]:
        """A hook that calls a method, and does not keep the buffers of an optimizer alive."""
        reducer = weakref.ref(self)

        def hook(_: Tensor) -> None:
            alive = reducer()
            if alive is not None and not alive.paused:
                getattr(alive, method)(*args)

        return hook

    def expect_backward(self, output: Any) -> None:
        """Have the round closed at the end of every backward through what a module returned.

        Whichever params it reaches on this rank: ranks may take different branches of a model.
        """
        hook = self._unless_paused("_told_of_backward")
        for t in _torch_private.leaves(output):
            if isinstance(t, Tensor) and t.grad_fn is not None:
                t.register_hook(hook)  # type: ignore[no-untyped-call]

    def _told_of_backward(self) -> None:
        self._told = True
        self._began()

    def _began(self) -> None:
        """Have the round closed when the backward that is running ends."""
        task = _torch_private.backward_number()
        if task not in self._tasks:
            self._tasks.add(task)
            _torch_private.at_end_of_backward(self._backward_ended)

    def _arrived(self, j: int) -> None:
        """The gradient of param j is complete, as far as this backward goes."""
        self._began()
        if self._stream.stream is not None:
            stream = self._stream.raw_current()
            if self._arrivals is None and stream not in self._streams:
                self.watch()  # there may be others
            self._streams.add(stream)
        if self._arrivals is not None:
            self._arrivals.append(j)
            return  # nothing leaves before it is known what arrives last
        self._launch_complete()

    def _launch_complete(self) -> None:
        while self._next < len(self._members) and self._may_leave(self._next):
            self._launch(self._next)
            self._next += 1

    def _may_leave(self, bucket: int) -> bool:
        """Whether all gradients of a bucket have come in this round, and for good."""
        return self._early[bucket] and all(
            self._is_other(i, self._old) for i in self._positions[bucket]
        )

    def _backward_ended(self) -> None:
        # A backward within a node of another one, as reentrant checkpoints start it: it goes on.
        if _torch_private.inside_backward_node():
            return
        self._tasks.clear()
        self._close_round()
        if self._arrivals:
            order = {j: n for n, j in enumerate(self._arrivals)}
            last = {max(m, key=lambda j: order.get(j, -1)) for m in self._members}
            times = Counter(self._arrivals)
            self._early = [all(times[j] < 2 for j in members) for members in self._members]
            # At the end of every backward a round is closed, on every rank, or ranks would differ
            # in how many there were; and any param may be the only one it reaches.
            self._hook(last, () if self._told else [j for j in self._bucketed if j not in last])
            self._arrivals = None

    def resume(self) -> None:
        """After a pause: the gradients that have come meanwhile are not of the next backward."""
        self.paused = False
        self._old = self._seen()

    def _close_round(self) -> None:
        for bucket in range(self._next, len(self._members)):
            self._launch(bucket)
        self._next = 0
        for bucket in range(len(self._members)):
            if any(self._is_other(i, self._reduced) for i in self._positions[bucket]):
                self._launch(bucket)  # the other part of a gradient
                self._early[bucket] = False
        self._old = list(self._reduced)
        self._rounds += 1

    @torch.no_grad()
    def _launch(self, bucket: int) -> None:
        """Send a bucket's gradients on their way, in the staging buffer that is its turn's."""
        slot, stream = bucket % STAGING_SLOTS, self._stream
        self._wait_reduce(slot)
        elsewhere: set[int] = set()
        if stream.stream is not None:
            elsewhere = self._streams - {stream.raw_current()}
            for other in elsewhere:
                stream.wait_for(other)
            stream.current().wait_event(self._sent[slot])
        staged, present = self._buffers.stage(bucket, slot)
        if self._keep:
            # What was there before is there no more, or again.
            self.present.difference_update(self._members[bucket])
            for i in self._positions[bucket]:
                self._reduced[i] = _mark(self._params[i].grad)
        else:
            for i in self._positions[bucket]:
                grad = self._params[i].grad
                if grad is not None and elsewhere:
                    # Its memory would be given out again there while it is copied here.
                    grad.record_stream(stream.current())
                self._params[i].grad = None
        self.present.update(present)
        with stream.entered():
            shard = self._buffers.shards[bucket]
            direct = staged.dtype == shard.grads.dtype and not self._adds(bucket)
            out = shard.grads if direct else torch.empty_like(shard.grads, dtype=staged.dtype)
            work = self._comm.reduce_scatter(out, staged, async_op=stream.stream is None)
            self._travelling[slot] = _Reduction(bucket, out, work)
            if stream.stream is not None:
                self._wait_reduce(slot)
                self._sent[slot].record(stream.stream)

    def _adds(self, bucket: int) -> bool:
        return self._held[bucket] and not self._keep

    def _wait_reduce(self, slot: int) -> None:
        """Wait for what travels from a staging buffer, and add it to the shard."""
        reduction = self._travelling[slot]
        if reduction is None:
            return
        self._travelling[slot] = None
        if reduction.work is not None:
            reduction.work.wait()
        bucket = reduction.bucket
        grads = self._buffers.shards[bucket].grads
        mean = self._comm.all_reduce_across(reduction.out).to(grads.dtype)
        if not self._comm.averages(grads.device):
            # Divided, not multiplied by 1/W: at 3 ranks a mean that is exact must come out exact.
            mean.div_(self._comm.num_ranks)
        if mean is not grads:
            if self._adds(bucket):
                grads.add_(mean)
            else:
                grads.copy_(mean)
        self._held[bucket] = True
        self._squared[bucket] = False
        if self._stream.stream is not None and self.squares_wanted:
            self._square(bucket)

    # --- at the step -----------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self, grads_left: bool) -> None:
        """Every gradient that this rank has is in the shards, and the current stream may read.

        ``grads_left``: whether there are any in ``p.grad``.
        """
        touched = self._touched() if self._keep else grads_left
        if touched or not self._rounds or self._next:
            self._close_round()
        self._wait_reduces()

    def _wait_reduces(self) -> None:
        """Wait for everything that travels, and let the current stream do so."""
        for slot in range(STAGING_SLOTS):
            self._wait_reduce(slot)
        self._stream.join()

    def _touched(self) -> bool:
        """Whether gradients, which are kept, were set, changed or dropped by hand since."""
        dropped = any(p.grad is None and old for p, old in zip(self._params, self._reduced))
        return dropped or any(self._is_other(i, self._reduced) for i in range(len(self._params)))

    def grad_sq(self) -> Tensor:
        """Sum of squares of the gradients of all this rank's shards, float64 0-d."""
        for bucket, squared in enumerate(self._squared):
            if not squared:
                self._square(bucket)
        return self._squares.sum()

    def _square(self, bucket: int) -> None:
        shard = self._buffers.shards[bucket]
        (norm,) = torch._foreach_norm([shard.grads[: shard.tiles]], 2, dtype=torch.float64)
        self._squares[bucket] = norm * norm
        self._squared[bucket] = True

    def discard(self, gone: bool) -> None:
        """Drop what has been reduced since the last step: gradients are zero, or ``gone``."""
        if self._rounds or self._next:
            self._wait_reduces()
        self.forget(gone)


class ParamGatherer:
    """Updated shards -> whole params on every rank: one all-gather per bucket.

    With a ``module`` they travel while its next forward goes on, in the order of first use.
    """

    def __init__(
        self, buffers: FlatBuffers, comm: Comm, stream: CommStream, order: ForwardOrder | None
    ) -> None:
        self._buffers = buffers
        self._comm = comm
        self._stream = stream
        self._order = order
        #: what forward still waits for, by bucket
        self._pending: dict[int, Any] = {}
        #: the buckets that each module waits for
        self._needs: dict[int, set[int]] = {}
        self._ready = [event() for _ in (buffers.shards if stream.stream else ())]
        if order is not None:
            position = {id(p): j for j, p in enumerate(buffers.params)}
            bucket_of = {j: n for n, b in enumerate(buffers.layout.buckets) for j in b.params}
            self._own = [
                {bucket_of[position[i]] for i in own if position.get(i) in bucket_of}
                for own in order.own
            ]

    def start(self) -> None:
        """Send this rank's updated shards to all."""
        self._needs = {} if self._order is None else self._order.needs(self._own)
        if not set().union(*self._needs.values()) >= set(self._buckets()):
            self.gather()  # no module would wait for some of them
            return
        on_cpu = self._stream.stream is None
        with self._stream.entered():
            for bucket in self._buckets():
                work = self._send(bucket, async_op=on_cpu)
                if not on_cpu:
                    work = self._ready[bucket]
                    work.record(self._stream.stream)
                self._pending[bucket] = work

    def gather(self) -> None:
        """The same, done when it returns."""
        for bucket in self._buckets():
            self._send(bucket, async_op=False)

    def _buckets(self) -> Iterable[int]:
        """In the order that they are sent in, which must be the same on every rank: one may gather
        while the other, whose modules ran otherwise, starts. Params are used from the last on."""
        return reversed(range(len(self._buffers.shards)))

    def _send(self, bucket: int, async_op: bool) -> Any:
        whole, shard = self._buffers.buckets[bucket], self._buffers.shards[bucket].params
        return self._comm.all_gather(whole, shard, async_op=async_op)

    def wait(self, module: int) -> None:
        """Wait for the params that a module uses."""
        if self._pending:
            for bucket in sorted(self._needs.get(module, ()), reverse=True):
                self._wait_for(bucket)

    def synchronize(self) -> None:
        """Wait for all params."""
        for bucket in sorted(self._pending, reverse=True):
            self._wait_for(bucket)

    def _wait_for(self, bucket: int) -> None:
        ready = self._pending.pop(bucket, None)
        if isinstance(ready, torch.cuda.Event):
            self._stream.current().wait_event(ready)
        elif ready is not None:
            ready.wait()
