"""Loss scaling by torch's scalers, where every rank has gradients of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .comm import Comm
from .comm_stream import Later


class LossScaling:
    """Tells ranks of each other's overflows, and whose scales have come apart by one."""

    def __init__(self) -> None:
        #: how many ranks the last step had an overflow on
        self._overflows: Later | None = None

    def share(self, flag: Tensor, comm: Comm) -> Tensor:
        """A scaler's flag of this rank -> on how many ranks it is set."""
        if comm.num_ranks == 1:
            return flag
        count = comm.sum_over_all((flag > 0).double().view(1))
        self._overflows = Later(count)
        return count

    def problem(self, flag: Any, reduced: bool, ranks: int) -> str | None:
        """Why this step must not be made; ``reduced``: backward has freed gradients."""
        # Of no p.grad GradScaler makes a plain 0, ShardedGradScaler a tensor.
        if reduced or (type(flag) is int and ranks > 1):
            return (
                "with this scaler: it looks for overflows in p.grad, which stage=2 frees inside "
                "backward; use ShardedLamb with stage=1 or overlap=False for loss scaling"
            )
        count = 0.0 if self._overflows is None else self._overflows.item()
        if 0 < count < ranks:
            return (
                f"any more: gradients of the last step overflowed on {count:.0f} of {ranks} ranks, "
                "and GradScaler has changed its scale on these alone; use torch.distributed.fsdp."
                "sharded_grad_scaler.ShardedGradScaler, whose scale is the same on all"
            )
        return None
