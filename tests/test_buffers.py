"""dist_lamb/sharding/buffers.py: params, gradients and state in flat buffers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from ranks import WORLDS, each_world, run_ranks
from sharded_cases import OPTIONS, state_of, train
from torch import Tensor, nn

from dist_lamb import ShardedLamb
from dist_lamb.rules import RULES
from dist_lamb.sharding.buffers import FlatBuffers
from dist_lamb.sharding.comm import Comm
from dist_lamb.sharding.layout import TILE, Layout
from dist_lamb.sharding.shards import spec_of
from dist_lamb.state import states_of

pytestmark = pytest.mark.xdist_group("ranks")


def _replaced_memory(rank: int, world: int) -> None:
    """Somebody replaces p.data (loaders, .to()): values are taken over, other tensors refused."""
    for dtype in (torch.float32, torch.bfloat16):
        runs = []
        for replaced in ("none", "all", "some"):
            params = models.make_params(dtype)
            more = (torch.full((5,), i / 20, dtype=dtype) for i in range(20))
            params |= {f"more{i}": torch.nn.Parameter(t) for i, t in enumerate(more)}
            optimizer = ShardedLamb(models.groups_of(params), **OPTIONS)
            for t in range(3):
                for i, p in enumerate(params.values()):
                    if replaced == "all" or (replaced == "some" and i == 1):
                        p.data = p.data.clone()
                train(optimizer, params, rank, world, range(t, t + 1))
            runs.append(models.digest(params))
        assert len(set(runs)) == 1
        params["emb.weight"].data = params["emb.weight"].data.double()
        with pytest.raises(RuntimeError, match=r"emb.weight was \(97, 64\) torch\.\w+ .*float64"):
            optimizer.step()


def _negative_zero_gradients(rank: int, world: int) -> None:
    """A gradient of -0.0 is a gradient: decay shrinks the param, and its step counts."""
    for reduce_gradients in (True, False):
        params = models.make_params()
        before = params["emb.weight"].detach().clone()
        optimizer = ShardedLamb(models.groups_of(params), lr=0.1, reduce_gradients=reduce_gradients)
        params["emb.weight"].grad = torch.full_like(params["emb.weight"], -0.0)
        optimizer.step()
        # rho = ||x|| / ||wd x||: by exactly 1 - lr, whatever wd is
        torch.testing.assert_close(params["emb.weight"].detach(), before * 0.9)
        assert float(optimizer.state[params["emb.weight"]]["step"]) == 1
        assert float(optimizer.state[params["fc.weight"]]["step"]) == 0


def _channels_last(rank: int, world: int) -> None:
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(1)
        p = torch.nn.Parameter(torch.randn(16, 32, 3, 3).to(memory_format=memory_format))
        optimizer = ShardedLamb([("w", p)], lr=0.1)
        for t in range(3):
            generator = torch.Generator().manual_seed(t)
            p.grad = torch.randint(-99, 99, p.shape, generator=generator) / 64.0
            optimizer.step()
        assert p.is_contiguous(memory_format=memory_format)
        runs.append((p.detach(), state_of(optimizer)["w exp_avg"]))
    torch.testing.assert_close(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def _half(rank: int, world: int) -> dict[str, Any]:
    """bfloat16 gradients that travel, and add up, in float32."""
    found = {}
    for name, options in {
        "own": {},
        "reduce_dtype": {"reduce_dtype": torch.float32},
        "sharded": {"accumulate": "sharded"},
    }.items():
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(3000, dtype=torch.bfloat16))
        optimizer = ShardedLamb([p], **options)
        for t in range(2):
            for k in range(4):
                # 1 + 4 * 2^-9 has more bits than bfloat16; the gradients of each rank have not
                with optimizer.no_sync():
                    (p.sum() * (2.0**-9 if (k + rank) % 4 else 1.0)).backward()
            p_sum = p.sum() * 0.0
            p_sum.backward()
            optimizer.step()
            if t == 0:
                first = optimizer._kept.buffers.shards[0]  # type: ignore[union-attr]
                found[name] = (str(first.grads.dtype), float(first.grads.view(-1)[0]))
            optimizer.zero_grad()
    return found


def test_reduce_dtype(tmp_path: Path) -> None:
    for found in run_ranks(2, tmp_path, _half):
        assert found["own"][0] == "torch.bfloat16"
        assert found["reduce_dtype"][0] == found["sharded"][0] == "torch.float32"


def _through_the_optimizer(rank: int, world: int) -> None:
    for check in (_replaced_memory, _negative_zero_gradients, _channels_last):
        check(rank, world)
        dist.barrier()


def test_params_and_gradients_in_the_buffers(tmp_path: Path) -> None:
    """Memory that was replaced, -0.0 beside absent gradients, and other memory formats."""
    run_ranks(3, tmp_path, _through_the_optimizer)


def _params() -> dict[str, Tensor]:
    """Sizes around a tile, two dtypes, and a memory format that is not the usual one."""
    params = models.make_params()
    params |= {f"{n} half": p for n, p in models.make_params(torch.bfloat16, seed=1).items()}
    conv = torch.randn(40, 24, 3, 3, generator=torch.Generator().manual_seed(2))
    params["conv"] = nn.Parameter(conv.to(memory_format=torch.channels_last))
    return params


def _buffers_of(params: dict[str, Tensor], comm: Comm) -> FlatBuffers:
    layout = Layout.plan([spec_of(n, p) for n, p in params.items()], comm.world_size, 2**13)
    assert len(layout.buckets) > 2
    return FlatBuffers(layout, list(params.values()), comm)


def _paddings(buffers: FlatBuffers, rank: int) -> Iterator[Tensor]:
    """Everything in the buffers that belongs to no param."""
    for bucket, whole in zip(buffers.layout.buckets, buffers.buckets):
        rest = whole.clone()
        for i, first in zip(bucket.params, bucket.first_tiles):
            rest[first * TILE :][: buffers.layout.params[i].numel] = 0.0
        yield rest
    for n, shard in enumerate(buffers.shards):
        for t in (shard.grads, *shard.states.values()):
            rest = t.reshape(-1).clone()
            for extent in buffers.layout.extents(rank):
                if extent.bucket == n:
                    rest[extent.shard_start :][: extent.numel] = 0.0
            yield rest


def _state_survives(rank: int, group: Any) -> None:
    params = _params()
    before = {n: p.detach().clone() for n, p in params.items()}
    comm = Comm(group)
    buffers = _buffers_of(params, comm)
    generator = torch.Generator().manual_seed(3)
    given = {
        i: {
            name: torch.randn(p.shape, generator=generator)
            for name in states_of(p.dtype, RULES["lamb"])
        }
        for i, p in enumerate(params.values())
    }
    for i, state in given.items():
        buffers.load_state(i, state)
        for name, piece in buffers.local_state(i).items():
            assert piece.numel() <= given[i][name].numel()
    keeper = comm.world_size - 1
    for name in ("exp_avg", "exp_avg_sq", "master"):
        found = buffers.gather_state(name, keep=comm.rank == keeper)
        # a param without elements is in no bucket
        expected = {i: s[name] for i, s in given.items() if name in s and s[name].numel()}
        assert sorted(found) == (sorted(expected) if comm.rank == keeper else [])
        assert all(torch.equal(found[i], expected[i]) for i in found), name
    # what is not given: moments are zero, a master is the param's present value
    for i in given:
        buffers.load_state(i, {})
    for name in ("exp_avg", "exp_avg_sq", "master"):
        for i, value in buffers.gather_state(name, keep=True).items():
            p = buffers.params[i].detach()
            assert torch.equal(value, p.float() if name == "master" else torch.zeros(p.shape))
    assert not any(padding.any() for padding in _paddings(buffers, comm.rank))
    # the params are what they were, in their memory formats, and have their own memory again
    buffers.release_params()
    for whole in buffers.buckets:
        whole.fill_(7.0)
    for name, p in params.items():
        assert torch.equal(p.detach(), before[name])
        assert p.stride() == before[name].stride()


def _trained(rank: int, group: Any) -> None:
    """Padding stays zero through steps with decay, absent gradients and clipping."""
    for options in ({"stage": 1}, {"stage": 2}):
        params = _params()
        optimizer = ShardedLamb(
            models.groups_of(params), bucket_numel=2**13, process_group=group, **OPTIONS, **options
        )
        train(optimizer, params, rank, dist.get_world_size(group))
        assert optimizer._kept is not None
        buffers = optimizer._kept.buffers
        assert buffers.shards[0].states["exp_avg"].any() or not buffers.shards[0].tiles
        assert sum(t.numel() for t in _paddings(buffers, dist.get_rank(group))) > 0
        assert not any(padding.any() for padding in _paddings(buffers, dist.get_rank(group)))


def _state_and_padding(rank: int, group: Any) -> None:
    _state_survives(rank, group)
    _trained(rank, group)


def test_state_survives_and_padding_stays_zero(tmp_path: Path) -> None:
    """Of every param, at W = 1, 2, 3, 4: cut by shards, in both dtypes, channels_last."""
    found = run_ranks(WORLDS[-1], tmp_path, each_world, _state_and_padding)
    assert [sorted(worlds) for worlds in found] == [[w for w in WORLDS if r < w] for r in range(4)]
