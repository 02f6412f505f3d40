"""Hugging Face's Trainer with a ShardedLamb."""

from __future__ import annotations

from typing import Any

from ..sharded import ShardedLamb
from .accelerate import unwrapped

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        f"dist_lamb.integrations.trainer needs transformers: pip install transformers ({error})"
    ) from error


class ConsolidateOnSave(TrainerCallback):  # type: ignore[misc]
    """Makes the state of a ShardedLamb whole before each checkpoint that Trainer writes::

        opt = ShardedLamb(model, lr=1e-3, reduce_gradients=False)  # under DDP
        Trainer(model, args, optimizers=(opt, None), callbacks=[ConsolidateOnSave()])

    ``trainer.train(resume_from_checkpoint=...)`` goes on from it at any number of ranks. Rank 0, or
    with ``save_on_each_node`` every rank, holds the whole state in host memory until the next step.
    With ``save_strategy="best"`` that is after every evaluation, since Trainer decides what is the
    best without telling.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            _consolidate(args, kwargs["optimizer"])

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_strategy == "best":
            _consolidate(args, kwargs["optimizer"])


def _consolidate(args: Any, optimizer: Any) -> None:
    optimizer = unwrapped(optimizer)
    if isinstance(optimizer, ShardedLamb):
        optimizer.consolidate_state_dict(to=None if args.save_on_each_node else 0)
