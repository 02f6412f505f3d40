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
        for name in ("reduce_gradients", "overlap", "overlap_gather"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Invalid {name}: {getattr(self, name)!r}; True or False expected")
        if type(self.stage) is not int or self.stage not in (1, 2):
            raise ValueError(f"Invalid stage: {self.stage!r}; 1 (shard state) or 2 (and gradients)")
        if type(self.bucket_numel) is not int or self.bucket_numel < 1:
            raise ValueError(f"Invalid bucket_numel: {self.bucket_numel!r}")
        dtype: object = self.reduce_dtype
        if dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"Invalid reduce_dtype: {dtype!r}; e.g. torch.float32 expected")
        if self.accumulate not in ("local", "sharded"):
            raise ValueError(f"Invalid accumulate: {self.accumulate!r}; 'local' or 'sharded'")
        can_add_up = self.stage == 2 and self.reduce_gradients and self.overlap
        if self.accumulate == "sharded" and not can_add_up:
            raise ValueError("accumulate='sharded' needs stage=2, reduce_gradients and overlap")

    def described(self) -> list[str]:
        """One line each."""
        return [f"{f.name} = {getattr(self, f.name)!r}" for f in fields(self)]
