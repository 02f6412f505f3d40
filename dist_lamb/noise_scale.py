"""The gradient noise scale (McCandlish et al., arXiv 1812.06162): how large a batch still pays.

``B_simple = tr(S) / |G|^2``, with S the covariance of one sample's gradient and G their mean. Far
below it a step of twice the batch makes nearly twice the progress; far above it the samples are
wasted. It is estimated from gradient norms at two batch sizes: those of one backward of one rank,
and that of the whole step, which the optimizer knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .base import ParamsT
from .sharding.comm import Comm, ProcessGroup, WeakGroup, is_dtensor
from .state import scalar_of, state_dtype


class NoiseScale(NamedTuple):
    """Estimates of one step or mean ones, each a float32 0-d tensor on the device."""

    signal: Tensor
    """``|G|^2``, the square of the norm of the true gradient."""
    noise: Tensor
    """``tr(S)``, the sum of the variances of one sample's gradient."""

    @property
    def scale(self) -> Tensor:
        """``B_simple`` in samples. One step's may be negative, since both are differences."""
        return self.noise / self.signal


def gradient_noise_scale(
    small_sq: Tensor, big_sq: Tensor, small_batch: float, big_batch: float
) -> NoiseScale:
    """Unbiased estimates from gradients of two batch sizes (arXiv 1812.06162, appendix A.1).

    Args:
        small_sq: the square of the L2 norm of a mean gradient over ``small_batch`` samples; 0-d.
            A mean over several such batches is a better one.
        big_sq: that of a mean gradient over ``big_batch`` samples; 0-d.
        small_batch, big_batch: in samples (sequences, images), the first below the second.

    Raises:
        ValueError: batches that are not ``0 < small_batch < big_batch``.
    """
    if not 0 < small_batch < big_batch:
        raise ValueError(
            f"0 < small_batch < big_batch expected, got {small_batch} and {big_batch}; one rank "
            "that makes one backward a step has only one batch size: accumulate gradients"
        )
    small, big = small_sq.float(), big_sq.float()
    return NoiseScale(
        signal=(big_batch * big - small_batch * small) / (big_batch - small_batch),
        noise=(small - big) / (1.0 / small_batch - 1.0 / big_batch),
    )


def _tensors(given: Any) -> list[Tensor]:
    """Of tensors, ``(name, tensor)`` pairs, or groups of either."""
    # The rows of a tensor are no params: no gradient comes to them.
    loose = isinstance(given, Iterable) and not isinstance(given, (Tensor, Mapping))
    found: list[Tensor] = []
    for entry in list(given) if loose else [given]:
        if loose and isinstance(entry, Mapping) and "params" in entry:
            of = entry["params"]
            found += _tensors([of] if isinstance(of, Tensor) else of)
            continue
        p = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
        if not loose or not isinstance(p, Tensor):
            raise TypeError(
                "GradientNoiseScale takes a module, or what an optimizer takes: tensors, (name, "
                f"tensor) pairs, or groups of either; it got {type(entry).__name__}"
            )
        found.append(p)
    return found


