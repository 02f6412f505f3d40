"""A model whose gradients are given, trained by DeepSpeed on gloo ranks or by a plain optimizer."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import models
import torch
from torch import Tensor, nn

from dist_lamb import Lamb
from dist_lamb.deepspeed_adapter import DeepSpeedLamb, recommended_config, register
from dist_lamb.param_notes import ParamNotes

STEPS = 10
OPTIONS: dict[str, Any] = {"lr": 0.02}
#: of groups of rules that would hardly move otherwise
OF_RULE: dict[str, dict[str, Any]] = {
    "lars": {"trust_coefficient": 0.5},
    "lars_optax": {"trust_coefficient": 0.5},
}
Values = dict[str, Tensor]


class Holder(nn.Module):
    """One param, gathered by ZeRO-3 when this module runs."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(value.clone())

    def forward(self, gradient: Tensor) -> Tensor:
        return (self.weight * gradient.to(self.weight.dtype)).float().sum()


class Given(nn.Module):
    """sum(param * g): its gradient is g, exactly."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.short = {name: name.replace(".", "_") for name in values}
        self.held = nn.ModuleDict({self.short[n]: Holder(v) for n, v in values.items()})

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.held[self.short[n]](g) for n, g in gradients.items()]).sum()

    def params(self) -> dict[str, nn.Parameter]:
        return {n: self.held[short].weight for n, short in self.short.items()}


def device() -> torch.device:
    """This rank's: DeepSpeed takes a GPU where there is one."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def start_values(dtype: torch.dtype = torch.float32) -> Values:
    """The params that hurt, but for those that hurt DeepSpeed: empty ones, and of no dims."""
    made = models.make_params(dtype)
    return {n: p.detach().reshape(p.shape or (1,)) for n, p in made.items() if p.numel()}


