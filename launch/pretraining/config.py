"""Configuration: a TOML file and options of the command line, checked before anything starts.

Each section of the file is one frozen dataclass. A field's annotation is its whole check: the type
is compared, numbers carry their range, choices are ``Literal``. Nothing is ignored: an unknown key,
a missing key and a value of the wrong type are errors that name the key and where it came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from dist_lamb.options import reads
from dist_lamb.rules import RULES


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the file."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number; a missing bound is infinite."""

    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return (
            self.above < value < self.below
            and self.at_least <= value <= self.at_most
            and math.isfinite(value)
        )

    def __str__(self) -> str:
        bounds = ((">", self.above), (">=", self.at_least), ("<", self.below), ("<=", self.at_most))
        texts = [
            f"{sign} {bound if isinstance(bound, int) else format(bound, 'g')}"
            for sign, bound in bounds
            if math.isfinite(bound)
        ]
        return " and ".join(texts)


PositiveInt = Annotated[int, Range(at_least=1)]
Count = Annotated[int, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(above=0, below=1)]
Probability = Annotated[float, Range(at_least=0, below=1)]
Seed = Annotated[int, Range(at_least=0, at_most=2**63 - 1)]


class _FieldError(ValueError):
    """A bad value of one field; the loader adds the section and the file."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}")
        self.key = key


@dataclass(frozen=True, kw_only=True)
class _Section:
    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            given = getattr(self, field.name)
            try:
                value = converted(hints[field.name], given)
            except ValueError:
                wanted = describe(hints[field.name])
                raise _FieldError(
                    field.name, f"must be {wanted}, got {given!r} ({type(given).__name__})"
                ) from None
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Section):
    """``[model]``: the fields of ``transformers.BertConfig``, by their names there."""

    hidden_size: PositiveInt
    """Width of the layers, in features."""
    num_hidden_layers: PositiveInt
    """Encoder layers."""
    num_attention_heads: PositiveInt
    """Attention heads of a layer; must divide hidden_size."""
    intermediate_size: PositiveInt
    """Width of the feed-forward part of a layer, in features."""
    max_position_embeddings: PositiveInt = 512
    """Longest sequence of the model, in tokens."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout after embeddings, attention and feed-forward parts, as a share."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout of the attention weights, as a share."""
    initializer_range: Positive = 0.02
    """Standard deviation of the first weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_attention_heads:
            raise _FieldError(
                "hidden_size",
                f"({self.hidden_size}) must be a multiple of num_attention_heads "
                f"({self.num_attention_heads})",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """``[data]``: the text, its tokens and its masks."""

    path: str = "stdlib"
    """``stdlib`` = the sources and help texts of the running Python; else a file, a folder or a
    glob of text files."""
    vocab_size: Annotated[int, Range(at_least=256, at_most=2**24)]
    """Tokens of the WordPiece vocabulary."""
    seq_len: Annotated[int, Range(at_least=8)]
    """Tokens a sequence, [CLS] and [SEP] included."""
    mask_fraction: Fraction = 0.15
    """Share of the tokens of a sequence that the model must predict."""
    held_out_fraction: Fraction = 0.05
    """Share of the documents, chosen by their hash, that is never trained on."""
    document_bytes: Annotated[int, Range(at_least=256)] = 65_536
    """Bytes; a longer file is cut at line ends into documents of at most this size."""
    tokenizer_bytes: PositiveInt = 268_435_456
    """Bytes of the training text, chosen by hash, that the tokenizer is trained on."""
    cache_dir: str = "runs/cache"
    """Folder of tokenized text."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(_Section):
    """``[optim]``: LAMB and the paper's schedule. lr and warm-up are those of ``base_batch``."""

    engine: Literal["sharded", "fsdp2", "ddp", "deepspeed"] = "sharded"
    """``sharded``: ``dist_lamb.ShardedLamb``; ``fsdp2``, ``ddp``: torch's, with ``Lamb``;
    ``deepspeed``: DeepSpeed's, with ``DeepSpeedLamb``."""
    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO's, of engines ``sharded`` (1, 2) and ``deepspeed``."""
    deepspeed: str = ""
    """DeepSpeed's JSON config, for engine deepspeed; empty = ``configs/deepspeed_zero<stage>.json``
    of this repository."""
    rule: Literal[*RULES] = "lamb"
    """Of ``dist_lamb.rules``. Options below that it does not have are not used; with ``adamh``,
    biases and normalization weights take ``adamw``. Each rule has lrs of its own."""
    lr: Positive
    """Peak of the schedule, at ``base_batch``; scaled by sqrt(train.global_batch / base_batch)."""
    base_batch: PositiveInt
    """Sequences: the batch that lr and warm-up are meant for."""
    warmup_epochs: NonNegative | None = None
    """Epochs, at ``base_batch``; scaled by train.global_batch / base_batch (linear-epoch
    warm-up)."""
    warmup_fraction: Probability | None = None
    """Instead of ``warmup_epochs``: the share of train.steps, not scaled."""
    weight_decay: NonNegative = 0.01
    """Decoupled: weight_decay * x is added to the update before the trust ratio; not of biases and
    normalization weights."""
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    """Decay of the running means of g and g^2, a step."""
    eps: Positive = 1e-6
    """Added to sqrt(v)."""
    max_grad_norm: NonNegative = 1.0
    """Global L2 norm to which the gradient is clipped; 0 = no clipping."""
    adapt: Literal["all", "decayed"] = "all"
    """Which parameters get a trust ratio: all, as in the paper, or not the biases and normalisation
    weights, as in NVIDIA's recipe. Those never decay."""
    nonfinite: Literal["skip", "propagate"] = "skip"
    """A step with a gradient that is not finite on some rank: ``skip`` changes no parameter or
    state and counts it, ``propagate`` makes it. Data and lr schedule advance in either case."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.engine != "deepspeed" and self.stage not in (1, 2):
            raise _FieldError("stage", f"must be 1 or 2 with engine {self.engine!r}")
        if self.engine != "deepspeed" and self.deepspeed:
            raise _FieldError("deepspeed", f"is not for engine {self.engine!r}")
        if (self.warmup_epochs is None) == (self.warmup_fraction is None):
            raise _FieldError(
                "warmup_epochs",
                "or warmup_fraction must be given, and only one of the two; none unsets it",
            )

    def options(self) -> dict[str, Any]:
        """Options of dist_lamb's optimizers that the rule has, but for the lr and for weight decay
        by group."""
        given = {
            "rule": self.rule,
            "betas": self.betas,
            "eps": self.eps,
            "max_grad_norm": self.max_grad_norm or None,
            "adapt": self.adapt,
            "nonfinite": self.nonfinite,
        }
        known = RULES[self.rule]
        return {name: value for name, value in given.items() if reads(known, name)}

    def unused(self) -> list[str]:
        """Keys that the rule does not have."""
        keys = ("betas", "eps", "weight_decay", "adapt")
        return [key for key in keys if not reads(RULES[self.rule], key)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(_Section):
    """``[train]``: the run."""

    steps: PositiveInt
    """Optimizer steps of the run; the lr reaches 0 at the last one."""
    global_batch: PositiveInt
    """Sequences an optimizer step, over all ranks and micro-batches."""
    micro_batch: PositiveInt
    """Sequences a rank and forward pass: a divisor of those that a rank has of global_batch, or
    more."""
    seed: Seed = 0
    """Of weights, order, masks and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is one."""
    autocast: Literal["none", "bf16"] = "none"
    """bf16 = forward and backward under torch.autocast."""
    compile: bool = False
    """Compile the encoder layers (torch.compile): about a minute at the start, and again after
    every restart, for some 20 % more tokens/s on a GPU. Other roundings, so other last digits."""
    max_skipped_in_a_row: Count = 10
    """This many consecutive steps skipped by ``optim.nonfinite`` end the run with an error; 0 =
    never. If log lines are further apart, the counts are read once in this many steps."""
    log_every: PositiveInt = 10
    """Steps between log lines; every step is in log.jsonl."""
    tensors_every: Count = 0
    """Times ``log_every``: steps between rows of trust ratio, ||x||, ||u|| and ||g|| of every
    weight matrix in ``tensors.jsonl``, TensorBoard histograms, and a heat map at the end; 0 =
    none."""
    noise_every: Count = 0
    """Steps between measurements of the gradient noise scale (arXiv 1812.06162), in sequences;
    each reads one micro-batch's gradients once more; 0 = none. Engines sharded and ddp."""
    eval_every: Count = 0
    """Steps between held-out evaluations besides the first and the last; 0 = only those two."""
    eval_sequences: PositiveInt = 512
    """Held-out sequences of an evaluation."""
    save_every: Count = 0
    """Steps between checkpoints besides the one at the end; 0 = only that one."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints in the run directory; older ones are removed."""
    save_async: bool = True
    """Write checkpoints while training continues, from a copy in host memory."""
    run_dir: str = ""
    """Where everything is written; empty = ``runs/<name of the config file>``."""
    resume: Literal["auto", "never"] = "auto"
    """``auto``: continue from the checkpoint in ``run_dir`` if there is one. ``never``: start over;
    checkpoints of an earlier run in ``run_dir`` are removed. Not with torchrun --max-restarts."""
    init_from: str = ""
    """A run or one of its checkpoints, whose weights start this one (BERT's second phase starts
    from its first)."""
    timeout_minutes: Annotated[float, Range(above=0, at_most=525_600)] = 30.0
    """A rank that waits longer than this for another one ends the run."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The whole file.

    Raises:
        ConfigError: sections that contradict each other.
    """

    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        if self.data.seq_len > self.model.max_position_embeddings:
            raise ConfigError(
                f"data.seq_len ({self.data.seq_len}) is longer than "
                f"model.max_position_embeddings ({self.model.max_position_embeddings})"
            )

    @property
    def run_dir(self) -> Path:
        return expanded(self.train.run_dir)

    @property
    def init_from(self) -> Path | None:
        return expanded(self.train.init_from) if self.train.init_from else None

    @property
    def track_grad_norm(self) -> bool:
        """The optimizer's option. Every step pays for it, so only where rows of tensors want the
        norm of each, or the norm of all comes with neither clipping nor skipping."""
        options = self.optim.options()
        known = options.get("max_grad_norm") or options.get("nonfinite") == "skip"
        return bool(self.train.tensors_every) or not known

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)


