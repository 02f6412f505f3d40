"""launch/examples: each learns, and those that save go on as if they had not been stopped."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchtitan_contract
from ranks import run_ranks

os.environ.setdefault("HF_HUB_OFFLINE", "1")
FOLDER = Path(__file__).parent.parent / "launch" / "examples"
pytestmark = [
    pytest.mark.xdist_group("programs"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


def example(name: str) -> Any:
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    return importlib.import_module(name)


def learned(losses: list[float], share: float) -> None:
    assert all(map(math.isfinite, losses))
    assert losses[-1] < share * losses[0], losses


def test_every_example_is_short_and_has_a_test() -> None:
    tests = sorted(Path(__file__).parent.glob("test_example*.py"))
    source = "".join(path.read_text() for path in tests)
    names = [path.stem for path in FOLDER.glob("*.py")]
    assert len(names) >= 8
    for name in names:
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60, name
        assert f'example("{name}")' in source, name


# --- two and four ranks --------------------------------------------------------------------------


def everywhere_the_same(module: torch.nn.Module) -> None:
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])
    all_of_them = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, flat)
    assert all(torch.equal(flat, other) for other in all_of_them)


def _two_ranks(rank: int, world: int, folder: Path) -> Any:
    zero2 = example("zero2")
    whole = zero2.main("cpu", str(folder / "whole"))
    learned(whole, 0.8)
    begun = zero2.main("cpu", str(folder / "cut"), steps=20)
    resumed = zero2.main("cpu", str(folder / "cut"))
    assert begun + resumed == whole
    assert zero2.main("cpu", str(folder / "cut")) == []
    learned(example("fsdp2").main("cpu"), 0.5)
    losses, model = example("contrastive").main("cpu")
    everywhere_the_same(model)
    return losses, dict(model.state_dict())


def _whole_batch(rank: int, world: int) -> Any:
    losses, model = example("contrastive").main("cpu")
    return losses, dict(model.state_dict())


def test_on_two_ranks(tmp_path: Path) -> None:
    """The contrastive one follows one process that has the whole batch."""
    (tmp_path / "runs").mkdir()
    halves = run_ranks(2, tmp_path, _two_ranks, tmp_path / "runs")
    losses, params = run_ranks(1, tmp_path, _whole_batch)[0]
    mean = [(a + b) / 2 for a, b in zip(halves[0][0], halves[1][0])]
    assert mean == pytest.approx(losses, rel=1e-5)
    learned(mean, 0.2)
    for name, p in params.items():
        torch.testing.assert_close(halves[0][1][name], p, rtol=2e-5, atol=2e-6, msg=name)
    assert abs(params["log_scale"] - math.log(10.0)) > 0.1, "the temperature is trained"


def test_temperature_takes_an_adam_step() -> None:
    from dist_lamb import param_groups

    model = torch.nn.ModuleDict({"image": torch.nn.Linear(4, 4)})
    model.log_scale = torch.nn.Parameter(torch.tensor(2.3))
    groups = param_groups(model, no_adapt=["log_scale"])
    assert [g.get("adapt") for g in groups if g["params"][0][0] == "log_scale"] == [False]


def _four_ranks(rank: int, world: int) -> list[float]:
    losses: list[float] = example("fsdp2_tp").main("cpu")
    return losses


def test_fsdp2_x_tp_on_four_ranks(tmp_path: Path) -> None:
    found = run_ranks(4, tmp_path, _four_ranks)
    for losses in found:
        learned(losses, 0.5)
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # of one tensor-parallel group
    assert found[0] != pytest.approx(found[2], rel=1e-5)


def test_under_torchrun(tmp_path: Path) -> None:
    """As its docstring says."""
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 {FOLDER}/zero2.py"
    done = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss 2." in done.stdout
    assert "trust ratios" in done.stdout


# --- trainers ------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def as_torchrun(rank: int, world: int, port: int) -> None:
    """What trainers read of the environment; the process group is there already."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({k: str(v) for k, v in names.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))


def params_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def trained(trainer: Any, folder: Path, mode: str, whole: Any) -> Any:
    """A run of the example, the same as one that was stopped after step 20."""
    rank = int(os.environ["RANK"])
    done = trainer.main(str(folder), mode)
    losses = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
    learned(losses, 0.95)
    before = {n: whole(p).clone() for n, p in done.model_wrapped.named_parameters()}
    dist.barrier()
    if rank == 0:
        (folder / "checkpoint-40").rename(folder / "away")
    dist.barrier()
    resumed = trainer.main(str(folder), mode)
    assert resumed.state.global_step == 40
    for name, p in resumed.model_wrapped.named_parameters():
        assert torch.equal(whole(p), before[name]), (mode, name)
    return done


