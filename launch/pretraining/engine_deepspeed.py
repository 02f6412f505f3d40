"""Engine ``deepspeed``: DeepSpeed's ZeRO 0-3 with DeepSpeedLamb, configured by DeepSpeed's JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_lamb import Lamb
from pretraining.config import ConfigError, OptimConfig, PretrainConfig
from pretraining.engine_base import groups_of
from pretraining.model import build_model

CONFIGS = Path(__file__).parents[2] / "configs"


def read_config(optim: OptimConfig) -> dict[str, Any]:
    """DeepSpeed's config as a dict, clipping as ``optim`` says.

    Raises:
        ConfigError: no such file, not JSON, or settings with which it would not be this run.
    """
    from dist_lamb.deepspeed_adapter import check_config

    path = Path(optim.deepspeed or CONFIGS / f"deepspeed_zero{optim.stage}.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"optim.deepspeed: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"optim.deepspeed: {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"optim.deepspeed: {path} is no JSON object, {{...}}")
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"optim.deepspeed: {path}: zero_optimization is no JSON object, {{...}}")
    stage = zero.get("stage", 0)
    if stage != optim.stage:
        raise ConfigError(f"{path} is for ZeRO stage {stage}, optim.stage is {optim.stage}")
    clipping = config.setdefault("gradient_clipping", optim.max_grad_norm)
    if clipping != optim.max_grad_norm:
        raise ConfigError(
            f"{path} has gradient_clipping {clipping}, optim.max_grad_norm is {optim.max_grad_norm}"
        )
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "optimizer",
    ):
        if key in config:
            section = "optim" if key == "optimizer" else "train"
            raise ConfigError(f"{path}: remove {key}, which is set in [{section}]")
    problems = [p for p in check_config(config) if "gradient_clipping" not in p]
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}")
    # Batches are cut outside: DeepSpeed is told which micro-batch is the last one of a step.
    return config | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}


class Called(nn.Module):
    """A module, called through DeepSpeed's engine, with the module's own names of params."""

    def __init__(self, module: nn.Module, engine: Any) -> None:
        super().__init__()
        self.module = module
        # Not a submodule: the engine contains this module already.
        self.__dict__["engine"] = engine

    def forward(self, *inputs: Any) -> Any:
        return self.engine(*inputs)

    def train(self, mode: bool = True) -> Called:
        self.engine.train(mode)
        return self

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """With whole shapes: under ZeRO-3 stand-ins on the meta device, for empty vectors."""
        for name, p in self.module.named_parameters(*args, **kwargs):
            if hasattr(p, "ds_shape"):
                p = nn.Parameter(torch.empty(p.ds_shape, dtype=p.dtype, device="meta"))
            yield name, p


class DeepSpeedEngine:
    """Checkpoints are whole, as of the other engines: they load at other stages, numbers of ranks
    and engines. (DeepSpeed's own save_checkpoint writes one file a rank, for that many ranks.)"""

    def __init__(self, model: nn.Module, config: PretrainConfig, lr: float) -> None:
        optim = config.optim
        settings = read_config(optim)
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(f"engine deepspeed needs the package deepspeed: {error}") from None

        from dist_lamb.deepspeed_adapter import DeepSpeedLamb, register
        from pretraining.deepspeed_ops import load_shared_memory_op

        load_shared_memory_op()
        register()
        self.optimizer = DeepSpeedLamb(
            groups_of(model, optim),
            lr=lr,
            **{**optim.options(), "max_grad_norm": None},  # DeepSpeed clips
            track_grad_norm=config.track_grad_norm,
        )
        self._module = model
        self._config = config
        self._copy: tuple[nn.Module, Lamb] | None = None
        # torchrun sets it. DeepSpeed asks for it also where a job of one runs without torchrun.
        os.environ.setdefault("LOCAL_RANK", "0")
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=settings
        )
        self.optimizer.bind(self._engine)  # for optim.nonfinite = "skip"
        self.model: nn.Module = Called(model, self._engine)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def trust_ratios(self) -> dict[str, Tensor]:
        return self.optimizer.trust_ratios()

    def grad_norm(self) -> Tensor | None:
        """DeepSpeed's, which at stage 0 it keeps to itself."""
        norm = self._engine.get_global_grad_norm()
        if norm is None:
            return None
        device = self._engine.device  # a number at some stages, a tensor at others
        return (
            torch.tensor(float(norm), device=device)
            if isinstance(norm, float)
            else (norm.detach().to(device, torch.float32, copy=True).reshape(()))
        )

    def skipped_steps(self) -> Tensor:
        """With the steps that DeepSpeed skips itself, counted since the start of this process: 0.19
        does so at stages 1 and 2 in float32, and at stage 3. Without those of fp16, where its loss
        scaling skips steps of every run."""
        by_deepspeed = 0 if self._engine.fp16_enabled() else self._engine.skipped_steps
        return self.optimizer.skipped_steps() + by_deepspeed

    def before_save(self) -> None:
        model, optimizer = self.checkpointed()
        with self._whole(writer=None):
            model.load_state_dict(self._module.state_dict())
        state = self.optimizer.full_optimizer_state_dict()
        # DeepSpeed clips here; an engine that resumes from this checkpoint clips in its optimizer.
        for group in state["param_groups"]:
            group["max_grad_norm"] = self._config.optim.max_grad_norm or None
        optimizer.load_state_dict(state)

    def checkpointed(self) -> tuple[nn.Module, Lamb]:
        """Whole copies on the host of every rank: what lies in DeepSpeed's flat partitions would
        load at the same stage and number of ranks only."""
        if self._copy is None:
            of = self._config
            model = build_model(of.model, of.data, of.train.seed, torch.device("cpu"))
            lamb = Lamb(groups_of(model, of.optim), lr=0.0, **of.optim.options())
            self._copy = (model, lamb)
        return self._copy

    def after_load(self) -> None:
        model, whole = self.checkpointed()
        optimizer = whole.state_dict()
        with self._whole(writer=0):
            self._module.load_state_dict(model.state_dict())
        # DeepSpeed's float32 copies of the params, which are what is optimized.
        refresh = getattr(self._engine.optimizer, "refresh_fp32_params", None)
        if refresh is not None:
            refresh()
        groups = [{**group, "max_grad_norm": None} for group in optimizer["param_groups"]]
        self.optimizer.load_full_optimizer_state_dict({**optimizer, "param_groups": groups})

    def _whole(self, writer: int | None) -> AbstractContextManager[Any]:
        """The params whole on every rank; what rank ``writer`` changes is kept."""
        if self._config.optim.stage < 3:
            return nullcontext()
        import deepspeed

        params = list(self._module.parameters())
        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            params, modifier_rank=writer
        )
        return gathered