def expanded(path: str) -> Path:
    """With ``~`` as the home folder, which no shell has seen in a file of settings."""
    return Path(os.path.expanduser(path))


SECTIONS: dict[str, type[_Section]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read ``path`` and apply ``overrides``, each ``section.key=value`` or ``--section.key=value``
    with value in TOML syntax (a bare word is a string, ``none`` unsets an optional key). They
    differ in how messages name them: as ``--set section.key=value``, or as they are.

    Raises:
        ConfigError: anything that is not a valid run; the message says what and where.
    """
    path = Path(path)
    sections = _read_toml(path)
    origins: dict[tuple[str, str], str] = {}
    for override in overrides:
        origin = override if override.startswith("--") else f"--set {override}"
        section, key, text = _split_override(override.removeprefix("--"), origin)
        sections.setdefault(section, {})[key] = _override_value(section, key, text)
        origins[section, key] = origin
    if not sections.setdefault("train", {}).get("run_dir"):
        sections["train"]["run_dir"] = f"runs/{path.stem}"

    built: dict[str, Any] = {}
    for section, owner in SECTIONS.items():
        values = sections.get(section, {})
        names = {field.name: field for field in dataclasses.fields(owner)}
        for key in values:
            if key not in names:
                origin = origins.get((section, key), str(path))
                raise ConfigError(f"{origin}: {_unknown(section, key)}")
        for key, field in names.items():
            if key not in values and field.default is dataclasses.MISSING:
                raise ConfigError(f"{path}: {section}.{key} is missing")
        try:
            built[section] = owner(**values)
        except _FieldError as error:
            origin = origins.get((section, error.key), str(path))
            raise ConfigError(f"{origin}: {section}.{error}") from None
    try:
        return PretrainConfig(**built)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _read_toml(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this file: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for section, values in content.items():
        if section not in SECTIONS:
            kind = "section" if isinstance(values, dict) else "key outside a section:"
            raise ConfigError(f"{path}: unknown {kind} {section}; sections are {_listed()}")
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: {section} must be a section, [{section}]")
    return content


def _split_override(override: str, origin: str) -> tuple[str, str, str]:
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise ConfigError(f"{origin}: must be section.key=value")
    if section not in SECTIONS:
        raise ConfigError(f"{origin}: unknown section {section}; sections are {_listed()}")
    return section, key, text.strip()


def _override_value(section: str, key: str, text: str) -> Any:
    hint = get_type_hints(SECTIONS[section], include_extras=True).get(key)
    # A run named 2024 or a file named 1e-3 must stay text.
    if hint is str:
        return text.strip("\"'")
    if text.lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _unknown(section: str, key: str) -> str:
    names = [field.name for field in dataclasses.fields(SECTIONS[section])]
    close = difflib.get_close_matches(key, names, n=1)
    hint = f"did you mean {section}.{close[0]}?" if close else f"keys are {', '.join(names)}"
    return f"unknown key {section}.{key}; {hint}"


def _listed() -> str:
    return ", ".join(f"[{name}]" for name in SECTIONS)


def converted(hint: Any, value: Any) -> Any:
    """``value`` as ``hint`` asks; ValueError where it does not fit."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        number = converted(args[0], value)
        if number not in args[1]:
            raise ValueError
        return number
    if origin is Literal:
        for choice in args:
            # True == 1, but a boolean is not a valid choice.
            if value == choice and type(value) is type(choice):
                return choice
        raise ValueError
    if origin in (Union, types.UnionType):
        return None if value is None else converted(args[0], value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError
        each = args[:1] * len(value) if args[-1] is ... else args
        return tuple(converted(arg, item) for arg, item in zip(each, value, strict=True))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError
    if hint is str:
        value.encode()  # what cannot be written as text cannot be reported either
    return value


def describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{describe(args[0])} {args[1]}"
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in args)
    if origin in (Union, types.UnionType):
        return describe(args[0])
    if origin is tuple and args[-1] is ...:
        return f"a list, each {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)} values, each {describe(args[0])}"
    names: Mapping[Any, str] = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
    }
    return names.get(hint, hint.__name__)
