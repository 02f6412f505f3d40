"""Checkpoints across engines and numbers of ranks, on gloo: the same bits everywhere."""

from __future__ import annotations

import random
import resource
import signal
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from checkpoint_cases import module_of
from ranks import run_ranks
from sharded_cases import OPTIONS, state_of, train
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dist_lamb import Lamb, ShardedLamb, checkpoint, param_groups
from dist_lamb.checkpoint import CheckpointError

DTYPES = (torch.float32, torch.bfloat16)


def make(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """The shapes that hurt, and a convolution whose memory is not in the order of its dims."""
    params = models.make_params(dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    conv = torch.randn(40, 24, 3, 3, generator=generator).to(dtype)
    params["conv.weight"] = nn.Parameter(conv.to(memory_format=torch.channels_last))
    return params


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], where: Any) -> None:
    """Lamb has no state for a param without a gradient; elsewhere it is zero."""
    for key, value in expected.items():
        if key in found:
            assert found[key].dtype == value.dtype, (where, key)
            assert torch.equal(found[key], value), (where, key)
        else:
            assert key.endswith("master") or not value.any(), (where, key)
    assert len(found) > len(expected) // 2


def whole(optimizer: Any) -> dict[str, Tensor]:
    def full(t: Tensor) -> Tensor:
        return t.full_tensor() if isinstance(t, DTensor) else t

    return {key: full(value) for key, value in state_of(optimizer).items()}


def digest(params: dict[str, Tensor]) -> str:
    full = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in params.items()}
    return models.digest(full)


# --- engines and numbers of ranks ----------------------------------------------------------------


def _reshard(rank: int, world: int, folder: str) -> str:
    for dtype in DTYPES:
        run = f"{folder}/{dtype}"
        params = make(dtype)
        optimizer = ShardedLamb(models.groups_of(params), bucket_numel=2**13, **OPTIONS)
        train(optimizer, params, rank, world, range(3))
        expected, before = whole(optimizer), digest(params)
        checkpoint.save(run, 3, module_of(params), optimizer, extra={"tokens": 1})
        train(optimizer, params, rank, world, range(3, 5))
        after = digest(params), models.digest(whole(optimizer))

        for w in (1, 2, 3, 4):
            group = dist.new_group(list(range(w)))
            if rank < w:
                fresh = make(dtype, seed=9 + rank)
                model = module_of(fresh)
                model.seen.zero_()
                other = ShardedLamb(
                    models.groups_of(fresh), stage=1, process_group=group, **OPTIONS
                )
                found = checkpoint.load(run, model, other, process_group=group)
                assert (found.step, found.world_size, found.extra) == (3, 4, {"tokens": 1})
                assert digest(fresh) == before
                assert int(model.seen) == 7
                compare(whole(other), expected, (dtype, w))
                train(other, fresh, rank, w, range(3, 5))
                assert digest(fresh) == after[0], (dtype, w)
                assert w < 4 or models.digest(whole(other)) == after[1]
            dist.barrier()

        alone = dist.new_group([0])
        if rank == 0:
            fresh = make(dtype, seed=9)
            plain = Lamb(models.groups_of(fresh), **OPTIONS)
            checkpoint.load(run, module_of(fresh), plain, process_group=alone)
            assert digest(fresh) == before
            compare(whole(plain), expected, (dtype, "Lamb"))
            train(plain, fresh, 0, 1, range(3, 5))
            torch.testing.assert_close(fresh["conv.weight"], params["conv.weight"])
            bare = make(dtype, seed=8)
            plain = Lamb(models.groups_of(bare), **OPTIONS)
            train(plain, bare, 0, 1, range(2))
            checkpoint.save(run, 4, module_of(bare), plain, process_group=alone)
        dist.barrier()
        # and back: what one Lamb wrote, into four ranks; it has no state of what has no gradient
        fresh = make(dtype, seed=rank)
        back = ShardedLamb(models.groups_of(fresh), **OPTIONS)
        train(back, fresh, rank, world, range(1))
        back.state[fresh["tile.weight"]]["exp_avg"].fill_(5.0)
        checkpoint.load(f"{run}/step-4", module_of(fresh), back)
        saved = checkpoint.Checkpoint(f"{run}/step-4")
        assert "optimizer.tile.weight.exp_avg" not in saved.tensors
        for name, p in fresh.items():
            assert torch.equal(p, saved.tensor(f"model.{name}")), name
        for key, value in whole(back).items():
            name, kind = key.split()
            if f"optimizer.{name}.{kind}" in saved.tensors:
                assert torch.equal(value, saved.tensor(f"optimizer.{name}.{kind}")), key
            elif kind == "master":
                assert torch.equal(value, fresh[name].float()), key
            else:
                assert not value.any(), key
    return "ok"