class OnCpus:
    """Accelerate takes DDP for FSDP on CPUs, since they are not in its list of devices."""

    def __getattr__(self, name: str) -> Any:
        from accelerate.utils import DistributedType

        return getattr(DistributedType, "MULTI_CPU" if name == "MULTI_NEURON" else name)


def _trainers(rank: int, world: int, port: int, folder: Path) -> None:
    import accelerate.state

    as_torchrun(rank, world, port)
    accelerate_loop = example("accelerate_loop")
    whole = accelerate_loop.main(str(folder / "whole"))
    learned(whole, 0.8)
    begun = accelerate_loop.main(str(folder / "cut"), epochs=1)
    assert begun + accelerate_loop.main(str(folder / "cut")) == whole

    trainer = example("trainer")
    done = trained(trainer, folder / "ddp", "", lambda p: p.detach())
    assert type(done.model_wrapped).__name__ == "DistributedDataParallel"
    everywhere_the_same(done.model)

    accelerate.state.DistributedType = OnCpus()  # type: ignore[misc, assignment]
    done = trained(trainer, folder / "fsdp", "fsdp", lambda p: p.full_tensor())
    assert type(done.optimizer.optimizer).__name__ == "Lamb"


def test_accelerate_and_trainer_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    (tmp_path / "runs").mkdir()
    run_ranks(2, tmp_path, _trainers, free_port(), tmp_path / "runs", timeout=240)


def _deepspeed(rank: int, world: int, port: int, folder: Path) -> None:
    from pretraining.deepspeed_ops import load_shared_memory_op

    as_torchrun(rank, world, port)
    load_shared_memory_op()
    done = example("trainer").main(str(folder / "ds"), "deepspeed")
    learned([entry["loss"] for entry in done.state.log_history if "loss" in entry], 0.95)
    assert "DeepSpeedLamb" in repr(done.model_wrapped.basic_optimizer)
    everywhere_the_same(done.model)


def test_trainer_with_deepspeed_on_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    pytest.importorskip("transformers")
    (tmp_path / "runs").mkdir()
    run_ranks(2, tmp_path, _deepspeed, free_port(), tmp_path / "runs", timeout=240)


def test_lightning(tmp_path: Path) -> None:
    pytest.importorskip("lightning", reason="lightning is not installed (extra dev)")
    module = example("lightning_module")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    whole = module.main(str(tmp_path / "whole"), **quiet)
    assert whole.global_step == 128
    assert float(whole.callback_metrics["loss"]) < 1.2
    module.main(str(tmp_path / "cut"), epochs=1, **quiet)
    resumed = module.main(str(tmp_path / "cut"), **quiet)
    assert resumed.global_step == 128
    opt = resumed.optimizers[0]
    assert all(float(opt.state[p]["step"]) == 128 for p in resumed.model.parameters())


def test_torchtitan() -> None:
    """torchtitan itself where it is installed, else its contract."""
    if importlib.util.find_spec("torchtitan") is None:
        torchtitan_contract.install()
    module = example("torchtitan_container")
    losses, optimizers = module.main()
    learned(losses, 0.7)
    (opt,) = optimizers.optimizers
    assert type(opt).__name__ == "Lamb"
    assert [g["weight_decay"] for g in opt.param_groups] == [0.0, 0.01]
    assert [g["param_names"] for g in opt.param_groups] == [
        ["0.bias", "2.bias"],
        ["0.weight", "2.weight"],
    ]
    saved = {k: v.clone() if torch.is_tensor(v) else v for k, v in optimizers.state_dict().items()}
    assert float(saved["state.0.weight.step"]) == 40
    _, fresh = module.main(steps=0)
    fresh.load_state_dict(saved)
    (loaded,) = fresh.optimizers
    for group, other in zip(opt.param_groups, loaded.param_groups):
        for p, q in zip(group["params"], other["params"]):
            for name in ("step", "exp_avg", "exp_avg_sq"):
                assert torch.equal(opt.state[p][name], loaded.state[q][name])
