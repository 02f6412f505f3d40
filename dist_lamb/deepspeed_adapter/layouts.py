"""Where DeepSpeed put the spans of every parameter: facts read off its objects, then checked.

DeepSpeed replaces the params in an optimizer's groups by tensors of its own, here *partitions*:

* nothing replaced: stage 0 in float32;
* float32 *masters*, one per param: stage 0 in half precision (FP16_UnfusedOptimizer);
* one *flat partition* per param group, this rank's slice of the group's flat vector: ZeRO-1/2
  (DeepSpeedZeroOptimizer), bfloat16 with float32 gradients (BF16_Optimizer);
* one flat partition per *sub-group*, the joined slices of its params: ZeRO-3.

A layout that is none of these is an error: a norm over the wrong elements would go unnoticed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..sharding.comm import Comm
from ..state import is_dense


class Original(NamedTuple):
    """A param as the optimizer was given it: what the rule is about."""

    number: int  # among all params of all groups
    name: str
    param: Tensor
    group: int  # its param group, counted as they were added


class Span(NamedTuple):
    """Elements ``[start, start + numel)`` of a partition, some or all elements of one param."""

    original: int
    start: int
    numel: int
    offset: int  # of its first element within the param


@dataclass(frozen=True)
class PartitionLayout:
    """What one partition is made of."""

    kind: str  # "param", "master", "flat", "sub-group"
    #: every original with elements in this partition on any rank, the same on all ranks, in order
    originals: tuple[int, ...]
    #: what lies on this rank, by start
    spans: tuple[Span, ...]
    #: the ranks the originals are cut over, or on which they are the same
    process_group: Any

    @property
    def cut(self) -> bool:
        """Whether a param may lie on several ranks, each with other elements."""
        return self.kind in ("flat", "sub-group")

    def describe(self, originals: Sequence[Original]) -> list[str]:
        """What must be the same on all ranks."""
        return [
            f"{self.kind} {p.name} {tuple(logical_shape(p.param))} {p.param.dtype}"
            for p in (originals[i] for i in self.originals)
        ]


class UnknownLayout(RuntimeError):
    """DeepSpeed handed over tensors whose relation to the params is not known."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}. DeepSpeedLamb knows the layouts of DeepSpeed's stage 0, ZeRO-1, 2 and 3; "
            f"this is deepspeed {deepspeed_version()}. It does not go on: a trust ratio "
            "of the wrong elements would be another algorithm, silently"
        )


def deepspeed_version() -> str:
    module = sys.modules.get("deepspeed")
    return getattr(module, "__version__", "(not imported)")


def logical_shape(p: Tensor) -> Sequence[int]:
    """The shape of the whole param; ZeRO-3 keeps it beside an empty tensor."""
    shape: Sequence[int] = getattr(p, "ds_shape", p.shape)
    return shape


def logical_numel(p: Tensor) -> int:
    return int(getattr(p, "ds_numel", p.numel()))


def find_layouts(
    partitions: Sequence[Tensor],
    candidates: Sequence[Original],
    originals: Sequence[Original],
    process_group_of: Callable[[Tensor], Any],
) -> list[PartitionLayout]:
    """The layouts of one param group's partitions.

    ``candidates`` are the group's own params. ``process_group_of`` is for stage 0, where DeepSpeed
    leaves no group on the params.

    Raises:
        UnknownLayout: a partition that is none of the four kinds.
    """
    refuse_model_parallel(candidates)
    index_of = {id(o.param): o.number for o in originals}
    if all(id(h) in index_of for h in partitions):
        whole = [originals[index_of[id(h)]] for h in partitions]
        return [_whole("param", h, o, process_group_of(h)) for h, o in zip(partitions, whole)]
    trained = [o for o in candidates if o.param.requires_grad and logical_numel(o.param)]
    if not trained:
        raise UnknownLayout(f"a param group without trainable params holds {_shapes(partitions)}")
    first = trained[0].param
    if getattr(first, "_z3_optimizer", None) is not None:
        return [_sub_group(h, first._z3_optimizer, index_of) for h in partitions]  # type: ignore[attr-defined]
    if hasattr(first, "_hp_mapping"):
        if len(partitions) != 1:
            raise UnknownLayout(f"one flat partition expected, found {_shapes(partitions)}")
        return [_flat(partitions[0], trained)]
    same = len(partitions) == len(trained)
    if not same or any(h.shape != o.param.shape for h, o in zip(partitions, trained)):
        raise UnknownLayout(
            f"{_shapes(partitions)} took the place of {_shapes([o.param for o in trained])}"
        )
    return [_whole("master", h, o, process_group_of(o.param)) for h, o in zip(partitions, trained)]


def refuse_model_parallel(candidates: Sequence[Original]) -> None:
    for o in candidates:
        for flag in ("tensor_model_parallel", "model_parallel"):
            if getattr(o.param, flag, False):
                raise UnknownLayout(
                    f"{o.name} is cut by tensor parallelism ({flag} is set on it), "
                    "and its norms would be those of this rank's slice"
                )


def _whole(kind: str, partition: Tensor, of: Original, process_group: Any) -> PartitionLayout:
    return PartitionLayout(
        kind, (of.number,), (Span(of.number, 0, partition.numel(), 0),), process_group
    )


