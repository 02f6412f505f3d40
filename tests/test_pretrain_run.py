"""Real runs of launch/pretrain.py: the number of ranks and an interruption leave no trace."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pretrain
import pytest
import torch
import torch.distributed as dist
from pretrain_runs import (
    ROOT,
    STEPS,
    broken_run,
    crash,
    difference,
    numbers,
    refused,
    run_here,
    run_on_ranks,
)
from pretraining import PACKAGES
from pretraining.config import ConfigError, load_config
from pretraining.ranks import Ranks
from pretraining.report import read_log
from ranks import run_ranks

from dist_lamb import checkpoint
from dist_lamb.checkpoint import Checkpoint, checkpoints

# pytest's captured stderr is no file; torchrun's workers have a real one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unable to enable fault handler"),
    pytest.mark.usefixtures("no_process_group_left"),
]


@pytest.mark.xdist_group("programs")
def test_one_rank_two_ranks_and_a_crash_give_the_same_curve(config: Path, tmp_path: Path) -> None:
    one = run_here(config, tmp_path / "one")
    train = [row for row in one if row["kind"] == "train"]
    assert [row["step"] for row in train] == list(range(1, STEPS + 1))
    assert [row["step"] for row in one if row["kind"] == "held_out"] == [0, 4, 8, 12]
    assert one[-1]["loss"] < one[0]["loss"] - 0.3

    printed = run_on_ranks(config, tmp_path / "two")
    two = read_log(tmp_path / "two" / "log.jsonl")
    assert difference(one, two) < 1e-3
    assert f"held-out loss {two[0]['loss']:.3f} -> {two[-1]['loss']:.3f}" in printed

    broken = tmp_path / "broken"
    with pytest.raises(RuntimeError, match=r"exit codes \[9, 9\]"):
        run_on_ranks(config, broken, before=crash)
    left = read_log(broken / "log.jsonl")
    assert max(row["step"] for row in left) == 6
    assert [path.name for path in checkpoints(broken / "checkpoints")] == ["step-5"]

    # On one rank what two had saved, and on two.
    fewer = tmp_path / "fewer"
    shutil.copytree(broken, fewer)
    assert difference(run_here(config, fewer), one) < 1e-3
    printed = run_on_ranks(config, broken)
    assert "resumed at step 5, sample 80, from " in printed
    assert numbers(read_log(broken / "log.jsonl")) == numbers(two)


def test_dropout_and_another_micro_batch_resume_exactly(config: Path, tmp_path: Path) -> None:
    dropout = ("model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1")
    whole = run_here(config, tmp_path / "whole", *dropout)
    broken_run(config, tmp_path / "broken", *dropout)
    assert numbers(run_here(config, tmp_path / "broken", *dropout)) == numbers(whole)
    # Dropout does something, so that equality above means something.
    plain = run_here(config, tmp_path / "plain")
    assert difference(plain, whole) > 1e-3
    at_once = run_here(config, tmp_path / "at_once", "train.micro_batch=16")
    assert difference(plain, at_once) < 1e-3


def test_what_a_run_leaves(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import BertConfig, BertForMaskedLM

    rows = run_here(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert "sha256" in printed
    assert "60 files" in printed

    groups = {"embeddings", "layer 00", "layer 01", "head"}
    for row in rows:
        if row["kind"] == "train":
            assert row["tokens_per_s"] > 0
            # Steps that are logged or evaluated, and those before a checkpoint.
            assert (row["trust"] is not None) == (row["step"] in {3, 4, 5, 6, 8, 9, 10, 12})
        if row.get("trust"):
            trust = row["trust"]
            assert trust["groups"].keys() == groups
            assert 0 < trust["min"] <= trust["median"] <= trust["max"]
        if row["kind"] == "held_out":
            assert 0 <= row["accuracy"] <= 1

    run = tmp_path / "run"
    about = json.loads((run / "run.json").read_text())
    assert about["config"]["train"]["steps"] == STEPS
    assert about["corpus"]["files"] == 60
    picture = (run / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == {
        row["step"]: pytest.approx(row["loss"]) for row in rows if row["kind"] == "train"
    }
    assert len(events.Scalars("held_out/accuracy")) == 4
    assert {f"trust_ratio_of/{group}" for group in groups} <= set(events.Tags()["scalars"])

    kept = [path.name for path in checkpoints(run / "checkpoints")]
    assert kept == ["step-10", f"step-{STEPS}"]
    saved = Checkpoint(run / "checkpoints" / f"step-{STEPS}")
    assert saved.step == STEPS
    assert saved.extra["samples_seen"] == STEPS * 16
    assert saved.extra["tokens_seen"] == STEPS * 16 * 16
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=400,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )
    weights = {k.removeprefix("model."): k for k in saved.tensors if k.startswith("model.")}
    model.load_state_dict({name: saved.tensor(key) for name, key in weights.items()}, strict=False)
    assert set(weights) <= set(model.state_dict())
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "curves.png",
        "log.jsonl",
        "run.json",
        "tensorboard",
        "tokenizer.json",
    ]


def test_another_start_and_a_longer_run(config: Path, tmp_path: Path, capsys: Any) -> None:
    run_here(config, tmp_path / "first", "train.steps=4")
    capsys.readouterr()
    assert len(run_here(config, tmp_path / "first", "train.steps=4")) == 4 + 2
    assert "nothing left to do" in capsys.readouterr().out

    longer = run_here(config, tmp_path / "first", "train.steps=6")
    assert "train.steps: 4 -> 6" in capsys.readouterr().out
    assert [row["step"] for row in longer if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]

    start = f"train.init_from={tmp_path}/first"
    second = run_here(config, tmp_path / "second", start, "train.steps=1")
    assert second[0]["loss"] == longer[-1]["loss"]

    with pytest.raises(SystemExit):
        run_here(config, tmp_path / "first", "optim.lr=1e-3")
    assert "settings (optim.lr: 0.05 -> 0.001); choose another" in capsys.readouterr().err
    dist.destroy_process_group()
    fresh = run_here(config, tmp_path / "first", "optim.lr=1e-3", "train.resume=never")
    assert numbers(fresh)[0][1] == 0
    assert len(fresh) == STEPS + 4


def test_what_a_run_did_not_make_stays(config: Path, tmp_path: Path, capsys: Any) -> None:
    run, short = tmp_path / "run", "train.steps=2"
    saves, elsewhere = run / "checkpoints", tmp_path / "other disk"
    theirs = saves / "step-9"
    theirs.mkdir(parents=True)
    (theirs / "weights").write_text("theirs")
    (saves / "notes.txt").write_text("mine")
    for resume in ("auto", "never"):
        message = refused(config, run, capsys, short, f"train.resume={resume}")
        assert f"{saves}: step-9 cannot be read" in message
        assert "move them away, or choose another train.run_dir" in message
    # The way out; and then the folder is a link to one on another disk.
    theirs.rename(tmp_path / "step-9")
    saves.rename(elsewhere)
    saves.symlink_to(elsewhere)
    assert numbers(run_here(config, run, short))[-1][1] == 2
    assert "nothing left to do" not in capsys.readouterr().out
    run_here(config, run, short)
    assert "nothing left to do" in capsys.readouterr().out

    # A checkpoint of another program, whole as it is, is not this program's to remove.
    model = torch.nn.Linear(2, 2)
    checkpoint.save(saves, 7, model)
    assert "step-7 cannot be read, or are not of this program" in refused(
        config, run, capsys, short, "train.resume=never"
    )
    shutil.rmtree(saves / "step-7")
    run_here(config, run, short, "train.resume=never")
    assert "resumed" not in capsys.readouterr().out
    # This process has written there by itself too, and owns the folder until it ends.
    left = {path.name for path in elsewhere.iterdir() if not path.name.startswith(".owner-")}
    assert left == {"notes.txt", "step-2"}
    assert saves.is_symlink()

    saves.unlink()
    saves.symlink_to(tmp_path / "absent")
    assert f"{saves} is no folder; move it away" in refused(config, run, capsys, short)


def test_a_damaged_log_is_named_and_left(config: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    rows = run_here(config, run, "train.steps=2")
    whole = (run / "log.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged in (
        b'{"kind": "train", "st\xff\n',
        b"3\n",
        b'{"kind": "train"}\n',
        b'{"kind": "train", "step": 1, "trust": null}\n',
        b'{"kind": "train", "step": 1, "trust": {}, "loss": "low"}\n',
        b'{"kind": "held_out", "step": 1, "loss": 1.0, "accuracy": null}\n',
        b'{"kind": "other", "step": 1e999}\n',
    ):
        (run / "log.jsonl").write_bytes(b"".join([lines[0], damaged, *lines[2:]]))
        message = refused(config, run, capsys, "train.steps=3")
        assert f"{run / 'log.jsonl'}, line 2: damaged: " in message
        assert "correct or remove this line, or move the file away" in message
    # Cut short by a crash: that is no damage.
    (run / "log.jsonl").write_bytes(whole + lines[-1][:9])
    longer = run_here(config, run, "train.steps=3")
    assert [row for row in longer if row["step"] <= 2] == rows


@pytest.mark.parametrize("missing", ["rich", "transformers", "dist_lamb"])
def test_missing_packages_are_named_with_their_extra(missing: str, tmp_path: Path) -> None:
    """Without anything of the environment that has them."""
    program = f"""
