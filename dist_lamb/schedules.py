"""The learning-rate schedules of large-batch training with LAMB (arXiv 1904.00962, section 4).

The learning rate grows with the square root of the batch. Warm-up is linear; its number of epochs
grows with the batch, so that its share of the steps doubles when the batch does (1/320 at batch
512, 1/5 at 32,768). Decay is linear to zero.
"""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def sqrt_scaled_lr(base_lr: float, base_batch: int, batch: int) -> float:
    """``base_lr * sqrt(batch / base_batch)``, batches in sequences (or samples) per step.

    The paper's BERT: 5 / (2^3 * 10^3) at batch 512, so 5 / 10^3 at 32,768.
    """
    if base_batch < 1 or batch < 1:
        raise ValueError(f"batches must be at least 1, got {base_batch} and {batch}")
    return base_lr * math.sqrt(batch / base_batch)


def linear_epoch_warmup_steps(warmup_epochs: float, samples_per_epoch: int, batch: int) -> int:
    """Steps of a warm-up that lasts ``warmup_epochs`` epochs of this batch, to the nearest step.

    In the paper the number of epochs grows with the batch: that of batch 512, times batch / 512.
    This function takes the number for this batch.
    """
    if warmup_epochs < 0 or samples_per_epoch < 1 or batch < 1:
        raise ValueError(
            "warmup_epochs >= 0, samples_per_epoch >= 1 and batch >= 1 expected, got "
            f"{warmup_epochs}, {samples_per_epoch} and {batch}"
        )
    return round(warmup_epochs * samples_per_epoch / batch)


def warmup_linear_decay(
    optimizer: Optimizer, warmup_steps: float, total_steps: float, end_factor: float = 0.0
) -> LambdaLR:
    """Linear to lr over ``warmup_steps``, then linear to ``end_factor * lr`` at ``total_steps``.

    The first step already has lr / warmup_steps, since a step at 0 would only cost its batch.
    Both may be fractions, such as ``0.06 * total_steps``: no step has more than lr.
    Call ``step()`` of what is returned after each ``optimizer.step()``. The peak is the groups'
    lr; where an earlier schedule has left an ``initial_lr`` in a group, as torch does, it is that:
    set ``initial_lr`` for a second phase with another peak.
    """
    if not 0 <= warmup_steps <= total_steps or total_steps < 1 or not 0 <= end_factor <= 1:
        raise ValueError(
            "0 <= warmup_steps <= total_steps, total_steps >= 1 and 0 <= end_factor <= 1 expected, "
            f"got {warmup_steps}, {total_steps} and {end_factor}"
        )

    def factor(done: int) -> float:
        if done < warmup_steps:
            return min(1.0, (done + 1) / warmup_steps)
        left = (total_steps - done) / ((total_steps - warmup_steps) or 1)
        return end_factor + (1.0 - end_factor) * min(1.0, max(0.0, left))

    return LambdaLR(optimizer, factor)
