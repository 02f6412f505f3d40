"""Which gradients have come, and when a backward ends."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any, TypeAlias

from torch import Tensor

from .. import _torch_private
from .comm_stream import CommStream
from .forward_order import Handles

#: A gradient, and its version then.
_Seen: TypeAlias = tuple[weakref.ref[Tensor], int]
_TRAINABLE = attrgetter("requires_grad")


def any_gradient(params: Iterable[Any]) -> bool:
    """Whether there is one in ``p.grad``; a loop in C: hundreds are looked at in a step."""
    return any(map(is_not, map(attrgetter("grad"), params), repeat(None)))


def _mark(grad: Any) -> _Seen | None:
    """What tells a gradient from any other, and from itself once it has changed."""
    return None if grad is None else (weakref.ref(grad), _torch_private.version(grad))


class Arrivals:
    """Tells that gradients came and that a backward ended, which takes them away between the two.

    ``buckets`` are ranges of ``params``; those in no bucket only show that a backward ran. Every
    gradient is reported in the first backward; from then on, of each bucket only the one that came
    last, for a report takes the host some us.
    """

    def __init__(
        self,
        params: Sequence[Any],
        buckets: Sequence[range],
        stream: CommStream,
        came: Callable[[], None],
        ended: Callable[[], None],
    ) -> None:
        self._params = params
        self._buckets = buckets
        self._stream = stream
        self._came, self._ended = weakref.WeakMethod(came), weakref.WeakMethod(ended)
        self.handles = Handles()
        #: while True, gradients stay where they arrive
        self.paused = False
        #: streams on which gradients arrive
        self.streams: set[int] = set()
        #: backwards that will tell when they end
        self._running: set[int] = set()
        #: whether backwards tell by the module's output that they begin
        self._told = False
        #: gradients that were there before
        self._old: list[_Seen | None] = [None] * len(params)
        self.look()
        self._watch()

    def _watch(self) -> None:
        """The next backward shows which gradients to have reported."""
        #: buckets that may leave before backward ends: not those with gradients that come in two
        #: parts, as those of a param of two reentrant checkpoints do
        self._early = [True] * len(self._buckets)
        #: in the order of arrival, while all are reported
        self._order: list[int] | None = []
        self._hook(range(len(self._params)))

    def _hook(self, reported: Iterable[int], noticed: Iterable[int] = ()) -> None:
        """Have these gradients reported; of others, only that a backward has come to them."""
        self._trainable = list(map(_TRAINABLE, self._params))
        self.handles.remove_all()
        hooks = [(k, self._unless_paused("_arrived", k)) for k in reported]
        hooks += [(k, self._unless_paused("_began")) for k in noticed]
        for k, hook in hooks:
            p = self._params[k].requires_grad_(True)  # a frozen one takes no hook
            self.handles.append(p.register_post_accumulate_grad_hook(hook))
            p.requires_grad_(self._trainable[k])

    def refresh(self) -> None:
        """Watch anew if params were frozen or unfrozen since."""
        if list(map(_TRAINABLE, self._params)) != self._trainable:
            self._watch()

    def _unless_paused(self, method: str, *args: Any) -> Callable[..., None]:
        """A hook that calls a method, and does not keep the buffers of an optimizer alive."""
        arrivals = weakref.ref(self)

        def hook(*_: Any) -> None:
            alive = arrivals()
            if alive is not None and not alive.paused:
                getattr(alive, method)(*args)

        return hook

    def expect(self, output: Any) -> None:
        """Notice every backward through what a module returned, whichever params it reaches on
        this rank: ranks may take different branches of a model."""
        hook = self._unless_paused("_told_of_backward")
        for t in _torch_private.leaves(output):
            if isinstance(t, Tensor) and t.grad_fn is not None:
                t.register_hook(hook)  # type: ignore[no-untyped-call]

    def _told_of_backward(self) -> None:
        self._told = True
        self._began()

    def _began(self) -> None:
        """A backward is running: notice its end."""
        task = _torch_private.backward_number()
        if task not in self._running:
            self._running.add(task)
            _torch_private.at_end_of_backward(self._one_ended)

    def _arrived(self, k: int) -> None:
        """The gradient of a param is complete, as far as this backward goes."""
        self._began()
        if self._stream.stream is not None:
            stream = self._stream.raw_current()
            if self._order is None and stream not in self.streams:
                self._watch()  # there may be others
            self.streams.add(stream)
        if self._order is not None:
            self._order.append(k)
            return  # nothing leaves before it is known what arrives last
        came = self._came()
        if came is not None:
            came()

    def _one_ended(self) -> None:
        node = _torch_private.running_node()
        if node is not None:
            # It ran within a node of another one, as those of reentrant checkpoints do. That one
            # may reach no param itself, and ends later.
            node.register_hook(self._unless_paused("_began"))
            return
        self._running.clear()
        ended = self._ended()
        if ended is not None:
            ended()
        if self._order:
            order = {k: n for n, k in enumerate(self._order)}
            last = {max(bucket, key=lambda k: order.get(k, -1)) for bucket in self._buckets}
            times = Counter(self._order)
            self._early = [all(times[k] < 2 for k in bucket) for bucket in self._buckets]
            others = () if self._told else set(range(len(self._params))) - last
            self._order = None
            self._hook(last, others)

    def broke_off(self) -> bool:
        """Whether a backward began and did not end; to be asked outside of any."""
        running = bool(self._running)
        self._running.clear()
        return running

    def complete(self, bucket: int) -> bool:
        """Whether all gradients of a bucket have come in this backward, and for good."""
        return self._early[bucket] and all(map(self._is_new, self._buckets[bucket]))

    def any_new(self) -> bool:
        """Whether there is a gradient that was not there at :meth:`look`."""
        return any_gradient(self._params) and any(map(self._is_new, range(len(self._params))))

    def look(self) -> None:
        """What is there now is not of the next backward."""
        if any_gradient(self._params):
            self._old = [_mark(p.grad) for p in self._params]

    def leave_late(self) -> None:
        """A bucket of which something is left came in two parts: from now on it leaves last."""
        for b, bucket in enumerate(self._buckets):
            if any_gradient(self._params[k] for k in bucket):
                self._early[b] = False

    def _is_new(self, k: int) -> bool:
        grad, old = self._params[k].grad, self._old[k]
        if grad is None or old is None:
            return grad is not None
        same = old[0]() is grad
        return not same or old[1] != _torch_private.version(grad)
