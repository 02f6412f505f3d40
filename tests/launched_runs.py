"""Trainings under torchrun, as scripts of other libraries order them: ``launched_runs.py KIND``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_lamb import Lamb, ShardedLamb

STEPS = 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": self.net(x).square().mean()}


def batch(t: int, rank: int) -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(10 * t + rank))


def expected(world: int) -> Model:
    """By Lamb on gradients averaged in the plainest way."""
    model = Model()
    optimizer = Lamb(model.parameters(), lr=0.05)
    for t in range(STEPS):
        for rank in range(world):
            (model(batch(t, rank))["loss"] / world).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def check(model: nn.Module, what: str) -> None:
    """The same bits on all ranks, and the right ones to rounding."""
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    assert all(torch.equal(mine, other) for other in everyone), what
    for p, q in zip(model.parameters(), expected(dist.get_world_size()).parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


def refused(match: str, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(RuntimeError, match=match):
        call(*args)


def loop(net: nn.Module, optimizer: Any, steps: int = STEPS) -> None:
    for t in range(steps):
        net(batch(t, dist.get_rank() if dist.is_initialized() else 0))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()


def own_loops() -> None:
    # made before the process group
    early, alone, first, other = Model(), Model(), Model(), Model()
    optimizers = [ShardedLamb(m, lr=0.05) for m in (early, first, other)]
    by_itself = ShardedLamb(alone, lr=0.05, process_group="self")
    loop(alone, by_itself)
    for p, q in zip(alone.parameters(), expected(1).parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    refused("init_process_group", loop, first, optimizers[1])
    refused("init_process_group", optimizers[0].step)
    dist.init_process_group("gloo")
    loop(early, optimizers[0])
    check(early, "made before the process group")
    optimizers[1].zero_grad()
    loop(first, optimizers[1])
    check(first, "first used before the process group")
    with torch.no_grad():
        other.net[0].weight.add_(float(dist.get_rank()))
    refused("other values of net.0.weight", loop, other, optimizers[2])
    # under DistributedDataParallel
    for given in ("module", "params", "ddp"):
        for stage in (1, 2):
            model = Model()
            what = {"module": model, "params": model.parameters()}
            late = ShardedLamb(what.get(given, model), lr=0.05, stage=stage)
            ddp = DistributedDataParallel(model)
            refused("reduce_gradients=False", loop, ddp, late)
            for p in model.parameters():
                p.grad = None
            what = {"module": model, "params": model.parameters(), "ddp": ddp}
            right = ShardedLamb(what[given], lr=0.05, stage=stage, reduce_gradients=False)
            loop(ddp, right)
            check(model, f"DistributedDataParallel, {given}, stage {stage}")
            del late, ddp, right
    from torch.distributed.fsdp import fully_shard

    model = Model()
    late = ShardedLamb(model, lr=0.05)
    fully_shard(model)
    refused("dist_lamb.Lamb", loop, model, late, 1)


def hugging_face() -> None:
    import transformers

    def train(model: Model, optimizer: ShardedLamb, folder: str) -> None:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=1, max_grad_norm=0.0,
            lr_scheduler_type="constant", use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", dataloader_drop_last=True, remove_unused_columns=False, seed=0,
        )  # fmt: skip
        world = dist.get_world_size()
        data = [{"x": batch(t, rank)} for t in range(STEPS) for rank in range(world)]
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None),
            data_collator=lambda items: items[0],
        )  # fmt: skip
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        trainer.train()

    with tempfile.TemporaryDirectory() as folder:
        wrong = Model()
        unaware = ShardedLamb(wrong.parameters(), lr=0.05)  # before there is a process group
        refused("reduce_gradients=False", train, wrong, unaware, folder)
        for stage in (1, 2):
            model = Model()
            optimizer = ShardedLamb(model, lr=0.05, stage=stage, reduce_gradients=False)
            train(model, optimizer, folder)
            check(model, f"Trainer, stage {stage}")


def lightning() -> None:
    import lightning as L

    class Task(L.LightningModule):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.model, self.options = Model(), options

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.model(x)["loss"]

        def configure_optimizers(self) -> ShardedLamb:
            return ShardedLamb(self.parameters(), lr=0.05, **self.options)

        def train_dataloader(self) -> Any:
            rank = self.trainer.global_rank
            data: Any = [batch(t, rank) for t in range(STEPS)]
            return torch.utils.data.DataLoader(data, batch_size=None)

    def train(task: Task) -> None:
        trainer = L.Trainer(
            max_steps=STEPS, accelerator="cpu", devices=2, strategy="ddp", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(task)

    refused("reduce_gradients=False", lambda: train(Task()))
    for stage in (1, 2):
        task = Task(stage=stage, reduce_gradients=False)
        train(task)
        check(task.model, f"Lightning, stage {stage}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind: Any = {"own": own_loops, "trainer": hugging_face, "lightning": lightning}[sys.argv[1]]
    kind()
    dist.barrier()
    print("all is well")
    dist.destroy_process_group()