@pytest.mark.xdist_group("ranks")
def test_every_number_of_ranks_and_back(tmp_path: Path) -> None:
    """Saved at W = 4, loaded at 1, 2, 3, 4 and by Lamb; the run goes on with the same bits."""
    assert run_ranks(4, tmp_path, _reshard, str(tmp_path / "run")) == ["ok"] * 4


def _placements(p: Tensor, mesh: Any) -> list[Any]:
    cut = Shard(1) if p.ndim > 1 and p.shape[0] == 33 else Shard(0) if p.ndim else Replicate()
    return [cut] if mesh.ndim == 1 else [Replicate(), cut]


def _sharded_as_dtensors(params: dict[str, Tensor], mesh: Any) -> dict[str, Tensor]:
    return {
        n: nn.Parameter(distribute_tensor(p.detach().contiguous(), mesh, _placements(p, mesh)))
        for n, p in params.items()
    }


def _dtensors(rank: int, world: int, folder: str) -> str:
    flat, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    for dtype in DTYPES:
        run = f"{folder}/{dtype}"
        params = make(dtype)
        optimizer = ShardedLamb(models.groups_of(params), **OPTIONS)
        train(optimizer, params, rank, world, range(2))
        checkpoint.save(run, 2, module_of(params), optimizer)
        for number, mesh in enumerate((flat, grid)):
            sharded = _sharded_as_dtensors(make(dtype, seed=5), mesh)
            lamb = Lamb(models.groups_of(sharded), **OPTIONS)
            checkpoint.load(f"{run}/step-2", module_of(sharded), lamb)
            assert isinstance(lamb.state[sharded["emb.weight"]]["exp_avg"], DTensor)
            assert digest(sharded) == digest(params)
            compare(whole(lamb), whole(optimizer), (dtype, mesh))
            # and back, after a step: replicas are written once
            for name, g in models.mean_gradients(make(dtype), 2).items():
                p = sharded[name]
                p.grad = distribute_tensor(g, mesh, p.placements)  # type: ignore[attr-defined]
            lamb.step()
            save = checkpoint.save_async if number else checkpoint.save
            save(run, 3 + number, module_of(sharded), lamb)
            checkpoint.wait()
            dist.barrier()
            fresh = make(dtype, seed=6)
            back = ShardedLamb(models.groups_of(fresh), **OPTIONS)
            found = checkpoint.load(run, module_of(fresh), back)
            assert found.step == 3 + number
            assert digest(fresh) == digest(sharded)
            compare(whole(lamb), whole(back), (dtype, mesh))
    _fully_sharded(rank, world, folder)
    return "ok"


def _net() -> nn.Module:
    torch.manual_seed(dist.get_rank())
    return nn.Sequential(nn.Linear(7, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 5))


def _backward(net: nn.Module) -> None:
    net(torch.arange(56.0).view(8, 7) / 56).square().mean().backward()


