"""The numeric gate of ``bench.py train``: a contender that is not LAMB gets no speed.

A small model of the same kind takes GATE_STEPS steps with the contender, and with LAMB written out
plainly: the gradients of all ranks averaged, whole tensors, the reference kernels.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from pretraining.ranks import Ranks
from torch import Tensor

from dist_lamb import Lamb

from .train_contenders import Contender, Setting, Training
from .train_work import WORKS, Work, placed, prepared

GATE_STEPS = 3
#: Large, so that what a step moves is far above the rounding of the params.
GATE_LR = 2e-2
#: Largest ||x - reference|| / ||reference - start|| of a param that still counts as LAMB. Trust
#: ratios of cut tensors are off by 0.15 and more.
GATE = {torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}
#: Softmax is invariant to the key's bias: its gradient is rounding error alone, which Adam's
#: direction scales up to full size, differently in every implementation.
NOISE = "attention.self.key.bias"


class Gate:
    """Errors of contenders against the reference, which is computed once a dtype."""

    def __init__(self, ranks: Ranks, work: Work = WORKS["tiny"]) -> None:
        self._ranks = ranks
        self._work = work
        self._template = work.template()
        self._batches = list(work.batches(GATE_STEPS, ranks.rank, ranks.device, seed=1))
        self._expected: dict[torch.dtype, dict[str, Tensor]] = {}

    def error(self, contender: Contender, setting: Setting) -> tuple[float, str]:
        """The largest relative error on any rank, and its param; a collective.

        Raises:
            ValueError: the contender has other params than the model.
        """
        setting = dataclasses.replace(
            setting,
            # Autocast differs from run to run by more than the errors that are looked for.
            precision="fp32" if setting.autocast or contender.own_layers else setting.precision,
            micro_batch=self._work.micro_batch,
            lr=GATE_LR,
        )
        if setting.dtype not in self._expected:
            self._expected[setting.dtype] = self._reference(setting)
        training = prepared(contender, self._template, setting)
        for batch in self._batches:
            training.backward(training.forward(batch, setting))
            training.step()
        return self._worst(training.whole_params(), self._expected[setting.dtype], setting)

    def _reference(self, setting: Setting) -> dict[str, Tensor]:
        module = placed(self._template, setting)
        options = {**setting.lamb_options(), "impl": "reference"}
        training = Training(module, Lamb(module.named_parameters(), **options))
        for batch in self._batches:
            training.backward(training.forward(batch, setting))
            for p in module.parameters():
                assert p.grad is not None
                total = p.grad.float()
                dist.all_reduce(total)
                p.grad.copy_(total / self._ranks.world_size)
            training.step()
        return training.whole_params()

    def _worst(
        self, found: dict[str, Tensor], expected: dict[str, Tensor], setting: Setting
    ) -> tuple[float, str]:
        if found.keys() != expected.keys():
            raise ValueError(f"params differ: {sorted(found.keys() ^ expected.keys())}")
        start = dict(placed(self._template, setting).named_parameters())
        errors = {}
        for name, e in expected.items():
            if not name.endswith(NOISE):
                moved = (e.double() - start[name].detach().double()).norm()
                off = (found[name].double() - e.double()).norm()
                errors[name] = float(off / moved.clamp(min=1e-30))
        # Ranks that decide differently would wait for each other, and replicas may have drifted.
        every: list[Any] = [None] * self._ranks.world_size
        dist.all_gather_object(every, errors)
        # max() alone would ignore a NaN
        return max(
            ((math.inf if math.isnan(e) else e, name) for each in every for name, e in each.items())
        )
