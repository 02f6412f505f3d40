"""The ranks of an optimizer: found when there is a process group, and started alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .arrivals import any_gradient
from .comm import Comm, DeviceMesh, Group
from .lockstep import Lockstep


class Members:
    """The ranks that share out a model, which may be known only after the optimizer is made."""

    def __init__(self, group: Group | None, mesh: DeviceMesh | None) -> None:
        self.comm = Comm.of(group, mesh)
        #: whether which ranks there are depends on what is called before the first use
        self.open = group is None and not Comm.known()
        self.lockstep: Lockstep | None = None

    def require_same(self, described: list[str], params: Sequence[Tensor]) -> None:
        """All ranks have the same params and options, or all raise the same ``ValueError``."""
        for p in params[:1]:
            self.comm.require_same("params or options", described, p.device)

    def join(
        self,
        described: list[str],
        named: Sequence[tuple[str, Tensor]],
        buffers: Iterable[Tensor],
    ) -> None:
        """Compare what is ``described``, and broadcast params and buffers from rank 0."""
        late = self.open
        if late:
            self.comm, self.open = Comm.of_all(), False
        params = [p for _, p in named]
        self.require_same(described, params)
        if late:
            self._require_same_start(named)
        self.comm.broadcast_all([*params, *buffers])
        self.lockstep = Lockstep(self.comm)

    def _require_same_start(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """A backward without a process group was run on the same values, or all ranks raise."""
        if not any(self.comm.everyone(any_gradient(p for _, p in named))):
            return
        first = [p.detach().clone() for _, p in named]
        self.comm.broadcast_all(first)
        other = [name for (name, p), q in zip(named, first) if not torch.equal(p, q)]
        for rank, names in enumerate(self.comm.everyone(other[:1])):
            if names:
                self.open = True
                raise RuntimeError(
                    f"rank {rank} has run its first backward on other values of {names[0]} than "
                    "rank 0: call torch.distributed.init_process_group() before making the "
                    "optimizer, which then broadcasts them, or start all ranks alike"
                )
