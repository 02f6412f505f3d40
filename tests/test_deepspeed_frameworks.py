"""DeepSpeedLamb by way of Hugging Face's Trainer and Accelerate, and as its recipe says."""

from __future__ import annotations

import json
import os
import re
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from deepspeed_runs import launched, worst_error
from ranks import run_ranks
from torch import Tensor, nn

from dist_lamb import Lamb, param_groups
from dist_lamb.deepspeed_adapter import DeepSpeedLamb, check_config, register

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.xdist_group("programs"),
    pytest.mark.skipif(
        any(find_spec(name) is None for name in ("deepspeed", "accelerate", "transformers")),
        reason="deepspeed, accelerate or transformers is not installed",
    ),
]
STEPS = 4
LR, WEIGHT_DECAY, CLIP = 0.02, 0.1, 0.5


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11)
        with torch.no_grad():
            for p in (self.embed.weight, self.head.weight, self.head.bias):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.embed(ids)))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def batch() -> dict[str, Tensor]:
    """The same on every rank and at every step."""
    ids = torch.arange(24).view(4, 6) * 5 % 11
    return {"ids": ids, "labels": (ids * 3 + 1) % 11}


def by_hand(
    optimizer: Any = Lamb, dtype: torch.dtype = torch.float32, **more: Any
) -> dict[str, Tensor]:
    model = Tagger().to(dtype)
    groups = param_groups(model, WEIGHT_DECAY)
    opt = optimizer(groups, lr=LR, eps=1e-8, **more)
    for _ in range(STEPS):
        model(**batch())["loss"].backward()
        opt.step()
        opt.zero_grad()
    return {n: p.detach().float() for n, p in model.named_parameters()}


def whole(model: nn.Module, stage: int) -> dict[str, Tensor]:
    import deepspeed

    params = dict(model.named_parameters())
    gathered = deepspeed.zero.GatheredParameters(list(params.values()))
    with gathered if stage == 3 else nullcontext():
        return {n: p.detach().float().clone() for n, p in params.items()}


def config_of(
    stage: int, *, named: bool, offload: bool = False, bf16: bool = False
) -> dict[str, Any]:
    """As users of the Trainer write it."""
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if stage == 3:
        # Without it every rank that takes itself for the first removes the same file: on a CPU
        # accelerate knows one process only.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "gradient_clipping": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    if bf16:
        config |= {"bf16": {"enabled": True}, "communication_data_type": "fp32"}
    if named:
        auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
        config["optimizer"] = {"type": "DeepSpeedLamb", "params": {**auto, "no_decay_1d": True}}
    elif offload:
        config["zero_force_ds_cpu_optimizer"] = False
    return config


def fresh_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def trainer(config: dict[str, Any], folder: str, **more: Any) -> Any:
    import transformers

    fresh_accelerate()
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        lr_scheduler_type="constant",
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        deepspeed=config,
        bf16="bf16" in config,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=STEPS // 2,
        seed=0,
    )
    return transformers.Trainer(
        model=Tagger(),
        args=arguments,
        train_dataset=[batch()] * 4,
        data_collator=lambda items: items[0],
        **more,
    )


def _trainers(rank: int, world: int, folder: str) -> list[str]:
    import transformers

    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)
    launched(rank, world)
    register()
    wanted, found = by_hand(max_grad_norm=CLIP), []
    passed = (DeepSpeedLamb, {"lr": LR, "eps": 1e-8})
    for stage, named, offload in [
        *((stage, True, False) for stage in range(4)),
        *((1, True, True), (3, True, True), (2, False, False), (2, False, True)),
    ]:
        name = f"{stage} {'named' if named else 'passed'} {'offloaded' * offload}"
        more = {} if named else {"optimizer_cls_and_kwargs": passed}
        config = config_of(stage, named=named, offload=offload)
        done = trainer(config, f"{folder}/{name}", **more)
        done.train()
        assert type(done.deepspeed.basic_optimizer) is DeepSpeedLamb
        error = worst_error(whole(done.model, stage), wanted)
        found.append(f"Trainer {name}: {error:.1e}")
        assert error < 1e-5, found[-1]
        if not offload and stage in (2, 3):
            resumed = trainer(config, f"{folder}/{name}", **more)
            resumed.train(resume_from_checkpoint=f"{folder}/{name}/checkpoint-{STEPS // 2}")
            error = worst_error(whole(resumed.model, stage), wanted)
            found.append(f"Trainer {name}, resumed: {error:.1e}")
            assert error < 1e-5, found[-1]
    with pytest.MonkeyPatch.context() as patch:
        # which Trainer takes on GPUs only
        patch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
        done = trainer(config_of(2, named=True, bf16=True), f"{folder}/bf16")
    done.train()
    error = worst_error(whole(done.model, 2), by_hand(dtype=torch.bfloat16, max_grad_norm=CLIP))
    found.append(f"Trainer 2 named bf16: {error:.1e}")
    assert error < 2**-7, found[-1]
    # An instance is dropped without a word by the Trainer, and AdamW trains.
    model = Tagger()
    made = DeepSpeedLamb(param_groups(model, WEIGHT_DECAY), lr=LR)
    dropped = trainer(config_of(2, named=False), f"{folder}/dropped", optimizers=(made, None))
    dropped.model = dropped.model_wrapped = model
    with pytest.warns(UserWarning, match=r"step\(\) is never called"):
        dropped.train()
    assert type(dropped.deepspeed.basic_optimizer) is not DeepSpeedLamb
    adamw = by_hand(torch.optim.AdamW)
    assert not worst_error(adamw, wanted) < 1e-2  # the bounds above see another rule
    fresh_accelerate()
    return found


