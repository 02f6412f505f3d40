"""How a ShardedLamb shards and communicates; checked once, and the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of :class:`dist_lamb.ShardedLamb`, which says what they mean.

    Raises ``ValueError`` naming the first that is not valid.
    """

    stage: int
    reduce_gradients: bool
    reduce_dtype: torch.dtype | None
    accumulate: str
    overlap: bool
    overlap_gather: bool
    bucket_numel: int

    def __post_init__(self) -> None:
        if self.stage not in (1, 2):
            raise ValueError(f"Invalid stage: {self.stage!r}; 1 (shard state) or 2 (and gradients)")
        if not isinstance(self.bucket_numel, int) or self.bucket_numel < 1:
            raise ValueError(f"Invalid bucket_numel: {self.bucket_numel!r}")
        dtype: object = self.reduce_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"Invalid reduce_dtype: {dtype!r}; a torch.dtype of floats expected")
        if self.accumulate not in ("local", "sharded"):
            raise ValueError(f"Invalid accumulate: {self.accumulate!r}; 'local' or 'sharded'")
        can_add_up = self.stage == 2 and self.reduce_gradients and self.overlap
        if self.accumulate == "sharded" and not can_add_up:
            raise ValueError("accumulate='sharded' needs stage=2, reduce_gradients and overlap")

    def described(self) -> list[str]:
        """One line each."""
        return [f"{f.name} = {getattr(self, f.name)!r}" for f in fields(self)]
