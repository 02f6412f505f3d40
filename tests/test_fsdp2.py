"""Lamb under torch's fully_shard and tensor parallelism, and its state through torch's tools."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed.checkpoint as dcp
from dtensor_cases import assert_same, everything, placed, whole
from fsdp2_cases import Net, batch, lamb, sharded
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from dist_lamb import Lamb

pytestmark = pytest.mark.xdist_group("ranks")
WHOLE = StateDictOptions(full_state_dict=True)


def backward(net: nn.Module, t: int, rank: int) -> None:
    net(batch(t, rank)).backward()


def beside_a_whole_copy(
    net: Net, rank: int, backward: Callable[[nn.Module, int, int], None] = backward, steps: int = 5
) -> Lamb:
    """Train ``net``, and a copy of whole tensors with whole gradients: the same bits all along."""
    twin = {n: nn.Parameter(whole(p)) for n, p in net.named_parameters()}
    optimizer, names = lamb(net), {p: n for n, p in net.named_parameters()}
    straight = Lamb(
        [
            {**group, "params": [(names[p], twin[names[p]]) for p in group["params"]]}
            for group in lamb(net).param_groups
            if group.pop("param_names")
        ]
    )
    for t in range(steps):
        backward(net, t, rank)
        for n, p in net.named_parameters():
            twin[n].grad = None if p.grad is None else whole(p.grad)
        optimizer.step()
        straight.step()
        optimizer.zero_grad()
    assert_same(everything(dict(net.named_parameters()), optimizer), everything(twin, straight), "")
    assert any(isinstance(p, DTensor) for p in net.parameters())
    assert twin["blocks.0.gate"].any(), "zero-initialised tensors move"
    return optimizer


# --- every way of training -----------------------------------------------------------------------


def _accumulating(net: nn.Module, t: int, rank: int) -> None:
    net.set_requires_gradient_sync(False)  # type: ignore[operator]
    backward(net, t, rank)
    net.set_requires_gradient_sync(True)  # type: ignore[operator]
    backward(net, t + 50, rank)


def _clipped_by_torch(net: nn.Module, t: int, rank: int) -> None:
    backward(net, t, rank)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    assert float(whole(norm)) > 0.5


def _ways(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    beside_a_whole_copy(sharded(mesh), rank)
    beside_a_whole_copy(sharded(mesh), rank, _accumulating)
    beside_a_whole_copy(sharded(mesh), rank, _clipped_by_torch)
    beside_a_whole_copy(sharded(mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)), rank)
    net = sharded(mesh)
    for block in net.blocks:
        block.checkpointed = True
    beside_a_whole_copy(net, rank)
    # bf16 compute: params and gradients arrive in float32, so there are no masters
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    optimizer = beside_a_whole_copy(sharded(mesh, mp_policy=policy), rank)
    assert all("master" not in entry for entry in optimizer.state.values())
    # bf16 params: masters, sharded as the params are
    optimizer = beside_a_whole_copy(sharded(mesh, Net().bfloat16()), rank)
    masters: list[Any] = [entry["master"] for entry in optimizer.state.values() if entry]
    assert masters
    assert all(isinstance(m, DTensor) and m.dtype == torch.float32 for m in masters)
    _grad_scaler(rank, mesh)
    _moved(rank, mesh)
    _fsdp1_is_refused(mesh)


def _grad_scaler(rank: int, mesh: DeviceMesh) -> None:
    """torch.amp.GradScaler: an overflow on one rank skips the step and halves the scale on all."""
    net = sharded(mesh)
    optimizer = lamb(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(3):
        scaler.scale(net(batch(t, rank))).backward()
        grad: Any = net.embedding.weight.grad
        if t == 1 and rank == 1:
            grad.to_local()[0] = torch.inf
        before = whole(net.embedding.weight)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, whole(net.embedding.weight)) == (t == 1)
        assert scaler.get_scale() == (1024.0 if t == 0 else 512.0)
    assert float(optimizer.state[net.embedding.weight]["step"]) == 2


def _moved(rank: int, mesh: DeviceMesh) -> None:
    """Converting a model exchanges the contents of its DTensors, which torch refuses for tensors
    with weak references."""
    found = []
    for move in (False, True):
        torch.manual_seed(0)
        net = sharded(mesh)
        optimizer = lamb(net)
        for t in range(3):
            if move:
                net.to("cpu")
            backward(net, t, rank)
            optimizer.step()
            optimizer.zero_grad()
        found.append({n: whole(p) for n, p in net.named_parameters()})
        assert optimizer.trust_ratios().keys() == found[0].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    left = optimizer.param_groups[0]["params"].pop()
    del optimizer.param_groups[0]["param_names"]
    backward(net, 3, rank)
    left.grad = None
    optimizer.step()
    net.double()


def _fsdp1_is_refused(mesh: DeviceMesh) -> None:
    for use_orig_params in (True, False):
        net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        before = Lamb(net.named_parameters())
        wrapped = FullyShardedDataParallel(
            net, device_id=torch.device("cpu"), use_orig_params=use_orig_params
        )
        with pytest.raises(RuntimeError, match=r"cannot optimize .*FSDP1.*fully_shard"):
            Lamb(wrapped.named_parameters())
        if use_orig_params:  # then optimizers may be made before wrapping
            wrapped(torch.ones(2, 5)).sum().backward()
            with pytest.raises(RuntimeError, match=r"cannot step .*FSDP1.*fully_shard"):
                before.step()


def test_ways_of_training(tmp_path: Path) -> None:
    """Each beside a copy of whole tensors: the same bits, with real gradients."""
    run_ranks(3, tmp_path, _ways)


def _two_axes(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    beside_a_whole_copy(sharded(mesh), rank)
    # FSDP over TP: strided shards, params replicated over the TP axis (the bias of "down", and on
    # a 1-D mesh of their own what is not in the plan)
    net = Net(hidden=14)
    for block in net.blocks:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(block, mesh["inner"], plan)
    optimizer = beside_a_whole_copy(sharded(mesh["outer"], net), rank // 2)
    strided = [p for p in net.parameters() if "Strided" in repr(p.placements)]  # type: ignore[attr-defined]
    assert len(strided) == 6
    assert all(p in optimizer.state for p in strided)
    # TP alone: replicated norm weights get partial gradients, and the rest is plain tensors
    net_of_tp = Net(hidden=14)
    for block in net_of_tp.blocks:
        plan = {
            "norm": SequenceParallel(use_local_output=True),
            "up": ColwiseParallel(),
            "down": RowwiseParallel(),
        }
        parallelize_module(block, mesh["inner"], plan)
    beside_a_whole_copy(net_of_tp, 0)
    # the state of strided shards: whole tensors in, the same pieces out
    packed = optimizer.state_dict()
    full = {
        i: {k: whole(v) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for i, entry in packed["state"].items()
    }
    other = lamb(net)
    other.load_state_dict({**packed, "state": full})
    for p in net.parameters():
        for k, v in optimizer.state[p].items():
            got = other.state[p][k]
            if isinstance(v, DTensor):
                assert got.placements == v.placements
                got, v = got.to_local(), v.to_local()
            assert torch.equal(got, v)


# --- state ---------------------------------------------------------------------------------------


def _train(net: nn.Module, optimizer: Lamb, steps: range) -> None:
    """With gradients from a whole twin: means over 4 ranks and over 2 differ in their last bits."""
    for t in steps:
        twin = Net()
        twin.load_state_dict({n: whole(p) for n, p in net.state_dict().items()})
        backward(twin, t, 0)
        for p, like in zip(net.parameters(), twin.parameters()):
            p.grad = like.grad
            if isinstance(p, DTensor) and like.grad is not None:
                p.grad = placed(like.grad, p.device_mesh, p.placements)
        optimizer.step()
        optimizer.zero_grad()


def _state(net: nn.Module, optimizer: Lamb) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(net),
        "optimizer": get_optimizer_state_dict(net, optimizer),
    }


def _four_ranks(rank: int, world: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    _two_axes(rank)
    return _save(world, folder)


def _save(world: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    net = sharded(init_device_mesh("cpu", (world,)))
    optimizer = lamb(net)
    # asked for before the first step, torch makes one of its own: it must leave no trace
    get_optimizer_state_dict(net, optimizer)
    _train(net, optimizer, range(3))
    dcp.save(_state(net, optimizer), checkpoint_id=folder)
    full = {
        "model": get_model_state_dict(net, options=WHOLE),
        "optimizer": get_optimizer_state_dict(net, optimizer, options=WHOLE),
    }
    ours = optimizer.full_optimizer_state_dict()
    for i, name in enumerate(n for g in ours["param_groups"] for n in g["param_names"]):
        by_name = full["optimizer"]["state"][name]
        assert ours["state"][i].keys() == by_name.keys()
        assert_same(ours["state"][i], by_name, name)
    # In every state dict of torch plain tensors, here "step", are the live ones; and torch's
    # helpers put what they load, sharded, into the dict they were given.
    kept = copy.deepcopy(full)
    _train(net, optimizer, range(3, 6))
    found = everything(dict(net.named_parameters()), optimizer)
    # whole tensors -> a fresh sharded pair, through torch's helpers
    other_net = sharded(init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner")))
    other = lamb(other_net)
    full = copy.deepcopy(kept)
    set_model_state_dict(other_net, full["model"], options=WHOLE)
    set_optimizer_state_dict(other_net, other, full["optimizer"], options=WHOLE)
    _train(other_net, other, range(3, 6))
    assert_same(everything(dict(other_net.named_parameters()), other), found, "helpers")
    return found, kept


def _load(rank: int, world: int, folder: Path, want: dict[str, Tensor]) -> None:
    net = sharded(init_device_mesh("cpu", (world,)))
    optimizer = lamb(net)
    state = _state(net, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(net, state["model"])
    set_optimizer_state_dict(net, optimizer, state["optimizer"])
    _train(net, optimizer, range(3, 6))
    assert_same(everything(dict(net.named_parameters()), optimizer), want, "4 -> 2 ranks")


def test_two_axes_and_state_that_moves(tmp_path: Path) -> None:
    """State saved by 4 ranks goes on with the same bits on 2, on 2 x 2, and in one process."""
    folder = tmp_path / "saved"
    ranks = run_ranks(4, tmp_path, _four_ranks, folder, timeout=240)
    found, full = ranks[0]
    run_ranks(2, tmp_path, _load, folder, found)
    net = Net()
    optimizer = lamb(net)
    set_model_state_dict(net, full["model"])
    set_optimizer_state_dict(net, optimizer, full["optimizer"])
    _train(net, optimizer, range(3, 6))
    assert_same(everything(dict(net.named_parameters()), optimizer), found, "one process")
    assert models.digest(found) == models.digest(ranks[3][0])
