"""Communication that hides behind computation.

Gradients are reduced while backward goes on: a bucket travels as soon as the gradients of all its
params have arrived. Params are gathered while the next forward goes on: a module waits for its own.
Neither changes a bit of the result, whatever runs late: every rank issues the same collectives in
the same order, and what needs a result waits for it.

On GPUs both run on a stream of their own; on CPU gloo's threads do the work.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from .arrivals import Arrivals, any_gradient
from .buffers import GRADS, FlatBuffers
from .comm import Comm
from .comm_stream import CommStream, event
from .forward_order import ForwardOrder
from .lockstep import Lockstep

#: Whole-bucket buffers that gradients are sent from: one is filled while the other travels.
STAGING_SLOTS = 2


@dataclass
class _Reduction:
    """A bucket on its way to the shards."""

    bucket: int
    out: Tensor  # receives the sum over the shard axis
    work: Any


class Rounds:
    """A *round* reduces every bucket once, in the order of the buckets on every rank, whatever
    order gradients arrive in and whichever of them are missing: ranks that lack different gradients
    must not pair up different buckets."""

    def __init__(self, buckets: int, send: Callable[..., None], lockstep: Lockstep) -> None:
        self._buckets = buckets
        # Weakly: a reducer that nobody needs must go at once, with its hooks.
        self._send = weakref.WeakMethod(send)
        self._lockstep = lockstep
        #: the bucket to be sent next, in a round that is open
        self._next: int | None = None
        #: since the last step; also backwards that raised
        self.count = self.broken = 0

    @property
    def open(self) -> bool:
        return self._next is not None

    def _raised(self) -> str:
        return f", after {self.broken} backward(s) that raised" if self.broken else ""

    def described(self) -> str:
        return f"after round {self.count} of gradients{self._raised()}"

    def advance(self, ready: Callable[[int], bool] = lambda bucket: True, **how: Any) -> None:
        """Send the buckets that are ready, up to the first that is not."""
        while (bucket := self._next or 0) < self._buckets and ready(bucket):
            if self._next is None:
                what = f"round {self.count + 1} of gradients, in backward{self._raised()}"
                self._lockstep.meet(what)
                self.count += 1
                self._next = bucket
            send = self._send()
            assert send is not None
            send(bucket, **how)
            self._next = bucket + 1

    def close(self, **how: Any) -> None:
        """Send all that has not been sent in this round."""
        self.advance(**how)
        self._next = None

    def whole(self) -> None:
        """A round that all ranks know of."""
        self._next = 0
        self.count += 1
        self.close()


class GradientReducer:
    """Gradients -> this rank's shards of their mean over ranks: one reduce-scatter per bucket.

    With ``overlap`` a round begins inside a backward and is closed at that backward's end, and
    frees its gradients; rounds since the last step add up in the shards. What such a round leaves,
    and without ``overlap`` everything, is reduced by one more at :meth:`finish`. Until then nobody
    looks at ``p.grad``: what it holds then counts. ``others`` are params in no bucket.
    """

    def __init__(
        self,
        buffers: FlatBuffers,
        comm: Comm,
        stream: CommStream,
        lockstep: Lockstep,
        overlap: bool,
        keep: bool,
        others: Sequence[Tensor],
    ) -> None:
        self._buffers = buffers
        self._comm = comm
        self._stream = stream
        self._keep = keep
        self._members = [b.params for b in buffers.layout.buckets]
        params: list[Any] = buffers.bucketed
        ends = list(accumulate(map(len, self._members), initial=0))
        buckets = [range(a, b) for a, b in pairwise(ends)]
        self._params_of = [params[bucket.start : bucket.stop] for bucket in buckets]
        self._params = params
        self.rounds = Rounds(len(self._members), self._launch, lockstep)
        self.arrivals: Arrivals | None = None
        if overlap:
            watched = [*params, *others]
            self.arrivals = Arrivals(watched, buckets, stream, self._came, self._backward_ended)
        self._travelling: list[_Reduction | None] = [None] * STAGING_SLOTS
        self._sent = [event() for _ in range(STAGING_SLOTS if stream.stream else 0)]
        self._squares = torch.zeros(len(self._members), dtype=torch.float64, device=buffers.device)
        #: whether clipping will ask for :meth:`grad_sq`, which then is ready when backward ends
        self.squares_wanted = False
        self.forget()

    def forget(self) -> None:
        """The shards hold nothing."""
        self.rounds.count = 0
        self._held = [False] * len(self._members)
        self._squared = [False] * len(self._members)
        #: params that had a gradient on this rank
        self.present: set[int] = set()

    # --- inside backward -------------------------------------------------------------------------

    def _came(self) -> None:
        assert self.arrivals is not None
        self.rounds.advance(self.arrivals.complete)

    def _backward_ended(self) -> None:
        assert self.arrivals is not None
        # Not after one that left no gradient, such as torch.autograd.grad: one rank alone may
        # have run it.
        if self.rounds.open or self.arrivals.any_new():
            self.rounds.close()
            # What has come since its bucket left goes with the next round, which all ranks make:
            # one of its own would have no partner on other ranks.
            self.arrivals.leave_late()
            self.arrivals.look()

    def settle(self) -> None:
        """After a backward that raised: close its round, for those of other ranks do not.

        What it would have sent stays in ``p.grad``.
        """
        arrivals = self.arrivals
        if arrivals is None or not (arrivals.broke_off() or self.rounds.open):
            return
        if self.rounds.open or arrivals.any_new():
            self.rounds.broken += 1
        if self.rounds.open:
            self.rounds.close(nothing=True)
        arrivals.look()

    @torch.no_grad()
    def _launch(self, bucket: int, nothing: bool = False) -> None:
        """Send a bucket's gradients on their way, in the staging buffer that is its turn's.

        ``nothing``: as a rank does that has none.
        """
        slot, stream = bucket % STAGING_SLOTS, self._stream
        self._wait_reduce(slot)
        elsewhere: set[int] = set()
        if stream.stream is not None:
            if self.arrivals is not None:
                elsewhere = self.arrivals.streams - {stream.raw_current()}
            for other in elsewhere:
                stream.wait_for(other)
            stream.current().wait_event(self._sent[slot])
        staged, present = self._buffers.stage(bucket, slot, nothing)
        if not (self._keep or nothing):
            for p in self._params_of[bucket]:
                if p.grad is not None and elsewhere:
                    # Its memory would be given out again there while it is copied here.
                    p.grad.record_stream(stream.current())
                p.grad = None
        self.present.update(present)
        with stream.entered():
            shard = self._buffers.shards[bucket]
            direct = staged.dtype == shard.grads.dtype and not self._held[bucket]
            out = shard.grads if direct else torch.empty_like(shard.grads, dtype=staged.dtype)
            work = self._comm.reduce_scatter(out, staged, async_op=stream.stream is None)
            self._travelling[slot] = _Reduction(bucket, out, work)
            if stream.stream is not None:
                self._wait_reduce(slot)
                self._sent[slot].record(stream.stream)

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
            if self._held[bucket]:
                grads.add_(mean)
            else:
                grads.copy_(mean)
        self._held[bucket] = True
        self._squared[bucket] = False
        if self._stream.stream is not None and self.squares_wanted:
            self._square(bucket)

    # --- at the step -----------------------------------------------------------------------------

    def left(self) -> bool:
        """Whether there are gradients on this rank that have not been reduced."""
        return any_gradient(self._params)

    @torch.no_grad()
    def finish(self, left: bool) -> None:
        """Every gradient that this rank has is in the shards, and the current stream may read.

        ``left``: whether any rank has some :meth:`left`.
        """
        if self._keep:
            self.forget()  # of a step that failed: its gradients are still there
        if left or not self.rounds.count:
            self.rounds.whole()
        self.rounds.broken = 0
        self.present |= {j for j in self._buffers.empty if self._buffers.params[j].grad is not None}
        self._wait_reduces()

    def stepped(self) -> None:
        """The gradients have been used."""
        self.forget()
        if self.arrivals is not None:
            self.arrivals.refresh()

    def _wait_reduces(self) -> None:
        """Wait for everything that travels, and let the current stream do so."""
        for slot in range(STAGING_SLOTS):
            self._wait_reduce(slot)
        self._stream.join()

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

    def discard(self) -> None:
        """Drop what has been reduced since the last step."""
        if self.rounds.count:
            self._wait_reduces()
        self.forget()

    def let_go(self) -> None:
        """Another one reduces these gradients from now on."""
        self.discard()
        if self.arrivals is not None:
            self.arrivals.handles.remove_all()

    def reduced(self) -> dict[Tensor, Tensor]:
        """Whole means of what has been reduced since the last step, on the CPU; a collective."""
        if not self.rounds.count:
            return {}
        self._wait_reduces()
        whole = self._buffers.gather_state(GRADS, keep=True)
        return {self._buffers.params[j]: value for j, value in whole.items()}

    def resume(self, reduced: dict[Tensor, Tensor], count: int) -> None:
        """Go on from what another reducer had :meth:`reduced` in so many rounds."""
        if not count:
            return
        self._buffers.load_gradients(reduced)
        self._held = [True] * len(self._members)
        self.rounds.count = count


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
