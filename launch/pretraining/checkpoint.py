"""Save and resume a run, at any number of ranks.

The random numbers of a step are seeded from (seed, step, rank) and the data position is a number
of samples, so a resumed run repeats the uninterrupted one, and loses or repeats no sample, also
with other ranks than before.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from dist_lamb import checkpoint
from dist_lamb.checkpoint import Checkpoint, CheckpointError
from pretraining.config import SECTIONS, ConfigError, PretrainConfig
from pretraining.engine_base import Engine
from pretraining.ranks import Ranks

FOLDER = "checkpoints"
_STEP = re.compile(r"step-\d+")
_RUN_DIR = "train.run_dir"
_NEWER = frozenset(("noise", "unwritten"))

# Where files are, how the work is distributed, and what is reported: not what is computed with
# finite gradients.
# The schedule follows train.steps, so a run can be made longer.
_MAY_CHANGE = frozenset(
    {
        "data.path",
        "data.cache_dir",
        "optim.engine",
        "optim.stage",
        "optim.deepspeed",
        "optim.nonfinite",
        "train.steps",
        "train.micro_batch",
        "train.device",
        "train.max_skipped_in_a_row",
        "train.log_every",
        "train.tensors_every",
        "train.noise_every",
        "train.eval_every",
        "train.eval_sequences",
        "train.save_every",
        "train.keep_checkpoints",
        "train.save_async",
        "train.run_dir",
        "train.resume",
        "train.init_from",
        "train.timeout_minutes",
    }
)


@contextmanager
def claimed(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """As a context: this is the only job that writes to ``run_dir``. All ranks enter it.

    Raises:
        ConfigError: on every rank, naming the job that writes there.
    """
    owner, problem = None, None
    if ranks.rank == 0:
        try:
            owner = checkpoint.claim(run_dir)
        except CheckpointError as error:
            # Raised here alone, it would make the others fail with a lost connection.
            problem = f"train.run_dir: {error}"
    problem = ranks.from_first(problem)
    if problem:
        raise ConfigError(problem)
    failed = True
    try:
        yield
        failed = False
    finally:
        if owner is not None:
            owner.release(failed)


def save(
    step: int,
    config: PretrainConfig,
    tokens: str,
    engine: Engine,
    parts: Mapping[str, Any],
    beside: bool = False,
) -> None:
    """Write everything a run needs to continue after ``step``. All ranks call it.

    Args:
        tokens: digest of the token ids trained on.
        parts: what else has a state: "schedule", "batches", "unwritten", and "noise" if it is
            measured.
        beside: return as soon as a copy is made; the next call waits, and raises its error.

    Raises:
        CheckpointError: on every rank, with the file that could not be written.
    """
    write = checkpoint.save_async if beside else checkpoint.save
    position = parts["batches"].position
    engine.before_save()
    model, optimizer = engine.checkpointed()
    write(
        config.run_dir / FOLDER,
        step,
        model,
        optimizer,
        stateful=parts,
        extra={
            "config": json.loads(json.dumps(config.as_dict())),
            "tokens": tokens,
            "samples_seen": position,
            "tokens_seen": position * config.data.seq_len,
        },
        keep=config.train.keep_checkpoints,
    )


def find(config: PretrainConfig) -> Path | None:
    """The checkpoint to go on from; None to begin at step 0. Changes nothing.

    Raises:
        ConfigError: something that this program did not make is in the way of its checkpoints.
    """
    folder = config.run_dir / FOLDER
    if not folder.is_dir():
        # A link to a folder on another disk is one; a link to nothing would be found at the first
        # save.
        if folder.is_symlink() or folder.exists():
            raise ConfigError(f"{folder} is no folder; move it away, or choose another {_RUN_DIR}")
        return None
    auto = config.train.resume == "auto"
    if not auto and config.init_from is not None:
        sources = config.init_from.resolve(), (config.init_from / FOLDER).resolve()
        if any(source.is_relative_to(folder.resolve()) for source in sources):
            raise ConfigError(
                f"train.init_from is in {_RUN_DIR}, whose checkpoints train.resume=never removes; "
                f"choose another {_RUN_DIR}"
            )
    ours = checkpoint.checkpoints(folder) if auto else list(filter(_is_ours, _steps(folder)))
    others = [path.name for path in _steps(folder) if path not in ours]
    if others:
        what = "cannot be read" if auto else "cannot be read, or are not of this program"
        raise ConfigError(
            f"{folder}: {', '.join(others)} {what} and would be in the way; move them away, "
            f"or choose another {_RUN_DIR}"
        )
    return ours[-1] if auto and ours else None


def start_over(config: PretrainConfig) -> None:
    """Remove the checkpoints of an earlier run, after :func:`find` has recognised them.

    Raises:
        ConfigError: one cannot be renamed.
    """
    try:
        # All are renamed first: what of them cannot be removed is no checkpoint any more.
        old = [
            path.rename(path.with_name(f".{path.name}.old-{uuid.uuid4().hex}"))
            for path in _steps(config.run_dir / FOLDER)
        ]
    except OSError as error:
        raise ConfigError(f"{_RUN_DIR}: {error.filename}: {error.strerror}") from error
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


def _steps(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if _STEP.fullmatch(path.name))


def _is_ours(path: Path) -> bool:
    """Whether ``path`` is a whole checkpoint that this program wrote, in this place."""
    try:
        return not path.is_symlink() and _is_run(Checkpoint(path).extra)
    except CheckpointError:
        return False


def _is_run(extra: Any) -> bool:
    return isinstance(extra, dict) and {"config", "tokens"} <= extra.keys()


def resume(
    path: Path,
    config: PretrainConfig,
    tokens: str,
    engine: Engine,
    parts: Mapping[str, Any],
) -> tuple[int, list[str]]:
    """Put a run back to where the checkpoint ``path`` was saved. All ranks call it.

    Args:
        parts: as of :func:`save`; an older checkpoint may lack "noise" and "unwritten".

    Returns:
        The step, and for the log the settings that differ from those it was saved with.

    Raises:
        ConfigError: settings or text with which it would not be the same run, or a checkpoint
            that is damaged.
    """
    try:
        before = Checkpoint(path)
        extra, known = before.extra, before.state["stateful"]
        if not _is_run(extra):
            raise ConfigError(f"{path}: not a checkpoint of this program")
        changed = _changes(extra["config"], json.loads(json.dumps(config.as_dict())))
        refused = [f"{name}: {text}" for name, text in changed.items() if name not in _MAY_CHANGE]
        if refused:
            raise ConfigError(
                f"the checkpoint is of a run with other settings ({'; '.join(refused)}); "
                "choose another train.run_dir, or train.resume=never to start over"
            )
        if extra["tokens"] != tokens:
            raise ConfigError(
                "the checkpoint was trained on other tokens: data.path or a setting of [data] "
                "changed"
            )
        found = checkpoint.load(
            path,
            *engine.checkpointed(),
            stateful={k: part for k, part in parts.items() if k not in _NEWER or k in known},
            # They follow from the settings compared above; what may differ is set below.
            options="saved",
        )
        engine.after_load()
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    scheduler = parts["schedule"]
    # The lr of the next step is this run's: it may be longer than the one that was saved.
    for group, base, factor in zip(
        engine.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = base * factor(scheduler.last_epoch)
        group["nonfinite"] = config.optim.nonfinite
    return found.step, [f"{name}: {change}" for name, change in changed.items()]


def _changes(saved: dict[str, dict[str, Any]], own: dict[str, dict[str, Any]]) -> dict[str, str]:
    changed = {}
    for section, values in own.items():
        # A key that is newer than the checkpoint was as its default is.
        fields = dataclasses.fields(SECTIONS[section])
        was = {field.name: field.default for field in fields} | saved.get(section, {})
        for key, value in values.items():
            if was[key] != value:
                changed[f"{section}.{key}"] = f"{was[key]!r} -> {value!r}"
    return changed


def load_weights(path: Path, model: nn.Module) -> None:
    """Start ``model`` from the weights of a checkpoint, or of a run's latest. All ranks call it.

    Raises:
        ConfigError: no such checkpoint, a damaged one, or one of another model.
    """
    try:
        # Either the run or its folder of checkpoints or one of them.
        inside = path / FOLDER
        checkpoint.load(inside if inside.is_dir() else path, model, rng=False)
    except CheckpointError as error:
        raise ConfigError(f"train.init_from: {error}") from error