class GradientNoiseScale:
    """Measures the noise scale of a training, in the steps that are chosen for it::

        opt = Lamb(model, track_grad_norm=True)              # or ShardedLamb
        noise = GradientNoiseScale(model, small_batch=32, big_batch=32 * world * accumulate)
        for step in range(steps):
            if step % 16 == 0:
                with noise.watch(1 / accumulate):        # the first micro-batch
                    (loss(model(x), y) / accumulate).backward()
            ...                                          # the other micro-batches
            opt.step()
            if step % 16 == 0:
                noise.update(opt.grad_norm())
        noise.mean().scale                               # samples

    Measured steps pay one more read of the gradients of one backward, and a collective of one
    number; other steps nothing. It works with whole gradients of this rank: alone, under DDP, and
    with ShardedLamb at both stages.

    Args:
        params: a module, or what :class:`dist_lamb.Lamb` takes; frozen ones are left out.
        small_batch: samples of one watched backward on one rank.
        big_batch: samples of a whole step, over all ranks and micro-batches.
        decay: of the running means of signal and noise, each on its own, as the paper has it.
        process_group: the data-parallel ranks; default all.

    Raises:
        ValueError: batches that are not ``0 < small_batch < big_batch``; decay outside of [0, 1).
        TypeError: something that is not a tensor.
        RuntimeError: DTensors, whose gradients FSDP2 reduces before anybody sees this rank's.
    """

    def __init__(
        self,
        params: nn.Module | ParamsT,
        *,
        small_batch: int,
        big_batch: int,
        decay: float = 0.95,
        process_group: ProcessGroup | None = None,
    ) -> None:
        given = params.parameters() if isinstance(params, nn.Module) else params
        self._params = [p for p in _tensors(given) if p.requires_grad]
        if any(is_dtensor(p) for p in self._params):
            raise RuntimeError(
                "gradients of DTensors are reduced before this rank's own can be seen; measure the "
                "noise scale with ShardedLamb or DistributedDataParallel"
            )
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Invalid decay: {decay!r}; 0 <= decay < 1 expected")
        self._small, self._big = small_batch, big_batch
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        gradient_noise_scale(zero, zero, small_batch, big_batch)
        self._decay, self._group = decay, WeakGroup(process_group)
        self._watched: Tensor | None = None
        self._sums: Tensor | None = None

    @contextmanager
    def watch(self, factor: float = 1.0) -> Iterator[None]:
        """Around one backward: look at this rank's gradients in it.

        ``factor``: what its loss, a mean over ``small_batch`` samples, was multiplied by (1 / the
        number of micro-batches; a loss scale).
        """
        squares: list[Tensor] = []

        def add(gradient: Tensor) -> None:
            wide = state_dtype(gradient.dtype)
            norm = torch.linalg.vector_norm(gradient.detach(), dtype=wide)
            squares.append(norm.double().square())

        # They see what this backward brings, before it is added up, reduced or freed.
        hooked: list[Any] = list(self._params)
        handles = [p.register_hook(add) for p in hooked]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if squares:
            self._watched = torch.stack(squares).sum() / factor**2

    @torch.no_grad()
    def update(self, grad_norm: Tensor | float) -> NoiseScale:
        """After ``step()``: this step's estimates, taken into the means; a collective.

        ``grad_norm``: of the whole step, before clipping, as
        :meth:`dist_lamb.Lamb.grad_norm` has it. A step that is not finite is left out of the means.

        Raises:
            RuntimeError: nothing was watched since the last time. TypeError: grad_norm is not a
                number.
        """
        if not isinstance(grad_norm, (Tensor, Real)):
            raise TypeError(f"grad_norm is a number or a 0-d tensor; got {grad_norm!r}")
        if self._watched is None:
            raise RuntimeError("no backward ran inside of watch() since the last update()")
        # Of all ranks, also of those with another mesh axis: the mean of small batches.
        comm = Comm(self._group.get())
        small_sq = comm.all_reduce_sum(self._watched) / comm.num_ranks
        self._watched = None
        big_sq = scalar_of(grad_norm, torch.float64).to(small_sq.device).square()
        found = gradient_noise_scale(small_sq, big_sq, self._small, self._big)
        pair = torch.stack(found)
        self._sums = pair.new_zeros(3) if self._sums is None else self._sums.to(pair.device)
        new = torch.cat([pair, pair.new_ones(1)])
        mixed = torch.lerp(new, self._sums, self._decay)
        self._sums = torch.where(pair.isfinite().all(), mixed, self._sums)
        return found

    def mean(self) -> NoiseScale:
        """The running means, without the start's weight on zero; NaN before the first update."""
        if self._sums is None:
            nan = torch.full((), torch.nan, dtype=torch.float32, device="cpu")
            return NoiseScale(nan, nan)
        return NoiseScale(self._sums[0] / self._sums[2], self._sums[1] / self._sums[2])

    def state_dict(self) -> dict[str, Any]:
        """The running means: for :func:`dist_lamb.checkpoint.save`'s ``stateful``, so that a
        resumed training goes on with them. The same on all ranks."""
        return {"sums": None if self._sums is None else self._sums.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What :meth:`state_dict` gave, at any batch sizes. Raises ``ValueError`` for another."""
        sums = state.get("sums", ())
        if sums is not None:
            if not isinstance(sums, list) or len(sums) != 3:
                raise ValueError(f"no state of a GradientNoiseScale: {state!r}")
            sums = torch.tensor(sums, dtype=torch.float32, device="cpu")
        self._sums, self._watched = sums, None