import importlib.util as util, runpy, sys
find = util.find_spec
util.find_spec = lambda name, *more: None if name == {missing!r} else find(name, *more)
sys.path.insert(0, {str(ROOT / "launch")!r})
runpy.run_path({str(ROOT / "launch" / "pretrain.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"pretrain: error: {missing} not installed; in the repository: pip install -e '.[pretrain]'"
    ]


def test_the_extra_is_what_the_program_checks() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extra = tomllib.load(file)["project"]["optional-dependencies"]["pretrain"]
    assert sorted(re.split("[<>=]", requirement)[0] for requirement in extra) == sorted(PACKAGES)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.path=/absent", "data.path = '/absent': is no file, folder or glob of files"),
        ("train.micro_batch=3", "train.micro_batch = 3 does not divide the 16 sequences"),
        ("optim.lrr=1", "unknown key optim.lrr; did you mean optim.lr?"),
        ("train.init_from=absent", "train.init_from: absent: no checkpoint here"),
        ("optim.lr=1e30", "lower optim.lr or lengthen the warm-up"),
    ],
)
def test_errors_are_one_line(
    config: Path, tmp_path: Path, capsys: Any, override: str, message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_here(config, tmp_path / "run", override)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pretrain: error: ")
    assert message in error


def _without_disk(rank: int) -> None:
    raise ConfigError(f"no disk on rank {rank}")


def _engines_change(rank: int, world: int, config: Path, runs: Path) -> None:
    """Half a run with one engine, the rest with the other, both ways round."""
    ranks = Ranks(rank, rank, world, torch.device("cpu"))
    # What one rank cannot do fails on all of them, with its error.
    with pytest.raises(ConfigError, match="no disk on rank 1"):
        ranks.together(partial(_without_disk, rank), of=rank == 1)
    assert ranks.together(lambda: rank + 5, of=rank == 0) == (5 if rank == 0 else None)
    for name, engines in (("one", ("sharded", "ddp")), ("other", ("ddp", "sharded"))):
        for steps, engine in zip((STEPS // 2, STEPS), engines):
            overrides = [f"train.run_dir={runs / name}", f"train.steps={steps}"]
            # Eight sequences a rank are two micro-batches: gradients accumulate.
            pretrain.train(load_config(config, [*overrides, f"optim.engine={engine}"]), ranks)


@pytest.mark.xdist_group("programs")
def test_engines_give_the_same_curve_and_resume_each_other(config: Path, tmp_path: Path) -> None:
    run_ranks(2, tmp_path, _engines_change, config, tmp_path / "runs")
    one, other = (read_log(tmp_path / "runs" / name / "log.jsonl") for name in ("one", "other"))
    assert [row["step"] for row in one if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert difference(one, other) < 1e-4
    for a, b in zip(one, other, strict=True):
        if a.get("trust"):
            assert a["trust"]["median"] == pytest.approx(b["trust"]["median"], rel=1e-3)
