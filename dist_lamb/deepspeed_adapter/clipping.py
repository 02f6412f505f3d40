"""The norm of all gradients, which a rank that sees a part of them must get from DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import options
from .layouts import Original
from .partition_step import PartitionStep

BOTH_CLIP = (
    "gradients are clipped twice: by DeepSpeed's gradient_clipping = {} and by max_grad_norm; "
    "set one of them"
)


def grad_norm_of(
    part: PartitionStep,
    live: Mapping[int, Mapping[str, Any]],
    engine: Any,
    originals: Sequence[Original],
) -> Any:
    """The norm as DeepSpeed computed it; None where nobody asks for it or the part sees them all.

    Raises:
        ValueError, RuntimeError: it would not be the norm of what is stepped, or is not known.
    """
    groups = [live[i] for i in part.group_indices]
    clips = any(map(options.clips, groups))
    if not clips and all(group["nonfinite"] != "skip" for group in groups):
        return None
    if not part.layouts[0].cut:
        _refuse_own_norm(originals)
        return None
    zero: Any = getattr(part.originals[0].param, "_z3_optimizer", None)
    if clips and zero is not None and zero.clip_grad:
        raise ValueError(BOTH_CLIP.format(zero.clip_grad))
    if engine is None:
        raise RuntimeError(
            "max_grad_norm under ZeRO needs optimizer.bind(engine) after "
            "deepspeed.initialize; or set gradient_clipping in DeepSpeed's config instead"
            if clips
            else 'nonfinite="skip" under ZeRO needs optimizer.bind(engine) after '
            "deepspeed.initialize (engine.basic_optimizer.bind(engine) of one that its config "
            "names): whether to skip is decided for all partitions together"
        )
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    if norm is None:
        raise RuntimeError(
            "max_grad_norm and nonfinite='skip' need the norm of all gradients, which "
            "DeepSpeed did not compute"
        )
    return norm


def _refuse_own_norm(originals: Sequence[Original]) -> None:
    for o in originals:
        if not getattr(o.param, "allreduce", True):
            what = "experts"
        elif hasattr(o.param, "ds_pipe_replicated"):
            what = "pipeline stages"
        else:
            continue
        raise RuntimeError(
            f"max_grad_norm and nonfinite='skip' need the norm of all gradients, and at ZeRO stage "
            f"0 with {what} ({o.name}) a rank knows those of its own params only: replicas would "
            "part. Set gradient_clipping in DeepSpeed's config instead"
        )