def _flat(partition: Tensor, trained: Sequence[Original]) -> PartitionLayout:
    """ZeRO-1/2, BF16_Optimizer: every param's data is a view into the group's flat vector.

    Read off the addresses, since the order within may be another one (round_robin_gradients).
    """
    params = [o.param for o in trained]
    process_group = getattr(params[0], "_dp_group", None)
    if process_group is None:
        raise UnknownLayout(f"{trained[0].name} has no data-parallel process group (_dp_group)")
    if len({(p.dtype, p.device, p.untyped_storage().data_ptr()) for p in params}) != 1:
        raise UnknownLayout(f"the params of {trained[0].name}'s group are not in one flat vector")
    comm = Comm(process_group)
    size, base = params[0].element_size(), min(p.data_ptr() for p in params)
    lo = comm.rank * partition.numel()
    hi = lo + partition.numel()
    spans, positions = [], []
    for o in trained:
        start = (o.param.data_ptr() - base) // size
        end = start + o.param.numel()
        positions.append((start, end))
        first, last = max(start, lo), min(end, hi)
        if first < last:
            spans.append(Span(o.number, first - lo, last - first, first - start))
    positions.sort()
    if any(end > start for (_, end), (start, _) in pairwise(positions)):
        raise UnknownLayout(f"params of {trained[0].name}'s group overlap in the flat vector")
    if positions[-1][1] > comm.world_size * partition.numel():
        raise UnknownLayout(
            f"{positions[-1][1]} elements of {trained[0].name}'s group do not fit in "
            f"{comm.world_size} partitions of {partition.numel()}"
        )
    spans.sort(key=lambda span: span.start)
    return PartitionLayout("flat", tuple(o.number for o in trained), tuple(spans), process_group)


def _sub_group(partition: Tensor, zero: Any, index_of: dict[int, int]) -> PartitionLayout:
    """ZeRO-3: every param is cut in equal slices, and a sub-group's slices are joined."""
    flats = getattr(zero, "fp32_partitioned_groups_flat", ())
    found = [k for k, flat in enumerate(flats) if flat is partition]
    if len(found) != 1:
        raise UnknownLayout(f"{_shapes([partition])}: no sub-group of ZeRO-3")
    params = list(zero.fp16_groups[found[0]])
    unknown = [p for p in params if id(p) not in index_of]
    if unknown or not params:
        raise UnknownLayout("a sub-group of ZeRO-3 has params the optimizer was not given")
    groups = [getattr(p, "ds_process_group", None) or zero.dp_process_group for p in params]
    if any(group is not groups[0] for group in groups):
        raise UnknownLayout("a sub-group of ZeRO-3 is spread over several process groups")
    rank = Comm(groups[0]).rank
    spans, start = [], 0
    for p in params:
        slice_numel = int(p.partition_numel())
        numel = max(0, min(slice_numel, logical_numel(p) - rank * slice_numel))
        if numel:  # the rest of the slice is padding, and not even initialised
            spans.append(Span(index_of[id(p)], start, numel, rank * slice_numel))
        start += slice_numel
    if start != partition.numel():
        raise UnknownLayout(
            f"the slices of a sub-group of ZeRO-3 have {start} elements, its flat partition "
            f"{partition.numel()}"
        )
    return PartitionLayout(
        "sub-group", tuple(index_of[id(p)] for p in params), tuple(spans), groups[0]
    )


def problem_with(
    layout: PartitionLayout, partition: Tensor, originals: Sequence[Original]
) -> str | None:
    """What speaks against a layout: the partition's values must be those of the params.

    DeepSpeed keeps both equal, up to rounding to the params' dtype, between any two steps. Reads
    all elements once.
    """
    what = f"the {layout.kind} of {originals[layout.originals[0]].name}"
    if not is_dense(partition):
        return f"{what} has gaps in its memory"
    if layout.kind == "param":
        return None
    if partition.dtype not in (torch.float32, torch.float64):
        return f"{what} is {partition.dtype}; master weights must be float32"
    rest = 0
    for span in layout.spans:
        p = originals[span.original].param
        if layout.kind == "master":
            mine, model = partition.detach(), p.detach()
        else:
            # ZeRO-3 keeps the model's slice apart, and nothing else of the param.
            slices: Any = p.ds_tensor if layout.kind == "sub-group" else p  # type: ignore[attr-defined]
            offset = 0 if layout.kind == "sub-group" else span.offset
            mine = partition.detach()[span.start : span.start + span.numel]
            model = slices.detach().view(-1)[offset : offset + span.numel]
        if not torch.allclose(
            mine.to(p.dtype), model.to(mine.device), rtol=0, atol=0, equal_nan=True
        ):
            return (
                f"{what} does not hold the values of {originals[span.original].name} where they "
                "should be. If weights were loaded or changed after deepspeed.initialize, call "
                "engine.optimizer.refresh_fp32_params() right after it: DeepSpeed would overwrite "
                "them with its float32 masters of the old ones. If the masters were changed before "
                "the first step (safe_set_full_fp32_param), write the params too. At ZeRO-1 and 2 "
                "this engine cannot go on after this error: make it anew"
            )
        # The flat vector's padding is zero; more than that would be a param nobody told us of.
        if layout.kind == "flat" and partition.detach()[rest : span.start].count_nonzero():
            return f"{what} has values between those of the params"
        rest = span.start + span.numel
    if layout.kind == "flat" and partition.detach()[rest:].count_nonzero():
        return f"{what} has values behind those of the params"
    return None


def _shapes(tensors: Sequence[Tensor]) -> str:
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors[:4])
    return f"{len(tensors)} tensors of shapes {shapes}{', ...' if len(tensors) > 4 else ''}"
