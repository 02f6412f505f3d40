"""The tile layout, for any params, world size and bucket size."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lamb.sharding.layout import TILE, Bucket, Layout, ParamSpec


def spec(name: str, numel: int, dtype: str = "torch.float32") -> ParamSpec:
    return ParamSpec(name=name, shape=(numel,), stride=(1,), dtype=dtype)


sizes = st.one_of(
    st.integers(0, 3),
    st.integers(TILE - 2, TILE + 2),
    st.integers(0, 20 * TILE),
    st.sampled_from([2 * TILE, 7 * TILE, 64 * TILE]),
)
params = st.lists(
    st.tuples(sizes, st.sampled_from(["torch.float32", "torch.bfloat16"])), max_size=12
)
worlds = st.integers(1, 9)
bucket_numels = st.sampled_from([1, TILE, 10 * TILE, 2**24])


def make(sized: list[tuple[int, str]], world: int, bucket_numel: int) -> Layout:
    specs = [spec(f"p{i}", n, dtype) for i, (n, dtype) in enumerate(sized)]
    return Layout.plan(specs, world, bucket_numel)


def tiles_of(layout: Layout, rank: int, bucket: int) -> list[int]:
    """The param of each tile of a rank's shard of a bucket, without the padding tiles."""
    mine = [e for e in layout.extents(rank) if e.bucket == bucket]
    return [e.param for e in mine for _ in range(-(-e.numel // TILE))]


@given(params, worlds, bucket_numels)
def test_extents_cover_every_param_once(
    sized: list[tuple[int, str]], world: int, bucket_numel: int
) -> None:
    layout = make(sized, world, bucket_numel)
    covered = [[0] * n for n, _ in sized]
    for rank in range(world):
        for s in layout.extents(rank):
            for e in range(s.param_start, s.param_start + s.numel):
                covered[s.param][e] += 1
    assert all(count == 1 for param in covered for count in param)


@given(params, worlds, bucket_numels)
def test_shards_are_disjoint_aligned_and_of_one_param_a_tile(
    sized: list[tuple[int, str]], world: int, bucket_numel: int
) -> None:
    layout = make(sized, world, bucket_numel)
    for rank in range(world):
        segments = layout.extents(rank)
        # at most one segment of a param on a rank: its state is one piece
        assert len({s.param for s in segments}) == len(segments)
        ends: dict[int, int] = {}
        for s in segments:
            assert s.numel > 0
            assert s.shard_start % TILE == 0
            assert s.shard_start >= ends.get(s.bucket, 0)
            ends[s.bucket] = s.shard_start + -(-s.numel // TILE) * TILE
            assert ends[s.bucket] <= layout.buckets[s.bucket].tiles_per_shard * TILE
            # only the last piece of a param may end inside a tile
            if s.numel % TILE:
                assert s.param_start + s.numel == layout.params[s.param].numel
        for n, bucket in enumerate(layout.buckets):
            tiles = tiles_of(layout, rank, n)
            assert len(tiles) <= bucket.tiles_per_shard
            assert set(tiles) == {s.param for s in segments if s.bucket == n}


@given(params, worlds, bucket_numels)
def test_tile_order_does_not_depend_on_the_world_size(
    sized: list[tuple[int, str]], world: int, bucket_numel: int
) -> None:
    one, many = make(sized, 1, bucket_numel), make(sized, world, bucket_numel)
    assert len(one.buckets) == len(many.buckets)
    for n in range(len(one.buckets)):
        joined = [k for rank in range(world) for k in tiles_of(many, rank, n)]
        assert joined == list(tiles_of(one, 0, n))


@given(params, worlds, bucket_numels)
def test_buckets_keep_to_their_size_and_dtype(
    sized: list[tuple[int, str]], world: int, bucket_numel: int
) -> None:
    layout = make(sized, world, bucket_numel)
    for bucket in layout.buckets:
        assert len(bucket.params) == 1 or bucket.tiles * TILE <= bucket_numel
        assert {sized[i][1] for i in bucket.params} == {bucket.dtype}
        assert list(bucket.params) == sorted(bucket.params, reverse=True)
        assert 0 <= bucket.padded_numel(world) - bucket.tiles * TILE < world * TILE


def test_padding_on_bert_large_shapes_is_small() -> None:
    from benchmarking import workloads as shapes

    numels = list(map(shapes.numel, shapes.bert_large()))
    layout = make([(n, "torch.float32") for n in numels], 64, 2**24)
    padded = sum(b.padded_numel(64) for b in layout.buckets)
    assert sum(numels) < padded < 1.005 * sum(numels)


def test_digest_tells_layouts_apart() -> None:
    layout = make([(5000, "torch.float32"), (7, "torch.float32")], 2, 2**20)
    assert layout.digest == make([(5000, "torch.float32"), (7, "torch.float32")], 2, 2**20).digest
    others = [
        make([(5000, "torch.float32"), (8, "torch.float32")], 2, 2**20),
        make([(7, "torch.float32"), (5000, "torch.float32")], 2, 2**20),
        make([(5000, "torch.bfloat16"), (7, "torch.float32")], 2, 2**20),
        make([(5000, "torch.float32"), (7, "torch.float32")], 3, 2**20),
        make([(5000, "torch.float32"), (7, "torch.float32")], 2, 2**10),
    ]
    assert len({o.digest for o in others} | {layout.digest}) == len(others) + 1


def test_inconsistent_layouts_are_refused() -> None:
    good = make([(5000, "torch.float32"), (7, "torch.float32")], 2, 2**20)
    (bucket,) = good.buckets
    with pytest.raises(ValueError, match="exactly one bucket"):
        replace(good, buckets=())
    with pytest.raises(ValueError, match="exactly one bucket"):
        replace(good, buckets=(bucket, bucket))
    with pytest.raises(ValueError, match="p0 is misplaced"):
        replace(good, buckets=(replace(bucket, first_tiles=(0, 2)),))
    with pytest.raises(ValueError, match="tiles over 2 ranks expected"):
        replace(good, buckets=(replace(bucket, tiles_per_shard=7),))
    with pytest.raises(ValueError, match="is misplaced"):
        replace(good, params=(good.params[0], spec("p1", 7, "torch.bfloat16")))
    with pytest.raises(ValueError, match="must be > 0"):
        make([(1, "torch.float32")], 0, 1)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        good.extents(2)
    with pytest.raises(ValueError, match="shape"):
        ParamSpec(name="x", shape=(2,), stride=(), dtype="torch.float32")
    assert isinstance(bucket, Bucket)
