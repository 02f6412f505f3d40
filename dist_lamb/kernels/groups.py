"""The param groups' options as a step reads them: checked when they change, tables on devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import options, rules
from ..rules import Rule
from .device import capturing, int64, upload


class Row(NamedTuple):
    """A group's options as numbers: what no rule sees, and the rule's own."""

    sign: float  # -1 where the objective is maximized
    max_grad_norm: float  # inf where gradients are not clipped
    h: Any  # as Rule.hyperparameters; lr is 0 where it is a tensor on a device


#: Columns of a group, float64: a Row's, the rule's ending it; the address of an lr on the device
#: and its dtype (0 none, 1 float32, 2 float64) are int64 bits.
SIGN, MAX_GRAD_NORM, LR_ADDRESS, LR_DTYPE, LR = range(5)
GROUP_COLUMNS = 32


class GroupOptions:
    """The options of all groups, read anew in every step."""

    def __init__(self) -> None:
        self._seen: list[list[Any]] = []
        self.rules: list[Rule] = []
        self.rows: list[Row] = []
        #: lr tensors on devices, by group
        self.lrs: dict[int, Tensor] = {}
        self.clip = self.skip = self.maximize = self.l2 = self.early = False
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
            self.rules = [rules.of(group) for group in groups]
            self.rows = [_row(rule, group) for rule, group in zip(self.rules, groups)]
            self.lrs = {i: group["lr"] for i, group in enumerate(groups) if _on_device(group["lr"])}
            self.clip = any(map(options.clips, groups))
            # One step for all groups: what one of them skips, none may take.
            self.skip = any(group["nonfinite"] == "skip" for group in groups)
            self.maximize = any(group["maximize"] for group in groups)
            self.l2 = any(getattr(row.h, "l2", 0.0) for row in self.rows)
            self.early = any(rule.early for rule in self.rules)
            self.lr_zero = any(
                row.h.lr == 0 and i not in self.lrs for i, row in enumerate(self.rows)
            )
            self._seen = seen
        return self


def _on_device(lr: Any) -> bool:
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _row(rule: Rule, group: Mapping[str, Any]) -> Row:
    lr = group["lr"]
    h = rule.hyperparameters({**group, "lr": 0.0 if _on_device(lr) else float(lr)})
    limit = group["max_grad_norm"] or float("inf")
    return Row(-1.0 if group["maximize"] else 1.0, limit, h)


_NAMES = [name for name in dict.fromkeys((*options.RULE_DEFAULTS, *rules.OPTIONS)) if name != "lr"]


def _values(group: Mapping[str, Any]) -> list[Any]:
    """What tells whether options have changed; the value of an lr on a device is not read."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = ("device", id(lr)) if lr.device.type != "cpu" else lr.tolist()
    # Copies of lists: one that is written to would always equal itself.
    return [lr, *(tuple(v) if isinstance(v, list) else v for v in map(group.get, _NAMES))]


class GroupTable:
    """The options on one device, float64 [groups, GROUP_COLUMNS]; group, rule and size of params.

    ``groups`` are the param groups, or such of them as hold ``params``' groups.
    """

    def __init__(
        self,
        device: torch.device,
        rules_: Sequence[Rule],
        group_of: Sequence[int],
        numels: Sequence[int],
        keep: list[Any],
    ) -> None:
        self.device = device
        #: by param
        self.rules = [rules_[i] for i in group_of]
        #: int64 [params], on the host and on the device
        self.on_host = int64(group_of)
        self.group_of = self.on_host.to(device)
        #: float64 [params], elements of the whole params
        self.numels = torch.tensor(numels, dtype=torch.float64, device=device)
        #: of the sums that all rules' late sums have room in
        self.columns = max((rule.columns for rule in self.rules), default=2)
        self._keep = keep
        self._rows: Any = None
        self._table: Tensor | None = None
        self._lrs: list[Tensor] = []

    @staticmethod
    def of_groups(
        device: torch.device, groups: Sequence[Mapping[str, Any]], keep: list[Any]
    ) -> GroupTable:
        """Of all params of all groups, in their order."""
        params = [(i, p) for i, group in enumerate(groups) for p in group["params"]]
        numels = [p.numel() for _, p in params]
        return GroupTable(device, list(map(rules.of, groups)), [i for i, _ in params], numels, keep)

    def of(self, current: GroupOptions) -> Tensor:
        rows = [self._row(i, row, current) for i, row in enumerate(current.rows)]
        if self._table is None or rows != self._rows:
            table = torch.zeros(len(rows), GROUP_COLUMNS, dtype=torch.float64, device="cpu")
            for i, (row, address, dtype) in enumerate(rows):
                numbers = [row.sign, row.max_grad_norm, 0.0, 0.0, *row.h]
                table[i, : len(numbers)] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
                table.view(torch.int64)[i, LR_ADDRESS:LR] = int64([address, dtype])
            self._table = upload(table, self.device, self._keep)
            self._rows = rows
        table = self._table
        if capturing(self.device):
            self._keep.append(table)
            # Uploaded by the graph, at a replay: worth nothing to the steps outside of it.
            self._table = None
        return table

    def gathered(self, current: GroupOptions, rule: Rule) -> Row:
        """The options by param, float64 [params] each; of other rules' params anything."""
        table = self.of(current)
        if current.lrs:
            table = table.clone()
            for i, lr in current.lrs.items():
                lr = lr.detach().to(self.device, torch.float64, non_blocking=True)
                table[i, LR] = lr.view(())
        columns = table[self.group_of].unbind(1)
        fields: Any = rule.h
        h = fields(*columns[LR : LR + len(fields._fields)])
        return Row(columns[SIGN], columns[MAX_GRAD_NORM], h)  # type: ignore[arg-type]

    def _row(self, i: int, row: Row, current: GroupOptions) -> tuple[Row, int, int]:
        address = dtype = 0
        lr = current.lrs.get(i)
        if lr is not None:
            if lr.device != self.device or lr.dtype not in (torch.float32, torch.float64):
                lr = lr.detach().to(self.device, torch.float64, non_blocking=True)
                self._lrs.append(lr)  # alive for as long as the table has its address
                del self._lrs[: -len(current.rows)]
            address, dtype = lr.data_ptr(), 1 if lr.dtype == torch.float32 else 2
        return row, address, dtype
