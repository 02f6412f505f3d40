"""The lr of a run, from what its config says for another batch."""

from __future__ import annotations

from dist_lamb import schedules
from pretraining.config import PretrainConfig


def scaled_lr(config: PretrainConfig) -> float:
    """The peak."""
    optim = config.optim
    return schedules.sqrt_scaled_lr(optim.lr, optim.base_batch, config.train.global_batch)


def warmup_steps(config: PretrainConfig, samples_per_epoch: int) -> int:
    """Steps of warm-up; a run shorter than that warms up to its end."""
    optim, of = config.optim, config.train
    if optim.warmup_epochs is None:
        assert optim.warmup_fraction is not None
        return round(optim.warmup_fraction * of.steps)
    # Linear-epoch warm-up: the epochs of warm-up grow with the batch as the steps of an epoch
    # shrink.
    epochs = optim.warmup_epochs * of.global_batch / optim.base_batch
    steps = schedules.linear_epoch_warmup_steps(epochs, samples_per_epoch, of.global_batch)
    return min(steps, of.steps)
