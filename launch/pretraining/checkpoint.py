"""Save and resume: one file, whole or absent.

The random numbers of a step are seeded from (seed, step, rank) and the data position is a number
of samples, so a resumed run repeats the uninterrupted one without any generator's state.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from pretraining.batches import TrainBatches
from pretraining.config import ConfigError, PretrainConfig
from pretraining.engines import Engine
from pretraining.ranks import Ranks

FILE_NAME = "checkpoint.pt"
_FORMAT = 1

# Where the text lies, how the work is spread, and what is looked at: not what is computed.
# The schedule follows train.steps, so a run can be made longer.
_MAY_CHANGE = frozenset(
    {
        "data.path",
        "data.cache_dir",
        "optim.engine",
        "optim.stage",
        "train.steps",
        "train.micro_batch",
        "train.device",
        "train.log_every",
        "train.eval_every",
        "train.eval_sequences",
        "train.save_every",
        "train.run_dir",
        "train.resume",
        "train.init_from",
        "train.timeout_minutes",
    }
)


def save(
    path: Path,
    step: int,
    config: PretrainConfig,
    tokens: str,
    engine: Engine,
    scheduler: LRScheduler,
    batches: TrainBatches,
    ranks: Ranks,
) -> None:
    """Write everything a run needs to go on after ``step``. All ranks call it; rank 0 writes.

    Args:
        tokens: digest of the token ids trained on.
    """
    optimizer = engine.optimizer_state_dict()
    model = engine.model_state_dict()
    if ranks.rank == 0:
        content = {
            "format": _FORMAT,
            "step": step,
            # As text: a tuple of a newer config must not need unpickling rules.
            "config": json.dumps(config.as_dict()),
            "tokens": tokens,
            "model": model,
            "optimizer": optimizer,
            "scheduler": scheduler.state_dict(),
            "batches": batches.state_dict(),
        }
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            # Renamed before the bytes are on disk, a power cut would leave an empty checkpoint.
            os.fsync(file.fileno())
        os.replace(part, path)


def load(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, tensors on the host.

    Raises:
        ConfigError: no such file, or not a checkpoint of this program.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such checkpoint") from None
    except Exception as error:
        raise ConfigError(f"{path}: cannot read this checkpoint: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ConfigError(f"{path}: not a checkpoint of this program (format {_FORMAT})")
    return content


def resume(
    content: dict[str, Any],
    config: PretrainConfig,
    tokens: str,
    engine: Engine,
    scheduler: LRScheduler,
    batches: TrainBatches,
) -> list[str]:
    """Put a run back to where ``content`` was saved.

    Returns:
        The settings that differ from those it was saved with, for the log.

    Raises:
        ConfigError: settings or text with which it would not be the same run.
    """
    changed = _changes(json.loads(content["config"]), json.loads(json.dumps(config.as_dict())))
    refused = [f"{name}: {change}" for name, change in changed.items() if name not in _MAY_CHANGE]
    if refused:
        raise ConfigError(
            f"the checkpoint is of a run with other settings ({'; '.join(refused)}); "
            "choose another train.run_dir, or train.resume=never to start over"
        )
    if content["tokens"] != tokens:
        raise ConfigError(
            "the checkpoint was trained on other tokens: data.path or a setting of [data] changed"
        )
    try:
        batches.load_state_dict(content["batches"])
    except ValueError as error:
        raise ConfigError(str(error)) from None
    engine.load_state_dicts(content["model"], content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    return [f"{name}: {change}" for name, change in changed.items()]


def _changes(saved: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]) -> dict[str, str]:
    return {
        f"{section}.{key}": f"{saved[section].get(key)!r} -> {value!r}"
        for section, values in own.items()
        for key, value in values.items()
        if saved[section].get(key) != value
    }


def initial_weights(path: Path) -> dict[str, Any]:
    """The model's state dict of a checkpoint, to start another run from."""
    model: dict[str, Any] = load(path)["model"]
    return model
