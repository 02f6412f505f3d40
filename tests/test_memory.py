"""What a rank holds, counted from the real buffers."""

from __future__ import annotations

import torch
from benchmarking import workloads as shapes

from dist_lamb.sharded import BUCKET_NUMEL
from dist_lamb.sharding.buffers import FlatBuffers, spec_of
from dist_lamb.sharding.comm import Comm
from dist_lamb.sharding.layout import TILE, Layout


class OneOf(Comm):
    """Rank ``rank`` of ``world_size``, with nobody to talk to."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size


def storage_nbytes(t: torch.Tensor) -> int:
    return t.untyped_storage().nbytes()


def test_bert_large_moments_are_8_bytes_a_param_over_the_ranks() -> None:
    """8*P/W bytes of moments per rank, and less than 0.5 % of padding."""
    world = 8
    params = [torch.empty(s, dtype=torch.bfloat16) for s in shapes.bert_large()]
    numel = sum(map(shapes.numel, shapes.bert_large()))
    specs = [spec_of(str(i), p) for i, p in enumerate(params)]
    layout = Layout.plan(specs, world, BUCKET_NUMEL)
    for rank in (0, world - 1):
        buffers = FlatBuffers(layout, params, OneOf(rank, world))
        (bank,) = buffers.banks.values()
        moments = sum(storage_nbytes(bank.states[name]) for name in ("exp_avg", "exp_avg_sq"))
        assert 8 * numel / world <= moments < 8 * numel / world * 1.005
        assert storage_nbytes(bank.states["master"]) == moments // 2
        assert bank.states["exp_avg"].shape[1] == TILE
        # the params' own memory is the buckets and nothing else
        held = {p.untyped_storage().data_ptr(): storage_nbytes(p) for p in params}
        assert 2 * numel <= sum(held.values()) < 2 * numel * 1.005
