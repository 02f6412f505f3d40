"""A study: what is compared, from a TOML file that is checked before anything starts."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pretraining.config import (
    ConfigError,
    DataConfig,
    Fraction,
    ModelConfig,
    NonNegative,
    Positive,
    PositiveInt,
    Probability,
    Range,
    Seed,
    converted,
    describe,
)

from studying.optimizers import OPTIMIZERS

ARCHITECTURES = ("decoder", "bert")


@dataclass(frozen=True, kw_only=True)
class RuleConfig:
    """One ``[rules.NAME]``: an optimizer and the lrs that its first sweep tries at the base batch.

    ``optimizer`` is a name of :data:`studying.optimizers.OPTIMIZERS`. ``late`` rules are tried once
    everything else is done.
    """

    optimizer: str
    lrs: tuple[Positive, ...]
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    eps: NonNegative = 1e-6
    half_life: bool = False
    """Scale beta2 with the batch so that its half-life in tokens stays (arXiv 2507.07101). At the
    base batch that is the rule it is ``base`` of, whose runs are not made twice."""
    base: str = ""
    late: bool = False
    batches: tuple[PositiveInt, ...] = ()
    """Of the study's, those that this rule is tried at; none: all."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """The whole file: ``[study]``, ``[model]`` and one section for each rule.

    Raises:
        ConfigError: values that contradict each other, naming the key.
    """

    name: str
    architectures: tuple[str, ...]
    batches: tuple[PositiveInt, ...]
    """Sequences a step; the first is the base batch."""
    samples: Annotated[int, Range(at_least=1, at_most=2**48)]
    """Sequences of every run, whatever its batch."""
    seeds: tuple[Seed, ...]
    seq_len: Annotated[int, Range(at_least=8)] = 128
    base_warmup: Fraction = 0.003125
    """Share of the steps at the base batch; grows with the batch (linear-epoch warm-up)."""
    more_warmups: tuple[Fraction, ...] = ()
    """Tried at the largest batch around the best lr of each rule."""
    weight_decay: NonNegative = 0.01
    max_grad_norm: float = 1.0
    """inf clips nothing."""
    rise: NonNegative = 0.1
    """Nats by which the loss must have risen on a side of the best lr: then that side shows."""
    max_lrs: PositiveInt = 12
    """Of one basin; it is not extended beyond."""
    evals: PositiveInt = 32
    held_out: PositiveInt = 1024
    """Held-out sequences of every evaluation."""
    bfloat16: bool = True
    """On GPUs forward and backward are in bfloat16; losses, weights and moments are
    float32, where a rule's optimizer does not say otherwise."""
    pack_sequences: PositiveInt = 1024
    """Runs are trained together as long as their batches hold at most this many sequences."""
    pack_seconds: Positive = 120.0
    """... and their training takes about this long at most."""
    tokens_per_s: Positive = 6e6
    """Of one device, for the first packs; afterwards what was measured counts."""
    mask_fraction: Fraction = 0.15
    model: ModelConfig
    rules: dict[str, RuleConfig]

    def __post_init__(self) -> None:
        wrong = [a for a in self.architectures if a not in ARCHITECTURES]
        if wrong or not self.architectures:
            raise ConfigError(f"study.architectures: {wrong or 'none'}; known: {ARCHITECTURES}")
        if not self.batches or list(self.batches) != sorted(set(self.batches)):
            raise ConfigError("study.batches must grow from the base batch on")
        for batch in self.batches:
            if batch < 1 or self.samples % batch:
                raise ConfigError(
                    f"study.samples ({self.samples}) must be a multiple of batch {batch}"
                )
        if self.samples // self.batches[-1] < self.evals:
            raise ConfigError(
                f"study.evals ({self.evals}) is more than the {self.samples // self.batches[-1]} "
                f"steps of batch {self.batches[-1]}"
            )
        if not self.max_grad_norm > 0:
            raise ConfigError("study.max_grad_norm must be above 0; inf clips nothing")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError("study.seeds must be different numbers, at least one")
        if not 0 < self.base_warmup < 1 or any(not 0 < w < 1 for w in self.more_warmups):
            raise ConfigError("study.base_warmup and more_warmups must lie between 0 and 1")
        if self.model.max_position_embeddings < self.seq_len:
            raise ConfigError("model.max_position_embeddings is less than study.seq_len")
        if self.model.hidden_dropout_prob or self.model.attention_probs_dropout_prob:
            raise ConfigError("model dropout must be 0: runs are compared on the same arithmetic")
        if all(rule.late or rule.half_life for rule in self.rules.values()):
            # Calibration and probe take theirs from these.
            raise ConfigError("rules: at least one rule must be neither late nor half_life")
        for name, rule in self.rules.items():
            if rule.optimizer not in OPTIMIZERS:
                raise ConfigError(
                    f"rules.{name}.optimizer = {rule.optimizer!r}; known: {', '.join(OPTIMIZERS)}"
                )
            if not rule.lrs or list(rule.lrs) != sorted(rule.lrs) or rule.lrs[0] <= 0:
                raise ConfigError(f"rules.{name}.lrs must be positive and grow")
            if any(abs(b / a - 2) > 1e-6 for a, b in zip(rule.lrs, rule.lrs[1:])):
                raise ConfigError(f"rules.{name}.lrs must go up in factors of 2")
            others = [b for b in rule.batches if b not in self.batches]
            if others:
                raise ConfigError(f"rules.{name}.batches: {others} are not in study.batches")
            base = self.rules.get(rule.base)
            if rule.half_life and (base is None or base.half_life):
                raise ConfigError(f"rules.{name}.base must name the rule it is at the base batch")

    @property
    def base_batch(self) -> int:
        return self.batches[0]

    def steps(self, batch: int) -> int:
        return self.samples // batch

    def warmup(self, batch: int) -> float:
        """Linear-epoch warm-up: epochs of warm-up grow as the batch does."""
        return min(1.0, self.base_warmup * batch / self.base_batch)

    def betas(self, rule: str, batch: int) -> tuple[float, float]:
        of = self.rules[rule]
        if not of.half_life:
            return of.betas
        # beta2^(1 / batch) is the same at every batch.
        return of.betas[0], of.betas[1] ** (batch / self.base_batch)

    def transferred_lr(self, lr: float, batch: int) -> float:
        """The square-root rule from the base batch."""
        return lr * math.sqrt(batch / self.base_batch)

    def data(self, vocabulary: int) -> DataConfig:
        return DataConfig(vocab_size=vocabulary, seq_len=self.seq_len)


