"""The command line of launch/pretrain.py, its bar, and its rules."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
import torch
from pretraining import checkpoint, command_line
from pretraining.config import SECTIONS, ConfigError, load_config
from pretraining.engine_sharded import ShardedEngine
from pretraining.report import LiveBar, TrainRow, Trust, summarize_trust
from rich.console import Console
from torch import nn

from dist_lamb.rules import RULES

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.toml"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--optim.lr 1e-3", {"optim.lr": 1e-3}),
        ("--optim.lr=1e-3 --train.steps 7", {"optim.lr": 1e-3, "train.steps": 7}),
        ("--optim.betas 0.8 0.9", {"optim.betas": (0.8, 0.9)}),
        ("--optim.betas [0.8,0.9]", {"optim.betas": (0.8, 0.9)}),
        ("--train.compile", {"train.compile": True}),
        ("--train.save_async false", {"train.save_async": False}),
        ("--train.run_dir 2024", {"train.run_dir": "2024"}),
        ("--optim.warmup_epochs none --optim.warmup_fraction 0.1", {"optim.warmup_epochs": None}),
        ("--optim.lr 1 --set optim.lr=2 train.seed=3", {"optim.lr": 2.0, "train.seed": 3}),
        ("--set optim.lr=2 --optim.lr 1", {"optim.lr": 1.0}),
        ("--optim.rule adamw", {"optim.rule": "adamw"}),
    ],
)
def test_options_replace_what_the_file_says(words: str, expected: dict[str, object]) -> None:
    config = load_config(*command_line.parse([str(QUICKSTART), *words.split()], ""))
    for name, value in expected.items():
        section, key = name.split(".")
        found = getattr(getattr(config, section), key)
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a.toml --optim.lrr 1", "unknown option --optim.lrr; did you mean --optim.lr?"),
        ("a.toml --optim.lrr=1", "unknown option --optim.lrr; did you mean --optim.lr?"),
        ("a.toml --lr 1", "unknown option --lr; did you mean --optim.lr?"),
        ("a.toml --train.lr 1", "unknown option --train.lr; did you mean --optim.lr?"),
        ("a.toml --xyzzy", "unknown option --xyzzy ("),
        ("a.toml b", "unexpected argument b"),
        ("a.toml --optim.lr", "argument --optim.lr: expected one argument"),
        ("--optim.lr 1", "the following arguments are required: CONFIG"),
    ],
)
def test_bad_options(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command_line.parse(words.split(), "")
    assert str(caught.value).startswith(message)
    assert "--help" in str(caught.value)


def test_a_bad_value_is_named_as_it_was_given() -> None:
    with pytest.raises(ConfigError, match=r"^--optim\.lr=big: optim\.lr must be a number > 0, got"):
        load_config(*command_line.parse([str(QUICKSTART), "--optim.lr", "big"], ""))


def test_help_has_every_key_with_its_meaning_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        command_line.parse(["--help"], "About.")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    options = {word.split()[0]: " ".join(word.split()[1:]) for word in printed.split("\n  --")[1:]}
    for section, owner in SECTIONS.items():
        for field in dataclasses.fields(owner):
            text = options.pop(f"{section}.{field.name}")
            meaning, bounds = text.rsplit(" (", 1)
            assert len(meaning.split()) > 2, text
            assert ("required" if field.default is dataclasses.MISSING else "default") in bounds
    assert list(options) == ["set"]


def test_the_bar_fits_80_columns() -> None:
    screen = io.StringIO()
    console = Console(
        file=screen, width=80, force_terminal=True, highlight=False, color_system=None
    )
    bar = LiveBar(0, 7038, console)
    trust = Trust(min=0.0123, median=0.123, max=12.3, groups={})
    row = TrainRow(1234, 10.1234, 6e-3, 181234.0, 9, 0, grad_norm=123.4, trust=trust)
    bar.train([row])
    bar.train([dataclasses.replace(row, step=1235, skipped_steps=12)])
    bar.say("a message")
    bar.close()
    lines = re.sub(r"\x1b\[[?\d]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("a message") for line in lines)
    (first, second) = [line for line in lines if "1235/7038" in line or "loss" in line][-2:]
    assert "━" * 8 in first
    assert "18%" in first
    assert "eta" in first
    assert second.startswith("loss 10.1234  lr 6.0e-03  |g| 123  181.2k tokens/s  skipped 12")


@pytest.mark.parametrize("rule", RULES)
def test_a_comparison_is_one_option(rule: str) -> None:
    """Every rule trains, with the settings of a recipe for LAMB, and no parameter stays."""
    recipe = QUICKSTART.with_name("bert_large_phase1.toml")
    config = load_config(recipe, [f"--optim.rule={rule}", "--optim.stage=1"])
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    nn.init.zeros_(model[0].bias)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = ShardedEngine(model, config, 1e-2)
    for _ in range(2):
        with engine.micro_batch(last=True):
            engine.backward(model(torch.randn(8, 4)).square().sum())
        engine.step()
    norm = engine.grad_norm()
    engine.optimizer.synchronize()
    assert norm is not None
    assert 0 < float(norm) < math.inf
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name
    trust = summarize_trust(engine.trust_ratios(), {n: p.shape for n, p in before.items()})
    assert trust is not None
    assert 0 < trust.min <= trust.max < math.inf
    assert {group["rule"] for group in engine.optimizer.param_groups} == (
        {"adamh", "adamw"} if rule == "adamh" else {rule}
    )


def test_a_checkpoint_older_than_a_key_has_its_default() -> None:
    own = load_config(QUICKSTART, ["optim.rule=lars"]).as_dict()
    older = {name: dict(values) for name, values in own.items()}
    del older["optim"]["rule"], older["train"]["noise_every"]
    assert checkpoint._changes(older, own) == {"optim.rule": "'lamb' -> 'lars'"}
