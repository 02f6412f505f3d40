"""Checkpoints of one engine in another, with rules, formats, schedules and wrappers in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from ranks import run_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

from dist_lamb import Lamb, ShardedLamb, checkpoint
from dist_lamb.checkpoint import CheckpointError, reading
from dist_lamb.checkpoint.cli import main


def made(
    cls: Any = Lamb, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3).to(dtype)
    return model, cls(model, **{"lr": 0.01, **options})


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        torch.manual_seed(t)
        x = torch.randn(8, 4).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).float().square().sum().backward()
        optimizer.step()


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_edited_weights_in_half_precision(cls: Any, steps_before: int, tmp_path: Path) -> None:
    """What the weights were edited to counts over their masters, which are saved as they are."""
    model, optimizer = made(dtype=torch.bfloat16)
    train(model, optimizer, range(3))
    with torch.no_grad():
        model.weight.clamp_(-0.1, 0.1)  # type: ignore[operator]
    checkpoint.save(tmp_path, 3, model, optimizer)
    other, again = made(cls, seed=1, dtype=torch.bfloat16)
    train(other, again, range(steps_before))
    checkpoint.load(tmp_path, other, again)
    train(model, optimizer, range(3, 5))
    train(other, again, range(3, 5))
    assert_alike(other, model)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_another_rule_of_the_same_states(steps_before: int, tmp_path: Path) -> None:
    """A ShardedLamb's buffers are made for a rule: refused before anything is changed."""
    model, optimizer = made(lr=0.5)
    train(model, optimizer, range(3))
    checkpoint.save(tmp_path, 3, model, optimizer)
    other, again = made(ShardedLamb, seed=1, rule="adamw")
    train(other, again, range(steps_before))
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(CheckpointError, match=r"under rule 'lamb', .* ShardedLamb are for 'adamw'"):
        checkpoint.load(tmp_path, other, again, options="saved")
    if steps_before:
        with pytest.raises(RuntimeError, match="weight has come under another rule than 'adamw'"):
            again.load_state_dict(optimizer.state_dict())
    assert all(map(torch.equal, before, other.parameters()))
    assert (again.param_groups[0]["rule"], again.param_groups[0]["lr"]) == ("adamw", 0.01)
    train(other, again, range(3, 4))


def test_save_async_and_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    model, optimizer = made()
    train(model, optimizer, range(1))
    monkeypatch.chdir(here)
    pending = checkpoint.save_async("run", 1, model, optimizer)
    os.chdir(there)
    checkpoint.wait()
    assert pending.done()
    assert (here / "run" / "step-1").is_dir()
    assert not any(there.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "lamb_outside", "decay_first": True},
        {"rule": "lars", "trust_coefficient": 0.05, "momentum": 0.8},
        {"rule": "adagrad", "weight_decay": 0.0},
        {"rule": "lamb_adagrad"},
        {"amsgrad": True},
        {"nonfinite": "skip"},
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["same", "saved", "own"])
def test_every_rule_through_dcp(options: dict[str, Any], which: Any, tmp_path: Path) -> None:
    model, optimizer = made(lr=0.1, **options)
    train(model, optimizer, range(3))
    checkpoint.save(tmp_path / "run", 3, model, optimizer)
    dcp, run = str(tmp_path / "dcp"), str(tmp_path / "back")
    assert main(["export", str(tmp_path / "run"), dcp, "--format", "dcp"]) == 0
    assert main(["import", dcp, run]) == 0
    other, again = made(seed=1, lr=0.1, **options)
    assert checkpoint.load(run, other, again, options=which).step == 3
    train(model, optimizer, range(3, 5))
    train(other, again, range(3, 5))
    assert_alike(other, model)


class Remembers(lr_scheduler.LRScheduler):
    def __init__(self, optimizer: Any) -> None:
        self.history: list[float] = []
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        self.history.append(1.0)
        return [group["lr"] for group in self.optimizer.param_groups]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.OneCycleLR(o, 0.1, 20)], [2]
        ),
        Remembers,
    ],
)
def test_a_run_with_a_schedule_is_resumed(schedule: Any, tmp_path: Path) -> None:
    """By default: betas that the schedule cycles are no other run's."""
    runs = []
    for seed in (0, 1):
        model, optimizer = made(seed=seed)
        runs.append((model, optimizer, schedule(optimizer)))
    if isinstance(runs[1][2], Remembers):
        runs[1][2].history = []
    for t in range(3):
        train(*runs[0][:2], range(t, t + 1))
        runs[0][2].step()
    checkpoint.save(tmp_path, 3, *runs[0][:2], stateful={"lr": runs[0][2]})
    checkpoint.load(tmp_path, *runs[1][:2], stateful={"lr": runs[1][2]})
    for model, optimizer, steps in runs:
        train(model, optimizer, range(3, 4))
        steps.step()
        train(model, optimizer, range(4, 5))
    assert_alike(runs[1][0], runs[0][0])