def test_trainer(tmp_path: Path) -> None:
    """From its JSON with auto values, and by optimizer_cls_and_kwargs; saved and resumed."""
    for line in run_ranks(2, tmp_path, _trainers, str(tmp_path / "runs"), timeout=280)[0]:
        print(line)


def _accelerated(rank: int, world: int, folder: str) -> list[str]:
    import accelerate
    from accelerate.utils import DeepSpeedPlugin, DummyOptim
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    launched(rank, world)
    register()
    wanted, found = by_hand(max_grad_norm=CLIP), []

    def prepared(config: dict[str, Any], passed: bool) -> tuple[Any, Any]:
        fresh_accelerate()
        settings = config | {
            "gradient_clipping": CLIP,
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 1,
        }
        if not passed:
            settings["optimizer"]["params"] |= {"betas": [0.9, 0.999], "eps": 1e-8}
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
        accelerator = accelerate.Accelerator(deepspeed_plugin=plugin)
        model = Tagger()
        if passed:
            made: Any = DeepSpeedLamb(param_groups(model, WEIGHT_DECAY), lr=LR, eps=1e-8)
        else:
            made = DummyOptim(list(model.parameters()), lr=LR, weight_decay=WEIGHT_DECAY)
        model, made = accelerator.prepare(model, made)
        return accelerator, model

    def train(accelerator: Any, model: Any, steps: int) -> None:
        for _ in range(steps):
            accelerator.backward(model(**batch())["loss"])

    for stage, passed, offload in [
        *((0, False, False), (1, True, True), (2, False, True), (3, True, False)),
        *((3, False, True), (2, True, False)),
    ]:
        name = f"{stage} {'passed' if passed else 'named'} {'offloaded' * offload}"
        config = config_of(stage, named=not passed, offload=offload)
        accelerator, model = prepared(config, passed)
        train(accelerator, model, 2)
        accelerator.save_state(f"{folder}/{name}")
        train(accelerator, model, STEPS - 2)
        assert type(model.basic_optimizer) is DeepSpeedLamb
        error = worst_error(whole(model.module, stage), wanted)
        found.append(f"Accelerate {name}: {error:.1e}")
        assert error < 1e-5, found[-1]
        if stage == 2:
            accelerator, again = prepared(config, passed)
            accelerator.load_state(f"{folder}/{name}")
            train(accelerator, again, STEPS - 2)
            error = worst_error(whole(again.module, stage), wanted)
            assert error < 1e-5, (name, "resumed", error)
    accelerator, model = prepared(config_of(3, named=True, bf16=True), False)
    train(accelerator, model, STEPS)
    error = worst_error(whole(model.module, 3), by_hand(dtype=torch.bfloat16, max_grad_norm=CLIP))
    found.append(f"Accelerate 3 named bf16: {error:.1e}")
    assert error < 2**-7, found[-1]
    # It replaces an instance when offloading, if DeepSpeed's config does not forbid it.
    config = config_of(2, named=False, offload=True)
    del config["zero_force_ds_cpu_optimizer"]
    assert any("Accelerate replaces" in line for line in check_config(config))
    compiled = Mock()
    with pytest.MonkeyPatch.context() as patch:
        # its Adam, without waiting for a C++ compiler
        patch.setattr(CPUAdamBuilder, "load", lambda _: compiled)
        accelerator, model = prepared(config, True)
        with pytest.warns(UserWarning, match=r"step\(\) is never called.*Accelerate replaces it"):
            train(accelerator, model, 1)
        assert type(model.basic_optimizer) is DeepSpeedCPUAdam
        assert compiled.adam_update.called
    fresh_accelerate()
    return found


def test_accelerate(tmp_path: Path) -> None:
    for line in run_ranks(2, tmp_path, _accelerated, str(tmp_path / "runs"), timeout=280)[0]:
        print(line)


def _recipe(rank: int, world: int, block: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """README's lines, with configs/deepspeed_lamb.json."""
    launched(rank, world)
    model = Tagger()
    scope: dict[str, Any] = {"model": model}
    here = os.getcwd()
    os.chdir(ROOT)
    exec(block, scope)
    os.chdir(here)
    engine = scope["engine"]
    assert type(engine.basic_optimizer) is DeepSpeedLamb
    for _ in range(STEPS):
        engine.backward(engine(**batch())["loss"])
        engine.step()
    groups = engine.basic_optimizer.param_groups
    assert sorted(g["weight_decay"] for g in groups) == [0.0, 0.01]
    dist.barrier()
    return {n: p.detach().float() for n, p in engine.module.named_parameters()}


def test_recipe(tmp_path: Path) -> None:
    config = json.loads((ROOT / "configs" / "deepspeed_lamb.json").read_text())
    register()
    assert not check_config(config)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block = next(b for b in blocks if "register()" in b)
    got = run_ranks(2, tmp_path, _recipe, block, config, timeout=280)[0]
    model = Tagger().bfloat16()
    options = config["optimizer"]["params"]
    groups = param_groups(model, options["weight_decay"])
    opt = Lamb(groups, lr=options["lr"], max_grad_norm=config["gradient_clipping"])
    for _ in range(STEPS):
        model(**batch())["loss"].backward()
        opt.step()
        opt.zero_grad()
    want = {n: p.detach().float() for n, p in model.named_parameters()}
    assert worst_error(got, want) < 2**-7
