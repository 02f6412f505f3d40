"""What a rank holds, counted from the real buffers."""

from __future__ import annotations

import pytest
import torch
from benchmarking import workloads as shapes

from dist_lamb.rules import RULES
from dist_lamb.sharded import BUCKET_NUMEL
from dist_lamb.sharding.buffers import FlatBuffers
from dist_lamb.sharding.comm import Comm
from dist_lamb.sharding.layout import TILE, Layout
from dist_lamb.sharding.settings import Settings
from dist_lamb.sharding.shards import spec_of
from dist_lamb.state import Formats


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


@pytest.mark.parametrize("world", [1, 2, 4])
def test_narrow_states_in_bfloat16_are_2_p_and_8_p_over_w(world: int) -> None:
    """2 P + 8 P / W bytes at stage 2: the params, and a rank's gradients (2), moments (2 + 2) and
    remainders (2), counted from all tensors that the buffers hold; padding is below 0.5 %."""
    params = [torch.empty(s, dtype=torch.bfloat16) for s in shapes.bert_large()]
    numel = sum(map(shapes.numel, shapes.bert_large()))
    named = [(str(i), p) for i, p in enumerate(params)]
    formats = Formats("bfloat16", "remainder")
    rules, formats_of = dict.fromkeys(params, RULES["lamb"]), dict.fromkeys(params, formats)
    settings = Settings(
        stage=2, reduce_gradients=True, reduce_dtype=None, accumulate="local", overlap=True,
        overlap_gather=False, bucket_numel=BUCKET_NUMEL,
    )  # fmt: skip
    buffers = FlatBuffers.of(named, rules, formats_of, OneOf(world - 1, world), settings)
    held = {t.untyped_storage().data_ptr(): storage_nbytes(t) for t in buffers.buckets}
    for bank in buffers.banks.values():
        assert set(bank.states) == {"exp_avg", "exp_avg_sq", "remainder"}
        for t in (bank.grads, *bank.states.values()):
            held[t.untyped_storage().data_ptr()] = storage_nbytes(t)
    expected = 2 * numel + 8 * numel / world
    assert expected <= sum(held.values()) < 1.005 * expected
    # no other copy of anything: what a step works on lies in these
    for s in buffers.segments(range(len(params))):
        for t in (s.grad, s.x, *s.states, s.remainder):
            assert t is not None
            assert t.untyped_storage().data_ptr() in held
        assert s.copy is None