def test_betas_that_another_optimizer_s_schedule_cycles(tmp_path: Path) -> None:
    model, optimizer = made()
    other_s = lr_scheduler.OneCycleLR(made()[1], 0.1, 20)
    checkpoint.save(tmp_path, 0, model, optimizer, stateful={"lr": other_s})
    again = made(betas=(0.8, 0.999))
    with pytest.raises(CheckpointError, match="betas of parameter group 0"):
        checkpoint.load(tmp_path, *again, stateful={"lr": other_s})


def test_a_torch_adam_through_dcp(tmp_path: Path) -> None:
    model, _ = made()
    adam = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, adam, range(3))
    state = get_state_dict(model, adam)
    torch_dcp.save({"model": state[0], "optim": state[1]}, checkpoint_id=tmp_path / "dcp")
    assert main(["import", str(tmp_path / "dcp"), str(tmp_path / "run")]) == 0
    other, again = made(seed=1)
    checkpoint.load(tmp_path / "run", other, again, options="saved")
    assert_alike(other, model)
    assert (again.param_groups[0]["decoupled"], again.param_groups[0]["weight_decay"]) == (
        False,
        0.1,
    )


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_names_of_a_compiled_ddp_model(one_rank: None, tmp_path: Path) -> None:
    model, _ = made()
    wrapped = torch.compile(DistributedDataParallel(model), backend="eager")
    optimizer = Lamb(model)
    train(wrapped, optimizer, range(2))  # type: ignore[arg-type]
    checkpoint.save(tmp_path, 2, wrapped, optimizer)  # type: ignore[arg-type]
    other, again = made(seed=1, lr=0.001)
    checkpoint.load(tmp_path, other, again, options="saved")
    assert_alike(other, model)


def test_a_tensor_that_safetensors_has_not(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("safetensors")
    model, optimizer = made()
    model.register_buffer("phase", torch.ones(2, dtype=torch.complex128))
    checkpoint.save(tmp_path / "run", 0, model, optimizer)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 1
    assert "safetensors has no torch.complex128: export --format dcp" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


class Counter:
    value = 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_a_checkpoint_that_goes_away_while_it_is_read(
    cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``keep=`` of a training does under a reader: no step goes on from a mixture."""
    model, optimizer = made(cls)
    train(model, optimizer, range(2))
    counter = Counter()
    counter.value = 5
    checkpoint.save(tmp_path / "run", 2, model, optimizer, stateful={"counter": counter})
    read, reads = reading.Checkpoint.read, []

    def until_it_is_gone(self: Any, *args: Any) -> Any:
        reads.append(0)
        if len(reads) == 9:
            shutil.rmtree(tmp_path / "run" / "step-2")
        return read(self, *args)

    other, again = made(cls, seed=1)
    train(other, again, range(3))
    mine = Counter()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with monkeypatch.context() as patch:
        patch.setattr(reading.Checkpoint, "read", until_it_is_gone)
        with pytest.raises(CheckpointError, match="loaded in part: load a checkpoint again"):
            checkpoint.load(tmp_path / "run", other, again, stateful={"counter": mine})
    assert mine.value == 1
    with pytest.raises(RuntimeError, match="or the loading of a checkpoint"):
        train(other, again, range(3, 4))
    with pytest.raises(CheckpointError, match="or the loading of a checkpoint"):
        checkpoint.save(tmp_path / "mixed", 3, other, again)
    checkpoint.load(tmp_path / "copy", other, again, stateful={"counter": mine})
    train(other, again, range(2, 3))
    train(model, optimizer, range(2, 3))
    assert_alike(other, model)


def _consolidated(rank: int, world: int) -> None:
    model, optimizer = made(ShardedLamb)
    train(model, optimizer, range(2))
    optimizer.consolidate_state_dict(to=None)
    optimizer.param_groups[0]["lr"] = 0.5
    assert optimizer.state_dict()["param_groups"][0]["lr"] == 0.5
    optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))]})
    with pytest.raises(RuntimeError, match=r"call consolidate_state_dict\(to=rank\)"):
        optimizer.state_dict()
    optimizer.consolidate_state_dict(to=None)
    assert len(optimizer.state_dict()["param_groups"]) == 2


@pytest.mark.xdist_group("ranks")
def test_a_whole_state_dict_is_of_the_groups_as_they_are(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, _consolidated)