@dataclass(frozen=True)
class Case:
    """One training run; the same for every rank, and for the plain optimizer."""

    stage: int
    dtype: str = "fp32"
    clip: float = 1.0
    #: options of zero_optimization, and of the config's top level
    zero: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    #: what has no gradient: at every step, and at single ones
    absent: Sequence[str] = ("tile.weight",)
    absent_at: Mapping[int, Sequence[str]] = field(default_factory=lambda: {1: ("fc.weight",)})
    offload: bool = False
    accumulate: int = 1
    zero_init: bool = False
    frozen: Sequence[str] = ()
    decay_lr: bool = False
    naive: bool = False
    #: made by DeepSpeed, of what its JSON says, from param groups or from all params of the model
    by_name: bool = False
    ungrouped: bool = False
    #: param groups of these, one each; JSON names the first one
    rules: Sequence[str] = ()
    #: the model is float32 until DeepSpeed converts it
    convert: bool = False

    @property
    def tracked(self) -> bool:
        """Whether norms of gradients are compared, which come as they are where nobody clips."""
        return self.clip == 0.0 and self.dtype == "fp32" and not self.naive

    def make_config(self) -> dict[str, Any]:
        made = recommended_config(
            self.stage,
            dtype=self.dtype,
            gradient_clipping=self.clip,
            offload_optimizer=self.offload,
        )
        made["train_micro_batch_size_per_gpu"] = 1
        made["gradient_accumulation_steps"] = self.accumulate
        # Several buckets, and ZeRO-3 keeps no small param whole.
        made["zero_optimization"] |= {"reduce_bucket_size": 3000, **self.zero}
        if self.stage == 3:
            made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
        if self.offload:
            made["zero_optimization"]["offload_optimizer"]["pin_memory"] = False
        if self.by_name:
            register()
            made.pop("zero_allow_untested_optimizer")
            made.pop("zero_force_ds_cpu_optimizer", None)
            params = {**OPTIONS, **self.options, **dict(zip(("rule",), self.rules))}
            if self.ungrouped:
                params |= {"weight_decay": 0.05, "no_decay_1d": True}
            made["optimizer"] = {"type": "DeepSpeedLamb", "params": params}
        return json.loads(json.dumps(made | dict(self.config)))

    def groups(self, params: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        if self.rules:
            named = list(params.items())
            groups = [
                {"params": named[i :: len(self.rules)], "rule": rule, **OF_RULE.get(rule, {})}
                for i, rule in enumerate(self.rules)
            ]
            if self.by_name:
                del groups[0]["rule"]
            return groups
        groups = models.groups_of(params)
        if self.ungrouped:
            groups[1].pop("trust_clip")
        return groups

    def gradients(self, values: Values, t: int, rank: int, world: int) -> Values:
        """This rank's; their mean over ranks is exact but for a division by 3."""
        absent = (*self.absent, *self.absent_at.get(t, ()), *self.frozen)
        mean = models.mean_gradients(values, t, absent)
        return models.rank_gradients(mean, rank, world, t)

    def mean(self, each: Sequence[Tensor]) -> Tensor:
        """Over ranks, as DeepSpeed forms it. ZeRO-1 and 2 divide in the model's dtype first, and
        an element whose mean is 0 is not 0 then at 3 ranks: Adam's quotient makes a step of it."""
        first = self.stage in (1, 2) and "data_types" not in self.config
        if first and self.dtype != "fp32":
            return torch.stack([(g / len(each)).float() for g in each]).sum(0).to(each[0].dtype)
        return sum(each[1:], each[0]) / len(each)

    def lr_factor(self, t: int) -> float:
        return 1.0 / (1 + t) if self.decay_lr else 1.0


@dataclass
class Run:
    """A DeepSpeed engine around a Given, or around its params only."""

    case: Case
    rank: int
    world: int
    #: of the values it starts from: with another one a checkpoint must bring the right ones
    scale: float = 1.0

    def __post_init__(self) -> None:
        import deepspeed

        case = self.case
        self.start = start_values(DTYPES[case.dtype])
        given = {n: v.float() for n, v in self.start.items()} if case.convert else self.start
        given = {n: v * self.scale for n, v in given.items()}
        config = case.make_config()
        init = deepspeed.zero.Init(config_dict_or_path=config) if case.zero_init else nullcontext()
        with init:
            model = Given(given).to(device())
        params = model.params()
        for name in case.frozen:
            params[name].requires_grad_(False)
        groups = case.groups(self.start)
        for group in groups:
            group["params"] = [(n, params[n]) for n, _ in group["params"]]
        made: Any = None
        if not case.by_name:
            kind = Lamb if case.naive else DeepSpeedLamb
            made = kind(groups, **{**OPTIONS, **case.options})
        if case.naive:
            made._given = ParamNotes()  # as any other LAMB, it knows nothing of DeepSpeed
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=made,
            model_parameters=groups if case.by_name and not case.ungrouped else None,
            config=config,
            lr_scheduler=self._scheduler if case.decay_lr else None,
        )
        self.model = model
        self.optimizer: Any = self.engine.basic_optimizer
        if case.by_name:
            assert type(self.optimizer) is DeepSpeedLamb
            self.optimizer.bind(self.engine)

    def _scheduler(self, optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.case.lr_factor)

    def train(self, steps: range = range(STEPS)) -> Run:
        for t in steps:
            for part in range(self.case.accumulate):
                # Parts that are not alike, and average to the gradient exactly.
                factor = self.case.accumulate if part == 0 else 0.0
                found = self.case.gradients(self.start, t, self.rank, self.world)
                mine = {n: (g * factor).to(device()) for n, g in found.items()}
                applied = False
                while not applied:  # an overflow of float16 is skipped, and comes again
                    self.engine.backward(self.engine(mine))
                    self.engine.step()
                    applied = self.case.dtype != "fp16" or self.engine.was_step_applied()
        return self

    def params(self) -> Values:
        """Whole, on every rank."""
        import deepspeed

        params = self.model.params()
        whole = (
            deepspeed.zero.GatheredParameters(list(params.values()))
            if self.case.stage == 3
            else nullcontext()
        )
        with whole:
            return {n: p.detach().float().cpu().clone() for n, p in params.items()}

    def model_state_dict(self) -> Values:
        import deepspeed

        whole = nullcontext()
        if self.case.stage == 3:
            whole = deepspeed.zero.GatheredParameters(list(self.model.parameters()))
        with whole:
            return {k: v.clone() for k, v in self.model.state_dict().items()}

    def load_model(self, values: Values) -> None:
        import deepspeed

        whole = nullcontext()
        if self.case.stage == 3:
            params = list(self.model.parameters())
            whole = deepspeed.zero.GatheredParameters(params, modifier_rank=0)
        with whole:
            self.model.load_state_dict(values)
        if hasattr(self.engine.optimizer, "refresh_fp32_params"):
            self.engine.optimizer.refresh_fp32_params()

    def ratios(self) -> dict[str, float]:
        return self._named(self.optimizer.trust_ratios())

    def grad_norms(self) -> dict[str, float]:
        return self._named(self.optimizer.grad_norms())

    def whole_state(self) -> Values:
        """Moments and masters, whole, by the param's name and theirs; a collective."""
        state = self.optimizer.full_optimizer_state_dict()["state"]
        names = [o.name for o in self.optimizer._originals]
        return float32_state({self._name(names[i]): of for i, of in state.items()})

    def _named(self, found: Values) -> dict[str, float]:
        return {self._name(n): float(r) for n, r in found.items()}

    def _name(self, name: str) -> str:
        # The engine has names of its own for those that were given without.
        ours = {f"held.{short}.weight": n for n, short in self.model.short.items()}
        return ours.get(name, name)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must bring back: every tensor of the state, and every counter."""
        found = {}
        for i, entry in enumerate(self.optimizer.state.values()):
            found |= {f"{i} {k}": v.clone() for k, v in entry.items()}
        for group in self.optimizer.param_groups:
            found[f"steps {group['group_index']}"] = group["param_steps"].clone()
        return found


def plain(case: Case, world: int, steps: int = STEPS) -> tuple[Values, dict[str, float]]:
    """The same run without shards: params and trust ratios."""
    params, optimizer = plain_run(case, world, steps)
    ratios = {n: float(r) for n, r in optimizer.trust_ratios().items()}
    return {n: p.detach().float() for n, p in params.items()}, ratios


def plain_state(case: Case, world: int) -> Values:
    """Of the same run without shards what :meth:`Run.whole_state` gives."""
    params, optimizer = plain_run(case, world, STEPS)
    return float32_state({n: optimizer.state[p] for n, p in params.items()})


def float32_state(states: Mapping[str, Any]) -> Values:
    kinds = ("exp_avg", "exp_avg_sq", "master")
    return {
        f"{n} {kind}": state[kind].reshape(-1)
        for n, state in states.items()
        for kind in kinds
        if kind in state
    }


def plain_run(case: Case, world: int, steps: int) -> tuple[dict[str, nn.Parameter], Lamb]:
    dtype = DTYPES[case.dtype]
    params = {n: nn.Parameter(v.clone()) for n, v in start_values(dtype).items()}
    options = {**OPTIONS, **case.options}
    options.setdefault("max_grad_norm", case.clip)
    optimizer = Lamb(replace(case, by_name=False).groups(params), **options)
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS["lr"] * case.lr_factor(t)
        each = [case.gradients(params, t, rank, world) for rank in range(world)]
        for n, p in params.items():
            p.grad = case.mean([g[n] for g in each]) if n in each[0] else None
        optimizer.step()
    return params, optimizer


def last_norms(case: Case, world: int) -> dict[str, float]:
    """Of the mean gradients of the last step."""
    start, t = start_values(DTYPES[case.dtype]), STEPS - 1
    each = [case.gradients(start, t, rank, world) for rank in range(world)]
    return {n: float(case.mean([g[n] for g in each]).norm()) for n in each[0]}


def worst_error(got: Values, want: Values) -> float:
    """The largest difference, of the largest value of its tensor; NaN counts as infinite."""
    errors = [
        float((got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1e-30)) for n in want
    ]
    return max(e if e == e else float("inf") for e in errors)


def launched(rank: int, world: int) -> None:
    """What a launcher would have set; and quiet."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    # gloo, whatever else there is: these ranks are on one machine, and may be more than its GPUs
    os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    warnings.simplefilter("ignore", FutureWarning)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # Its memory is found by user and port: two tests at a time would write into each other's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