def _fully_sharded(rank: int, world: int, folder: str) -> None:
    """FSDP2 itself: from ShardedLamb into fully_shard, on for a step, and back."""
    net = _net()
    optimizer = ShardedLamb(net, lr=0.1)
    _backward(net)
    optimizer.step()
    checkpoint.save(f"{folder}/fsdp", 1, net, optimizer)
    sharded = _net()
    for layer in (sharded[0], sharded[3], sharded):
        fully_shard(layer)
    lamb = Lamb(param_groups(sharded, no_decay=[], weight_decay=0.01), lr=0.1)
    checkpoint.load(f"{folder}/fsdp", sharded, lamb)
    for (name, p), q in zip(net.named_parameters(), sharded.parameters()):
        assert torch.equal(p, q.full_tensor()), name  # type: ignore[attr-defined]
        assert torch.equal(
            optimizer.full_optimizer_state_dict()["state"][
                [n for n, _ in net.named_parameters()].index(name)
            ]["exp_avg"],
            lamb.state[q]["exp_avg"].full_tensor(),
        )
    _backward(sharded)
    lamb.step()
    checkpoint.save(f"{folder}/fsdp", 2, sharded, lamb)
    again = _net()
    checkpoint.load(f"{folder}/fsdp", again, ShardedLamb(again, lr=0.5))
    for p, q in zip(again.parameters(), sharded.parameters()):
        assert torch.equal(p, q.full_tensor())  # type: ignore[attr-defined]


@pytest.mark.xdist_group("ranks")
def test_dtensors_and_back(tmp_path: Path) -> None:
    """Into Lamb on DTensors, on one and on two mesh axes, and into FSDP2, and back."""
    assert run_ranks(4, tmp_path, _dtensors, str(tmp_path / "run")) == ["ok"] * 4


# --- what else is restored, and what is refused, on several ranks --------------------------------


class _TakesNothing:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise TypeError("takes nothing")


class _Counter:
    """Something with a state; ``refuse`` lets loading fail."""

    def __init__(self, value: int, refuse: bool = False) -> None:
        self.value, self.refuse = value, refuse

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.refuse and state_dict["value"] != self.value:
            raise ValueError("of other data")
        self.value = state_dict["value"]


def _build(seed: int = 0, **options: Any) -> tuple[dict[str, Tensor], nn.Module, ShardedLamb]:
    params = make(torch.bfloat16, seed)
    return params, module_of(params), ShardedLamb(models.groups_of(params), **(OPTIONS | options))


def _features(rank: int, world: int, folder: str) -> str:
    for check in (
        _beside_the_training,
        _torch_state_dicts,
        _errors_reach_every_rank,
        _disk_full_on_one_rank,
        _schedule_and_random_numbers,
        _nothing_is_changed,
    ):
        check(rank, world, f"{folder}/{check.__name__}")
        dist.barrier()
    return "ok"


@pytest.mark.xdist_group("ranks")
def test_features(tmp_path: Path) -> None:
    assert run_ranks(3, tmp_path, _features, str(tmp_path / "run")) == ["ok"] * 3


def _beside_the_training(rank: int, world: int, folder: str) -> None:
    """Training goes on during save_async; what is saved is the state at the call."""
    params, model, optimizer = _build()
    for step in range(1, 5):
        train(optimizer, params, rank, world, range(step - 1, step))
        was = digest(params), models.digest(whole(optimizer))
        pending = checkpoint.save_async(folder, step, model, optimizer, keep=2)
        train(optimizer, params, rank, world, range(step, step + 3))
        assert digest(params) != was[0]
        assert pending.wait() == Path(folder, f"step-{step}")
        checkpoint.load(folder, model, optimizer)
        assert (digest(params), models.digest(whole(optimizer))) == was
    # one at a time: the second waits for the first; all are there in the end
    for step in (5, 6, 7):
        checkpoint.save_async(folder, step, model, optimizer, keep=2)
    checkpoint.wait()
    dist.barrier()
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-6", "step-7"]


@pytest.mark.slow
def test_save_async_holds_training_up_little(tmp_path: Path) -> None:
    """Of the quickstart's model, less than a fifth of what a save takes; prints both."""
    from manual.time_saves import ROOT, measure

    config = str(ROOT / "configs" / "quickstart.toml")
    found = run_ranks(2, tmp_path, measure, str(tmp_path / "run"), config, 9, "cpu")
    print(found)
    assert all(blocked < 0.2 * save for save, blocked, _ in found)