def load_study(path: Path) -> StudyConfig:
    """Read ``path``.

    Raises:
        ConfigError: not a file, not TOML, an unknown or missing key, a wrong value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # neither TOML nor UTF-8
        raise ConfigError(f"{path}: {error}") from None
    known = {"study", "model", "rules"}
    if set(content) != known:
        raise ConfigError(f"{path}: sections must be {sorted(known)}, got {sorted(content)}")
    try:
        model = _made(ModelConfig, content["model"], "model")
        rules = {
            name: _made(RuleConfig, values, f"rules.{name}")
            for name, values in _section(content["rules"], "rules").items()
        }
        of = {"name": path.stem, **_section(content["study"], "study")}
        return _made(StudyConfig, of, "study", model=model, rules=rules)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None


def _section(values: Any, section: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"[{section}] must be a section, got {values!r}")
    return values


def _made(cls: type[Any], values: Any, section: str, **made: Any) -> Any:
    """``cls`` of what the file has in ``section``, and of fields that are ``made`` already."""
    hints = get_type_hints(cls, include_extras=True)
    names = hints.keys() - made.keys()
    found = {}
    for key, value in _section(values, section).items():
        if key not in names:
            raise ConfigError(f"unknown key {section}.{key}; keys are {sorted(names)}")
        try:
            found[key] = converted(hints[key], value)
        except (ValueError, OverflowError):
            wanted = describe(hints[key])
            raise ConfigError(f"{section}.{key} must be {wanted}, got {value!r}") from None
    try:
        return cls(**found, **made)
    except TypeError as error:
        raise ConfigError(f"[{section}]: {error}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{section}.{error}") from None
