"""The param groups' options as a step reads them: checked when they change, tables on devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import options
from ..rule import Hyperparameters, hyperparameters
from .device import capturing, int64, upload

#: Columns of a group, float64: the hyperparameters, log2 of both betas, and as int64 bits the
#: address of an lr on the device and its dtype (0 none, 1 float32, 2 float64).
FIELDS = (*Hyperparameters._fields, "log_beta1", "log_beta2", "lr_address", "lr_dtype")
_LR = FIELDS.index("lr")
_NAMES = [name for name in options.RULE_DEFAULTS if name != "lr"]


class GroupOptions:
    """The options of all groups, read anew in every step."""

    def __init__(self) -> None:
        self._seen: list[list[Any]] = []
        self.rows: list[Hyperparameters] = []
        #: lr tensors on devices, by group
        self.lrs: dict[int, Tensor] = {}
        self.clip = self.skip = self.maximize = self.l2 = False
        #: whether some lr is 0, as far as the host knows
        self.lr_zero = False

    @property
    def squares_wanted(self) -> bool:
        """Whether the sum of squares of all gradients must be known before the moments."""
        return self.clip or self.skip

    def read(self, groups: Sequence[Mapping[str, Any]]) -> GroupOptions:
        """Take the groups' options over.

        Raises ``ValueError`` naming one that is not valid; nothing is changed then.
        """
        seen = [_values(group) for group in groups]
        if seen != self._seen:
            for group in groups:
                options.check_group(group)
            self.rows = [hyperparameters(group) for group in groups]
            self.lrs = {
                i: group["lr"]
                for i, group in enumerate(groups)
                if isinstance(group["lr"], Tensor) and group["lr"].device.type != "cpu"
            }
            self.clip = any(map(options.clips, groups))
            # One step for all groups: what one of them skips, none may take.
            self.skip = any(group["nonfinite"] == "skip" for group in groups)
            self.maximize = any(group["maximize"] for group in groups)
            self.l2 = any(not group["decoupled"] for group in groups)
            self.lr_zero = any(row.lr == 0 and i not in self.lrs for i, row in enumerate(self.rows))
            self._seen = seen
        return self


def _values(group: Mapping[str, Any]) -> list[Any]:
    """What tells whether options have changed; the value of an lr on a device is not read."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = ("device", id(lr)) if lr.device.type != "cpu" else lr.tolist()
    # Copies of lists: one that is written to would always equal itself.
    return [lr, *(tuple(v) if isinstance(v, list) else v for v in map(group.get, _NAMES))]


def group_of_each(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    """The group of each param, in the order of the groups."""
    return [i for i, group in enumerate(groups) for _ in group["params"]]


class GroupTable:
    """The options on one device, float64 [groups, len(FIELDS)], and the group of each param."""

    def __init__(self, device: torch.device, group_of: Sequence[int], keep: list[Any]) -> None:
        self.device = device
        #: int64 [params], on the host and on the device
        self.on_host = int64(group_of)
        self.group_of = self.on_host.to(device)
        self._keep = keep
        self._rows: Any = None
        self._table: Tensor | None = None
        self._lrs: list[Tensor] = []

    def of(self, current: GroupOptions) -> Tensor:
        rows = [self._row(i, row, current) for i, row in enumerate(current.rows)]
        if self._table is None or rows != self._rows:
            numbers = torch.tensor([row[:-2] for row in rows], dtype=torch.float64)
            pointers = int64([row[-2:] for row in rows])
            table = torch.cat([numbers.view(torch.int64), pointers], dim=1)
            self._table = upload(table, self.device, self._keep).view(torch.float64)
            self._rows = rows
        table = self._table
        if capturing(self.device):
            self._keep.append(table)
            # Uploaded by the graph, at a replay: worth nothing to the steps outside of it.
            self._table = None
        return table

    def gathered(self, current: GroupOptions) -> Hyperparameters:
        """The options by param, float64 [params] each."""
        table = self.of(current)
        if current.lrs:
            table = table.clone()
            for i, lr in current.lrs.items():
                lr = lr.detach().to(self.device, torch.float64, non_blocking=True)
                table[i, _LR] = lr.view(())
        columns = table[self.group_of].unbind(1)
        return Hyperparameters(*columns[: len(Hyperparameters._fields)])

    def _row(self, i: int, row: Hyperparameters, current: GroupOptions) -> tuple[Any, ...]:
        address = dtype = 0
        lr = current.lrs.get(i)
        if lr is not None:
            if lr.device != self.device or lr.dtype not in (torch.float32, torch.float64):
                lr = lr.detach().to(self.device, torch.float64, non_blocking=True)
                self._lrs.append(lr)  # alive for as long as the table has its address
                del self._lrs[: -len(current.rows)]
            address, dtype = lr.data_ptr(), 1 if lr.dtype == torch.float32 else 2
        # Negative infinity for beta = 0: then 1 - exp2(t * log) is 1.
        logs = (math.log2(b) if b else -math.inf for b in (row.beta1, row.beta2))
        return (*row, *logs, address, dtype)