def _torch_state_dicts(rank: int, world: int, folder: str) -> None:
    """Whole on one rank alone; and what AdamW has gathered is a start for ShardedLamb."""
    params, _, optimizer = _build()
    train(optimizer, params, rank, world, range(2))
    every, one = optimizer.full_optimizer_state_dict(), optimizer.full_state_dict(to=1)
    assert bool(one) == (rank == 1)
    for i, entry in one.get("state", {}).items():
        assert entry.keys() == every["state"][i].keys()
        assert all(torch.equal(value, every["state"][i][key]) for key, value in entry.items())
        assert all(value.device.type == "cpu" for value in entry.values())

    theirs = make(torch.float32)
    adam = torch.optim.AdamW(models.groups_of(theirs), lr=0.3)
    for t in range(2):
        for name, g in models.mean_gradients(theirs, t).items():
            theirs[name].grad = g
        adam.step()
    ours = {name: nn.Parameter(p.detach().clone()) for name, p in theirs.items()}
    lamb = ShardedLamb(models.groups_of(ours), lr=0.1)
    lamb.load_state_dict(adam.state_dict())
    found = state_of(lamb)
    for name, p in theirs.items():
        for key, value in adam.state[p].items() if p.numel() else ():
            assert torch.equal(found[f"{name} {key}"], value), (name, key)
    assert lamb.param_groups[0]["lr"] == 0.3
    assert lamb.param_groups[1]["trust_clip"] == (0.01, 5.0)
    train(lamb, ours, rank, world, range(2, 3))


def _errors_reach_every_rank(rank: int, world: int, folder: str) -> None:
    _, model, optimizer = _build()
    checkpoint.save(folder, 1, model, optimizer)
    with pytest.raises(CheckpointError, match="step-1 is there already"):
        checkpoint.save(folder, 1, model, optimizer)
    extra = {"a": [1, object()]} if rank == 1 else None
    with pytest.raises(CheckpointError, match=r"extra.a\[1\] is a object, .* \(on rank 1\)"):
        checkpoint.save(folder, 2, model, optimizer, extra=extra)
    # of one that runs beside the training: at the next save, and once
    checkpoint.save_async(folder, 2, model, optimizer, extra=extra)
    with pytest.raises(CheckpointError, match=r"extra.a\[1\] is a object"):
        checkpoint.save(folder, 3, model, optimizer)
    checkpoint.wait()
    with pytest.raises(CheckpointError, match="rank-0/nothing: no checkpoint here"):
        checkpoint.load(f"{folder}/rank-{rank}/nothing", model, optimizer)
    assert checkpoint.latest(folder) == Path(folder, "step-1")


def _disk_full_on_one_rank(rank: int, world: int, folder: str) -> None:
    """The system refuses rank 1's bytes half way: an error everywhere, nothing left behind."""
    params, model, optimizer = _build()
    train(optimizer, params, rank, world, range(1))
    checkpoint.save(folder, 1, model, optimizer)
    was = digest(params)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(optimizer, params, rank, world, range(1, 2))
    if rank == 1:  # from here on: the ranks' own store is a file too
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    message = r"rank-1\.bin: File too large \(on rank 1\)"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(folder, 2, model, optimizer)
    pending = checkpoint.save_async(folder, 2, model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        pending.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)
    dist.barrier()
    assert {path.name for path in Path(folder).iterdir()} == {"step-1", ".owner-1"}
    checkpoint.load(folder, model, optimizer)
    assert digest(params) == was
    with pytest.raises(CheckpointError, match=r"the ranks save different steps: \[2, 3\]"):
        checkpoint.save(folder, 2 + rank % 2, model, optimizer)
    checkpoint.save(folder, 2, model, optimizer)


