"""What a run says of itself as it starts and once it is done."""

from __future__ import annotations

import torch
from torch import nn

from pretraining import curves, telemetry
from pretraining.batches import TrainBatches
from pretraining.checkpoint import FOLDER
from pretraining.config import PretrainConfig
from pretraining.ranks import Ranks
from pretraining.report import LOG_NAME, clock, compact, read_log
from pretraining.schedule import scaled_lr, warmup_steps


def describe(config: PretrainConfig, model: nn.Module, batches: TrainBatches, ranks: Ranks) -> str:
    """Model, ranks, batch and schedule, a line each."""
    optim, of = config.optim, config.train
    parameters = sum(p.numel() for p in model.parameters())
    epochs = of.steps * of.global_batch / len(batches.sequences)
    unused = f"; not used: {', '.join(optim.unused())}" if optim.unused() else ""
    rule = "" if optim.rule == "lamb" else f"rule: {optim.rule}{unused}\n"
    stage = f", ZeRO stage {optim.stage}" if optim.engine == "sharded" else ""
    return (
        f"model: BERT with {compact(parameters)} parameters\n"
        f"ranks: {ranks.world_size} on {ranks.device.type}, engine {optim.engine}{stage}, "
        f"{torch.get_num_threads()} threads a rank\n"
        f"batch: {of.global_batch} sequences of {config.data.seq_len} tokens, "
        f"{batches.micro_batches} micro-batches of {batches.micro_batch} a rank\n"
        f"{rule}"
        f"schedule: {of.steps} steps ({epochs:.2f} epochs), lr {scaled_lr(config):.3g} after "
        f"{warmup_steps(config, len(batches.sequences))} steps of warm-up, then linear to 0"
    )


def summarize(config: PretrainConfig, first_step: int, seconds: float) -> str:
    """Draws the pictures, and says what the log holds and where everything is.

    Raises:
        LogError: a log is damaged. OSError: a picture cannot be written.
    """
    run_dir, of = config.run_dir, config.train
    picture = curves.draw(run_dir, f"BERT pretraining with LAMB: {run_dir.name}")
    heat_map = telemetry.draw_heat_map(run_dir)
    pictures = [f"picture {picture}", f"heat map {heat_map}" if heat_map else None]
    rows = [row for row in read_log(run_dir / LOG_NAME) if row["kind"] == "held_out"]
    losses = "the log has no evaluation"
    if rows:
        first, last = rows[0], rows[-1]
        # The log of the steps before may have been moved away.
        since = f" since step {first['step']}" if first["step"] else ""
        since += f" to step {last['step']}" if last["step"] < of.steps else ""
        losses = (
            f"held-out loss {first['loss']:.3f} -> {last['loss']:.3f} "
            f"({last['loss'] - first['loss']:+.3f} nats{since}), masked accuracy "
            f"{100 * first['accuracy']:.1f} % -> {100 * last['accuracy']:.1f} %"
        )
    tokens = max(0, of.steps - first_step) * of.global_batch * config.data.seq_len
    return (
        f"{losses}; {compact(tokens)} tokens in {clock(seconds)}\n"
        f"{', '.join(filter(None, pictures))}, log {run_dir / LOG_NAME}, "
        f"checkpoints {run_dir / FOLDER}, "
        f"tensorboard --logdir {run_dir / 'tensorboard'}"
    )