def _schedule_and_random_numbers(rank: int, world: int, folder: str) -> None:
    import numpy as np

    params, model, optimizer = _build(lr=torch.tensor(0.5))
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    train(optimizer, params, rank, world, range(1))
    for _ in range(2):
        schedule.step()
    counter = _Counter(rank + 10)
    states = {"lr": schedule, "data": counter}
    torch.manual_seed(rank)
    random.seed(rank)
    np.random.seed(rank)
    checkpoint.save(folder, 1, model, optimizer, stateful=states, extra=(1, {"x": float("inf")}))
    drawn = torch.rand(3), random.random(), np.random.rand()

    params, model, optimizer = _build(seed=3, lr=torch.tensor(0.5))
    lr = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    counter = _Counter(0)
    found = checkpoint.load(folder, model, optimizer, stateful={"lr": schedule, "data": counter})
    assert found.extra == (1, {"x": float("inf")})
    assert counter.value == 10  # rank 0's
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.05)
    schedule.step()
    assert float(lr) == pytest.approx(0.005)
    again = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]
    # other ranks than those that wrote: left alone
    group = dist.new_group([0, 1])
    if rank < 2:
        torch.manual_seed(77)
        expected = torch.rand(3)
        torch.manual_seed(77)
        net = make(torch.bfloat16, 3)
        small = ShardedLamb(models.groups_of(net), process_group=group, **OPTIONS)
        checkpoint.load(folder, module_of(net), small, process_group=group)
        assert torch.equal(torch.rand(3), expected)
    dist.barrier()


def _nothing_is_changed(rank: int, world: int, folder: str) -> None:
    """A load that is refused, on one rank or on all, leaves params, state and options alone."""
    params, model, optimizer = _build()
    train(optimizer, params, rank, world, range(2))
    checkpoint.save(folder, 2, model, optimizer, stateful={"a": _Counter(1), "b": _Counter(2)})

    params, model, optimizer = _build(seed=4, lr=0.3)
    train(optimizer, params, rank, world, range(1))
    was = digest(params), models.digest(whole(optimizer)), repr(optimizer)
    a, b = _Counter(7), _Counter(8, refuse=rank == 1)
    with pytest.raises(CheckpointError, match=r"step-2: b: of other data \(on rank 1\)"):
        checkpoint.load(folder, model, optimizer, stateful={"a": a, "b": b})
    assert (a.value, b.value) == (7, 8)
    # One that does not even take back what it gave.
    with pytest.raises(CheckpointError, match="step-2: b: takes nothing"):
        checkpoint.load(folder, model, optimizer, stateful={"a": a, "b": _TakesNothing()})
    assert a.value == 7
    with pytest.raises(CheckpointError, match="stateful 'a' is of type int, which has no "):
        checkpoint.save(folder, 3, model, optimizer, stateful={"a": 1})  # type: ignore[dict-item]
    alone = [dist.new_group([each]) for each in range(world)][rank]
    with pytest.raises(CheckpointError, match="state is cut over 3 ranks, but process_group has 1"):
        checkpoint.save(f"{folder} {rank}", 3, model, optimizer, process_group=alone)
    cut, mesh = nn.Linear(6, 6, bias=False), init_device_mesh("cpu", (world,))
    cut.weight = nn.Parameter(distribute_tensor(cut.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(CheckpointError, match=r"model\.weight is cut over 3 ranks, but process_gr"):
        checkpoint.save(f"{folder} {rank}", 3, cut, process_group=alone)
    with pytest.raises(CheckpointError, match="step-2: has no state of c"):
        checkpoint.load(folder, model, optimizer, stateful={"c": a})
    optimizer.param_groups[1]["weight_decay"] = 0.25
    with pytest.raises(
        CheckpointError, match=r"weight_decay of parameter group 1 is 0\.0, here it is 0\.25"
    ):
        checkpoint.load(folder, model, optimizer)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    damaged = Path(folder, "step-2", "rank-2.bin")
    data = damaged.read_bytes()
    dist.barrier()
    if rank == 0:
        damaged.write_bytes(data[:999] + bytes([data[999] ^ 1]) + data[1000:])
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"rank-2\.bin: damaged: its SHA-256"):
        checkpoint.load(folder, model, optimizer)
    assert (digest(params), models.digest(whole(optimizer)), repr(optimizer)) == was
